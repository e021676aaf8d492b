"""A transformers sequence classifier as reward model."""

import copy
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from xpo.config.errors import ConfigError, first_line
from xpo.config.options import DataOptions
from xpo.data.prompt_sets import PromptDataset
from xpo.data.prompts import Prompt, PromptEncoder, plain_text
from xpo.models.batches import batches_by_length, padded
from xpo.models.devices import chosen_device
from xpo.models.fingerprints import digest, model_digest
from xpo.models.hub import has_tokenizer, local_directory
from xpo.models.logprobs import having
from xpo.rewards.base import RewardModel


class ClassifierReward(RewardModel):
    """Scores with a sequence classifier: its single logit, or of two labels the log-odds of the second.

    It reads text with its own chat template and tokenizer. Without a template, a conversational prompt and its
    completion are a text pair, of which the prompt is shortened first.

    Args:
        model: a classifier with one label, or with two, of which the second stands for the better text.
        tokenizer: its tokenizer.
        batch_size: texts in one forward pass.
        max_length: tokens of a text at most; longer ones lose their beginning.
        special_tokens: what reads like a special token in a prompt is "text", or it is one: "parse". In a completion it
            is text.

    Raises:
        ConfigError: the classifier has more than two labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 16,
        max_length: int = 2048,
        special_tokens: str = DataOptions.special_tokens,
    ):
        if model.config.num_labels > 2:
            raise ConfigError(
                f"reward_model={model.config.name_or_path or type(model).__name__} has num_labels="
                f"{model.config.num_labels}; use a classifier with one label, whose logit is the reward, or with two"
            )
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = copy.deepcopy(tokenizer)  # may be the policy's own, which must not change
        self.tokenizer.truncation_side = "left"
        self.encode = PromptEncoder(self.tokenizer, special_tokens)
        self.batch_size = batch_size
        self.max_length = min(max_length, tokenizer.model_max_length, _positions(model, max_length))
        # BERT tells the texts of a pair apart by token types; others refuse or misread them.
        self.token_types = getattr(model.config, "type_vocab_size", 0) > 1

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 16,
        max_length: int = 2048,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
        special_tokens: str = DataOptions.special_tokens,
    ) -> "ClassifierReward":
        """Loads a classifier by hub name or from a local directory, with its own tokenizer unless one is given.

        Raises:
            ConfigError: the hub is out of reach, there is no trained classifier, or its own code is not trusted.
        """
        where = chosen_device("reward_model.device", device)
        directory = local_directory("reward_model.model", model, revision, with_code=trust_remote_code)
        code = {"trust_remote_code": trust_remote_code}
        if tokenizer is None and not has_tokenizer(directory):
            raise ConfigError(f"reward_model.model={model!r} has no tokenizer; save the one of its training there")
        try:
            classifier, loading = AutoModelForSequenceClassification.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, **code
            )
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(directory, **code)
        except (OSError, ValueError) as error:
            reason, remedy = first_line(error), "point it at a sequence classifier"
            if "trust_remote_code" in str(error):
                reason, remedy = "it brings its own code", "read the code, then set reward_model.trust_remote_code=true"
            raise ConfigError(f"reward_model.model={model!r} cannot be loaded ({reason}); {remedy}") from error
        if missing := loading["missing_keys"]:  # transformers makes them up
            raise ConfigError(
                f"reward_model.model={model!r} has no trained {min(missing)}; point it at a sequence classifier"
            )
        return cls(classifier.to(where), tokenizer, batch_size, max_length, special_tokens)

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        encoded = [self._encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        scores = torch.empty(len(encoded))
        for rows in batches_by_length([len(row.input_ids) for row in encoded], self.batch_size):
            scores[rows] = self._forward([encoded[i] for i in rows])
        return scores

    def check_data(self, key: str, dataset: PromptDataset) -> None:
        if self.tokenizer.chat_template is not None and isinstance(dataset, Dataset):
            # A template may refuse a role, or their order.
            chats = [prompt for prompt in dataset["prompt"] if not isinstance(prompt, str)]
            for prompt in {tuple(message["role"] for message in chat): chat for chat in chats}.values():
                self.encode(prompt, "")

    def _encode(self, prompt: Prompt, completion: str) -> BatchEncoding:
        ids: list[int] | None = None
        if not isinstance(prompt, str) and self.tokenizer.chat_template is not None:
            ids = self.encode(prompt, completion)
        elif isinstance(prompt, str) and not self.encode.as_text:
            text = self.tokenizer(completion, add_special_tokens=False, split_special_tokens=True)
            ids = self.encode(prompt) + text.input_ids
        if ids is not None:
            ids = ids[-self.max_length :]
            return BatchEncoding({"input_ids": ids, "token_type_ids": [0] * len(ids)})
        options = {"return_token_type_ids": self.token_types, "max_length": self.max_length}
        options["split_special_tokens"] = True  # as in PromptEncoder: a completion must not pose as structure
        if isinstance(prompt, str):
            return self.tokenizer(prompt + completion, truncation=True, **options)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        if len(self.tokenizer(completion, add_special_tokens=False).input_ids) < room:
            return self.tokenizer(plain_text(prompt), completion, truncation="only_first", **options)
        return self.tokenizer("", completion, truncation="only_second", **options)

    @torch.inference_mode()
    def _forward(self, encoded: list[BatchEncoding]) -> Tensor:
        # Decoder classifiers score the last token that differs from the pad token: pad with one that ends no text.
        rows = [row.input_ids for row in encoded]
        last_tokens = {row[-1] for row in rows}
        pad = self.tokenizer.pad_token_id
        if pad is None or pad in last_tokens:
            pad = next(token for token in range(len(last_tokens) + 1) if token not in last_tokens)
        ids, mask = padded(rows, pad)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if self.token_types:
            inputs["token_type_ids"], _ = padded([row.token_type_ids for row in encoded])
        with having(self.model.config.get_text_config(), "pad_token_id", pad):  # the model may be the user's own
            logits = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()}).logits
        logits = logits.float().cpu()
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    @property
    def fingerprint(self) -> str:
        vocabulary, template = sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template
        kind = f"classifier, contents {'as text' if self.encode.as_text else 'parsed'}"
        return digest(kind, model_digest(self.model), vocabulary, (template, self.max_length))


def _positions(model: PreTrainedModel, otherwise: int) -> int:
    """Tokens that a model has positions for. RoBERTa and its like count them from behind their padding's on."""
    tables = [part for name, part in model.named_modules() if name.rpartition(".")[2] == "position_embeddings"]
    tables = [part for part in tables if isinstance(part, nn.Embedding) and part.padding_idx is not None]
    if tables:
        return min(part.num_embeddings - part.padding_idx - 1 for part in tables)
    return getattr(model.config, "max_position_embeddings", otherwise)  # not every kind has them
