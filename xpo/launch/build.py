"""What a configuration stands for: the trainer's arguments, prompts and models, and the trainer itself."""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from xpo.config.errors import ConfigError, first_line, nearest
from xpo.config.options import LOGGERS
from xpo.config.schema import TrainSchema, trainer_arguments
from xpo.data.pair_file import NAME
from xpo.data.prompt_sets import load_prompts
from xpo.launch.groups import build_group, build_preference, check_target
from xpo.models.checks import HAS_ADAPTERS
from xpo.models.loading import is_adapter, load_model, load_tokenizer, loaded, lora_config, policy_directory
from xpo.models.zero import loading_whole
from xpo.tracking.hub import make_repositories
from xpo.training.config import XPOConfig
from xpo.training.setup import prompt_tokenizer
from xpo.training.trainer import XPOTrainer


class Inputs(NamedTuple):
    """What is known of a run before any model loads."""

    policy: str  # its directory
    reference: str | None  # that of another model as reference; None: a copy of the policy
    tokenizer: PreTrainedTokenizerBase  # the policy's
    datasets: dict[str, Any]  # tokenized prompts of the parts "train" and, unless there is no evaluation, "eval"


def build_arguments(config: TrainSchema, run_dir: Path) -> XPOConfig:
    """The trainer's arguments, its output in RUN_DIR/model; ConfigError for names and values that they do not take."""
    valid = inspect.signature(XPOConfig).parameters
    for key, value in config.training.kwargs.items():
        if key not in valid:
            raise ConfigError(
                f"training.kwargs.{key}={value!r} is not a TrainingArguments name{nearest(key, valid)}; "
                "correct or remove it"
            )
    # training.kwargs may name others than tracking.report_to knows.
    both = config.tracking.report_to, config.training.kwargs.get("report_to")
    loggers = [name for names in both for name in ([names] if isinstance(names, str) else names or [])]
    given: dict[str, Any] = {
        "log_level": "error",
        "trackio_static_space_id": False,  # or Trackio would push what it has logged along with the model
        **config.training.kwargs,
        "report_to": loggers or "none",
    }
    try:
        args = XPOConfig(
            output_dir=str(run_dir / "model"),
            pairs_file=str(run_dir / NAME),
            **dict(trainer_arguments(config)),
            **given,
        )
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {first_line(error)}; correct the values under training") from error
    for name in args.report_to or ():
        if name not in get_available_reporting_integrations():
            key = "tracking.report_to" if name in LOGGERS else "training.kwargs.report_to"
            raise ConfigError(f"{key}={name!r} is not installed; install it or leave it out")
    if args.push_to_hub and args.process_index == 0:  # as the Trainer will, when the models have loaded
        try:
            make_repositories(str(args.hub_model_id), args.push_pairs, args.hub_private_repo)
        except ConfigError as error:
            later = "set it to false, and push later: python -m xpo.push RUN --to OWNER/NAME"
            raise ConfigError(f"training.push_to_hub=True: {error}, or {later}") from error
    return args


def build_inputs(config: TrainSchema, args: XPOConfig) -> Inputs:
    """ConfigError for everything that can be known to be wrong, or out of reach, before any model loads."""
    check_target("judge", config.judge)
    check_target("reward_model", config.reward_model)
    for name, scorer in config.evaluation.scorers.items():
        check_target(f"evaluation.scorers.{name}", scorer)
    raw = {}
    for part in ("train", "eval"):
        name, split, limit = (vars(config.data)[key] for key in (part, f"{part}_split", f"{part}_limit"))
        if name:
            prompts = load_prompts(f"data.{part}", name, split, config.data.prompt_column)
            raw[part] = prompts if limit is None else prompts.select(range(min(limit, len(prompts))))
    model, with_code = config.model, config.model.trust_remote_code
    policy = policy_directory(model.name, model.revision, with_code=with_code)
    if config.lora.r and is_adapter(policy):
        raise ConfigError(HAS_ADAPTERS.format(f"model.name={model.name!r}"))
    reference = model.reference and policy_directory(model.reference, None, "model.reference", with_code)
    tokenizer = loaded("model.name", model.name, load_tokenizer, policy, model)
    tokenize = prompt_tokenizer(args, tokenizer)
    datasets = {part: tokenize(prompts, f"data.{part}") for part, prompts in raw.items()}
    return Inputs(policy, reference, tokenizer, datasets)


def build_trainer(config: TrainSchema, args: XPOConfig, inputs: Inputs, callbacks: list[TrainerCallback]) -> XPOTrainer:
    """Loads the models, and composes the trainer."""
    ref_model = None
    with loading_whole():
        # The small ones first: what is not installed is missed before a large judge has loaded.
        scorers = {name: build_group(scorer) for name, scorer in config.evaluation.scorers.items()}
        reward_model, judge = build_preference(config.judge, config.reward_model)
        if inputs.reference is not None:
            name = str(config.model.reference)
            ref_model = loaded("model.reference", name, load_model, inputs.reference, config.model)
    model = loaded("model.name", config.model.name, load_model, inputs.policy, config.model)
    return XPOTrainer(
        model=model,
        ref_model=ref_model,
        judge=judge,
        reward_model=reward_model,
        args=args,
        processing_class=inputs.tokenizer,
        train_dataset=inputs.datasets["train"],
        eval_dataset=inputs.datasets.get("eval"),
        peft_config=lora_config(config.lora),
        scorers=scorers,
        callbacks=callbacks,
    )
