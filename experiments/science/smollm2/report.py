"""Table and plot of the runs."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from scipy.stats import t, ttest_rel

from experiments.science.common import COLOURS, holm, save

Row = dict[str, str]  # of runs.csv: a run
HEAD = ("gain", "KL", "gain per nat", "win rate", "VADER gain", "distinct-2", "ended", "bonus share", "p")


def values(rows: Sequence[Row], name: str, minus: str | None = None) -> list[float]:
    return [float(row[name]) - (float(row[minus]) if minus else 0.0) for row in rows]


def gains(rows: Sequence[Row]) -> list[float]:
    """How much better the policy's mean score is than the reference's, of each evaluation."""
    return values(rows, "score", "ref_score")


def interval(found: Sequence[float]) -> str:
    """The mean, and half of Student's 95 % interval."""
    return f"{fmean(found):.2f} ± {t.ppf(0.975, len(found) - 1) * stdev(found) / len(found) ** 0.5:.2f}"


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each method, in the order of their seeds."""
    found: dict[str, list[Row]] = {row["method"]: [] for row in rows}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        found[row["method"]].append(row)
    return found


def table(rows: Sequence[Row], baseline: str) -> str:
    """Markdown, a row for each method. p: of the gain against the baseline's; paired t test, Holm's correction."""
    of = by_method(rows)
    others = [method for method in of if method != baseline]
    tests = [ttest_rel(gains(of[method]), gains(of[baseline])).pvalue for method in others]
    p = dict(zip(others, holm(tests), strict=True))
    lines = [f"| method | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 1) + "|"]
    for method, runs in of.items():
        gain, kl = gains(runs), values(runs, "kl")
        per_nat = [g / k for g, k in zip(gain, kl, strict=True)]
        measures = [gain, kl, per_nat, values(runs, "win_rate"), values(runs, "vader", "ref_vader")]
        measures += [values(runs, "distinct_2"), values(runs, "eos_rate")]
        share, known = fmean(values(runs, "bonus_share")), f"{p[method]:.2g}" if method in p else ""
        pull = (
            f"{share:.2g}" if share <= 1 else "> 1"
        )  # where all pairs are decided, the preference loss pulls at nothing
        lines.append(f"| {' | '.join([method, *map(interval, measures), pull, known])} |")
    return "\n".join(lines)


def plot(tables: dict[str, Sequence[Row]], path: Path) -> None:
    """A panel for each set of prompts: what every run has gained over its distance from the reference."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), sharey=True), tables.items(), strict=True):
        for number, (method, runs) in enumerate(by_method(rows).items()):
            colour = (*COLOURS, "#999999")[number]
            axes.plot(values(runs, "kl"), gains(runs), "o", color=colour, markersize=5, label=method)
        axes.set(title=f"{name} prompts", xlabel="KL from the reference, nats a completion")
    figure.axes[0].set_ylabel("gain in held-out score")
    figure.axes[-1].legend(fontsize=7, frameon=False)
    save(figure, path)
