"""What a prompt is, and how it becomes text or token ids."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError

from xpo.config.errors import ConfigError, first_line
from xpo.config.options import DataOptions

# Standard: plain text. Conversational: messages with the keys "role" and "content".
Prompt = str | list[dict[str, Any]]


class Batch(list[Any]):
    """Prompts or completions, and what else is known of each, by name: columns of the data set, token ids."""

    def __init__(self, items: Iterable[Any], known: dict[str, list[Any]]):
        super().__init__(items)
        self.known = known


def plain_text(prompt: Prompt) -> str:
    """A prompt as text for readers without a chat template (PairRM, lexicons, terminals).

    A single user message gives its text, a longer conversation one "Role: content" paragraph per message.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content'] or ''}" for message in prompt)


def as_message(prompt: list[dict[str, Any]], completion: str) -> dict[str, str]:
    """The assistant's message that a completion makes of a conversational prompt, which may have begun it."""
    begun = prompt[-1]["content"] or "" if prompt[-1]["role"] == "assistant" else ""
    return {"role": "assistant", "content": begun + completion}


def render(tokenizer: Any, prompt: Prompt, completion: str | None = None, **template_kwargs: Any) -> str:
    """A prompt, or a prompt with its completion, as the text that `tokenizer`'s model expects.

    Plain text is followed by the completion. Messages go through the tokenizer's chat template and end, without a
    completion, with the generation prompt. A conversation that ends with the assistant's words is one to be continued:
    the completion goes on with that message. `template_kwargs` are what the template takes beside the messages.

    Raises:
        ConfigError: the template refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt + (completion or "")
    # A data set gives each message the keys of all of them.
    messages = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in prompt]
    if messages[-1] == {"role": "assistant", "content": ""}:  # begun without a word: templates would end it
        del messages[-1]
    continues, options = bool(messages) and messages[-1]["role"] == "assistant", {}
    if completion is None:
        options = {"add_generation_prompt": not continues, "continue_final_message": continues}
    elif continues:
        messages[-1] |= as_message(prompt, completion)
    else:
        messages.append(as_message(prompt, completion))
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **template_kwargs)
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} refuses prompt={prompt!r:.120} ({first_line(error)}); "
            "leave such prompts out, or change the template"
        ) from error


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds what reads like one of the tokenizer's special tokens."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")  # which finds nothing


class PromptEncoder:
    """Token ids of what `render` returns; plain text follows what the tokenizer begins a text with.

    Args:
        tokenizer: of the model that reads them.
        special_tokens: "text", what reads like a special token in a prompt or completion is text, as only the template
            may say who speaks; "parse", it is that token.
        template_kwargs: see `render`.
    """

    def __init__(self, tokenizer: Any, special_tokens: str = DataOptions.special_tokens, **template_kwargs: Any):
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs
        self.as_text = special_tokens == "text"
        self.pattern = special_pattern(tokenizer)
        plain, full = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
        starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        self.before = full[: next(starts, 0)]  # and nothing behind: some tokenizers end each text with an EOS

    def has_special(self, prompt: Prompt) -> bool:
        """Whether anything in a prompt reads like a special token."""
        texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]
        return any(self.pattern.search(text) for text in texts if isinstance(text, str))

    def __call__(self, prompt: Prompt, completion: str | None = None) -> list[int]:
        if isinstance(prompt, str):
            ids = self._ids(render(self.tokenizer, prompt, completion), self.as_text)
            begun = ids[: len(self.before)] == self.before  # a prompt that has been through a template
            return ids if begun else self.before + ids
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} has no chat template for conversational prompts; "
                "set tokenizer.chat_template, use an instruction-tuned model, or give prompts as plain text"
            )
        hidden: dict[str, str] = {}  # what reads like a special token, by what stands for it in the template

        def hide(text: Any) -> Any:
            def name(found: re.Match[str]) -> str:
                hidden[sign := f"\ue000{len(hidden)}\ue001"] = found[0]
                return sign

            return self.pattern.sub(name, text) if isinstance(text, str) else text

        if self.as_text and (self.has_special(prompt) or self.pattern.search(completion or "")):
            prompt = [{key: hide(text) for key, text in message.items()} for message in prompt]
            completion = hide(completion)
        text = render(self.tokenizer, prompt, completion, **self.template_kwargs)
        parts = re.split(f"({'|'.join(hidden)})", text) if hidden else [text]
        return [token for part in parts for token in self._ids(hidden.get(part, part), part in hidden)]

    def _ids(self, text: str, as_text: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text).input_ids


def coin(seed: int, prompt: Prompt, first: str, second: str) -> bool:
    """A fair coin, fixed by `seed` and the texts. Swapping different completions turns it over."""
    texts = (seed, plain_text(prompt), *sorted((first, second)))
    heads = hashlib.sha256(repr(texts).encode()).digest()[0] % 2 == 1
    return heads == (first <= second)
