"""Whether the policy explores: different completions of a prompt, and n-grams that the reference does not say."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TrainerFactory, prompts
from datasets import Dataset
from test_evaluator import CountedSampler, ending, timeless
from transformers import LlamaForCausalLM

from xpo import XPOConfig
from xpo.config.compose import checked, compose
from xpo.config.errors import ConfigError
from xpo.config.schema import identity, to_dict
from xpo.data.store import Store
from xpo.evaluation import probe
from xpo.evaluation.probe import MEASURES, Draw, Probe, measured
from xpo.models.loading import tiny_model
from xpo.sampling.noise import EVAL_POLICY, EVAL_REFERENCE

PROBED = {"probe_prompts": 3, "probe_samples": 4}


def certain(seed: int = 0) -> LlamaForCausalLM:
    """A tiny model that always takes its likeliest token."""
    model = tiny_model(seed)
    model.generation_config.eos_token_id = [511]
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    return model


def exploration(metrics: dict[str, float]) -> tuple[float, float]:
    unique, novel = (metrics[f"eval_{name}"] for name in MEASURES)
    return unique, novel


def test_the_figures_of_two_prompts_by_hand() -> None:
    """2 of 3 and 3 of 3 completions are different. Of 1234 2345 9999 the reference knows 2345, of another prompt."""
    said = [(0, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5]), (0, [7]), (5, [9, 9, 9, 9]), (5, []), (5, [1, 2])]
    unique, novel = measured(said, {(2, 3, 4, 5), (6, 6, 6, 6)})
    assert unique == pytest.approx((2 / 3 + 1) / 2)
    assert novel == pytest.approx(2 / 3)


def test_completions_too_short_for_an_ngram_say_nothing_of_novelty() -> None:
    unique, novel = measured([(0, [1, 2, 3]), (0, [1, 2])], set())
    assert unique == 1
    assert math.isnan(novel)


def test_a_policy_that_never_varies_and_one_that_says_what_the_reference_says(make_trainer: TrainerFactory) -> None:
    """One of four completions is different; the same model says nothing new, another one nothing else."""
    given: dict[str, Any] = {"eval_dataset": prompts(5), **PROBED}
    same = make_trainer(model=certain(), ref_model=certain(), **given).evaluate()
    assert exploration(same) == (0.25, 0.0)
    other = make_trainer(model=certain(), ref_model=certain(1), **given).evaluate()
    assert exploration(other) == (0.25, 1.0)
    assert exploration(make_trainer(model=ending(), **given).evaluate())[0] > 0.75


def test_the_batch_size_changes_nothing_and_the_number_of_samples_no_draw(make_trainer: TrainerFactory) -> None:
    given: dict[str, Any] = {"model": ending(), "ref_model": ending(1), "eval_dataset": prompts(5)}
    figures = [
        exploration(make_trainer(**given, **PROBED, per_device_eval_batch_size=size).evaluate()) for size in (1, 5, 16)
    ]
    assert figures[0] == figures[1] == figures[2]
    rows = [{"prompt_ids": [1, 2]}, {"prompt_ids": [3]}]
    few, more = (Probe(None, None, 2, samples).wanted(rows) for samples in (2, 3))  # type: ignore[arg-type]
    assert few == [Draw(0, [1, 2], 0), Draw(0, [1, 2], 1), Draw(1, [3], 0), Draw(1, [3], 1)]
    assert [draw for draw in more if draw.number < 2] == few


def test_the_probe_leaves_the_evaluation_as_it_was(make_trainer: TrainerFactory) -> None:
    """And has noise of its own: its draws are not those that are judged."""
    given: dict[str, Any] = {"model": ending(), "ref_model": ending(1), "eval_dataset": prompts(5)}
    plain = make_trainer(**given)
    probed = make_trainer(**given, **PROBED)
    without, both = timeless(plain.evaluate()), timeless(probed.evaluate())
    assert {name: value for name, value in both.items() if "exploration" not in name} == without
    assert plain.evaluator.records == probed.evaluator.records
    assert not {probe.PROBE_POLICY, probe.PROBE_REFERENCE} & {EVAL_POLICY, EVAL_REFERENCE}


def test_equal_prompts_are_probed_once(make_trainer: TrainerFactory) -> None:
    twice = Dataset.from_dict({"prompt": ["one", "one", "two", "three"]})
    trainer = make_trainer(eval_dataset=twice, probe_prompts=2, probe_samples=2)
    wanted = trainer.evaluator.probe.wanted(trainer.eval_dataset)
    assert [(draw.place, draw.number) for draw in wanted] == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_the_reference_is_asked_once_in_a_run_and_once_in_a_sweep(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sampler = CountedSampler(monkeypatch)
    given: dict[str, Any] = {"eval_dataset": prompts(5), **PROBED}
    trainer = make_trainer(**given)
    first = timeless(trainer.evaluate())
    assert sampler.pop(trainer) == (5 + 12, 5 + 12)
    assert timeless(trainer.evaluate()) == first
    assert sampler.pop(trainer) == (5 + 12, 0)
    store = str(tmp_path / "reference.sqlite")
    for drawn in (5 + 12, 0):
        stored = make_trainer(**given, reference_store=store)
        assert timeless(stored.evaluate()) == first
        assert sampler.pop(stored) == (5 + 12, drawn)
    assert isinstance(stored.draws.store, Store)


def test_other_prompts_of_the_same_set_are_asked_anew(make_trainer: TrainerFactory) -> None:
    others = Dataset.from_dict({"prompt": [f"The sky of day {i}" for i in range(4)]})
    given: dict[str, Any] = {"model": ending(), "ref_model": ending(1), **PROBED}
    expected = exploration(make_trainer(**given).evaluate(others))
    trainer = make_trainer(**given, eval_dataset=prompts(4))
    own = exploration(trainer.evaluate())
    assert exploration(trainer.evaluate(others)) == expected
    assert exploration(trainer.evaluate()) == own


@pytest.mark.parametrize("samples", [4, 3])  # 12 draws, and 9, of which one rank has more
def test_the_ranks_share_the_draws_and_know_them_all(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    options: dict[str, Any] = {"probe_prompts": 3, "probe_samples": samples}
    trainer = make_trainer(model=ending(), ref_model=ending(1), eval_dataset=prompts(5), **options)
    alone: list[list[Any]] = []
    monkeypatch.setattr(probe, "gather_object", lambda rows: alone.append(rows) or rows)
    rows = list(trainer.eval_dataset)
    trainer.evaluator.probe(trainer.model, rows, trainer.accelerator, trainer.args, "eval")
    shared: list[list[Any]] = [[], []]
    for rank in range(2):
        args = SimpleNamespace(
            process_index=rank, world_size=2, eval_batch_size=2, device=trainer.args.device, seed=trainer.args.seed
        )
        parts: list[list[Any]] = []
        monkeypatch.setattr(probe, "gather_object", lambda rows, parts=parts: parts.append(rows) or rows)
        one = Probe(trainer.draws.sampler, trainer.draws, 3, samples)
        one(trainer.model, rows, trainer.accelerator, args, "eval")  # type: ignore[arg-type]
        shared = [before + now for before, now in zip(shared, parts, strict=True)]
    for together, apart in zip(alone, shared, strict=True):
        assert len(together) == 3 * samples
        assert sorted(together) == sorted(apart)


def test_the_best_model_may_be_the_one_that_explores(make_trainer: TrainerFactory) -> None:
    best = {"metric_for_best_model": "exploration/unique", "eval_dataset": prompts(3)}
    assert make_trainer(**best, **PROBED).args.greater_is_better
    with pytest.raises(ConfigError, match="metric_for_best_model='exploration/unique' is not measured"):
        make_trainer(**best)


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^probe_prompts=4 draws the same .* with temperature=0; set"):
        XPOConfig(output_dir=str(tmp_path), use_cpu=True, probe_prompts=4, temperature=0.0)
    for word, message in {
        "generation.temperature=0": r"evaluation.probe_prompts=4 draws .* with generation.temperature=0",
        "data.eval=null": "evaluation.probe_prompts=4 needs held-out prompts and data.eval=None; set data.eval",
    }.items():
        with pytest.raises(ConfigError, match=message):
            checked(compose(["experiment=smoke", "evaluation.probe_prompts=4", word])[0])


def test_a_probe_is_another_run_and_no_probe_is_not() -> None:
    plain, probed = (
        identity(to_dict(checked(compose(["experiment=smoke", f"evaluation.probe_prompts={n}"])[0]))) for n in (0, 4)
    )
    assert "probe_prompts" not in plain["evaluation"]
    assert probed["evaluation"]["probe_prompts"] == 4
