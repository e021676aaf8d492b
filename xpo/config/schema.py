"""The whole configuration: its groups together, the rules between them, and what of it names a run.

A value of the wrong type or out of range raises ConfigError before anything is loaded.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from xpo.config import checks
from xpo.config import options as groups
from xpo.config.errors import ConfigError
from xpo.config.options import LossOptions, Options, PreferenceOptions, Role, SamplingOptions, is_group, keys

REWARD_JUDGE = "xpo.judges.RewardJudge"
# Arguments of judges that say how they are asked, not what they answer.
_JUDGE_OPERATION = ("cache", "concurrency", "timeout_s", "max_retries", "max_requests")


@dataclass
class TrainSchema:
    """`python -m xpo.train`. The groups judge and reward_model are the arguments of their `_target_`."""

    model: groups.ModelOptions = field(default_factory=groups.ModelOptions)
    lora: groups.LoraOptions = field(default_factory=groups.LoraOptions)
    judge: dict[str, Any] = field(default_factory=lambda: {"cache": "off"})
    reward_model: dict[str, Any] = field(default_factory=dict)
    data: groups.DataOptions = field(default_factory=groups.DataOptions)
    preference: groups.PreferenceOptions = field(default_factory=groups.PreferenceOptions)
    loss: groups.LossOptions = field(default_factory=groups.LossOptions)
    sampler: groups.SamplerOptions = field(default_factory=groups.SamplerOptions)
    replay: groups.ReplayOptions = field(default_factory=groups.ReplayOptions)
    generation: groups.GenerationOptions = field(default_factory=groups.GenerationOptions)
    evaluation: groups.EvaluationOptions = field(default_factory=groups.EvaluationOptions)
    reference: groups.ReferenceOptions = field(default_factory=groups.ReferenceOptions)
    training: groups.TrainingOptions = field(default_factory=groups.TrainingOptions)
    deepspeed: groups.DeepspeedOptions = field(default_factory=groups.DeepspeedOptions)
    launch: groups.LaunchOptions = field(default_factory=groups.LaunchOptions)
    sweep: groups.SweepOptions = field(default_factory=groups.SweepOptions)
    tracking: groups.TrackingOptions = field(default_factory=groups.TrackingOptions)

    def __post_init__(self) -> None:
        training = self.training
        if not is_group(self.judge):
            raise ConfigError("judge has no _target_; choose one with judge=reward or judge=pair_rm")
        check_reward_model(self.judge, self.reward_model)
        own_scores = self.judge["_target_"] == REWARD_JUDGE and "reward_model" not in self.judge
        check_scaling(self.preference, own_scores)
        check_bonus(self.loss)
        check_weights(self.loss, training.iterations, training.max_steps, training.num_train_epochs)
        check_lengths(self.generation)
        check_replay(self.replay.pairs, self.replay.ratio, self.replay.window)
        check_iterations(
            self.sampler.second,
            self.sampler.candidates,
            training.iterations,
            self.reference.update,
            training.max_steps,
            self.replay.updates,
        )
        check_probe(self.evaluation.probe_prompts, self.generation.temperature)
        check_engine(self.generation.engine, self.generation, self.deepspeed.gather_for_generation)
        check_deepspeed(training.tokens_per_micro_batch, self.deepspeed.shard_reference, bool(self.deepspeed.config))
        never, remedy = training.eval_strategy == "no", "set training.eval_strategy=steps"
        if never and training.eval_steps is not None:
            given = f"training.eval_steps={training.eval_steps}"
            raise ConfigError(f"{given} has no effect with training.eval_strategy=no; {remedy}")
        if training.push_to_hub and not training.hub_model_id:
            raise ConfigError("training.push_to_hub=True needs a repository; set training.hub_model_id=owner/name")
        if training.push_pairs and not training.push_to_hub:
            given = "training.push_pairs=True has no effect with training.push_to_hub=False"
            raise ConfigError(f"{given}; set it to true, too, or push later: python -m xpo.push RUN --pairs")
        if never and training.load_best_model_at_end:
            raise ConfigError(f"training.load_best_model_at_end=True needs evaluations; {remedy}")
        check_best(training.save_strategy, training.eval_strategy)
        if self.evaluation.probe_prompts and self.data.eval is None:
            given = f"evaluation.probe_prompts={self.evaluation.probe_prompts}"
            raise ConfigError(f"{given} needs held-out prompts and data.eval=None; set data.eval")
        if not never and self.data.eval is None:
            raise ConfigError(
                f"training.eval_strategy={training.eval_strategy!r} needs held-out prompts and data.eval=None; "
                "set data.eval, or training.eval_strategy=no"
            )


GROUPS: list[type[Options]] = [one.type for one in fields(TrainSchema) if is_dataclass(one.type)]  # type: ignore[misc]
_CHANGEABLE = (Role.LENGTH, Role.OPERATION)
_KEYS = [key for group in GROUPS for key in keys(group)]


@dataclass
class InspectSchema:
    """`python -m xpo.judges`."""

    judge: dict[str, Any] = field(default_factory=lambda: {"cache": "off"})
    other: dict[str, Any] = field(default_factory=dict)
    reward_model: dict[str, Any] = field(default_factory=dict)
    pairs: str = MISSING
    pairs_split: str = "train"
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for judge in (self.judge, self.other):
            check_reward_model(judge, self.reward_model)
        if self.limit is not None:
            checks.count("limit", self.limit)


def check_reward_model(judge: dict[str, Any], reward_model: dict[str, Any]) -> None:
    """ConfigError for a judge that compares scores without a reward model that gives them."""
    if needs_reward_model(judge) and not is_group(reward_model):
        raise ConfigError(
            "judge=reward needs a reward model and reward_model=none; choose a reward_model or another judge"
        )


def needs_reward_model(judge: dict[str, Any]) -> bool:
    """Whether a judge, or one of those it is made of, compares the scores of the run's reward model."""
    own = judge.get("_target_") == REWARD_JUDGE and "reward_model" not in judge
    return own or any(needs_reward_model(value) for value in judge.values() if isinstance(value, dict))


def draws_the_order(judge: dict[str, Any]) -> bool:
    """Whether a judge, or one of those it is made of, is asked in one order, drawn by the texts alone."""
    one = judge.get("both_orders") is False
    return one or any(draws_the_order(value) for value in judge.values() if isinstance(value, dict))


def to_dict(config: TrainSchema) -> dict[str, Any]:
    """The configuration as plain containers, as it is written to config.yaml."""
    return asdict(config)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"alpha": 1}} as {"loss.alpha": 1}; empty dicts vanish, lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def trainer_arguments(config: TrainSchema) -> Iterator[tuple[str, Any]]:
    """The arguments of XPOConfig that a configuration gives, by name; null and {} only where they are no default."""
    for key in _KEYS:
        value = vars(vars(config)[key.group])[key.name]
        if key.argument is not None and value != {} and not (value is None and key.default is None):
            yield key.argument, value


# ---- rules about several keys ------------------------------------------------------------------

Spelling = Callable[[str], str]  # from "generation.max_length" to what the user calls the key
dotted: Spelling = str  # as the command line does


def as_argument(key: str) -> str:
    """As XPOConfig calls a key of these rules."""
    return next(one.argument or one.name for one in _KEYS if f"{one.group}.{one.name}" == key)


def check_lengths(options: SamplingOptions, spelled: Spelling = dotted) -> None:
    """Completions must leave room for a prompt."""
    new, length = spelled("generation.max_new_tokens"), spelled("generation.max_length")
    if options.max_new_tokens >= options.max_length:
        raise ConfigError(
            f"{new}={options.max_new_tokens} leaves no room for a prompt in {length}={options.max_length}; "
            f"raise {length} or lower {new}"
        )


def check_best(save: str, evaluate: str, spelled: Spelling = dotted) -> None:
    """Which checkpoint is best is known from evaluations only."""
    if save == "best" and evaluate == "no":
        kept, evaluations = spelled("training.save_strategy"), spelled("training.eval_strategy")
        raise ConfigError(f"{kept}=best needs evaluations; set {evaluations}=steps")


def check_engine(engine: str, options: SamplingOptions, gather: bool, spelled: Spelling = dotted) -> None:
    """vLLM is sent whole policies, rounds low temperatures up, and applies min_p before top_p, not behind it."""
    if engine != "vllm":
        return
    given, key = f"{spelled('generation.engine')}={engine}", spelled("deepspeed.gather_for_generation")
    if not gather:
        raise ConfigError(f"{given} needs the whole policy and {key}=False; set {key}=True")
    heat, lowest, highest = options.temperature, 0.01, 2.0
    if heat and not lowest <= heat <= highest:
        key = spelled("generation.temperature")
        raise ConfigError(f"{given} takes {key}=0, or from {lowest} to {highest}, not {heat}; choose one of these")
    if options.top_p < 1 and options.min_p:
        top_p, min_p = spelled("generation.top_p"), spelled("generation.min_p")
        raise ConfigError(
            f"{given} would apply {top_p}={options.top_p} and {min_p}={options.min_p} in another order than "
            "transformers; set one of them"
        )


def check_probe(prompts: int, temperature: float, spelled: Spelling = dotted) -> None:
    """Several completions of a prompt are worth drawing only if they differ."""
    if prompts and temperature == 0:
        probe, heat = spelled("evaluation.probe_prompts"), spelled("generation.temperature")
        raise ConfigError(
            f"{probe}={prompts} draws the same completion each time with {heat}=0; set {probe}=0, or raise {heat}"
        )


def check_bonus(options: LossOptions, spelled: Spelling = dotted) -> None:
    """What is said of a bonus needs one."""
    if options.bonus != "none":
        return
    bonus = spelled("loss.bonus")
    if any(options.alpha if isinstance(options.alpha, Sequence) else [options.alpha]):
        alpha = spelled("loss.alpha")
        raise ConfigError(
            f"{alpha}={options.alpha!r} has no effect with {bonus}=none; set {alpha}=0, or choose a bonus"
        )
    for key in ("bonus_on", "bonus_clip", "bonus_per_token"):
        if vars(options)[key] != vars(LossOptions)[key]:
            name = spelled(f"loss.{key}")
            raise ConfigError(f"{name}={vars(options)[key]} has no effect with {bonus}=none; leave it out")


def check_weights(
    options: LossOptions, iterations: int, max_steps: int, epochs: float, spelled: Spelling = dotted
) -> None:
    """A value for each iteration, or else epoch, the last one for the rest, but none for one that never comes."""
    by_epoch = iterations == 1 and max_steps == -1
    name, times = ("training.num_train_epochs", epochs) if by_epoch else ("training.iterations", iterations)
    for key in ("alpha", "beta"):
        values = vars(options)[key]
        if isinstance(values, Sequence) and (by_epoch or iterations > 1) and math.ceil(times) < len(values):
            raise ConfigError(
                f"{spelled(f'loss.{key}')}={values!r} has {len(values)} values for {spelled(name)}={times}; "
                "give one for each at most"
            )


def check_replay(pairs: str, ratio: float, window: int | None, spelled: Spelling = dotted) -> None:
    """What is said of earlier pairs needs some."""
    mode = f"{spelled('replay.pairs')}={pairs}"
    if pairs == "fresh" and ratio != groups.ReplayOptions.ratio:
        key = spelled("replay.ratio")
        raise ConfigError(f"{key}={ratio} has no effect with {mode}; choose window or all, or leave {key} out")
    if pairs != "window" and window is not None:
        key = spelled("replay.window")
        raise ConfigError(f"{key}={window} has no effect with {mode}; choose window, or leave {key} out")


def check_iterations(
    second: str, n: int, iterations: int, update: str, max_steps: int, updates: int, spelled: Spelling = dotted
) -> None:
    """Who draws the second completion, and a reference that moves, need iterations; these need a rollout each."""
    key = spelled("training.iterations")
    for name, value in ((spelled("sampler.second"), second), (spelled("reference.update"), update)):
        if value in ("iterate", "past", "iteration") and iterations == 1:
            raise ConfigError(f"{name}={value} has no effect with {key}=1; set {key}=3, say")
    if 0 < max_steps < iterations * updates:
        steps, passes = spelled("training.max_steps"), spelled("replay.updates")
        raise ConfigError(
            f"{key}={iterations} is more than {steps}={max_steps} holds at {passes}={updates}; "
            f"give {steps}={iterations * updates} or more"
        )
    if second != "best_of_n" and n != groups.SamplerOptions.candidates:
        name = spelled("sampler.candidates")
        raise ConfigError(f"{name}={n} has no effect with {spelled('sampler.second')}={second}; choose best_of_n")


def check_scaling(options: PreferenceOptions, compares_scores: bool, spelled: Spelling = dotted) -> None:
    """Scores can be scaled only where their differences are the margins."""
    for name, neutral in (("normalize_scores", False), ("clip_scores", None)):
        value = vars(options)[name]
        if value != neutral and not compares_scores:
            raise ConfigError(
                f"{spelled(f'preference.{name}')}={value!r} changes the scores that judge=reward compares; "
                f"choose that judge, or leave {spelled(f'preference.{name}')} at {neutral}"
            )


def check_deepspeed(
    tokens_per_micro_batch: int | None, shard_reference: bool, deepspeed: bool, spelled: Spelling = dotted
) -> None:
    """What goes with DeepSpeed only, and what does not."""
    if tokens_per_micro_batch is not None and deepspeed:
        raise ConfigError(
            f"{spelled('training.tokens_per_micro_batch')}={tokens_per_micro_batch} does not go with DeepSpeed, whose "
            f"processes do equally many passes; lower {spelled('training.per_device_train_batch_size')} and raise "
            f"{spelled('training.gradient_accumulation_steps')}"
        )
    if shard_reference and not deepspeed:
        raise ConfigError(
            f"{spelled('deepspeed.shard_reference')}=True needs DeepSpeed; choose deepspeed=zero1, zero2 or zero3"
        )


# ---- what names a run --------------------------------------------------------------------------


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that tells one run from another."""
    named: dict[str, Any] = {}
    for key in _KEYS:
        value = config[key.group][key.name]
        if key.role is not Role.OPERATION and not (key.role is Role.ADDED and value == key.default):
            named.setdefault(key.group, {})[key.name] = value
    named["launch"] = named["launch"]["num_processes"]  # as the names of earlier runs have it
    return named | {"judge": _without_operation(config["judge"]), "reward_model": config["reward_model"]}


def _without_operation(judge: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _without_operation(value) if isinstance(value, dict) else value for key, value in judge.items()}
    return {key: value for key, value in inner.items() if key not in _JUDGE_OPERATION}


def default_of(key: str) -> Any:
    """What a dotted key is if nobody sets it; None for those that no group declares."""
    return next((one.default for one in _KEYS if f"{one.group}.{one.name}" == key), None)


def may_change(key: str) -> bool:
    """Whether a run that goes on with another value of a dotted key is still the same experiment.

    More steps stretch a schedule that depends on them.
    """
    if key.startswith("judge."):
        return key.rpartition(".")[2] in _JUDGE_OPERATION
    return any(f"{key}.".startswith(f"{one.group}.{one.name}.") and one.role in _CHANGEABLE for one in _KEYS)
