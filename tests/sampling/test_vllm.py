"""vLLM draws what the policy says: before training, behind each step, with adapters, after a kill."""

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import deepspeed_config
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_run import PROMPTS, policy, trainer_of

import xpo.sampling.vllm
from xpo import XPOConfig, XPOTrainer
from xpo.config.errors import ConfigError
from xpo.models.reference import base_model
from xpo.sampling.noise import sampling_noise
from xpo.sampling.sampler import Sampler
from xpo.sampling.vllm import VLLM, merged_weights

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _no_engine_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each has a gigabyte, which it keeps: vLLM holds on to the frames that have started it."""
    engines = []
    start = xpo.sampling.vllm.start
    monkeypatch.setattr("xpo.sampling.vllm.start", lambda *given: engines.append(start(*given)) or engines[-1])
    yield
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()


def both(trainer: XPOTrainer, greedy: bool = True, rows: list[int] | None = None) -> tuple[list[Any], list[Any]]:
    """The tokens that vLLM and transformers draw."""
    return by_both(trainer, base_model(trainer.model), greedy, rows)


def by_both(
    trainer: XPOTrainer, model: Any, greedy: bool = True, rows: list[int] | None = None
) -> tuple[list[Any], list[Any]]:
    """The tokens that vLLM and transformers draw of a model."""
    rows = list(range(len(PROMPTS))) if rows is None else rows
    ids = [trainer.train_dataset["prompt_ids"][row] for row in rows]
    noise, vllm = sampling_noise((1, 2, 3), rows, 12), trainer.sampler
    transformers = Sampler(vllm.tokenizer, vllm.options, vllm.eos_token_ids, kwargs=vllm.kwargs)
    found = []
    for sampler in (vllm, transformers):
        drawn = sampler.sample(model, ids, noise, torch.device("cpu"), greedy)
        found.append([one[mask].tolist() for one, mask in zip(drawn.ids, drawn.mask, strict=True)])
    return found[0], found[1]


def by_reference(trainer: XPOTrainer) -> tuple[list[Any], list[Any]]:
    """The greedy tokens that vLLM and transformers draw of the reference."""
    with trainer.reference.model() as model:
        return by_both(trainer, model)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_greedy_tokens_are_transformers_before_and_after_training(tmp_path: Path, eager: bool) -> None:
    trainer = trainer_of(tmp_path, vllm_enforce_eager=eager)
    assert isinstance(trainer.sampler.engine, VLLM)
    before, wanted = both(trainer)
    assert before == wanted
    trainer.train()
    after, wanted = both(trainer)
    assert after == wanted
    assert after != before
    assert by_reference(trainer) == (before, before)


def test_the_reference_is_drawn_by_the_same_engine(tmp_path: Path) -> None:
    """In a run, into the store, where the draws of transformers are others."""
    stored = {"reference_store": str(tmp_path / "store.sqlite"), "max_steps": 2, "logging_steps": 1}
    trainer = trainer_of(tmp_path, **stored)
    drawn: list[Any] = []
    engine: Any = trainer.sampler.engine
    original = engine.draw
    engine.draw = lambda model, *rest: drawn.append(model) or original(model, *rest)
    trainer.train()
    assert drawn == [trainer.model, trainer.reference.frozen, trainer.model]  # which draws ahead
    for vllm, rate in ((True, 1), (False, 0)):
        again = trainer_of(tmp_path, use_vllm=vllm, **stored)
        again.train()
        assert [log["perf/reference_hit_rate"] for log in again.state.log_history[:2]] == [rate, rate]


def test_a_reference_that_is_another_model_is_drawn_by_transformers(tmp_path: Path, caplog) -> None:
    """Another size; one of the same, with other weights, is not."""
    larger = LlamaForCausalLM(LlamaConfig(**policy().config.to_dict() | {"intermediate_size": 256}))
    rounded = policy().bfloat16()
    apart = base_model(get_peft_model(policy(), IA3Config(task_type="CAUSAL_LM")))
    for other in (apart, rounded, larger):
        trainer = trainer_of(tmp_path, ref_model=other, max_steps=1)
        assert trainer.draws.sampler.engine is None
        assert "transformers draws the reference's completions" in caplog.text
        caplog.clear()
    trainer.train()
    with torch.no_grad():
        other = policy()
        other.lm_head.weight.mul_(-1)
    trainer = trainer_of(tmp_path, ref_model=other)
    assert trainer.draws.sampler is trainer.sampler
    ours, wanted = by_reference(trainer)
    assert ours == wanted != both(trainer)[0]


def test_options_mean_the_same_and_are_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions longer than those of a check, and a penalty that changes most tokens."""
    options = {"generation_kwargs": {"min_new_tokens": 12}, "repetition_penalty": 1.3, "vllm_check_steps": 1}
    trainer = trainer_of(tmp_path, **options)
    ours, wanted = both(trainer)
    assert ours == wanted
    assert ours != both(trainer_of(tmp_path))[1]
    monkeypatch.setattr(trainer.sampler.engine, "_send", lambda model: None)
    with pytest.raises(ConfigError, match=r"generation_engine='vllm' has other weights than the model"):
        trainer.train()


def test_one_token_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of the options that cut a distribution; and none behind the end, not even one that is cut off later."""
    trainer = trainer_of(tmp_path)
    greedy, sampled = both(trainer)[0], both(trainer, greedy=False)[0]
    for option in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        with monkeypatch.context() as patch:
            for name, value in option.items():
                patch.setattr(trainer.args, name, value)
            assert both(trainer, greedy=False)[0] == greedy != sampled
    ids, rows = trainer.train_dataset["prompt_ids"], range(len(PROMPTS))
    engine: Any = trainer.sampler.engine
    drawn = engine.draw(trainer.model, list(ids), sampling_noise((1, 2, 3), rows, 12), torch.device("cpu"), False)
    assert [tokens.tolist() for tokens in drawn] == sampled
    assert 0 < sum(0 in one for one in sampled) < len(sampled)  # token 0 is EOS


def test_temperature_is_that_of_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the likeliest first token over 1,000 draws, next to its probability."""
    model = policy()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    trainer = trainer_of(tmp_path, model, max_new_tokens=1)
    ids = [trainer.train_dataset["prompt_ids"][0]] * 1000
    with torch.no_grad():
        logits = trainer.model(torch.tensor(ids[:1])).logits[0, -1]
    noise, shares = sampling_noise((1, 2, 3), range(1000), 1), []
    for temperature in (0.5, 1.0, 2.0):
        monkeypatch.setattr(trainer.args, "temperature", temperature)
        drawn = trainer.sampler.sample(trainer.model, ids, noise, torch.device("cpu")).ids[:, 0]
        wanted = (logits / temperature).softmax(0).max().item()
        shares.append((drawn == logits.argmax()).float().mean().item())
        assert abs(shares[-1] - wanted) < 4 * (wanted * (1 - wanted) / 1000) ** 0.5
    assert shares[0] > shares[1] + 0.1 > shares[2] + 0.2


def test_a_draw_depends_on_its_prompt_and_noise_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    together = both(trainer, greedy=False)[0]
    backwards = both(trainer, greedy=False, rows=list(range(len(PROMPTS)))[::-1])[0]
    assert backwards[::-1] == together
    assert both(trainer, greedy=False, rows=[7])[0] == together[7:8]
    assert len({tuple(one) for one in together}) > 32


def test_more_prompts_than_vllm_takes_at_once(tmp_path: Path) -> None:
    """6,000 tokens, where it takes 4,096: drawn as in parts."""
    trainer = trainer_of(tmp_path, max_length=200)
    ids = torch.randint(1, 256, (40, 150), generator=torch.Generator().manual_seed(0)).tolist()
    noise = sampling_noise((1, 2, 3), range(40), 12)
    draws = [
        trainer.sampler.sample(trainer.model, *part, trainer.args.device).ids.tolist()
        for part in ((ids, noise), (ids[:20], noise[:20]), (ids[20:], noise[20:]))
    ]
    assert draws[0] == draws[1] + draws[2]


@pytest.mark.parametrize("every", [3, 5])
def test_weights_that_do_not_follow_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """At the next check, after a step of a learning rate that is usual."""
    trainer = trainer_of(tmp_path, vllm_check_steps=every, learning_rate=1e-4)
    both(trainer)
    engine: Any = trainer.sampler.engine
    monkeypatch.setattr(engine, "_send", lambda model: None)
    with pytest.raises(ConfigError, match=r"generation_engine='vllm' has other weights than the model: .* differ by"):
        trainer.train()
    assert engine.rollouts == every


def test_half_precision_is_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounding stops no run; weights that do not follow do."""
    trainer = trainer_of(tmp_path, policy().bfloat16(), vllm_check_steps=1)
    trainer.train()
    engine: Any = trainer.sampler.engine
    assert engine.engine_options.dtype == torch.bfloat16
    trainer = trainer_of(tmp_path, policy().bfloat16(), vllm_check_steps=1)
    both(trainer)
    monkeypatch.setattr(trainer.sampler.engine, "_send", lambda model: None)
    with pytest.raises(ConfigError, match="has other weights than the model"):
        trainer.train()


def test_what_vllm_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_repeat_ngram_size=2 is not known to vLLM; leave it out, or set"):
        XPOConfig(output_dir=str(tmp_path), use_vllm=True, generation_kwargs={"no_repeat_ngram_size": 2})
    with pytest.raises(ConfigError, match="generation_engine=vllm needs the whole policy"):
        XPOConfig(output_dir=str(tmp_path), use_vllm=True, ds3_gather_for_generation=False)
    long = trainer_of(tmp_path).sampler
    with pytest.raises(ConfigError, match="a prompt of 53 tokens leaves no room for max_new_tokens=12"):
        long.sample(policy(), [[1] * 53], torch.zeros(1, 12), torch.device("cpu"))
    quantised = policy()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ConfigError, match="'vllm' takes no quantised policy; load it whole, or set"):
        trainer_of(tmp_path, quantised)


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["all layers", "DoRA and a trained copy", "head"],
)
def test_adapters_are_merged(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Also on a head that was one with the embeddings, and is not any more; off, they are not."""
    tied = "lm_head" in kind["target_modules"]
    adapted = get_peft_model(policy(tied), LoraConfig(r=4, task_type="CAUSAL_LM", **kind))
    # Tied and untrained, a model repeats the last token until something large has happened to its head.
    trainer = trainer_of(tmp_path, adapted, learning_rate=1.0 if tied else 5e-2)
    before = both(trainer)
    trainer.train()
    after = both(trainer)
    assert before[0] == before[1]
    assert after[0] == after[1] != before[0]
    assert by_reference(trainer) == before
    names = [name for name, _ in merged_weights(base_model(trainer.model))]
    assert names == list(policy().state_dict())


RUN = Path(__file__).parent.parent / "vllm_run.py"


def command(directory: Path, processes: int = 1, **options: Any) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(RUN), str(directory), repr(options)]


def drawn(directory: Path) -> list[Any]:
    lines = (directory / "pairs.jsonl").read_text().splitlines()
    return [(row["step"], row["row"], row["tokens"]) for row in map(json.loads, lines)]


def test_a_killed_run_goes_on_with_the_same_draws_and_weights(tmp_path: Path) -> None:
    """SIGKILL behind the second of five checkpoints. Dropout, too, is what it was: its generator is the process's."""
    kept = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "disable_dropout": False}
    subprocess.run(command(tmp_path / "whole", **kept), check=True)
    with subprocess.Popen(command(tmp_path / "killed", **kept)) as process:
        while not (tmp_path / "killed" / "checkpoint-2" / "trainer_state.json").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    subprocess.run(command(tmp_path / "killed", **kept, resume=True), check=True)
    assert len(drawn(tmp_path / "whole")) == 40
    assert drawn(tmp_path / "killed") == drawn(tmp_path / "whole")
    files = (tmp_path / run / "checkpoint-5" / "model.safetensors" for run in ("whole", "killed"))
    wanted, found = map(load_file, files)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    "engine", [{"ddp_backend": "gloo"}, {"deepspeed": deepspeed_config("zero3")}], ids=["ddp", "zero3"]
)
def test_two_processes_draw_what_one_does(tmp_path: Path, engine: dict[str, Any]) -> None:
    shared = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "use_cpu": True}
    subprocess.run(command(tmp_path / "one", **shared), check=True)
    subprocess.run(command(tmp_path / "two", 2, per_device_train_batch_size=4, **shared, **engine), check=True)
    assert drawn(tmp_path / "two") == drawn(tmp_path / "one")
    assert len({str(tokens) for _, _, tokens in drawn(tmp_path / "one")}) > 20
