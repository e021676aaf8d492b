"""How good verdicts are: accuracy, calibration, position bias, agreement. Pure functions of tensors.

Notation for shapes: N pairs. `margin` is a judge's log-odds that the first completion wins, NaN where it
could not tell; `winner` is the truth: +1 where the first completion is better, -1 where the second is.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import softplus


class Share(NamedTuple):
    """A share of so many cases, with its 95 % interval."""

    value: float
    cases: int
    low: float
    high: float


def share(hits: Tensor) -> Share:
    """The share of True in a bool tensor, with Wilson's score interval; NaN without cases."""
    n = hits.numel()
    if n == 0:
        return Share(math.nan, 0, math.nan, math.nan)
    test = binomtest(int(hits.sum()), n)
    interval = test.proportion_ci(method="wilson")
    return Share(test.statistic, n, float(interval.low), float(interval.high))


def decided(margin: Tensor) -> Tensor:
    """Which pairs have a winner by the judge: valid and no tie, (N,)."""
    return margin.isfinite() & (margin != 0)


def accuracy(margin: Tensor, winner: Tensor) -> Share:
    """How often the judge names the true winner, of the pairs that it decides."""
    chosen = decided(margin) & (winner != 0)
    return share(margin[chosen].sign() == winner[chosen])


class Bin(NamedTuple):
    """Pairs to whose winner a judge gave a probability between `low` and `high`."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """Whether a judge is right as often as it says."""

    bins: list[Bin]  # equally wide, of the winner's probability from 1/2 to 1, empty ones left out
    error: float  # expected calibration error: mean |confidence - accuracy| over the bins, weighted by counts
    # What margins must be divided by to fit the truth best (least cross-entropy): a good preference.label_temperature.
    temperature: float  # NaN if the judge is never wrong, or not right more often than by chance


def calibration(margin: Tensor, winner: Tensor, bins: int = 10) -> Calibration:
    """Calibration over the decided pairs whose truth is known; P(first wins) = sigmoid(margin)."""
    chosen = decided(margin) & (winner != 0)
    margin, winner = margin[chosen].double(), winner[chosen].double()
    confidence = torch.sigmoid(margin.abs())
    right = (margin.sign() == winner).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    filled = []
    for i in place.unique().tolist():
        here = place == i
        low, high = 0.5 + i / (2 * bins), 0.5 + (i + 1) / (2 * bins)
        filled.append(Bin(low, high, int(here.sum()), confidence[here].mean().item(), right[here].mean().item()))
    error = sum(b.pairs * abs(b.confidence - b.accuracy) for b in filled) / len(margin) if filled else math.nan
    return Calibration(filled, error, _best_temperature(margin * winner))


def _best_temperature(signed: Tensor) -> float:
    """Divides signed margins (positive: right) so that mean log(1 + exp(-signed / T)) is smallest."""
    if (signed > 0).all():
        return math.nan

    def loss(log_t: float) -> float:
        return softplus(-signed / math.exp(log_t)).mean().item()

    low, high = math.log(1e-3), math.log(1e3)
    best = minimize_scalar(loss, bounds=(low, high), method="bounded").x
    return math.exp(best) if low + 0.01 < best < high - 0.01 else math.nan


class Agreement(NamedTuple):
    """How often two judges say the same of the pairs that both could judge: first, second or tie."""

    same: Share
    kappa: float  # Cohen's: 1 for always, 0 for as often as by chance; NaN where chance alone agrees always
    # Counts, (3, 3); rows: the first judge's verdicts (first, tie, second), columns: the other's.
    table: list[list[int]]


def agreement(one: Tensor, two: Tensor) -> Agreement:
    """Agreement of two judges' margins, (N,) each."""
    both = one.isfinite() & two.isfinite()
    a, b = one[both].sign(), two[both].sign()
    table = [[int(((a == row) & (b == column)).sum()) for column in (1, 0, -1)] for row in (1, 0, -1)]
    same = share(a == b)
    chance = sum(((a == verdict).sum() * (b == verdict).sum()).item() for verdict in (1, 0, -1)) / max(len(a), 1) ** 2
    kappa = (same.value - chance) / (1 - chance) if chance < 1 else math.nan
    return Agreement(same, kappa, table)
