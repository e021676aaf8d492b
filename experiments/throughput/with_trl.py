"""One contender: TRL's XPOTrainer. Runs in TRL's own environment; started by run.py with a job file."""

from types import SimpleNamespace
from typing import Any

import torch
from contender import Clock, load_job, load_model_and_tokenizer, training_arguments
from datasets import Dataset
from torch import Tensor, nn
from trl.experimental.xpo import XPOConfig, XPOTrainer


class CountLetters(nn.Module):
    """The reward of both sides, letters e, in the form TRL's XPO insists on: a classifier over token ids.

    A look-up and a running sum. It counts the prompt's letters too, which both completions share.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(_name_or_path="count-letters")
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        counts = torch.zeros(vocab_size)
        counts[: len(pieces)] = torch.tensor([float(piece.lower().count("e")) for piece in pieces])
        self.register_buffer("counts", counts)

    def backbone(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.counts[input_ids].cumsum(dim=1)[..., None])

    def score(self, hidden: Tensor) -> Tensor:
        return hidden


def observe(trainer: XPOTrainer, clock: Clock) -> list[float]:
    """Times the phases of TRL's training step. Returns the list that gets the mean lengths of completions."""
    lengths: list[float] = []
    process_completions, compute_logprobs = trainer._process_completions, trainer._compute_logprobs
    computes_logprobs = False
    started = 0.0

    def note_lengths(model_output: Any, ref_output: Any, prompts: Any) -> Any:
        for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"].bool(), strict=True):
            clock.prompts.append(ids[mask].tolist())
        context = prompts["input_ids"].shape[1]
        model_data, ref_data = process_completions(model_output, ref_output, prompts)
        for data in (model_data, ref_data):
            lengths.append(data["attention_mask"][:, context:].sum(dim=1).float().mean().item())
        return model_data, ref_data

    def logprobs(*args: Any) -> Any:
        nonlocal computes_logprobs
        computes_logprobs = True
        result = compute_logprobs(*args)
        computes_logprobs = False
        return result

    def before_reference(*args: Any) -> None:
        nonlocal started
        if computes_logprobs:  # and not generation
            started = clock.now()

    def after_reference(*args: Any) -> None:
        if computes_logprobs:
            seconds = clock.now() - started
            clock.add("reference", seconds)
            clock.add("update", -seconds)

    trainer.ref_model.register_forward_pre_hook(before_reference)
    trainer.ref_model.register_forward_hook(after_reference)
    trainer._process_completions = note_lengths
    trainer._generate_completions = clock.timed("rollout", trainer._generate_completions)
    trainer._compute_rewards = clock.timed("preference", trainer._compute_rewards)
    trainer._compute_logprobs = clock.timed("update", logprobs)
    trainer.accelerator.backward = clock.timed("update", trainer.accelerator.backward)
    return lengths


def main() -> None:
    job = load_job()
    model, tokenizer = load_model_and_tokenizer(job)
    clock = Clock(job)
    trainer = XPOTrainer(
        model=model,
        reward_funcs=CountLetters(tokenizer, model.config.vocab_size).to(job["device"]),
        args=XPOConfig(**training_arguments(job)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": job["prompts"]}),
        callbacks=[clock],
    )
    lengths = observe(trainer, clock)
    trainer.train()
    clock.write_result(("trl", "accelerate"), sum(lengths) / len(lengths))


if __name__ == "__main__":
    main()
