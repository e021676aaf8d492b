"""How commands speak, and how one ends that came to nothing: one line, and the exit status. Layer 0: no torch."""

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from xpo.config.compose import CONF, check_words
from xpo.config.errors import JobFailed, printable
from xpo.config.explain import explain
from xpo.config.schema import TrainSchema
from xpo.launch.processes import exit_statuses


def speak_to_any_console() -> None:
    """What the console cannot show is a question mark there, what cannot be read a sign: neither fails a command."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_composed(command: Callable[[], object], schema: type = TrainSchema) -> NoReturn:
    """Ends the process as a command does that Hydra composes, and that leaves its `exit_statuses`; 2 for bad input."""
    speak_to_any_console()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the handler below instead of a traceback
    exit_statuses.clear()
    try:
        check_words(sys.argv[1:])
        command()
    except Exception as error:
        sys.exit(exit_status(error, schema))
    sys.exit(max(exit_statuses, default=0))


def exit_status(error: Exception, schema: type = TrainSchema) -> int:
    """Says what went wrong and returns 2 for bad input, 1 for a job that came to nothing; raises any other error."""
    if isinstance(error, JobFailed):
        print_error(error)
        return 1
    if isinstance(error, BrokenPipeError):  # who reads has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    message = explain(error, CONF, sys.argv[1:], schema)
    if message is None:
        raise error
    print_error(message)
    return 2


def print_error(message: object) -> None:
    """One line on stderr."""
    print(f"xpo: error: {printable(message)}", file=sys.stderr)
