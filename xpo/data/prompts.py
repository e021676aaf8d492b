"""What a prompt is, and how it becomes text or token ids. Layer 0: no project imports."""

import hashlib
from typing import Any

# Standard: plain text. Conversational: messages with the keys "role" and "content".
Prompt = str | list[dict[str, str]]


def is_conversational(prompt: Prompt) -> bool:
    """True for a list of messages, False for plain text."""
    return not isinstance(prompt, str)


def plain_text(prompt: Prompt) -> str:
    """A prompt as text for readers without a chat template (PairRM, lexicons, terminals).

    A single user message gives its text, a longer conversation one "Role: content" paragraph per message.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def render(tokenizer: Any, prompt: Prompt, completion: str | None = None, **template_kwargs: Any) -> str:
    """A prompt, or a prompt with its completion, as the text that `tokenizer`'s model expects.

    Plain text is followed by the completion. Messages go through the tokenizer's chat template and end, without a
    completion, with the generation prompt. A conversation that ends with the assistant's words is one to be continued:
    the completion goes on with that message. `template_kwargs` are what the template takes beside the messages.
    """
    if isinstance(prompt, str):
        return prompt + (completion or "")
    messages, options = prompt, {}
    continues = prompt[-1]["role"] == "assistant"
    if completion is None:
        options = {"add_generation_prompt": not continues, "continue_final_message": continues}
    elif continues:
        messages = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + completion}]
    else:
        messages = [*prompt, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(messages, tokenize=False, **options, **template_kwargs)


def coin(seed: int, prompt: Prompt, first: str, second: str) -> bool:
    """A fair coin, fixed by `seed` and the texts. Swapping different completions turns it over."""
    texts = (seed, plain_text(prompt), *sorted((first, second)))
    heads = hashlib.sha256(repr(texts).encode()).digest()[0] % 2 == 1
    return heads == (first <= second)
