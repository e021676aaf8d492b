"""What the tests share: tiny models, prompts, and a trainer over them. Nothing is downloaded."""

import logging
import os
import signal
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XPO_STORES"] = tempfile.mkdtemp(prefix="xpo_stores_")  # not the tester's own

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from xpo import XPOConfig, XPOTrainer
from xpo.data.prompts import Prompt
from xpo.models.loading import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

# The 17 metrics of TRL's documentation.
TRL_METRICS = {
    "loss/dpo",
    "loss/xpo",
    "objective/kl",
    "objective/entropy",
    "objective/model_scores",
    "objective/ref_scores",
    "objective/scores_margin",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "val/model_contain_eos_token",
    "val/ref_contain_eos_token",
    "alpha",
    "beta",
}
# Ours beside them, of every run.
OWN_METRICS = {
    "loss",
    "loss/dpo_labelled",
    "grad_norm",
    "learning_rate",
    "objective/kl_policy",
    "preference/win_rate",
    "preference/tie_rate",
    "preference/invalid_rate",
    "preference/queries",
    "exploration/ref_ratio",
    "exploration/bonus_share",
    "completions/length",
    "completions/distinct_2",
    "perf/rollout_s",
    "perf/preference_s",
    "perf/reference_s",
    "perf/reference_hit_rate",
    "perf/update_s",
    "perf/tokens_per_s",
}
# Of every evaluation of the smoke run.
EVAL_METRICS = {
    "win_rate",
    "tie_rate",
    "lose_rate",
    "invalid_rate",
    "score",
    "ref_score",
    "score_margin",
    "objective",
    "kl",
    "eos_rate",
    "ref_eos_rate",
    "length",
    "ref_length",
    "distinct_2",
    "ref_distinct_2",
    "vader",
    "ref_vader",
}


@contextmanager
def restored() -> Iterator[None]:
    """Logging, signals and environment behind the block are those before it: a command's `main` takes them over."""
    root = logging.getLogger()
    logs, level = root.handlers[:], root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with patch.dict(os.environ):
            yield
    finally:
        root.handlers[:] = logs
        root.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def restore_process() -> Iterator[None]:
    """After each test; fixtures of a wider scope do it themselves."""
    with restored():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with a chat template; its pad token is its EOS token, id 0."""
    return tiny_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A fresh random Llama of two layers, always the same."""
    return tiny_model()


def gpt2() -> GPT2LMHeadModel:
    """A random GPT-2: its positions are absolute."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).eval()


def share_of_e(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """A reward that a tiny model can learn: the share of the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def prompts(count: int, chat: bool = False) -> Dataset:
    """Prompts of different lengths."""
    texts = [f"Tell me {'much ' * (i % 4)}about number {i}" for i in range(count)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] if chat else t for t in texts]})


TrainerFactory = Callable[..., XPOTrainer]


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TrainerFactory:
    """make_trainer(model=..., reward_model=..., any XPOConfig argument=...)."""

    def make(
        model: Any = None,
        ref_model: Any = None,
        judge: Any = None,
        reward_model: Any = share_of_e,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: Any = None,
        peft_config: Any = None,
        **options: Any,
    ) -> XPOTrainer:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_new_tokens": 6,
            "max_length": 128,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return XPOTrainer(
            model=model or tiny_model(),
            ref_model=ref_model,
            judge=judge,
            reward_model=reward_model if judge is None or reward_model is not share_of_e else None,
            args=XPOConfig(**(defaults | options)),
            processing_class=tokenizer,
            train_dataset=prompts(16) if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            peft_config=peft_config,
        )

    return make


def step_logs(trainer: XPOTrainer) -> list[dict[str, float]]:
    """The logs of training steps, without timings."""
    return [
        {name: value for name, value in entry.items() if not name.startswith("perf/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def made_checkpoint(run_dir: Path, with_optimizer: bool = True) -> Path:
    """model/checkpoint-2 of a run directory, whole as far as can be told without reading it."""
    checkpoint = run_dir / "model" / "checkpoint-2"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    (checkpoint / "pytorch_model.bin").touch()
    if with_optimizer:
        (checkpoint / "xpo_state_0.json").write_text("{}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, checkpoint / name)
    return checkpoint
