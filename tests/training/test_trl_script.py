"""experiments/trl_script takes the command lines that TRL documented, on local stand-ins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import prompts
from datasets import DatasetDict
from pair_rm_checkpoint import build_tiny_pair_rm
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from xpo.models.loading import tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "trl_script" / "xpo.py"


@pytest.fixture
def here(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory in which the names of the documented commands are directories."""
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "trl-lib/pythia-1b-deduped-tldr-sft"):
        tiny_model().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    config = LlamaConfig(
        vocab_size=288, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    # Without a tokenizer of its own.
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "trl-lib/pythia-1b-deduped-tldr-rm")
    (tmp_path / "llm-blender").mkdir()
    build_tiny_pair_rm(tmp_path / "pair_rm")[0].rename(tmp_path / "llm-blender" / "PairRM-hf")
    for name, chat in {"trl-lib/ultrafeedback-prompt": True, "trl-lib/tldr": False}.items():
        splits = DatasetDict({"train": prompts(8, chat), "test": prompts(3, chat)})
        for split, part in splits.items():
            (tmp_path / name).mkdir(exist_ok=True, parents=True)
            part.to_parquet(tmp_path / name / f"{split}.parquet")
    return tmp_path


def documented(number: int) -> list[str]:
    """The arguments of a command of the README, without the hub."""
    commands = (SCRIPT.parent / "README.md").read_text().split("```")[1::2]
    words = commands[number].replace("\\\n", " ").split()
    assert words[:2] == ["python", "experiments/trl_script/xpo.py"]
    return [word for word in words[2:] if word != "--push_to_hub"]


@pytest.mark.parametrize("more", [[], ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]], ids=["all", "lora"])
@pytest.mark.parametrize("number", [0, 1], ids=["judge", "reward"])
def test_the_documented_command_trains(here: Path, number: int, more: list[str]) -> None:
    short = ["--max_steps", "2", "--max_new_tokens", "6", "--gradient_accumulation_steps", "1", "--use_cpu"]
    watched = ["--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1", "--save_steps", "2"]
    command = [sys.executable, SCRIPT, *documented(number), *short, *watched, *more]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = here / ["Qwen2.5-0.5B-XPO-PairRM", "pythia-1b-tldr-xpo"][number]
    log = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["objective/kl"] == 0
    assert log[-1]["eval_invalid_rate"] == 0
    assert ("eval_score" in log[-1]) == (number == 1)
    assert ("has no tokenizer; it reads with the policy's" in done.stderr) == (number == 1)
    assert "policy " in done.stdout  # the completions, for nothing else is asked to show them
    assert (output / "adapter_model.safetensors").is_file() == bool(more)
