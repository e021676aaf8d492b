"""The cards of a model and of its pairs: what was trained, how, and what this run itself measured."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData, ModelCardData

from xpo.tracking.metrics_log import evaluations, measures

_TAGS = ["xpo", "preference-optimization"]
_PAPER = "[arXiv 2405.21046](https://arxiv.org/abs/2405.21046)"
_SETTINGS = (
    *("alpha", "beta", "loss_type", "missing_eos_penalty", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_new_tokens", "temperature", "seed"),
)


def model_name(name_or_path: str) -> str:
    """A model's name for readers elsewhere: on the hub, or else the last part of its directory."""
    path = Path(name_or_path)
    for part in path.parts:  # the hub's cache
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path.name if path.is_absolute() or path.is_dir() else name_or_path


def model_card(settings: Mapping[str, Any], base_model: str, history: list[dict[str, Any]], adapter: bool) -> str:
    """A README.md for the hub, with the run's own numbers.

    Args:
        settings: the trainer's arguments by name.
        base_model: the name of the model that was trained, or the directory that it was loaded from.
        history: `trainer.state.log_history`.
        adapter: whether the weights are a PEFT adapter.
    """
    name = model_name(base_model)
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=name if "/" in name else None,  # the hub takes its own names only
        tags=_TAGS,
        pipeline_tag="text-generation",
    )
    steps = max((entry["step"] for entry in history), default=0)
    rows = "\n".join(f"| {key} | {settings[key]} |" for key in _SETTINGS)
    sets = dict.fromkeys(
        key.removesuffix("_runtime") for entry in history for key in entry if re.fullmatch("eval(_.+)?_runtime", key)
    )
    measured = "".join(_table(history, prefix) for prefix in sets)
    if measured:
        measured += (
            "\n`win_rate`, `tie_rate` and `lose_rate` compare one completion of each prompt with one of the reference\n"
            "model under the judge of the run; `kl` is in nats per completion.\n"
        )
    return f"""---
{metadata.to_yaml()}
---

# {name}, trained with XPO

{steps} optimizer steps of Exploratory Preference Optimization
({_PAPER}), by xpo {version("xpo")}.
{measured}
## Settings

| setting | value |
|---|---|
{rows}
"""


def _table(history: list[dict[str, Any]], prefix: str) -> str:
    """The first and the last evaluation of one set of prompts; several sets are told apart by name."""
    kept = evaluations(history, prefix)
    first, last = kept[0], kept[-1]
    name = prefix.removeprefix("eval").replace("_", " ", 1)
    rows = [
        f"| {key} | {first[f'{prefix}_{key}']:.3f} | {last[f'{prefix}_{key}']:.3f} |"
        for key in measures(last, prefix)
        if f"{prefix}_{key}" in first
    ]
    return (
        f"\n## Held-out prompts{name}, against the reference\n\n"
        f"| metric | step {first['step']} | step {last['step']} |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def pairs_card(pairs: Path, repository: str, model: str) -> str:
    """A README.md for the data set of a model's pairs, a file of `xpo.data.pair_file.export`."""
    metadata = DatasetCardData(tags=_TAGS, task_categories=["text-generation"])
    return f"""---
{metadata.to_yaml()}
---

# Preference pairs of {model}

{pq.read_metadata(pairs).num_rows} pairs, drawn and labelled while [{model}](https://huggingface.co/{model}) was trained
by Exploratory Preference Optimization ({_PAPER}), with xpo {version("xpo")}.

```python
from datasets import load_dataset

load_dataset("{repository}", split="train")
```

| column | meaning |
|---|---|
| `prompt`, `chosen`, `rejected` | texts, or lists of messages; `chosen` is the completion that has won |
| `margin` | the judge's log-odds that it wins; negative where a drawn label had it win all the same |
| `run`, `step`, `epoch` | when the pair was drawn |
| `*_by` | who drew the completion: `policy`, `reference`, or another sampler |
| `*_tokens` | its token ids |
| `*_score` | what the reward model gave it; empty without one |
| `*_reference_logps` | its summed log-probability under the reference |
"""
