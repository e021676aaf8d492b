"""One training run: builds everything from a resolved configuration, trains, evaluates, tracks.

`python -m xpo.launch.worker RUN_DIR` reads RUN_DIR/config.yaml, as written by `xpo.train`. It knows nothing
of Hydra's command line, so that any number of workers can be one run's process group.
"""

import json
import math
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from xpo.config.errors import ConfigError, JudgeStopped, RunInUse, first_line, printable
from xpo.config.schema import TrainSchema, flatten, to_dict
from xpo.data.pair_file import NAME, export
from xpo.launch.build import build_arguments, build_inputs, build_trainer
from xpo.launch.command import print_error, speak_to_any_console
from xpo.launch.processes import exit_at_once
from xpo.models.devices import keep_freed_memory
from xpo.tracking import loggers
from xpo.tracking import terminal as report
from xpo.tracking.hub import push_run
from xpo.tracking.metrics_log import MetricsLog, evaluations
from xpo.tracking.mlflow_run import MLflowRun
from xpo.tracking.runs import RunRecord, drop_training_state, resumable_checkpoint
from xpo.training.callbacks import KeepCompletions, KeepMetrics, LogCompletionsCallback, Profile, StopOnSignal
from xpo.training.checkpoints import check_same_zero, is_full_disk
from xpo.training.trainer import XPOTrainer


def main() -> None:
    """The command line: `python -m xpo.launch.worker RUN_DIR`."""
    speak_to_any_console()
    if len(sys.argv) != 2:
        sys.exit("usage: python -m xpo.launch.worker RUN_DIR")
    run_dir = Path(sys.argv[1])
    schema = OmegaConf.merge(OmegaConf.structured(TrainSchema), OmegaConf.load(run_dir / "config.yaml"))
    status = run(OmegaConf.to_object(schema), run_dir)  # type: ignore[arg-type]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        exit_at_once(status)
    sys.exit(status)


def run(config: TrainSchema, run_dir: Path) -> int:
    """Trains as `config` says and leaves everything in `run_dir`, of all ranks in rank 0's; returns the exit status."""
    report.quiet()
    stop = StopOnSignal()
    tracked: list[MLflowRun] = []  # filled by _run as soon as there is one, so that a crash can be recorded
    try:
        return _run(config, run_dir, stop, tracked)
    except KeyboardInterrupt:
        for mlflow_run in tracked:
            mlflow_run.finish("KILLED")
        done = RunRecord.read(run_dir).finished
        what = "after the run had finished" if done else "at once, without a checkpoint of the step in progress"
        print(f"\nxpo: stopped {what} ({run_dir})", file=sys.stderr)
        return 128 + (stop.signal or 2)
    except RunInUse as error:
        print_error(error)
        return error.status
    except (ConfigError, FloatingPointError, JudgeStopped) as error:
        _failed(tracked, f"{type(error).__name__}: {error}")
        status = 2 if isinstance(error, ConfigError) else 1
        if _first_to_fail(run_dir, status, str(error)):
            if stop.in_training and not config.training.disable_tqdm:
                print(file=sys.stderr)  # behind the bar
            print_error(error)
            if isinstance(error, JudgeStopped):
                print(f"xpo: continue with: {RunRecord.read(run_dir).command(run_dir)}", file=sys.stderr)
        return status
    except (Exception, SystemExit) as error:  # a judge may call sys.exit
        _failed(tracked, traceback.format_exc())
        lacks = "room on the disk" if is_full_disk(error) else "memory" if _is_out_of_memory(error) else None
        if lacks is not None:
            words, kept = RunRecord.read(run_dir).command(run_dir), resumable_checkpoint(run_dir)
            remedy = "lower batch sizes and lengths or make room" if lacks == "memory" else "make room"
            reason = f"no {lacks} ({first_line(error)[:100]}), kept is {kept or 'no checkpoint'}; {remedy}"
            _first_to_fail(run_dir, 1, reason)
            print_error(f"{reason}, and continue with: {words}")
            return 1
        reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        if "by peer" in reason:  # gloo's words for the death of another rank
            reason = "another process of the job has died, for want of memory perhaps"
        _first_to_fail(run_dir, 1, reason)
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    finally:
        pid = run_dir / "worker.pid"
        if pid.exists() and pid.read_text() == str(os.getpid()):  # and not that of a run at work here
            pid.unlink()


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "annot allocate memory")  # of torch's allocator, of the system
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in str(error) for part in words)


def _first_to_fail(run_dir: Path, status: int, reason: str) -> bool:
    """Leaves the reason in RUN_DIR/failure.json; False if another rank has done so."""
    try:
        with (run_dir / "failure.json").open("x") as file:
            json.dump({"status": status, "reason": reason}, file)
    except OSError as error:  # on another machine's directory, or a full disk: say it, at least
        return not isinstance(error, FileExistsError)
    return True


def _failed(tracked: list[MLflowRun], reason: str) -> None:
    for mlflow_run in tracked:
        mlflow_run.set_tag("error", reason[-5000:])
        mlflow_run.finish("FAILED")


def _run(config: TrainSchema, run_dir: Path, stop: StopOnSignal, tracked: list[MLflowRun]) -> int:
    args = build_arguments(config, run_dir)
    main_process = args.process_index == 0
    if args.device.type == "cpu":
        keep_freed_memory()
    # Nodes may start in other directories, and without a shared disk they have no run.json.
    shared: list[Any] = [(run_dir.absolute(), RunRecord.read(run_dir)) if main_process else None]
    if args.world_size > 1:
        broadcast_object_list(shared)
    directory, record = shared[0]
    if record.finished:  # of a command that is repeated, by a scheduler perhaps
        report.say(args, f"The run in {directory} has finished; for another one choose another hydra.run.dir")
        return 0
    if main_process:
        lock = FileLock(run_dir / "run.lock")
        try:
            lock.acquire(timeout=0)  # until this process ends
        except Timeout:
            raise RunInUse(run_dir) from None
        (run_dir / "worker.pid").write_text(str(os.getpid()))  # signals go to this rank, which tells the others
    else:
        run_dir = directory
        run_dir.mkdir(parents=True, exist_ok=True)
        args.output_dir = str(run_dir / "model")
    asked = os.environ.get("XPO_PROCESSES")
    if asked is not None and int(asked) != args.world_size:
        raise ConfigError(
            f"launch.command={config.launch.command!r} has started groups of {args.world_size} processes instead of "
            f"launch.num_processes={asked}; give {{num_processes}} to the command, or null for torchrun"
        )

    checkpoint = record.resume_from
    if checkpoint is not None:
        check_same_zero(Path(checkpoint), args)
    args.eval_on_start = config.evaluation.before and config.data.eval is not None and checkpoint is None
    inputs = build_inputs(config, args)
    log = MetricsLog(run_dir) if main_process else None
    mlflow_run = _tracking(config, log, record) if config.tracking.enabled and log is not None else None
    if mlflow_run is not None:
        tracked.append(mlflow_run)
    if args.report_to and main_process:
        loggers.start(config, args, run_dir, record)

    report.say(args, f"Loading {config.model.name}")
    trainer = build_trainer(config, args, inputs, [stop])
    trainer.add_callback(KeepCompletions(trainer.evaluator, run_dir / "completions"))
    if log is not None:
        trainer.add_callback(KeepMetrics(log, mlflow_run))
    if args.report_to:
        trainer.add_callback(LogCompletionsCallback(trainer))
    if config.training.profile:
        trainer.add_callback(Profile(run_dir / "profile" / f"rank_{args.process_index}.json.gz"))
    report.say(args, f"Training{f' from {checkpoint}' if checkpoint else ''}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signal is not None:
        if mlflow_run is not None:
            mlflow_run.finish("KILLED")
        words = RunRecord.read(run_dir).command(run_dir)
        report.say(args, f"Stopped at step {trainer.state.global_step}. Continue with: {words}")
        _leave_together(trainer)
        # To torchrun any other status is a crash, and the parent sees that the run is not finished.
        return 0 if args.world_size > 1 and "XPO_PROCESSES" in os.environ else 128 + stop.signal

    trainer.save_model(_internal_call=True)  # before anything else can fail; pushing waits for the card
    evaluated = any(entry["step"] == trainer.state.global_step for entry in evaluations(trainer.state.log_history))
    # With the best model loaded, the last evaluation may be another model's.
    if "eval" in inputs.datasets and config.evaluation.after and (args.load_best_model_at_end or not evaluated):
        report.say(args, "Evaluating after training")
        trainer.evaluate()
    if log is not None:
        _finish(config, trainer, log, record, mlflow_run)
    _leave_together(trainer)
    return 0


def _leave_together(trainer: XPOTrainer) -> None:
    """gloo may abort a rank whose peer has gone."""
    if trainer.args.world_size > 1:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


_MAX_TAG = 5000  # characters that MLflow keeps


def _tracking(config: TrainSchema, log: MetricsLog, record: RunRecord) -> MLflowRun:
    run_dir = log.path.parent
    params = record.choices | flatten(to_dict(config)) | _log10(config)
    swept = [key for key in record.tags.get("xpo.sweep_keys", "").split(",") if key]
    for key in [*swept, *["loss.log10_alpha"] * ("loss.alpha" in swept)]:
        # A run without a value would be missing in MLflow's parallel coordinates.
        params[key] = "null" if params.get(key) is None else params[key]
    run = MLflowRun(
        config.tracking.uri,
        config.tracking.experiment,
        config.tracking.run_name or record.name,
        params=params,
        tags={
            "xpo.run_dir": str(run_dir.resolve()),
            "xpo.job_key": record.job_key,
            "xpo.version": record.version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mlflow.source.name": record.command()[:_MAX_TAG],
            **record.tags,
            **config.tracking.tags,
        },
        log=log,
        run_id=record.mlflow_run_id,
    )
    record.mlflow_run_id, record.mlflow_experiment_id = run.run_id, run.experiment_id
    record.write(run_dir)
    return run


def _log10(config: TrainSchema) -> dict[str, float]:
    """The exponent of alpha, which the MLflow UI itself would round to 0.00000."""
    alpha = config.loss.alpha
    return {"loss.log10_alpha": math.log10(alpha)} if isinstance(alpha, int | float) and alpha > 0 else {}


def _finish(
    config: TrainSchema, trainer: XPOTrainer, log: MetricsLog, record: RunRecord, mlflow_run: MLflowRun | None
) -> None:
    """Model card, final metrics, and the last lines on the terminal."""
    history, run_dir = trainer.state.log_history, log.path.parent
    trainer.create_model_card()
    export([run_dir / NAME], run_dir / "pairs.parquet")
    last = evaluations(history)[-1] if evaluations(history) else {}
    final = {name.removeprefix("eval_"): value for name, value in last.items() if name != "step"}
    final |= {name.removeprefix("loss."): value for name, value in _log10(config).items()}
    # At the last step: when a finished run is extended, these values are the newer ones.
    log.append({f"final/{name}": value for name, value in final.items()} | {"step": trainer.state.global_step})
    log.sync()
    if mlflow_run is not None:
        mlflow_run.finish()
    record.finished = True
    record.write(run_dir)
    if not config.training.keep_training_state:
        drop_training_state(run_dir)
    report.show_completions(trainer.evaluator.records, config.evaluation.show)
    report.show_table(history)
    report.show_best(history)
    report.show_exploration(history, config.loss.alpha)
    report.show_where(run_dir, mlflow_run.ui_command() if mlflow_run else None)
    if trainer.args.push_to_hub:
        _push(trainer, run_dir)


def _push(trainer: XPOTrainer, run_dir: Path) -> None:
    """Sends the model to the hub. A run has finished without it: what the hub does not take can be pushed later."""
    args = trainer.args
    try:
        print("Hub:    ", *push_run(run_dir, str(trainer.hub_model_id), args.push_pairs, args.hub_revision), flush=True)
    except ConfigError as error:
        command = shlex.join(["python", "-m", "xpo.push", str(run_dir)])
        print(f"\n{printable(f'xpo: {error}, and push later: {command}')}", file=sys.stderr)  # behind a bar


if __name__ == "__main__":
    main()
