"""One contender: xpo's XPOTrainer. Started by run.py with a job file."""

from collections.abc import Sequence
from typing import Any

import torch
from contender import Clock, load_job, load_model_and_tokenizer, training_arguments
from datasets import Dataset

from xpo import XPOConfig, XPOTrainer
from xpo.models.devices import keep_freed_memory


def count_letters(prompts: Sequence[Any], completions: Sequence[str]) -> torch.Tensor:
    """The reward of both sides: letters e."""
    return torch.tensor([float(text.lower().count("e")) for text in completions])


def main() -> None:
    job = load_job()
    if job["device"] == "cpu":
        keep_freed_memory()  # as python -m xpo.train does
    model, tokenizer = load_model_and_tokenizer(job)
    clock = Clock(job)
    options = {"reference_store": job["store"]} if job["store"] else {}
    trainer = XPOTrainer(
        model=model,
        reward_model=count_letters,
        args=XPOConfig(**training_arguments(job), **options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": job["prompts"]}),
        callbacks=[clock],
    )
    collate = trainer.data_collator

    def note_prompts(rows: Sequence[dict[str, Any]]) -> Any:
        clock.prompts.extend(list(row["prompt_ids"]) for row in rows)
        return collate(rows)

    trainer.data_collator = note_prompts
    trainer.train()
    lengths = [logs["completions/length"] for logs in clock.logs if "completions/length" in logs]
    clock.write_result(("accelerate",), sum(lengths) / len(lengths) if lengths else None)


if __name__ == "__main__":
    main()
