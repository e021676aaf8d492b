"""A run killed at any moment and resumed ends as the uninterrupted one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import MOMENTS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    subprocess.run(
        [sys.executable, str(HERE / "kill_and_resume.py"), str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_end(runs: Path, moment: str):
    """SIGKILL in step 6 (in the rollout, between two micro-batches, while saving): same losses, same weights."""
    whole, resumed = (torch.load(runs / name / "result.pt") for name in ("whole", moment))
    assert whole["logs"] == resumed["logs"]
    assert len(whole["logs"]) == 4
    for name, weights in whole["weights"].items():
        assert torch.equal(weights, resumed["weights"][name]), name
