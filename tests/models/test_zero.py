"""DeepSpeed: what is refused, before a process group or a model is there. That it is right: test_distributed.py."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TrainerFactory
from torch import nn

from xpo import XPOConfig
from xpo.config.errors import ConfigError
from xpo.models.batches import shares
from xpo.models.zero import check_engine, gathered, is_divided
from xpo.training.checkpoints import check_same_zero

ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"deepspeed": ZERO2, "tokens_per_micro_batch": 64},
            "tokens_per_micro_batch=64 does not go with DeepSpeed, .* raise gradient_accumulation_steps",
        ),
        ({"shard_reference": True}, "shard_reference=True needs DeepSpeed; choose deepspeed=zero1, zero2 or zero3"),
        ({"fsdp": "full_shard"}, r"fsdp=.* is not supported, .* use DeepSpeed ZeRO-3 \(deepspeed=zero3\)"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, options: dict[str, Any], message: str):
    """One line with key, value and remedy."""
    with pytest.raises(ConfigError, match=message):
        XPOConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("stage", "processes", "then"),
    [(2, 2, "ZeRO-2 and 2 processes"), (3, 1, "ZeRO-3 and 1 processes"), (None, 2, None), (None, 1, None)],
)
def test_a_checkpoint_of_other_deepspeed_processes(tmp_path: Path, stage: int | None, processes: int, then: str | None):
    """Each process has its own part of the optimizer state; without DeepSpeed, any number may go on."""
    (tmp_path / "xpo_state_0.json").write_text(json.dumps({"zero_stage": stage, "processes": processes}))
    args: Any = SimpleNamespace(deepspeed_plugin=None, world_size=1)
    if then is None:
        check_same_zero(tmp_path, args)
        return
    with pytest.raises(ConfigError, match=f"was written with {then}, not no DeepSpeed and 1 processes; go on with"):
        check_same_zero(tmp_path, args)


def test_another_engine_than_asked_for_is_an_error():
    """Plain AdamW on one process is what a wrong launcher leaves, silently."""
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO-2 on 2 processes was asked for and Linear is in force"):
        check_engine(nn.Linear(2, 2), ZERO2, 2)


def test_a_whole_model_is_left_alone():
    """Without ZeRO-3 there is nothing to gather."""
    model = nn.Linear(2, 2)
    assert not is_divided(model)
    with gathered(model):
        assert model(torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.parametrize(("count", "batch", "world"), [(5, 2, 2), (1, 4, 3), (8, 3, 2), (7, 2, 3), (4, 4, 1)])
def test_ranks_evaluate_equally_many_batches(count: int, batch: int, world: int):
    """Every row once; ranks with fewer batches add the first row, which they do not report."""
    parts = [shares(count, batch, rank, world) for rank in range(world)]
    assert sorted(row for batches, own in parts for rows in batches[:own] for row in rows) == list(range(count))
    assert len({len(batches) for batches, _ in parts}) == 1
    for rank, (batches, own) in enumerate(parts):
        assert [row for rows in batches[:own] for row in rows] == list(range(rank, count, world))
        assert all(rows == [0] for rows in batches[own:])


def test_inputs_are_not_rounded(make_trainer: TrainerFactory):
    """Under DeepSpeed the Trainer would cast them to bfloat16: -100.123 would become -100."""
    trainer = make_trainer()
    inputs = {"reference_logps": torch.tensor([-100.123])}
    trainer.is_deepspeed_enabled = True
    assert trainer._prepare_inputs(inputs)["reference_logps"].dtype == torch.float32
