"""Exploration bonuses: one term for each pair, added to its preference loss. Pure functions of tensors.

Every loss is minimised, so a positive derivative by log pi(y) makes y less likely. Notation for shapes: B pairs; of
(2, B), index 0 is the first completion. lr(y) = log pi(y) - log pi_ref(y), summed over the completion's tokens.
"""

import torch
from torch import Tensor

from xpo.config.options import LossOptions

# The completion that a bonus is on in its paper, if `bonus_on` does not say otherwise.
PUBLISHED_ON = {
    "none": "second",
    "xpo": "second",
    "selm": "first",
    "popo": "second",
    "vpo": "second",
    **dict.fromkeys(("geb_p", "geb_inverse", "geb_arctanh"), "rejected"),
}
_EPSILON = 1e-5  # of GEB's released code


def exploration_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    label: Tensor,
    alpha: float,
    beta: float,
    options: LossOptions,
    lengths: Tensor | None = None,
) -> Tensor:
    """The bonus of each pair, won or lost, (B,).

    - "xpo": alpha log pi(y) (arXiv 2405.21046, Algorithm 1, step 5). Without length normalisation.
    - "selm": alpha beta lr(y), of the policy's own response (arXiv 2405.19332).
    - "vpo": alpha beta log pi(y), y from a calibration distribution: here the second completion's (arXiv 2405.19320).
    - "popo": alpha (sigmoid(beta lr(y)) - 1/2) / beta, which is bounded (arXiv 2502.00666).
    - "geb_p", "geb_inverse", "geb_arctanh": see `geb` (arXiv 2510.03269).

    Args:
        policy_logps, reference_logps: summed log-probabilities, (2, B).
        label: +1 where the first completion won, -1 where the second did, 0 for neither, (B,).
        alpha: the weight.
        beta: the KL regularisation strength.
        options: `bonus`; `bonus_on`: a pair without a preference has no "rejected" completion, and no bonus then;
            `bonus_clip`: beyond so many nats of lr(y) the bonus no longer grows, and has no gradient;
            `bonus_per_token`: pi(y) is its geometric mean over the tokens, pi(y)^(1/|y|), and the reference's, too.
        lengths: |y|, tokens of the completions, (2, B); needed for `bonus_per_token`.
    """
    on = options.bonus_on or PUBLISHED_ON[options.bonus]
    row = {"first": torch.zeros_like(label), "second": torch.ones_like(label), "rejected": (label > 0).to(label)}[on]
    index = row.long()[None]
    logps, reference = (values.gather(0, index)[0] for values in (policy_logps, reference_logps))
    if options.bonus_per_token:
        assert lengths is not None
        tokens = lengths.gather(0, index)[0]
        logps, reference = logps / tokens, reference / tokens
    ratio = logps - reference
    if options.bonus_clip is not None:
        ratio = ratio.clamp(-options.bonus_clip, options.bonus_clip)
        logps = reference + ratio
    match options.bonus:
        case "none":
            return torch.zeros_like(logps)
        case "xpo":
            term = alpha * logps
        case "selm":
            term = alpha * beta * ratio
        case "vpo":
            term = alpha * beta * logps
        case "popo":
            term = alpha * (torch.sigmoid(beta * ratio) - 0.5) / beta
        case _:
            term = alpha * geb(logps, options.bonus, options.loss_type)
    return torch.where(label == 0, torch.zeros_like(term), term) if on == "rejected" else term


def geb(logps: Tensor, kind: str, loss_type: str) -> Tensor:
    """GEB's term without its weight, by the probability pi of a whole completion and the loss's divergence.

    =============  ==========================  ========================  ============================
    loss_type      geb_p (u = 1 + a - pi)      geb_inverse (u = 1 / pi)  geb_arctanh (arctanh(1 - pi))
    =============  ==========================  ========================  ============================
    sigmoid, ipo   pi                          -1 / (pi + e)             -arctanh(1 - pi - e)
    hellinger      -sqrt(1.5 - pi)             -1 / (sqrt(pi) + e)       -sqrt(arctanh(1 - pi - e) + .5)
    forward_kl     -log(1 - pi)                log pi                    -log arctanh(1 - pi - e)
    =============  ==========================  ========================  ============================

    pi of a hundred tokens underflows to 0, and with it the gradient of all of these but log pi.

    Args:
        logps: log pi of each completion, (B,).
        kind, loss_type: see above; e is 1e-5.
    """
    pi = logps.exp()
    rest = (pi + _EPSILON).clamp(max=1 - _EPSILON)  # of a completion that is certain, too
    arctanh = 0.5 * ((2 - rest).log() - rest.log())  # of 1 - rest
    match kind, loss_type:
        case "geb_p", "hellinger":
            return -(1.5 - pi).sqrt()
        case "geb_p", "forward_kl":
            return -torch.log(-torch.expm1(logps.clamp(max=-_EPSILON)))
        case "geb_p", _:
            return pi
        case "geb_inverse", "hellinger":
            return -1 / ((logps / 2).exp() + _EPSILON)
        case "geb_inverse", "forward_kl":
            return logps
        case "geb_inverse", _:
            return -1 / (pi + _EPSILON)
        case "geb_arctanh", "hellinger":
            return -(arctanh + 0.5).sqrt()
        case "geb_arctanh", "forward_kl":
            return -arctanh.log()
        case "geb_arctanh", _:
            return -arctanh
    raise ValueError(f"bonus={kind!r} is none of GEB's")
