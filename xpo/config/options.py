"""Every key of the configuration, once: its type, default and range, and what it has to do with a run's numbers.

One dataclass for each group of conf/, whose files say what the keys mean. The Hydra schema contains these classes,
`XPOConfig` inherits them or quotes their defaults, sampler and labeller receive them. What a key is, is written
behind its type: a check (`positive`), its `Role` unless that is IDENTITY, its `Argument` in XPOConfig.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum, auto
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_type_hints

from omegaconf import MISSING

from xpo.config import checks
from xpo.config.errors import ConfigError

Check = Callable[[str, Any], None]

positive = partial(checks.number, above=0)
not_negative = partial(checks.number, minimum=0)
at_least_one = checks.count
whole = partial(checks.count, minimum=0)


def one_of(*words: str) -> Check:
    """The value is one of these words."""
    return partial(checks.one_of, choices=words)


class Role(Enum):
    """What a key has to do with the numbers of a run."""

    IDENTITY = auto()  # it names the run: with another value it is another one
    LENGTH = auto()  # it names the run, which may go on with another value all the same
    ADDED = auto()  # as IDENTITY, but left out at its default: runs that are older than the key keep their names
    OPERATION = auto()  # it changes no number


@dataclass(frozen=True)
class Argument:
    """The name of a key in XPOConfig, where that is not the same; None: it has none."""

    name: str | None


class Key(NamedTuple):
    """What is declared of a key: see the head of this file."""

    group: str
    name: str
    default: Any
    check: Check | None
    role: Role
    argument: str | None
    nullable: bool

    def check_value(self, spelled: str, value: Any) -> None:
        """ConfigError if a value is out of range; null is in range where the type has it, or it is the default."""
        if self.check is not None and not (value is None and (self.nullable or self.default is None)):
            self.check(spelled, value)


@dataclass
class Options:
    """A group of conf/; building one checks its values."""

    ARE_ARGUMENTS: ClassVar[bool] = False  # whether XPOConfig has the keys by the same names

    def __post_init__(self) -> None:
        for key in keys(type(self)):
            key.check_value(f"{key.group}.{key.name}", vars(self)[key.name])

    @classmethod
    def group(cls) -> str:
        """The name of the group: "loss" for LossOptions."""
        return cls.__name__.removesuffix("Options").lower()


def keys(group: type[Options]) -> list[Key]:
    """The keys of a group, as they are declared."""
    hints = get_type_hints(group, include_extras=True)
    found = []
    for one in fields(group):
        # Of Annotated; a plain type has none. What is neither Role nor Argument is the check.
        declared = {type(part): part for part in getattr(hints[one.name], "__metadata__", ())}
        role = declared.pop(Role, Role.IDENTITY)
        argument = declared.pop(Argument, Argument(one.name if group.ARE_ARGUMENTS else None)).name
        check = next(iter(declared.values()), None)
        nullable = type(None) in get_args(getattr(hints[one.name], "__origin__", hints[one.name]))
        found.append(Key(group.group(), one.name, one.default, check, role, argument, nullable))
    return found


# ---- the groups --------------------------------------------------------------------------------


def _named(key: str, value: Any) -> None:
    if not value.strip():
        raise ConfigError(f"{key}={value!r} names nothing; give a name, or null where there may be none")


@dataclass
class ModelOptions(Options):
    name: Annotated[str, _named] = MISSING
    revision: str | None = None
    dtype: Annotated[str, one_of(*checks.DTYPES)] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    reference: Annotated[str | None, _named] = None


def _modules(key: str, value: Any) -> None:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}={value!r} names no modules; give all-linear or a list such as {key}=[q_proj,v_proj]")


@dataclass
class LoraOptions(Options):
    r: Annotated[int, whole] = 0
    alpha: Annotated[int, at_least_one] = 32
    dropout: Annotated[float, not_negative] = 0.0
    target_modules: Annotated[Any, _modules] = "all-linear"


@dataclass
class DataOptions(Options):
    train: Annotated[str, _named] = MISSING
    train_split: str = "train"
    train_limit: Annotated[int | None, at_least_one] = None
    eval: Annotated[str | None, _named] = None
    eval_split: str = "test"
    eval_limit: Annotated[int | None, at_least_one] = None
    prompt_column: str = "prompt"
    prompt_overflow: Annotated[str, one_of("drop", "truncate", "error"), Argument("prompt_overflow")] = "drop"
    special_tokens: Annotated[str, one_of("text", "parse"), Role.ADDED, Argument("special_tokens")] = "text"
    chat_template_kwargs: Annotated[dict[str, Any], Argument("chat_template_kwargs")] = field(default_factory=dict)


BONUSES = ("none", "xpo", "selm", "popo", "vpo", "geb_p", "geb_inverse", "geb_arctanh")


@dataclass
class LossOptions(Options):
    ARE_ARGUMENTS = True
    alpha: Annotated[Any, partial(checks.per_epoch, minimum=0)] = 1e-5
    beta: Annotated[Any, partial(checks.per_epoch, above=0)] = 0.1
    loss_type: Annotated[str, one_of("sigmoid", "ipo", "hellinger", "forward_kl")] = "sigmoid"
    bonus: Annotated[str, one_of(*BONUSES), Role.ADDED] = "xpo"
    bonus_on: Annotated[str | None, one_of("first", "second", "rejected"), Role.ADDED] = None
    bonus_clip: Annotated[float | None, positive, Role.ADDED] = None
    bonus_per_token: Annotated[bool, Role.ADDED] = False
    missing_eos_penalty: Annotated[float | None, positive] = None


@dataclass
class PreferenceOptions(Options):
    ARE_ARGUMENTS = True
    labels: Annotated[str, one_of("hard", "soft", "sampled")] = "hard"
    label_temperature: Annotated[float, positive] = 1.0
    tie_threshold: Annotated[float, not_negative] = 0.0
    normalize_scores: bool = False
    clip_scores: Annotated[float | None, positive] = None


@dataclass
class SamplingOptions(Options):
    ARE_ARGUMENTS = True
    max_new_tokens: Annotated[int, at_least_one] = 64
    max_length: Annotated[int, at_least_one] = 512
    temperature: Annotated[float, not_negative] = 0.9
    top_p: Annotated[float, checks.fraction] = 1.0
    top_k: Annotated[int, whole] = 0
    min_p: Annotated[float | None, checks.fraction] = None
    repetition_penalty: Annotated[float, positive] = 1.0


SAMPLERS = ("reference", "policy", "iterate", "past", "best_of_n")


@dataclass
class SamplerOptions(Options):
    second: Annotated[str, one_of(*SAMPLERS), Role.ADDED, Argument("sampler")] = "reference"
    candidates: Annotated[int, partial(checks.count, minimum=3), Role.ADDED, Argument("sampler_candidates")] = 8


@dataclass
class ReplayOptions(Options):
    pairs: Annotated[str, one_of("fresh", "window", "all"), Role.ADDED, Argument("replay")] = "fresh"
    ratio: Annotated[float, positive, Role.ADDED, Argument("replay_ratio")] = 1.0
    window: Annotated[int | None, at_least_one, Role.ADDED, Argument("replay_window")] = None
    updates: Annotated[int, at_least_one, Role.ADDED, Argument("replay_updates")] = 1


@dataclass
class GenerationOptions(SamplingOptions):
    batch_size: Annotated[int | None, at_least_one, Argument("generation_batch_size")] = None
    kwargs: Annotated[dict[str, Any], Argument("generation_kwargs")] = field(default_factory=dict)
    engine: Annotated[str, one_of("transformers", "vllm"), Role.ADDED, Argument("generation_engine")] = "transformers"
    vllm_eager: Annotated[bool, Role.ADDED, Argument("vllm_enforce_eager")] = False
    vllm_memory: Annotated[float, checks.fraction, Role.OPERATION, Argument("vllm_gpu_memory_utilization")] = 0.3
    vllm_sleep: Annotated[bool, Role.OPERATION, Argument("vllm_enable_sleep_mode")] = True
    vllm_check_steps: Annotated[int | None, at_least_one, Role.OPERATION, Argument("vllm_check_steps")] = 50


def is_group(value: Any) -> bool:
    """Whether a value of the configuration stands for an object: it has a `_target_`."""
    return isinstance(value, dict) and bool(value.get("_target_"))


# What evaluations measure, and the fields of their records. Names that begin with "score" or "ref_" are theirs, too.
_MEASURES = "win_rate lose_rate tie_rate invalid_rate flip_rate kl eos_rate length distinct_2 objective runtime"
_FIELDS = "index prompt completion reference margin label flipped log_ratio ended tokens"
_TAKEN = frozenset([*_MEASURES.split(), *_FIELDS.split()])


def scorer_name(key: str, name: str) -> None:
    """ConfigError for a scorer whose figures would take the place of others."""
    if name in _TAKEN or name.startswith(("score", "ref_")):
        raise ConfigError(f"{key}: {name!r} is what evaluations call something of their own; choose another name")


def _scorers(key: str, scorers: Mapping[str, Any]) -> None:
    for name, scorer in scorers.items():
        scorer_name(key, name)
        if not is_group(scorer):
            where = f"{key}.{name}"
            raise ConfigError(f"{where}={scorer!r} has no _target_; give one, or remove the scorer with ~{where}")


@dataclass
class EvaluationOptions(Options):
    before: bool = True
    after: bool = True
    greedy: Annotated[bool, Argument("eval_greedy")] = False
    show: Annotated[int, whole, Role.OPERATION] = 3
    probe_prompts: Annotated[int, whole, Role.ADDED, Argument("probe_prompts")] = 0
    probe_samples: Annotated[int, partial(checks.count, minimum=2), Role.ADDED, Argument("probe_samples")] = 8
    scorers: Annotated[dict[str, Any], _scorers] = field(default_factory=dict)


@dataclass
class ReferenceOptions(Options):
    update: Annotated[str, one_of("never", "iteration"), Role.ADDED, Argument("reference_update")] = "never"
    store: Annotated[str | None, Role.OPERATION, Argument("reference_store")] = None
    batch_size: Annotated[int, at_least_one, Role.OPERATION, Argument("reference_batch_size")] = 32


def _max_steps(key: str, value: Any) -> None:
    if value != -1:
        checks.count(key, value)


def _without_keys(key: str, given: Mapping[str, Any]) -> None:
    for word, value in given.items():
        if word in TrainingOptions.__dataclass_fields__:
            raise ConfigError(f"{key}.{word}={value!r} has its own key; set training.{word}")


@dataclass
class TrainingOptions(Options):
    """Names and meanings of transformers.TrainingArguments, but for a few that conf/training/default.yaml explains.

    The defaults are the command line's; XPOConfig keeps transformers' where they differ.
    """

    ARE_ARGUMENTS = True
    max_steps: Annotated[int, _max_steps, Role.LENGTH] = -1
    num_train_epochs: Annotated[float, positive] = 1.0
    iterations: Annotated[int, at_least_one, Role.ADDED] = 1
    per_device_train_batch_size: Annotated[int, at_least_one] = 8
    per_device_eval_batch_size: Annotated[int, at_least_one] = 16
    gradient_accumulation_steps: Annotated[int, at_least_one] = 1
    learning_rate: Annotated[float, not_negative] = 5e-7
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: Annotated[float, not_negative] = 0.1
    optim: str = "adamw_torch_fused"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool | None = None
    fp16: bool = False
    tf32: bool | None = None
    gradient_checkpointing: bool = False
    pair_forward: Annotated[str, one_of("auto", "packed", "shared", "separate")] = "auto"
    tokens_per_micro_batch: Annotated[int | None, at_least_one] = None
    torch_compile: bool = False
    use_liger_kernel: bool = False
    use_cpu: bool = False
    seed: Annotated[int, checks.seed] = 42
    data_seed: Annotated[int | None, checks.seed] = None
    full_determinism: bool = False
    logging_steps: Annotated[float, positive] = 10
    logging_first_step: bool = False
    eval_strategy: Annotated[str, one_of("no", "steps", "epoch")] = "no"
    eval_steps: Annotated[float | None, positive] = None
    save_strategy: Annotated[str, one_of("no", "steps", "epoch", "best"), Role.LENGTH] = "steps"
    save_steps: Annotated[float, positive, Role.LENGTH] = 100
    save_total_limit: Annotated[int | None, Role.OPERATION] = 2
    save_only_model: Annotated[bool, Role.LENGTH] = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    dataloader_num_workers: int = 0
    dataloader_drop_last: bool = False
    ddp_timeout: int = 1800
    disable_tqdm: Annotated[bool, Role.OPERATION] = False
    push_to_hub: Annotated[bool, Role.LENGTH] = False
    push_pairs: Annotated[bool, Role.OPERATION] = False
    hub_model_id: Annotated[str | None, Role.LENGTH] = None
    hub_strategy: Annotated[str, one_of("end", "every_save"), Role.LENGTH] = "every_save"
    hub_private_repo: Annotated[bool | None, Role.LENGTH] = None
    kwargs: Annotated[dict[str, Any], _without_keys, Argument(None)] = field(default_factory=dict)
    keep_training_state: Annotated[bool, Role.OPERATION, Argument(None)] = True
    profile: Annotated[bool, Role.OPERATION, Argument(None)] = False
    resume: Annotated[str | None, Role.OPERATION, Argument(None)] = None


@dataclass
class DeepspeedOptions(Options):
    config: Annotated[dict[str, Any], Argument("deepspeed")] = field(default_factory=dict)
    gather_for_generation: Annotated[bool, Argument("ds3_gather_for_generation")] = True
    shard_reference: Annotated[bool, Argument("shard_reference")] = False


@dataclass
class LaunchOptions(Options):
    num_processes: Annotated[int, at_least_one] = 1
    command: Annotated[str | None, Role.OPERATION] = None
    jobs: Annotated[int, at_least_one, Role.OPERATION] = 1
    devices: Annotated[list[int] | None, Role.OPERATION] = None
    timeout: Annotated[float | None, positive, Role.OPERATION] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices is not None and len(self.devices) < self.jobs * self.num_processes:
            raise ConfigError(
                f"launch.devices={self.devices} is too few for launch.jobs={self.jobs} with "
                f"launch.num_processes={self.num_processes} each; give {self.jobs * self.num_processes} devices"
            )


@dataclass
class SweepOptions(Options):
    name: Annotated[str | None, Role.OPERATION] = None
    seeds: Annotated[int, at_least_one, Role.OPERATION] = 1
    rerun: Annotated[bool, Role.OPERATION] = False


LOGGERS = ("tensorboard", "trackio", "wandb")


def _loggers(key: str, value: Any) -> None:
    for name in [value] if isinstance(value, str) else value:
        checks.one_of(key, name, LOGGERS)


@dataclass
class TrackingOptions(Options):
    enabled: Annotated[bool, Role.OPERATION] = True
    report_to: Annotated[Any, _loggers, Role.OPERATION] = None
    uri: Annotated[str | None, Role.OPERATION] = None
    experiment: Annotated[str, Role.OPERATION] = "xpo"
    run_name: Annotated[str | None, Role.OPERATION] = None
    tags: Annotated[dict[str, str], Role.OPERATION] = field(default_factory=dict)
