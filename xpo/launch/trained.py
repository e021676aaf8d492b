"""What the name of a trained policy stands for: a run, a checkpoint in one, or a model. Layer 0: no torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from xpo.config.compose import check_complete, check_secrets, compose
from xpo.config.errors import ConfigError, first_line, hydra_value
from xpo.config.schema import TrainSchema, needs_reward_model
from xpo.tracking.runs import RunRecord, last_complete_checkpoint

NAME = "RUN_OR_MODEL"  # what the command line calls it
_NEW_TOKENS = 256  # of an answer, where no run says what the policy has learned to say
_ANY_LENGTH = 2**31 - 1  # a conversation may outgrow the prompts of training: the model sets the limit
_GROUPS = ("judge", "reward_model")  # those of which an option may be chosen anew


class Trained(NamedTuple):
    """A policy, and what it was trained with."""

    config: TrainSchema  # of its run, or the defaults around a model; with the words of the command line
    policy: str  # a directory, or the name of a model
    run_dir: Path | None  # None: no run of ours
    judge: str | None  # what its judge is called; None: nobody is to judge


def find_trained(name: str, words: Sequence[str] = (), judge: str | None = None) -> Trained:
    """The policy of this name and its configuration.

    Args:
        name: a run directory, which stands for its final model or else its last checkpoint; the directory of one of
            these; or of any model, or a hub name.
        words: overrides of the configuration.
        judge: an option of conf/judge; "none" for nobody; None for the run's, while a model has none.

    Raises:
        ConfigError: the run has no model yet, its configuration cannot be read, or a word is wrong.
    """
    path = Path(name).expanduser()
    places = [path, *path.absolute().parents[:2]] if path.is_dir() else []  # RUN, RUN/model, RUN/model/checkpoint-N
    run_dir = next((place for place in places if (place / "run.json").is_file()), None)
    words = [*words, *([f"judge={judge}"] if judge not in (None, "none") else [])]
    if run_dir is None:
        given = ["experiment=none", f"model.name={hydra_value(name)}", f"generation.max_new_tokens={_NEW_TOKENS}"]
        (config, _, choices), policy = compose(given), name
    else:
        record = RunRecord.read(run_dir)
        config, choices = written_config(run_dir), record.choices
        policy = str(_last_model(run_dir, record) if path == run_dir else path)
    OmegaConf.update(config, "generation.max_length", _ANY_LENGTH)
    config, chosen = _with_words(config, words)
    check_complete(config)
    check_secrets(config)
    schema: TrainSchema = OmegaConf.to_object(config)  # type: ignore[assignment]
    judged = judge != "none" and (run_dir is not None or "judge" in chosen)
    return Trained(schema, policy, run_dir, _judge_name(schema, choices | chosen) if judged else None)


def _last_model(run_dir: Path, record: RunRecord) -> Path:
    model = run_dir / "model" if record.finished else last_complete_checkpoint(run_dir / "model")
    if model is None:
        raise ConfigError(f"{NAME}={str(run_dir)!r} has no model yet; wait for its first checkpoint")
    return model


def written_config(run_dir: Path) -> DictConfig:
    """The configuration that a run has left."""
    file = run_dir / "config.yaml"
    try:
        content = OmegaConf.load(file)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(
            f"{file} cannot be read ({first_line(error)}); mend it, or give a copy of its model"
        ) from error
    return OmegaConf.merge(OmegaConf.structured(TrainSchema), content)  # type: ignore[return-value]


def _with_words(config: DictConfig, words: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """The configuration with the words of a command line; and the options of groups that they choose."""
    chosen: dict[str, str] = {}
    hydra = [word for word in words if word.startswith("hydra.")]
    plain = [word for word in words if word not in hydra]
    for group in _GROUPS:
        own = [word for word in plain if re.match(rf"\+*{group}[=@.]", word)]
        if any(re.match(rf"{group}[=@]", word) for word in own):  # Hydra knows what an option stands for
            composed, _, choices = compose(["experiment=none", *own, *hydra])
            OmegaConf.update(config, group, composed[group], merge=False)
            chosen[group] = choices[group]
            plain = [word for word in plain if word not in own]
    for word in plain:
        if not re.match(r"\+*\w+\.[\w.]+=", word):
            raise ConfigError(f"{word!r} is no key with a value; write such as generation.temperature=0.7")
    return OmegaConf.merge(config, OmegaConf.from_dotlist([word.lstrip("+") for word in plain])), chosen  # type: ignore[return-value]


def _judge_name(config: TrainSchema, choices: dict[str, Any]) -> str:
    """The option that was chosen, with the reward model's where it compares its scores."""
    scores = f" ({choices['reward_model']})" if needs_reward_model(config.judge) else ""
    return f"{choices['judge']}{scores}"
