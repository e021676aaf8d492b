"""From completions to labels: who wins, ties, invalid verdicts, the missing-EOS penalty."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.config.options import PreferenceOptions
from xpo.data.prompts import Prompt
from xpo.judges import FunctionJudge, Judge, PairwiseJudge, RewardJudge
from xpo.judges.labelling import Labelled, Labeller
from xpo.rewards import FunctionReward, RewardModel
from xpo.sampling.completions import Completions
from xpo.tracking.metrics import preference_metrics

NAN, INF = math.nan, math.inf


def completions(texts: Sequence[str], ended: Sequence[bool] | None = None) -> Completions:
    ids = torch.zeros(len(texts), 1, dtype=torch.long)
    ended = [True] * len(texts) if ended is None else list(ended)
    return Completions(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor(ended), list(texts))


def judged(
    judge: Judge,
    reward_model: RewardModel | None = None,
    texts: tuple[Sequence[str], Sequence[str]] | None = None,
    ended: tuple[Sequence[bool], Sequence[bool]] | None = None,
    penalty: float | None = None,
    count: int = 1,
) -> Labelled:
    """The labels of pairs of completions; different texts that ended by default."""
    first, second = texts or ([f"y{i}" for i in range(count)], [f"z{i}" for i in range(count)])
    first_ended, second_ended = ended or (None, None)
    return Labeller(judge, reward_model, PreferenceOptions(), penalty)(
        [f"p{i}" for i in range(len(first))], completions(first, first_ended), completions(second, second_ended)
    )


def says(*margins: float | None) -> FunctionJudge:
    return FunctionJudge(lambda prompts, first, second: list(margins))


class CountingReward(RewardModel):
    """The length of a text; remembers what it scored."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        self.scored += completions
        return torch.tensor([float(len(text)) for text in completions])


# ---- labels ------------------------------------------------------------------------------------


def test_the_sign_of_the_margin_is_the_label() -> None:
    preference = judged(says(2.0, -0.1, 0.0), count=3)
    assert preference.labels.label.tolist() == [1, -1, 0]
    torch.testing.assert_close(preference.margin, torch.tensor([2.0, -0.1, 0.0]))
    assert preference.scores is None


@pytest.mark.parametrize("verdict", [None, NAN, INF, -INF])
def test_an_invalid_verdict_is_neither_a_win_nor_a_defeat(verdict: float | None) -> None:
    """Defects 18 and 20."""
    preference = judged(says(verdict, 1.0), count=2)
    assert preference.labels.label.tolist() == [0, 1]
    metrics = preference_metrics(preference.margin, preference.labels.label, preference.flipped)
    assert {name: mean.total for name, mean in metrics.items()} == {
        "preference/win_rate": 1,
        "preference/tie_rate": 0,
        "preference/invalid_rate": 1,
        "preference/flip_rate": 0,
    }
    assert metrics["preference/flip_rate"].count == 0


def test_the_penalty_does_not_make_an_invalid_verdict_valid() -> None:
    preference = judged(says(NAN, INF, -INF), ended=([True] * 3, [False] * 3), penalty=5.0, count=3)
    assert preference.labels.label.tolist() == [0, 0, 0]
    assert not preference.margin.isfinite().any()


def test_a_pair_with_one_missing_reward_is_invalid_and_not_a_win_of_the_other() -> None:
    """Defect 20: None must not become 0, which would beat every negative reward."""
    reward = FunctionReward(lambda prompts, completions: [None if text == "y0" else -1.0 for text in completions])
    preference = judged(RewardJudge(reward), count=2)
    assert preference.labels.label.tolist() == [0, 0]
    assert preference.margin[0].isnan()
    assert preference.margin[1] == 0


@pytest.mark.parametrize("verdict", [3.0, -3.0, None, INF])
def test_identical_texts_are_a_tie_whatever_the_judge_says(verdict: float | None) -> None:
    """Defect 17."""
    preference = judged(says(verdict, verdict), texts=(["same", "y"], ["same", "z"]))
    assert preference.margin[0] == 0
    assert preference.labels.label[0] == 0
    assert preference.margin[1] != 0  # the judge is heard where the texts differ


def test_only_the_same_text_of_the_same_pair_counts_as_identical() -> None:
    preference = judged(says(1.0, 1.0), texts=(["a", "b"], ["b", "a"]))
    assert preference.labels.label.tolist() == [1, 1]


# ---- best and worst of n -----------------------------------------------------------------------


def of_n(judge: Judge, *texts: str, clip: float | None = None) -> tuple[str, str, Labelled]:
    """The two that are chosen of the completions of one prompt, and their label."""
    labeller = Labeller(judge, None, PreferenceOptions(clip_scores=clip))
    first, second = labeller.best_and_worst(["p"], [completions([text]) for text in texts])
    return first.texts[0], second.texts[0], labeller(["p"], first, second)


def scored(**scores: float) -> RewardJudge:
    return RewardJudge(FunctionReward(lambda prompts, completions: [scores[text] for text in completions]))


def test_two_different_candidates_are_chosen_even_if_all_are_tied() -> None:
    for judge in (scored(a=1, b=1, c=1), says(0.0)):
        first, second, labelled = of_n(judge, "a", "b", "c")
        assert first != second
        assert (labelled.margin.item(), labelled.labels.label.item()) == (0, 0)


def test_what_has_no_finite_score_is_not_chosen() -> None:
    assert of_n(scored(a=INF, b=1, c=3, d=-INF, e=NAN), *"abcde")[:2] == ("c", "b")


@pytest.mark.parametrize("scores", [{"a": NAN, "b": NAN, "c": NAN}, {"a": NAN, "b": 1, "c": INF}])
def test_fewer_than_two_that_could_be_judged_are_no_verdict(scores: dict[str, float]) -> None:
    for clip in (None, 2.0):
        first, second, labelled = of_n(scored(**scores), *"abc", clip=clip)
        assert first != second
        assert labelled.margin.isnan().all()


def test_equal_texts_do_not_hide_a_judge_that_never_answers() -> None:
    """It is not asked about them, and says 0."""

    class Silent(PairwiseJudge):
        def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
            return torch.full((len(prompts),), NAN)

    assert of_n(Silent(), "same", "same", "other")[2].margin.isnan().all()


def test_the_penalty_is_of_scaled_scores_in_the_choice_too() -> None:
    """0, 10, 20: mean 10, deviation sqrt(200 / 3). The unfinished best one is worth 1.22 - 2, less than 0."""
    judge = scored(a=0.0, b=10.0, c=20.0)
    labeller = Labeller(judge, None, PreferenceOptions(normalize_scores=True), missing_eos_penalty=2.0)
    candidates = [completions([text], [text != "c"]) for text in "abc"]
    first, second = labeller.best_and_worst(["p"], candidates)
    assert (first.texts, second.texts) == (["b"], ["a"])
    assert labeller.scale.moments == [3, 30, 500]
    labelled = labeller(["p"], first, second, counted=True)
    assert labeller.scale.moments == [3, 30, 500]
    torch.testing.assert_close(labelled.margin, torch.tensor([10 / math.sqrt(200 / 3)]))


# ---- the missing-EOS penalty -------------------------------------------------------------------

# Policy and reference: both ended, y did not, y~ did not, neither did.
ENDED = ([True, False, True, False], [True, True, False, False])


def test_the_penalty_is_subtracted_from_margins_and_scores_alike() -> None:
    """Defect 13: subtracted, not replaced. Lengths 5 and 2, penalty 1.5.

    y ended, y~ ended:   5,   2    margin 3
    y did not:           3.5, 2    margin 1.5
    y~ did not:          5,   0.5  margin 4.5
    neither:             3.5, 0.5  margin 3
    """
    reward = CountingReward()
    preference = judged(RewardJudge(reward), texts=(["yyyyy"] * 4, ["zz"] * 4), ended=ENDED, penalty=1.5)
    assert preference.scores is not None
    torch.testing.assert_close(preference.scores, torch.tensor([[5, 3.5, 5, 3.5], [2, 2, 0.5, 0.5]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(preference.margin, torch.tensor([3, 1.5, 4.5, 3]), atol=1e-6, rtol=0)
    torch.testing.assert_close(preference.margin, preference.scores[0] - preference.scores[1])


def test_the_penalty_acts_on_the_margins_of_any_judge() -> None:
    preference = judged(says(1.0, 1.0, 1.0, 1.0), ended=ENDED, penalty=1.5, count=4)
    torch.testing.assert_close(preference.margin, torch.tensor([1.0, -0.5, 2.5, 1.0]))
    assert preference.labels.label.tolist() == [1, -1, 1, 1]


def test_the_penalty_decides_between_identical_texts() -> None:
    preference = judged(says(9.0, 9.0, 9.0, 9.0), texts=(["same"] * 4, ["same"] * 4), ended=ENDED, penalty=1.5)
    assert preference.labels.label.tolist() == [0, -1, 1, 0]


def test_without_a_penalty_an_unfinished_completion_costs_nothing() -> None:
    reward = CountingReward()
    preference = judged(RewardJudge(reward), texts=(["yyy"] * 4, ["z"] * 4), ended=ENDED, penalty=None)
    assert preference.margin.tolist() == [2, 2, 2, 2]
    assert preference.scores is not None
    assert preference.scores.tolist() == [[3] * 4, [1] * 4]


# ---- judge and reward model --------------------------------------------------------------------


def test_a_reward_model_beside_a_judge_only_scores() -> None:
    preference = judged(says(-1.0), CountingReward(), texts=(["long text"], ["z"]))
    assert preference.labels.label.tolist() == [-1]
    assert preference.scores is not None
    assert preference.scores.tolist() == [[9], [1]]


def test_a_reward_model_that_judges_scores_each_completion_once() -> None:
    reward = CountingReward()
    preference = judged(RewardJudge(reward), texts=(["aa", "b"], ["c", "dd"]))
    assert sorted(reward.scored) == ["aa", "b", "c", "dd"]
    assert preference.labels.label.tolist() == [1, -1]


def test_a_reward_judge_with_another_reward_model_keeps_its_own_opinion() -> None:
    shorter = FunctionReward(lambda prompts, completions: [-len(text) for text in completions])
    preference = judged(RewardJudge(shorter), CountingReward(), texts=(["aaa"], ["b"]))
    assert preference.labels.label.tolist() == [-1]
    assert preference.scores is not None
    assert preference.scores.tolist() == [[3], [1]]


def test_a_subclass_of_the_reward_judge_is_asked_for_its_margins() -> None:
    class Opposite(RewardJudge):
        def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
            return -super().margins(prompts, first, second)

    reward = CountingReward()
    assert judged(Opposite(reward), reward, texts=(["aaa"], ["b"])).labels.label.tolist() == [-1]


def test_prompts_and_texts_reach_the_judge_in_order() -> None:
    seen = []

    def judge(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        seen.append((list(prompts), list(first), list(second)))
        return [0.0, 0.0]

    judged(FunctionJudge(judge), count=2)
    assert seen == [(["p0", "p1"], ["y0", "y1"], ["z0", "z1"])]


@pytest.mark.parametrize("answer", [[1.0], [1.0, 2.0, 3.0], torch.ones(2, 1), torch.tensor(1.0)])
def test_another_number_of_verdicts_or_scores_than_pairs_is_refused(answer: list[float] | Tensor) -> None:
    message = r"returned a tensor of shape \(.*\) for 2 pairs; return one number per pair, shape \(2,\)"
    with pytest.raises(ConfigError, match=f"judge {message}"):
        judged(FunctionJudge(lambda prompts, first, second: answer), count=2)
    with pytest.raises(ConfigError, match=f"reward_model {message}"):
        judged(says(1.0, 1.0), FunctionReward(lambda prompts, completions: answer), count=2)
