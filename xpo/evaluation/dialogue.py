"""A conversation line by line: messages and commands, from a terminal or a script."""

import contextlib
import json
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from xpo.config.errors import ConfigError, JudgeStopped, nearest, printable
from xpo.evaluation.conversation import Conversation, Turn, Verdict
from xpo.tracking.terminal_chat import Answers, show_help, show_speakers, show_verdict

HELP = {
    "/reset": "begin anew: forget all messages but the system's",
    "/system [TEXT]": "the message before all others; without TEXT there is none",
    "/seed N": "of the noise: after /reset the same words get the same answers from the same seed",
    "/temperature T": "0 takes the likeliest token",
    "/save [FILE]": "append the last pair and its verdict, for python -m xpo.judges pairs=FILE",
    "/help": "these lines",
    "/exit": "as Ctrl-D, or Ctrl-C twice; once it stops an answer",
}
_COMMANDS = [usage.split()[0] for usage in HELP]


class Dialogue:
    """Takes lines and shows what comes of them.

    Args:
        conversation: of the models.
        speakers: what "policy", "reference" and "judge" are called, as far as they take part.
        console: where to show it.
        save_to: the file of /save without a name.
    """

    def __init__(self, conversation: Conversation, speakers: Mapping[str, str], console: Console, save_to: Path):
        self.conversation = conversation
        self.speakers = speakers
        self.console = console
        self.save_to = save_to
        self.last: tuple[Turn, Verdict | None] | None = None

    def at_terminal(self) -> None:
        """Asks for lines until the end; says what is wrong with one, and goes on."""
        with contextlib.suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401  # gives input() a history and keys to edit with
        options = self.conversation.options
        drawn = f"seed {self.conversation.seed}, temperature {options.temperature:g}, {options.max_new_tokens} tokens"
        plain = ". Plain text: each message is a prompt of its own" if self.conversation.plain else ""
        show_speakers(self.console, self.speakers, f"{drawn}{plain}. /help lists the commands")
        stopped = False  # by Ctrl-C, and nothing has been typed since
        while True:
            try:
                line = input("\n> ")
                stopped = False
                if not self.take(line):
                    return
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print()
                if stopped:
                    return
                stopped = True
                self.console.print(Text("Ctrl-C once more ends, as do Ctrl-D and /exit", "dim"))
            except (ConfigError, JudgeStopped) as error:
                self.console.print(Text(printable(error), "red"), soft_wrap=True)

    def from_script(self, lines: Iterable[str]) -> None:
        """Takes lines, which are shown before what comes of them. ConfigError for one that is wrong."""
        for line in lines:
            if line.strip() and not line.startswith("/"):
                self.console.print(Text(f"> {printable(line).strip()}"), soft_wrap=True)
            if not self.take(line):
                return

    def take(self, line: str) -> bool:
        """A message, or a command; False for the end. ConfigError for a wrong one, JudgeStopped for its judge."""
        words = line.strip()
        if words.startswith("/"):
            command, _, value = words.partition(" ")
            return self._command(command, value.strip())
        if words:
            self._message(words)
        return True

    def _message(self, message: str) -> None:
        self.last = None
        with _CtrlC() as ctrl_c, Answers(self.console, list(self.conversation.models)) as answers:

            def say(name: str, words: str) -> None:
                ctrl_c.check()
                answers.say(name, words)

            turn = self.conversation.answer(message, say)
            ctrl_c.check()
        self.last = turn, None
        verdict = self.conversation.judge(turn)
        self.last = turn, verdict
        if verdict is not None:
            show_verdict(self.console, self.speakers["judge"], *verdict)

    def _command(self, command: str, value: str) -> bool:
        conversation = self.conversation
        match command:
            case "/reset":
                conversation.reset()
            case "/system":
                conversation.set_system(value)
            case "/seed":
                if not value.isdecimal():
                    raise ConfigError(f"/seed {value}: give a whole number from 0 on")
                conversation.seed = int(value)
            case "/temperature":
                try:
                    conversation.set_temperature(float(value))
                except ValueError as error:  # ConfigError is one
                    raise ConfigError(f"/temperature {value}: give a number from 0 on") from error
            case "/save":
                self._save(Path(value).expanduser() if value else self.save_to)
            case "/help":
                show_help(self.console, HELP)
            case "/exit":
                return False
            case _:
                raise ConfigError(f"{command} is no command{nearest(command, _COMMANDS)}; /help lists them")
        return True

    def _save(self, file: Path) -> None:
        if self.last is None:
            raise ConfigError("/save: there is no pair yet; say something first")
        row = self.conversation.row(*self.last)
        try:
            with file.open("a", encoding="utf-8") as kept:
                kept.write(json.dumps(row) + "\n")
        except OSError as error:
            raise ConfigError(f"/save {file}: it cannot be written ({error.strerror}); name another file") from error
        self.console.print(f"{printable(file)} has the pair", highlight=False, markup=False, soft_wrap=True)


class _CtrlC:
    """Remembers that Ctrl-C was pressed: where it meets a finalizer, Python prints its exception and goes on."""

    def __enter__(self) -> "_CtrlC":
        self.pressed = False
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> NoReturn:
        self.pressed = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """KeyboardInterrupt if it was pressed."""
        if self.pressed:
            raise KeyboardInterrupt
