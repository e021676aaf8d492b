"""What TensorBoard, W&B and Trackio hold of a run, read from what they leave on the disk without a network."""

import importlib
import importlib.util
import json
import os
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import restored
from transformers.integrations.integration_utils import rewrite_logs

from xpo.config.compose import checked, compose
from xpo.config.errors import ConfigError
from xpo.config.options import LOGGERS
from xpo.launch import worker
from xpo.launch.build import build_arguments
from xpo.launch.jobs import prepare
from xpo.tracking import loggers
from xpo.tracking.metrics_log import read_metrics
from xpo.tracking.runs import RunRecord
from xpo.training.config import XPOConfig

INSTALLED = [name for name in LOGGERS if importlib.util.find_spec(name)]
# Of a process, which W&B and Trackio take for no point of a curve.
SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
Points = dict[tuple[str, int], float]  # by name and step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that reports to every logger that there is."""
    run_dir = tmp_path_factory.mktemp("day") / "time"
    words = ["experiment=smoke", "tracking=none", f"tracking.report_to={INSTALLED}".replace(" ", "")]
    config, _, choices = compose([*words, "training.disable_tqdm=true"])
    prepare(config, run_dir, choices, words, tags={"xpo.sweep": "a sweep"})
    alone = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(run_dir / "trackio")}
    with restored(), patch.dict(os.environ, alone), patch.object(sys, "argv", ["xpo.launch.worker", str(run_dir)]):
        with pytest.raises(SystemExit, match="0"):
            worker.main()
        for name in {"wandb", "trackio"}.intersection(INSTALLED):  # as they do when a process ends
            importlib.import_module(name).finish()
    return run_dir


def needs(package: str) -> None:
    if package not in INSTALLED:
        pytest.skip(f"{package} is not installed: pip install {package}")


def logged(run_dir: Path, left_out: tuple[str, ...] = ()) -> Points:
    """What metrics.jsonl says, by the names that transformers gives to all of its loggers."""
    return {
        (name, entry["step"]): value
        for entry in read_metrics(run_dir)
        for name, value in rewrite_logs({k: v for k, v in entry.items() if k not in ("step", *left_out)}).items()
    }


def check(found: Points, expected: Points) -> None:
    assert {"train/objective/kl", "train/exploration/bonus_share", "eval/win_rate"} <= {name for name, _ in expected}
    assert found.keys() == expected.keys()
    for point, value in expected.items():
        assert found[point] == pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True), point


def last_completions(run_dir: Path) -> list[list[Any]]:
    return json.loads((run_dir / "completions" / "step_000003.json").read_text())["data"]


def test_tensorboard_has_every_metric_and_the_completions(run_dir: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    check(found, logged(run_dir))
    table = events.Tensors("completions/text_summary")[-1]
    text = table.tensor_proto.string_val[0].decode()
    assert (table.step, len(text.splitlines())) == (3, 2 + len(last_completions(run_dir)))
    assert text.startswith("| prompt | completion | reference | verdict | score | ref_score | step |\n| --- |")
    assert last_completions(run_dir)[0][0] in text


def records(file: Path) -> Iterator[Any]:
    """What W&B has written: protobuf in the blocks of LevelDB's log, behind a head of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_has_every_metric_the_configuration_and_the_completions(run_dir: Path) -> None:
    needs("wandb")
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    found: Points = {}
    tables, begun = [], None
    for record in records(file):
        if record.HasField("run"):
            begun = record.run
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        step = json.loads(items.pop("train/global_step", "0"))
        tables += [json.loads(value) for name, value in items.items() if name.startswith("completions")]
        plain = {name: value for name, value in items.items() if not name.startswith(("_", "completions"))}
        found |= {(name, step): float(value.strip('"')) for name, value in plain.items()}
    check(found, logged(run_dir, SUMMARY))
    assert begun is not None
    settings = {update.key: json.loads(update.value_json) for update in begun.config.update}
    place = f"{run_dir.parent.name}/{run_dir.name}"
    assert (begun.project, begun.run_group, begun.display_name) == ("xpo", "a sweep", f"smoke {place}")
    assert settings["judge._target_"] == "xpo.judges.RewardJudge"
    assert tables
    shown = json.loads(max(file.parent.glob("files/media/table/*.json"), key=os.path.getmtime).read_text())
    assert [row[:2] for row in shown["data"]] == [row[:2] for row in last_completions(run_dir)]


def test_trackio_has_every_metric_and_the_completions(run_dir: Path) -> None:
    needs("trackio")
    rows = sqlite3.connect(run_dir / "trackio" / "xpo.db").execute("SELECT metrics FROM metrics ORDER BY id")
    found: Points = {}
    tables = []
    for (text,) in rows:
        metrics = json.loads(text)
        step = metrics.pop("train/global_step")
        tables += [metrics.pop("completions")["_value"]] if "completions" in metrics else []
        found |= {(name, step): value for name, value in metrics.items()}
    check(found, logged(run_dir, SUMMARY))
    assert [row["completion"] for row in tables[-1]] == [row[1] for row in last_completions(run_dir)]


def test_a_resumed_run_goes_on_in_the_run_that_wandb_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    import wandb

    begun: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(options))
    config = checked(compose(["experiment=smoke", "tracking.report_to=wandb", "tracking.run_name=mine"])[0])
    with patch.dict(os.environ):
        for name in ("a", "a", "b"):
            args = XPOConfig(str(tmp_path), use_cpu=True, report_to=["wandb"])
            loggers.start(config, args, tmp_path / name, RunRecord())
    assert [run["name"] for run in begun] == [f"mine {tmp_path.name}/{name}" for name in "aab"]
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]
    assert {run["resume"] for run in begun} == {"allow"}

    def refuse(**_: Any) -> None:
        raise wandb.Error("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"no run can be begun \(api_key not.*set WANDB_MODE=offline") as refused:
        loggers.start(config, args, tmp_path, RunRecord())
    assert "\n" not in str(refused.value)


def test_other_loggers_come_on_top(tmp_path: Path) -> None:
    """Those that tracking.report_to does not know."""
    words = ["experiment=smoke", "tracking.report_to=[tensorboard]", "+training.kwargs.report_to=[mlflow]"]
    assert build_arguments(checked(compose(words)[0]), tmp_path).report_to == ["tensorboard", "mlflow"]
