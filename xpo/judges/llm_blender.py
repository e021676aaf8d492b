"""The original PairRM, the package llm-blender 0.0.2: what `PairRMJudge` is tested against, and its backend.

`directory` holds configuration and weights, `backbone` those of the backbone and the tokenizer; `normalizer` is the
Unicode normaliser of the tokenizer's own file, see P4 in the shim. Both classes raise ConfigError without the package,
RuntimeError for weights that do not fit, and AttributeError for a configuration that lacks what the package needs.
"""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_model
from tokenizers.normalizers import Normalizer
from torch import Tensor, nn
from transformers import AutoConfig

from xpo.config.errors import ConfigError
from xpo.judges.llm_blender_shim import import_llm_blender, load_tokenizer, quiet


class OriginalRanker:
    """`llm_blender.Blender` with a checkpoint in the layout of `llm-blender/PairRM`; not in bfloat16 (ConfigError)."""

    def __init__(
        self, directory: Path, backbone: Path, normalizer: Normalizer, dtype: torch.dtype, device: torch.device
    ):
        package = import_llm_blender()
        if dtype == torch.bfloat16:  # the package hands logits to NumPy, which does not know it
            raise ConfigError(
                "judge.dtype='bfloat16' does not run with judge.backend='llm_blender' and a model in this layout; "
                "set judge.backend=native or judge.dtype=float32"
            )
        # The package guesses the kind of tokenizer from words anywhere in its path: "phi" is in "sophia".
        utils = package.blender.blender_utils
        own_tokenizer = patch.object(utils, "build_tokenizer", lambda *_, **__: load_tokenizer(backbone, normalizer))
        with quiet(), torch.random.fork_rng([]), own_tokenizer:
            self.blender = package.Blender()
            # Left to itself, it takes CUDA, and float16 there.
            self.blender.loadranker(str(directory), device=str(device), model_name=str(backbone), fp16=False)
        self.network: nn.Module = self.blender.ranker.to(dtype).requires_grad_(False)

    def logits(self, sources: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """logit(first, second) of one batch of clean texts, cut to its longest prompt, float32 (N,) on the CPU."""
        with torch.random.fork_rng([]):  # its DataLoader draws a seed
            options = {"batch_size": len(sources), "return_logits": True, "mode": "[A,B]", "disable_tqdm": True}
            logits = self.blender.compare(list(sources), list(first), list(second), **options)
        return torch.from_numpy(logits).float()


class OriginalPairRM:
    """`llm_blender`'s DebertaV2PairRM with a checkpoint in the layout of `llm-blender/PairRM-hf`."""

    def __init__(self, directory: Path, normalizer: Normalizer, dtype: torch.dtype, device: torch.device):
        package = import_llm_blender()
        self.tokenize_pair = package.blender.blender_utils.tokenize_pair
        self.tokenizer = load_tokenizer(directory, normalizer)
        with quiet(), torch.random.fork_rng([]):
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
        return self.network(**inputs, return_dict=True).logits.float().cpu()
