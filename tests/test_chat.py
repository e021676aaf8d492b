"""python -m xpo.chat, from end to end: at a terminal, in a pipe, and when it is called wrongly."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from trained_run import finished_run

from xpo.chat import main
from xpo.config.errors import JudgeStopped
from xpo.data.pairs import load_pairs
from xpo.evaluation.conversation import Conversation, Say, Turn

VERDICT = r"lexicon: (policy wins|reference wins|tie) \("


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "run")


class Terminal:
    """A command at a terminal of so many columns."""

    def __init__(self, columns: int, directory: Path, *arguments: str):
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "xpo.chat", *arguments],
            cwd=directory,
            env=environment | {"TERM": "xterm"},
            stdin=its,
            stdout=its,
            stderr=its,
            preexec_fn=lambda: fcntl.ioctl(its, termios.TIOCSCTTY, 0),
            start_new_session=True,
        )
        os.close(its)
        self.fd = ours

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)

    def until(self, words: str, seconds: float = 120) -> str:
        """What it shows until some words come, without colours."""
        deadline, seen = time.monotonic() + seconds, ""
        while not re.search(words, seen):
            assert time.monotonic() < deadline, seen
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    seen += re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", os.read(self.fd, 65536).decode(errors="replace"))
                except OSError:  # it has ended
                    pytest.fail(seen)
        return seen

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


def test_at_a_terminal(run: Path, tmp_path: Path) -> None:
    """Two columns, Ctrl-C in the middle of an answer, a command, Ctrl-D."""
    with Terminal(120, tmp_path, str(run), "generation.max_new_tokens=1500") as there:
        there.until(r"/help lists the commands\s+> ")
        there.type("Hello\n")
        there.until(r"policy +reference")
        there.type("\x03")
        there.until(r"Ctrl-C once more ends, as do Ctrl-D and /exit\s+> ")
        there.type("/save\n")
        there.until(r"there is no pair yet; say something first\s+> ")
        there.type("\x04")
        assert there.process.wait(60) == 0


def test_in_a_pipe(run: Path, tmp_path: Path) -> None:
    lines = "Hello\n/save\n/reset\n/seed 7\nHello\n/save\n/reset\n/seed 42\nHello\n/save\n"
    command = [sys.executable, "-m", "xpo.chat", str(run)]
    done = subprocess.run(command, cwd=tmp_path, input=lines, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(f"(?m)^{VERDICT}", done.stdout)) == 3
    one, other, again = load_pairs(str(tmp_path / "chat.jsonl"))
    assert one == again
    assert (one.first, one.second) != (other.first, other.second)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """main() with these arguments, in an empty directory; its exit status."""

    def call(*arguments: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["xpo.chat", *arguments])
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return call


def test_prompts_of_the_command_line_are_one_conversation(run: Path, call, tmp_path: Path, capsys) -> None:
    prompts = ["--prompt", "Hello", "--prompt", "And you?", "--prompt", "/save"]
    assert call(*prompts, str(run), "generation.temperature=0", "--save", "mine.jsonl") == 0
    assert len(re.findall(f"(?m)^{VERDICT}", capsys.readouterr().out)) == 2
    (row,) = map(json.loads, (tmp_path / "mine.jsonl").read_text().splitlines())
    assert [message["content"] for message in row["prompt"]][::2] == ["Hello", "And you?"]


def test_the_policy_alone_is_not_judged(run: Path, call, capsys) -> None:
    assert call(str(run), "--no-reference", "--prompt", "Hello") == 0
    assert not re.search(f"{VERDICT}|reference", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--no-reference", "--judge", "lexicon"], "--judge=lexicon has nothing to compare"),
        (["RUN", "generation.temprature=1"], "unknown config key 'generation.temprature'; did you mean"),
        (["RUN", "--judge", "lexikon"], "judge=lexikon does not exist; did you mean 'lexicon'?"),
        (["RUN", "generation.temperature=hot"], "generation.temperature"),
        (["RUN", "Hello"], "'Hello' is no key with a value"),
        (["no/such/model"], "RUN_OR_MODEL='no/such/model' is neither a directory nor a hub name"),
        (["."], "RUN_OR_MODEL='.' cannot be loaded"),
        (["RUN", "--prompt", "/sead 3"], "/sead is no command; did you mean '/seed'?"),
        (["embedded:tiny", "--judge", "lexicon"], "--judge=lexicon has nothing to compare; give a reference"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(run: Path, call, capsys, arguments: list[str], message: str) -> None:
    assert call(*[str(run) if word == "RUN" else word for word in arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("xpo: error: ")
    assert message in stderr
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "stderr"),
    [
        (JudgeStopped("judge.max_requests=1 is used up"), 1, "xpo: error: judge.max_requests=1 is used up\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["judge", "Ctrl-C"],
)
def test_a_script_ends_with_its_judge_and_at_ctrl_c(
    run: Path, call, monkeypatch: pytest.MonkeyPatch, capsys, error: BaseException, status: int, stderr: str
) -> None:
    def judge(this: Conversation, turn: Turn) -> None:
        raise error

    monkeypatch.setattr(Conversation, "judge", judge)
    assert call(str(run), "--prompt", "Hello", "--prompt", "And you?") == status
    captured = capsys.readouterr()
    assert captured.err == stderr
    assert "And you?" not in captured.out


def test_ctrl_c_is_not_lost(run: Path, call, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Its exception is, if it meets a finalizer; the next words stop the answer then."""

    def answer(this: Conversation, message: str, say: Say) -> Turn:
        say("policy", "One ")
        with suppress(KeyboardInterrupt):  # as a finalizer does
            signal.raise_signal(signal.SIGINT)
        say("policy", "two")
        raise AssertionError("it goes on")

    monkeypatch.setattr(Conversation, "answer", answer)
    before = signal.getsignal(signal.SIGINT)
    assert call(str(run), "--prompt", "Hello") == 130
    assert re.findall("One|two", capsys.readouterr().out) == ["One"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_wrong_name_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    code = (
        "import sys, xpo.chat; sys.argv = ['xpo.chat', '.']\n"
        "try: xpo.chat.main()\n"
        "except SystemExit as error: print(error.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_input_that_is_no_text_is_taken(run: Path, call, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A pipe may hold anything; a replacement character stands for what is no UTF-8."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert call(str(run)) == 0
    assert "> caf�\n" in capsys.readouterr().out
