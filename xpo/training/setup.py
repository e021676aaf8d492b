"""What the arguments of a trainer stand for: names become models, TRL's words ours, functions judges."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from xpo.config.errors import ConfigError, first_line
from xpo.config.schema import as_argument, check_scaling
from xpo.data.prompt_sets import tokenize_prompts
from xpo.data.store import OFF, open_store
from xpo.judges import FunctionJudge, Judge, RewardJudge
from xpo.models.checks import check_adapters, check_models, warn_of_half_precision
from xpo.models.forward import Forward
from xpo.models.hub import local_directory
from xpo.models.loading import end_tokens
from xpo.models.reference import Reference, base_model
from xpo.models.zero import divide, gathered, loading_whole
from xpo.rewards import ClassifierReward, FunctionReward, RewardModel
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.sampler import Sampler
from xpo.training.config import XPOConfig

PromptDataset: TypeAlias = Dataset | IterableDataset
Policy: TypeAlias = PreTrainedModel | PeftModel


def who_judges(
    judge: Judge | Callable[..., Any] | None,
    reward_model: RewardModel | PreTrainedModel | Callable[..., Any] | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: XPOConfig,
) -> tuple[Judge, RewardModel | None]:
    """The judge, and a reward model beside it, if that is another one than the judge's own.

    ConfigError if there is neither, or if scores are to be scaled that nobody compares.
    """
    with loading_whole():
        scorer = as_reward_model(reward_model, tokenizer, args.device)
    if judge is None:
        if scorer is None:
            raise ConfigError("neither judge nor reward_model is given; pass one of them to say who wins a pair")
        judge = RewardJudge(scorer)
    elif not isinstance(judge, Judge):
        if not callable(judge):
            raise ConfigError(
                f"judge={judge!r} is no judge; pass an xpo.judges.Judge or a function (prompts, first, second)"
            )
        judge = FunctionJudge(judge)
    if scorer is None and isinstance(judge, RewardJudge):
        scorer = judge.reward_model
    compares_scores = type(judge) is RewardJudge and judge.reward_model is scorer
    check_scaling(args, compares_scores, as_argument)
    return judge, None if compares_scores else scorer


def as_reward_model(
    reward_model: RewardModel | PreTrainedModel | Callable[..., Any] | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
) -> RewardModel | None:
    """The reward model that `reward_model` stands for."""
    if reward_model is None or isinstance(reward_model, RewardModel):
        return reward_model
    if isinstance(reward_model, str):
        return ClassifierReward.from_pretrained(reward_model, device=str(device), tokenizer=tokenizer)
    if isinstance(reward_model, PreTrainedModel):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(reward_model.config.name_or_path)
        return ClassifierReward(reward_model.to(device), tokenizer)
    if callable(reward_model):
        return FunctionReward(reward_model)
    raise ConfigError(
        f"reward_model={reward_model!r} is no reward model; pass an xpo.rewards.RewardModel, a sequence "
        "classifier, or a function (prompts, completions)"
    )


def only(key: str, value: Any) -> Any:
    """The one thing in a list, as TRL takes several reward functions; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise ConfigError(f"{key} holds {len(value)}; pass one, such as an xpo.rewards.MixReward of several")
    return value[0]


def prepare_models(
    model: Policy | str,
    ref_model: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    args: XPOConfig,
) -> tuple[Policy, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Policy, reference and tokenizer: loaded, with adapters; ConfigError where their numbers would be wrong."""
    if isinstance(model, str):
        model = load_by_name("model", model, args)
    if isinstance(ref_model, str):
        with loading_whole():
            ref_model = load_by_name("ref_model", ref_model, args)
    check_models(model, ref_model, peft_config, args.max_length)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(base_model(model).config.name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.disable_dropout:
        for part in [model] if ref_model is None else [model, ref_model]:
            without_dropout(part)
    if peft_config is not None:
        set_seed(args.seed)  # the adapters' first weights are random
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ConfigError(
                f"peft_config: {first_line(error)}; correct target_modules (lora.target_modules)"
            ) from error
    if isinstance(model, PeftModel):
        check_adapters(model, ref_model)
    if args.deepspeed_plugin is None:
        warn_of_half_precision(model)
    return model, ref_model, tokenizer


def build_reference(
    args: XPOConfig,
    model: Policy,
    ref_model: PreTrainedModel | None,
    policy_engine: Callable[[], nn.Module | None] = lambda: None,
) -> Reference:
    """The reference, divided among the processes if `shard_reference` says so."""
    dtype = None  # a second model keeps its own
    if args.deepspeed_plugin is not None:  # which trains the policy in half precision, without autocast
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    reference = Reference(model, ref_model, args.device, dtype, policy_engine)
    if args.shard_reference and reference.frozen is not None:
        divide(reference.frozen, args.deepspeed_plugin.deepspeed_config)
    return reference


def build_forwards(args: XPOConfig, model: Policy, reference: Reference) -> tuple[Forward, Forward]:
    """How log-probabilities under policy and reference are computed."""

    def build(model: Policy) -> Forward:
        with gathered(model):
            return Forward(base_model(model), args.pair_forward, args.max_length + args.max_new_tokens, args.device)

    policy_forward = build(model)
    return policy_forward, policy_forward if reference.frozen is None else build(reference.frozen)


def load_by_name(key: str, name: str, args: XPOConfig) -> PreTrainedModel:
    """A causal language model by hub name or directory, in float32 unless `model_init_kwargs` say otherwise."""
    directory = local_directory(key, name, with_code=args.trust_remote_code)
    options = {"dtype": torch.float32} | dictionary(args.model_init_kwargs)  # not the checkpoint's own, often bfloat16
    if "torch_dtype" in options:  # an older name, which transformers ignores beside the newer one
        options["dtype"] = options.pop("torch_dtype")
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=args.trust_remote_code, **options)


def without_dropout(model: nn.Module) -> None:
    """Sets every dropout of a model to 0, but that of adapters, which has its own setting."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that functions are called with: dropout, attention_dropout, layerdrop, resid_pdrop.
        for rate, value in vars(module).items():
            if "drop" in rate and isinstance(value, float):
                vars(module)[rate] = 0.0


def prompt_tokenizer(args: XPOConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any, str], Any]:
    """A function (data set, several by name, or None; what it is called) that tokenizes prompts, once."""

    def tokenize(dataset: Any, key: str) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: tokenize(part, f"{key}[{name!r}]") for name, part in dataset.items()}
        if "prompt_ids" in (dataset.column_names or ()):  # a mapped stream does not know its columns
            return dataset
        room, template = args.max_length - args.max_new_tokens, dictionary(args.chat_template_kwargs)
        return tokenize_prompts(dataset, tokenizer, room, args.prompt_overflow, key, template)

    return tokenize


def build_sampler(args: XPOConfig, model: Policy, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """The sampler of these arguments, for the tokens that end a completion of this model."""
    ends = end_tokens(base_model(model), tokenizer)
    return Sampler(tokenizer, args, ends, args.generation_batch_size, dictionary(args.generation_kwargs))


def build_reference_draws(args: XPOConfig, reference: Reference, sampler: Sampler) -> ReferenceDraws:
    """The reference's draws, with the store that these arguments name."""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights"
    store = None if args.reference_store in OFF else open_store("reference_store", args.reference_store)
    return ReferenceDraws(reference, sampler, store, precision)


def dictionary(options: dict[str, Any] | str | None) -> dict[str, Any]:
    """Options of XPOConfig as a dictionary of their own."""
    assert not isinstance(options, str)  # TrainingArguments has parsed JSON from a command line
    return dict(options or {})
