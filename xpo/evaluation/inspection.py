"""What a judge is worth: its verdicts on given pairs, the figures that they make, and how these look."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from xpo.config.errors import JudgeStopped
from xpo.config.files import without_nan
from xpo.data.pairs import Pair
from xpo.evaluation.agreement import accuracy, agreement, calibration, share
from xpo.judges.base import Judge

_CHUNK = 256  # pairs between two movements of the progress bar


class Judged(NamedTuple):
    """The verdicts of one judge on N pairs, NaN where it was not asked any more."""

    name: str
    margin: Tensor  # see `Judge.margins`, (N,)
    flipped: Tensor  # see `Verdicts`; from asking with the completions swapped if the judge looks at one order, (N,)
    seconds: float  # for each pair, swapped questions left out
    asked: int  # how many pairs, the first ones
    stopped: str | None  # why the judge could not go on, if so


def ask(judge: Judge, pairs: list[Pair], name: str, swap: bool) -> Judged:
    """All verdicts of a judge; what it said before it could not go on is kept.

    `swap` says that a judge which does not look at both orders is asked with the completions swapped, too.
    """
    margin, flipped = torch.full((2, len(pairs)), torch.nan)
    seconds, done, stopped = 0.0, 0, None
    with tqdm(total=len(pairs), desc=name, leave=False) as bar:
        for start in range(0, len(pairs), _CHUNK):
            here = slice(start, start + _CHUNK)
            prompts, first, second, _ = map(list, zip(*pairs[here], strict=True))
            started = time.perf_counter()
            try:
                one, flips = judge.verdicts(prompts, first, second)[:2]
                seconds, done = seconds + time.perf_counter() - started, done + len(prompts)
                margin[here] = one
                if swap and flips.isnan().all():  # does its verdict turn?
                    other = judge.verdicts(prompts, second, first).margin
                    known = one.isfinite() & other.isfinite()
                    flips = torch.where(known, (one.sign() != -other.sign()).float(), torch.nan)
            except JudgeStopped as error:
                stopped = str(error)
                break
            flipped[here] = flips
            bar.update(len(prompts))
    return Judged(name, margin, flipped, seconds / max(done, 1), done, stopped)


def report(pairs: list[Pair], judged: dict[str, Judged]) -> dict[str, Any]:
    """The figures of each judge by its key, and of their agreement, as JSON."""
    winner = torch.tensor([pair.winner for pair in pairs])
    figures: dict[str, Any] = {}
    for key, (name, margins, flips, seconds, asked, _) in judged.items():
        margin, flipped = margins[:asked], flips[:asked]
        valid = margin.isfinite()
        fit = calibration(margin, winner[:asked])
        figures[key] = {
            "judge": name,
            "pairs": asked,
            "accuracy": accuracy(margin, winner[:asked])._asdict(),
            "ties": share(margin[valid] == 0)._asdict(),
            "invalid": share(~valid)._asdict(),
            "flips": share(flipped[~flipped.isnan()] > 0)._asdict(),
            "first_wins": share(margin[valid & (margin != 0)] > 0)._asdict(),
            "calibration_error": fit.error,
            "best_temperature": fit.temperature,
            "calibration": [b._asdict() for b in fit.bins],
            "seconds_per_pair": seconds,
        }
    if len(judged) == 2:
        same, kappa, table = agreement(*(judge.margin for judge in judged.values()))
        figures["agreement"] = {"same": same._asdict(), "kappa": kappa, "table": table}
    return figures


def write(out: Path, pairs: list[Pair], judged: dict[str, Judged], figures: dict[str, Any]) -> None:
    """verdicts.jsonl, report.json and, where the truth is known, calibration.png."""
    with (out / "verdicts.jsonl").open("w") as file:
        for i, pair in enumerate(pairs):
            verdicts = {key: judge.margin[i].item() for key, judge in judged.items()}
            flips = {f"{key}_flipped": judge.flipped[i].item() for key, judge in judged.items()}
            file.write(json.dumps(pair._asdict() | without_nan(verdicts | flips)) + "\n")
    (out / "report.json").write_text(json.dumps(without_nan(figures), indent=1))
    if any(figures[key]["calibration"] for key in judged):
        plot({judge.name: figures[key]["calibration"] for key, judge in judged.items()}, out / "calibration.png")


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """How often the winner was right, against the probability that the judge gave it; dots grow with the count."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", label="calibrated")
    for name, bins in curves.items():
        total = max(sum(b["pairs"] for b in bins), 1)
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        (line,) = axes.plot(x, y, label=name)
        axes.scatter(x, y, s=[10 + 300 * b["pairs"] / total for b in bins], color=line.get_color(), alpha=0.6)
    axes.set(xlabel="probability given to the winner", ylabel="how often it was right")
    axes.set(xlim=(0.49, 1.01), ylim=(0, 1.02))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def show(judged: dict[str, Judged], figures: dict[str, Any], out: Path) -> None:
    """The figures on the terminal."""
    console = Console()
    asked = " and ".join(dict.fromkeys(str(judge.asked) for judge in judged.values()))
    table = Table(title=f"{asked} pairs, 95 % intervals", title_justify="left")
    table.add_column("")
    for judge in judged.values():
        table.add_column(judge.name, justify="right")
    titles = {"accuracy": "right, of decided pairs", "flips": "flips between orders", "first_wins": "first one wins"}
    for figure in ("accuracy", "ties", "invalid", "flips", "first_wins"):
        table.add_row(titles.get(figure, figure), *(_share(**figures[key][figure]) for key in judged))
    table.add_row("calibration error", *(f"{figures[key]['calibration_error']:.3f}" for key in judged))
    table.add_row("best label_temperature", *(f"{figures[key]['best_temperature']:.3g}" for key in judged))
    table.add_row("ms a pair", *(f"{1000 * figures[key]['seconds_per_pair']:.3g}" for key in judged))
    console.print(table)
    for key, judge in judged.items():
        if bins := figures[key]["calibration"]:
            table = Table(title=f"Calibration of {judge.name}", title_justify="left")
            for title in ("probability given", "pairs", "was right", ""):
                table.add_column(title, justify="left" if title == "" else "right")
            for b in bins:
                right, bar = f"{100 * b['accuracy']:.1f} %", "█" * round(20 * b["accuracy"])
                table.add_row(f"{b['low']:.2f} to {b['high']:.2f}", f"{b['pairs']:.0f}", right, bar)
            console.print(table)
    if "agreement" in figures:
        same, kappa = _share(**figures["agreement"]["same"]), figures["agreement"]["kappa"]
        console.print(f"The two agree on {same} of the pairs that both could judge; Cohen's kappa {kappa:.3f}")
    print(f"Verdicts, figures and plot: {out}")


def _share(value: float, cases: int, low: float, high: float) -> str:
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})" if cases else "-"
