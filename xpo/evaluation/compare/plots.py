"""The plots of a sweep. Colours are Okabe and Ito's, told apart by colour-blind readers; levels are equally spaced."""

import math
import textwrap
from collections.abc import Sequence
from itertools import combinations, cycle
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from xpo.evaluation.compare.statistics import (
    QUERIES,
    Array,
    Comparison,
    Estimate,
    Point,
    cell_means,
    is_balanced,
    label,
    levels,
    main_effect,
    queries_at,
    rank,
    runs_at,
)

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_STYLES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MOST_CURVES = 8
_CURVES = (
    *("eval/win_rate", "eval/score", "eval/kl", "eval/length", "eval/eos_rate"),
    *("eval/exploration/unique", "eval/exploration/novel_ngrams", "loss"),
)
_COLUMNS = 3  # of panels

TITLES = {
    "eval/win_rate": "win rate",
    "eval/score": "score",
    "eval/kl": "KL (nats)",
    "eval/eos_rate": "EOS rate",
    "eval/length": "length (tokens)",
    "eval/exploration/unique": "unique completions",
    "eval/exploration/novel_ngrams": "novel 4-grams",
    "loss": "training loss",
    "preference/win_rate": "win rate in training",
    QUERIES: "preference queries",
}


def title(metric: str) -> str:
    """What a metric is called."""
    return TITLES.get(metric, metric)


class Plot(NamedTuple):
    """A figure, the name of its file, its heading, and how to read it."""

    name: str
    heading: str
    caption: str
    figure: Figure
    view: str = ""  # what tells it from others with its heading, of which a page shows one at a time


def plots(comparison: Comparison) -> list[Plot]:
    """All plots for which a sweep has the data."""
    points, metric, keys = comparison.points, comparison.metric, comparison.sweep.keys
    drawn = [frontier(points, keys)]
    drawn += [learning_curves(points, keys, metric, queries) for queries in (False, True)]
    if keys:
        drawn.append(main_effects(points, keys, metric))
    drawn += [interaction(points, first, second, metric) for first, second in combinations(keys, 2)]
    return [plot for plot in drawn if plot is not None]


class Band(NamedTuple):
    """A metric over the steps at which all runs of a point have it: mean, least and greatest of the runs, (T,) each."""

    steps: list[int]
    queries: Array | None  # at these steps, see `queries_at`
    mean: Array
    low: Array
    high: Array


def band(point: Point, metric: str) -> Band:
    """A metric's course at a point; empty if one of its runs does not have it."""
    histories = [dict(run.history.get(metric, [])) for run in point.runs]
    steps = sorted(set.intersection(*(set(history) for history in histories)))
    values = np.array([[history[step] for step in steps] for history in histories])
    return Band(steps, queries_at(point.runs, steps), values.mean(0), values.min(0), values.max(0))


class Looks:
    """Colour by the exploration bonus or else the first key, line style and marker by the others together."""

    def __init__(self, points: Sequence[Point], keys: Sequence[str]):
        self.key = "loss.alpha" if "loss.alpha" in keys else next(iter(keys), None)
        self.rest = [key for key in keys if key != self.key]
        shades = levels(points, self.key) if self.key else ["all runs"]
        self.colours = dict(zip(shades, palette(len(shades)), strict=True))
        in_order = sorted(points, key=lambda point: [rank(point.settings[key]) for key in self.rest])
        others = dict.fromkeys(map(self._other, in_order))
        self.shapes = dict(zip(others, zip(cycle(_STYLES), cycle(_MARKERS)), strict=False))

    def _other(self, point: Point) -> str:
        return ", ".join(_short(label(point.settings[key])) for key in self.rest)

    def of(self, point: Point) -> dict[str, Any]:
        """Colour, line style and marker of a point."""
        style, marker = self.shapes[self._other(point)]
        shade = label(point.settings[self.key]) if self.key else "all runs"
        return {"color": self.colours[shade], "linestyle": style, "marker": marker}

    def width(self) -> float:
        """Inches that the legend takes."""
        names = [self.key, *map(_short, self.colours), *self.rest, *self.shapes] if self.key else []
        return 0.8 + 0.075 * max(map(len, names)) if names else 0

    def legend(self, figure: Figure, markers: bool) -> None:
        """To the right of the plots, with a heading for each kind of look."""
        if not self.key:
            return
        handles = [Line2D([], [], linestyle="none", label=self.key)]
        handles += [Line2D([], [], color=colour, lw=3, label=_short(name)) for name, colour in self.colours.items()]
        if self.rest:
            handles.append(Line2D([], [], linestyle="none", label="\n".join(self.rest)))
            for name, (style, marker) in self.shapes.items():
                shown = marker if markers else None
                handles.append(Line2D([], [], color="0.35", linestyle=style, marker=shown, markersize=5, label=name))
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, handlelength=2.6)


def palette(count: int) -> list[Any]:
    """So many colours: Okabe and Ito's, or shades of viridis where those do not suffice."""
    enough = count <= len(_COLOURS)
    return list(_COLOURS[:count] if enough else matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count)))


def frontier(points: Sequence[Point], keys: Sequence[str]) -> Plot | None:
    """Score and win rate against KL over the evaluations; None without KL."""
    metrics = [metric for metric in ("eval/score", "eval/win_rate") if any(band(p, metric).steps for p in points)]
    if not metrics or not any(band(p, "eval/kl").steps for p in points):
        return None
    looks = Looks(points, keys)
    figure, axes = _panels(len(metrics), looks.width())
    for axis, metric in zip(axes, metrics, strict=True):
        for point in points:
            kl, value, look = band(point, "eval/kl"), band(point, metric), looks.of(point)
            steps, kl_at, value_at = np.intersect1d(kl.steps, value.steps, return_indices=True)
            if not len(steps):
                continue
            x, y = kl.mean[kl_at], value.mean[value_at]
            axis.plot(x, y, color=look["color"], linestyle=look["linestyle"], lw=1.3, alpha=0.75)
            axis.scatter(x[-1], y[-1], color=look["color"], marker=look["marker"], s=55, edgecolor="white", zorder=3)
        _name_axes(axis, "KL to the reference (nats)", metric)
    looks.legend(figure, markers=True)
    caption = (
        "One curve for each setting (mean of its seeds) through the evaluations of training, the marker is the last "
        "one; higher at the same KL is better."
    )
    return Plot("frontier", "Reward against KL", caption, figure)


def curve_metrics(points: Sequence[Point], metric: str) -> list[str]:
    """The metrics whose courses are of interest, `metric` first: those that were measured more than once."""
    wanted = dict.fromkeys([metric, *_CURVES])
    return [name for name in wanted if any(len(band(point, name).steps) > 1 for point in points)]


def learning_curves(points: Sequence[Point], keys: Sequence[str], metric: str, by_queries: bool = False) -> Plot | None:
    """Metrics over the steps, or over the pairs labelled so far; None if none was measured more than once.

    Runs that did not count their pairs have no curve over them; None, too, if none did.
    """
    shown = points[:_MOST_CURVES]
    if by_queries:
        counted = [point for point in shown if all(QUERIES in run.history for run in point.runs)]
        uncounted, shown = len(shown) - len(counted), counted
    metrics = curve_metrics(shown, metric)
    if not metrics:
        return None
    looks = Looks(points, keys)
    figure, axes = _panels(len(metrics), looks.width())
    for axis, name in zip(axes, metrics, strict=True):
        for point in shown:
            course, look = band(point, name), looks.of(point)
            x = course.queries if by_queries and course.queries is not None else course.steps
            axis.plot(x, course.mean, color=look["color"], linestyle=look["linestyle"], lw=1.4)
            if len(point.runs) > 1:
                axis.fill_between(x, course.low, course.high, color=look["color"], alpha=0.15, lw=0)
        _name_axes(axis, title(QUERIES) if by_queries else "step", name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    looks.legend(figure, markers=False)
    which = f"The {_MOST_CURVES} best settings" if len(points) > _MOST_CURVES else "All settings"
    caption = f"{which}; lines are means over seeds, bands reach from the lowest seed to the highest."
    if not by_queries:
        return Plot("learning_curves", "Learning curves", caption, figure, "by step")
    caption += f" To the right go the pairs labelled so far ({QUERIES}): methods may label more or fewer in a step."
    if uncounted:
        caption += f" {uncounted} of the settings did not count them, and are missing here."
    return Plot("learning_curves_queries", "Learning curves", caption, figure, f"by {title(QUERIES)}")


def main_effects(points: Sequence[Point], keys: Sequence[str], metric: str) -> Plot:
    """The mean at each value of each key, with every run as a dot."""
    figure, axes = _panels(len(keys), sharey=True)
    for axis, key in zip(axes, keys, strict=True):
        effect = main_effect(points, key, metric)
        for x, level in enumerate(effect):
            runs = runs_at(points, **{key: level})
            axis.scatter([x + 0.2] * len(runs), [run.final(metric) for run in runs], s=16, color="0.4", alpha=0.5, lw=0)
        _with_intervals(axis, list(effect.values()), _COLOURS[0], 0.0, "o")
        _levels(axis, list(effect), key)
    for axis in axes[::_COLUMNS]:
        axis.set_ylabel(title(metric))
    unbalanced = " Some combinations have fewer runs than others: a difference may be that of another key."
    caption = (
        f"Mean {title(metric)} over all runs with a value, whatever their other settings, with its 95 % interval; "
        f"grey dots are the runs.{'' if is_balanced(points, keys) else unbalanced}"
    )
    return Plot("main_effects", "Effect of each key", caption, figure)


def interaction(points: Sequence[Point], first: str, second: str, metric: str) -> Plot:
    """The mean at each pair of values of two keys, as lines and as a table in colours."""
    cells = cell_means(points, first, second, metric)
    rows, columns = levels(points, first), levels(points, second)
    figure = Figure(figsize=(10.5, 4), layout="constrained", dpi=150)
    lines, heat = figure.subplots(1, 2)
    for i, (row, colour) in enumerate(zip(rows, palette(len(rows)), strict=True)):
        shift = 0.08 * (i - (len(rows) - 1) / 2)
        here = [cells[row, column] for column in columns]
        _with_intervals(lines, here, colour, shift, _MARKERS[i % len(_MARKERS)], textwrap.fill(row, 18))
    _levels(lines, columns, second)
    lines.set_ylabel(title(metric))
    lines.legend(title=first, frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))

    values = np.array([cell.value if cell else math.nan for cell in cells.values()]).reshape(len(rows), -1)
    image = heat.imshow(values, cmap="cividis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (y, x), cell in zip(np.ndindex(values.shape), cells.values(), strict=True):
        text = f"{cell.value:#.3g}" if cell else "–"
        colour = "black" if cell is None or cell.value > middle else "white"
        heat.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
    _levels(heat, columns, second)
    heat.set_yticks(range(len(rows)), [textwrap.fill(row, 18) for row in rows])
    heat.set_ylabel(first)
    figure.colorbar(image, ax=heat, label=title(metric))
    caption = (
        "Parallel lines: each key does the same whatever the other is. Crossing or spreading lines: they interact. "
        "Bars are 95 % intervals."
    )
    file = f"interaction_{first}_{second}".replace("/", "_")
    return Plot(file, f"{first} and {second} together", caption, figure)


def _with_intervals(
    axis: Axes, values: Sequence[Estimate | None], colour: Any, shift: float, marker: str, name: str | None = None
) -> None:
    """Means at 0, 1, ... joined by a line, with bars where there is an interval."""
    x = [x + shift for x, value in enumerate(values) if value is not None]
    known = [value for value in values if value is not None]
    y, reach = [e.value for e in known], [[e.value - e.low for e in known], [e.high - e.value for e in known]]
    axis.plot(x, y, color=colour, marker=marker, lw=1.4, markersize=6, label=name)
    axis.errorbar(x, y, reach, fmt="none", ecolor=colour, capsize=3, lw=1.2)  # none where the interval is NaN


def _levels(axis: Axes, names: Sequence[str], key: str) -> None:
    """Equally spaced ticks, one for each level: null, 0, powers of ten and words look the same."""
    width = 42 // len(names) - 1  # characters that fit
    fits = width > 8 or max(map(len, names)) <= width
    ticks = [textwrap.fill(name, width) if fits else _short(name) for name in names]
    axis.set_xticks(range(len(names)), ticks, rotation=0 if fits else 90)
    axis.set(xlim=(-0.5, len(names) - 0.5), xlabel=key)


def _short(text: str) -> str:
    return text if len(text) <= 22 else f"…{text[-21:]}"


def _name_axes(axis: Axes, x: str, metric: str) -> None:
    """Names both axes; a win rate gets the line of parity."""
    axis.set(xlabel=x, ylabel=title(metric))
    if metric == "eval/win_rate":
        axis.axhline(0.5, color="0.6", lw=0.8, linestyle=":")


def _panels(count: int, aside: float = 0, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """So many axes, in rows of at most _COLUMNS, and room aside, in inches."""
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(3.6 * columns, 4.6) + aside, 3.1 * rows + 0.2), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False).flatten().tolist()
    for axis in grid:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
    for axis in grid[count:]:
        axis.remove()
    return figure, grid[:count]
