"""Two processes train the same as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_run import run

HERE = Path(__file__).parent


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_processes_equal_one(tmp_path: Path, mode: str):
    """8 pairs on one process = 2 x 2 pairs with 2 accumulation steps: logs, evaluation, weights.

    With LoRA the reference is the policy's own base, reached through no DistributedDataParallel.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [
        str(HERE / "distributed_run.py"),
        str(tmp_path / "two"),
        "2",
        "2",
        *(["lora"] if mode == "lora" else []),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    group = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run(tmp_path / "one", 8, 1, mode == "lora")
    output, _ = group.communicate(timeout=240)
    assert group.returncode == 0, output.decode()[-3000:]

    one, two = (json.loads((tmp_path / name / "logs.json").read_text()) for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for a, b in zip([*one["logs"], one["evaluation"]], [*two["logs"], two["evaluation"]], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), name
    weights = [torch.load(tmp_path / name / "weights.pt") for name in ("one", "two")]
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], atol=1e-5, rtol=1e-5, msg=name)
    checkpoint = tmp_path / "two" / "model" / "checkpoint-4"
    assert (checkpoint / "xpo_state_1.json").is_file()
