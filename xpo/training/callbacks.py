"""What happens beside training: stopping on a signal, logging, keeping completions, a profile, progress."""

import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from torch.profiler import profile, supported_activities
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from xpo.evaluation.evaluator import Evaluator
from xpo.judges.base import asked_to_stop
from xpo.models.batches import most
from xpo.tracking.completions import TABLE_NAME, completion_rows, write_table
from xpo.tracking.loggers import log_completions
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_run import MLflowRun
from xpo.tracking.terminal import show_completions, warn_of_no_bonus

logger = logging.getLogger(__name__)

_ECHO_S = 2.0


class StopOnSignal(TrainerCallback):
    """Ends training after the step in progress, with a checkpoint, when a signal asks for it.

    SIGINT and SIGTERM do, and so does the death of the parent process, or of the command behind a launcher. A second
    signal after two seconds, or one outside of training, raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.in_training = False
        asked_to_stop.clear()
        self._parent = os.getppid()
        # The command may have died before this process looks, or a launcher may stand between, on another machine even.
        pid, _, machine = os.environ.get("XPO_PARENT", "").partition("@")
        self._command = int(pid) if machine == socket.gethostname() else self._parent
        self._first_at = 0.0
        self._agreed = False  # a signal of which all ranks know
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        # A launcher passes on the signal that the terminal has sent to everybody already.
        again = self.signal is not None and time.monotonic() - self._first_at > _ECHO_S
        if self.signal is None:
            self.signal, self._first_at = number, time.monotonic()
            asked_to_stop.append(number)
        if again or not self.in_training:
            raise KeyboardInterrupt

    def _is_orphan(self) -> bool:
        if os.getppid() != self._parent:
            return True
        try:
            return self._command != self._parent and psutil.Process(self._command).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.in_training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.signal is None and self._is_orphan():
            self.signal = signal.SIGTERM
        self._agree(args)
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            args.save_only_model = False  # the run is to go on from this checkpoint

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a signal in an evaluation, the step that it belongs to is the last one."""
        if self.in_training and args.save_strategy != SaveStrategy.BEST:  # which would save the best only
            self.on_step_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A run that stops within an epoch has its checkpoint, and no evaluation that an uninterrupted run lacks."""
        if self._agreed and (state.epoch or 0) % 1:
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.in_training = False
        self._agree(args)  # on a signal since the last step, or some would evaluate, and wait for the others

    def _agree(self, args: TrainingArguments) -> None:
        """Signals reach the ranks at different moments: all stop after the same step."""
        if args.world_size > 1:
            self.signal = most(self.signal or 0, args.device) or None
        self._agreed = self.signal is not None


class KeepMetrics(TrainerCallback):
    """Writes every log to metrics.jsonl, on a resumed run behind what its checkpoint knows; MLflow follows."""

    def __init__(self, log: MetricsLog, run: MLflowRun | None = None):
        self.log = log
        self.run = run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.log.restore(state.log_history)
        if self.run is not None:
            self.run.follow(again=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.log.append(state.log_history[-1])
        if self.run is not None:
            self.run.follow()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.run is not None:
            self.run.flush()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.log.sync()


class WatchBonus(TrainerCallback):
    """A warning at the first log that can tell, if the exploration bonus has no gradient."""

    def __init__(self) -> None:
        self._told = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if state.is_world_process_zero and not self._told:
            self._told = warn_of_no_bonus(logs)


class KeepCompletions(TrainerCallback):
    """Writes the completions of each evaluation to a file, and all of them to one table for MLflow."""

    def __init__(self, evaluator: Evaluator, directory: Path):
        self.evaluator = evaluator
        self.directory = directory

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A resumed run has said nothing yet behind its checkpoint."""
        files = self.directory.glob("step_*.json") if state.is_world_process_zero else ()
        later = [file for file in files if int(file.stem.removeprefix("step_")) > state.global_step]
        for file in later:
            file.unlink()
        if later:
            self._write({})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            rows = completion_rows(self.evaluator.records, state.global_step)
            self._write({f"step_{state.global_step:06d}.json": rows})

    def _write(self, new: dict[str, list[list[Any]]]) -> None:
        """New files, and the table of all."""
        try:
            for name, rows in new.items():
                write_table(self.directory / name, rows)
            files = sorted(self.directory.glob("step_*.json"), reverse=True)  # newest first: a table opens at its top
            every = [row for file in files for row in json.loads(file.read_text())["data"]]
            write_table(self.directory / TABLE_NAME, every)
        except OSError as error:
            logger.warning("xpo: completions cannot be kept in %s (%s)", self.directory, error.strerror)


class LogCompletionsCallback(TrainerCallback):
    """Shows what policy and reference answer at each evaluation: as a table `completions` in MLflow, W&B, Trackio and
    TensorBoard, those of them that `report_to` names; else on the terminal.

    Args:
        trainer: an XPOTrainer.
        generation_config: not used, as evaluations sample like training; TRL's scripts pass one.
        num_prompts: the first so many; None: all of them.
        freq: evaluate every so many steps; None: as `eval_strategy` says.
    """

    def __init__(
        self, trainer: Any, generation_config: Any = None, num_prompts: int | None = None, freq: int | None = None
    ):
        self.evaluator: Evaluator = trainer.evaluator
        self.callback_handler = trainer.callback_handler
        self.num_prompts = num_prompts
        self.freq = freq

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.freq is not None and state.global_step % self.freq == 0:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        rows = completion_rows(self.evaluator.records[: self.num_prompts], state.global_step)
        if not log_completions(rows, state.global_step, args.report_to, self.callback_handler):
            show_completions(self.evaluator.records, len(rows))


class Profile(TrainerCallback):
    """Records the second optimizer step of this process with torch's profiler: rollout, preference, reference, update.

    The trace, at `path` in .json.gz, opens in chrome://tracing and https://ui.perfetto.dev.
    """

    def __init__(self, path: Path):
        self.path = path
        self._steps = 0
        self._profiler = profile(activities=supported_activities(), record_shapes=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._steps += 1
        if self._steps == 1:
            self._profiler.start()
        elif self._steps == 2:
            self._profiler.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.path))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._steps == 1:
            self._profiler.stop()
        if self._steps < 2:
            logger.warning("xpo: training.profile records the second step, and there was none")


_SHOWN = {  # of a training step
    "loss": "loss",
    "preference/win_rate": "wins",
    "objective/scores_margin": "reward margin",
    "objective/kl_policy": "kl",
    "completions/length": "length",
}
_SHOWN_OF_EVALUATION = {"win_rate": "wins", "score": "score", "kl": "kl", "eos_rate": "eos", "length": "length"}


def line_of(step: int, logs: dict[str, float]) -> str | None:
    """What a person watches of a log, in one line; None for a log of neither a training step nor an evaluation."""
    prefix = next((name.removesuffix("_win_rate") for name in logs if name.endswith("_win_rate")), None)
    if prefix is not None:
        shown = {f"{prefix}_{name}": label for name, label in _SHOWN_OF_EVALUATION.items()}
    elif "loss" in logs:
        prefix, shown = "step", _SHOWN
    else:
        return None
    return f"{prefix} {step:>4}  " + "  ".join(
        f"{label} {logs[name]:.3f}" for name, label in shown.items() if name in logs
    )


class Progress(ProgressCallback):
    """transformers' progress bar, with one short line per log instead of every metric."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if self.training_bar is not None and (line := line_of(state.global_step, logs)):
            self.training_bar.write(line)
            sys.stdout.flush()  # into a pipe or a file, too, a line appears with its step


class PrintLines(TrainerCallback):
    """The same lines where no progress bar is wanted."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if state.is_local_process_zero and (line := line_of(state.global_step, logs)):
            print(line, flush=True)


def print_short_lines(trainer: Any) -> None:
    """Puts one line per log in the place of transformers' thirty numbers; a notebook keeps its table."""
    for theirs, ours in ((ProgressCallback, Progress), (PrinterCallback, PrintLines)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours())
