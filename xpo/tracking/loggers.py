"""TensorBoard, W&B and Trackio beside MLflow. transformers' callbacks send them all that is logged; here is the rest.

They call a metric of training train/NAME, one of an evaluation eval/NAME; MLflow NAME and eval/NAME.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from xpo.config.errors import ConfigError, first_line
from xpo.config.schema import TrainSchema, flatten, to_dict
from xpo.tracking.completions import COMPLETION_COLUMNS
from xpo.tracking.runs import RunRecord


def start(config: TrainSchema, args: TrainingArguments, run_dir: Path, record: RunRecord) -> None:
    """Names the run for the loggers that `args` report to; one that is resumed goes on in the run it has there.

    ConfigError: W&B does not begin a run. Before it is known, no model should load.
    """
    place = run_dir.absolute()
    # Runs of the same name are one run in Trackio.
    args.run_name = f"{config.tracking.run_name or record.name} {place.parent.name}/{place.name}"
    args.project = config.tracking.experiment
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir / "tensorboard"))
    if "wandb" not in args.report_to:
        return
    import wandb

    try:
        wandb.init(  # transformers takes a run that there is
            project=os.environ.get("WANDB_PROJECT", args.project),
            name=args.run_name,
            group=record.tags.get("xpo.sweep"),
            config=flatten(to_dict(config)),
            dir=run_dir,
            id=hashlib.sha256(f"{place} {record.job_key}".encode()).hexdigest()[:16],
            resume="allow",
        )
    except wandb.Error as error:
        raise ConfigError(
            f"tracking.report_to=wandb: no run can be begun ({first_line(error)}); "
            "give WANDB_API_KEY, or set WANDB_MODE=offline and send it later with `wandb sync`"
        ) from error


def log_completions(rows: list[list[Any]], step: int, report_to: list[str], callbacks: CallbackHandler) -> bool:
    """Shows completions, rows of COMPLETION_COLUMNS, in each logger that has a place for them; whether one has."""
    columns: list[Any] = list(COMPLETION_COLUMNS)
    if "mlflow" in report_to:
        import mlflow

        by_column = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
        mlflow.log_table(by_column, f"completions_{step}.json")
    if "wandb" in report_to:
        import wandb

        wandb.log({"completions": wandb.Table(columns=columns, data=rows), "train/global_step": step})
    if "trackio" in report_to:
        import pandas
        import trackio

        table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))
        trackio.log({"completions": table, "train/global_step": step})
    if "tensorboard" in report_to:
        for callback in callbacks.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_text("completions", _markdown([columns, ["---"] * len(columns), *rows]), step)
    return bool({"mlflow", "wandb", "trackio", "tensorboard"}.intersection(report_to))


def _markdown(rows: list[list[Any]]) -> str:
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
