"""From completions to labels: scores, the judge's margins, the missing-EOS penalty."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xpo.errors import ConfigError
from xpo.judges.base import Judge
from xpo.judges.reward import RewardJudge
from xpo.losses import missing_eos_cost, preference_labels
from xpo.prompts import Prompt
from xpo.rewards.base import RewardModel
from xpo.rollout import Completions


class Preference(NamedTuple):
    """What is known of B pairs (y, y~), after the EOS penalty; on the CPU.

    Attributes:
        margin: log-odds that y beats y~, NaN where the judge could not tell, (B,).
        label: +1 where y won, -1 where y~ won, 0 for ties and invalid pairs, (B,).
        scores: rewards of y and of y~, (2, B); None without a reward model.
    """

    margin: Tensor
    label: Tensor
    scores: Tensor | None


def judge_pairs(
    judge: Judge,
    reward_model: RewardModel | None,
    prompts: Sequence[Prompt],
    policy: Completions,
    reference: Completions,
    missing_eos_penalty: float | None,
) -> Preference:
    """Labels pairs of completions.

    The judge says who wins; a reward model beside it only scores. Identical texts are a tie whatever
    the judge says, before the penalty.

    Raises:
        ConfigError: a judge or reward model returned another shape than one number per pair.
    """
    ended = torch.stack([policy.ended, reference.ended]).cpu()
    scores = None
    if reward_model is not None:
        scores = torch.stack(
            [one_per_pair("reward_model", reward_model.scores(prompts, c.texts), prompts) for c in (policy, reference)]
        )
    if type(judge) is RewardJudge and judge.reward_model is reward_model and scores is not None:
        margin = scores[0] - scores[1]  # what the judge would compute, without scoring again
    else:
        margin = one_per_pair("judge", judge.margins(prompts, policy.texts, reference.texts), prompts)
    identical = torch.tensor([y == z for y, z in zip(policy.texts, reference.texts, strict=True)])
    margin = torch.where(identical, torch.zeros_like(margin), margin)
    cost = missing_eos_cost(ended, missing_eos_penalty)
    margin = margin - (cost[0] - cost[1])
    if scores is not None:
        scores = scores - cost
    return Preference(margin, preference_labels(margin), scores)


def one_per_pair(key: str, values: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """`values` as float32 on the CPU; ConfigError unless it is one number per prompt, (B,)."""
    if values.shape != (len(prompts),):
        raise ConfigError(
            f"{key} returned a tensor of shape {tuple(values.shape)} for {len(prompts)} pairs; "
            f"return one number per pair, shape ({len(prompts)},)"
        )
    return values.float().cpu()
