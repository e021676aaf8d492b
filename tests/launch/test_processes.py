"""The processes of a job: real ones, but of a few lines instead of a worker."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from xpo.config.errors import ConfigError
from xpo.config.options import LaunchOptions
from xpo.launch import processes as launch
from xpo.launch.processes import JobProcess, Outcome, command, environment
from xpo.tracking.runs import RunRecord

# Stands for the worker: its arguments are "xpo.launch.worker" and the run directory.
WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run_dir = Path(sys.argv[2])
def finish():
    (run_dir / "run.json").write_text(json.dumps({"finished": True}))
def ready():
    (run_dir / "worker.pid").write_text(str(os.getpid()))
"""


FAILED = Outcome("failed", 1, "exit status 1; one of its processes was killed perhaps")


def job(run_dir: Path, code: str, **options: object) -> JobProcess:
    """A job whose process runs `code`."""
    script = run_dir / "script.py"
    script.write_text(WORKER + code)
    RunRecord().write(run_dir)
    config = {"launch": {"command": f"{sys.executable} {script}"} | options, "deepspeed": {"config": {}}}
    OmegaConf.save(OmegaConf.create(config), run_dir / "config.yaml")
    return JobProcess(run_dir, output=run_dir / "output.log")


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} did not appear")


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("finish()", Outcome("finished", 0)),
        ("", Outcome("stopped", 143, "SIGTERM")),  # a group of processes in good order, which had not finished
        ("sys.exit(3)", Outcome("failed", 3, "exit status 3; one of its processes was killed perhaps")),
        (
            "(run_dir / 'failure.json').write_text(json.dumps({'status': 2, 'reason': 'a=1 is bad'})); sys.exit(1)",
            Outcome("failed", 2, "a=1 is bad"),
        ),
        ("(run_dir / 'failure.json').touch(); sys.exit(1)", FAILED),  # a full disk took no reason
        ("(run_dir / 'failure.json').write_text('[1]'); sys.exit(1)", FAILED),
        ("finish(); os.kill(os.getpid(), signal.SIGKILL)", Outcome("finished", 0)),
        ("sys.exit(75)", Outcome("running elsewhere", 2, "RUN_DIR is in use")),
        ("os.kill(os.getpid(), signal.SIGKILL)", Outcome("killed", 137, "SIGKILL, for want of memory perhaps")),
        ("sys.exit(143)", Outcome("stopped", 143, "SIGTERM")),
    ],
)
def test_how_a_job_ends(tmp_path: Path, code: str, outcome: Outcome):
    """State, exit status and a reason in one line."""
    told = job(tmp_path, code).wait()
    assert told._replace(reason=told.reason and told.reason.replace(str(tmp_path), "RUN_DIR")) == outcome


def test_a_run_that_another_command_has_taken(tmp_path: Path):
    """Under torchrun, whose own exit status hides that of the ranks."""
    with FileLock(tmp_path / "run.lock"):
        assert job(tmp_path, "sys.exit(1)").wait() == Outcome("running elsewhere", 2, f"{tmp_path} is in use")


def test_what_a_job_prints_goes_to_its_file(tmp_path: Path):
    """Both streams, behind what is there."""
    (tmp_path / "output.log").write_text("before\n")
    job(tmp_path, "print('out', flush=True); print('err', file=sys.stderr)").wait()
    assert (tmp_path / "output.log").read_text() == "before\nout\nerr\n"


def test_a_signal_goes_to_the_rank_that_has_a_pid_file(tmp_path: Path):
    """Not to the launcher, which would kill its ranks half a minute later."""
    launcher = """
child = subprocess.Popen([sys.executable, "-c", '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
''', str(run_dir / "worker.pid")])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
sys.exit(child.wait())
"""
    running = job(tmp_path, launcher)
    wait_for(tmp_path / "worker.pid")
    running.stop(signal.SIGTERM)
    assert running.wait() == Outcome("stopped", 143, "SIGTERM")


def test_a_signal_before_the_worker_has_begun(tmp_path: Path):
    """There is no pid file yet: it goes to the launcher."""
    running = job(tmp_path, "time.sleep(60)")
    running.stop(signal.SIGTERM)
    assert running.wait() == Outcome("stopped", 143, "SIGTERM")


def test_a_job_that_takes_too_long_is_asked_to_stop(tmp_path: Path):
    """It may write its checkpoint: the reason is the timeout all the same."""
    code = """
def stop(*_):
    (run_dir / "checkpoint").write_text("written")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
ready()
time.sleep(60)
"""
    running = job(tmp_path, code, timeout=1000.0)
    wait_for(tmp_path / "worker.pid")
    running._deadline = time.monotonic()
    assert running.wait() == Outcome("timed out", 1, "launch.timeout=1000 seconds have passed")
    assert (tmp_path / "checkpoint").read_text() == "written"


def test_a_job_that_does_not_stop_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a grace period."""
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
(run_dir / "child").write_text(str(child.pid))
ready()
time.sleep(60)
"""
    running = job(tmp_path, code, timeout=1000.0)
    wait_for(tmp_path / "worker.pid")
    running._deadline = time.monotonic()
    assert running.wait().state == "timed out"
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_command_that_does_not_exist(tmp_path: Path):
    """One line with key, value and remedy."""
    config = {"launch": {"command": "no-such-launcher -m"}, "deepspeed": {"config": {}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"launch.command='no-such-launcher -m' cannot be started .*; correct it"):
        JobProcess(tmp_path)


def test_the_command_of_a_job(tmp_path: Path):
    """Plain Python, torchrun, or the user's."""
    python = [sys.executable, "-m", "xpo.launch.worker", str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    assert command(LaunchOptions(), tmp_path, with_deepspeed=False) == python
    assert command(LaunchOptions(), tmp_path, with_deepspeed=True) == [*torchrun, "1", *python[1:]]
    assert command(LaunchOptions(num_processes=4), tmp_path, with_deepspeed=False) == [*torchrun, "4", *python[1:]]
    own = LaunchOptions(num_processes=4, command="accelerate launch --num_processes {num_processes} -m")
    words = ["accelerate", "launch", "--num_processes", "4", "-m", "xpo.launch.worker", str(tmp_path)]
    assert command(own, tmp_path, with_deepspeed=True) == words


def test_the_environment_of_a_job(monkeypatch: pytest.MonkeyPatch):
    """Its devices, its share of the cores that the command may use, and how long a thread of it waits for work."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    parent = {"XPO_PARENT": f"{os.getpid()}@{socket.gethostname()}", "GOMP_SPINCOUNT": "1000"}
    assert environment(LaunchOptions(), None, 1) == parent | {"XPO_PROCESSES": "1"}
    assert environment(LaunchOptions(num_processes=2), [4, 5], 2) == parent | {
        "XPO_PROCESSES": "2",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "OMP_NUM_THREADS": "4",
    }
    # Without a sweep; what the training process leaves is free for a judge.
    assert environment(LaunchOptions(devices=[2, 3]), None, 1)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in environment(LaunchOptions(num_processes=2), None, 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "GOMP_SPINCOUNT" not in environment(LaunchOptions(), None, 1)


def test_signals_are_passed_on_and_remembered():
    """Within the block; afterwards they mean what they did before."""
    stopped: list[int] = []
    launch.signals.clear()
    before = signal.getsignal(signal.SIGTERM)
    with launch.passing_on_signals(stopped.append):
        threading.Thread(target=lambda: subprocess.run(["kill", "-TERM", str(os.getpid())])).start()
        for _ in range(200):
            if stopped:
                break
            time.sleep(0.05)
    assert stopped == launch.signals == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before
    launch.signals.clear()


def test_a_process_that_ends_at_once_says_and_does_what_it_had_to():
    code = "import atexit; from xpo.launch.processes import exit_at_once; atexit.register(print, 'kept')"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('said'); exit_at_once(3)"], capture_output=True)
    assert (done.returncode, done.stdout.split()) == (3, [b"said", b"kept"])
