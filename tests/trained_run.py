"""A run directory as training leaves it, without training."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from xpo.config.compose import compose
from xpo.launch.jobs import prepare
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.tracking.runs import RunRecord

# The tiny policy answers with at most eight tokens; the lexicon needs no model to judge them.
WORDS = ["experiment=smoke", "tracking=none", "judge=lexicon", "training.use_cpu=true"]


def finished_run(directory: Path, *words: str, policy: Any = None) -> Path:
    """A run whose policy is another tiny model than its reference, or `policy`."""
    config, _, choices = compose([*WORDS, *words])
    prepare(config, directory, choices, [*WORDS, *words])
    (policy or tiny_model(seed=1)).save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    finish(directory)
    return directory


def finish(directory: Path, finished: bool = True) -> None:
    """Whether the run has come to its end."""
    record = RunRecord.read(directory)
    record.finished = finished
    record.write(directory)


def adapted_model() -> Any:
    """Adapters in the reference, which change what it says."""
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, part in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(part, std=0.5)
    return policy
