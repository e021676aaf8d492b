"""The processes of one job: how they start, how they are stopped, what became of them. Layer 0: no torch."""

import atexit
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import psutil
from omegaconf import OmegaConf

from xpo.config.errors import ConfigError, RunInUse
from xpo.config.files import read_object
from xpo.config.options import LaunchOptions
from xpo.tracking.runs import RunRecord, in_use

# Turns that a thread of GNU's OpenMP, which torch uses on CPUs, looks for work before it sleeps. By default it keeps a
# core for milliseconds, and beside two busy processes a step takes four times as long. Measured in docs/speed.md.
SPINS = "1000"
_END_S = 30.0  # for killed processes to be gone
GRACE_S = 120.0  # from the request to stop until a job is killed


class Outcome(NamedTuple):
    """How a job ended."""

    state: str  # finished, failed, killed, stopped, timed out or running elsewhere
    status: int  # the exit status that it means for a command
    reason: str | None = None  # in one line


exit_statuses: list[int] = []  # of what this process was asked to run
signals: list[int] = []  # that reached this process: nothing more starts then


@contextmanager
def passing_on_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Within, `stop` is called with each SIGINT and SIGTERM that reaches this process."""

    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        stop(number)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class JobProcess:
    """The worker process, or the process group, that trains in a run directory; ConfigError if it cannot be started.

    Args:
        run_dir: as `xpo.launch.jobs.prepare` leaves it.
        devices: the GPUs that it may use; None for launch.devices.
        at_once: jobs that share the machine.
        output: a file for what it prints; None for the terminal.
    """

    def __init__(
        self, run_dir: Path, devices: Sequence[int] | None = None, at_once: int = 1, output: Path | None = None
    ):
        config = OmegaConf.load(run_dir / "config.yaml")
        self.run_dir = run_dir
        self.launch = LaunchOptions(**config.launch)
        self._signal: int | None = None
        self._deadline = time.monotonic() + self.launch.timeout if self.launch.timeout else None
        words = command(self.launch, run_dir, with_deepspeed=bool(config.deepspeed.config))
        with nullcontext() if output is None else output.open("a") as stream:
            try:
                # A session of its own: Ctrl-C in a terminal would reach the worker twice otherwise.
                self._process = subprocess.Popen(
                    words,
                    start_new_session=True,
                    env=os.environ | environment(self.launch, devices, at_once),
                    stdout=stream,
                    stderr=stream and subprocess.STDOUT,
                )
            except OSError as error:
                raise ConfigError(
                    f"launch.command={self.launch.command!r} cannot be started ({error}); "
                    "correct it, or null for torchrun"
                ) from error

    def stop(self, number: int) -> None:
        """Asks the job to write a checkpoint and end; a second time, to end at once."""
        self._signal = number
        try:
            # One rank suffices: it tells the others. A launcher would kill them after half a minute.
            os.kill(int((self.run_dir / "worker.pid").read_text()), number)
        except (OSError, ValueError):
            if self._process.poll() is None:
                self._process.send_signal(number)  # it has not begun

    def wait(self) -> Outcome:
        """Waits for the end, or until launch.timeout has passed."""
        try:
            status = self._process.wait(self._deadline and max(self._deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self.stop(signal.SIGTERM)
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self._kill()
            if RunRecord.read(self.run_dir).finished:
                return Outcome("finished", 0)
            return Outcome("timed out", 1, f"launch.timeout={self.launch.timeout:g} seconds have passed")
        return self._outcome(status)

    def _kill(self) -> None:
        launcher = psutil.Process(self._process.pid)
        processes = [*launcher.children(recursive=True), launcher]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        # The kernel takes its time; the next job may need their devices.
        until = time.monotonic() + _END_S
        while any(map(_is_alive, processes)) and time.monotonic() < until:
            time.sleep(0.02)

    def _outcome(self, status: int) -> Outcome:
        failure = self.run_dir / "failure.json"
        if RunRecord.read(self.run_dir).finished and not failure.exists():  # whatever came after its end
            return Outcome("finished", 0)
        if status == 0 or self._signal is not None:
            number = self._signal or signal.SIGTERM
            return Outcome("stopped", 128 + number, signal.Signals(number).name)
        if status < 0:
            return Outcome("killed", 128 - status, f"{signal.Signals(-status).name}, for want of memory perhaps")
        elsewhere = Outcome("running elsewhere", 2, f"{self.run_dir} is in use")
        if status == RunInUse.status:
            return elsewhere
        if failure.exists():
            with suppress(ConfigError):  # a full disk takes no reason
                return read_object(failure, partial(Outcome, "failed"))
        if status - 128 in (signal.SIGINT, signal.SIGTERM):
            return Outcome("stopped", status, signal.Signals(status - 128).name)
        if in_use(self.run_dir):  # torchrun does not pass on the status of RunInUse, and ours are gone
            return elsewhere
        return Outcome("failed", status, f"exit status {status}; one of its processes was killed perhaps")


def _is_alive(process: psutil.Process) -> bool:
    """False also for a zombie, which holds nothing any more."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def command(launch: LaunchOptions, run_dir: Path, with_deepspeed: bool) -> list[str]:
    """The command line that starts the processes of a job."""
    worker = ["xpo.launch.worker", str(run_dir)]
    if launch.command is not None:
        return [*shlex.split(launch.command.replace("{num_processes}", str(launch.num_processes))), *worker]
    if launch.num_processes == 1 and not with_deepspeed:
        return [sys.executable, "-m", *worker]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", str(launch.num_processes), "-m", *worker]


def environment(launch: LaunchOptions, devices: Sequence[int] | None, at_once: int) -> dict[str, str]:
    """What a job's processes see beside the environment: number, parent, GPUs, share of the CPU cores, patience."""
    added = {"XPO_PROCESSES": str(launch.num_processes), "XPO_PARENT": f"{os.getpid()}@{socket.gethostname()}"}
    devices = launch.devices if devices is None else devices
    if devices is not None:
        added["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    sharers = launch.num_processes * at_once
    if sharers > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1  # Slurm may give a few
        added["OMP_NUM_THREADS"] = str(max(cores // sharers, 1))
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.intersection(os.environ):
        added["GOMP_SPINCOUNT"] = SPINS
    return added


def exit_at_once(status: int) -> NoReturn:
    """Ends this process without the interpreter's own last steps, in which gloo aborts it now and then.

    DistributedDataParallel leaves gloo's threads running. One that still has a tensor to free needs the interpreter,
    and the process ends with status -6 behind a finished run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
