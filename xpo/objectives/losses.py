"""The objective, per pair: a preference loss and an exploration bonus. Pure functions of tensors.

Notation for shapes: B pairs of a first completion y and a second one y~; of (2, B), index 0 is the first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xpo.config.options import LossOptions
from xpo.objectives.bonuses import exploration_loss
from xpo.objectives.labels import Labels

_LARGEST = 20.0  # nats up to which exp is one; see `_exp`


def preference_logit(chosen: Tensor, rejected: Tensor, loss_type: str = LossOptions.loss_type) -> Tensor:
    """What the preference loss is a function of: the difference of the implicit rewards over beta.

    Args:
        chosen, rejected: log pi/pi_ref of the two completions, (B,).
        loss_type: the regularisation. "sigmoid" and "ipo", reverse KL: lr(chosen) - lr(rejected). "forward_kl":
            exp(-lr(rejected)) - exp(-lr(chosen)). "hellinger": 2 (exp(-lr(rejected) / 2) - exp(-lr(chosen) / 2)).
            The latter are those of f-DPO (arXiv 2309.16240), as written in GEB (arXiv 2510.03269).
    """
    match loss_type:
        case "sigmoid" | "ipo":
            return chosen - rejected
        case "forward_kl":
            return _exp(-rejected) - _exp(-chosen)
        case "hellinger":
            return 2 * (_exp(-rejected / 2) - _exp(-chosen / 2))
    raise ValueError(f"loss_type={loss_type!r} is no preference loss")


def _exp(values: Tensor) -> Tensor:
    """exp, and from `_LARGEST` on its tangent: neither it nor its gradient overflows, and no gradient is lost."""
    bounded = values.clamp(max=_LARGEST)
    return bounded.exp() * (1 + values - bounded)


def preference_loss(logit: Tensor, beta: float, loss_type: str = LossOptions.loss_type) -> Tensor:
    """The preference loss of labelled pairs.

    Args:
        logit: h, see `preference_logit`, (B,).
        beta: the KL regularisation strength (for IPO: tau).
        loss_type: "ipo", (h - 1/(2 beta))^2 (arXiv 2310.12036, equation 17); any other, -log sigmoid(beta h) (DPO,
            arXiv 2305.18290, equation 7).

    Returns:
        Loss of each pair, (B,).
    """
    match loss_type:
        case "sigmoid" | "forward_kl" | "hellinger":
            return -F.logsigmoid(beta * logit)
        case "ipo":
            return (logit - 1 / (2 * beta)) ** 2
    raise ValueError(f"loss_type={loss_type!r} is no preference loss")


class XPOLoss(NamedTuple):
    """The two terms of the objective, each (B,). Their sum is the loss of a pair."""

    dpo: Tensor
    xpo: Tensor


def xpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Labels,
    alpha: float,
    beta: float,
    options: LossOptions | None = None,
    lengths: Tensor | None = None,
) -> XPOLoss:
    """The objective of pairs: XPO's by default, whose bonus makes second completions less likely.

    Args:
        policy_logps: log pi(y) and log pi(y~), summed over completion tokens, (2, B).
        reference_logps: the same under the reference, (2, B).
        labels: which completion won, or how surely; see `xpo.objectives.labels`.
        alpha: the weight of the exploration bonus.
        beta: the KL regularisation strength.
        options: `loss_type` and the bonus; None for the defaults. Its alpha and beta are not read: they may change.
        lengths: tokens of the completions, (2, B), which only `bonus_per_token` needs.

    Returns:
        The preference loss (0 for pairs without preference) and the exploration loss (every pair).
    """
    options = options or LossOptions()
    first, second = policy_logps - reference_logps
    logit = preference_logit(first, second, options.loss_type)
    won = preference_loss(logit, beta, options.loss_type)
    lost = preference_loss(-logit, beta, options.loss_type)
    loss = labels.win_probability * won + (1 - labels.win_probability) * lost
    return XPOLoss(
        dpo=torch.where(labels.label == 0, torch.zeros_like(loss), loss),
        xpo=exploration_loss(policy_logps, reference_logps, labels.label, alpha, beta, options, lengths),
    )


def gradient_sizes(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Labels,
    alpha: float,
    beta: float,
    options: LossOptions | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How much each term pulls at a pair: `|d/d log pi(y)| + |d/d log pi(y~)|` of the two, (B,) each.

    Arguments as of `xpo_loss`.
    """
    with torch.enable_grad():
        logps = policy_logps.detach().requires_grad_()
        terms = xpo_loss(logps, reference_logps, labels, alpha, beta, options, lengths)
        # A bonus of "none" depends on nothing.
        dpo, xpo = ((term + 0 * logps.sum(0)).sum() for term in terms)
        sizes = [torch.autograd.grad(term, logps, retain_graph=True)[0].abs().sum(0) for term in (dpo, xpo)]
    return sizes[0], sizes[1]
