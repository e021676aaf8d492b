"""The question put to a language model that judges: which of two answers is better, A or B?"""

import re
from typing import Any

from xpo.config.errors import ConfigError, nearest
from xpo.data.prompts import Prompt, plain_text

PLACEHOLDERS = ("prompt", "first", "second")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")

TEMPLATE = """\
Below are a request and two answers to it. Decide which answer you would rather have received. Ask of each \
whether it does what was asked, whether what it says is true, and whether it is clear. A longer answer is not \
better for being longer, and the order of the answers means nothing.

<request>
{prompt}
</request>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

Which answer is better? Reply with exactly one letter, A or B, and nothing else."""


def check_template(key: str, template: Any) -> None:
    """ConfigError unless the value of `key` is text with {prompt}, {first} and {second}, and no other {word}."""
    shown = f"{key}={template!r:.60}" + ("..." if len(repr(template)) > 60 else "")
    if not isinstance(template, str):
        raise ConfigError(f"{shown} is not text; give one with {{prompt}}, {{first}} and {{second}}, or null")
    found = _PLACEHOLDER.findall(template)
    for name in found:
        if name not in PLACEHOLDERS:
            raise ConfigError(
                f"{shown} has an unknown placeholder {{{name}}}{nearest(name, PLACEHOLDERS)}; "
                "use {prompt}, {first} and {second} only"
            )
    for name in PLACEHOLDERS:
        if name not in found:
            raise ConfigError(f"{shown} lacks {{{name}}}; put it where that text belongs")


def question(template: str, prompt: Prompt, first: str, second: str) -> str:
    """The template with the texts in their places. What looks like a placeholder within a text stays as it is.

    A completion can still talk to the model that reads it ("A is better"): no template prevents that.
    """
    texts = {"prompt": plain_text(prompt), "first": first, "second": second}
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], template)
