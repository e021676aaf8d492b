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

    Plain text and a single user message give the text itself; a longer conversation gives one
    "Role: content" paragraph per message.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def render(tokenizer: Any, prompt: Prompt, completion: str | None = None, **template_kwargs: Any) -> str:
    """A prompt, or a prompt with its completion, as the text that `tokenizer`'s model expects.

    Standard prompts are concatenated with the completion. Conversational prompts go through the
    tokenizer's own chat template and end, without a completion, with the generation prompt. A
    conversation that ends with the assistant's words is one to be continued: the completion goes on
    with that message. `template_kwargs` are what the template takes beside the messages.
    """
    if isinstance(prompt, str):
        return prompt + (completion or "")
    continues = prompt[-1]["role"] == "assistant"
    if completion is None:
        return tokenizer.apply_chat_template(
            prompt,
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **template_kwargs,
        )
    if continues:
        messages = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + completion}]
    else:
        messages = [*prompt, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)


def coin(seed: int, prompt: Prompt, first: str, second: str) -> bool:
    """A fair coin, fixed by `seed` and the texts. Swapping different completions turns it over."""
    one, two = sorted((first, second))
    heads = hashlib.sha256(repr((seed, plain_text(prompt), one, two)).encode()).digest()[0] % 2 == 1
    return heads == (first == one)
