"""How a conversation looks, at several widths."""

import io
import math
import re

import pytest
from rich.console import Console

from xpo.tracking.terminal_chat import Answers, show_verdict

NASTY = "\x1b[2Jte\x07xt\r\x08"


def console(width: int, terminal: bool = True) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, height=24, force_terminal=terminal, color_system=None), file


def shown(width: int, texts: dict[str, list[str]], terminal: bool = True) -> str:
    there, file = console(width, terminal)
    with Answers(there, list(texts)) as answers:
        for name, parts in texts.items():
            for part in parts:
                answers.say(name, part)
    return file.getvalue()


def test_on_a_narrow_terminal_one_stands_under_the_other() -> None:
    texts = {"policy": [" I ", "love it."], "reference": ["It is ", "fine."]}
    assert shown(80, texts) == "policy\nI love it.\nreference\nIt is fine.\n"


def test_in_a_pipe_so_it_is_at_any_width() -> None:
    assert shown(200, {"policy": ["A"], "reference": ["B"]}, terminal=False) == "policy\nA\nreference\nB\n"


def test_the_policy_alone_needs_no_name() -> None:
    assert shown(200, {"policy": ["A ", "B"]}) == "A B\n"


def test_on_a_wide_terminal_two_columns_stand_beside_each_other() -> None:
    written = shown(120, {"policy": ["I love ", "it."], "reference": ["It is fine."]})
    lines = re.sub(r"\x1b\[[?\d]*[A-Za-z]|\r", "", written).split("\n")
    assert lines[-3].split() == ["policy", "reference"]
    assert lines[-2].split("   ")[0] == "I love it."
    assert lines[-2][58:].rstrip() == "It is fine."


def test_while_it_is_said_the_end_of_a_long_answer_is_in_sight() -> None:
    there, _ = console(120)
    with Answers(there, ["policy", "reference"]) as answers:
        for number in range(50):
            answers.say("policy", f"line {number}\n")
        growing = answers.columns(20)
    there.file = io.StringIO()
    there.print(growing)
    lines = there.file.getvalue().splitlines()
    assert len(lines) == 21  # with the names
    assert lines[-2].split() == ["line", "49"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_model_says_nothing_that_a_terminal_obeys(width: int) -> None:
    there, file = console(width, terminal=False)
    with Answers(there, ["policy", "reference"]) as answers:
        answers.say("policy", NASTY)
    assert file.getvalue() == "policy\n[2Jtext\n"


@pytest.mark.parametrize(
    ("winner", "margin", "scores", "words"),
    [
        ("first", math.log(3), [0.5, -0.25], "policy wins (75 % sure, margin +1.10, scores 0.50 and -0.25)"),
        ("second", -math.log(9), None, "reference wins (90 % sure, margin -2.20)"),
        ("second", -1e9, None, "reference wins (100 % sure, margin -1000000000.00)"),
        ("tie", 0.0, [1.0, 1.0], "tie (margin +0.00, scores 1.00 and 1.00)"),
        (None, math.nan, None, "no verdict"),
    ],
    ids=["policy", "reference", "certain", "tie", "none"],
)
def test_a_verdict_says_who_wins_and_how_surely(
    winner: str | None, margin: float, scores: list[float] | None, words: str
) -> None:
    there, file = console(120)
    show_verdict(there, "lexicon", winner, margin, scores)
    assert file.getvalue() == f"lexicon: {words}\n"


def test_a_verdict_is_one_line_in_a_pipe_and_breaks_between_words_on_a_terminal() -> None:
    words = "lexicon: reference wins (90 % sure, margin -2.20)"
    for terminal, expected in ((False, [words]), (True, ["lexicon: reference wins (90 %", "sure, margin -2.20)"])):
        there, file = console(30, terminal)
        show_verdict(there, "lexicon", "second", -math.log(9), None)
        assert [line.rstrip() for line in file.getvalue().splitlines()] == expected
