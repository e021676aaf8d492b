"""From completions to labels: the judge's margins, scores, the missing-EOS penalty.

Notation for shapes: B pairs; of (2, B), index 0 is the first completion, index 1 the second.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xpo.config.errors import JudgeStopped
from xpo.config.options import PreferenceOptions
from xpo.data.prompts import Prompt
from xpo.judges.base import Judge
from xpo.judges.reward import RewardJudge
from xpo.objectives.labels import Labels, missing_eos_cost, preference_labels
from xpo.rewards.base import RewardModel, one_per_pair
from xpo.sampling.completions import Completions, picked

IN_VAIN = 8  # steps without a verdict, after which no other is expected


class Labelled(NamedTuple):
    """What is known of B pairs, after the EOS penalty; on the CPU."""

    margin: Tensor  # log-odds that the first completion beats the second, NaN where the judge could not tell, (B,)
    labels: Labels  # who won, or how surely, (B,) each
    flipped: Tensor  # as in `Verdicts`, (B,)
    scores: Tensor | None  # rewards, (2, B); None without a reward model
    parts: dict[str, Tensor]  # of a mix of reward models, the scores of each by name, before everything else, (2, B)


class Labeller:
    """Labels pairs of completions. The judge says who wins; a reward model beside it only scores.

    Args:
        reward_model: another than the judge's, whose scores are reported instead; None: the judge's, if any.
        missing_eos_penalty: what an unfinished completion costs, in units of margin and score; None for nothing.
        sum_over_ranks: a collective that adds a float64 tensor up over the ranks, for `normalize_scores`.
    """

    def __init__(
        self,
        judge: Judge,
        reward_model: RewardModel | None,
        options: PreferenceOptions,
        missing_eos_penalty: float | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    ):
        self.judge = judge
        self.reward_model = reward_model
        self.options = options
        self.missing_eos_penalty = missing_eos_penalty
        self.in_vain = 0  # steps in a row without a verdict; part of a checkpoint
        self.scale = ScoreScale(options.normalize_scores, options.clip_scores, sum_over_ranks)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        first: Completions,
        second: Completions,
        uniform: Tensor | None = None,
        counted: bool = False,
    ) -> Labelled:
        """The labels of B pairs. Identical texts are a tie whatever the judge says, before the penalty.

        `uniform` are numbers in [0, 1) for sampled labels, (B,); `counted` says that `best_and_worst` has chosen these
        pairs, and counted their scores among all. ConfigError unless there is one number per pair.
        """
        verdicts = self.judge.verdicts(prompts, first.texts, second.texts)
        scored, scores, parts = verdicts.scores, None, {}
        if (other := self.reward_model) is not None:
            scored = other.scores_with_parts(prompts, first.texts), other.scores_with_parts(prompts, second.texts)
        if scored is not None:
            scores = torch.stack([one_per_pair("reward_model", each.total, prompts) for each in scored])
            if not counted:
                self.scale.count(scores)
            scores = self.scale(scores)
            parts = {name: torch.stack([each.parts[name] for each in scored]) for name in scored[0].parts}
        margin, flipped = (one_per_pair("judge", values, prompts) for values in verdicts[:2])
        if scores is not None and self.reward_model is None:
            margin = scores[0] - scores[1]  # of the scaled ones
        identical = torch.tensor([one == two for one, two in zip(first.texts, second.texts, strict=True)])
        margin = torch.where(identical, torch.zeros_like(margin), margin)
        cost = missing_eos_cost(torch.stack([first.ended, second.ended]).cpu(), self.missing_eos_penalty)
        margin = margin - (cost[0] - cost[1])
        labels = preference_labels(margin, self.options, uniform)
        return Labelled(margin, labels, flipped, None if scores is None else scores - cost, parts)

    def best_and_worst(
        self, prompts: Sequence[Prompt], candidates: Sequence[Completions]
    ) -> tuple[Completions, Completions]:
        """Of n candidates for each of B prompts the best and the worst; of two, these as they are.

        By the scaled score of a reward model that judges, or else by the judge's mean margin against the other texts,
        less what a missing EOS costs. They are two, even if all are equal; what could not be judged is neither, unless
        that leaves fewer than two.
        """
        if len(candidates) == 2:
            return candidates[0], candidates[1]
        texts, n = [one.texts for one in candidates], len(candidates)
        if type(self.judge) is RewardJudge:
            scores = torch.stack([self.judge.reward_model.scores_with_parts(prompts, each).total for each in texts])
            self.scale.count(scores)
            strength = self.scale(scores)
        else:
            margins = torch.full((n, n, len(prompts)), torch.nan)
            for one, two in itertools.combinations(range(n), 2):
                verdict = one_per_pair("judge", self.judge.verdicts(prompts, texts[one], texts[two]).margin, prompts)
                differ = torch.tensor([a != b for a, b in zip(texts[one], texts[two], strict=True)])
                verdict = verdict.where(differ & verdict.isfinite(), torch.nan)
                margins[one, two], margins[two, one] = verdict, -verdict
            strength = margins.nanmean(dim=1)
        strength = strength - missing_eos_cost(
            torch.stack([one.ended for one in candidates]).cpu(), self.missing_eos_penalty
        )
        judged = strength.isfinite()
        order = strength.where(judged, -torch.inf).argsort(dim=0, descending=True, stable=True)
        known = judged.sum(dim=0)
        worst = order.gather(0, known.where(known > 1, n)[None] - 1)[0]
        return picked(candidates, order[0]), picked(candidates, worst)

    def queries(self, n: int) -> float:
        """What a prompt with n completions costs, in preference queries: pairs that are compared, in one order or two.

        Remembered verdicts count, and those that say nothing. Two completions that are scored are a query.
        """
        if type(self.judge) is RewardJudge or n == 2:
            return n / 2
        return n * (n - 1) / 2

    def gives_up(self, verdicts: float) -> JudgeStopped | None:
        """After a step with so many verdicts on all processes: the reason to stop, if the bonus alone is trained."""
        self.in_vain = 0 if verdicts else self.in_vain + 1
        if self.in_vain < IN_VAIN:
            return None
        return JudgeStopped(
            f"judge gave no verdict in {IN_VAIN} steps in a row (None, NaN or infinite); mend it and continue the run"
        )

    def state(self) -> dict[str, Any]:
        return {"judge": self.judge.state(), "scale": self.scale.moments, "in_vain": self.in_vain}

    def load_state(self, state: dict[str, Any]) -> None:
        self.judge.load_state(state["judge"])
        self.scale.moments = state["scale"]
        self.in_vain = state.get("in_vain", 0)  # checkpoints of earlier versions lack it


class ScoreScale:
    """With `normalize`, brings scores to mean 0 and standard deviation 1 over the run so far; then clips to `clip`."""

    def __init__(self, normalize: bool, clip: float | None, sum_over_ranks: Callable[[Tensor], Tensor]):
        self.normalize = normalize
        self.clip = clip
        self.sum_over_ranks = sum_over_ranks
        self.moments = [0.0, 0.0, 0.0]  # how many scores, their sum, the sum of their squares; part of a checkpoint

    def count(self, scores: Tensor) -> None:
        """Takes the scores of one optimizer step, any shape, into mean and deviation. All processes together."""
        if self.normalize:
            finite = scores[scores.isfinite()].double()
            fresh = torch.tensor([finite.numel(), finite.sum(), finite.square().sum()], dtype=torch.float64)
            self.moments = [a + b for a, b in zip(self.moments, self.sum_over_ranks(fresh).tolist(), strict=True)]

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores of any shape, scaled by what was counted so far; NaN where they are infinite."""
        scores = scores.where(scores.isfinite(), torch.nan)  # before they are clipped to a number
        if self.normalize:
            count, total, squares = self.moments
            mean = total / max(count, 1)
            deviation = math.sqrt(max(squares / max(count, 1) - mean**2, 0.0))
            scores = (scores - mean) / (deviation or 1.0)
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)


def of_evaluations(judge: Judge, reward_model: RewardModel | None, options: PreferenceOptions) -> Labeller:
    """Hard labels on raw scores, without a penalty. A threshold of scaled scores is not in their unit."""
    threshold = 0.0 if options.normalize_scores else options.tie_threshold
    return Labeller(judge, reward_model, PreferenceOptions(tie_threshold=threshold))
