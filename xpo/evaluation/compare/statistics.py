"""Statistics of a sweep: means with intervals, effects of the swept keys, and whether the best is the best. Pure.

A point is one setting of the swept keys; its runs differ in their seeds. All runs answer the same held-out prompts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from xpo.config.errors import ConfigError, nearest
from xpo.evaluation.agreement import share
from xpo.evaluation.compare.read import Run, Sweep

WIN_RATE = "eval/win_rate"
QUERIES = "preference/queries"
SEED = "training.seed"
_SHARES = ("_rate", "exploration/unique", "exploration/novel_ngrams")  # ends of the names of metrics within 0 and 1
_DRAWS = 4000

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean over so many runs with its 95 % interval; low and high are NaN where there is none."""

    value: float
    low: float
    high: float
    runs: int
    over: str  # what the interval is about: "seeds", "prompts" (a win rate of one run) or ""


class Point(NamedTuple):
    """One setting of the swept keys, and its runs in order of their seeds."""

    settings: dict[str, Any]
    runs: list[Run]

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={label(value)}" for key, value in self.settings.items()) or "all runs"


class Difference(NamedTuple):
    """How much better one thing is than another, with its 95 % interval."""

    value: float
    low: float
    high: float
    probability: float  # that it is positive: the share of resamples in which it is, ties by half

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


class Verdict(NamedTuple):
    """The point with the highest mean, the next one if any, and what resamples say of the best, if there are any."""

    best: Point
    runner_up: Point | None
    over_runner_up: Difference | None
    over_parity: Difference | None  # the best win rate less 0.5; None for other metrics
    best_share: float  # in which share of resamples the best is the best of all points; else NaN
    seeds: int  # the smallest number of runs at a point
    by_prompt: bool  # whether prompts were resampled, too: the metric is known for each of them


class Comparison(NamedTuple):
    """What there is to say of a sweep: `points` from best to worst by `metric`, `left_out` are the other jobs."""

    sweep: Sweep
    metric: str
    points: list[Point]
    left_out: list[Run]
    verdict: Verdict


def compare(sweep: Sweep, metric: str = WIN_RATE) -> Comparison:
    """Groups the finished runs, ranks the points by the last value of a metric (higher is better), judges the best.

    Raises:
        ConfigError: no finished run, a metric that none has, or runs with different held-out prompts.
    """
    finished = [run for run in sweep.runs if run.state == "finished"]
    if not finished:
        states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in sweep.runs).items())
        raise ConfigError(f"SWEEP={sweep.name!r} has no finished run ({states}); run its command again")
    known = sorted({name for run in finished for name in run.history})
    if metric not in known:
        raise ConfigError(
            f"--metric={metric!r} is in no finished run{nearest(metric, known)}; they have "
            f"{', '.join(name for name in known if name.startswith('eval/')) or 'no evaluation'}"
        )
    runs = [run for run in finished if metric in run.history]
    check_prompts(runs)
    left_out = [run for run in sweep.runs if run.state != "finished"]
    left_out += [Run(run.name, "finished", f"without {metric}") for run in finished if metric not in run.history]
    points = group(runs, sweep.keys)
    points.sort(key=lambda point: -fmean([run.final(metric) for run in point.runs]))
    return Comparison(sweep, metric, points, left_out, judge_best(points, metric))


def check_prompts(runs: Sequence[Run]) -> None:
    """ConfigError unless all runs whose completions are kept were evaluated on the same prompts in the same order."""
    kept = [(run.name, [row["prompt"] for row in run.completions]) for run in runs if run.completions]
    for name, prompts in kept:
        if prompts != kept[0][1]:
            raise ConfigError(
                f"data.eval: {name!r} was evaluated on other prompts than {kept[0][0]!r}, so that they do not "
                "compare; sweep with the same data.eval, data.eval_split and data.eval_limit"
            )


def label(value: Any) -> str:
    """A configuration value as text: null, 1e-05, 0.1."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return "null" if value is None else str(value)


def rank(value: Any) -> tuple[int, float, str]:
    """Sorts values: null, then numbers, then anything else by its text."""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return (0, 0.0, "") if value is None else (2, 0.0, label(value))


def group(runs: Sequence[Run], keys: Sequence[str]) -> list[Point]:
    """One point for each setting of the keys, in order of their values; its runs in order of their seeds."""
    points: dict[tuple[str, ...], Point] = {}
    for run in sorted(runs, key=lambda run: rank(run.config.get(SEED))):
        settings = {key: run.config.get(key) for key in keys}
        points.setdefault(tuple(map(label, settings.values())), Point(settings, [])).runs.append(run)
    return sorted(points.values(), key=lambda point: [rank(value) for value in point.settings.values()])


def estimate(runs: Sequence[Run], metric: str) -> Estimate | None:
    """The mean of the runs' last values of a metric, with Student's t interval over the runs; None if none has it.

    For the win rate of one run, Wilson's interval over the prompts is given, which knows nothing of other seeds.
    """
    having = [run for run in runs if metric in run.history]
    if not having:
        return None
    values = [run.final(metric) for run in having]
    n, value = len(values), fmean(values)
    if n > 1:
        half = student.ppf(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
        low, high = value - half, value + half
        if metric.endswith(_SHARES):  # Student's t does not know that shares end at 0 and 1
            low, high = max(low, 0.0), min(high, 1.0)
        return Estimate(value, low, high, n, "seeds")
    if metric == WIN_RATE and having[0].completions:
        wins = share(torch.tensor([row["verdict"] == "policy" for row in having[0].completions]))
        return Estimate(value, wins.low, wins.high, 1, "prompts")
    return Estimate(value, math.nan, math.nan, 1, "")


def queries_at(runs: Sequence[Run], steps: Sequence[int]) -> Array | None:
    """Pairs labelled up to each of these steps, the mean over runs, (T,); None if one of them did not count them.

    Between two logs, and behind the last one, the pairs are taken to be in proportion to the steps.
    """
    counted = []
    for run in runs:
        if QUERIES not in run.history:
            return None
        logged, pairs = np.array([(0, 0.0), *run.history[QUERIES]]).T
        pace = (pairs[-1] - pairs[-2]) / (logged[-1] - logged[-2])
        counted.append(np.interp(steps, logged, pairs) + pace * np.maximum(np.array(steps) - logged[-1], 0))
    return np.mean(counted, axis=0)


def final_queries(point: Point, metric: str) -> float | None:
    """Pairs labelled before the last value of a metric, the mean over the runs that have it; None if not counted."""
    having = [run for run in point.runs if metric in run.history]
    counted = [queries_at([run], [run.history[metric][-1][0]]) for run in having]
    known = [float(pairs[0]) for pairs in counted if pairs is not None]
    return fmean(known) if known and len(known) == len(having) else None


def levels(points: Sequence[Point], key: str) -> list[str]:
    """The values of a swept key, in their order, as texts."""
    values = {label(point.settings[key]): rank(point.settings[key]) for point in points}
    return sorted(values, key=lambda text: values[text])


def is_balanced(points: Sequence[Point], keys: Sequence[str]) -> bool:
    """Whether all combinations of the keys' values are there, with the same number of runs."""
    full = math.prod(len(levels(points, key)) for key in keys)
    return len(points) == full and len({len(point.runs) for point in points}) == 1


def runs_at(points: Sequence[Point], **wanted: str) -> list[Run]:
    """The runs with these labels at these keys, whatever their other settings are."""
    return [run for p in points if all(label(p.settings[key]) == at for key, at in wanted.items()) for run in p.runs]


def main_effect(points: Sequence[Point], key: str, metric: str) -> dict[str, Estimate | None]:
    """By each value of a key, the mean over all runs that have it."""
    return {level: estimate(runs_at(points, **{key: level}), metric) for level in levels(points, key)}


def cell_means(points: Sequence[Point], first: str, second: str, metric: str) -> dict[tuple[str, str], Estimate | None]:
    """The mean at each pair of values of two keys; None where there is no run. Parallel rows: no interaction."""
    pairs = product(levels(points, first), levels(points, second))
    return {(a, b): estimate(runs_at(points, **{first: a, second: b}), metric) for a, b in pairs}


def by_prompt(run: Run, metric: str) -> Array | None:
    """The value of a metric for each held-out prompt, (P,), NaN where it is missing; None if it is not kept."""
    verdicts = {WIN_RATE: "policy", "eval/lose_rate": "reference"}
    if run.completions and metric in verdicts:
        return np.array([row["verdict"] == verdicts[metric] for row in run.completions], dtype=float)
    if run.completions and metric == "eval/score":
        return np.array([row["score"] for row in run.completions], dtype=float)  # None is NaN
    return None


def resampled_means(values: Sequence[Array], same_seeds: bool) -> Array:
    """Means of points under the paired bootstrap of prompts and seeds, (_DRAWS, points).

    Prompts are resampled for all points together, and seeds too where all points have the same ones, since
    evaluations with one seed share noise and reference. Of n seeds n - 1 are drawn, so that the variance of a
    mean is estimated without bias (Rao and Wu 1988), which matters with few of them; a single seed stays.

    Args:
        values: for each point, a value for each of its runs and each prompt, (S, P); NaN is missing.
        same_seeds: whether the rows of all points belong to the same seeds.
    """
    generator = np.random.default_rng(0)

    def counts(n: int, fewer: int = 0) -> Array:
        return generator.multinomial(max(n - fewer, 1), np.full(n, 1 / n), size=_DRAWS).astype(float)

    prompts = counts(values[0].shape[1])
    shared = counts(len(values[0]), 1) if same_seeds else None
    columns = []
    for point in values:
        known = np.isfinite(point)
        with np.errstate(invalid="ignore"):
            by_run = prompts @ np.where(known, point, 0).T / (prompts @ known.T.astype(float))  # (_DRAWS, S)
        weights = counts(len(point), 1) if shared is None else shared
        columns.append((weights * by_run).sum(1) / weights.sum(1))
    return np.round(np.stack(columns, 1), 12)  # equal means are equal, however they were summed


def difference(value: float, resampled: Array) -> Difference:
    """A difference and its resamples, (_DRAWS,), as value, percentile interval and probability."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5]).tolist()
    known = resampled[np.isfinite(resampled)]
    return Difference(value, low, high, float(((known > 0) + 0.5 * (known == 0)).mean()))


def judge_best(points: Sequence[Point], metric: str) -> Verdict:
    """The first of `points`, which are in order from best to worst, against the second and against parity."""
    rows = [[by_prompt(run, metric) for run in point.runs] for point in points]
    each_prompt = all(row is not None for point in rows for row in point)
    finals = [[run.final(metric) for run in point.runs] for point in points]
    means = [fmean(point) for point in finals]
    fewest = min(map(len, finals))
    runner_up = points[1] if len(points) > 1 else None
    over_runner_up = over_parity = None
    best_share = math.nan
    if each_prompt or fewest > 1:
        values = [np.array(point) for point in rows] if each_prompt else [np.array(point)[:, None] for point in finals]
        seeds = [[run.config.get(SEED) for run in point.runs] for point in points]
        draws = resampled_means(values, all(each == seeds[0] for each in seeds))
        if runner_up is not None:
            over_runner_up = difference(means[0] - means[1], draws[:, 0] - draws[:, 1])
        if metric == WIN_RATE:
            over_parity = difference(means[0] - 0.5, draws[:, 0] - 0.5)
        leading = draws == np.nanmax(draws, 1, keepdims=True)
        best_share = float((leading[:, 0] / leading.sum(1)).mean())
    return Verdict(points[0], runner_up, over_runner_up, over_parity, best_share, fewest, each_prompt)
