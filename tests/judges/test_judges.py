"""The contract of all judges, and the judges that are made of others."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.judges import (
    AllOfJudge,
    FunctionJudge,
    Judge,
    LengthControlledJudge,
    PairwiseJudge,
    RandomJudge,
    RewardJudge,
)
from xpo.rewards import FunctionReward, RewardModel, VaderReward

NAN = math.nan
PROMPTS = [f"prompt {i}" for i in range(6)]
FIRST = ["good", "bad", "a very long answer", "x", "same", "I love it"]
SECOND = ["bad", "good", "short", "yy", "same", "I hate it"]


class Biased(PairwiseJudge):
    """The log-odds that the first-shown is better: 3 for being first, plus a third of a character each.

    Texts in `broken` fail as the first of the two.
    """

    def __init__(self, both_orders: bool = True, seed: int = 0, broken: Sequence[str] = ()):
        super().__init__(both_orders, seed)
        self.broken = broken
        self.asked: list[tuple[str, str]] = []

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        self.asked += zip(first, second, strict=True)
        return torch.tensor(
            [NAN if a in self.broken else 3 + (len(a) - len(b)) / 3 for a, b in zip(first, second, strict=True)]
        )


def longer(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [float(len(a) - len(b)) for a, b in zip(first, second, strict=True)]


JUDGES: list[Judge] = [
    FunctionJudge(longer),
    Biased(),
    Biased(both_orders=False),
    RandomJudge(),
    RewardJudge(VaderReward()),
    LengthControlledJudge(Biased(), 0.3),
    AllOfJudge({"longer": FunctionJudge(longer), "lexicon": RewardJudge(VaderReward())}),
]


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: type(judge).__name__)
def test_swapping_the_completions_turns_the_sign(judge: Judge) -> None:
    there = [i for i in range(6) if FIRST[i] != SECOND[i]]
    prompts, first, second = ([column[i] for i in there] for column in (PROMPTS, FIRST, SECOND))
    margins = judge.margins(prompts, first, second)
    assert margins.shape == (5,)
    assert margins.dtype == torch.float32
    assert torch.equal(margins, -judge.margins(prompts, second, first))
    assert judge.margins([], [], []).shape == (0,)


# ---- judges that favour a position ---------------------------------------------------------------


def test_both_orders_cancel_the_position_bias() -> None:
    """good/bad: (3 + 1/3 - (3 - 1/3)) / 2 = 1/3, flipped: 3.3 and 2.7 both favour the first. Long: 13 / 3 = 4.3 > 3."""
    judge = Biased()
    margin, flipped, _ = judge.verdicts(PROMPTS, FIRST, SECOND)
    torch.testing.assert_close(margin, torch.tensor([1 / 3, -1 / 3, 13 / 3, -1 / 3, 0.0, 0.0]))
    assert flipped[:4].tolist() == [1, 1, 0, 1]
    assert flipped[4].isnan()  # identical: not asked
    assert len(judge.asked) == 10


def test_one_order_asks_half_and_keeps_the_bias() -> None:
    prompts = [f"prompt {i}" for i in range(200)]
    shown = []
    for seed in (0, 1):
        judge = Biased(both_orders=False, seed=seed)
        margin, flipped, _ = judge.verdicts(prompts, ["aa"] * 200, ["b"] * 200)
        assert len(judge.asked) == 200
        assert flipped.isnan().all()
        first_shown = margin > 0  # 3.3 if "aa" is shown first, else -(3 - 1/3)
        torch.testing.assert_close(margin, torch.where(first_shown, 10 / 3, -8 / 3))
        assert 70 < first_shown.sum() < 130
        shown.append(first_shown)
    assert not torch.equal(*shown)


def test_a_missing_answer_in_either_order_is_no_verdict() -> None:
    """A text that fails when shown first: its pair is invalid, whichever side it is on, and no other pair."""
    judge = Biased(broken=["bad"])
    margin, flipped, _ = judge.verdicts(PROMPTS, FIRST, SECOND)
    assert margin.isnan().tolist() == [True, True, False, False, False, False]
    assert flipped.isnan().tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("answer", [math.inf, -math.inf, NAN])
def test_an_infinite_answer_is_no_verdict(answer: float) -> None:
    class Infinite(Biased):
        def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
            return torch.full((len(prompts),), answer)

    for both_orders in (True, False):
        assert Infinite(both_orders).margins(["p"], ["a"], ["b"]).isnan().all()


# ---- judges made of others -----------------------------------------------------------------------


def test_length_control_subtracts_the_difference_in_characters() -> None:
    inner = FunctionJudge(lambda prompts, first, second: [2.0, 2.0, None])
    judge = LengthControlledJudge(inner, 0.5)
    margins = judge.margins(["p"] * 3, ["abcdef", "a", "a"], ["ab", "abc", "b"])
    torch.testing.assert_close(margins, torch.tensor([0.0, 3.0, NAN]), equal_nan=True)


def test_length_control_passes_flips_on() -> None:
    assert LengthControlledJudge(Biased(), 0.1).verdicts(PROMPTS, FIRST, SECOND).flipped[:4].tolist() == [1, 1, 0, 1]


def test_all_of_needs_everybody() -> None:
    """Agreement wins by the smaller margin; a contradiction or a tie is a tie; one that cannot tell spoils it."""
    one = FunctionJudge(lambda *_: [2.0, -1.0, 2.0, 2.0, 2.0, None])
    two = FunctionJudge(lambda *_: [0.5, -3.0, -2.0, 0.0, None, -1.0])
    judge = AllOfJudge({"one": one, "two": two})
    margins = judge.margins(["p"] * 6, ["a"] * 6, ["b"] * 6)
    torch.testing.assert_close(margins, torch.tensor([0.5, -1.0, 0.0, 0.0, NAN, NAN]), equal_nan=True)


def test_all_of_is_flipped_where_one_of_them_is() -> None:
    judge = AllOfJudge({"biased": Biased(), "longer": FunctionJudge(longer)})
    flipped = judge.verdicts(PROMPTS, FIRST, SECOND).flipped
    assert flipped[:4].tolist() == [1, 1, 0, 1]
    assert AllOfJudge(dict.fromkeys("ab", FunctionJudge(longer))).verdicts(PROMPTS, FIRST, SECOND).flipped.isnan().all()


def test_all_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"judge.judges=\['one'\] are too few"):
        AllOfJudge({"one": RandomJudge()})


def test_a_random_judge_is_fair_and_fixed() -> None:
    prompts = [f"prompt {i}" for i in range(1000)]
    first, second = ["a"] * 1000, ["b"] * 1000
    wins = RandomJudge().margins(prompts, first, second)
    assert set(wins.tolist()) == {1.0, -1.0}
    assert 440 < (wins > 0).sum() < 560
    assert torch.equal(wins, RandomJudge().margins(prompts, first, second))
    assert not torch.equal(wins, RandomJudge(seed=1).margins(prompts, first, second))


# ---- fingerprints --------------------------------------------------------------------------------


class Named(RewardModel):
    def __init__(self, name: str | None):
        self.name = name

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return torch.zeros(len(completions))

    @property
    def fingerprint(self) -> str | None:
        return self.name


def test_fingerprints_of_rules_follow_what_they_are_made_of() -> None:
    def rules(name: str | None, coefficient: float = 0.1) -> list[str | None]:
        judge = RewardJudge(Named(name))
        return [
            judge.fingerprint,
            LengthControlledJudge(judge, coefficient).fingerprint,
            AllOfJudge({"a": judge, "b": RewardJudge(Named("other"))}).fingerprint,
        ]

    assert rules(None) == [None] * 3
    assert rules("a") == rules("a")
    assert len({*rules("a"), *rules("b")}) == 6
    assert rules("a")[1] != rules("a", 0.2)[1]


# ---- functions by name ---------------------------------------------------------------------------


def test_functions_by_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_scores.py").write_text(
        "def judge(prompts, first, second):\n    return [1.0 for _ in prompts]\n"
        "def reward(prompts, completions):\n    return [None for _ in prompts]\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert FunctionJudge("my_own_scores:judge").margins(["p"], ["a"], ["b"]).tolist() == [1.0]
    assert FunctionReward("my_own_scores:reward").scores(["p"], ["a"]).isnan().all()
    for name, reason in {
        "my_own_scores.judge": "has no colon",
        "my_own_scores:nothing": "cannot be imported",
        "no_such_module:judge": "cannot be imported",
        "my_own_scores:number": "is a int and cannot be called",
    }.items():
        with pytest.raises(ConfigError, match=rf"judge.function='{name}' {reason}.*=package.module:function") as caught:
            FunctionJudge(name)
        assert "\n" not in str(caught.value)
