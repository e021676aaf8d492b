"""Lines in, from a script or a terminal; words out."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_conversation import talking

from xpo.config.errors import ConfigError, JudgeStopped
from xpo.evaluation.conversation import REFERENCE, Say, Turn
from xpo.evaluation.dialogue import HELP, Dialogue

SPEAKERS = {"policy": "runs/one/model", "reference": "base", "judge": "lexicon"}


def dialogue(directory: Path, **options: Any) -> tuple[Dialogue, io.StringIO]:
    shown = io.StringIO()
    conversation = talking(**{"margin": 1.0} | options)
    return Dialogue(conversation, SPEAKERS, Console(file=shown, width=80), directory / "chat.jsonl"), shown


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What somebody does at the terminal: lines, Ctrl-C, Ctrl-D."""
    waiting: Iterator[str | type[BaseException]] = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_a_script_shows_each_message_its_answers_and_the_verdict(tmp_path: Path) -> None:
    there, shown = dialogue(tmp_path)
    there.from_script(["Hello\n", "\n", "/exit\n", "And?\n"])
    written = shown.getvalue()
    assert written.startswith("> Hello\npolicy\n")
    assert "\nreference\n" in written
    assert written.endswith("\nlexicon: policy wins (73 % sure, margin +1.00, scores 2.00 and 2.00)\n")
    assert len(there.conversation.history) == 2


def test_commands_change_the_conversation(tmp_path: Path) -> None:
    there, _ = dialogue(tmp_path)
    there.from_script(["Hello", "/reset", "/system Be brief.", "/seed 11", "/temperature 0.25"])
    conversation = there.conversation
    assert conversation.history == []
    assert (conversation.system, conversation.seed, conversation.options.temperature) == ("Be brief.", 11, 0.25)
    assert conversation.options.max_new_tokens == 8
    there.from_script(["/system"])
    assert conversation.system == ""


def test_saved_pairs_are_appended(tmp_path: Path) -> None:
    there, shown = dialogue(tmp_path)
    there.from_script(["Hello", "/save", "Again", "/save", f"/save {tmp_path}/other.jsonl"])
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    assert [len(row["prompt"]) for row in rows] == [1, 3]
    assert [row["winner"] for row in rows] == ["first", "first"]
    assert json.loads((tmp_path / "other.jsonl").read_text()) == rows[1]
    assert shown.getvalue().count("chat.jsonl has the pair") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sead 3", "/sead is no command; did you mean '/seed'?; /help lists them"),
        ("/seed x", "/seed x: give a whole number from 0 on"),
        ("/seed", "/seed : give a whole number"),
        ("/temperature hot", "/temperature hot: give a number from 0 on"),
        ("/temperature -1", "/temperature -1: give a number from 0 on"),
        ("/temperature nan", "/temperature nan: give a number from 0 on"),
        ("/save", "/save: there is no pair yet"),
    ],
)
def test_a_wrong_line_ends_a_script(tmp_path: Path, line: str, message: str) -> None:
    there, _ = dialogue(tmp_path)
    with pytest.raises(ConfigError) as caught:
        there.from_script([line, "Hello"])
    assert message in str(caught.value)
    assert there.conversation.history == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    there, _ = dialogue(tmp_path)
    with pytest.raises(ConfigError, match="it cannot be written"):
        there.from_script(["Hello", f"/save {tmp_path}"])


def test_at_a_terminal_a_wrong_line_is_said_and_the_conversation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, shown = dialogue(tmp_path)
    typed(monkeypatch, "/sead", "/help", "Hello", EOFError)
    there.at_terminal()
    written = shown.getvalue()
    assert written.startswith("policy     runs/one/model\nreference  base\njudge      lexicon\nseed 3, temperature 1,")
    assert "did you mean '/seed'?" in written
    assert all(usage in written for usage in HELP)
    assert "lexicon: policy wins" in written


def test_ctrl_c_twice_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, shown = dialogue(tmp_path)
    typed(monkeypatch, KeyboardInterrupt, "/seed 5", KeyboardInterrupt, KeyboardInterrupt, "/seed 6")
    there.at_terminal()
    assert there.conversation.seed == 5
    assert shown.getvalue().count("Ctrl-C once more ends") == 2


def test_ctrl_c_stops_an_answer_and_once_more_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, shown = dialogue(tmp_path)

    def stopped(message: str, say: Say) -> Turn:
        say("policy", "I was")
        raise KeyboardInterrupt

    monkeypatch.setattr(there.conversation, "answer", stopped)
    typed(monkeypatch, "Hello", KeyboardInterrupt, "/seed 6")
    there.at_terminal()
    assert "policy\nI was\n" in shown.getvalue()
    assert there.conversation.seed == 3


def test_a_judge_that_cannot_go_on_leaves_the_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, shown = dialogue(tmp_path)

    def gone(turn: object) -> None:
        raise JudgeStopped("judge.base_url is gone")

    monkeypatch.setattr(there.conversation, "judge", gone)
    typed(monkeypatch, "Hello", "/save", EOFError)
    there.at_terminal()
    assert "judge.base_url is gone" in shown.getvalue()
    assert json.loads((tmp_path / "chat.jsonl").read_text())["winner"] is None


def test_the_policy_alone(tmp_path: Path) -> None:
    there, shown = dialogue(tmp_path)
    del there.conversation.models[REFERENCE]
    there.from_script(["Hello"])
    assert "reference" not in shown.getvalue()
    with pytest.raises(ConfigError, match="there is no pair to save"):
        there.from_script(["/save"])
