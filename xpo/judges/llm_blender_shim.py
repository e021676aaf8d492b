"""Makes the package llm-blender 0.0.2 run on transformers 5, where it does not import, or is silently wrong.

Four patches, P1 to P4, all on the package's own modules and objects: transformers is as before for everybody else.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import constants
from tokenizers.normalizers import Normalizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import hub

from xpo.config.errors import ConfigError


def import_llm_blender() -> ModuleType:
    """The package with the patches P1, P2 and P3; ConfigError if it is not installed."""
    # P1: it imports a constant that transformers 5 has no more, the path of the cache; it is there for this import.
    with patch.object(hub, "TRANSFORMERS_CACHE", constants.HF_HUB_CACHE, create=True), quiet():
        try:
            import llm_blender
            import llm_blender.pair_ranker.pairrm
        except ImportError as error:
            raise ConfigError(
                f"judge.backend='llm_blender' needs the original package ({error}); pip install 'xpo[pairrm-parity]'"
            ) from error
    # P2: it tokenises with batch_encode_plus, which transformers 5 has no more.
    llm_blender.pair_ranker.collator.encode_texts = _encode_texts
    # P3: a backbone stored in float16, as transformers 5 loads it, would round the ranker's float32 weights.
    llm_blender.pair_ranker.model_util.build_pretrained_model = _backbone
    return llm_blender


def _encode_texts(texts: list[str], tokenizer: Any, max_length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (texts, max_length) each: the patch P2."""
    batch = tokenizer(texts, max_length=max_length, padding="max_length", truncation=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def _backbone(_model_type: str, model_name: str, **_kwargs: Any) -> PreTrainedModel:
    """The backbone in float32: the patch P3. Its weights are not read, since the ranker's replace them all."""
    model = AutoModel.from_config(AutoConfig.from_pretrained(model_name), dtype=torch.float32)
    model.config.out_hidden_state_size = model.config.hidden_size
    return model


def load_tokenizer(directory: Path, normalizer: Normalizer) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, with the patch P4."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # P4: transformers 5 rebuilds DeBERTa's tokenizer without its Unicode normaliser, so that odd characters differ.
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """No prints, no warnings, none on the root logger either, which would get a handler by them."""
    root, nothing, disabled = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(nothing)
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(nothing)
