"""A transformers sequence classifier as reward model."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from xpo.errors import ConfigError
from xpo.hub import local_directory
from xpo.prompts import Prompt, is_conversational, plain_text, render
from xpo.rewards.base import RewardModel


class ClassifierReward(RewardModel):
    """Scores with the single logit of a sequence classifier.

    The text is rendered with the classifier's own chat template and read by its own tokenizer, never
    as the policy's token ids. Without a chat template a conversational prompt and its completion are
    a text pair.

    Args:
        model: a classifier with one label; ConfigError otherwise.
        tokenizer: its tokenizer.
        batch_size: texts in one forward pass.
        max_length: tokens of a text at most; longer ones lose their beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
        max_length: int = 2048,
    ):
        if model.config.num_labels != 1:
            raise ConfigError(
                f"reward_model={model.config.name_or_path or type(model).__name__} has num_labels="
                f"{model.config.num_labels}; use a classifier with one label, whose logit is the reward"
            )
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = copy.deepcopy(tokenizer)  # may be the policy's own, which must not change
        self.tokenizer.truncation_side = "left"
        self.batch_size = batch_size
        self.max_length = min(max_length, tokenizer.model_max_length)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 16,
        max_length: int = 2048,
    ) -> "ClassifierReward":
        """Loads a classifier by hub name or from a local directory.

        Raises:
            ConfigError: the hub is out of reach, or there is no such model.
        """
        directory = local_directory("reward_model.model", model, revision)
        classifier = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return cls(classifier.to(device), tokenizer, batch_size, max_length)

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        encoded = [self._encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = torch.empty(len(encoded))
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            scores[rows] = self._forward([encoded[i] for i in rows])
        return scores

    def _encode(self, prompt: Prompt, completion: str) -> list[int]:
        options = {"truncation": True, "max_length": self.max_length}
        if not is_conversational(prompt):
            return self.tokenizer(render(self.tokenizer, prompt, completion), **options).input_ids
        if self.tokenizer.chat_template is None:
            return self.tokenizer(plain_text(prompt), completion, **options).input_ids
        text = render(self.tokenizer, prompt, completion)  # the template writes the special tokens
        return self.tokenizer(text, add_special_tokens=False, **options).input_ids

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> Tensor:
        # Decoder classifiers score the last token that differs from the pad token. So that a text which
        # ends with the pad token (often the EOS token) is scored at its real end, pad with another token.
        last_tokens = {row[-1] for row in rows}
        pad = self.tokenizer.pad_token_id
        if pad is None or pad in last_tokens:
            pad = next(token for token in range(len(last_tokens) + 1) if token not in last_tokens)
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.model.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(width, device=ids.device) < lengths[:, None]
        self.model.config.get_text_config().pad_token_id = pad
        return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float().cpu()
