"""Evaluation on held-out prompts: the same prompts and noise each time, so that only the policy differs."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TrainerFactory, prompts, share_of_e
from datasets import Dataset, IterableDataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from xpo import XPOConfig, XPOTrainer
from xpo.config.errors import ConfigError
from xpo.config.options import scorer_name
from xpo.data.prompt_sets import tokenize_prompts
from xpo.data.prompts import Prompt, PromptEncoder
from xpo.evaluation.evaluator import Evaluator, summarize
from xpo.models.loading import tiny_model
from xpo.rewards import FunctionReward
from xpo.sampling.completions import Completions
from xpo.sampling.sampler import Sampler


def ending(seed: int = 0) -> LlamaForCausalLM:
    """A tiny model for which an eighth of the tokens end a completion."""
    model = tiny_model(seed)
    model.generation_config.eos_token_id = list(range(64))
    return model


def evaluated(trainer: XPOTrainer, *args: Any, **kwargs: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of an evaluation, without the time it took, and its records."""
    return timeless(trainer.evaluate(*args, **kwargs)), list(trainer.evaluator.records)


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "epoch"))}


class CountedSampler:
    """How many completions `Sampler.sample` drew from which model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.drawn: Counter[int] = Counter()
        original = Sampler.sample

        def sample(this: Sampler, model: Any, prompts: Sequence[Any], *args: Any, **options: Any) -> Completions:
            self.drawn[id(model)] += len(prompts)
            return original(this, model, prompts, *args, **options)

        monkeypatch.setattr(Sampler, "sample", sample)

    def pop(self, trainer: XPOTrainer) -> tuple[int, int]:
        """Completions of the policy and of the reference since the last call."""
        with trainer.reference.model() as reference:
            counts = self.drawn[id(trainer.model)], self.drawn[id(reference)]
        self.drawn.clear()
        return counts


# ---- the same every time -----------------------------------------------------------------------


def test_two_evaluations_of_a_policy_are_equal(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(model=ending(), eval_dataset=prompts(7))
    assert evaluated(trainer) == evaluated(trainer)


def test_runs_with_the_same_seed_answer_alike_and_another_seed_differs(make_trainer: TrainerFactory) -> None:
    one, same, other = (
        [(r["completion"], r["reference"]) for r in evaluated(make_trainer(eval_dataset=prompts(4), seed=seed))[1]]
        for seed in (1, 1, 2)
    )
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_the_batch_size_of_evaluation_changes_nothing(make_trainer: TrainerFactory) -> None:
    metrics, records = {}, {}
    for size in (1, 3, 8):
        trainer = make_trainer(
            model=ending(), ref_model=ending(1), eval_dataset=prompts(7), per_device_eval_batch_size=size
        )
        metrics[size], records[size] = evaluated(trainer)
    for size in (3, 8):
        for key in ("index", "prompt", "tokens", "ref_tokens", "completion", "reference", "ended", "label"):
            assert [r[key] for r in records[size]] == [r[key] for r in records[1]], key
        assert metrics[size] == pytest.approx(metrics[1], abs=1e-5)
    assert len({len(r["tokens"]) for r in records[1]}) > 1  # of different lengths: there was padding


def test_evaluation_leaves_the_random_state_and_the_mode_of_the_model_alone(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(eval_dataset=prompts(3))
    trainer.model.train()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    evaluated(trainer)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert random.getstate() == states[2]
    assert trainer.model.training


def test_the_ranks_share_the_prompts_and_answer_as_one_process_would(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(model=ending(), eval_dataset=prompts(5))
    _, alone = evaluated(trainer)
    shared = []
    for rank in range(2):
        args = SimpleNamespace(
            process_index=rank,
            world_size=2,
            eval_batch_size=2,
            disable_tqdm=True,
            device=trainer.args.device,
            seed=trainer.args.seed,
            eval_greedy=False,
            tie_threshold=0.0,
            ds3_gather_for_generation=True,
        )
        forwards = trainer.evaluator.forwards
        evaluator = Evaluator(trainer.draws.sampler, trainer.draws, forwards, trainer.evaluator.labeller, {})
        evaluator(trainer.model, trainer.eval_dataset, trainer.accelerator, args)  # type: ignore[arg-type]
        assert [r["index"] for r in evaluator.records] == list(range(rank, 5, 2))
        shared += evaluator.records
    for one, other in zip(sorted(shared, key=lambda record: record["index"]), alone, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["ref_tokens"] == other["ref_tokens"]


# ---- the reference -----------------------------------------------------------------------------


def test_the_reference_answers_once_and_the_policy_each_time(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = CountedSampler(monkeypatch)
    trainer = make_trainer(eval_dataset=prompts(5), per_device_eval_batch_size=2)
    _, first = evaluated(trainer)
    assert sampler.pop(trainer) == (5, 5)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(-1)
    _, second = evaluated(trainer)
    assert sampler.pop(trainer) == (5, 0)
    assert [r["reference"] for r in first] == [r["reference"] for r in second]
    assert [r["completion"] for r in first] != [r["completion"] for r in second]


def test_other_prompts_of_the_same_number_get_answers_of_their_own(make_trainer: TrainerFactory) -> None:
    """Remembered answers belong to their prompts, not to the name of the evaluation."""
    others = Dataset.from_dict({"prompt": [f"The sky of day {i}" for i in range(4)]})
    expected = evaluated(make_trainer(), others)
    trainer = make_trainer(eval_dataset=prompts(4))
    own = evaluated(trainer)
    assert evaluated(trainer, others) == expected
    assert evaluated(trainer) == own


def test_answers_are_not_mixed_up_when_the_batch_size_changes(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(eval_dataset=prompts(5), per_device_eval_batch_size=2)
    _, before = evaluated(trainer)
    trainer.args.per_device_eval_batch_size = 4
    _, after = evaluated(trainer)
    assert [r["reference"] for r in before] == [r["reference"] for r in after]


def test_a_policy_that_equals_the_reference_has_a_kl_of_zero(make_trainer: TrainerFactory) -> None:
    metrics, records = evaluated(make_trainer(eval_dataset=prompts(4)))
    assert metrics["eval_kl"] == 0
    assert all(r["completion"] != r["reference"] for r in records)  # each has noise of its own


def test_the_kl_is_the_mean_log_ratio_of_the_policys_completions(
    make_trainer: TrainerFactory, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Recomputed one completion at a time, without padding."""
    policy, reference = ending(), ending(1)
    metrics, records = evaluated(make_trainer(model=policy, ref_model=reference, eval_dataset=prompts(5)))

    def logp(model: LlamaForCausalLM, record: dict[str, Any]) -> float:
        prompt, tokens = PromptEncoder(tokenizer)(record["prompt"]), record["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None]).sum().item()

    ratios = [logp(policy, r) - logp(reference, r) for r in records]
    assert max(map(abs, ratios)) > 0.1
    assert [r["log_ratio"] for r in records] == pytest.approx(ratios, abs=1e-4)
    assert metrics["eval_kl"] == pytest.approx(np.mean(ratios), abs=1e-4)


def test_greedy_evaluation_takes_the_likeliest_tokens_of_both(
    make_trainer: TrainerFactory, tokenizer: PreTrainedTokenizerFast
) -> None:
    """policy == reference: the same texts, so that every pair is a tie."""
    trainer = make_trainer(eval_dataset=prompts(3), eval_greedy=True)
    metrics, records = evaluated(trainer)
    for record in records:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, trainer.model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        assert record["tokens"] == record["ref_tokens"] == ids[0, -6:].tolist()
    assert (metrics["eval_tie_rate"], metrics["eval_win_rate"], metrics["eval_lose_rate"]) == (1, 0, 0)


# ---- verdicts and scores -----------------------------------------------------------------------


def test_verdicts_and_scores_are_those_of_the_completions_shown(make_trainer: TrainerFactory) -> None:
    metrics, records = evaluated(make_trainer(model=ending(), eval_dataset=prompts(9)))
    own = share_of_e([""] * 9, [r["completion"] for r in records])
    reference = share_of_e([""] * 9, [r["reference"] for r in records])
    wins = np.mean([a > b for a, b in zip(own, reference, strict=True)])
    losses = np.mean([a < b for a, b in zip(own, reference, strict=True)])
    assert 0 < wins < 1
    assert metrics["eval_win_rate"] == pytest.approx(wins)
    assert metrics["eval_lose_rate"] == pytest.approx(losses)
    assert metrics["eval_tie_rate"] == pytest.approx(1 - wins - losses)
    assert metrics["eval_score"] == pytest.approx(np.mean(own), abs=1e-6)
    assert metrics["eval_ref_score"] == pytest.approx(np.mean(reference), abs=1e-6)
    assert metrics["eval_score_margin"] == pytest.approx(np.mean(own) - np.mean(reference), abs=1e-6)


def test_the_objective_of_an_iterate(make_trainer: TrainerFactory) -> None:
    """score - beta * KL, with the beta in force."""
    trainer = make_trainer(beta=[0.1, 0.5], iterations=2, eval_dataset=prompts(4), optim="sgd", learning_rate=5.0)
    trainer.train()
    metrics = trainer.evaluate()
    assert abs(metrics["eval_kl"]) > 1e-3
    assert metrics["eval_objective"] == pytest.approx(metrics["eval_score"] - 0.5 * metrics["eval_kl"])


def test_the_missing_eos_penalty_is_not_part_of_an_evaluation(make_trainer: TrainerFactory) -> None:
    with_penalty, without = (
        evaluated(make_trainer(model=ending(), eval_dataset=prompts(9), missing_eos_penalty=penalty))
        for penalty in (100.0, None)
    )
    assert with_penalty == without
    assert any(r["ended"] != r["ref_ended"] for r in without[1])  # it would have mattered


def test_invalid_verdicts_are_counted_as_such(make_trainer: TrainerFactory) -> None:
    """Of seven pairs the judge cannot tell three; the others go to the policy."""

    def judge(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float | None]:
        return [None if str(prompt)[-1] in "024" else 1.0 for prompt in prompts]

    metrics, records = evaluated(make_trainer(judge=judge, eval_dataset=prompts(7)))
    assert metrics["eval_invalid_rate"] == pytest.approx(3 / 7)
    assert metrics["eval_win_rate"] == pytest.approx(4 / 7)
    assert metrics["eval_tie_rate"] == metrics["eval_lose_rate"] == 0
    assert [r["label"] for r in records] == [0, 1, 0, 1, 0, 1, 1]
    assert "eval_score" not in metrics


def test_missing_scores_are_left_out_of_the_mean(make_trainer: TrainerFactory) -> None:
    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        return [2.0 if str(prompt)[-1] == "1" else None for prompt in prompts]

    metrics, _ = evaluated(make_trainer(reward_model=reward, eval_dataset=prompts(3)))
    assert metrics["eval_score"] == 2
    assert metrics["eval_invalid_rate"] == pytest.approx(2 / 3)


def test_a_tie_threshold_in_units_of_scaled_scores_is_none_of_raw_ones(make_trainer: TrainerFactory) -> None:
    """Scores of a hundredth: each difference is far below the threshold, which training compares with scaled ones."""

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return [0.01 * len(text) for text in completions]

    options = {"reward_model": FunctionReward(reward), "eval_dataset": prompts(8), "tie_threshold": 0.5}
    scaled, raw = (evaluated(make_trainer(normalize_scores=yes, **options))[0] for yes in (True, False))
    assert scaled["eval_tie_rate"] < 0.5
    assert raw["eval_tie_rate"] == 1


def with_scorer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, scorer: FunctionReward) -> XPOTrainer:
    return XPOTrainer(
        model=tiny_model(),
        reward_model=share_of_e,
        args=XPOConfig(
            str(tmp_path), max_steps=1, max_new_tokens=6, use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        processing_class=tokenizer,
        train_dataset=prompts(8),
        eval_dataset=prompts(4),
        scorers={"length_of_text": scorer},
    )


def test_further_scorers_see_evaluations_only(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    scored: list[str] = []

    def length(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        scored.extend(completions)
        return [float(len(text)) for text in completions]

    trainer = with_scorer(tmp_path, tokenizer, FunctionReward(length))
    trainer.train()
    assert scored == []
    metrics, records = evaluated(trainer)
    assert metrics["eval_length_of_text"] == pytest.approx(np.mean([len(r["completion"]) for r in records]))
    assert metrics["eval_ref_length_of_text"] == pytest.approx(np.mean([len(r["reference"]) for r in records]))
    assert sorted(scored) == sorted(r[key] for r in records for key in ("completion", "reference"))


def test_a_scorer_has_a_name_of_its_own(make_trainer: TrainerFactory) -> None:
    """Whatever an evaluation measures or writes down without scorers is taken."""
    trainer = make_trainer(eval_dataset=prompts(3))
    metrics, records = trainer.evaluate(), trainer.evaluator.records
    known = (
        {name.removeprefix("eval_") for name in metrics if name != "epoch"}
        | records[0].keys()
        | set(trainer.evaluator.measures)
    )
    assert {"win_rate", "objective", "runtime", "flip_rate", "label", "score"} <= known
    for name in known:
        with pytest.raises(ConfigError, match=f"'{name}' is what evaluations call something of their own"):
            scorer_name("scorers", name)
    scorer_name("scorers", "length_of_text")


def test_a_scorer_with_the_wrong_number_of_scores_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = with_scorer(tmp_path, tokenizer, FunctionReward(lambda prompts, completions: [1.0] * 9))
    with pytest.raises(ConfigError, match=r"length_of_text returned a tensor of shape \(9,\) for 4 pairs"):
        trainer.evaluate()


# ---- data sets ---------------------------------------------------------------------------------


def test_several_evaluation_sets_are_kept_apart_by_name(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = CountedSampler(monkeypatch)
    parts = {"short": prompts(3), "chat": prompts(4, chat=True)}
    trainer = make_trainer(eval_dataset=parts)
    both, _ = evaluated(trainer)
    again, _ = evaluated(trainer)
    assert both == again
    assert sampler.pop(trainer) == (14, 7)  # the reference answered each set once
    for name, part in parts.items():
        alone, _ = evaluated(make_trainer(eval_dataset=part))
        prefix = f"eval_{name}_"
        assert {f"eval_{k.removeprefix(prefix)}": v for k, v in both.items() if k.startswith(prefix)} == alone
    assert all(key.startswith(("eval_short_", "eval_chat_")) for key in both)


def test_a_stream_of_prompts_can_be_evaluated(make_trainer: TrainerFactory, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make_trainer(eval_dataset=prompts(4))
    expected, _ = evaluated(trainer)
    stream = tokenize_prompts(IterableDataset.from_generator(prompts(4).__iter__), tokenizer, 100, "drop")
    result = trainer.evaluator(trainer.model, stream, trainer.accelerator, trainer.args)
    assert timeless(result) == expected


def test_conversations_are_shown_as_text(make_trainer: TrainerFactory) -> None:
    _, records = evaluated(make_trainer(eval_dataset=prompts(2, chat=True)))
    assert [r["prompt"] for r in records] == ["Tell me about number 0", "Tell me much about number 1"]


# ---- the summary -------------------------------------------------------------------------------


def record(**values: Any) -> dict[str, Any]:
    plain = {
        "label": 0.0,
        "margin": 0.0,
        "flipped": None,
        "log_ratio": 0.0,
        "ended": True,
        "ref_ended": False,
        "tokens": [1, 2],
        "ref_tokens": [1],
    }
    return plain | values


def test_the_summary_of_four_records_is_the_one_derived_by_hand() -> None:
    """A win, a defeat, a tie and an invalid verdict, whose score is missing.

    kl          (1 + 2 - 3 + 4) / 4 = 1
    eos_rate    3 of 4; the reference never ended
    length      (5 + 2 + 1 + 4) / 4 = 3; the reference's 1
    distinct_2  12 21 12 21 | 12 | - | 12 23 34: 12 21 23 34 are 4 of 8 bigrams; the reference has none
    score       (1 + 2 + 6) / 3 = 3, the reference's 0
    """
    records = [
        record(label=1.0, margin=2.0, log_ratio=1.0, tokens=[1, 2, 1, 2, 1], score=1.0, ref_score=0.0),
        record(label=-1.0, margin=-2.0, log_ratio=2.0, ended=False, score=2.0, ref_score=0.0),
        record(log_ratio=-3.0, tokens=[1], score=6.0, ref_score=0.0),
        record(margin=float("nan"), log_ratio=4.0, tokens=[1, 2, 3, 4], score=float("nan"), ref_score=0.0),
    ]
    assert summarize(records) == pytest.approx(
        {
            "win_rate": 0.25,
            "lose_rate": 0.25,
            "tie_rate": 0.25,
            "invalid_rate": 0.25,
            "kl": 1.0,
            "eos_rate": 0.75,
            "ref_eos_rate": 0.0,
            "length": 3.0,
            "ref_length": 1.0,
            "distinct_2": 0.5,
            "ref_distinct_2": 0.0,
            "score": 3.0,
            "ref_score": 0.0,
            "score_margin": 3.0,
        }
    )


def test_an_infinite_margin_is_invalid_and_no_tie() -> None:
    summary = summarize([record(margin=float("inf")), record(margin=float("-inf"))])
    assert (summary["invalid_rate"], summary["tie_rate"], summary["win_rate"]) == (1, 0, 0)
    assert "score" not in summary
