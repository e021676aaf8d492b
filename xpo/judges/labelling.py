"""From completions to labels: scores, the judge's margins, the missing-EOS penalty."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.judges.base import Judge
from xpo.judges.reward import RewardJudge
from xpo.objectives.losses import Labels, LabelType, missing_eos_cost, preference_labels
from xpo.rewards.base import RewardModel
from xpo.sampling.rollout import Completions


@dataclass(frozen=True)
class Rules:
    """How margins become labels; see `xpo.objectives.losses.preference_labels` and `missing_eos_cost`."""

    missing_eos_penalty: float | None = None
    tie_threshold: float = 0.0
    labels: LabelType = "hard"
    temperature: float = 1.0


class Preference(NamedTuple):
    """What is known of B pairs (y, y~), after the EOS penalty; on the CPU.

    Attributes:
        margin: log-odds that y beats y~, NaN where the judge could not tell, (B,).
        labels: who won, or how surely, (B,) each.
        flipped: 1 where the judge's verdict changed with the order of y and y~, 0 where it did not, NaN
            where that is not known, (B,).
        scores: rewards of y and of y~, (2, B); None without a reward model.
        parts: of a mix of reward models, the scores of each by name, before everything else, (2, B).
    """

    margin: Tensor
    labels: Labels
    flipped: Tensor
    scores: Tensor | None
    parts: dict[str, Tensor]


def judge_pairs(
    judge: Judge,
    reward_model: RewardModel | None,
    prompts: Sequence[Prompt],
    policy: Completions,
    reference: Completions,
    rules: Rules,
    scale: "ScoreScale | None" = None,
    uniform: Tensor | None = None,
) -> Preference:
    """Labels pairs of completions.

    The judge says who wins; a reward model beside it only scores. Identical texts are a tie whatever
    the judge says, before the penalty.

    Args:
        scale: changes the scores before anything is made of them; None leaves them alone.
        uniform: numbers in [0, 1) for sampled labels, (B,).

    Raises:
        ConfigError: a judge or reward model returned another shape than one number per pair.
    """
    scores: Tensor | None = None
    parts: dict[str, Tensor] = {}
    if reward_model is not None:
        scores, parts = _scores(reward_model, prompts, policy, reference)
        scores = scores if scale is None else scale(scores)
    if judged_by(judge, reward_model) and scores is not None:
        margin = scores[0] - scores[1]  # what the judge would compute, without scoring again
        flipped = torch.full_like(margin, torch.nan)
    else:
        verdicts = judge.verdicts(prompts, policy.texts, reference.texts)
        margin, flipped = (one_per_pair("judge", values, prompts) for values in verdicts)
    identical = torch.tensor([y == z for y, z in zip(policy.texts, reference.texts, strict=True)])
    margin = torch.where(identical, torch.zeros_like(margin), margin)
    cost = missing_eos_cost(torch.stack([policy.ended, reference.ended]).cpu(), rules.missing_eos_penalty)
    margin = margin - (cost[0] - cost[1])
    if scores is not None:
        scores = scores - cost
    labels = preference_labels(margin, rules.tie_threshold, rules.labels, rules.temperature, uniform)
    return Preference(margin, labels, flipped, scores, parts)


def judged_by(judge: Judge, reward_model: RewardModel | None) -> bool:
    """Whether the judge's margins are the differences of this reward model's scores."""
    return type(judge) is RewardJudge and judge.reward_model is reward_model


def _scores(
    reward_model: RewardModel, prompts: Sequence[Prompt], policy: Completions, reference: Completions
) -> tuple[Tensor, dict[str, Tensor]]:
    y, z = (reward_model.scores_with_parts(prompts, c.texts) for c in (policy, reference))
    total = torch.stack([one_per_pair("reward_model", scores.total, prompts) for scores in (y, z)])
    return total, {name: torch.stack([y.parts[name], z.parts[name]]) for name in y.parts}


def one_per_pair(key: str, values: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """`values` as float32 on the CPU; ConfigError unless it is one number per prompt, (B,)."""
    if values.shape != (len(prompts),):
        raise ConfigError(
            f"{key} returned a tensor of shape {tuple(values.shape)} for {len(prompts)} pairs; "
            f"return one number per pair, shape ({len(prompts)},)"
        )
    return values.float().cpu()


class ScoreScale:
    """Brings scores to mean 0 and standard deviation 1 over all scores of the run so far, and clips them.

    Args:
        normalize: whether to do the former.
        clip: the largest score by absolute value, afterwards; None: no limit.
        sum_over_ranks: a collective that adds a float64 tensor up over the ranks.
    """

    def __init__(self, normalize: bool, clip: float | None, sum_over_ranks: Callable[[Tensor], Tensor]):
        self.normalize = normalize
        self.clip = clip
        self.sum_over_ranks = sum_over_ranks
        self.moments = [0.0, 0.0, 0.0]  # how many scores, their sum, the sum of their squares; part of a checkpoint

    def __call__(self, scores: Tensor) -> Tensor:
        """The scores of one optimizer step, any shape, scaled with their own share in mean and deviation."""
        if self.normalize:
            finite = scores[scores.isfinite()].double()
            fresh = torch.tensor([finite.numel(), finite.sum(), finite.square().sum()], dtype=torch.float64)
            self.moments = [a + b for a, b in zip(self.moments, self.sum_over_ranks(fresh).tolist(), strict=True)]
            count, total, squares = self.moments
            mean = total / max(count, 1)
            deviation = math.sqrt(max(squares / max(count, 1) - mean**2, 0.0))
            scores = (scores - mean) / (deviation or 1.0)
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)
