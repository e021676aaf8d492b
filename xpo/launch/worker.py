"""One training run: builds everything from a resolved configuration, trains, evaluates, tracks.

`python -m xpo.launch.worker RUN_DIR` reads RUN_DIR/config.yaml, as written by `xpo.train`. It knows nothing
of Hydra's command line, so that any number of workers can be one run's process group.
"""

import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from transformers import ProgressCallback

from xpo.config.errors import ConfigError, JudgeStopped, RunInUse, nearest
from xpo.config.options import TrainSchema, flatten, to_dict
from xpo.data.prompt_sets import load_prompts
from xpo.launch.build import build, build_preference, check_target
from xpo.models.loading import load_model, load_tokenizer, lora_config, policy_directory
from xpo.models.memory import keep_freed_memory
from xpo.models.zero import loading_whole
from xpo.tracking import terminal as report
from xpo.tracking.history import evaluations
from xpo.tracking.mlflow_run import MLflowRun
from xpo.tracking.runs import RunRecord, drop_training_state
from xpo.training.callbacks import KeepCompletions, MLflowCallback, Profile, Progress, StopOnSignal
from xpo.training.config import XPOConfig
from xpo.training.trainer import XPOTrainer, check_same_zero, prompt_tokenizer, sampling_options

T = TypeVar("T")


def main() -> None:
    """The command line: `python -m xpo.launch.worker RUN_DIR`."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m xpo.launch.worker RUN_DIR")
    run_dir = Path(sys.argv[1])
    schema = OmegaConf.merge(OmegaConf.structured(TrainSchema), OmegaConf.load(run_dir / "config.yaml"))
    sys.exit(run(OmegaConf.to_object(schema), run_dir))  # type: ignore[arg-type]


def run(config: TrainSchema, run_dir: Path) -> int:
    """Trains as `config` says and leaves everything in `run_dir`; returns the exit status.

    Under several processes every rank calls this, and rank 0's run directory counts for all.
    """
    report.quiet()
    stop = StopOnSignal()
    pid = run_dir / "worker.pid"
    tracked: list[MLflowRun] = []  # filled by _run as soon as there is one, so that a crash can be recorded
    try:
        return _run(config, run_dir, stop, tracked)
    except KeyboardInterrupt:
        for mlflow_run in tracked:
            mlflow_run.finish("KILLED")
        print(f"\nxpo: stopped at once, without a checkpoint of the step in progress ({run_dir})", file=sys.stderr)
        return 128 + (stop.signal or 2)
    except RunInUse as error:
        print(f"xpo: error: {error}", file=sys.stderr)
        return error.status
    except (ConfigError, FloatingPointError, JudgeStopped) as error:
        _failed(tracked, f"{type(error).__name__}: {error}")
        status = 2 if isinstance(error, ConfigError) else 1
        if _first_to_fail(run_dir, status, str(error)):
            end_of_bar = "\n" if stop.in_training and not config.training.disable_tqdm else ""
            print(f"{end_of_bar}xpo: error: {error}", file=sys.stderr)
            if isinstance(error, JudgeStopped):
                print(f"xpo: continue with: {RunRecord.read(run_dir).command(run_dir)}", file=sys.stderr)
        return status
    except Exception as error:
        _failed(tracked, traceback.format_exc())
        reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        if "by peer" in reason:  # gloo's words for the death of another rank
            reason = "another process of the job has died, for want of memory perhaps"
        _first_to_fail(run_dir, 1, reason)
        traceback.print_exc()
        return 1
    finally:
        if pid.exists() and pid.read_text() == str(os.getpid()):  # and not that of a run at work here
            pid.unlink()


def _first_to_fail(run_dir: Path, status: int, reason: str) -> bool:
    """Leaves the reason in RUN_DIR/failure.json; False if another rank has done so."""
    try:
        with (run_dir / "failure.json").open("x") as file:
            json.dump({"status": status, "reason": reason}, file)
    except FileExistsError:
        return False
    except OSError:  # another machine's directory, or a full disk: say it, at least
        return True
    return True


def _failed(tracked: list[MLflowRun], reason: str) -> None:
    for mlflow_run in tracked:
        mlflow_run.set_tag("error", reason[-5000:])
        mlflow_run.finish("FAILED")


def _run(config: TrainSchema, run_dir: Path, stop: StopOnSignal, tracked: list[MLflowRun]) -> int:
    args = training_arguments(config, run_dir)
    main_process = args.process_index == 0
    if args.device.type == "cpu":
        keep_freed_memory()
    # Nodes may start in other directories, and without a shared disk they have no run.json.
    shared: list[Any] = [(str(run_dir.absolute()), asdict(RunRecord.read(run_dir))) if main_process else None]
    if args.world_size > 1:
        broadcast_object_list(shared)
    directory, fields = shared[0]
    record = RunRecord(**fields)
    if not main_process:
        run_dir = Path(directory)
        run_dir.mkdir(parents=True, exist_ok=True)
        args.output_dir = str(run_dir / "model")
    lock = FileLock(run_dir / "run.lock")
    if main_process:
        try:
            lock.acquire(timeout=0)  # until this process ends
        except Timeout:
            raise RunInUse(run_dir) from None
        (run_dir / "worker.pid").write_text(str(os.getpid()))  # signals go to this rank, which tells the others
    asked = os.environ.get("XPO_PROCESSES")
    if asked is not None and int(asked) != args.world_size:
        raise ConfigError(
            f"launch.command={config.launch.command!r} has started groups of {args.world_size} processes instead of "
            f"launch.num_processes={asked}; give {{num_processes}} to the command, or null for torchrun"
        )

    # What can be known to be wrong is found before any model loads.
    check_target("judge", config.judge)
    check_target("reward_model", config.reward_model)
    for name, scorer in config.evaluation.scorers.items():
        check_target(f"evaluation.scorers.{name}", scorer)
    checkpoint = record.resume_from
    if checkpoint is not None:
        check_same_zero(Path(checkpoint), args)
    args.eval_on_start = config.evaluation.before and config.data.eval is not None and checkpoint is None
    sampling_options(args)
    raw = {part: prompts(config, part) for part in ("train", "eval") if vars(config.data)[part]}
    with_code = config.model.trust_remote_code
    directory = policy_directory(config.model.name, config.model.revision, with_code=with_code)
    reference = config.model.reference or directory
    if config.model.reference:
        reference = policy_directory(config.model.reference, None, "model.reference", with_code)
    tokenizer = loaded("model.name", config.model.name, load_tokenizer, directory, config.model)
    tokenize = prompt_tokenizer(args, tokenizer)
    datasets = {part: tokenize(dataset, key=f"data.{part}") for part, dataset in raw.items()}

    mlflow_run = _tracking(config, run_dir, record) if config.tracking.enabled and main_process else None
    if mlflow_run is not None:
        tracked.append(mlflow_run)

    report.say(args, f"Loading {config.model.name}")
    ref_model = None
    with loading_whole():
        # The small ones first: what is not installed is missed before a large judge has loaded.
        scorers = {name: build(scorer) for name, scorer in config.evaluation.scorers.items()}
        reward_model, judge = build_preference(config.judge, config.reward_model)
        if config.model.reference:
            ref_model = loaded("model.reference", config.model.reference, load_model, reference, config.model)
    model = loaded("model.name", config.model.name, load_model, directory, config.model)
    trainer = XPOTrainer(
        model=model,
        ref_model=ref_model,
        judge=judge,
        reward_model=reward_model,
        args=args,
        processing_class=tokenizer,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        peft_config=lora_config(config.lora),
        scorers=scorers,
        callbacks=[stop],
    )
    trainer.add_callback(KeepCompletions(trainer.evaluator, run_dir / "completions", mlflow_run))
    if mlflow_run is not None:
        trainer.add_callback(MLflowCallback(mlflow_run))

    if config.training.profile:
        trainer.add_callback(Profile(run_dir / "profile" / f"rank_{args.process_index}.json.gz", mlflow_run))

    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress())
    report.say(args, f"Training{f' from {checkpoint}' if checkpoint else ''}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.signal is not None:
        if mlflow_run is not None:
            mlflow_run.finish("KILLED")
        report.say(args, report.how_to_continue(trainer.state.global_step, run_dir))
        _leave_together(trainer)
        # To torchrun any other status is a crash, and the parent sees that the run is not finished.
        return 0 if args.world_size > 1 and "XPO_PROCESSES" in os.environ else 128 + stop.signal

    trainer.save_model(_internal_call=True)  # before anything else can fail; pushing waits for the card
    # With the best model loaded, the last evaluation may be another model's.
    evaluated = _evaluated_last_step(trainer) and not args.load_best_model_at_end
    if "eval" in datasets and config.evaluation.after and not evaluated:
        report.say(args, "Evaluating after training")
        trainer.evaluate()
    if main_process:
        _finish(config, trainer, run_dir, record, mlflow_run)
    _leave_together(trainer)
    return 0


def _leave_together(trainer: XPOTrainer) -> None:
    """gloo may abort a rank whose peer has gone."""
    if trainer.args.world_size > 1:
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


def training_arguments(config: TrainSchema, run_dir: Path) -> XPOConfig:
    """The trainer's arguments; model and checkpoints go to RUN_DIR/model.

    Raises:
        ConfigError: an unknown name in training.kwargs, or values that TrainingArguments refuses.
    """
    training = {
        key: value
        for key, value in vars(config.training).items()
        if key not in ("kwargs", "profile", "keep_training_state", "resume") and value is not None
    }
    valid = inspect.signature(XPOConfig).parameters
    for key in config.training.kwargs:
        if key not in valid:
            raise ConfigError(
                f"training.kwargs.{key}={config.training.kwargs[key]!r} is not a TrainingArguments name"
                f"{nearest(key, valid)}; correct or remove it"
            )
    generation = {key: value for key, value in vars(config.generation).items() if key not in ("batch_size", "kwargs")}
    try:
        return XPOConfig(
            output_dir=str(run_dir / "model"),
            alpha=config.loss.alpha,
            beta=config.loss.beta,
            loss_type=config.loss.loss_type,  # type: ignore[arg-type]
            missing_eos_penalty=config.loss.missing_eos_penalty,
            **vars(config.preference),
            reference_store=config.reference.store,
            reference_batch_size=config.reference.batch_size,
            prompt_overflow=config.data.prompt_overflow,
            chat_template_kwargs=config.data.chat_template_kwargs or None,
            generation_batch_size=config.generation.batch_size,
            generation_kwargs=config.generation.kwargs or None,
            eval_greedy=config.evaluation.greedy,
            deepspeed=config.deepspeed.config or None,
            ds3_gather_for_generation=config.deepspeed.gather_for_generation,
            shard_reference=config.deepspeed.shard_reference,
            **generation,
            **training,
            **{"log_level": "error"} | config.training.kwargs,
        )
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {str(error).splitlines()[0]}; correct the values under training") from error


def loaded(key: str, name: str, load: Callable[..., T], *arguments: Any) -> T:
    """`load(*arguments)`, with one line for a directory that holds no such thing."""
    try:
        return load(*arguments)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{key}={name!r} cannot be loaded ({reason}); point {key} at a causal language model"
        ) from error


def prompts(config: TrainSchema, part: str) -> Dataset:
    """The prompts of a part, "train" or "eval", of the configured data."""
    name, split, limit = (vars(config.data)[key] for key in (part, f"{part}_split", f"{part}_limit"))
    dataset = load_prompts(f"data.{part}", name, split, config.data.prompt_column)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _tracking(config: TrainSchema, run_dir: Path, record: RunRecord) -> MLflowRun:
    run = MLflowRun(
        config.tracking.uri,
        config.tracking.experiment,
        config.tracking.run_name or record.name,
        params=record.choices | flatten(to_dict(config)) | _log10(config),
        tags={
            "xpo.run_dir": str(run_dir.resolve()),
            "xpo.job_key": record.job_key,
            "xpo.version": record.version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **record.tags,
            **config.tracking.tags,
        },
        run_id=record.mlflow_run_id,
        backlog=run_dir / "backlog.jsonl",
    )
    record.mlflow_run_id, record.mlflow_experiment_id = run.run_id, run.experiment_id
    record.write(run_dir)
    run.log_file(run_dir / "config.yaml")
    return run


def _log10(config: TrainSchema) -> dict[str, float]:
    """The exponent of alpha, which the MLflow UI itself would round to 0.00000."""
    alpha = config.loss.alpha
    return {"loss.log10_alpha": math.log10(alpha)} if isinstance(alpha, int | float) and alpha > 0 else {}


def _evaluated_last_step(trainer: XPOTrainer) -> bool:
    return any(
        entry["step"] == trainer.state.global_step and "eval_runtime" in entry for entry in trainer.state.log_history
    )


def _finish(
    config: TrainSchema, trainer: XPOTrainer, run_dir: Path, record: RunRecord, mlflow_run: MLflowRun | None
) -> None:
    """Model card, final metrics, and the last lines on the terminal."""
    history = trainer.state.log_history
    (run_dir / "metrics.json").write_text(json.dumps(history, indent=1))
    trainer.create_model_card()
    if mlflow_run is not None:
        last = evaluations(history)[-1:]
        final = {f"final/{name.removeprefix('eval_')}": value for entry in last for name, value in entry.items()}
        final |= {f"final/{key.removeprefix('loss.')}": value for key, value in _log10(config).items()}
        # At the last step: when a finished run is extended, these values are the newer ones.
        step = trainer.state.global_step
        mlflow_run.log_metrics({name: value for name, value in final.items() if name != "final/step"}, step)
        mlflow_run.finish()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    record.finished = True
    record.write(run_dir)
    if not config.training.keep_training_state:
        drop_training_state(run_dir)
    report.show_completions(trainer.evaluator.records, config.evaluation.show)
    report.show_table(history)
    report.show_where(run_dir, mlflow_run.ui_command() if mlflow_run else None)


if __name__ == "__main__":
    main()
