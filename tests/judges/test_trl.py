"""Judges of TRL's kind, and functions that say by their parameters what they are."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import TrainerFactory, step_logs
from datasets import Dataset

from xpo import PairRMJudge, RewardJudge
from xpo.config.errors import ConfigError
from xpo.judges import FunctionJudge, TRLJudge
from xpo.training.judging import as_judge

NAN = math.nan
PROMPTS = ["a prompt", [{"role": "user", "content": "another"}], "third", "fourth"]
FIRST = ["longer text", "short", "same length", "equal"]
SECOND = ["text", "much longer text", "other thing", "equal"]


class TRLRankOfTheLonger:
    """As TRL's pairwise judges answer: 0, the first is best; 1, the second; -1, invalid. It shuffles by itself."""

    def __init__(self, form: Callable[[int], Any] = lambda best: best) -> None:
        self.form = form
        self.asked: list[Any] = []

    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[Any]:
        assert shuffle_order is False
        assert all(isinstance(prompt, str) for prompt in prompts)
        self.asked += completions
        sizes = [(len(one), len(two)) for one, two in completions]
        return [-1 if one == two else self.form(int(two > one)) for one, two in sizes]


class TRLBinary:
    """As TRL's binary judges: each completion alone is right (1), wrong (0) or invalid (-1)."""

    def judge(
        self, prompts: list[str], completions: list[str], gold_completions: Any = None, shuffle_order: bool = True
    ) -> list[int]:
        return [-1 if "?" in text else int("yes" in text) for text in completions]


class TRLRandom:
    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        return [random.randint(0, 1) for _ in prompts]


@pytest.mark.parametrize("form", [lambda best: best, lambda best: [best, 1 - best]], ids=["best", "ranking"])
def test_the_index_of_the_best_is_the_winner(form: Callable[[int], Any]) -> None:
    """Whichever stands first: the rank 1 of the second must never be a win of the first."""
    judge = TRLJudge(TRLRankOfTheLonger(form))
    wanted = torch.tensor([1.0, -1.0, NAN, 0.0])  # identical texts are a tie that nobody is asked
    torch.testing.assert_close(judge.margins(PROMPTS, FIRST, SECOND), wanted, equal_nan=True)
    torch.testing.assert_close(judge.margins(PROMPTS, SECOND, FIRST), -wanted, equal_nan=True)


def test_the_order_is_drawn_once_for_a_pair() -> None:
    """In place of the judge's own shuffling, so that a resumed run asks the same; half of the pairs are swapped."""
    pairs = [(f"prompt {i}", f"one {i}", f"the other {i}") for i in range(100)]
    orders = []
    for _ in range(2):
        inner = TRLRankOfTheLonger()
        TRLJudge(inner).margins(*map(list, zip(*pairs, strict=True)))
        orders.append(inner.asked)
    assert orders[0] == orders[1]
    assert 30 < sum(one.startswith("the other") for one, _ in orders[0]) < 70


def test_a_judge_of_single_completions() -> None:
    first, second = ["yes", "no", "yes", "yes?"], ["no", "yes", "yes, too", "no"]
    margins = TRLJudge(TRLBinary()).margins(["p"] * 4, first, second)
    torch.testing.assert_close(margins, torch.tensor([1.0, -1.0, 0.0, NAN]), equal_nan=True)


@pytest.mark.parametrize("answer", [0.7, 2, True, "0", [0, 0], [0, 1, 2], None])
def test_any_other_answer_is_named(answer: Any) -> None:
    class Other:
        def judge(self, prompts: list[str], completions: list[list[str]]) -> list[Any]:
            return [answer] * len(prompts)

    with pytest.raises(ConfigError, match=r"judge=Other answered .*; return the index of the best completion, 0 or 1"):
        TRLJudge(Other()).margins(["p"], ["a"], ["b"])


def test_what_stands_for_a_judge() -> None:
    assert isinstance(as_judge(TRLRankOfTheLonger()), TRLJudge)
    assert isinstance(as_judge(TRLRandom), TRLJudge)  # a class
    assert isinstance(as_judge(lambda prompts, first, second: []), FunctionJudge)
    with pytest.raises(ConfigError, match=r"judge.model='llm-blender/PairRM-hf' is not on this machine"):
        as_judge("pair_rm")
    with pytest.raises(ConfigError, match=r"judge.model='llm-blender/PairRM-hf' is not on this machine"):
        as_judge(PairRMJudge)
    with pytest.raises(ConfigError, match=r"judge=RewardJudge is a class \(.*\); pass an object"):
        as_judge(RewardJudge)
    with pytest.raises(ConfigError, match=r"judge=3 is no judge; pass an xpo.judges.Judge, a function"):
        as_judge(3)

    class Strange:
        def judge(self, texts: Any) -> Any: ...

    with pytest.raises(ConfigError, match=r"judge=Strange: its judge\(texts\) is not TRL's judge"):
        as_judge(Strange())


def test_a_bound_method_of_trls_is_not_a_function() -> None:
    """It would take three texts: the second completions in the place of `shuffle_order`."""
    with pytest.raises(ConfigError, match=r"has the parameters .*shuffle_order.*; pass the judge itself"):
        as_judge(TRLRankOfTheLonger().judge)


OTHERS: list[Callable[..., Any]] = [
    lambda prompts, completions: [],  # a reward
    lambda prompts, completions, threshold: [],
    lambda prompts, completions, shuffle_order: [],
    lambda prompts, pairs, strict=True: [],  # the second would be `strict`
    lambda prompts: [],
    lambda a, b, c, d: [],
    lambda a, b, *, c: [],
]


@pytest.mark.parametrize("function", OTHERS)
def test_functions_that_are_something_else(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"judge.function has the parameters .*name them prompts, first, second"):
        FunctionJudge(function)


def longer(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str], bonus: list[float]) -> list[float]:
    return [len(a) - len(b) + more for a, b, more in zip(first, second, bonus, strict=True)]


def test_a_judge_gets_the_columns_that_it_names(make_trainer: TrainerFactory) -> None:
    """The bonus outweighs any difference in length: the policy always wins."""
    data = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(8)], "bonus": [100.0] * 8})
    trainer = make_trainer(judge=longer, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert [log["preference/win_rate"] for log in step_logs(trainer)] == [1.0, 1.0]
    assert trainer.evaluate()["eval_win_rate"] == 1.0
    with pytest.raises(
        ConfigError, match=r"judge.function needs 'bonus', and train_dataset has the columns .*; add it"
    ):
        make_trainer(judge=longer)


def test_a_random_judge_trains(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(judge=TRLRandom(), reward_model=lambda p, c: [1.0 for _ in c])
    trainer.train()
    log = step_logs(trainer)[-1]
    assert log["preference/invalid_rate"] == 0
    assert "objective/model_scores" in log
