"""Each bonus against numbers and derivatives derived by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from xpo.config.options import BONUSES, LossOptions
from xpo.objectives.bonuses import PUBLISHED_ON, exploration_loss, geb
from xpo.objectives.labels import Labels
from xpo.objectives.losses import gradient_sizes, xpo_loss

LOSSES = ("sigmoid", "ipo", "hellinger", "forward_kl")
# Two pairs; the first completion has won in the first, the second in the second. Ratios: y (1, -1), y~ (-1, 2).
POLICY = torch.tensor([[-4.0, -5.0], [-6.0, -2.0]])
REFERENCE = torch.tensor([[-5.0, -4.0], [-5.0, -4.0]])
LABEL = torch.tensor([1.0, -1.0])


LENGTHS = torch.tensor([[4, 5], [3, 2]])


def term(policy: Tensor = POLICY, alpha: float = 0.1, beta: float = 0.5, **options: Any) -> Tensor:
    pairs = policy, REFERENCE.to(policy), LABEL.to(policy), alpha, beta
    return exploration_loss(*pairs, LossOptions(**options), LENGTHS)


def derivatives(**options: Any) -> list[list[float]]:
    """By log pi(y) and log pi(y~), (2, 2)."""
    policy = POLICY.clone().requires_grad_()
    term(policy, **options).sum().backward()
    assert policy.grad is not None
    return policy.grad.tolist()


def test_bonuses_by_hand() -> None:
    """alpha 0.1, beta 0.5. sigmoid(-1/2) = 0.377541, sigmoid(1) = 0.731059."""
    wanted = {
        "none": [0.0, 0.0],
        "xpo": [-0.6, -0.2],  # 0.1 log pi(y~)
        "selm": [0.05, -0.05],  # 0.1 * 0.5 * lr(y)
        "vpo": [-0.3, -0.1],  # 0.1 * 0.5 * log pi(y~)
        "popo": [0.1 * (0.377541 - 0.5) / 0.5, 0.1 * (0.731059 - 0.5) / 0.5],
    }
    for bonus, values in wanted.items():
        torch.testing.assert_close(term(bonus=bonus), torch.tensor(values))
    assert set(wanted) | {"geb_p", "geb_inverse", "geb_arctanh"} == set(BONUSES) == set(PUBLISHED_ON)


def test_the_completion_that_a_bonus_is_on() -> None:
    """Rejected: y~ in the first pair, y in the second."""
    torch.testing.assert_close(term(bonus_on="first"), 0.1 * POLICY[0])
    torch.testing.assert_close(term(bonus_on="second"), 0.1 * POLICY[1])
    torch.testing.assert_close(term(bonus_on="rejected"), torch.tensor([-0.6, -0.5]))
    torch.testing.assert_close(term(bonus="selm", bonus_on="second"), torch.tensor([-0.05, 0.1]))
    nobody = exploration_loss(POLICY, REFERENCE, torch.zeros(2), 0.1, 0.5, LossOptions(bonus_on="rejected"))
    assert nobody.tolist() == [0, 0]


def test_derivatives_by_hand() -> None:
    """All make their completion less likely. POPO: alpha s (1 - s) with s of above, 0.235004 and 0.196612."""
    assert derivatives() == [[0, 0], [pytest.approx(0.1)] * 2]
    assert derivatives(bonus="selm") == [[pytest.approx(0.05)] * 2, [0, 0]]
    assert derivatives(bonus="vpo") == [[0, 0], [pytest.approx(0.05)] * 2]
    assert derivatives(bonus="popo") == [[0, 0], pytest.approx([0.0235004, 0.0196612], rel=1e-4)]


def test_xpo_and_the_log_ratio_have_the_same_gradient() -> None:
    """alpha log pi(y~) and alpha lr(y~) differ by what the policy has no part in."""
    ratio = derivatives(bonus="selm", bonus_on="second", alpha=0.2)  # alpha * beta = 0.1
    assert ratio == derivatives(bonus="xpo", alpha=0.1)


def test_a_clipped_bonus_stops_growing() -> None:
    """Ratios -1 and 2 of y~, clipped to 1.5: the second pair has no gradient, and the value of log pi_ref + 1.5."""
    torch.testing.assert_close(term(bonus_clip=1.5), 0.1 * torch.tensor([-6.0, -4 + 1.5]))
    assert derivatives(bonus_clip=1.5) == [[0, 0], [pytest.approx(0.1), 0]]


def test_a_bonus_of_means_over_tokens() -> None:
    """The rejected ones are y~ in the first pair, -6 of 3 tokens, and y in the second, -5 of 5: e^-2 and e^-1.

    d e^(l/n) / dl = e^(l/n) / n. Ratios of y~, -1 and 2, become -1/3 and 1.
    """
    wanted = 0.1 * torch.tensor([math.exp(-2), math.exp(-1)])
    torch.testing.assert_close(term(bonus="geb_p", bonus_per_token=True), wanted)
    slopes = derivatives(bonus="geb_p", bonus_per_token=True)
    assert slopes == [[0, pytest.approx(0.1 * math.exp(-1) / 5)], [pytest.approx(0.1 * math.exp(-2) / 3), 0]]
    ratios = term(bonus="selm", bonus_on="second", bonus_per_token=True)
    torch.testing.assert_close(ratios, 0.05 * torch.tensor([-1 / 3, 1.0]))


GEB_BY_HAND = {
    # pi = 1/4: sqrt(1.25), 1/2; arctanh(3/4) = log(7) / 2 = 0.972955; e of 1e-5 changes the fifth digit
    ("geb_p", "sigmoid"): 0.25,
    ("geb_p", "hellinger"): -1.1180340,
    ("geb_p", "forward_kl"): 0.2876821,  # -log(3/4)
    ("geb_inverse", "sigmoid"): -1 / 0.25001,
    ("geb_inverse", "hellinger"): -1 / 0.50001,
    ("geb_inverse", "forward_kl"): math.log(0.25),
    ("geb_arctanh", "sigmoid"): -0.972932,
    ("geb_arctanh", "hellinger"): -1.213644,  # -sqrt(0.972932 + 0.5)
    ("geb_arctanh", "forward_kl"): 0.027441,  # -log 0.972932
}


@pytest.mark.parametrize(("kind", "loss_type"), GEB_BY_HAND)
def test_geb_by_hand(kind: str, loss_type: str) -> None:
    value = geb(torch.tensor([math.log(0.25)], dtype=torch.float64), kind, loss_type)
    assert value.item() == pytest.approx(GEB_BY_HAND[kind, loss_type], rel=1e-5)
    ipo = geb(torch.tensor([math.log(0.25)]), kind, "ipo")
    torch.testing.assert_close(ipo, geb(torch.tensor([math.log(0.25)]), kind, "sigmoid"))


@pytest.mark.parametrize("kind", ["geb_p", "geb_inverse", "geb_arctanh"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_geb_makes_rejected_completions_less_likely_and_is_finite_everywhere(kind: str, loss_type: str) -> None:
    logps = torch.tensor([-1e4, -100.0, -5.0, -1.0, -1e-3, -1e-9, 0.0], requires_grad=True)
    values = geb(logps, kind, loss_type)
    values.sum().backward()
    assert logps.grad is not None
    assert values.isfinite().all()
    assert logps.grad.isfinite().all()
    assert (logps.grad[2:4] > 0).all()


def test_forward_kl_with_the_inverse_is_xpo_on_rejected_completions() -> None:
    one = term(bonus="geb_inverse", loss_type="forward_kl")
    torch.testing.assert_close(one, term(bonus="xpo", bonus_on="rejected"))
    assert derivatives(bonus="geb_inverse", loss_type="forward_kl") == derivatives(bonus="xpo", bonus_on="rejected")


@pytest.mark.parametrize("bonus", BONUSES)
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("on", [None, "first", "second", "rejected"])
def test_gradients(bonus: str, loss_type: str, on: str | None) -> None:
    options = {"bonus": bonus, "loss_type": loss_type, "bonus_on": on}
    policy = POLICY.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logps: term(logps, **options), policy)


# ---- what part of the gradient the bonus is --------------------------------------------------------------


def test_the_size_of_the_gradients_by_hand() -> None:
    """beta 0.5, alpha 0.1, XPO. Pair 0: h = 1 + 1, beta h = 1: beta sigmoid(-1) = 0.1344707 on each completion.

    Pair 1: the second has won, h = 2 + 1, beta h = 1.5: 0.5 sigmoid(-1.5) = 0.0912128. The bonus: 0.1 on y~ alone.
    A tie has the bonus only.
    """
    labels = Labels(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]))
    preference, bonus = gradient_sizes(POLICY, REFERENCE, labels, 0.1, 0.5)
    torch.testing.assert_close(preference, torch.tensor([2 * 0.1344707, 2 * 0.0912128]))
    torch.testing.assert_close(bonus, torch.tensor([0.1, 0.1]))
    tie = Labels(torch.zeros(2), torch.full((2,), 0.5))
    preference, bonus = gradient_sizes(POLICY, REFERENCE, tie, 0.1, 0.5)
    assert preference.tolist() == [0, 0]
    torch.testing.assert_close(bonus, torch.tensor([0.1, 0.1]))


@torch.no_grad()
def test_the_size_of_a_bonus_that_underflows_is_zero() -> None:
    """GEB's pi of a long completion; and of no bonus. In a context without gradients, as metrics are computed in."""
    labels = Labels(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]))
    for options in (LossOptions(bonus="geb_p"), LossOptions(bonus="none")):
        preference, bonus = gradient_sizes(POLICY - 200, REFERENCE, labels, 1.0, 0.5, options)
        assert bonus.tolist() == [0, 0]
        assert (preference > 0).all()


def test_alpha_zero_is_the_preference_loss_alone() -> None:
    labels = Labels(LABEL, (LABEL + 1) / 2)
    plain = xpo_loss(POLICY, REFERENCE, labels, 0.0, 0.5, LossOptions(bonus="none"))
    for bonus in BONUSES:
        dpo, xpo = xpo_loss(POLICY, REFERENCE, labels, 0.0, 0.5, LossOptions(bonus=bonus))
        torch.testing.assert_close(dpo, plain.dpo)
        assert (xpo == 0).all()
