"""A run whose policy is drawn from by vLLM: `python vllm_run.py DIRECTORY {option: value, ...}`, or under torchrun."""

import ast
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from xpo import XPOConfig, XPOTrainer
from xpo.launch.processes import exit_at_once
from xpo.models.loading import tiny_tokenizer

PROMPTS = [f"The {animal} number {i} said" for i in range(16) for animal in ("cat", "dog", "owl", "old horse")]


def policy(tied: bool = False) -> LlamaForCausalLM:
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
        tie_word_embeddings=tied,
        attention_dropout=0.1,  # without effect unless disable_dropout=False
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def trainer_of(directory: Path, model: Any = None, ref_model: Any = None, **options: Any) -> XPOTrainer:
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
        ref_model,
        reward_model=lambda prompts, completions: [float(text.count("e")) for text in completions],
        args=XPOConfig(output_dir=str(directory), **given | options),
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )


def main() -> None:
    options: dict[str, Any] = ast.literal_eval(sys.argv[2])
    resume = options.pop("resume", None)
    trainer_of(Path(sys.argv[1]), **options).train(resume_from_checkpoint=resume)
    exit_at_once(0)


if __name__ == "__main__":
    main()
