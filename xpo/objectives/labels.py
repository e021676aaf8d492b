"""What a pair's label is worth: who won, how surely, and what an unfinished completion costs. Pure functions.

Notation for shapes: B pairs of a first and a second completion. `margin` is the log-odds that the first beats the
second.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xpo.config.options import PreferenceOptions


class Labels(NamedTuple):
    """What the loss learns of each pair; both (B,), in the dtype of the margins.

    Attributes:
        label: +1 where the first completion won, -1 where the second did, 0 where the pair carries no preference (a
            tie, or an invalid verdict).
        win_probability: how sure that is: the probability that the first beats the second.
    """

    label: Tensor
    win_probability: Tensor


def preference_labels(margin: Tensor, options: PreferenceOptions, uniform: Tensor | None = None) -> Labels:
    """Labels from margins. Pairs whose margin is within the threshold, or not finite, carry no preference.

    Args:
        margin: see above, (B,).
        options: margins of at most `tie_threshold` are ties. With `labels` "hard", the likelier winner wins; "soft",
            both may have won, the first with probability sigmoid(margin / label_temperature); "sampled", the winner
            is drawn with that probability (Bradley-Terry), for a margin of 0, too, if the threshold is 0.
        uniform: for "sampled", numbers in [0, 1), (B,).

    Returns:
        The label (for "soft", of the likelier winner), and the probability of a win that the loss uses.
    """
    coin = options.labels == "sampled" and options.tie_threshold == 0
    decided = margin.isfinite() & ((margin.abs() > options.tie_threshold) | coin)
    probability = torch.sigmoid(margin / options.label_temperature)
    if options.labels == "sampled":
        assert uniform is not None
        sign = torch.where(uniform < probability, 1.0, -1.0).to(margin.dtype)
    else:
        sign = margin.sign()
    label = torch.where(decided, sign, torch.zeros_like(margin))
    if options.labels == "soft":
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
