"""Trains once without interruption, and once more for each moment of a SIGKILL, then resumes.

python tests/kill_and_resume.py OUT KIND: writes OUT/NAME/result.pt and metrics.jsonl for the names "whole", each of
MOMENTS, and each of RANDOM, which are killed at a moment that is drawn anew each time. KIND is one of KINDS.
Each run is a forked child of one process that has imported everything and computed nothing.
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from conftest import prompts, share_of_e, step_logs
from transformers import TrainerState

from xpo import XPOConfig, XPOTrainer
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.sampling.sampler import Sampler
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.runs import last_complete_checkpoint
from xpo.training.callbacks import KeepMetrics

MOMENTS = ("mid_rollout", "mid_update", "mid_save")
RANDOM = ("random_1", "random_2", "random_3", "random_4")
REPLAY = {"replay": "all", "replay_updates": 2, "iterations": 2, "reference_update": "iteration"}
KINDS: dict[str, dict[str, Any]] = {"fresh": {}, "replay": REPLAY}
ROLLOUT = {"fresh": 5, "replay": 4}  # the last step before step 6 that has one


def trainer(out: Path, kind: str) -> XPOTrainer:
    """Eight steps of two micro-batches, five rollouts an epoch, a checkpoint every three, a log every two."""
    args = XPOConfig(
        output_dir=str(out),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_new_tokens=6,
        max_length=128,
        learning_rate=1e-3,
        alpha=[1e-3, 1e-2],
        logging_steps=2,
        save_steps=3,
        save_total_limit=1,
        disable_tqdm=True,
        use_cpu=True,
        pairs_file=str(out / "pairs.jsonl"),
        **KINDS[kind],
    )
    return XPOTrainer(
        tiny_model(),
        reward_model=share_of_e,
        args=args,
        processing_class=tiny_tokenizer(),
        train_dataset=prompts(20),
        callbacks=[KeepMetrics(MetricsLog(out))],
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(run: XPOTrainer, moment: str, kind: str) -> None:
    """Arranges for SIGKILL in step 6, after checkpoint-3; for mid_save, while checkpoint-6 is written."""
    if moment == "mid_rollout":
        sample = Sampler.sample

        def sample_and_die(self: Sampler, model: Any, *rest: Any, **options: Any) -> Any:
            if run.state.global_step == ROLLOUT[kind] and model is run.reference.frozen:
                die()
            return sample(self, model, *rest, **options)

        Sampler.sample = sample_and_die  # type: ignore[method-assign]
    elif moment == "mid_update":
        training_step = run.training_step
        micro_batches: list[int] = []

        def step_and_die(*args: Any) -> Any:
            micro_batches.append(run.state.global_step)
            if micro_batches.count(5) == 2:  # the first micro-batch of step 6 has its gradients
                die()
            return training_step(*args)

        run.training_step = step_and_die  # type: ignore[method-assign]
    else:
        save = TrainerState.save_to_json

        def save_and_die(self: TrainerState, path: str) -> None:
            if self.global_step == 6:  # weights and optimizer of checkpoint-6 are there, its state is not
                Path(path).write_text('{"epoch": 1.2, "global_st')
                die()
            save(self, path)

        TrainerState.save_to_json = save_and_die  # type: ignore[method-assign]


def train(kind: str, out: Path, moment: str | float | None = None) -> None:
    """From the last checkpoint, if there is one; up to a moment of MOMENTS, or for so many seconds."""
    out.mkdir(exist_ok=True)
    run = trainer(out, kind)
    if isinstance(moment, str):
        kill_at(run, moment, kind)
    elif moment is not None:
        threading.Timer(moment, die).start()
    checkpoint = last_complete_checkpoint(out)
    run.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {name: p.detach() for name, p in run.model.named_parameters()}
    torch.save({"logs": step_logs(run), "weights": weights}, out / "result.pt")


def in_child(*arguments: Any) -> int:
    """Runs `train` in a forked child and returns how it ended, as os.waitstatus_to_exitcode does."""
    child = os.fork()
    if child == 0:
        train(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    root, kind = Path(sys.argv[1]), sys.argv[2]
    began = time.monotonic()
    assert in_child(kind, root / "whole") == 0
    seconds = time.monotonic() - began
    for moment in MOMENTS:
        assert in_child(kind, root / moment, moment) == -signal.SIGKILL
        assert last_complete_checkpoint(root / moment) == root / moment / "checkpoint-3"
        assert in_child(kind, root / moment) == 0
    for name in RANDOM:
        after = random.uniform(0, seconds)
        print(f"{name}: killed after {after:.3f} of {seconds:.3f} s")
        in_child(kind, root / name, after)
        assert in_child(kind, root / name) == 0
