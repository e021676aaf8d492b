"""What a judge is worth: the figures against numbers derived by hand."""

import math

import pytest
import torch

from xpo.evaluation.agreement import accuracy, agreement, calibration, share

NAN = math.nan
LOG_3 = math.log(3)


def test_accuracy_is_over_the_pairs_that_are_decided_and_known() -> None:
    """Right, wrong, right; a tie, an invalid verdict, an infinite one, and an unknown winner do not count."""
    margin = torch.tensor([1.0, 1.0, -2.0, 0.0, NAN, math.inf, 3.0])
    winner = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 0.0])
    assert accuracy(margin, winner)[:2] == (pytest.approx(2 / 3), 3)


def test_the_interval_is_wilsons() -> None:
    """8 of 10: Wilson's 95 % interval is 0.490 to 0.943 (Wilson 1927)."""
    eight = share(torch.tensor([True] * 8 + [False] * 2))
    assert eight == (0.8, 10, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert share(torch.tensor([True] * 10)).high == pytest.approx(1)
    assert math.isnan(share(torch.tensor([], dtype=torch.bool)).value)


def test_calibration_by_hand() -> None:
    """Eight pairs at probability 3/4 (margin log 3), of which six are right: calibrated, temperature 1."""
    margin = torch.tensor([LOG_3, -LOG_3] * 4)
    winner = margin.sign()
    winner[:2] *= -1
    fit = calibration(margin, winner, bins=10)
    assert [(b.pairs, round(b.confidence, 3), b.accuracy) for b in fit.bins] == [(8, 0.75, 0.75)]
    assert fit.error == pytest.approx(0, abs=1e-7)
    assert fit.temperature == pytest.approx(1, rel=1e-3)
    doubled = calibration(2 * margin, winner)  # odds 9:1, so overconfident: 0.9 - 0.75
    assert doubled.error == pytest.approx(0.15, abs=1e-6)
    assert doubled.temperature == pytest.approx(2, rel=1e-3)


def test_calibration_without_anything_to_fit() -> None:
    assert math.isnan(calibration(torch.tensor([NAN]), torch.tensor([1.0])).error)
    assert math.isnan(calibration(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])).temperature)  # never wrong
    assert math.isnan(calibration(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -1.0])).temperature)  # never right


def test_kappa_by_hand() -> None:
    """Wins 4+1 | 1+4 of ten: same 8/10, by chance 1/2: kappa (0.8 - 0.5) / 0.5 = 0.6."""
    one = torch.tensor([1.0] * 5 + [-1.0] * 5 + [NAN])
    two = torch.tensor([2.0] * 4 + [-2.0] + [3.0] + [-0.1] * 4 + [1.0])
    same, kappa, table = agreement(one, two)
    assert same[:2] == (0.8, 10)
    assert kappa == pytest.approx(0.6)
    assert table == [[4, 0, 1], [0, 0, 0], [1, 0, 4]]
    assert math.isnan(agreement(torch.ones(3), torch.ones(3)).kappa)
    assert agreement(torch.zeros(2), torch.tensor([0.0, 1.0])).table == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
