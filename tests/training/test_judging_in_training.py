"""Judges inside the trainer: what they cost a run when they fail, and what of them a checkpoint keeps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrainerFactory, prompts, share_of_e, step_logs
from torch import Tensor

from xpo.config.errors import ConfigError, JudgeStopped
from xpo.data.prompts import Prompt
from xpo.judges import Judge, PairwiseJudge
from xpo.judges.labelling import ScoreScale
from xpo.rewards import FunctionReward, MixReward, VaderReward
from xpo.tracking.runs import is_complete


class Limited(Judge):
    """Prefers more e's; answers so many calls and then stops. Counts over resumes."""

    def __init__(self, calls: int):
        self.calls = calls
        self.made = 0

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        if self.made == self.calls:
            raise JudgeStopped(f"judge.calls={self.calls} is used up")
        self.made += 1
        return torch.tensor(share_of_e(prompts, first)) - torch.tensor(share_of_e(prompts, second))

    def state(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def close(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name


def test_a_judge_that_stops_leaves_a_checkpoint_that_goes_on(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """Stopped in step 3, resumed with a larger budget: the logs of an uninterrupted run, and no call forgotten."""
    whole = make_trainer(judge=Limited(100), max_steps=4, output_dir=str(tmp_path / "whole"))
    whole.train()
    stopped = make_trainer(judge=Limited(2), max_steps=4)
    with pytest.raises(JudgeStopped, match=r"judge\.calls=2"):
        stopped.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert is_complete(checkpoint)
    judge = Limited(100)
    resumed = make_trainer(judge=judge, max_steps=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    close(step_logs(resumed), step_logs(whole))
    assert judge.made == 4


def test_a_judge_that_stops_in_an_evaluation_leaves_a_checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(judge=Limited(2), eval_dataset=prompts(4), eval_strategy="steps", eval_steps=2)
    with pytest.raises(JudgeStopped):
        trainer.train()
    assert is_complete(tmp_path / "out" / "checkpoint-2")


def test_a_judge_that_stops_at_once_leaves_nothing_behind(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    with pytest.raises(JudgeStopped):
        make_trainer(judge=Limited(0)).train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "soft", "label_temperature": 0.1},
        {"labels": "sampled", "label_temperature": 0.1},
        {"labels": "sampled", "tie_threshold": 0.05},
        {"normalize_scores": True, "clip_scores": 1.0, "labels": "soft"},
    ],
    ids=["soft", "sampled", "threshold", "normalized"],
)
def test_labels_do_not_depend_on_accumulation_or_on_a_restart(
    make_trainer: TrainerFactory, tmp_path: Path, options: dict[str, Any]
) -> None:
    """4 x 1 = 1 x 4 = stopped after two of four steps and resumed."""
    shared = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1} | options
    whole = make_trainer(**shared)
    whole.train()
    parts = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=4, **shared)
    parts.train()
    close(step_logs(parts), step_logs(whole))
    begun = make_trainer(save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "begun"), **shared)
    begun.train()
    resumed = make_trainer(**shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "begun" / "checkpoint-2"))
    close(step_logs(resumed), step_logs(whole))


def test_the_kinds_of_labels_train_differently(make_trainer: TrainerFactory) -> None:
    losses = []
    for options in ({}, {"labels": "soft"}, {"labels": "sampled"}, {"tie_threshold": 1.0}):
        trainer = make_trainer(max_steps=1, **options)
        trainer.train()
        losses.append(step_logs(trainer)[0] | options)
    assert losses[3]["loss/dpo"] == 0
    assert losses[3]["preference/tie_rate"] == 1
    for entry in losses[:3]:  # the policy is the reference: every decided pair costs log 2, whatever its label
        decided = 1 - entry["preference/tie_rate"]
        assert entry["loss/dpo"] == pytest.approx(decided * math.log(2), rel=1e-4)
    assert losses[2]["preference/tie_rate"] == 0  # equals have a coin
    assert losses[0]["grad_norm"] != pytest.approx(losses[1]["grad_norm"], rel=1e-3)


def test_normalized_scores_by_hand() -> None:
    """1, 3 | 5, 7: mean 2, deviation 1; then mean 4, deviation sqrt(5). NaN stays, and counts for nothing."""

    def scaled(scale: ScoreScale, *scores: list[float]) -> Tensor:
        scale.count(torch.tensor(scores))
        return scale(torch.tensor(scores))

    scale = ScoreScale(True, None, lambda sums: sums)
    torch.testing.assert_close(scaled(scale, [1.0], [3.0]), torch.tensor([[-1.0], [1.0]]))
    second = scaled(scale, [5.0, math.nan], [7.0, math.nan])
    torch.testing.assert_close(second[:, 0], torch.tensor([1.0, 3.0]) / math.sqrt(5))
    assert second[:, 1].isnan().all()
    assert scale.moments == [4, 16, 84]
    assert scaled(ScoreScale(False, 2.0, lambda sums: sums), [-3.0, 1.0, 5.0]).tolist() == [[-2, 1, 2]]
    assert scaled(ScoreScale(True, None, lambda sums: sums), [5.0, 5.0]).tolist() == [[0, 0]]


def test_all_scores_of_best_of_n_count(make_trainer: TrainerFactory) -> None:
    """Each once, in every step: those of candidates that are not chosen, too."""
    trainer = make_trainer(sampler="best_of_n", sampler_candidates=4, normalize_scores=True, max_steps=2)
    trainer.train()
    assert trainer.labeller.scale.moments[0] == 2 * 4 * 4


@pytest.mark.parametrize("option", [{"normalize_scores": True}, {"clip_scores": 1.0}])
def test_scaled_scores_need_the_reward_model_as_judge(make_trainer: TrainerFactory, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.* changes the scores that judge=reward compares"):
        make_trainer(judge=Limited(1), **option)


def test_flips_are_logged_and_evaluated(make_trainer: TrainerFactory) -> None:
    class FirstWins(PairwiseJudge):
        def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
            return torch.tensor([5.0 + share_of_e([""], [text])[0] for text in first])

    trainer = make_trainer(judge=FirstWins(), eval_dataset=prompts(4))
    trainer.train()
    assert step_logs(trainer)[0]["preference/flip_rate"] == 1
    assert trainer.evaluate()["eval_flip_rate"] == 1


def test_the_parts_of_a_mix_are_logged_by_name(make_trainer: TrainerFactory) -> None:
    mix = MixReward({"e": FunctionReward(share_of_e), "mood": VaderReward()}, {"e": 2.0, "mood": 0.5})
    trainer = make_trainer(reward_model=mix, eval_dataset=prompts(4))
    trainer.train()
    entry = step_logs(trainer)[0]
    for side in ("model", "ref"):
        parts = [entry[f"objective/{side}_scores/{name}"] for name in ("e", "mood")]
        assert entry[f"objective/{side}_scores"] == pytest.approx(2 * parts[0] + 0.5 * parts[1], abs=1e-6)
    evaluation = trainer.evaluate()
    assert evaluation["eval_score"] == pytest.approx(
        2 * evaluation["eval_score_e"] + 0.5 * evaluation["eval_score_mood"], abs=1e-6
    )
