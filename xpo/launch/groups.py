"""From groups of a configuration with a `_target_`, the judge and the reward model, to objects."""

import inspect
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate

from xpo.config.errors import ConfigError, first_line, nearest
from xpo.config.schema import REWARD_JUDGE, is_group, needs_reward_model
from xpo.data.store import OFF
from xpo.judges import CachedJudge, Judge
from xpo.rewards import CachedReward, RewardModel

Group = dict[str, Any]


def check_target(key: str, group: Group) -> None:
    """ConfigError unless every `_target_` in a group exists, and takes the other keys beside it (but `cache`)."""
    target = group.get("_target_")
    if target is not None:
        try:
            parameters = inspect.signature(get_method(target)).parameters
        except (ImportError, ValueError, AttributeError) as error:
            reason = first_line(error.__cause__ or error)
            raise ConfigError(f"{key}._target_={target!r} cannot be imported ({reason}); correct the name") from error
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        for name, value in group.items():
            if not (name.startswith("_") or name == "cache" or name in parameters or takes_any):
                raise ConfigError(f"{key}.{name}={value!r} is not an option of {target}{nearest(name, parameters)}")
        given = set(group) | ({"reward_model"} if target == REWARD_JUDGE else set())
        for name, parameter in parameters.items():
            named = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            if named and parameter.default is inspect.Parameter.empty and name not in given:
                raise ConfigError(f"{key}.{name} has no value, and {target} needs one; give it with +{key}.{name}=...")
    for name, value in group.items():
        if isinstance(value, dict):
            check_target(f"{key}.{name}", value)


def build_preference(judge: Group, reward_model: Group) -> tuple[RewardModel | None, Judge]:
    """The reward model, if any, and the judge.

    With `judge.cache` each judge and reward model that has a fingerprint remembers what it said; what is made of
    others (a mix, a rule) asks them. An inner judge may have a `cache` of its own. ConfigError if there is nothing to
    remember, or if an argument is wrong.
    """
    cache, kept = judge.get("cache", "off"), list[str]()
    # A judge of its own comes first: it is where a missing key or server is noticed at once.
    if needs_reward_model(judge):
        scorer = build_group(reward_model, None, cache, kept)
        made = build_group(judge, scorer, cache, kept)
    else:
        made = build_group(judge, None, cache, kept)
        scorer = build_group(reward_model, None, cache, kept) if is_group(reward_model) else None
    if cache not in OFF and not kept:
        raise ConfigError(
            f"judge.cache={cache!r} has nothing to keep: {type(made).__name__} has no fingerprint; "
            "define its property `fingerprint`, or set judge.cache=off"
        )
    return scorer, made


def build_group(
    group: Group, reward_model: RewardModel | None = None, cache: Any = "off", kept: list[str] | None = None
) -> Any:
    """What a group makes, from what its inner groups make. RewardJudge gets `reward_model` unless it has one.

    `kept` gets the names of those that remember what they said.
    """
    cache = group.get("cache", cache)
    inner: dict[str, Any] = {}
    for name, value in group.items():
        if is_group(value):
            inner[name] = build_group(value, reward_model, cache, kept)
        elif isinstance(value, dict) and any(is_group(part) for part in value.values()):
            inner[name] = {key: build_group(part, reward_model, cache, kept) for key, part in value.items()}
    if group["_target_"] == REWARD_JUDGE and "reward_model" not in inner:
        inner["reward_model"] = reward_model
    plain = {name: value for name, value in group.items() if name not in inner and name != "cache"}
    try:  # Hydra makes a partial of it: were inner objects part of the configuration, it would copy them
        make = instantiate({"_convert_": "all", **plain, "_partial_": True})
    except InstantiationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    made = make(**inner)
    if cache in OFF or inner or made.fingerprint is None:
        return made
    if kept is not None:
        kept.append(type(made).__name__)
    return CachedJudge(made, cache) if isinstance(made, Judge) else CachedReward(made, cache)
