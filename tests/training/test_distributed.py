"""Any number of processes, with and without DeepSpeed, trains the same as one, and goes on exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import run
from safetensors.torch import load_file

from xpo.data.pair_file import read_pairs

HERE = Path(__file__).parents[1]


def two_processes(out: Path, *words: str) -> dict[str, Any]:
    """2 x 2 pairs with 2 accumulation steps in two processes; what rank 0 wrote."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    group = subprocess.run(
        [*command, str(HERE / "distributed_run.py"), str(out), "2", "2", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert group.returncode == 0, group.stdout.decode()[-8000:]
    return json.loads((out / ("resumed.json" if "resume" in words else "logs.json")).read_text())


@pytest.fixture(scope="module", params=["full", "lora", "learned", "replay", "replay past"])
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """8 pairs in one process."""
    out = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    run(out, 8, 1, request.param.split())
    return request.param, out, json.loads((out / "logs.json").read_text())


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Every metric of every log and of the evaluation."""
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for a, b in zip([*one["logs"], one["evaluation"]], [*two["logs"], two["evaluation"]], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name


def assert_same_weights(first: Path, second: Path) -> None:
    """Those of the final model, a single file of safetensors."""
    (one, two) = (load_file(next((out / "model").glob("*.safetensors"))) for out in (first, second))
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(values, two[name], atol=1e-6, rtol=1e-5, msg=name)


def assert_same_pairs(first: Path, second: Path, count: int) -> None:
    """In the same order, whichever process drew them."""
    one, two = (list(read_pairs(out / "pairs.jsonl")) for out in (first, second))
    for a, b in zip(one, two, strict=True):
        assert a["reference_logps"] == pytest.approx(b.pop("reference_logps"), abs=1e-4)
        assert {name: value for name, value in a.items() if name in b} == b
    assert len(one) == count


ENGINES = {
    "ddp": ("DistributedDataParallel", "AcceleratedOptimizer"),
    "zero1": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
    "zero2": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
    "zero3": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"),
    "zero3_offload": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"),
}
FULL = ["ddp", "zero1 sharded", "zero2", "zero3"]
LORA = ["ddp", "zero3_offload"]
LEARNED = ["ddp", "zero2", "zero3"]
REPLAY = ["ddp", "zero2", "zero3 sharded"]
PAST = ["zero3"]
TRIED = {"full": FULL, "lora": LORA, "learned": LEARNED, "replay": REPLAY, "replay past": PAST}


@pytest.mark.parametrize("words", dict.fromkeys(words for tried in TRIED.values() for words in tried))
def test_two_processes_equal_one(one: tuple[str, Path, dict[str, Any]], tmp_path: Path, words: str):
    """Logs, evaluation, weights; the engine is the one asked for.

    With LoRA the reference is the policy's own base, under ZeRO-3 in parts, with the adapters of the start if they have
    learned something; "sharded", the reference is in parts.
    """
    kind, out, logs = one
    if words not in TRIED[kind]:
        pytest.skip("not among those tried")
    two = two_processes(tmp_path / "two", *kind.split(), *words.split())
    assert (two["engine"], two["optimizer"]) == ENGINES[words.split()[0]]
    assert_same(logs, two)
    assert_same_weights(out, tmp_path / "two")
    assert_same_pairs(out, tmp_path / "two", 32 if "replay" in kind else 64)
    checkpoint = tmp_path / "two" / "model" / "checkpoint-4"
    assert (checkpoint / "xpo_state_1.json").is_file()
    if words in ("zero2", "zero3"):
        # Under ZeRO-3 it also samples the other way, which changes no number.
        resumed = two_processes(
            tmp_path / "two", *kind.split(), "resume", *words.split(), *["synced", "sharded"] * (words == "zero3")
        )
        assert resumed["logs"] == two["logs"]
        assert resumed["evaluation"] == two["evaluation"]
        assert_same_weights(out, tmp_path / "two")
        assert_same_pairs(out, tmp_path / "two", 32 if "replay" in kind else 64)
