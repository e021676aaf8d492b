"""The one exception for what a user can mend. Layer 0: no project imports."""

import difflib
import re
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input: one line that names the key, its value and the remedy. Entry points exit with 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint for a misspelt word: "; did you mean 'alpha'?", or "" when nothing is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def printable(text: object) -> str:
    """A text for a terminal: what a model, a prompt or a server says may hold sequences that a terminal obeys."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", str(text))


def hydra_value(text: str) -> str:
    """A text as the value of an override: quoted where Hydra's grammar would read more into it."""
    if re.fullmatch(r"[\w/.\-+@]+", text, re.ASCII):
        return text
    escaped = re.sub(r'(\\*)"', r"\1\1\"", text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def first_line(error: BaseException) -> str:
    """The beginning of what an error says; its type if it says nothing."""
    return (printable(error) or type(error).__name__).splitlines()[0]


class JudgeStopped(RuntimeError):
    """A judge cannot go on: its budget is used up, or its server is gone. Training stops with a checkpoint."""


class RunInUse(ConfigError):
    """Another process is at work in the run directory."""

    status = 75  # of a worker that meets it; the run's own record stays as it is

    def __init__(self, run_dir: object) -> None:
        super().__init__(f"hydra.run.dir={str(run_dir)!r} is in use by a run; wait for its end or stop it")


class JobFailed(RuntimeError):
    """A job of a sweep that another launcher than ours has started came to nothing."""
