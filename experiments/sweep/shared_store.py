"""What the shared reference store saves: a sweep of eight jobs beside the same eight jobs, each on its own.

    python experiments/sweep/shared_store.py                          # SmolLM2-135M, some 15 minutes on two cores
    python experiments/sweep/shared_store.py experiment=smoke         # does it run? two minutes

Both are `python -m xpo.train -m` with the same keys; alone, a job has no store, so it draws every reference completion
itself. Start-up and loading are in both times. Further arguments are overrides. Run it on an idle machine.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOBS = ["loss.alpha=0,1e-4,1e-3,1e-2", "loss.beta=0.05,0.2"]
SHORT = ["training.max_steps=4", "training.save_strategy=no", "data.eval=null", "tracking=none"]


def sweep(store: str, overrides: list[str]) -> float:
    """Seconds of the eight jobs."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "xpo.train", "-m", *SHORT, *overrides, *JOBS, f"reference.store={store}"]
        started = time.monotonic()
        with (Path(directory) / "log").open("w") as log:
            status = subprocess.run(command, cwd=directory, stdout=log, stderr=log, env=os.environ).returncode
        if status:
            sys.exit((Path(directory) / "log").read_text()[-3000:])
        return time.monotonic() - started


def main() -> None:
    overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        shared = sweep(f"{directory}/reference.sqlite", overrides)
        print(f"eight jobs with one store:  {shared:6.0f} s", flush=True)
        apart = sweep("off", overrides)
    print(f"eight jobs without a store: {apart:6.0f} s, {apart / shared:.2f} times as long")


if __name__ == "__main__":
    main()
