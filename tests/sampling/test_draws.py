"""The reference's answers: drawn once, found again by every run that needs the same ones, and by no other."""

import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrainerFactory, prompts, step_logs
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from xpo import XPOTrainer
from xpo.config.errors import ConfigError
from xpo.config.options import GenerationOptions
from xpo.data.store import Store
from xpo.evaluation.probe import MEASURES
from xpo.models.loading import tiny_model
from xpo.models.reference import Reference
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.noise import EVAL_REFERENCE, REFERENCE
from xpo.sampling.sampler import Sampler
from xpo.tracking.metrics_log import read_metrics

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


def draws(
    tokenizer: PreTrainedTokenizerFast, store: Store | None = None, seed: int = 0, **options: Any
) -> ReferenceDraws:
    given = GenerationOptions(**{"max_new_tokens": 8} | options)
    sampler = Sampler(tokenizer, given, [0], given.batch_size, given.kwargs)
    return ReferenceDraws(Reference(tiny_model(seed), None, CPU), sampler, store)


def texts(
    source: ReferenceDraws, rows: list[list[int]] = PROMPTS, seed: int = 1, stream: int = REFERENCE, number: int = 0
):
    return source.draw(rows, seed, stream, number, CPU).completions.texts


def batch_sizes(monkeypatch: pytest.MonkeyPatch, of: int | None = None) -> list[int]:
    """Fills up with the number of prompts of each sampling to come; `of` one model, by its id."""
    sizes: list[int] = []
    original = Sampler.sample

    def sample(this: Sampler, model: Any, rows: list[list[int]], *arguments: Any, **options: Any) -> Any:
        if of in (None, id(model)):
            sizes.append(len(rows))
        return original(this, model, rows, *arguments, **options)

    monkeypatch.setattr(Sampler, "sample", sample)
    return sizes


def test_a_draw_depends_on_prompt_seed_stream_and_number_only(tokenizer: PreTrainedTokenizerFast) -> None:
    source = draws(tokenizer)
    expected = texts(source)
    assert texts(source, PROMPTS[::-1]) == expected[::-1]
    assert [texts(source, [row])[0] for row in PROMPTS] == expected
    others = [texts(source, seed=2), texts(source, stream=EVAL_REFERENCE), texts(source, number=1)]
    for other in others:
        assert all(a != b for a, b in zip(expected, other, strict=True))
    assert len(set(expected)) == 4


def test_equal_prompts_have_draws_of_their_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Or a data set of one prompt, many times, would see one reference completion in an epoch."""
    same = [PROMPTS[0]] * 3
    for store in (None, Store(tmp_path / "store")):
        drawn = draws(tokenizer, store).draw(same, 1, REFERENCE, 0, CPU, occurrences=[0, 1, 2]).completions.texts
        assert len(set(drawn)) == 3
        assert drawn[0] == texts(draws(tokenizer))[0]
        ahead = draws(tokenizer, store).draw(same[:1], 1, REFERENCE, 0, CPU, ahead=same[1:], occurrences=[2, 0, 1])
        assert ahead.completions.texts == drawn[2:]


@pytest.mark.parametrize("stream", [False, True])
def test_a_data_set_of_one_prompt(make_trainer: TrainerFactory, stream: bool) -> None:
    data = Dataset.from_dict({"prompt": ["again"] * 8})
    seen: list[str] = []

    def first_wins(prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[int]:
        seen.extend(second)
        return [1] * len(first)

    make_trainer(train_dataset=data.to_iterable_dataset() if stream else data, judge=first_wins).train()
    assert len(set(seen)) == 8


def test_what_is_kept_is_found_again(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = draws(tokenizer, store)
    assert source.draw(PROMPTS[:2], 1, REFERENCE, 0, CPU).fresh.tolist() == [True, True]
    again = draws(tokenizer, Store(tmp_path / "store")).draw(PROMPTS, 1, REFERENCE, 0, CPU)
    assert again.fresh.tolist() == [False, False, True, True]
    expected = draws(tokenizer).draw(PROMPTS, 1, REFERENCE, 0, CPU).completions
    assert again.completions.texts == expected.texts
    assert torch.equal(again.completions.ended, expected.ended)
    assert torch.equal(again.completions.mask, expected.mask)
    assert torch.equal(again.completions.ids[again.completions.mask], expected.ids[expected.mask])


def test_a_damaged_draw_is_made_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "store")
    expected = draws(tokenizer, store).draw(PROMPTS, 1, REFERENCE, 0, CPU).completions
    with store._connection as connection:
        connection.execute("UPDATE results SET value = x'0102030405' WHERE key = (SELECT min(key) FROM results)")
    again = draws(tokenizer, Store(tmp_path / "store")).draw(PROMPTS, 1, REFERENCE, 0, CPU)
    assert again.fresh.sum() == 1
    assert again.completions.texts == expected.texts
    assert "holds 1 damaged results" in caplog.text
    assert not draws(tokenizer, Store(tmp_path / "store")).draw(PROMPTS, 1, REFERENCE, 0, CPU).fresh.any()


def test_draws_ahead_are_made_in_the_same_batch(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = batch_sizes(monkeypatch)
    expected = texts(draws(tokenizer))
    store = Store(tmp_path / "store")
    source = draws(tokenizer, store)
    first = source.draw(PROMPTS[:1], 1, REFERENCE, 0, CPU, ahead=PROMPTS[1:3])
    assert first.completions.texts == expected[:1]
    # Computed by this run, though not in this call; what is there keeps others from being drawn ahead.
    second = source.draw(PROMPTS[1:3], 1, REFERENCE, 0, CPU, ahead=PROMPTS[3:])
    assert second.fresh.tolist() == [True, True]
    assert second.completions.texts == expected[1:3]
    assert not source.draw(PROMPTS[1:3], 1, REFERENCE, 0, CPU).fresh.any()
    assert not draws(tokenizer, store).draw(PROMPTS[:3], 1, REFERENCE, 0, CPU).fresh.any()
    last = source.draw(PROMPTS[3:], 1, REFERENCE, 0, CPU, ahead=PROMPTS[:3])  # these are there
    assert last.completions.texts == expected[3:]
    assert sizes == [4, 3, 1]


def test_without_a_store_nothing_is_drawn_ahead(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = batch_sizes(monkeypatch)
    draws(tokenizer).draw(PROMPTS[:1], 1, REFERENCE, 0, CPU, ahead=PROMPTS[1:])
    assert sizes == [1]


@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 7}, {"top_k": 3}])
def test_another_reference_or_other_sampling_shares_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, other: dict[str, Any]
) -> None:
    store = Store(tmp_path / "store")
    source = draws(tokenizer, store)
    source.draw(PROMPTS, 1, REFERENCE, 0, CPU)
    assert not draws(tokenizer, store).draw(PROMPTS, 1, REFERENCE, 0, CPU).fresh.any()
    assert not draws(tokenizer, store, batch_size=1).draw(PROMPTS, 1, REFERENCE, 0, CPU).fresh.any()
    assert draws(tokenizer, store, **other).draw(PROMPTS, 1, REFERENCE, 0, CPU).fresh.all()


def test_the_fingerprint_is_that_of_the_frozen_weights(make_trainer: TrainerFactory) -> None:
    """Adapters on top, trained or not, change nothing; one weight does."""
    plain = make_trainer().reference.fingerprint
    lora = make_trainer(
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), learning_rate=0.1
    )
    assert lora.reference.fingerprint == plain
    lora.train()
    assert lora.reference.fingerprint == plain
    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    assert make_trainer(ref_model=other).reference.fingerprint != plain


def runs_alike(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name


def test_a_second_run_computes_no_reference_again(
    make_trainer: TrainerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold = warm = without a store; other alpha, beta and batch find the same answers."""
    store = str(tmp_path / "store.sqlite")
    shared = {"max_steps": 4, "eval_dataset": prompts(5), "eval_strategy": "steps", "eval_steps": 2}
    without, cold, warm, other = (
        make_trainer(**(shared | options))
        for options in (
            {},
            {"reference_store": store},
            {"reference_store": store},
            {"reference_store": store, "alpha": 1e-2, "beta": 0.5, "per_device_train_batch_size": 2, "max_steps": 8},
        )
    )
    drawn: list[int] = []
    original = Sampler.sample

    def sample(this: Sampler, model: Any, rows: list[list[int]], *arguments: Any, **options: Any) -> Any:
        drawn.append(id(model))
        return original(this, model, rows, *arguments, **options)

    monkeypatch.setattr(Sampler, "sample", sample)
    for trainer, rate in ((without, None), (cold, 0.0), (warm, 1.0), (other, 1.0)):
        drawn.clear()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(entry.get("perf/reference_hit_rate") == rate for entry in logs)
        if rate == 1.0:
            assert id(trainer.reference.frozen) not in drawn
    assert step_logs(without) == step_logs(cold) == step_logs(warm)  # to the last bit
    drawn_each = [tokens_of_steps(trainer) for trainer in (without, cold, warm)]
    assert drawn_each[0] == pytest.approx(drawn_each[1])
    assert all(found < both for both, found in zip(*drawn_each[1:], strict=True))  # the policy's alone
    evaluations = [
        [
            {k: v for k, v in entry.items() if "runtime" not in k}
            for entry in trainer.state.log_history
            if "eval_kl" in entry
        ]
        for trainer in (without, cold, warm)
    ]
    assert evaluations[0] == evaluations[1] == evaluations[2]


def tokens_of_steps(trainer: XPOTrainer) -> list[float]:
    """How many tokens were generated in each step."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    phases = [f"perf/{phase}_s" for phase in ("rollout", "preference", "reference", "update")]
    return [log["perf/tokens_per_s"] * sum(log[phase] for phase in phases) for log in logs]


def test_new_adapters_find_what_the_whole_model_drew(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """Their reference is the model below them; the store asks who that is while the trainer is built."""
    store, config = str(tmp_path / "store"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for options, rate in (({}, 0.0), ({"peft_config": config}, 1.0)):
        trainer = make_trainer(**options, reference_store=store)
        trainer.train()
        rates = [entry["perf/reference_hit_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates == [rate, rate]


def test_each_epoch_has_draws_of_its_own(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=8, reference_store=str(tmp_path / "store"))  # two epochs of 16 prompts
    trainer.train()
    assert all(entry["perf/reference_hit_rate"] == 0 for entry in trainer.state.log_history if "loss" in entry)
    assert len(Store(tmp_path / "store")) == 32


@pytest.mark.parametrize(
    ("size", "batches"), [(1, [4] * 6), (8, [8, 8, 8]), (11, [10, 6, 8]), (12, [12, 4, 8]), (99, [16, 8])]
)
def test_the_next_steps_are_drawn_ahead_within_the_epoch_and_the_run(
    make_trainer: TrainerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, batches: list[int]
) -> None:
    """Six steps of four prompts, of which an epoch has 16; no number depends on it."""
    shared = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    alone = make_trainer(**shared)
    alone.train()
    trainer = make_trainer(**shared, reference_store=str(tmp_path / "store"), reference_batch_size=size)
    assert trainer.reference.frozen is not None
    sizes = batch_sizes(monkeypatch, of=id(trainer.reference.frozen))
    trainer.train()
    assert sizes == batches
    assert step_logs(trainer) == step_logs(alone)
    assert len(Store(tmp_path / "store")) == 24


def test_a_store_that_cannot_be_written_is_one_line(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"reference_store='.*/file/store' cannot be written .*; choose another file"):
        make_trainer(reference_store=str(tmp_path / "file" / "store"))
    assert make_trainer(reference_store="off").draws.store is None


# ---- micro-batches by tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 60, 100])
def test_a_token_budget_changes_nothing(make_trainer: TrainerFactory, budget: int) -> None:
    shared = {"max_steps": 3, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.5}
    whole, parts = make_trainer(**shared), make_trainer(**shared, tokens_per_micro_batch=budget)
    whole.train()
    parts.train()
    runs_alike(step_logs(parts), step_logs(whole))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


# ---- the command -------------------------------------------------------------------------------------


def run(tmp_path: Path, *command: str) -> str:
    shared = ["experiment=smoke", "tracking=none", f"reference.store={tmp_path}/store.sqlite", "data.train_limit=8"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *shared], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def hit_rates(run_dir: Path) -> list[float]:
    metrics = read_metrics(run_dir)
    return [entry["perf/reference_hit_rate"] for entry in metrics if "loss" in entry]


def test_fill_computes_what_a_run_will_need(tmp_path: Path) -> None:
    """Filled ahead, a run of the same command finds every answer, in training, in evaluation and for its probe."""
    probe = ["evaluation.probe_prompts=2", "evaluation.probe_samples=3"]
    filled = run(tmp_path, "xpo.reference", "fill", "--epochs", "2", *probe)
    assert "30 of 30 draws computed, 0 were there" in filled  # 2 x 8, 8 held out, 2 x 3
    filled = run(tmp_path, "xpo.reference", "fill", "--epochs", "3", "--batch", "3", *probe)
    assert "8 of 38 draws computed, 30 were there" in filled
    run(tmp_path, "xpo.train", "hydra.run.dir=run", *probe)
    assert hit_rates(tmp_path / "run") == [1, 1, 1]
    assert {f"eval_{name}" for name in MEASURES} <= read_metrics(tmp_path / "run")[0].keys()
    assert len(Store(tmp_path / "store.sqlite")) == 38


def test_fill_ends_completions_where_the_policy_does(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The reference's own generation config, which names another EOS, has no say; nor has it in training.

    A tokenizer may lack a pad token. Nothing is made on the hub, which is out of reach here.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    for name, ends in (("policy", tokenizer.eos_token_id), ("reference", [tokenizer.eos_token_id, 77])):
        model = tiny_model()
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = [f"model.{key}={tmp_path}/{name}" for key, name in (("name", "policy"), ("reference", "reference"))]
    run(tmp_path, "xpo.reference", "fill", *models, "training.push_to_hub=true", "training.hub_model_id=a/b")
    run(tmp_path, "xpo.train", *models, "training.max_steps=1", "evaluation.before=false", "hydra.run.dir=run")
    assert hit_rates(tmp_path / "run") == [1]
