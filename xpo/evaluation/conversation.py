"""A conversation with a policy: its answers, the reference's to the same messages, and who says it better."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from xpo.config.errors import ConfigError
from xpo.config.files import without_nan
from xpo.config.options import GenerationOptions
from xpo.data.prompts import Prompt, PromptEncoder
from xpo.judges.labelling import Labeller
from xpo.sampling.completions import Completions
from xpo.sampling.noise import sampling_noise
from xpo.sampling.sampler import Sampler

POLICY, REFERENCE = "policy", "reference"
Say = Callable[[str, str], None]  # takes who speaks, and the next words
_WINNERS = {1: "first", -1: "second", 0: "tie"}


@dataclass(frozen=True)
class Turn:
    """A message with its answers, by who gave them; the policy's is the first of the pair."""

    prompt: Prompt  # the message, and the conversation before it
    answers: dict[str, Completions]


class Verdict(NamedTuple):
    """What is said of a pair."""

    winner: str | None  # "first", "second" or "tie"; None: the judge could not tell
    margin: float  # see `Judge.margins`
    scores: list[float] | None  # of both, if the judge compares them


@dataclass
class Conversation:
    """Messages and answers so far. All models answer what the policy's answers have led to, with the same noise.

    Attributes:
        models: policy and perhaps reference; each is entered while it speaks.
        tokenizer: the policy's.
        encode: turns a prompt into tokens.
        options: how answers are drawn; see `set_temperature`.
        ends: the tokens that end an answer.
        extra: further options of GenerationConfig.
        labeller: who judges; None: nobody.
        device: where the models are.
        plain: messages are prompts of their own, as text, as there is no chat template.
        seed: of the noise, together with the number of the message: after `reset` the same words get the same answer.
        system: the message before all others; "" for none.
    """

    models: dict[str, Callable[[], AbstractContextManager[PreTrainedModel]]]
    tokenizer: PreTrainedTokenizerBase
    encode: PromptEncoder
    options: GenerationOptions
    ends: list[int]
    extra: dict[str, Any]
    labeller: Labeller | None
    device: torch.device
    plain: bool
    seed: int
    system: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, message: str, say: Say) -> Turn:
        """Has every model answer, and remembers what the policy said, if only half of it before Ctrl-C.

        ConfigError if the conversation has become too long.
        """
        prompt = self._prompt(message)
        tokens, limit = self.encode(prompt), min(self.tokenizer.model_max_length, self.options.max_length)
        if len(tokens) + self.options.max_new_tokens > limit:
            raise ConfigError(
                f"the conversation has {len(tokens)} tokens, and with generation.max_new_tokens="
                f"{self.options.max_new_tokens} the model takes {limit}; /reset begins anew"
            )
        noise = sampling_noise((self.seed, len(self.history) // 2), [0], self.options.max_new_tokens)
        sampler = Sampler(self.tokenizer, self.options, self.ends, kwargs=self.extra)
        answers: dict[str, Completions] = {}
        for name, entered in self.models.items():
            stream = _Stream(self.tokenizer, partial(say, name))
            try:
                with entered() as model:
                    answers[name] = sampler.sample(model, [tokens], noise, self.device, streamer=stream)
            except KeyboardInterrupt:
                if name == POLICY and stream.said:
                    self._remember(message, stream.said)
                raise
            if name == POLICY:
                self._remember(message, answers[name].texts[0])
        return Turn(prompt, answers)

    def judge(self, turn: Turn) -> Verdict | None:
        """Who says it better; None without a reference or a judge. JudgeStopped if the judge cannot go on."""
        if self.labeller is None or len(turn.answers) < 2:
            return None
        labelled = self.labeller([turn.prompt], turn.answers[POLICY], turn.answers[REFERENCE])
        margin = labelled.margin.item()
        winner = _WINNERS[int(labelled.labels.label)] if math.isfinite(margin) else None
        return Verdict(winner, margin, None if labelled.scores is None else labelled.scores[:, 0].tolist())

    def row(self, turn: Turn, verdict: Verdict | None) -> dict[str, Any]:
        """A pair as `xpo.data.pairs.load_pairs` reads it; ConfigError where there is only one answer."""
        if len(turn.answers) < 2:
            raise ConfigError("there is no pair to save: the policy speaks alone; give it a reference")
        winner, margin, scores = verdict or Verdict(None, math.nan, None)
        first, second = (answer.texts[0] for answer in turn.answers.values())
        row = {"prompt": turn.prompt, "first": first, "second": second, "winner": winner, "by": list(turn.answers)}
        return row | without_nan({"margin": margin, "score": list(scores or (None, None))})

    def reset(self) -> None:
        """Forgets all messages but the system's."""
        self.history = []

    def set_system(self, text: str) -> None:
        """What stands before all messages from now on. ConfigError without a chat template."""
        if self.plain:
            raise ConfigError("/system needs a chat template, and the policy reads plain text; leave it out")
        self.system = text

    def set_temperature(self, temperature: float) -> None:
        """ConfigError for a negative one; 0 takes the likeliest token."""
        self.options = replace(self.options, temperature=temperature)

    def _prompt(self, message: str) -> Prompt:
        if self.plain:
            return message
        system = [_message("system", self.system)] if self.system else []
        return [*system, *self.history, _message("user", message)]

    def _remember(self, message: str, answer: str) -> None:
        self.history += [_message("user", message), _message("assistant", answer)]


class _Stream(TextStreamer):
    """Hands on the words of an answer as they are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said += text
        self.say(text)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
