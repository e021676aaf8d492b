"""vLLM draws what the policy says: before training, behind each step, with adapters, after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from xpo import XPOConfig, XPOTrainer
from xpo.config.errors import ConfigError
from xpo.models.loading import tiny_tokenizer
from xpo.models.reference import base_model
from xpo.sampling.noise import sampling_noise
from xpo.sampling.sampler import Sampler
from xpo.sampling.vllm import VLLMSampler, merged_weights

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm
PROMPTS = [f"The {animal} number {i} said" for i in range(16) for animal in ("cat", "dog", "owl", "old horse")]


def policy() -> LlamaForCausalLM:
    """Heads of 64 numbers: vLLM's attention on CPUs knows no 16."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def trainer_of(directory: Path, model: Any = None, **options: Any) -> XPOTrainer:
    given = {
        "use_vllm": True,
        "vllm_enforce_eager": True,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "max_new_tokens": 12,
        "max_length": 64,
        "alpha": 0.1,
        "save_strategy": "no",
        "pairs_file": str(directory / "pairs.jsonl"),
        "disable_tqdm": True,
    }
    return XPOTrainer(
        policy() if model is None else model,
        reward_model=lambda prompts, completions: [float(text.count("e")) for text in completions],
        args=XPOConfig(output_dir=str(directory), **given | options),
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )


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
    assert isinstance(trainer.sampler, VLLMSampler)
    assert type(trainer.draws.sampler) is Sampler
    before, wanted = both(trainer)
    assert before == wanted
    trainer.train()
    after, wanted = both(trainer)
    assert after == wanted
    assert after != before


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
    monkeypatch.setattr(trainer.sampler, "_send", lambda model: None)
    with pytest.raises(ConfigError, match=r"generation.engine=vllm is not the policy: .* nats below"):
        trainer.train()


def test_adapters_are_merged(tmp_path: Path) -> None:
    adapted = get_peft_model(policy(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = trainer_of(tmp_path, adapted, learning_rate=5e-2)
    before = both(trainer)
    trainer.train()
    after = both(trainer)
    assert before[0] == before[1]
    assert after[0] == after[1] != before[0]
    names = [name for name, _ in merged_weights(base_model(trainer.model))]
    assert names == list(policy().state_dict())


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    begun = trainer_of(tmp_path / "begun", pairs_file=str(tmp_path / "begun.jsonl"))
    begun.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    files = [tmp_path / "whole" / "pairs.jsonl", tmp_path / "begun.jsonl"]
    wanted, found = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(wanted) == 40
    assert [row["tokens"] for row in found] == [row["tokens"] for row in wanted[16:]]
    for one, other in zip(whole.model.parameters(), begun.model.parameters(), strict=True):
        assert torch.equal(one, other)
