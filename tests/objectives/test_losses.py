"""The objective against numbers derived by hand, and its gradients."""

import math
from typing import Any

import pytest
import torch

from xpo.config.options import LossOptions, PreferenceOptions
from xpo.objectives.labels import Labels, missing_eos_cost, preference_labels
from xpo.objectives.losses import preference_logit, preference_loss, xpo_loss

LOG_2 = math.log(2)


def hard(label: Any) -> Labels:
    """Labels that are sure."""
    label = torch.as_tensor(label)
    return Labels(label, (label + 1) / 2)


def test_sigmoid_loss_literals():
    """-log sigmoid(beta h): beta h = 0 gives log 2; beta h = log 3 gives -log(3/4); beta h = -log 3, -log(1/4)."""
    h = torch.tensor([0.0, math.log(3) / 0.5, -math.log(3) / 0.5])
    expected = torch.tensor([LOG_2, math.log(4 / 3), math.log(4)])
    torch.testing.assert_close(preference_loss(h, beta=0.5), expected)


def test_ipo_loss_literals():
    """(h - 1/(2 beta))^2 with beta 0.25: the target is 2, so h = 2, 0, 5 give 0, 4, 9."""
    h = torch.tensor([2.0, 0.0, 5.0])
    torch.testing.assert_close(preference_loss(h, beta=0.25, loss_type="ipo"), torch.tensor([0.0, 4.0, 9.0]))


def test_divergences_by_hand():
    """lr(chosen) = log 4, lr(rejected) = -log 9.

    Reverse KL: log 4 + log 9 = log 36. Forward KL: 9 - 1/4 = 8.75. Hellinger: 2 (3 - 1/2) = 5. Swapped, the sign turns.
    """
    chosen, rejected = torch.tensor([math.log(4)]), torch.tensor([-math.log(9)])
    wanted = {"sigmoid": math.log(36), "ipo": math.log(36), "forward_kl": 8.75, "hellinger": 5.0}
    for loss_type, value in wanted.items():
        torch.testing.assert_close(preference_logit(chosen, rejected, loss_type), torch.tensor([value]))
        torch.testing.assert_close(preference_logit(rejected, chosen, loss_type), torch.tensor([-value]))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "forward_kl", "hellinger"])
@pytest.mark.parametrize("far", [50.0, 100.0, 1e4])
def test_far_from_the_reference_a_pair_still_learns(loss_type: str, far: float):
    """The chosen completion far below it, the rejected one far above: finite, and it pulls both the right way."""
    ratios = torch.tensor([-far, far], requires_grad=True)
    loss = preference_loss(preference_logit(*ratios, loss_type), 0.1, loss_type)
    (gradient,) = torch.autograd.grad(loss, ratios)
    assert loss.isfinite()
    assert gradient.square().sum().isfinite()
    assert gradient[0] < -0.05
    assert gradient[1] >= 0
    right = preference_loss(preference_logit(*ratios.flip(0), loss_type), 0.1, loss_type)
    assert right.isfinite()
    assert torch.autograd.grad(right, ratios)[0].isfinite().all()


def test_an_unknown_loss_is_no_loss():
    with pytest.raises(ValueError, match="loss_type='bad' is no preference loss"):
        preference_loss(torch.zeros(1), 0.1, "bad")
    with pytest.raises(ValueError, match="loss_type='bad' is no preference loss"):
        preference_logit(torch.zeros(1), torch.zeros(1), "bad")


def test_xpo_loss_literals():
    """Two pairs, beta 0.5, alpha 0.1.

    Ratios log pi/pi_ref: y (1, -1), y~ (-1, 1). Pair 0: y won, h = 1 - (-1) = 2, beta h = 1, loss
    log(1 + e^-1). Pair 1: y~ won, h = 1 - (-1) = 2, the same. Bonus: 0.1 log pi(y~) = 0.1 * (-6, -3).
    """
    policy = torch.tensor([[-4.0, -5.0], [-6.0, -3.0]])
    reference = torch.tensor([[-5.0, -4.0], [-5.0, -4.0]])
    dpo, xpo = xpo_loss(policy, reference, hard([1.0, -1.0]), alpha=0.1, beta=0.5)
    torch.testing.assert_close(dpo, torch.full((2,), math.log(1 + math.exp(-1))))
    torch.testing.assert_close(xpo, torch.tensor([-0.6, -0.3]))


@pytest.mark.parametrize("label", [1.0, -1.0])
def test_policy_equal_to_reference_gives_log_2(label: float):
    logps = -torch.rand(2, 5) * 50
    dpo, _ = xpo_loss(logps, logps, hard([label] * 5), alpha=1e-5, beta=0.1)
    torch.testing.assert_close(dpo, torch.full((5,), LOG_2))


def test_swapping_the_pair_and_its_label_changes_nothing():
    policy, reference = -torch.rand(2, 4), -torch.rand(2, 4)
    label = torch.tensor([1.0, -1.0, 1.0, 0.0])
    loss = xpo_loss(policy, reference, hard(label), 0.0, 0.1).dpo
    swapped = xpo_loss(policy.flip(0), reference.flip(0), hard(-label), 0.0, 0.1).dpo
    torch.testing.assert_close(loss, swapped)


def test_pairs_without_preference_carry_only_the_bonus():
    """Label 0: no preference loss and no gradient from it; the bonus is over all pairs."""
    policy = torch.tensor([[-4.0], [-6.0]], requires_grad=True)
    dpo, xpo = xpo_loss(policy, torch.tensor([[-5.0], [-5.0]]), hard([0.0]), alpha=0.25, beta=0.1)
    assert dpo.item() == 0.0
    (dpo + xpo).sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([[0.0], [0.25]]))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hellinger", "forward_kl"])
def test_gradients(loss_type: str, kind: str):
    policy = (-torch.rand(2, 6, dtype=torch.float64)).requires_grad_()
    reference = -torch.rand(2, 6, dtype=torch.float64)
    margin = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.3, -4.0], dtype=torch.float64)
    labels, options = preference_labels(margin, PreferenceOptions(labels=kind)), LossOptions(loss_type=loss_type)

    def total(logps: torch.Tensor) -> torch.Tensor:
        return sum(xpo_loss(logps, reference, labels, alpha=0.3, beta=0.7, options=options))  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(total, policy)


def test_alpha_zero_is_dpo_on_the_same_pairs():
    """The DPO loss written with chosen and rejected, as its paper does (equation 7)."""
    policy, reference = -torch.rand(2, 8), -torch.rand(2, 8)
    label = torch.tensor([1.0, -1.0] * 4)
    won = label > 0
    chosen, rejected = torch.where(won, policy[0], policy[1]), torch.where(won, policy[1], policy[0])
    ref_chosen, ref_rejected = (
        torch.where(won, reference[0], reference[1]),
        torch.where(won, reference[1], reference[0]),
    )
    expected = -torch.log(torch.sigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))))
    dpo, xpo = xpo_loss(policy, reference, hard(label), alpha=0.0, beta=0.1)
    torch.testing.assert_close(dpo + xpo, expected)


def test_labels_are_signs_and_zero_where_the_judge_could_not_tell():
    margin = torch.tensor([2.0, -0.1, 0.0, float("nan"), float("inf"), -float("inf")])
    labels = preference_labels(margin, PreferenceOptions())
    assert labels.label.tolist() == [1, -1, 0, 0, 0, 0]
    assert labels.win_probability[:2].tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["hard", "soft", "sampled"])
def test_margins_within_the_threshold_are_ties(kind: str):
    margin = torch.tensor([0.5, -0.5, 0.51, -0.51, float("nan")])
    labels = preference_labels(
        margin, PreferenceOptions(kind, tie_threshold=0.5), uniform=torch.tensor([0.0, 0.0, 0.0, 0.99, 0.0])
    )
    assert labels.label.tolist() == [0, 0, 1, -1, 0]
    policy, reference = -torch.rand(2, 5), -torch.rand(2, 5)
    dpo, _ = xpo_loss(policy, reference, labels, alpha=0.0, beta=0.1)
    assert (dpo == 0).tolist() == [True, True, False, False, True]


def test_soft_labels_weigh_both_directions():
    """Margin 2 log 3 at temperature 2: y wins with probability 3/4. h = 2, beta 0.5: beta h = 1.

    3/4 log(1 + e^-1) + 1/4 log(1 + e^1) = 0.75 * 0.313262 + 0.25 * 1.313262 = 0.563262.
    """
    labels = preference_labels(torch.tensor([2 * math.log(3)]), PreferenceOptions("soft", label_temperature=2.0))
    torch.testing.assert_close(labels.win_probability, torch.tensor([0.75]))
    assert labels.label.tolist() == [1]
    policy, reference = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[-5.0], [-5.0]])
    dpo, _ = xpo_loss(policy, reference, labels, alpha=0.0, beta=0.5)
    torch.testing.assert_close(dpo, torch.tensor([0.5632617]))


def test_soft_labels_leave_sure_pairs_as_hard_ones():
    policy, reference, margin = -torch.rand(2, 3), -torch.rand(2, 3), torch.tensor([200.0, -200.0, 300.0])
    soft, sure = (
        xpo_loss(policy, reference, preference_labels(margin, PreferenceOptions(labels)), 0.1, 0.1).dpo
        for labels in ("soft", "hard")
    )
    torch.testing.assert_close(soft, sure)


def test_sampled_labels_win_as_often_as_bradley_terry_says():
    """sigmoid(1.5 / 1.5) = 0.7311 of evenly spaced numbers lie below 0.7311."""
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    labels = preference_labels(
        torch.full((10_000,), 1.5), PreferenceOptions("sampled", label_temperature=1.5), uniform=uniform
    )
    assert labels.label.unique().tolist() == [-1, 1]
    torch.testing.assert_close(labels.win_probability, (labels.label + 1) / 2)
    assert (labels.label > 0).float().mean().item() == pytest.approx(0.7311, abs=1e-4)


def test_a_sampled_label_of_equals_is_a_coin():
    """As Bradley and Terry have it; a threshold makes ties of equals, and no verdict is no coin."""
    margin, uniform = torch.tensor([0.0, 0.0, float("nan")]), torch.tensor([0.49, 0.51, 0.0])
    assert preference_labels(margin, PreferenceOptions("sampled"), uniform).label.tolist() == [1, -1, 0]
    assert preference_labels(margin, PreferenceOptions("sampled", 1.0, 0.1), uniform).label.tolist() == [0, 0, 0]
    assert preference_labels(margin, PreferenceOptions("hard"), uniform).label.tolist() == [0, 0, 0]


def test_missing_eos_cost():
    assert missing_eos_cost(torch.tensor([True, False]), 1.5).tolist() == [0.0, 1.5]
    assert missing_eos_cost(torch.tensor([True, False]), None).tolist() == [0.0, 0.0]
