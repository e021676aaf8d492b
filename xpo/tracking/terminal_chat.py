"""What a conversation shows on the terminal."""

import math
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from xpo.config.errors import printable

_TWO_COLUMNS = 100  # characters of a line, from which on two answers have room beside each other
_STYLES = {"policy": "bold green", "reference": "bold yellow", "judge": "bold"}
_WORDS = {"first": "policy wins", "second": "reference wins", "tie": "tie", None: "no verdict"}


class Answers:
    """The answers of one message as they come: in two columns, or on a narrow terminal one under the other.

    Used as a context manager, at whose end they stay on the screen.

    Args:
        console: where.
        names: who will speak, in this order.
    """

    def __init__(self, console: Console, names: list[str]):
        self.console = console
        self.texts = dict.fromkeys(names, "")
        self.speaking: str | None = None
        wide = console.is_terminal and not console.is_dumb_terminal and console.width >= _TWO_COLUMNS
        self.live = Live(console=console, auto_refresh=False, transient=True) if wide and len(names) == 2 else None

    def __enter__(self) -> "Answers":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.console.print(self.columns(None))
        elif self.speaking is not None:
            self.console.print()

    def say(self, name: str, text: str) -> None:
        """The next words of somebody."""
        text = printable(text)
        if not self.texts[name]:
            text = text.lstrip()
        self.texts[name] += text
        if self.live is not None:
            self.live.update(self.columns(self.console.height - 4), refresh=True)
            return
        if name != self.speaking:
            if self.speaking is not None:
                self.console.print()
            self.speaking = name
            if len(self.texts) > 1:
                self.console.print(Text(name, _STYLES[name]))
        self.console.out(text, end="", highlight=False)

    def columns(self, height: int | None) -> Table:
        """All answers; of longer ones than `height` lines their ends."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        width = self.console.width // 2 - 5  # with room behind for the ^C that a terminal shows
        cells = []
        for name, text in self.texts.items():
            table.add_column(Text(name, _STYLES[name]), width=width)
            lines = Text(text).wrap(self.console, width)
            cells.append(Text("\n").join(lines if height is None else lines[-height:]))
        table.add_row(*cells)
        return table


def show_verdict(console: Console, judge: str, winner: str | None, margin: float, scores: list[float] | None) -> None:
    """Who wins, and by how much: the probability that the judge gives the winner, the margin, the scores."""
    how = ""
    if winner is not None:
        sure = 100 / (1 + math.exp(-min(abs(margin), 700)))
        how = f"margin {margin:+.2f}" if winner == "tie" else f"{sure:.0f} % sure, margin {margin:+.2f}"
    both = [f"scores {' and '.join(f'{score:.2f}' for score in scores)}"] if scores is not None else []
    inside = ", ".join([*([how] if how else []), *both])
    text = Text.assemble((judge, _STYLES["judge"]), ": ", _WORDS[winner], f" ({inside})" if inside else "")
    console.print(text, soft_wrap=not console.is_terminal)


def show_help(console: Console, commands: Mapping[str, str]) -> None:
    """What each command does."""
    table = Table.grid(padding=(0, 2))
    for usage, meaning in commands.items():
        table.add_row(Text(usage, "bold"), meaning)
    console.print(table)


def show_speakers(console: Console, speakers: Mapping[str, str], settings: str) -> None:
    """Before the first message: who is who, and how answers are drawn."""
    for role, name in speakers.items():
        console.print(Text.assemble((f"{role:<11}", _STYLES[role]), printable(name)), soft_wrap=True)
    console.print(Text(settings, "dim"), soft_wrap=True)
