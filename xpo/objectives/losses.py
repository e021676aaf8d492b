"""The XPO objective, per pair. Pure functions of tensors. Layer 0: torch only.

Notation for shapes: B pairs. `label` is +1 where the policy's completion y won, -1 where the
reference's completion y~ won, 0 where the pair carries no preference (a tie, or an invalid verdict).
`win_probability` is how sure that is: the probability that y beats y~.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["sigmoid", "ipo"]
LabelType = Literal["hard", "soft", "sampled"]


class Labels(NamedTuple):
    """What the loss learns of each pair; see the notation above. Both (B,), in the dtype of the margins."""

    label: Tensor
    win_probability: Tensor


def preference_labels(
    margin: Tensor,
    tie_threshold: float = 0.0,
    labels: LabelType = "hard",
    temperature: float = 1.0,
    uniform: Tensor | None = None,
) -> Labels:
    """Labels from margins. Pairs whose margin is within the threshold, or not finite, carry no preference.

    Args:
        margin: log-odds that y beats y~, (B,).
        tie_threshold: margins of at most this size are ties.
        labels: "hard", the likelier winner wins; "soft", both may have won, y with probability
            sigmoid(margin / temperature); "sampled", the winner is drawn with that probability
            (Bradley-Terry).
        temperature: of the last two.
        uniform: for "sampled", numbers in [0, 1), (B,).

    Returns:
        The label (for "soft", of the likelier winner), and the probability of a win that the loss uses.
    """
    decided = margin.isfinite() & (margin.abs() > tie_threshold)
    probability = torch.sigmoid(margin / temperature)
    if labels == "sampled":
        assert uniform is not None
        sign = torch.where(uniform < probability, 1.0, -1.0).to(margin.dtype)
    else:
        sign = margin.sign()
    label = torch.where(decided, sign, torch.zeros_like(margin))
    if labels == "soft":
        return Labels(label, torch.where(decided, probability, torch.full_like(margin, 0.5)))
    return Labels(label, (label + 1) / 2)


def missing_eos_cost(ended: Tensor, penalty: float | None) -> Tensor:
    """What each completion loses for not having ended by itself. It is subtracted from its score.

    Args:
        ended: whether each completion contains an EOS token, bool, any shape.
        penalty: the cost of an unfinished completion, in units of the reward; None for nothing.

    Returns:
        float32, the shape of `ended`.
    """
    return (~ended).float() * (penalty or 0.0)


def preference_loss(logratio_difference: Tensor, beta: float, loss_type: LossType = "sigmoid") -> Tensor:
    """The preference loss of labelled pairs.

    Args:
        logratio_difference: log pi/pi_ref of the chosen completion minus that of the rejected one, (B,).
        beta: the KL regularisation strength (for IPO: tau).
        loss_type: "sigmoid", -log sigmoid(beta h) (DPO, arXiv 2305.18290, equation 7); or "ipo",
            (h - 1/(2 beta))^2 (arXiv 2310.12036, equation 17).

    Returns:
        Loss of each pair, (B,).
    """
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * logratio_difference)
    return (logratio_difference - 1 / (2 * beta)) ** 2


def exploration_loss(reference_completion_logps: Tensor, alpha: float) -> Tensor:
    """The optimism term, alpha * log pi(y~) (XPO, arXiv 2405.21046, Algorithm 1, step 5).

    The sign is plus and the loss is minimised: it makes the reference's completions less likely,
    whether they won or lost. Without length normalisation.

    Args:
        reference_completion_logps: the policy's summed log-probability of y~, (B,).
        alpha: the weight of the bonus.

    Returns:
        Loss of each pair, (B,).
    """
    return alpha * reference_completion_logps


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
    loss_type: LossType = "sigmoid",
) -> XPOLoss:
    """The XPO objective of pairs (y ~ policy, y~ ~ reference).

    Args:
        policy_logps: log pi(y) and log pi(y~), summed over completion tokens, (2, B).
        reference_logps: the same under the reference, (2, B).
        labels: which completion won, or how surely; see `preference_labels`.
        alpha: the weight of the exploration bonus.
        beta: the KL regularisation strength.
        loss_type: see `preference_loss`.

    Returns:
        The preference loss (0 for pairs without preference) and the exploration loss (every pair).
    """
    logratio, reference_logratio = policy_logps - reference_logps
    difference = logratio - reference_logratio
    won = preference_loss(difference, beta, loss_type)
    lost = preference_loss(-difference, beta, loss_type)
    loss = labels.win_probability * won + (1 - labels.win_probability) * lost
    return XPOLoss(
        dpo=torch.where(labels.label == 0, torch.zeros_like(loss), loss),
        xpo=exploration_loss(policy_logps[1], alpha),
    )
