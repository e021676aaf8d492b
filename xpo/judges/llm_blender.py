"""The original PairRM: the package llm-blender 0.0.2, made to run on transformers 5.

The package is the reference that `PairRMJudge` is tested against, and its backend `llm_blender`. It no longer
imports, and where it runs it is silently wrong. Four patches repair it, P1 to P4 below, all on the package's
own modules and objects: transformers is as before for everybody else.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants
import torch
import transformers.utils.hub
from safetensors.torch import load_model
from tokenizers.normalizers import Normalizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from xpo.config.errors import ConfigError


class OriginalRanker:
    """`llm_blender.Blender` with a checkpoint in the layout of `llm-blender/PairRM`.

    Args:
        directory: holds the ranker's config.json and weights.
        backbone: holds the configuration and tokenizer of the backbone.
        normalizer: the Unicode normaliser of the tokenizer's own file; see P4.
        dtype: float32 or float16.
        device: never the package's default, which is CUDA.

    Raises:
        ConfigError: the package is not installed, or the dtype is not one of its.
        RuntimeError: the weights do not fit.
    """

    def __init__(
        self, directory: Path, backbone: Path, normalizer: Normalizer, dtype: torch.dtype, device: torch.device
    ):
        package = _import_llm_blender()
        if dtype == torch.bfloat16:  # the package hands logits to NumPy, which does not know it
            raise ConfigError(
                "judge.dtype='bfloat16' does not run with judge.backend='llm_blender' and a model in this layout; "
                "set judge.backend=native or judge.dtype=float32"
            )
        # The package guesses the kind of tokenizer from words anywhere in its path: "phi" is in "sophia".
        replacements = {"build_tokenizer": lambda *_args, **_kwargs: _tokenizer(backbone, normalizer)}
        with _quiet(), torch.random.fork_rng([]), _replaced(package.blender.blender_utils, replacements):
            self.blender = package.Blender()
            self.blender.loadranker(
                str(directory),
                device=str(device),
                model_name=str(backbone),
                fp16=False,  # otherwise CUDA means float16
            )
        self.network: nn.Module = self.blender.ranker.to(dtype).requires_grad_(False)

    def logits(self, sources: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """logit(first, second) of one batch of clean texts, float32 (N,) on the CPU.

        Completions of more than 412 tokens are cut further than alone if another prompt of the batch is longer.
        """
        with torch.random.fork_rng([]):  # its DataLoader draws a seed
            return torch.from_numpy(
                self.blender.compare(
                    list(sources),
                    list(first),
                    list(second),
                    batch_size=len(sources),
                    return_logits=True,
                    mode="[A,B]",
                    disable_tqdm=True,
                )
            ).float()


class OriginalPairRM:
    """`llm_blender`'s DebertaV2PairRM with a checkpoint in the layout of `llm-blender/PairRM-hf`.

    Args:
        directory: holds everything.
        normalizer: the Unicode normaliser of the tokenizer's own file; see P4.
        dtype: of the weights.
        device: a torch device.

    Raises:
        ConfigError: the package is not installed.
        RuntimeError: the weights do not fit.
        AttributeError: the configuration lacks what the package needs besides DeBERTa's own keys.
    """

    def __init__(self, directory: Path, normalizer: Normalizer, dtype: torch.dtype, device: torch.device):
        package = _import_llm_blender()
        self.tokenize_pair: Callable[..., Any] = package.blender.blender_utils.tokenize_pair
        self.tokenizer = _tokenizer(directory, normalizer)
        with _quiet(), torch.random.fork_rng([]):
            # Not from_pretrained, which makes up weights that are missing.
            network = package.pair_ranker.pairrm.DebertaV2PairRM(AutoConfig.from_pretrained(directory)).float()
            load_model(network, directory / "model.safetensors")
        self.network: nn.Module = network.to(device, dtype).requires_grad_(False).eval()
        self.device = device

    @torch.no_grad()
    def logits(self, sources: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """logit(first, second) of one batch of clean texts, float32 (N,) on the CPU."""
        encodings = self.tokenize_pair(self.tokenizer, sources, first, second)
        inputs = {name: encodings[name].to(self.device) for name in ("input_ids", "attention_mask")}
        logits: Tensor = self.network(**inputs, return_dict=True).logits
        return logits.float().cpu()


def _import_llm_blender() -> ModuleType:
    """The package with the patches P1, P2 and P3.

    Raises:
        ConfigError: it is not installed.
    """
    # P1: it imports a constant that transformers 5 has no more, the path of the cache; it is there for this import.
    constants = vars(transformers.utils.hub)
    old = {"TRANSFORMERS_CACHE": constants.get("TRANSFORMERS_CACHE", huggingface_hub.constants.HF_HUB_CACHE)}
    with _replaced(transformers.utils.hub, old), _quiet():
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


def _encode_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (texts, max_length) each: the patch P2."""
    batch = tokenizer(texts, max_length=max_length, padding="max_length", truncation=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def _backbone(_model_type: str, model_name: str, **_kwargs: Any) -> PreTrainedModel:
    """The backbone in float32: the patch P3. Its weights are not read, since the ranker's replace them all."""
    model = AutoModel.from_config(AutoConfig.from_pretrained(model_name), dtype=torch.float32)
    model.config.out_hidden_state_size = model.config.hidden_size
    return model


def _tokenizer(directory: Path, normalizer: Normalizer) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, with the patch P4."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # P4: transformers 5 rebuilds DeBERTa's tokenizer without its Unicode normaliser, so that odd characters differ.
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


@contextmanager
def _replaced(module: ModuleType, replacements: dict[str, Any]) -> Iterator[None]:
    """Other values for attributes of a module, for a while."""
    before = {name: vars(module)[name] for name in replacements if name in vars(module)}
    vars(module).update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del vars(module)[name]
        vars(module).update(before)


@contextmanager
def _quiet() -> Iterator[None]:
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
