"""The types of the Hydra configuration. Layer 0: no torch, so that `--cfg job` answers at once.

Every group of conf/ has one dataclass here, but for judge, reward_model and experiment; values are documented where
they are set, in the YAML files. A value of the wrong type or out of range raises ConfigError before anything is loaded.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from xpo.config import checks
from xpo.config.errors import ConfigError


@dataclass
class ModelSchema:
    name: str = MISSING
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    reference: str | None = None

    def __post_init__(self) -> None:
        checks.one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass
class LoraSchema:
    r: int = 0
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Any = "all-linear"

    def __post_init__(self) -> None:
        checks.number("lora.r", self.r, minimum=0)
        checks.number("lora.alpha", self.alpha, minimum=1)
        checks.number("lora.dropout", self.dropout, minimum=0)
        modules = self.target_modules if isinstance(self.target_modules, list) else [self.target_modules]
        if not modules or not all(isinstance(module, str) for module in modules):
            raise ConfigError(
                f"lora.target_modules={self.target_modules!r} names no modules; "
                "give all-linear or a list such as lora.target_modules=[q_proj,v_proj]"
            )


@dataclass
class DataSchema:
    train: str = MISSING
    train_split: str = "train"
    train_limit: int | None = None
    eval: str | None = None
    eval_split: str = "test"
    eval_limit: int | None = None
    prompt_column: str = "prompt"
    prompt_overflow: str = "drop"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.one_of("data.prompt_overflow", self.prompt_overflow, ("drop", "truncate", "error"))
        for key in ("train_limit", "eval_limit"):
            if getattr(self, key) is not None:
                checks.number(f"data.{key}", getattr(self, key), minimum=1)


@dataclass
class LossSchema:
    alpha: Any = 1e-5
    beta: Any = 0.1
    loss_type: str = "sigmoid"
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        checks.per_epoch("loss.alpha", self.alpha, minimum=0)
        checks.per_epoch("loss.beta", self.beta, above=0)
        checks.one_of("loss.loss_type", self.loss_type, ("sigmoid", "ipo"))
        if self.missing_eos_penalty is not None:
            checks.number("loss.missing_eos_penalty", self.missing_eos_penalty, above=0)


@dataclass
class PreferenceSchema:
    labels: str = "hard"
    label_temperature: float = 1.0
    tie_threshold: float = 0.0
    normalize_scores: bool = False
    clip_scores: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("preference.labels", self.labels, ("hard", "soft", "sampled"))
        checks.number("preference.label_temperature", self.label_temperature, above=0)
        checks.number("preference.tie_threshold", self.tie_threshold, minimum=0)
        if self.clip_scores is not None:
            checks.number("preference.clip_scores", self.clip_scores, above=0)


@dataclass
class GenerationSchema:
    max_new_tokens: int = 64
    max_length: int = 512
    temperature: float = 0.9
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    batch_size: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.lengths("generation.max_new_tokens", self.max_new_tokens, "generation.max_length", self.max_length)
        checks.number("generation.temperature", self.temperature, minimum=0)
        checks.fraction("generation.top_p", self.top_p)
        checks.number("generation.top_k", self.top_k, minimum=0)
        if self.min_p is not None:
            checks.fraction("generation.min_p", self.min_p)
        checks.number("generation.repetition_penalty", self.repetition_penalty, above=0)
        if self.batch_size is not None:
            checks.number("generation.batch_size", self.batch_size, minimum=1)


@dataclass
class EvaluationSchema:
    before: bool = True
    after: bool = True
    greedy: bool = False
    show: int = 3
    scorers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.number("evaluation.show", self.show, minimum=0)
        for name, scorer in self.scorers.items():
            if not isinstance(scorer, dict) or not scorer.get("_target_"):
                raise ConfigError(
                    f"evaluation.scorers.{name}={scorer!r} has no _target_; "
                    f"give one, or remove the scorer with ~evaluation.scorers.{name}"
                )


@dataclass
class TrainingSchema:
    """Names and meanings of transformers.TrainingArguments; conf/training/default.yaml has the few others."""

    max_steps: int = -1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-7
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0.0
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
    pair_forward: str = "auto"
    tokens_per_micro_batch: int | None = None
    torch_compile: bool = False
    use_liger_kernel: bool = False
    use_cpu: bool = False
    seed: int = 42
    data_seed: int | None = None
    full_determinism: bool = False
    logging_steps: float = 10
    logging_first_step: bool = False
    eval_strategy: str = "no"
    eval_steps: float | None = None
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    save_only_model: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    dataloader_num_workers: int = 0
    dataloader_drop_last: bool = False
    ddp_timeout: int = 1800
    disable_tqdm: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_strategy: str = "every_save"
    hub_private_repo: bool | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    keep_training_state: bool = True
    profile: bool = False
    resume: str | None = None

    def __post_init__(self) -> None:
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            checks.number(f"training.{key}", getattr(self, key), minimum=1)
        checks.number("training.learning_rate", self.learning_rate, minimum=0)
        checks.number("training.warmup_steps", self.warmup_steps, minimum=0)
        if self.max_steps != -1:
            checks.number("training.max_steps", self.max_steps, minimum=1)
        if self.eval_steps is not None:
            checks.number("training.eval_steps", self.eval_steps, above=0)
        checks.number("training.num_train_epochs", self.num_train_epochs, above=0)
        checks.number("training.seed", self.seed, minimum=0)
        checks.number("training.logging_steps", self.logging_steps, above=0)
        checks.number("training.save_steps", self.save_steps, above=0)
        if self.tokens_per_micro_batch is not None:
            checks.number("training.tokens_per_micro_batch", self.tokens_per_micro_batch, minimum=1)
        checks.one_of("training.pair_forward", self.pair_forward, ("auto", "packed", "shared", "separate"))
        checks.one_of("training.eval_strategy", self.eval_strategy, ("no", "steps", "epoch"))
        checks.one_of("training.save_strategy", self.save_strategy, ("no", "steps", "epoch", "best"))
        for word, name in self.kwargs.items():
            if word in self.__dataclass_fields__:
                raise ConfigError(f"training.kwargs.{word}={name!r} has its own key; set training.{word}")


@dataclass
class ReferenceSchema:
    store: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        checks.number("reference.batch_size", self.batch_size, minimum=1)


@dataclass
class DeepspeedSchema:
    config: dict[str, Any] = field(default_factory=dict)
    gather_for_generation: bool = True
    shard_reference: bool = False

    def __post_init__(self) -> None:
        if self.shard_reference and not self.config:
            raise ConfigError("deepspeed.shard_reference=True needs DeepSpeed; choose deepspeed=zero1, zero2 or zero3")


@dataclass
class LaunchSchema:
    num_processes: int = 1
    command: str | None = None
    jobs: int = 1
    devices: list[int] | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        checks.number("launch.num_processes", self.num_processes, minimum=1)
        checks.number("launch.jobs", self.jobs, minimum=1)
        if self.timeout is not None:
            checks.number("launch.timeout", self.timeout, above=0)
        if self.devices is not None and len(self.devices) < self.jobs * self.num_processes:
            raise ConfigError(
                f"launch.devices={self.devices} is too few for launch.jobs={self.jobs} with "
                f"launch.num_processes={self.num_processes} each; give {self.jobs * self.num_processes} devices"
            )


@dataclass
class SweepSchema:
    name: str | None = None
    seeds: int = 1
    rerun: bool = False

    def __post_init__(self) -> None:
        checks.number("sweep.seeds", self.seeds, minimum=1)


@dataclass
class TrackingSchema:
    enabled: bool = True
    uri: str | None = None
    experiment: str = "xpo"
    run_name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class TrainSchema:
    model: ModelSchema = field(default_factory=ModelSchema)
    lora: LoraSchema = field(default_factory=LoraSchema)
    judge: dict[str, Any] = field(default_factory=lambda: {"cache": "off"})
    reward_model: dict[str, Any] = field(default_factory=dict)
    data: DataSchema = field(default_factory=DataSchema)
    preference: PreferenceSchema = field(default_factory=PreferenceSchema)
    loss: LossSchema = field(default_factory=LossSchema)
    generation: GenerationSchema = field(default_factory=GenerationSchema)
    evaluation: EvaluationSchema = field(default_factory=EvaluationSchema)
    reference: ReferenceSchema = field(default_factory=ReferenceSchema)
    training: TrainingSchema = field(default_factory=TrainingSchema)
    deepspeed: DeepspeedSchema = field(default_factory=DeepspeedSchema)
    launch: LaunchSchema = field(default_factory=LaunchSchema)
    sweep: SweepSchema = field(default_factory=SweepSchema)
    tracking: TrackingSchema = field(default_factory=TrackingSchema)

    def __post_init__(self) -> None:
        if not is_group(self.judge):
            raise ConfigError("judge has no _target_; choose one with judge=reward or judge=pair_rm")
        if needs_reward_model(self.judge) and not is_group(self.reward_model):
            raise ConfigError(
                "judge=reward needs a reward model and reward_model=none; choose a reward_model or another judge"
            )
        if self.judge["_target_"] != REWARD_JUDGE or "reward_model" in self.judge:
            for key, neutral in (("normalize_scores", False), ("clip_scores", None)):
                value = getattr(self.preference, key)
                if value != neutral:
                    raise ConfigError(
                        f"preference.{key}={value!r} changes the scores that judge=reward compares; choose that judge, "
                        f"or preference.{key}={'null' if neutral is None else 'false'}"
                    )
        if self.training.eval_steps is not None and self.training.eval_strategy == "no":
            raise ConfigError(
                f"training.eval_steps={self.training.eval_steps} has no effect with training.eval_strategy=no; "
                "set training.eval_strategy=steps"
            )
        if self.training.tokens_per_micro_batch is not None and self.deepspeed.config:
            raise ConfigError(
                f"training.tokens_per_micro_batch={self.training.tokens_per_micro_batch} does not go with deepspeed, "
                "whose processes do equally many passes; lower training.per_device_train_batch_size and raise "
                "training.gradient_accumulation_steps"
            )
        if self.training.push_to_hub and not self.training.hub_model_id:
            raise ConfigError("training.push_to_hub=True needs a repository; set training.hub_model_id=owner/name")
        if self.training.load_best_model_at_end and self.training.eval_strategy == "no":
            raise ConfigError(
                "training.load_best_model_at_end=True needs evaluations; set training.eval_strategy=steps"
            )
        if self.training.eval_strategy != "no" and self.data.eval is None:
            raise ConfigError(
                f"training.eval_strategy={self.training.eval_strategy!r} needs held-out prompts and data.eval=None; "
                "set data.eval, or training.eval_strategy=no"
            )


@dataclass
class InspectSchema:
    """The configuration of `python -m xpo.judges`."""

    judge: dict[str, Any] = field(default_factory=lambda: {"cache": "off"})
    other: dict[str, Any] = field(default_factory=dict)
    reward_model: dict[str, Any] = field(default_factory=dict)
    pairs: str = MISSING
    pairs_split: str = "train"
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for judge in (self.judge, self.other):
            if needs_reward_model(judge) and not is_group(self.reward_model):
                raise ConfigError("judge=reward needs a reward model and reward_model=none; choose a reward_model")
        if self.limit is not None:
            checks.number("limit", self.limit, minimum=1)


REWARD_JUDGE = "xpo.judges.RewardJudge"


def is_group(value: Any) -> bool:
    """Whether a value of the configuration stands for an object: it has a `_target_`."""
    return isinstance(value, dict) and bool(value.get("_target_"))


def needs_reward_model(judge: dict[str, Any]) -> bool:
    """Whether a judge, or one of those it is made of, compares the scores of the run's reward model."""
    if judge.get("_target_") == REWARD_JUDGE and "reward_model" not in judge:
        return True
    return any(needs_reward_model(value) for value in judge.values() if isinstance(value, dict))


def to_dict(config: TrainSchema) -> dict[str, Any]:
    """The configuration as plain containers, as it is written to config.yaml."""
    return asdict(config)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loss": {"alpha": 1}} as {"loss.alpha": 1}; empty dicts vanish, lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
