"""Writes leaderboard.md from the `results.csv` of all folders beside it: `python -m experiments.science.leaderboard`.

A row for each method at the weight that did best on the tuning seeds, on the others. Folders with the columns of
`common.Results` are read as they are.
"""

from pathlib import Path

from experiments.science.common import BASELINES, COLUMNS, CONTROL, TUNING, Results, summary, tuned_methods

HERE = Path(__file__).parent
HEAD = """# Leaderboard

Made by `python -m experiments.science.leaderboard`; do not edit. Weights were chosen on seeds that are not in the
numbers. Values with 95 % intervals. What is "solved", and the tasks: the README of each folder. "second": who draws the
second completion; the equations: [bonuses.py](../../xpo/objectives/bonuses.py). "bonus share", where it was measured:
the bonus's pull at log pi over the preference loss's, a mean of ratios. A language model solves nothing in this sense:
its table is in [smollm2](smollm2/README.md).
"""


def board(path: Path) -> str:
    """The tables of one experiment, a task each; methods in order of the share solved, then of the median."""
    rows = Results(path).rows
    seeds = sorted({int(row.problem.split("/")[0]) for row in rows} - set(TUNING))
    results = Results(path, seeds)
    text = []
    for task in dict.fromkeys(row.task for row in rows if not row.task.startswith(CONTROL)):
        columns = " | ".join([*COLUMNS[:-1], "bonus share"])
        lines = [f"| method | second | alpha | {columns} |", "|---|---|---:|" + "---|" * 5]
        methods = [method for method in [*BASELINES, *tuned_methods(results, task)] if results.of(task, method)]
        found = [(method, summary(results.of(task, method), results.of(CONTROL + task, method))) for method in methods]

        def order(one: tuple) -> tuple[float, float]:
            median = one[1][1].split(" ")[0]
            return -float(one[1][0].split(" ")[0]), float("inf" if median == "never" else median)

        for method, cells in sorted(found, key=order):
            shares = [row.outcome.bonus_share for row in results.of(task, method)]
            share = "" if None in shares else f"{sum(shares) / len(shares):.3f}"
            lines.append(f"| {' | '.join([method.name, method.second, f'{method.alpha:g}', *cells, share])} |")
        text.append(f"## [{path.parent.name}]({path.parent.name}/README.md), {task}\n\n" + "\n".join(lines))
    return "\n\n".join(text)


def main() -> None:
    boards = [board(path) for path in sorted(HERE.glob("*/results.csv"))]
    (HERE / "leaderboard.md").write_text("\n".join([HEAD, "\n\n".join(boards), ""]))


if __name__ == "__main__":
    main()
