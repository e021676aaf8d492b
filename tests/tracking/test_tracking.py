"""MLflow runs on temporary databases: no point is lost, and none is logged twice."""

import itertools
import json
import logging
import math
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TrainerFactory, prompts
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from transformers import TrainerControl, TrainerState, TrainingArguments

from xpo.config.errors import ConfigError
from xpo.tracking import mlflow_run as tracking
from xpo.tracking.completions import TABLE_NAME, completion_rows, write_table
from xpo.tracking.metrics_log import MetricsLog, read_metrics
from xpo.tracking.mlflow_client import mark_ended, metric_name, set_tags
from xpo.tracking.mlflow_follower import TABLE_TAG, TABLE_TAG_VALUE, Followed
from xpo.tracking.mlflow_run import MLflowRun
from xpo.tracking.mlflow_ui import chart_link
from xpo.training.callbacks import KeepCompletions, KeepMetrics

# One import, three processes that start at the same time, each printing its experiment and its run.
RACE = """
import os, sys, tempfile
from pathlib import Path
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_run import MLflowRun

children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        log = MetricsLog(Path(tempfile.mkdtemp()))
        run = MLflowRun(sys.argv[1], "race", "r", params={"a": 1}, tags={}, log=log)
        log.append({"loss": 0.5, "step": 1})
        run.finish()
        os.write(1, f"{run.experiment_id} {run.run_id}\\n".encode())
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children) != 0)
"""


@pytest.fixture(scope="module")
def raced_database(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A database that did not exist when three processes started on it, and what they printed.

    The other tests begin with a copy, as its tables take seconds to make.
    """
    path = tmp_path_factory.mktemp("race") / "new" / "mlflow.db"
    command = [sys.executable, "-c", RACE, f"sqlite:///{path}"]
    return path, subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def uri(raced_database: tuple[Path, Any], tmp_path: Path) -> str:
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    shutil.copy(raced_database[0], tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_RETRY_S", 0.0)
    monkeypatch.setattr(tracking, "_LAST_RETRY_AFTER_S", (0.0, 0.01, 0.01, 0.01, 0.01))
    monkeypatch.setattr(tracking, "_FLUSH_SECONDS", math.inf)  # tests flush when they mean to


Start = Callable[..., MLflowRun]


@pytest.fixture
def new_log(tmp_path: Path) -> Callable[[], MetricsLog]:
    """The log of a run directory of its own."""
    numbers = itertools.count()

    def make() -> MetricsLog:
        run_dir = tmp_path / "runs" / str(next(numbers))
        run_dir.mkdir(parents=True)
        return MetricsLog(run_dir)

    return make


@pytest.fixture
def start(uri: str, new_log: Callable[[], MetricsLog]) -> Start:
    """start(params=..., tags=..., log=..., run_id=...): a run in the experiment "xpo"."""

    def make(params: dict[str, Any] | None = None, **options: Any) -> MLflowRun:
        log = options.pop("log", None) or new_log()
        return MLflowRun(uri, "xpo", "a1e-5", params=params or {}, log=log, **({"tags": {}} | options))

    return make


def log(run: MLflowRun, metrics: dict[str, float], step: int) -> None:
    run.log.append(metrics | {"step": step})
    run.follow()


def reopened(run: MLflowRun) -> MetricsLog:
    """The log of a run as another process reads it."""
    return MetricsLog(run.log.path.parent)


def stored(run: MLflowRun) -> Run:
    return MlflowClient(run.uri).get_run(run.run_id)


def points(run: MLflowRun, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric as the database holds them, in order of steps."""
    history = MlflowClient(run.uri).get_metric_history(run.run_id, key)
    return sorted((point.step, point.value) for point in history)


def refuse(monkeypatch: pytest.MonkeyPatch, run: MLflowRun, times: float) -> list[list[Metric]]:
    """Lets `log_batch` fail so many times; returns the points of each call."""
    original, calls = run.client.log_batch, []

    def log_batch(run_id: str, metrics: Any = (), **more: Any) -> None:
        calls.append(list(metrics))
        if len(calls) <= times:
            raise MlflowException("database is locked")
        original(run_id, metrics=metrics, **more)

    monkeypatch.setattr(run.client, "log_batch", log_batch)
    return calls


# ---- points ------------------------------------------------------------------------------------


def test_points_wait_in_a_buffer_until_they_are_flushed(start: Start) -> None:
    run = start()
    log(run, {"loss": 0.5, "kl": 2.0}, step=1)
    log(run, {"loss": 0.25}, step=2)
    assert points(run, "loss") == []
    run.flush()
    assert points(run, "loss") == [(1, 0.5), (2, 0.25)]
    assert points(run, "kl") == [(1, 2.0)]


def test_a_flush_sends_each_point_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    calls = refuse(monkeypatch, run, times=0)
    log(run, {"loss": 0.5}, step=1)
    run.flush()
    run.flush()
    assert [len(call) for call in calls] == [1]


def test_a_full_buffer_is_sent_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    calls = refuse(monkeypatch, run, times=0)
    for step in range(1, 500):
        log(run, {"loss": float(step)}, step)
    assert calls == []
    log(run, {"loss": 500.0}, 500)
    assert [len(call) for call in calls] == [500]


def test_more_points_than_one_request_holds_are_sent_in_parts(start: Start) -> None:
    run = start()
    log(run, {f"m{i}": float(i) for i in range(1200)}, step=3)  # MLflow takes 1000 in one request
    assert len(stored(run).data.metrics) == 1200


def test_an_old_buffer_is_sent_with_the_next_point(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    log(run, {"loss": 0.5}, step=1)
    monkeypatch.setattr(tracking, "_FLUSH_SECONDS", -1.0)
    log(run, {"loss": 0.25}, step=2)
    assert points(run, "loss") == [(1, 0.5), (2, 0.25)]


def test_values_that_are_no_number_are_stored_too(start: Start) -> None:
    run = start()
    log(run, {"nan": math.nan, "inf": math.inf}, step=1)
    run.flush()
    assert math.isnan(points(run, "nan")[0][1])
    assert points(run, "inf")[0][1] > 1e308


def test_a_name_that_mlflow_refuses_does_not_hold_back_the_other_points(start: Start) -> None:
    run = start(params={"data.kwargs.a[0]": 1})
    log(run, {"eval/tone (VADER), %": 0.5, "loss": 1.0, "x" * 300: 2.0}, step=1)
    run.flush()
    assert points(run, "eval/tone _VADER__ _") == [(1, 0.5)]
    assert points(run, "loss") == [(1, 1.0)]
    assert points(run, "x" * 250) == [(1, 2.0)]
    assert stored(run).data.params == {"data.kwargs.a_0_": "1"}


# ---- an unavailable database -------------------------------------------------------------------


def test_points_of_an_outage_are_sent_first_when_it_is_over(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = start()
    calls = refuse(monkeypatch, run, times=2)
    for step, loss in ((1, 0.5), (2, 0.25)):
        log(run, {"loss": loss}, step)
        run.flush()
        assert points(run, "loss") == []
    log(run, {"loss": 0.125}, step=3)
    run.flush()
    assert [[point.step for point in call] for call in calls] == [[1], [1, 2], [1, 2, 3]]
    assert points(run, "loss") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    run.finish()
    assert [record.getMessage() for record in caplog.records] == [
        f"xpo: MLflow does not take what the run logs (database is locked); it waits in {run.log.path.parent}",
        "xpo: MLflow is back and has what waited",
    ]


def test_training_does_not_wait_for_the_next_attempt(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is 5 seconds away, later ones 10, 20, 40, 60, 60."""
    monkeypatch.setattr(tracking, "_RETRY_S", 5.0)
    now = [1000.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tracking.time, "sleep", pytest.fail)
    run = start()
    calls, attempts = refuse(monkeypatch, run, times=math.inf), []
    for second in range(200):
        now[0] = 1000.0 + second
        log(run, {"loss": 0.5}, step=second)
        run.flush()
        attempts += [second] * (len(calls) - len(attempts))
    assert attempts == [0, 5, 15, 35, 75, 135, 195]


def test_a_training_step_sends_only_some_of_what_has_piled_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    calls = refuse(monkeypatch, run, times=1)
    log(run, {f"m{i}": float(i) for i in range(1200)}, step=1)
    monkeypatch.setattr(tracking, "_DRAIN_S", -1.0)
    for _ in range(5):
        run.flush()
    assert [len(call) for call in calls] == [500, 500, 500, 200]
    assert len(stored(run).data.metrics) == 1200


def test_the_end_of_a_run_waits_longer_for_the_database(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    log(run, {"loss": 0.5}, step=1)
    refuse(monkeypatch, run, times=4)
    run.finish()
    assert points(run, "loss") == [(1, 0.5)]
    assert stored(run).info.status == "FINISHED"


def test_a_file_that_its_store_refuses_holds_nothing_else_back(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when artifacts lie in a bucket and the credentials are missing: its client raises what it likes."""

    def refuse_file(*args: Any) -> None:
        raise RuntimeError("no credentials")

    run = start()
    run_dir = run.log.path.parent
    original = run.client.log_artifact
    monkeypatch.setattr(run.client, "log_artifact", refuse_file)
    (run_dir / "config.yaml").write_text("a: 1")
    log(run, {"loss": 0.5}, step=1)
    run.finish()
    assert points(run, "loss") == [(1, 0.5)]
    assert stored(run).info.status == "FINISHED"
    assert not Followed.read(run_dir).complete
    monkeypatch.setattr(run.client, "log_artifact", original)
    run.flush()
    assert [file.path for file in run.client.list_artifacts(run.run_id)] == ["config.yaml"]
    assert Followed.read(run_dir).complete


def test_training_goes_on_when_nothing_can_be_stored(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """And no file either: what is lost is said."""

    def unavailable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    run = start()
    run_dir = run.log.path.parent
    run_dir.rename(tmp_path / "gone")
    for method in ("log_batch", "log_artifact", "set_tag", "set_terminated"):
        monkeypatch.setattr(run.client, method, unavailable)
    log(run, {"loss": 0.5}, step=1)
    run.set_tag("a", "b")
    run.finish()
    assert [record.getMessage() for record in caplog.records] == [
        f"xpo: {run.log.path} cannot be written (No such file or directory); what it lacks waits in memory",
        f"xpo: MLflow does not take what the run logs (no route to host); it waits in {run_dir}",
        "xpo: the end of this run is lost (1 point, 0 files, 1 tag): neither MLflow nor a file has taken it",
    ]


def test_a_real_lock_is_waited_for(start: Start, uri: str) -> None:
    """Another process writes for a moment while the run flushes."""
    run = start()
    log(run, {"loss": 0.5}, step=1)
    other = sqlite3.connect(uri.removeprefix("sqlite:///"), check_same_thread=False, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.3, other.execute, ["COMMIT"])
    release.start()
    run.flush()
    release.join()
    assert points(run, "loss") == [(1, 0.5)]


# ---- resuming ----------------------------------------------------------------------------------


def test_a_resumed_run_that_repeats_steps_logs_each_point_once(start: Start) -> None:
    run = start()
    log(run, {"loss": 1.0}, step=1)
    log(run, {"loss": 2.0, "kl": 3.0}, step=2)
    run.flush()
    resumed = start(log=reopened(run), run_id=run.run_id)
    assert resumed.run_id == run.run_id
    for step, loss in ((2, 2.5), (3, 3.0)):
        log(resumed, {"loss": loss, "new": 0.0}, step)
        log(resumed, {"loss": 9.0, "new": 9.0}, step)
    resumed.flush()
    assert points(resumed, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert points(resumed, "kl") == [(2, 3.0)]
    assert points(resumed, "new") == [(2, 0.0), (3, 0.0)]


def test_a_resumed_run_keeps_its_params_and_gains_new_ones(start: Start) -> None:
    run = start(params={"loss.alpha": 1e-5})
    run.finish("KILLED")
    resumed = start(params={"loss.alpha": 1e-3, "loss.beta": 0.1}, run_id=run.run_id)
    assert stored(resumed).data.params == {"loss.alpha": "1e-05", "loss.beta": "0.1"}
    assert stored(resumed).info.status == "RUNNING"
    resumed.finish()
    assert stored(resumed).info.status == "FINISHED"


@pytest.mark.parametrize("gone", ["unknown", "deleted"])
def test_a_run_that_no_longer_exists_is_started_anew(start: Start, gone: str) -> None:
    run = start()
    MlflowClient(run.uri).delete_run(run.run_id)
    again = start(run_id=run.run_id if gone == "deleted" else "0" * 32)
    assert again.run_id not in (run.run_id, "0" * 32)
    assert again.experiment_id == run.experiment_id


def test_a_run_that_cannot_be_looked_up_is_not_started_anew(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(self: MlflowClient, run_id: str) -> None:
        raise MlflowException("database is locked", TEMPORARILY_UNAVAILABLE)

    run = start()
    monkeypatch.setattr(MlflowClient, "get_run", locked)
    monkeypatch.setattr(MlflowClient, "create_run", pytest.fail)
    with pytest.raises(ConfigError, match="database is locked"):
        start(run_id=run.run_id)


def trainer_event(callback: KeepMetrics, event: str, state: TrainerState, tmp_path: Path, **more: Any) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    getattr(callback, event)(args, state, TrainerControl(), **more)


def test_a_resumed_callback_first_logs_what_its_checkpoint_knows(start: Start, tmp_path: Path) -> None:
    """The killed process had not sent step 2; step 3 was sent, but lies behind the checkpoint and is repeated."""
    run = start()
    log(run, {"loss": 1.0}, 1)
    log(run, {"loss": 3.0}, 3)
    run.flush()
    history = [
        {"loss": 1.0, "learning_rate": 1e-6, "epoch": 0.1, "step": 1},
        {"loss": 2.0, "learning_rate": 1e-6, "epoch": 0.2, "step": 2},
        {"eval_win_rate": 0.5, "eval_runtime": 9.0, "epoch": 0.2, "step": 2},
    ]
    resumed = start(log=reopened(run), run_id=run.run_id)
    callback = KeepMetrics(resumed.log, resumed)
    state = TrainerState(log_history=history, global_step=2)
    trainer_event(callback, "on_train_begin", state, tmp_path)
    state.log_history.append({"loss": 3.5, "step": 3})
    trainer_event(callback, "on_log", state, tmp_path)
    resumed.flush()
    assert read_metrics(resumed.log.path.parent) == state.log_history
    assert points(resumed, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert points(resumed, "eval/win_rate") == [(2, 0.5)]
    assert points(resumed, "step") == []


def test_a_new_run_is_not_sent_what_another_one_has_logged_behind_its_checkpoint(start: Start, tmp_path: Path) -> None:
    """The run goes on from step 1 with other settings, and is another one in MLflow."""
    run = start()
    for step in (1, 2):
        log(run, {"loss": float(step)}, step)
    (run.log.path.parent / "config.yaml").write_text("a: 1")
    run.flush()
    other = start(log=reopened(run))
    assert other.run_id != run.run_id
    assert points(other, "loss") == []
    callback = KeepMetrics(other.log, other)
    state = TrainerState(log_history=[{"loss": 1.0, "step": 1}], global_step=1)
    trainer_event(callback, "on_train_begin", state, tmp_path)
    state.log_history.append({"loss": 2.5, "step": 2})
    trainer_event(callback, "on_log", state, tmp_path)
    other.finish()
    assert points(other, "loss") == [(1, 1.0), (2, 2.5)]
    other.finish("KILLED")  # by a signal in a push to the hub, say
    assert stored(other).info.status == "FINISHED"


def test_values_that_are_no_numbers_are_no_points(start: Start) -> None:
    run = start()
    log(run, {"loss": np.float32(0.5), "steps": np.int64(3), "note": "text", "none": None, "train_runtime": 9.0}, 1)
    run.flush()
    assert stored(run).data.metrics == {"loss": 0.5, "steps": 3.0}


def test_a_trainer_logs_every_step_and_evaluation_once(start: Start, make_trainer: TrainerFactory) -> None:
    run = start()
    trainer = make_trainer(
        max_steps=3, eval_dataset=prompts(2), eval_strategy="steps", eval_steps=2, callbacks=[KeepMetrics(run.log, run)]
    )
    trainer.train()
    trainer.evaluate()
    run.finish()
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert points(run, "loss") == list(logged.items())
    assert len(logged) == 3
    assert [step for step, _ in points(run, "eval/win_rate")] == [2, 3]
    names = set(stored(run).data.metrics)
    assert read_metrics(run.log.path.parent) == trainer.state.log_history
    assert {"loss/dpo", "objective/kl", "preference/win_rate", "perf/rollout_s", "alpha", "beta"} <= names
    assert not [name for name in names if name.startswith(("train_", "eval_"))]


def test_names_are_grouped_by_what_stands_before_the_slash() -> None:
    assert metric_name("eval_win_rate") == "eval/win_rate"
    assert metric_name("eval_chat_eval_rate") == "eval/chat_eval_rate"
    assert metric_name("objective/kl") == "objective/kl"
    assert metric_name("grad_norm") == "grad_norm"
    assert metric_name("evaluation") == "evaluation"


# ---- params, tags, status ----------------------------------------------------------------------


def test_a_value_of_more_than_6000_characters_keeps_its_beginning(start: Start) -> None:
    run = start(params={"long": "x" * 5999 + "yz" * 500})
    assert stored(run).data.params["long"] == "x" * 5999 + "y"


def test_more_params_than_one_request_holds_are_all_stored(start: Start) -> None:
    params = {f"group.p{i}": i for i in range(250)}
    assert stored(start(params=params)).data.params == {key: str(value) for key, value in params.items()}


def test_params_that_are_none_are_left_out_and_the_others_are_text(start: Start) -> None:
    run = start(params={"none": None, "list": [1e-5, 1e-6], "flag": False, "empty": ""})
    assert stored(run).data.params == {"list": "[1e-05, 1e-06]", "flag": "False", "empty": ""}


def test_a_name_that_is_too_long_for_some_databases_is_cut(uri: str, new_log: Callable[[], MetricsLog]) -> None:
    run = MLflowRun(uri, "xpo", "x" * 300, params={}, tags={}, log=new_log())
    assert stored(run).info.run_name == "x" * 250


def test_a_run_has_its_name_and_tags(start: Start) -> None:
    run = start(tags={"xpo.sweep": "alpha"})
    run.set_tag("error", "none")
    assert stored(run).info.run_name == "a1e-5"
    assert stored(run).data.tags.items() >= {"xpo.sweep": "alpha", "error": "none"}.items()


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_as_it_is_told_with_all_its_points(start: Start, status: str) -> None:
    run = start()
    assert stored(run).info.status == "RUNNING"
    log(run, {"loss": 0.5}, step=1)
    run.finish(status)
    assert stored(run).info.status == status
    assert stored(run).info.end_time is not None
    assert points(run, "loss") == [(1, 0.5)]


def test_only_the_run_itself_is_ended(start: Start) -> None:
    """Defect 26."""
    other, run = start(), start()
    run.finish()
    assert stored(other).info.status == "RUNNING"


# ---- where the runs are kept -------------------------------------------------------------------


def test_three_processes_on_an_empty_database_make_one_experiment_and_three_runs(
    raced_database: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    database, race = raced_database
    assert race.returncode == 0, race.stderr
    experiments, run_ids = zip(*(line.split() for line in race.stdout.splitlines()), strict=True)
    assert len(set(experiments)) == 1
    client = MlflowClient(f"sqlite:///{database}")
    assert sorted(e.name for e in client.search_experiments()) == ["Default", "race"]
    runs = client.search_runs([experiments[0]])
    assert sorted(run.info.run_id for run in runs) == sorted(run_ids)
    assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"loss": 0.5})] * 3


def test_the_loser_of_a_race_on_a_server_uses_the_winners_experiment(
    uri: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has no file to lock: the name is free when asked for, and taken when it is to be made."""
    taken = MlflowClient(uri).create_experiment("xpo")
    lookup, asked = MlflowClient.get_experiment_by_name, []

    def late(self: MlflowClient, name: str) -> Any:
        asked.append(name)
        return None if len(asked) == 1 else lookup(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert start().experiment_id == taken


def test_the_database_lies_in_the_working_directory_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, new_log: Callable[[], MetricsLog]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = MLflowRun(None, "xpo", "r", {}, {}, new_log())
    assert run.uri == uri
    assert run.ui_command() == f"mlflow ui --backend-store-uri {run.uri}"
    relative = MLflowRun("sqlite:///mlflow.db", "xpo", "r", {}, {}, new_log())
    assert relative.experiment_id == run.experiment_id


@pytest.mark.parametrize("name", ["feature%2Fx", "a?b=1", "a#b", "a b é"])
def test_the_working_directory_may_have_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raced_database: tuple[Path, Any]
) -> None:
    """Its name becomes part of URIs, which stand for this directory and no other."""
    there = tmp_path / name
    (there / "run").mkdir(parents=True)
    shutil.copy(raced_database[0], there / "mlflow.db")
    monkeypatch.chdir(there)
    run = MLflowRun(None, "other", "r", {"a": 1}, {}, MetricsLog(there / "run"))
    write_table(there / "run" / "completions" / "step_000001.json", [])
    run.finish()
    again = MLflowRun(run.uri, "other", "r", {}, {}, MetricsLog(there / "run"), run_id=run.run_id)
    assert (again.uri, again.run_id) == (run.uri, run.run_id)
    assert stored(again).data.params == {"a": "1"}
    assert list(there.glob("mlruns/other/*/artifacts/completions/step_000001.json"))
    assert all(file.is_relative_to(there) for file in tmp_path.rglob("*") if file.is_file())
    with sqlite3.connect(there / "mlflow.db") as connection:
        assert connection.execute("SELECT count(*) FROM experiments WHERE name = 'other'").fetchone() == (1,)


def test_artifacts_lie_beside_the_database_wherever_the_process_runs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = start()
    write_table(run.log.path.parent / "completions" / "step_000001.json", [])
    run.flush()
    artifacts = Path(stored(run).info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(tmp_path / "mlruns" / "xpo")
    assert json.loads((artifacts / "completions" / "step_000001.json").read_text())["data"] == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("experiment", ["/Shared/x", "../../x", "..", "a/b", "50%/x"])
def test_the_name_of_an_experiment_is_no_path(
    experiment: str, uri: str, tmp_path: Path, new_log: Callable[[], MetricsLog]
) -> None:
    run = MLflowRun(uri, experiment, "r", {}, {}, new_log())
    write_table(run.log.path.parent / "completions" / "step_000001.json", [])
    run.flush()
    assert len(list((tmp_path / "mlruns").rglob("step_000001.json"))) == 1
    assert run.client.get_experiment(run.experiment_id).name == experiment


def test_a_deleted_experiment_is_named(start: Start, uri: str) -> None:
    MlflowClient(uri).delete_experiment(start().experiment_id)
    with pytest.raises(ConfigError, match=r"tracking.experiment='xpo' was deleted .*; restore it \(mlflow experiments"):
        start()


def test_a_long_reason_keeps_its_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow says last what to do."""

    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("Out-of-date schema. " * 20 + "Run 'mlflow db upgrade'.")

    monkeypatch.setattr(MlflowClient, "create_run", refuse)
    with pytest.raises(ConfigError, match="Run 'mlflow db upgrade'"):
        start()


@pytest.mark.parametrize("bad", ["bogus://host", "postgresql://nobody@localhost:1/x", "a file", "below a file"])
def test_a_store_that_does_not_answer_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, new_log: Callable[[], MetricsLog]
) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    (tmp_path / "file").write_text("this is no database " * 100)
    uri = {"a file": f"sqlite:///{tmp_path}/file", "below a file": f"sqlite:///{tmp_path}/file/x.db"}.get(bad, bad)
    with pytest.raises(ConfigError, match=r"tracking.uri='.*' does not answer \(.*\); correct it, or set"):
        MLflowRun(uri, "xpo", "r", {}, {}, new_log())


@pytest.mark.parametrize(
    ("uri", "sweep", "link"),
    [
        (
            "http://host:8080/",
            None,
            "http://host:8080/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART",
        ),
        (
            "sqlite:////a/b.db",
            "alpha & beta",
            "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART"
            "&searchFilter=tags.%22xpo.sweep%22%20%3D%20%22alpha%20%26%20beta%22"
            "&orderByKey=metrics.%60final%2Fwin_rate%60&orderByAsc=false",
        ),
    ],
)
def test_a_link_opens_the_charts_of_an_experiment_or_a_sweep(uri: str, sweep: str | None, link: str) -> None:
    assert chart_link(uri, "7", sweep) == link


def test_a_parent_ends_and_tags_the_runs_of_its_workers(start: Start, uri: str) -> None:
    killed, finished = start(), start()
    finished.finish()
    for run in (killed, finished):
        assert mark_ended(uri, run.run_id, "KILLED")
    assert (stored(killed).info.status, stored(finished).info.status) == ("KILLED", "FINISHED")
    assert set_tags(uri, [killed.run_id, finished.run_id], {"xpo.best": "no"})
    assert [stored(run).data.tags["xpo.best"] for run in (killed, finished)] == ["no", "no"]


def test_a_parent_that_cannot_reach_mlflow_goes_on(tmp_path: Path) -> None:
    for uri in ("http://127.0.0.1:9", f"sqlite:///{tmp_path}/no.db"):
        assert not mark_ended(uri, "0" * 32, "KILLED")
        assert not set_tags(uri, ["0" * 32], {"a": "b"})
    assert list(tmp_path.iterdir()) == []


def test_a_parent_imports_neither_torch_nor_mlflow() -> None:
    modules = "mlflow_client, mlflow_follower, mlflow_run, mlflow_ui, runs"
    code = f"import sys; from xpo.tracking import {modules}; "
    code += "sys.exit(bool({'torch', 'transformers', 'mlflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- completions -------------------------------------------------------------------------------


def records(score: float | None = 0.5) -> list[dict[str, Any]]:
    record = {"prompt": "p", "completion": "straße", "reference": "r", "label": 1.0}
    if score is not None:
        record |= {"score": score, "ref_score": -score}
    return [record, record | {"label": -1.0}, record | {"label": 0.0}]


def test_completions_are_rows_with_verdict_scores_and_step() -> None:
    assert completion_rows(records(), step=7) == [
        ["p", "straße", "r", "policy", 0.5, -0.5, 7],
        ["p", "straße", "r", "reference", 0.5, -0.5, 7],
        ["p", "straße", "r", "none", 0.5, -0.5, 7],
    ]
    assert completion_rows(records(None), step=7)[0] == ["p", "straße", "r", "policy", None, None, 7]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_table_holds_no_number_that_json_does_not_know(tmp_path: Path, score: float) -> None:
    def unknown(name: str) -> None:
        raise ValueError(name)

    path = tmp_path / "table.json"
    write_table(path, completion_rows(records(score), step=1))
    assert json.loads(path.read_text(), parse_constant=unknown)["data"][0][4:6] == [None, None]


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tables" / "step_000001.json"
    write_table(path, completion_rows(records(), step=1))
    before = path.read_text()
    original = Path.write_text

    def killed(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        original(self, text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_table(path, completion_rows(records(), step=2))
    assert path.read_text() == before
    assert [file.name for file in path.parent.glob("step_*.json")] == [path.name]


def test_mlflow_reads_the_completions_of_all_evaluations_as_one_table(
    start: Start, make_trainer: TrainerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)  # load_table looks there
    trainer = make_trainer(max_steps=2, eval_dataset=prompts(3), eval_strategy="steps", eval_steps=1)
    trainer.add_callback(KeepCompletions(trainer.evaluator, run.log.path.parent / "completions"))
    trainer.add_callback(KeepMetrics(run.log, run))
    trainer.train()
    table = run.client.load_table(run.experiment_id, TABLE_NAME, run_ids=[run.run_id])
    assert list(table.columns) == ["prompt", "completion", "reference", "verdict", "score", "ref_score", "step"]
    assert table["step"].tolist() == [2, 2, 2, 1, 1, 1]
    assert table["completion"].tolist()[:3] == [record["completion"] for record in trainer.evaluator.records]
    assert set(table["verdict"]) <= {"policy", "reference", "none"}
    assert stored(run).data.tags[TABLE_TAG] == TABLE_TAG_VALUE
    assert json.loads(TABLE_TAG_VALUE) == [{"path": "eval_completions.json", "type": "table"}]
    files = run.client.list_artifacts(run.run_id, "completions")
    assert [file.path for file in files] == ["completions/step_000001.json", "completions/step_000002.json"]


def test_a_resumed_run_has_no_completions_behind_its_checkpoint(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """Of steps that it takes anew, or not at all."""
    options = {"max_steps": 2, "eval_dataset": prompts(3), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(save_strategy="steps", save_steps=1, **options)
    trainer.add_callback(KeepCompletions(trainer.evaluator, tmp_path / "completions"))
    trainer.train()
    resumed = make_trainer(**options | {"max_steps": 1})
    resumed.add_callback(KeepCompletions(resumed.evaluator, tmp_path / "completions"))
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    files = {file.name: json.loads(file.read_text())["data"] for file in (tmp_path / "completions").iterdir()}
    assert files.keys() == {"step_000001.json", TABLE_NAME}
    assert files["step_000001.json"] == files[TABLE_NAME]
