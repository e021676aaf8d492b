"""What is logged of a step. Pure functions of tensors, and their mean over steps and ranks. Layer 0.

Notation for shapes: B pairs. Index 0 of a (2, B) tensor is the policy's completion y, index 1 the
reference's completion y~. `label` is +1 where y won, -1 where y~ won, 0 where there is no preference.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean that can still be pooled with others: the sum of the values and how many there are."""

    total: float
    count: float


def mean_of(values: Tensor, where: Tensor | None = None) -> Mean:
    """The mean of `values` (B,) over the rows where `where` (bool, B) holds; all rows without it."""
    if where is not None:
        values = values[where]
    return Mean(values.double().sum().item(), values.numel())


def pair_metrics(
    policy_logps: Tensor, reference_logps: Tensor, label: Tensor, beta: float, dpo: Tensor, xpo: Tensor
) -> dict[str, Mean]:
    """Metrics of pairs, from log-probabilities summed over completion tokens.

    Args:
        policy_logps: log pi(y), log pi(y~), (2, B).
        reference_logps: log pi_ref(y), log pi_ref(y~), (2, B).
        label: see above, (B,).
        beta: the KL regularisation strength in force.
        dpo: preference loss of each pair, (B,).
        xpo: exploration loss of each pair, (B,).

    Returns:
        Name to mean. `rewards/*` and `logps/*` are over the pairs with a preference, the rest over all.
    """
    ratio = policy_logps - reference_logps
    labelled = label != 0
    chosen = (label < 0).long()[None]  # row of the chosen completion
    ratio_chosen, ratio_rejected = (ratio.gather(0, row).squeeze(0) for row in (chosen, 1 - chosen))
    logps_chosen, logps_rejected = (policy_logps.gather(0, row).squeeze(0) for row in (chosen, 1 - chosen))
    margin = beta * (ratio_chosen - ratio_rejected)
    return {
        "loss": mean_of(dpo + xpo),
        "loss/dpo": mean_of(dpo),
        "loss/xpo": mean_of(xpo),
        "objective/kl": mean_of(ratio.mean(dim=0)),
        "objective/kl_policy": mean_of(ratio[0]),
        "objective/entropy": mean_of(-policy_logps.mean(dim=0)),
        "exploration/ref_ratio": mean_of(ratio[1]),
        "rewards/chosen": mean_of(beta * ratio_chosen, labelled),
        "rewards/rejected": mean_of(beta * ratio_rejected, labelled),
        "rewards/margins": mean_of(margin, labelled),
        "rewards/accuracies": mean_of((margin > 0).float(), labelled),
        "logps/chosen": mean_of(logps_chosen, labelled),
        "logps/rejected": mean_of(logps_rejected, labelled),
    }


def preference_metrics(margin: Tensor, label: Tensor, flipped: Tensor) -> dict[str, Mean]:
    """The judge's verdicts on the policy's completions: shares of all pairs, from margins (B,).

    `flip_rate` is the share of verdicts that changed with the order of the completions, of the pairs
    where `flipped` (B,) is known: 1 for yes, 0 for no, NaN for unknown.
    """
    valid = margin.isfinite()
    return {
        "preference/win_rate": mean_of((label > 0).float()),
        "preference/tie_rate": mean_of((valid & (label == 0)).float()),
        "preference/invalid_rate": mean_of((~valid).float()),
        "preference/flip_rate": mean_of(flipped, ~flipped.isnan()),
    }


def distinct_bigrams(completions: Iterable[list[int]]) -> Mean:
    """distinct-2 of a set of completions: different bigrams over all bigrams (Li et al., 1510.03055)."""
    bigrams = [pair for tokens in completions for pair in itertools.pairwise(tokens)]
    return Mean(len(set(bigrams)), len(bigrams))


class MeanTracker:
    """Pools metrics from one log to the next; its state is part of a checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: dict[str, Mean]) -> None:
        """Pools `metrics` with what was added before."""
        for name, mean in metrics.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total + mean.total, count + mean.count)

    def pop(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all ranks, by name; metrics without any value are left out. Starts afresh.

        Args:
            sum_over_ranks: a collective that adds a float64 (2, n) tensor up over the ranks. Every
                rank must have added the same names.
        """
        names = sorted(self.sums)
        if not names:
            return {}
        totals, counts = sum_over_ranks(torch.tensor([self.sums[n] for n in names], dtype=torch.float64).T)
        self.sums = {}
        pairs = zip(names, totals.tolist(), counts.tolist(), strict=True)
        return {name: total / count for name, total, count in pairs if count}
