"""A contextual bandit whose best arm the reference almost never pulls: see README.md."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.science import common
from experiments.science.common import CONTROL, Method, Outcome, Results
from experiments.science.tree import Tree, simulate

HERE = Path(__file__).parent
BETA = 0.1
CONTEXTS, PAIRS, ROUNDS = 2, 10, 50  # pairs by context and round: 1000 queries
REFERENCE = [0.8, 0.1, 0.02, 0.02, 1e-4, 1e-4, 1e-4, 1e-4]  # then normalised
TASK, HIDDEN = "hidden", 7  # the best arm
GRID = {  # of alpha, five each
    "xpo": (1e-4, 5e-4, 2e-3, 5e-3, 3e-2),  # kappa .001, .005, .02, .05, .3
    "selm": (1e-3, 5e-3, 2e-2, 5e-2, 3e-1),  # alpha beta lr: kappa
    "popo": (4e-4, 2e-3, 8e-3, 2e-2, 1.2e-1),  # its slope is alpha / 4 at the reference: 4 kappa beta
    "geb_p": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "geb_inverse": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    "geb_arctanh": (1e-4, 5e-4, 2e-3, 5e-3, 3e-2),
}
FLIPPED = 5e-4


def rewards(task: str, seed: int) -> Tensor:
    """4 x (.5, .4, .6, .3, three of U[0, .5], 1); on the control the last arm is as bad as the three, (contexts, 8)."""
    arms = 4 * torch.tensor([0.5, 0.4, 0.6, 0.3, 0.0, 0.0, 0.0, 1.0]).double().repeat(CONTEXTS, 1)
    bad = 2 * common.uniform(10_000 + seed, CONTEXTS, 4)
    arms[:, 4:7] = bad[:, :3]
    if task.startswith(CONTROL):
        arms[:, HIDDEN] = bad[:, 3]
    return arms


def run(task: str, method: Method, seeds: Sequence[int]) -> dict[str, Outcome]:
    noise = torch.cat([common.uniform(seed, CONTEXTS, ROUNDS, 3, PAIRS) for seed in seeds])
    reward = torch.cat([rewards(task, seed) for seed in seeds])
    outcomes = simulate(Tree(REFERENCE, 1), reward, HIDDEN, method, BETA, noise, CONTEXTS * PAIRS)
    problems = [f"{seed}/{context}" for seed in seeds for context in range(CONTEXTS)]
    return dict(zip(problems, outcomes, strict=True))


def main() -> None:
    torch.set_num_threads(1)  # sums in one order
    results = Results(HERE / "results.csv")
    methods = common.run_all(results, run, TASK, GRID, FLIPPED)
    common.write_block(HERE / "README.md", common.table(results, TASK, methods))
    common.plot_gaps(results, TASK, BETA, HERE / "gaps.png")


if __name__ == "__main__":
    main()
