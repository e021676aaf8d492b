"""What others wrote, on a terminal: nothing that it obeys."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from xpo.config.errors import first_line
from xpo.evaluation.compare.read import Run, Sweep
from xpo.evaluation.compare.report import show
from xpo.evaluation.compare.statistics import compare
from xpo.launch.command import print_error
from xpo.launch.sweep_record import Job, SweepReport
from xpo.launch.sweep_record import Sweep as Record
from xpo.tracking import terminal

NASTY = "\x1b[2J\x1b]52;c;Y3VybA==\x07\x9b1mtext\r\x08"


def completions() -> None:
    record = {"prompt": NASTY, "completion": NASTY, "reference": NASTY, "label": 1.0}
    terminal.show_completions([record], 1)


def comparison() -> None:
    done = Run("done", "finished", None, {"loss.loss_type": NASTY}, {"eval/win_rate": [(1, 0.5)]})
    sweep = Sweep("s", None, ["loss.loss_type"], [done, Run("job", "failed", NASTY)], None, "xpo")
    show(compare(sweep), Path("report.html"))


def sweep_table() -> None:
    job = Job(NASTY, {}, "run", "key", state="failed", reason=NASTY)
    SweepReport(Record("s", "", [], [job], None, "xpo"), Path.cwd()).summary()


def warning() -> None:
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        terminal.quiet()
        logging.getLogger("xpo").warning("the prompt %s is too long", NASTY)
    finally:
        root.handlers = handlers


def error() -> None:
    print_error(NASTY)
    print(first_line(ValueError(NASTY)))


@pytest.mark.parametrize("say", [completions, comparison, sweep_table, warning, error])
def test_a_terminal_is_shown_text_only(say: Callable[[], None], capfd: pytest.CaptureFixture[str]):
    """Of a prompt, a completion, a server; escapes clear a screen, fill the clipboard, or overwrite a line."""
    say()
    shown = "".join(capfd.readouterr())
    assert "text" in shown
    assert not set("\x1b\x07\x08\x9b\r") & set(shown)


def test_the_best_iterate_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Of evaluations with a score; one alone is no choice."""
    history = [{"step": step, "eval_runtime": 1.0, "eval_objective": value} for step, value in ((0, 0.5), (4, 0.75))]
    terminal.show_best(
        [*history, {"step": 8, "eval_runtime": 1.0, "eval_objective": 0.25}, {"step": 9, "eval_runtime": 1.0}]
    )
    assert capsys.readouterr().out == "Best iterate by score - beta * KL: step 4 with 0.750 (step 8: 0.250).\n"
    terminal.show_best(history[:1])
    assert capsys.readouterr().out == ""
