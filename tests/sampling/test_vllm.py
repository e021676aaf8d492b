"""vLLM draws what the policy says: before training, behind each step, with adapters, after a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import deepspeed_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from vllm_run import PROMPTS, policy, trainer_of

from xpo import XPOConfig, XPOTrainer
from xpo.config.errors import ConfigError
from xpo.models.reference import base_model
from xpo.sampling.noise import sampling_noise
from xpo.sampling.vllm import VLLM, merged_weights

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm


def both(trainer: XPOTrainer, greedy: bool = True, rows: list[int] | None = None) -> tuple[list[Any], list[Any]]:
    """The tokens that vLLM and transformers draw."""
    rows = list(range(len(PROMPTS))) if rows is None else rows
    ids = [trainer.train_dataset["prompt_ids"][row] for row in rows]
    noise = sampling_noise((1, 2, 3), rows, 12)
    found = []
    for sample in (trainer.sampler.sample, trainer.draws.sampler.sample):
        drawn = sample(base_model(trainer.model), ids, noise, torch.device("cpu"), greedy)
        found.append([one[mask].tolist() for one, mask in zip(drawn.ids, drawn.mask, strict=True)])
    return found[0], found[1]


def test_greedy_tokens_are_transformers_before_and_after_training(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    assert isinstance(trainer.sampler.engine, VLLM)
    assert trainer.draws.sampler.engine is None
    before, wanted = both(trainer)
    assert before == wanted
    trainer.train()
    after, wanted = both(trainer)
    assert after == wanted
    assert after != before


def test_options_mean_the_same_and_are_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions longer than those of a check, and a penalty that changes most tokens."""
    options = {"generation_kwargs": {"min_new_tokens": 12}, "repetition_penalty": 1.3, "vllm_check_steps": 1}
    trainer = trainer_of(tmp_path, **options)
    ours, wanted = both(trainer)
    assert ours == wanted
    assert ours != both(trainer_of(tmp_path))[1]
    monkeypatch.setattr(trainer.sampler.engine, "_send", lambda model: None)
    with pytest.raises(ConfigError, match=r"generation_engine='vllm' is not the policy"):
        trainer.train()


def test_a_draw_depends_on_its_prompt_and_noise_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    together = both(trainer, greedy=False)[0]
    backwards = both(trainer, greedy=False, rows=list(range(len(PROMPTS)))[::-1])[0]
    assert backwards[::-1] == together
    assert both(trainer, greedy=False, rows=[7])[0] == together[7:8]
    assert len({tuple(one) for one in together}) > 32


def test_weights_that_do_not_follow_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, vllm_check_steps=2)
    both(trainer)
    monkeypatch.setattr(trainer.sampler.engine, "_send", lambda model: None)
    with pytest.raises(ConfigError, match=r"generation_engine='vllm' is not the policy: .* nats below"):
        trainer.train()


def test_what_vllm_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_repeat_ngram_size=2 is not known to vLLM; leave it out, or set"):
        XPOConfig(output_dir=str(tmp_path), use_vllm=True, generation_kwargs={"no_repeat_ngram_size": 2})
    with pytest.raises(ConfigError, match="generation_engine=vllm needs the whole policy"):
        XPOConfig(output_dir=str(tmp_path), use_vllm=True, ds3_gather_for_generation=False)


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
    """Also on a head that was one with the embeddings, and is not any more."""
    tied = "lm_head" in kind["target_modules"]
    adapted = get_peft_model(policy(tied), LoraConfig(r=4, task_type="CAUSAL_LM", **kind))
    # Tied and untrained, a model repeats the last token until something large has happened to its head.
    trainer = trainer_of(tmp_path, adapted, learning_rate=1.0 if tied else 5e-2)
    before = both(trainer)
    trainer.train()
    after = both(trainer)
    assert before[0] == before[1]
    assert after[0] == after[1] != before[0]
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
    """SIGKILL behind the second of five checkpoints."""
    kept = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
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
