"""What the two contenders share: the job they read, the clock that runs along, the result they write.

Runs in TRL's environment too, so it imports nothing of xpo.
"""

import hashlib
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

PHASES = ("rollout", "preference", "reference", "update", "optimizer", "other")
LOGGED = PHASES[:4]  # xpo times these itself, as perf/rollout_s and so on


def load_job() -> dict[str, Any]:
    """The job in the file named on the command line; see `run.write_job`."""
    return json.loads(Path(sys.argv[1]).read_text())


def load_model_and_tokenizer(job: dict[str, Any]) -> tuple[Any, Any]:
    """The policy in the job's directory and its tokenizer."""
    options = {"dtype": torch.float32} | job["settings"].get("model", {})
    return AutoModelForCausalLM.from_pretrained(job["model"], **options), AutoTokenizer.from_pretrained(job["model"])


def training_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The arguments that both trainers get; the contender's own settings win."""
    micro_batches = job["settings"].get("micro_batches", 1)
    return {
        "output_dir": job["output_dir"],
        "per_device_train_batch_size": job["batch"] // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": job["warmup"] + job["steps"],
        "learning_rate": 5e-7,
        "seed": job["seed"],
        "train_sampling_strategy": "sequential",  # step k has the same prompts everywhere
        "bf16": job["device"] == "cuda",
        "use_cpu": job["device"] == "cpu",
        "max_new_tokens": job["new_tokens"],
        "max_length": job["max_prompt"] + job["new_tokens"],
        "generation_kwargs": {"min_new_tokens": job["new_tokens"]} | job["settings"].get("generation_kwargs", {}),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | job["settings"].get("args", {})


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from the end of one to the end of the next, and of its phases.

    Data loading, clipping, logging and whatever else a trainer does between two steps all count.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.logs: list[dict[str, float]] = []
        self.prompts: list[list[int]] = []
        self._running = dict.fromkeys(PHASES, 0.0)
        self._begin = self._last = self._optimizer = self._others = 0.0

    def now(self) -> float:
        """The time when the device has finished what it was given."""
        if self.job["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, phase: str, seconds: float) -> None:
        self._running[phase] += seconds

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        started = self.now()
        yield
        self.add(phase, self.now() - started)

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its seconds counted for `phase`."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.measure(phase):
                return function(*args, **kwargs)

        return measured

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._others = cpu_seconds_of_others()
        self._begin = self._last = self.now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer = self.now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.add("optimizer", self.now() - self._optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.now()
        self.seconds.append(now - self._last)
        self.phases.append(self._running)
        self._running = dict.fromkeys(PHASES, 0.0)
        self._last = now
        # The next step takes about as long as this one: it must not end far beyond the budget.
        if now - self._begin + self.seconds[-1] > self.job["budget_s"]:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """xpo logs the seconds of a step's phases just after the step."""
        if len(self.logs) == len(self.seconds) or not self.phases:
            return  # the summary at the end
        self.logs.append({key: value for key, value in logs.items() if isinstance(value, int | float)})
        for phase in LOGGED:
            self.phases[-1][phase] += logs.get(f"perf/{phase}_s", 0.0)

    def write_result(self, packages: tuple[str, ...], new_tokens: float | None) -> None:
        """Writes what was measured to the job's file.

        Args:
            packages: whose versions to note.
            new_tokens: the mean length of the completions, as the trainer saw them.
        """
        for seconds, phases in zip(self.seconds, self.phases, strict=True):
            phases["other"] = seconds - sum(phases.values())
        warmup = min(self.job["warmup"], len(self.seconds) - 1)  # out of budget in warm-up: the last step counts
        batch = self.job["batch"]
        steps = [self.prompts[i * batch : (i + 1) * batch] for i in range(len(self.seconds))]
        result = {
            "seconds": self.seconds[warmup:],
            "phases": self.phases[warmup:],
            "warmup_seconds": self.seconds[:warmup],
            "warm": warmup == self.job["warmup"],
            "mean_s": statistics.mean(self.seconds[warmup:]),
            "prompt_tokens": [[len(ids) for ids in step] for step in steps[warmup:]],
            "prompt_hashes": [hashlib.sha256(repr(step).encode()).hexdigest()[:16] for step in steps[warmup:]],
            "new_tokens": new_tokens,
            "peak_bytes": peak_bytes(self.job["device"]),
            "others_cores": (cpu_seconds_of_others() - self._others) / (time.perf_counter() - self._begin),
            "logs": self.logs[warmup:],
            "settings": self.job["settings"],
            "threads": torch.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
        }
        Path(self.job["result"]).write_text(json.dumps(result))


def cpu_seconds_of_others() -> float:
    """CPU time that went to other processes, or was stolen from this machine, since some time; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, soft_irq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def peak_bytes(device: str) -> int:
    """The most memory that tensors took on the GPU, or this process in RAM."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # getrusage counts from before exec, when the process was a copy of its parent.
    for line in Path("/proc/self/status").read_text().splitlines() if os.path.exists("/proc/self/status") else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
