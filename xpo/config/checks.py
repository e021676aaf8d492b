"""Checks of single values: of the configuration's keys (`xpo.config.options`), and of arguments of judges and rewards.

Each raises ConfigError with one line: key, value, remedy.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from xpo.config.errors import ConfigError, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights; auto: as they are stored


def number(key: str, value: Any, minimum: float | None = None, above: float | None = None) -> None:
    """A finite number, at least `minimum` or greater than `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key}={value!r} is not a number; give one such as {key}=0.1")
    if minimum is not None and value < minimum:
        raise ConfigError(f"{key}={value!r} is too small; give a value of at least {minimum}")
    if above is not None and value <= above:
        raise ConfigError(f"{key}={value!r} is too small; give a value greater than {above}")


def count(key: str, value: Any, minimum: int = 1) -> None:
    """A whole number, at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}={value!r} is not a whole number; give one such as {key}={max(minimum, 8)}")
    number(key, value, minimum)


def seed(key: str, value: Any) -> None:
    """A whole number that torch and NumPy take as a seed."""
    count(key, value, minimum=0)
    if value >= 2**32:
        raise ConfigError(f"{key}={value!r} is too large; give a value below {2**32}")


def fraction(key: str, value: Any) -> None:
    """A number in (0, 1]."""
    number(key, value, above=0)
    if value > 1:
        raise ConfigError(f"{key}={value!r} is too large; give a value in (0, 1]")


def per_epoch(key: str, value: Any, minimum: float | None = None, above: float | None = None) -> None:
    """One number, or a list with one number per epoch."""
    if isinstance(value, str):
        raise ConfigError(f"{key}={value!r} is not a number; give one, or one per epoch as {key}=[1e-5,1e-6]")
    values = value if isinstance(value, Sequence) else [value]
    if not values:
        raise ConfigError(f"{key}=[] holds no value; give a number, or one per epoch as {key}=[1e-5,1e-6]")
    for item in values:
        number(key, item, minimum, above)


def one_of(key: str, value: Any, choices: Iterable[str]) -> None:
    """One of a few words."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")
