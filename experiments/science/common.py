"""What the experiments share: methods, noise of a seed, results that can be resumed, intervals, tables and plots."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor

from xpo.config.files import write_whole
from xpo.config.options import LossOptions
from xpo.evaluation.agreement import share
from xpo.objectives.bonuses import PUBLISHED_ON

TUNING, REPORTED = range(12), range(100, 140)  # seeds: weights are chosen on the former
CONTROL = "control "  # before the name of a task: its control, in which there is nothing to find
PER_TOKEN = " per token"  # behind the name of a bonus: of pi(y)^(1/|y|) instead of pi(y)
_DRAWS = 2000
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


class Method(NamedTuple):
    """A bonus, who draws the second completion ("policy", "reference" or "uniform"), and the weight."""

    bonus: str
    second: str
    alpha: float = 0.0

    @property
    def on(self) -> str:
        """The completion that the bonus is on: its paper's."""
        return PUBLISHED_ON[self.bonus.removesuffix(PER_TOKEN)]

    @property
    def name(self) -> str:
        known = {"policy": "online DPO", "reference": "alpha = 0", "uniform": "alpha = 0, uniform second"}
        return known[self.second] if self.bonus == "none" else self.bonus + (", flipped sign" if self.alpha < 0 else "")

    def options(self) -> LossOptions:
        return LossOptions(bonus=self.bonus.removesuffix(PER_TOKEN), bonus_per_token=self.bonus.endswith(PER_TOKEN))


class Outcome(NamedTuple):
    """Of one problem: queries until it was solved, None if never (censored at the end); gaps to the optimum.

    `bonus_share`, where it was measured: the bonus's pull at log pi over the preference loss's, the mean of its logs.
    """

    queries: int | None
    final_gap: float
    average_gap: float
    bonus_share: float | None = None


class Row(NamedTuple):
    """An outcome and what it is of, as in the CSV."""

    task: str
    method: Method
    problem: str  # "100", or "100/1": the seed, and the context if there are several
    outcome: Outcome


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers in [0, 1): the same for a seed whatever others it is run with, and for all methods."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


Run = Callable[[str, Method, Sequence[int]], dict[str, Outcome]]  # task, method, seeds: the outcomes by problem


class Results:
    """`results.csv` of an experiment: what is there is not computed again; a cell is written as a whole.

    It does not know settings: move it away when those of an experiment change.
    """

    HEADER = (
        "task",
        "bonus",
        "second",
        "alpha",
        "problem",
        "queries",
        "final_gap",
        "average_gap",
        "bonus_share",
        "cell_ends",
    )

    def __init__(self, path: Path, reported: Sequence[int] = REPORTED):
        self.path, self.reported = path, reported
        lines = path.read_text().splitlines() if path.exists() else []
        whole = max((i for i, line in enumerate(lines) if line.endswith(",end")), default=-1) + 1
        self._lines = lines[:whole]  # a copy may have been cut short
        self.rows = [read_row(fields) for fields in csv.DictReader(self._lines)]

    def of(self, task: str, method: Method, seeds: Sequence[int] | None = None) -> list[Row]:
        names = {str(seed) for seed in (self.reported if seeds is None else seeds)}
        return [
            row for row in self.rows if (row.task, row.method) == (task, method) and row.problem.split("/")[0] in names
        ]

    def has(self, task: str, method: Method, seeds: Sequence[int]) -> bool:
        """Whether a cell is there. ValueError if a part of it is: other seeds were asked for then."""
        there = {row.problem.split("/")[0] for row in self.of(task, method, seeds)}
        if there and len(there) < len(seeds):
            raise ValueError(f"{self.path} has {len(there)} of {len(seeds)} seeds of {task}, {method}; move it away")
        return bool(there)

    def cell(self, run: Run, task: str, method: Method, seeds: Sequence[int]) -> list[Row]:
        """Computes a cell, unless it is there."""
        if not self.has(task, method, seeds):
            self.add(task, method, run(task, method, seeds))
        return self.of(task, method, seeds)

    def add(self, task: str, method: Method, found: dict[str, Outcome]) -> None:
        """Writes a cell."""
        lines: list[tuple[str, ...]] = [] if self.rows else [self.HEADER]
        for problem, outcome in found.items():
            values = ["" if value is None else f"{value:.6g}" for value in outcome]
            lines.append((task, *method[:2], f"{method.alpha:g}", problem, *values, ""))
        lines[-1] = (*lines[-1][:-1], "end")
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows(lines)
        self._lines += written.getvalue().splitlines()
        write_whole(self.path, "\n".join([*self._lines, ""]))
        print(task, *method, f"{len(found)} problems", flush=True)
        self.rows += [read_row(dict(zip(self.HEADER, map(str, line), strict=True))) for line in lines[-len(found) :]]

    def tuned(self, task: str, bonus: str, second: str) -> Method:
        """The weight that did best on the tuning seeds: solved most; then by mean queries of those, then by the gap."""
        tried = {row.method for row in self.rows if row.task == task and row.method[:2] == (bonus, second)}

        def badness(method: Method) -> tuple[float, float, float, float]:
            rows = self.of(task, method, TUNING)
            solved = [row.outcome.queries for row in rows if row.outcome.queries is not None]
            gap = float(np.mean([row.outcome.final_gap for row in rows]))
            return len(rows) - len(solved), float(np.mean(solved)) if solved else 0.0, gap, method.alpha

        return min((method for method in tried if self.of(task, method, TUNING)), key=badness)


def read_row(fields: dict[str, str]) -> Row:
    method = Method(fields["bonus"], fields["second"], float(fields["alpha"]))
    outcome = Outcome(
        int(fields["queries"]) if fields["queries"] else None,
        float(fields["final_gap"]),
        float(fields["average_gap"]),
        float(fields["bonus_share"]) if fields["bonus_share"] else None,
    )
    return Row(fields["task"], method, fields["problem"], outcome)


BASELINES = (Method("none", "policy"), Method("none", "reference"), Method("none", "uniform"))
SAMPLERS = ("reference", "policy")


def run_all(results: Results, run: Run, task: str, grid: dict[str, Sequence[float]], flipped: float) -> list[Method]:
    """All cells of a task and its control: baselines, each bonus tuned, XPO at all weights and with its sign flipped.

    Returns:
        The methods that are reported, each once.
    """
    for bonus, second in product(grid, SAMPLERS):
        for alpha in grid[bonus]:
            results.cell(run, task, Method(bonus, second, alpha), TUNING)
    tuned = [results.tuned(task, bonus, second) for bonus, second in product(grid, SAMPLERS)]
    curve = [Method("xpo", "reference", alpha) for alpha in (*grid["xpo"], -flipped)]
    methods = list(dict.fromkeys([*BASELINES, *tuned, *curve]))
    for method in methods:
        for name in (task, CONTROL + task):
            results.cell(run, name, method, results.reported)
    return methods


# ---- statistics ------------------------------------------------------------------------------------


def interval(values: Sequence[float], statistic: Callable[..., np.ndarray]) -> tuple[float, float, float]:
    """A statistic of problems with its 95 % percentile bootstrap interval."""
    array = np.asarray(values, dtype=float)
    index = resamples(len(array))
    drawn = np.sort(statistic(array[index], axis=1))
    low, high = drawn[int(0.025 * _DRAWS)], drawn[int(0.975 * _DRAWS) - 1]  # infinite ones cannot be interpolated
    return float(statistic(array, axis=0)), float(low), float(high)


@cache
def resamples(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(n, size=(_DRAWS, n))


def lower_median(values: np.ndarray, axis: int) -> np.ndarray:
    """The median; of an even number, the lower of the two in the middle. All problems are censored at the same time, so
    that Kaplan and Meier's median is the median with the unsolved ones at infinity."""
    return np.take(np.sort(values, axis=axis), (values.shape[axis] - 1) // 2, axis=axis)


def times(rows: Sequence[Row]) -> list[float]:
    return [math.inf if row.outcome.queries is None else row.outcome.queries for row in rows]


def sign_test(rows: Sequence[Row], other: Sequence[Row]) -> float:
    """Exact p (two sides) that both are equally fast, of the same problems: the sign test on who solved each first."""
    theirs = {row.problem: queries for row, queries in zip(other, times(other), strict=True)}
    pairs = [(queries, theirs[row.problem]) for row, queries in zip(rows, times(rows), strict=True)]
    faster, slower = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return float(binomtest(faster, faster + slower).pvalue) if faster + slower else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979)."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, p[i] * (len(p) - rank)))
        corrected[i] = highest
    return corrected


# ---- tables and plots ------------------------------------------------------------------------------


def number(value: float, digits: int = 2) -> str:
    return "never" if math.isinf(value) else f"{value:.{digits}f}"


def estimate(found: tuple[float, float, float], digits: int) -> str:
    return f"{number(found[0], digits)} ({number(found[1], digits)} to {number(found[2], digits)})"


COLUMNS = ("solved", "median queries", "final gap", "average gap on the control", "p")


def summary(rows: Sequence[Row], control: Sequence[Row]) -> list[str]:
    """The columns but p."""
    solved = share(torch.tensor([row.outcome.queries is not None for row in rows]))
    gaps = [[row.outcome.final_gap for row in rows], [row.outcome.average_gap for row in control]]
    median = interval(times(rows), lower_median)
    means = [estimate(interval(values, np.mean), 3) if values else "" for values in gaps]
    return [estimate((solved.value, solved.low, solved.high), 2), estimate(median, 0), *means]


def table(results: Results, task: str, methods: Sequence[Method]) -> str:
    """Markdown, a row for each method. p: faster or slower without its bonus, Holm's correction over the table.

    That is online DPO where the policy draws both completions, else alpha = 0, with which online DPO is compared, too.
    """
    others = [method for method in methods if method != BASELINES[1]]
    without = {method: BASELINES[method.second != "policy" or method.bonus == "none"] for method in others}
    tests = [sign_test(results.of(task, method), results.of(task, without[method])) for method in others]
    corrected = dict(zip(others, holm(tests), strict=True))
    best = tuned_methods(results, task)
    lines = [f"| method | second | alpha | {' | '.join(COLUMNS)} |", "|---|---|---:|" + "---|" * len(COLUMNS)]
    for method in methods:
        p = f"{corrected[method]:.2g}" if method in corrected else ""
        tuned = " (tuned)" if method in best else ""
        cells = summary(results.of(task, method), results.of(CONTROL + task, method))
        lines.append(f"| {' | '.join([method.name, method.second, f'{method.alpha:g}{tuned}', *cells, p])} |")
    return "\n".join(lines)


def tuned_methods(results: Results, task: str) -> list[Method]:
    kinds = dict.fromkeys(row.method[:2] for row in results.rows if row.task == task and row.method.bonus != "none")
    return [results.tuned(task, bonus, second) for bonus, second in kinds]


def write_block(readme: Path, text: str) -> None:
    """Replaces what stands between the marks in a README, so that its numbers are those of the CSV."""
    marks = "<!-- results -->", "<!-- end of results -->"
    before, rest = readme.read_text().split(marks[0])
    readme.write_text(f"{before}{marks[0]}\n{text.strip()}\n{marks[1]}{rest.split(marks[1])[1]}")


def plot_gaps(results: Results, task: str, beta: float, path: Path) -> None:
    """XPO over its weights, and all tuned methods: final gap on the task, average gap on the control."""

    def final(method: Method) -> list[float]:
        return [row.outcome.final_gap for row in results.of(task, method)]

    def control(method: Method) -> list[float]:
        return [row.outcome.average_gap for row in results.of(CONTROL + task, method)]

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    methods = {row.method for row in results.rows if row.method[:2] == ("xpo", "reference")}
    curve = sorted(methods, key=lambda method: method.alpha)
    curve = [method for method in curve if method.alpha > 0 and results.of(task, method)]
    for name, colour, rows_of in (
        ("task, final gap", COLOURS[0], final),
        (
            "control, average gap",
            COLOURS[3],
            control,
        ),
    ):
        bars(left, [m.alpha / beta for m in curve], [interval(rows_of(m), np.mean) for m in curve], colour, name)
    for method, style in zip(BASELINES, ("--", "-", ":"), strict=True):
        value = np.mean([row.outcome.final_gap for row in results.of(task, method)])
        left.axhline(value, color="#555555", linestyle=style, linewidth=1, label=f"{method.name}, task")
    left.set(xscale="log", xlabel="XPO's kappa = alpha / beta", ylabel="gap to the optimum")
    left.set_ylim(0, 1.25 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    compared = [*BASELINES, *tuned_methods(results, task)]
    for offset, colour, name, rows_of in (
        (0.12, COLOURS[0], "task, final gap", final),
        (
            -0.12,
            COLOURS[3],
            "control, average gap",
            control,
        ),
    ):
        found = [interval(rows_of(m), np.mean) for m in compared]
        places = [len(compared) - k + offset for k in range(len(compared))]
        values = [value for value, _, _ in found]
        ends = np.array([[v - low, high - v] for v, low, high in found]).T
        right.errorbar(values, places, xerr=ends, fmt="o", color=colour, capsize=2, markersize=4, label=name)

    def label(method: Method) -> str:
        return method.name if method in BASELINES else f"{method.name}, second by {method.second}"

    right.set_yticks([len(compared) - k for k in range(len(compared))], [label(m) for m in compared])
    right.tick_params(labelsize=8)
    right.set(xlabel="gap to the optimum; tuned weights, 95 % intervals", xlim=(0, None))
    right.legend(fontsize=7, frameon=False)
    save(figure, path)


def plot_shares(results: Results, kinds: Sequence[tuple[str, str]], tasks: Sequence[str], path: Path) -> None:
    """The share of seeds solved at tuned weights: a row for each bonus and sampler, a column for each task."""
    shares = np.full((len(kinds), len(tasks)), np.nan)
    for column, task in enumerate(tasks):
        for method in (*BASELINES, *tuned_methods(results, task)):
            if rows := results.of(task, method):
                solved = [row.outcome.queries is not None for row in rows]
                shares[kinds.index(method[:2]), column] = np.mean(solved)
    figure = Figure(figsize=(2.6 + 1.1 * len(tasks), 1 + 0.3 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(shares):
        colour = "white" if value < 0.6 else "black"
        axes.text(column, row, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", color=colour)
    names = [Method(*kind).name + (f", second by {kind[1]}" if kind[0] != "none" else "") for kind in kinds]
    axes.set_yticks(range(len(kinds)), names, fontsize=8)
    axes.set_xticks(range(len(tasks)), [task.replace(", ", "\n") for task in tasks], fontsize=8)
    axes.set_title("share of seeds solved", fontsize=9)
    save(figure, path)


def bars(axes: Axes, x: Sequence[float], found: Sequence[tuple[float, float, float]], colour: str, name: str) -> None:
    """A curve with its intervals."""
    values = [value for value, _, _ in found]
    ends = np.array([[value - low, high - value] for value, low, high in found]).T
    axes.errorbar(x, values, yerr=ends, marker="o", color=colour, capsize=3, markersize=4, label=name)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, metadata={"Software": None})  # bytes that depend on the numbers only
