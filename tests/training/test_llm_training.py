"""Training runs whose judge is a language model behind a real HTTP server that fails now and then."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm_server import LLMServer

from xpo.tracking.metrics_log import read_metrics
from xpo.tracking.runs import is_complete

KEY = "sk-this-must-never-be-seen"


def command(server: LLMServer, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "xpo.train", "experiment=smoke", "reward_model=none", "judge=llm"),
            *(f"judge.model={server.name}", f"judge.base_url={server.url}", "evaluation=plain"),
            *arguments,
        ],
        cwd=tmp_path,
        env=os.environ | {"OPENAI_API_KEY": KEY, "XPO_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir)


def test_a_run_survives_a_restart_of_the_server_and_reports_what_failed(tmp_path: Path) -> None:
    """Every ninth answer is broken JSON, and the server is away for two seconds in the middle."""
    with LLMServer(faults=lambda number, question: "malformed" if number % 9 == 0 else None) as server:
        process = command(server, tmp_path, "hydra.run.dir=run")

        def restart() -> None:
            while len(server.requests) < 30:  # 16 before training, 16 in each step
                time.sleep(0.02)
            server.stop()
            time.sleep(2)
            server.start()

        thread = threading.Thread(target=restart, daemon=True)
        thread.start()
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
        thread.join(timeout=1)
        assert not thread.is_alive()

    entries = metrics(tmp_path / "run")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    for entry in steps:
        assert 0 < entry["preference/invalid_rate"] < 1
        assert 0 <= entry["preference/flip_rate"] <= 1
        rates = [entry[f"preference/{name}"] for name in ("win_rate", "tie_rate", "invalid_rate")]
        assert sum(rates) <= 1 + 1e-6
    evaluated = [entry for entry in entries if "eval_win_rate" in entry]
    assert len(evaluated) == 2
    assert all(0 < entry["eval_invalid_rate"] < 1 for entry in evaluated)
    assert "gave no verdict on" in stderr
    seen = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not seen
    assert KEY not in stdout + stderr
    assert set(server.keys) == {KEY}


def test_a_used_up_budget_stops_with_a_checkpoint_and_the_run_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    """16 questions of the evaluation and 16 of the first step: the second step does not fit into 40."""
    with LLMServer() as server:
        stopped = command(server, tmp_path, "hydra.run.dir=run", "judge.max_requests=40")
        _, stderr = stopped.communicate(timeout=240)
        assert stopped.returncode == 1
        assert "xpo: error: judge.max_requests=40 is used up: 32 questions asked, 16 more are needed" in stderr
        assert "xpo: continue with: python -m xpo.train" in stderr
        assert "Traceback" not in stderr
        assert is_complete(tmp_path / "run" / "model" / "checkpoint-1")
        asked = len(server.requests)
        assert asked == 32

        resumed = command(server, tmp_path, "hydra.run.dir=run", "judge.max_requests=90", "training.resume=auto")
        _, stderr = resumed.communicate(timeout=240)
        assert resumed.returncode == 0, stderr
        assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == [1, 2, 3]
        assert len(server.requests) <= 80  # two more steps and an evaluation; what it has heard before is kept
