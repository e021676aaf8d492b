"""What a policy and its reference must be, found out before anything is trained."""

import logging

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xpo.config.errors import ConfigError
from xpo.models.reference import base_model
from xpo.models.zero import gathered, shape_of

logger = logging.getLogger(__name__)

HAS_ADAPTERS = (
    "{} has adapters, which new ones (peft_config, lora.r) would replace; leave these out to go on with those, or "
    "merge them first (merge_and_unload)"
)


def check_models(
    model: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    peft_config: PeftConfig | None,
    max_length: int,
) -> None:
    """ConfigError for models that cannot be trained, or whose numbers would be wrong."""
    if ref_model is not None and base_model(ref_model) is base_model(model):  # adapters are put into it in place
        raise ConfigError("ref_model is the model itself, which would be frozen; leave it out for a frozen copy")
    network = base_model(model)
    if peft_config is not None and (isinstance(model, PeftModel) or network._hf_peft_config_loaded):
        raise ConfigError(HAS_ADAPTERS.format("model"))
    if network.config.is_encoder_decoder:
        raise ConfigError(f"model={network.config.name_or_path!r} is an encoder-decoder; use a causal language model")
    config = network.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            "model.config.output_router_logits=True asks for the router's auxiliary loss, which is not trained; "
            "set it to False (model_init_kwargs={'output_router_logits': False})"
        )
    # Not every kind has them.
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    kind, why = rope.get("rope_type"), "the model has learned positions up to"
    if kind in ("longrope", "dynamic"):  # its rotations depend on the longest row of a batch
        limit, why = rope.get("original_max_position_embeddings", limit), f"{kind} positions change beyond"
    elif not _learns_positions(network, limit):
        return
    if limit is not None and max_length > limit:
        raise ConfigError(f"max_length={max_length}: {why} {limit} tokens; lower max_length")


def check_becomes(policy: nn.Module, reference: nn.Module) -> None:
    """ConfigError unless a reference that takes over the policy's trained parameters is the policy then.

    What it keeps must be equal already, and what is one tensor in one of them must be one in the other. Equality is
    found out a tensor at a time; under ZeRO-3 both models are whole meanwhile.
    """
    where = "reference_update='iteration': ref_model"
    remedy = "leave ref_model (model.reference) out, or set reference_update='never'"
    own = dict(reference.named_parameters(remove_duplicate=False))
    becomes: dict[int, nn.Parameter] = {}  # what the tensors of the reference become, by their id
    for name, part in policy.named_parameters():
        if part.requires_grad:
            if name not in own or shape_of(part) != shape_of(own[name]):
                raise ConfigError(f"{where} has no {name} of the policy's shape; {remedy}")
            becomes[id(own[name])] = part
    theirs = dict(policy.named_parameters(remove_duplicate=False)) | dict(policy.named_buffers())
    mine = own | dict(reference.named_buffers())
    with gathered(policy), gathered(reference):
        for name in mine | theirs:
            kept, source = mine.get(name), theirs.get(name)
            if kept is None or source is None:
                same = False
            elif id(kept) in becomes:
                same = becomes[id(kept)] is source
            else:
                equal = kept.shape == source.shape and torch.equal(kept, source.to(kept.device, kept.dtype))
                same = equal and not source.requires_grad
            if not same:
                raise ConfigError(f"{where} would not have the policy's {name}, tied or not trained; {remedy}")


def check_trained(model: nn.Module) -> None:
    """ConfigError for a policy without a parameter that is trained, of which the loss would still be logged."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "model has no parameter that is trained; load its adapters with is_trainable=True, or give peft_config, or "
            "call model.requires_grad_(True)"
        )


def check_tokens(
    model: PreTrainedModel | PeftModel, ref_model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """ConfigError for token ids that have no row in an embedding: a token was added, and a model not resized."""
    rows = embedding_rows(model)
    remedy = "call resize_token_embeddings(len(tokenizer)) on it"
    if (pad := tokenizer.pad_token_id) is not None and pad >= rows:
        raise ConfigError(f"pad_token={tokenizer.pad_token!r} has the id {pad}, and model {rows} tokens; {remedy}")
    if ref_model is not None and embedding_rows(ref_model) < rows:
        raise ConfigError(f"model has {rows} tokens, and ref_model {embedding_rows(ref_model)}; {remedy}")


def check_embedded(model: PreTrainedModel | PeftModel, dataset: Dataset | IterableDataset, key: str) -> None:
    """ConfigError for tokenized prompts, called `key`, with a token that the model has no embedding of."""
    rows = embedding_rows(model)
    if isinstance(dataset, Dataset) and (highest := max(map(max, dataset["prompt_ids"]))) >= rows:
        raise ConfigError(
            f"{key} has a prompt with token {highest}, and model {rows} tokens; call resize_token_embeddings on it"
        )


def embedding_rows(model: PreTrainedModel | PeftModel) -> int:
    """How many tokens a model has an embedding of, some without use perhaps."""
    weight = base_model(model).get_input_embeddings().weight
    return int(vars(weight).get("ds_shape", weight.shape)[0])  # of a part, under ZeRO-3


def _learns_positions(model: PreTrainedModel, count: int | None) -> bool:
    """Whether there is a table of so many positions; OPT's has two more."""
    tables = {part for part in model.modules() if isinstance(part, nn.Embedding)} - {model.get_input_embeddings()}
    return count is not None and any(0 <= table.num_embeddings - count <= 2 for table in tables)


def check_adapters(model: PeftModel, ref_model: PreTrainedModel | None) -> None:
    """Adapters must be in the model's layers, as rollouts come from the model that they are in.

    Without a `ref_model`, what is left without them must be the reference for good.
    """
    for config in model.peft_config.values():
        bias, init = (vars(config).get(name) for name in ("bias", "init_lora_weights"))
        if ref_model is None and bias not in (None, "none"):
            raise ConfigError(
                f"peft_config: bias={bias!r} trains the reference too; set bias='none', or pass ref_model"
            )
        if ref_model is None and isinstance(init, str) and init.split("_")[0] in ("pissa", "olora", "corda", "loftq"):
            raise ConfigError(
                f"peft_config: init_lora_weights={init!r} takes from the weights what the adapters begin with, so that "
                "the rest is no reference; pass ref_model, or choose init_lora_weights=True"
            )
        if config.is_prompt_learning:
            raise ConfigError(
                f"peft_config={type(config).__name__} puts virtual tokens before the prompt, which rollouts would lack"
                "; use adapters in the layers, such as LoraConfig"
            )


def warn_of_half_precision(model: nn.Module) -> None:
    """For runs without DeepSpeed, which alone keeps float32 weights beside those in half precision."""
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    for dtype in half:
        logger.warning(
            "xpo: the trained weights are %s, which rounds small steps away: hardly anything is learned at a learning "
            "rate such as 5e-7; load the model with dtype='float32', and set bf16=True for speed",
            str(dtype).removeprefix("torch."),
        )
