"""What a trainer is composed of: models, prompts, forwards, samplers; who judges is beside, in `judging`."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerState, set_seed

from xpo.config.errors import ConfigError, first_line
from xpo.config.options import scorer_name
from xpo.data.prompt_sets import PromptDataset, tokenize_prompts
from xpo.data.store import OFF, open_store
from xpo.evaluation.evaluator import Evaluator
from xpo.evaluation.probe import Probe
from xpo.judges import Judge
from xpo.judges.labelling import of_evaluations
from xpo.models.checks import (
    HAS_ADAPTERS,
    check_adapters,
    check_becomes,
    check_embedded,
    check_models,
    check_tokens,
    check_trained,
    warn_of_half_precision,
)
from xpo.models.forward import Forward
from xpo.models.hub import local_directory
from xpo.models.iterates import PastPolicies
from xpo.models.loading import end_tokens, from_directory, is_adapter, tokenizer_of, with_pad_token
from xpo.models.reference import Reference, base_model
from xpo.models.zero import divide, frozen_copy, gathered, loading_whole
from xpo.rewards import RewardModel
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.pairs import PairSampler
from xpo.sampling.sampler import Sampler
from xpo.sampling.vllm import VLLM, EngineOptions
from xpo.training.config import XPOConfig

logger = logging.getLogger(__name__)

Policy: TypeAlias = PreTrainedModel | PeftModel


def prepare_models(
    model: Policy | str,
    ref_model: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    peft_config: PeftConfig | None,
    args: XPOConfig,
) -> tuple[Policy, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Policy, reference and tokenizer: loaded, with adapters; ConfigError where their numbers would be wrong."""
    if isinstance(model, str):
        model = load_by_name("model", model, args, peft_config)
    if isinstance(ref_model, str):
        with loading_whole():
            ref_model = load_by_name("ref_model", ref_model, args)
    check_models(model, ref_model, peft_config, args.max_length)
    tokenizer = tokenizer_of(model, tokenizer)
    tokenizer = with_pad_token(tokenizer, end_tokens(base_model(model), tokenizer))
    check_tokens(model, ref_model, tokenizer)
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
    check_trained(model)
    if args.deepspeed_plugin is None:
        warn_of_half_precision(model)
    return model, ref_model, tokenizer


class References(NamedTuple):
    """The models beside the policy."""

    training: Reference  # pi_ref of the loss, which may move
    opponent: Reference  # pi_ref of evaluations, which does not
    past: PastPolicies | None  # for the samplers "past" and "iterate"


def build_references(
    args: XPOConfig,
    model: Policy,
    ref_model: PreTrainedModel | None,
    policy_engine: Callable[[], nn.Module | None] = lambda: None,
) -> References:
    """One reference, or two if one of them moves; ConfigError if it cannot."""
    moves = args.reference_update == "iteration"
    if moves and ref_model is not None:
        check_becomes(model, base_model(ref_model))
    opponent = build_reference(args, model, ref_model, policy_engine)
    training = opponent
    if moves:
        moving = None if ref_model is None else frozen_copy(base_model(ref_model))
        training = build_reference(args, model, moving, policy_engine)
    draws = args.sampler in ("iterate", "past")
    past = PastPolicies(build_reference(args, model, None, policy_engine)) if draws else None
    return References(training, opponent, past)


def build_reference(
    args: XPOConfig,
    model: Policy,
    ref_model: PreTrainedModel | None,
    policy_engine: Callable[[], nn.Module | None] = lambda: None,
) -> Reference:
    """A frozen model, divided among the processes if `shard_reference` says so."""
    dtype = None  # a second model keeps its own
    if args.deepspeed_plugin is not None:  # which trains the policy in half precision, without autocast
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    reference = Reference(model, ref_model, args.device, dtype, policy_engine)
    if args.shard_reference and reference.frozen is not None:
        divide(reference.frozen, args.deepspeed_plugin.deepspeed_config)
    return reference


def build_forwards(args: XPOConfig, model: Policy, references: References) -> tuple[Forward, Forward, Forward]:
    """How log-probabilities are computed: under the policy, the reference, and the opponent of evaluations."""

    def build(model: Policy) -> Forward:
        with gathered(model):
            return Forward(base_model(model), args.pair_forward, args.max_length + args.max_new_tokens, args.device)

    policy = build(model)
    training, opponent = references.training.frozen, references.opponent.frozen
    forward = policy if training is None else build(training)
    return policy, forward, forward if opponent is training or opponent is None else build(opponent)


def load_by_name(key: str, name: str, args: XPOConfig, peft_config: PeftConfig | None = None) -> Policy:
    """A causal language model by hub name or directory, in float32 unless `model_init_kwargs` say otherwise."""
    directory = str(local_directory(key, name, with_code=args.trust_remote_code))
    if peft_config is not None and is_adapter(directory):
        raise ConfigError(HAS_ADAPTERS.format(f"{key}={name!r}"))
    options = {"dtype": torch.float32} | dictionary(args.model_init_kwargs)  # not the checkpoint's own, often bfloat16
    if "torch_dtype" in options:  # an older name, which transformers ignores beside the newer one
        options["dtype"] = options.pop("torch_dtype")
    return from_directory(directory, trust_remote_code=args.trust_remote_code, **options)


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


def prompt_tokenizer(
    args: XPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: Policy | None = None,
    judges: Sequence[Judge | RewardModel | None] = (),
) -> Callable[[Any, str], Any]:
    """A function (data set, several by name, or None; what it is called) that tokenizes prompts, once.

    It raises ConfigError for prompts that the model, or a judge or reward model cannot read.
    """

    def tokenize(dataset: Any, key: str) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: tokenize(part, f"{key}[{name!r}]") for name, part in dataset.items()}
        if isinstance(dataset, list):
            try:
                dataset = Dataset.from_list(dataset)
            except Exception as error:  # whatever pyarrow raises for rows of several kinds
                raise ConfigError(f"{key} is a list that is no table ({first_line(error)}); give rows alike") from error
        if "prompt_ids" not in (dataset.column_names or ()):  # a mapped stream does not know its columns
            room, template = args.max_length - args.max_new_tokens, dictionary(args.chat_template_kwargs)
            overflow, special = args.prompt_overflow, args.special_tokens
            dataset = tokenize_prompts(dataset, tokenizer, room, overflow, key, special, template)
        if model is not None:
            check_embedded(model, dataset, key)
        for judge in judges:
            if judge is not None:
                judge.check_data(key, dataset)
        return dataset

    return tokenize


def check_batches(args: XPOConfig, train: PromptDataset) -> None:
    """ConfigError for an epoch without a single batch, or for one whose steps cannot be repeated."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(train, Dataset) and len(train) < batch:
        raise ConfigError(
            f"dataloader_drop_last=True leaves no batch of {batch} in the {len(train)} prompts of train_dataset; "
            "set it to False, or lower per_device_train_batch_size"
        )
    if args.replay_updates == 1:
        return
    given = f"replay_updates={args.replay_updates}"
    if not isinstance(train, Dataset):
        raise ConfigError(f"{given} needs a train_dataset of known length; give one, or replay_updates=1")
    if len(train) < args.pairs_of_a_step:
        raise ConfigError(
            f"{given} needs whole steps, of {args.pairs_of_a_step} prompts, and train_dataset has {len(train)}; lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )


def check_stream(args: XPOConfig, state: TrainerState) -> None:
    """ConfigError for a stream without a whole step: for less the Trainer takes none, and would end untrained."""
    if state.global_step == 0:
        raise ConfigError(
            f"train_dataset ends before the first step of {args.pairs_of_a_step} prompts; give more prompts, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )


def check_metric(args: XPOConfig, held_out: Any, measured: Sequence[str]) -> None:
    """ConfigError for a metric_for_best_model that evaluations do not have, among what is `measured` of each set."""
    if args.metric_for_best_model is None or held_out is None:
        return
    metric, sets = args.metric_for_best_model.removeprefix("eval_"), held_out if isinstance(held_out, dict) else [""]
    known = [f"{name}{name and '_'}{each}" for name in sets for each in measured]
    if metric not in known:
        some = ", ".join(name for name in known if name.endswith(("win_rate", "_score", "kl")))
        raise ConfigError(f"metric_for_best_model={args.metric_for_best_model!r} is not measured; choose one of {some}")


def check_unused(*arguments: Any) -> None:
    """ConfigError for the last three arguments of the trainer, which TRL's scripts give as None."""
    names = ("data_collator", "compute_metrics", "preprocess_logits_for_metrics")
    for name, value in zip(names, arguments, strict=True):
        if value is not None:
            raise ConfigError(f"{name}={value!r:.40} is not used; leave it out, or pass scorers to measure more")


class Samplers(NamedTuple):
    """What draws completions."""

    policy: Sampler
    others: Sampler  # of models that the policy's engine cannot draw for: transformers


def build_samplers(args: XPOConfig, model: Policy, tokenizer: PreTrainedTokenizerBase) -> Samplers:
    """With the engine that these arguments name.

    Raises:
        ConfigError: a static cache under mixed precision, or what the engine cannot do.
    """
    ends, kwargs = end_tokens(base_model(model), tokenizer), dictionary(args.generation_kwargs)
    if args.temperature == 0:
        logger.warning("xpo: at temperature=0 policy and reference say the same at first: hardly anything is learned")
    static = "static" in str(kwargs.get("cache_implementation"))
    if static and (args.bf16 or args.fp16) and base_model(model).dtype == torch.float32:
        raise ConfigError(
            f"generation_kwargs: cache_implementation={kwargs['cache_implementation']!r} takes no mixed precision "
            "(bf16, fp16) over float32 weights; leave it out, or load the model in that dtype"
        )
    others = Sampler(tokenizer, args, ends, args.generation_batch_size, kwargs)
    if args.generation_engine == "transformers":
        return Samplers(others, others)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else base_model(model).dtype
    engine_options = EngineOptions(
        max_length=args.max_length,
        dtype=dtype,
        seed=args.seed,
        processes=args.world_size,
        memory=args.vllm_gpu_memory_utilization,
        eager=args.vllm_enforce_eager,
        sleep=args.vllm_enable_sleep_mode,
        check_steps=args.vllm_check_steps,
    )
    if args.generation_batch_size is not None:
        logger.warning("xpo: generation_batch_size=%d is nothing to vLLM", args.generation_batch_size)
    engine = VLLM(base_model(model), args, ends, kwargs, engine_options)
    return Samplers(Sampler(tokenizer, args, ends, kwargs=kwargs, engine=engine), others)


def build_pair_sampler(
    args: XPOConfig, sampler: Sampler, draws: ReferenceDraws, past: PastPolicies | None
) -> PairSampler:
    """Who draws the completions of a step."""
    gather = args.ds3_gather_for_generation
    return PairSampler(sampler, draws, past, args.sampler, args.sampler_candidates, args.seed, args.device, gather)


def build_reference_draws(args: XPOConfig, reference: Reference, samplers: Samplers) -> ReferenceDraws:
    """The reference's draws, with the store that these arguments name, by the policy's engine if it can draw them."""
    sampler, own = samplers.policy, reference.frozen
    if sampler.engine is not None and own is not None and not sampler.engine.draws_for(own):
        logger.warning("xpo: transformers draws the reference's completions, as it is not of the policy's kind")
        sampler = samplers.others
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights"
    store = None if args.reference_store in OFF else open_store("reference_store", args.reference_store)
    return ReferenceDraws(reference, sampler, store, precision)


def build_evaluator(
    args: XPOConfig,
    sampler: Sampler,
    judge: Judge,
    reward_model: RewardModel | None,
    scorers: dict[str, RewardModel],
    draws: ReferenceDraws,
    forwards: tuple[Forward, Forward],
) -> Evaluator:
    """The evaluator of these arguments: its labels are hard, without the missing-EOS penalty, on raw scores.

    Raises:
        ConfigError: a scorer has the name of another measure.
    """
    for name in scorers:
        scorer_name("scorers", name)
    gather = args.ds3_gather_for_generation
    labeller = of_evaluations(judge, reward_model, args)
    probe = Probe(sampler, draws, args.probe_prompts, args.probe_samples, gather) if args.probe_prompts else None
    return Evaluator(sampler, draws, forwards, labeller, scorers, args.eval_greedy, gather, args.shard_reference, probe)


def dictionary(options: dict[str, Any] | str | None) -> dict[str, Any]:
    """Options of XPOConfig as a dictionary of their own."""
    assert not isinstance(options, str)  # TrainingArguments has parsed JSON from a command line
    return dict(options or {})
