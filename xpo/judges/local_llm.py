"""A causal language model in this process as judge. Shapes: N questions, L tokens of the longest, V vocabulary."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xpo.config.checks import count, number, one_of
from xpo.config.errors import ConfigError
from xpo.config.options import ModelOptions
from xpo.data.prompts import Prompt, plain_text, render, special_pattern
from xpo.judges.pairwise import PairwiseJudge
from xpo.judges.question import TEMPLATE, check_template, question
from xpo.models.batches import batches_by_length, padded
from xpo.models.devices import DTYPES, chosen_device
from xpo.models.fingerprints import digest, model_digest
from xpo.models.loading import load_model, load_tokenizer, loaded, policy_directory
from xpo.models.logprobs import positions

logger = logging.getLogger(__name__)

ANSWER = "\n\nAnswer:\n"  # where a model without a chat template is to go on


class LocalLLMJudge(PairwiseJudge):
    """Asks a causal language model which of two completions is better, A or B.

    The question is a user message in the model's own chat template, or plain text where it has none. The log-odds are
    those of the letters as next token: logsumexp over the tokens that read A (with and without a space before it,
    say), minus the same for B. A question longer than `max_length` is no verdict (NaN): what is cut might decide it.

    Args:
        model: hub name, local directory, embedded:smollm2_135m or embedded:tiny.
        revision, device, batch_size, both_orders, seed, temperature: as for `PairRMJudge`.
        dtype: "auto", "float32", "bfloat16" or "float16".
        max_length: tokens of a question at most; never more than the model has positions for.
        template: the question, with {prompt}, {first} and {second}; None is `xpo.judges.question.TEMPLATE`.
        trust_remote_code: run code that the model brings with it.

    Raises:
        ConfigError: an argument is out of range, the model cannot be loaded, or no token of it reads A or B.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 8,
        max_length: int = 4096,
        both_orders: bool = True,
        seed: int = 0,
        template: str | None = None,
        temperature: float = 1.0,
        trust_remote_code: bool = False,
    ):
        count("judge.batch_size", batch_size)
        count("judge.max_length", max_length)
        number("judge.temperature", temperature, above=0)
        one_of("judge.dtype", dtype, ("auto", *DTYPES))
        super().__init__(both_orders, seed)
        self.template = TEMPLATE if template is None else template
        check_template("judge.template", self.template)
        self.batch_size = batch_size
        self.temperature = temperature
        self.device = chosen_device("judge.device", device)
        options = ModelOptions(name=model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        directory = policy_directory(model, revision, "judge.model", with_code=trust_remote_code)
        network = loaded("judge.model", model, load_model, directory, options)
        self.tokenizer = loaded("judge.model", model, load_tokenizer, directory, options)
        self.network = network.to(self.device).requires_grad_(False).eval()
        config = network.config.get_text_config()
        self.max_length = min(max_length, getattr(config, "max_position_embeddings", max_length))  # some have no limit
        self.letters = [_tokens_that_read(letter, model, self.tokenizer) for letter in "AB"]
        self._structure = special_pattern(self.tokenizer)

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        rows = [self._tokens(*texts) for texts in zip(map(plain_text, prompts), first, second, strict=True)]
        asked = [i for i, row in enumerate(rows) if len(row) <= self.max_length]
        if len(asked) < len(rows):
            unread = f"{len(rows) - len(asked)} of {len(rows)} questions"
            logger.warning("The judge did not read %s: longer than judge.max_length=%d tokens", unread, self.max_length)
        log_odds = torch.full((len(rows),), torch.nan)
        log_odds[asked] = self._log_odds([rows[i] for i in asked]) / self.temperature
        return log_odds

    @property
    def fingerprint(self) -> str:
        texts = self.tokenizer.chat_template, sorted(self.tokenizer.get_vocab().items())
        settings = self.template, self.max_length, self.temperature, self.both_orders, self.both_orders or self.seed
        # Models that can think were let think before xpo asked them not to.
        kind = "local LLM, at once" if "enable_thinking" in str(self.tokenizer.chat_template) else "local LLM"
        return digest(kind, model_digest(self.network), texts, settings)

    def _tokens(self, prompt: str, first: str, second: str) -> list[int]:
        text = question(self.template, *map(self._clean, (prompt, first, second)))
        if self.tokenizer.chat_template is None:
            return self.tokenizer(text + ANSWER).input_ids
        # A model that can think first (Qwen3) is to answer at once. The template writes the special tokens.
        text = render(self.tokenizer, [{"role": "user", "content": text}], enable_thinking=False)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _clean(self, text: str) -> str:
        """A text without what would read as the structure of the conversation, such as the end of the message."""
        while (cleaned := self._structure.sub("", text)) != text:  # what is left may have closed up to another one
            text = cleaned
        return text

    @torch.no_grad()
    def _log_odds(self, rows: list[list[int]]) -> Tensor:
        """Log-odds of A over B after each row of tokens, float32 (N,) on the CPU. Similar lengths share a batch."""
        log_odds = torch.empty(len(rows))
        for batch in batches_by_length([(len(row), row) for row in rows], self.batch_size, longest_first=True):
            ids, mask = (part.to(self.device) for part in padded([rows[i] for i in batch], side="left"))
            inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions(mask)}
            logits = self.network(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]  # (N, V)
            a, b = (logits[:, letter].float().logsumexp(dim=1) for letter in self.letters)
            log_odds[batch] = (a - b).cpu()
        return log_odds


def _tokens_that_read(letter: str, model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens whose text is `letter`, but for spaces around it."""
    candidates = [token for text, token in tokenizer.get_vocab().items() if letter in text]
    tokens = sorted(token for token in candidates if tokenizer.decode([token]).strip() == letter)
    if not tokens:
        raise ConfigError(
            f"judge.model={model!r} has no token for the letter {letter}, so it cannot answer in one; "
            "choose a model with another tokenizer"
        )
    return tokens
