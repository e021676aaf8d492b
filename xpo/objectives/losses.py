"""The XPO objective, per pair. Pure functions of tensors.

Notation for shapes: B pairs of a first completion y and a second one y~; of (2, B), index 0 is the first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xpo.config.options import LossOptions
from xpo.objectives.labels import Labels


def preference_loss(logratio_difference: Tensor, beta: float, loss_type: str = LossOptions.loss_type) -> Tensor:
    """The preference loss of labelled pairs.

    Args:
        logratio_difference: log pi/pi_ref of the chosen completion minus that of the rejected one, (B,).
        beta: the KL regularisation strength (for IPO: tau).
        loss_type: "sigmoid", -log sigmoid(beta h) (DPO, arXiv 2305.18290, equation 7); or "ipo",
            (h - 1/(2 beta))^2 (arXiv 2310.12036, equation 17).

    Returns:
        Loss of each pair, (B,).
    """
    match loss_type:
        case "sigmoid":
            return -F.logsigmoid(beta * logratio_difference)
        case "ipo":
            return (logratio_difference - 1 / (2 * beta)) ** 2
    raise ValueError(f"loss_type={loss_type!r} is no preference loss")


def exploration_loss(second_logps: Tensor, alpha: float) -> Tensor:
    """The optimism term, alpha * log pi(y~) (XPO, arXiv 2405.21046, Algorithm 1, step 5).

    The sign is plus and the loss is minimised: it makes the second completions, the reference's, less likely,
    whether they won or lost. Without length normalisation.

    Args:
        second_logps: the policy's summed log-probability of y~, (B,).
        alpha: the weight of the bonus.

    Returns:
        Loss of each pair, (B,).
    """
    return alpha * second_logps


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
    loss_type: str = LossOptions.loss_type,
) -> XPOLoss:
    """The XPO objective of pairs: the second completion is the one that the bonus makes less likely.

    Args:
        policy_logps: log pi(y) and log pi(y~), summed over completion tokens, (2, B).
        reference_logps: the same under the reference, (2, B).
        labels: which completion won, or how surely; see `xpo.objectives.labels`.
        alpha: the weight of the exploration bonus.
        beta: the KL regularisation strength.
        loss_type: see `preference_loss`.

    Returns:
        The preference loss (0 for pairs without preference) and the exploration loss (every pair).
    """
    first, second = policy_logps - reference_logps
    difference = first - second
    won = preference_loss(difference, beta, loss_type)
    lost = preference_loss(-difference, beta, loss_type)
    loss = labels.win_probability * won + (1 - labels.win_probability) * lost
    return XPOLoss(
        dpo=torch.where(labels.label == 0, torch.zeros_like(loss), loss),
        xpo=exploration_loss(policy_logps[1], alpha),
    )
