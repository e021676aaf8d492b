"""A hidden sequence of three tokens: see README.md."""

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.science import common
from experiments.science.common import CONTROL, Method, Outcome, Results
from experiments.science.tree import Tree, simulate

HERE = Path(__file__).parent
BETA = 0.1
PAIRS, ROUNDS = 16, 100  # 1600 queries
DEPTH, REFERENCE = 3, [0.475, 0.475, 0.05]  # the hidden sequence takes the rare action thrice: 1.25e-4
TASK, HIDDEN = "hidden", 26
GRID = {  # of alpha, five each
    "xpo": (1e-4, 1e-3, 3e-3, 1e-2, 1e-1),  # kappa .001, .01, .03, .1, 1
    "selm": (1e-3, 1e-2, 3e-2, 1e-1, 1.0),  # alpha beta lr: kappa
    "popo": (4e-4, 4e-3, 1.2e-2, 4e-2, 4e-1),  # its slope is alpha / 4 at the reference: 4 kappa beta
    "geb_p": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "geb_inverse": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    "geb_arctanh": (1e-4, 1e-3, 3e-3, 1e-2, 1e-1),
}
FLIPPED = 1e-3


def run(task: str, method: Method, seeds: Sequence[int]) -> dict[str, Outcome]:
    """2 for every sequence, 4 for the hidden one; on the control 0 for it."""
    rewards = torch.full((len(seeds), len(REFERENCE) ** DEPTH), 2.0).double()
    rewards[:, HIDDEN] = 0.0 if task.startswith(CONTROL) else 4.0
    noise = torch.stack([common.uniform(seed, ROUNDS, 3, PAIRS) for seed in seeds])
    outcomes = simulate(Tree(REFERENCE, DEPTH), rewards, HIDDEN, method, BETA, noise, PAIRS)
    return dict(zip(map(str, seeds), outcomes, strict=True))


def main() -> None:
    torch.set_num_threads(1)  # sums in one order
    results = Results(HERE / "results.csv")
    methods = common.run_all(results, run, TASK, GRID, FLIPPED)
    common.write_block(HERE / "README.md", common.table(results, TASK, methods))
    common.plot_gaps(results, TASK, BETA, HERE / "gaps.png")


if __name__ == "__main__":
    main()
