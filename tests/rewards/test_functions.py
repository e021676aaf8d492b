"""Functions as reward models: called by the names of their parameters; what they may return."""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TrainerFactory, step_logs
from datasets import Dataset

from xpo.config.errors import ConfigError
from xpo.data.prompts import Batch
from xpo.judges import FunctionJudge, Judge, LengthControlledJudge, PairwiseJudge, RewardJudge
from xpo.judges.labelling import IN_VAIN
from xpo.rewards import FunctionReward, MixReward, RewardModel
from xpo.rewards.base import numbers, one_per_pair

CHAT = [{"role": "user", "content": "2 + 2?"}]
BEGUN = [*CHAT, {"role": "assistant", "content": "It is"}]


def called(function: Callable[..., Any], prompts: list[Any], completions: list[str], **columns: Any) -> torch.Tensor:
    tokens = [[len(text)] for text in completions]
    return FunctionReward(function).scores(Batch(prompts, columns), Batch(completions, {"completion_ids": tokens}))


def test_trls_functions_are_called_by_name() -> None:
    """Completions of conversational prompts are messages there; a begun answer is a part of its message."""
    seen: dict[str, Any] = {}

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        seen.update(kwargs, completions=completions)
        return [1.0, 2.0, 3.0]

    prompts = ["text", CHAT, BEGUN]
    assert called(reward, prompts, ["a", "b", " four"], answer=[1, 2, 3]).tolist() == [1, 2, 3]
    assert seen == {
        "prompts": prompts,
        "completions": [
            "a",
            [{"role": "assistant", "content": "b"}],
            [{"role": "assistant", "content": "It is four"}],
        ],
        "completion_ids": [[1], [1], [5]],
        "answer": [1, 2, 3],
    }


def test_a_function_gets_what_it_names() -> None:
    """In any order, and completions as text where it does not take everything."""

    def right(completions: list[str], solution: list[str], prompts: list[Any], scale: float = 2.0) -> list[float]:
        assert prompts == ["x", CHAT]
        return [scale * (one == two) for one, two in zip(completions, solution, strict=True)]

    assert called(right, ["x", CHAT], ["4", "5"], solution=["4", "4"]).tolist() == [2.0, 0.0]
    ids = called(lambda completions, completion_ids: [len(row) for row in completion_ids], ["x"], ["4"])
    assert ids.tolist() == [1]


@pytest.mark.parametrize(
    "function",
    [
        lambda p, c: [len(text) for text in c],
        lambda prompts, answers: [len(text) for text in answers],
        lambda *texts: [len(text) for text in texts[1]],
        lambda p, c, scale=1: [scale * len(text) for text in c],
    ],
)
def test_other_names_are_called_by_position(function: Callable[..., Any]) -> None:
    assert called(function, ["prompt"], ["four"], other=["column"]).tolist() == [4.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts: [],
        lambda text: [],
        lambda prompts, first, second: [],
        lambda completion_ids, prompts: [],
        lambda a, b, c: [],
        lambda a, *, b: [],
        lambda: [],
        lambda a, b=None: [],
    ],
)
def test_a_function_that_fits_neither_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"reward_model.function has the parameters .*; name them prompts, completi"):
        FunctionReward(function)


def solution_reward(completions: Sequence[str], solution: Sequence[str]) -> list[float]:
    return [float(len(right)) for right in solution]


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {i}", "solution": "x" * 7, "unread": None} for i in range(count)]


def within(kind: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The function as reward, in a mix, or under a judge that is made of another."""
    reward = FunctionReward(function)
    if kind == "mix":
        return {"reward_model": MixReward({"a": reward}, {"a": 1.0})}
    if kind == "rule":
        return {"reward_model": None, "judge": LengthControlledJudge(RewardJudge(reward), 0.0)}
    return {"reward_model": function}


@pytest.mark.parametrize("kind", ["alone", "mix", "rule"])
@pytest.mark.parametrize("data", ["list", "table", "stream"])
def test_columns_reach_a_reward_in_training_and_evaluation(make_trainer: TrainerFactory, kind: str, data: str) -> None:
    given: Any = rows() if data == "list" else Dataset.from_list(rows())
    given = given.to_iterable_dataset() if data == "stream" else given
    trainer = make_trainer(**within(kind, solution_reward), train_dataset=given, eval_dataset=given)
    trainer.train()
    log = step_logs(trainer)[-1] | trainer.evaluate()
    assert log["preference/tie_rate"] == 1  # the same solution on both sides
    if kind != "rule":
        assert (log["objective/model_scores"], log["eval_score"]) == (7.0, 7.0)


@pytest.mark.parametrize("kind", ["alone", "mix", "rule"])
def test_a_missing_column_is_named_before_anything_is_sampled(make_trainer: TrainerFactory, kind: str) -> None:
    bare = Dataset.from_dict({"prompt": ["a", "b"]})
    reason = r"reward_model.function needs 'solution', and {} has the columns"
    with pytest.raises(ConfigError, match=reason.format("train_dataset")):
        make_trainer(**within(kind, solution_reward), train_dataset=bare)
    with pytest.raises(ConfigError, match=reason.format("eval_dataset")):
        make_trainer(**within(kind, solution_reward), train_dataset=rows(), eval_dataset=bare)


def test_several_rewards_are_their_weighted_sum(make_trainer: TrainerFactory) -> None:
    def one(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    def ten(prompts: list[str], completions: list[str]) -> list[float]:
        return [10.0] * len(completions)

    def mean(**options: Any) -> float:
        trainer = make_trainer(reward_model=[one, ten], **options)
        trainer.train()
        return step_logs(trainer)[-1]["objective/model_scores"]

    assert mean() == 11.0
    assert mean(reward_weights=[2.0, -0.1]) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"reward_funcs holds 2, .* and reward_weights 1; give one of each"):
        mean(reward_weights=[1.0])


# ---- what comes back ---------------------------------------------------------------------------------

GOOD = [
    [1, 2.5],
    (True, None),
    np.array([1.0, 2.0], dtype=np.float32),
    [np.float32(1), np.int64(2)],
    torch.tensor([1, 2]),
    [torch.tensor(1.0), torch.tensor([2.0])],
    [math.inf, 1e300],
    [Decimal("0.5"), 1],
    (value for value in (1, 2)),
]
BAD = [
    None,
    "ab",
    ["1", "2"],
    [[1.0], [2.0]],
    [1 + 2j, 0],
    torch.tensor([1j, 2]),
    [b"1", 2],
    [{}, 1],
    [10**400, 1],
    [torch.tensor([1.0, 2.0]), 1],
    object(),
]


@pytest.mark.parametrize("values", GOOD, ids=range(len(GOOD)))
def test_numbers_of_any_kind_are_taken(values: Any) -> None:
    result = numbers("key", values)
    assert result.dtype == torch.float32
    assert result.shape == (2,)


@pytest.mark.parametrize("values", BAD, ids=range(len(BAD)))
def test_what_is_no_number_is_named(values: Any) -> None:
    """By a function, by a judge and a reward model of one's own."""

    class Own(Judge):
        def margins(self, *_: Any) -> Any:
            return values

    class Shown(PairwiseJudge):
        def preferences(self, *_: Any) -> Any:
            return values

    class OwnReward(RewardModel):
        def scores(self, *_: Any) -> Any:
            return values

    texts = ["p", "q"], ["a", "b"], ["c", "d"]
    for judge in (FunctionJudge(lambda p, a, b: values), Own(), Shown(), RewardJudge(OwnReward())):
        with pytest.raises(ConfigError, match=r"^(judge|judge.function|reward_model) returned .*; return") as caught:
            one_per_pair("judge", judge.verdicts(*texts).margin, texts[0])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, math.inf, -1e300, math.nan])
def test_a_judge_that_never_gives_a_verdict_stops_the_run(make_trainer: TrainerFactory, value: float | None) -> None:
    """The bonus alone would be trained; a step with one verdict begins the count anew."""
    calls = 0

    def judge(prompts: list[Any], first: list[str], second: list[str]) -> list[Any]:
        nonlocal calls
        calls += 1
        return [1.0 if calls == 3 else value, *[value] * (len(prompts) - 1)]

    trainer = make_trainer(judge=judge, max_steps=3 * IN_VAIN)
    with pytest.raises(RuntimeError, match=f"judge gave no verdict in {IN_VAIN} steps in a row .*; mend it"):
        trainer.train()
    assert trainer.state.global_step == 3 + IN_VAIN - 1


def test_the_best_of_n_are_no_verdict_where_nothing_is_scored(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(
        reward_model=lambda prompts, completions: [None] * len(completions), sampler="best_of_n", max_steps=2 * IN_VAIN
    )
    with pytest.raises(RuntimeError, match=f"judge gave no verdict in {IN_VAIN} steps in a row"):
        trainer.train()
