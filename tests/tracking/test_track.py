"""Outages of MLflow that really happen, on a real server and real files: in the end it holds everything, once."""

import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from xpo import track
from xpo.tracking import mlflow_run as tracking
from xpo.tracking.completions import TABLE_NAME, write_table
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_follower import Followed
from xpo.tracking.mlflow_run import MLflowRun

BIN = Path(sys.executable).parent


class Proxy:
    """Stands before a server on loopback, and can be taken away, or hang, or lose what the server answers.

    `mode` is "forward", "hang" (accepts, never answers) or "lose" (the answer to log-batch never arrives).
    """

    def __init__(self, target: int):
        self.target = target
        self.mode = "forward"
        self.port = 0
        self.start()

    def start(self) -> None:
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def stop(self) -> None:
        """The port is closed, and every connection with it."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def reset(self) -> None:
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def set(self, mode: str) -> None:
        self.mode = mode
        self.reset()  # kept-alive connections are of the old mode

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._open.append(client)
                if self.mode != "hang":
                    threading.Thread(target=self._serve, args=[client, self.mode], daemon=True).start()

    def _serve(self, client: socket.socket, mode: str) -> None:
        server = socket.create_connection(("127.0.0.1", self.target))
        self._open.append(server)
        lost = threading.Event()

        def back() -> None:
            with suppress(OSError):
                while data := server.recv(65536):
                    if lost.is_set():
                        break
                    client.sendall(data)
            for connection in (client, server):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=back, daemon=True).start()
        with suppress(OSError):
            while data := client.recv(65536):
                if mode == "lose" and b"log-batch" in data:
                    lost.set()
                server.sendall(data)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of an `mlflow server`, and its database."""
    directory = tmp_path_factory.mktemp("server")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--artifacts-destination", f"{directory}/a"]
    with (directory / "log").open("w") as log:
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        for _ in range(1200):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                break
            time.sleep(0.1)
        yield port, directory / "mlflow.db"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def uri(server: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database with all tables and no run, to which commands go by themselves."""
    with closing(sqlite3.connect(server[1])) as source, closing(sqlite3.connect(tmp_path / "mlflow.db")) as copy:
        source.backup(copy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "outputs" / "run"
    path.mkdir(parents=True)
    return path


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_RETRY_S", 0.0)
    monkeypatch.setattr(tracking, "_LAST_RETRY_AFTER_S", (0.0, 0.01))
    monkeypatch.setattr(tracking, "_KNOCK_S", 0.1)
    monkeypatch.setattr(tracking, "_FLUSH_SECONDS", -1.0)  # every point is sent at once


def start(uri: str, run_dir: Path, run_id: str | None = None, experiment: str = "xpo") -> MLflowRun:
    return MLflowRun(uri, experiment, "r", {"a": 1}, {}, MetricsLog(run_dir), run_id=run_id)


def complete(run_dir: Path) -> bool:
    """Whether MLflow is said to have all of an ended run."""
    return Followed.read(run_dir).complete


def points(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point of every metric, in order of steps; a point stored twice is there twice."""
    client = MlflowClient(uri)
    keys = client.get_run(run_id).data.metrics
    return {key: sorted((p.step, p.value) for p in client.get_metric_history(run_id, key)) for key in keys}


def losses(*steps: int) -> dict[str, list[tuple[int, float]]]:
    return {"loss": [(step, step / 8) for step in steps]}


def log(run: MLflowRun, *steps: int) -> None:
    for step in steps:
        run.log.append({"loss": step / 8, "step": step})
        run.follow()


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """The database of another process that writes and does not end."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def replay(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The exit status of `python -m xpo.track replay ...`."""
    monkeypatch.setattr(sys, "argv", ["track", "replay", *map(str, arguments)])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemExit) as end:
        track.main()
    return int(end.value.code)  # type: ignore[arg-type]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("xpo.")]


# ---- outages -----------------------------------------------------------------------------------


def test_a_server_that_vanishes_and_hangs_and_loses_answers_has_everything_once(
    server: tuple[int, Path], run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_KNOCK_S", 5.0)
    proxy = Proxy(server[0])
    run = start(f"http://127.0.0.1:{proxy.port}", run_dir, experiment="served")
    tables = [run_dir / "completions" / name for name in ("step_000001.json", TABLE_NAME)]
    for table in tables:
        write_table(table, [["old"]])
    log(run, 1)

    proxy.stop()
    began = time.monotonic()
    log(run, 2, 3)
    for table in tables:
        write_table(table, [["new and longer"]])
    run.set_tag("error", "none")
    assert time.monotonic() - began < 20  # refused at once, where MLflow's client tries for minutes
    proxy.mode = "hang"
    proxy.start()
    began = time.monotonic()
    log(run, 4)
    assert time.monotonic() - began < 20  # one knock, where MLflow's client waits for 120 seconds, and repeats
    proxy.set("lose")
    log(run, 5, 6)  # the points that wait arrive each time, and nobody hears of it
    direct = f"http://127.0.0.1:{server[0]}"
    assert points(direct, run.run_id) == losses(1, 2, 3, 4, 5, 6)
    proxy.set("forward")
    log(run, 7)
    run.finish()

    assert points(direct, run.run_id) == losses(1, 2, 3, 4, 5, 6, 7)
    stored = MlflowClient(direct).get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.tags["error"] == "none"
    client = MlflowClient(direct)
    for path in ("completions/step_000001.json", TABLE_NAME):
        local = client.download_artifacts(run.run_id, path, str(run_dir))
        assert json.loads(Path(local).read_text())["data"] == [["new and longer"]]
    assert complete(run_dir)
    first, last = messages(caplog)
    assert first.startswith("xpo: MLflow does not take what the run logs ([Errno 111] Connection refused); it waits in")
    assert last == "xpo: MLflow is back and has what waited"
    assert run.ui_command().startswith(f"{run.uri}/#/experiments/{run.experiment_id}/runs?")


def test_a_run_that_ends_while_the_database_is_locked_is_sent_later(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    run = start(uri, run_dir)
    log(run, 1)
    with locked(uri):
        began = time.monotonic()
        log(run, 2)
        assert time.monotonic() - began < 15  # one knock, where MLflow waits for 20 seconds
        write_table(run_dir / "completions" / "step_000002.json", [])
        run.set_tag("error", "RuntimeError")
        run.finish("FAILED")
        assert replay(monkeypatch, run_dir) == 1
    first, last = messages(caplog)
    assert f"(database is locked); it waits in {run_dir}" in first
    assert "(1 point, 1 file, 1 tag)" in last
    assert last.endswith(f"send it with: python -m xpo.track replay {run_dir}")
    moved = run_dir.parent / "moved"
    run_dir.rename(moved)
    monkeypatch.chdir(moved.parent.parent)
    assert replay(monkeypatch) == 0  # finds it under outputs/
    assert points(uri, run.run_id) == losses(1, 2)
    stored = MlflowClient(uri).get_run(run.run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["error"] == "RuntimeError"
    files = MlflowClient(uri).list_artifacts(run.run_id, "completions")
    assert [file.path for file in files] == ["completions/step_000002.json"]
    assert "outputs/moved: sent 1 point, 1 file, 1 tag; 1 point had arrived before" in capsys.readouterr().out
    assert replay(monkeypatch) == 0
    assert "nothing to send" in capsys.readouterr().out


# Two runs that are killed while the database is locked, by themselves.
KILLED = """
import json, os, signal, sqlite3, sys
from pathlib import Path
from xpo.tracking import mlflow_run as tracking
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_run import MLflowRun

def log(run, step):
    run.log.append({"loss": step / 8, "step": step})
    run.follow()

tracking._KNOCK_S, tracking._FLUSH_SECONDS = 0.1, -1.0
uri, *run_dirs = sys.argv[1:]
runs = [MLflowRun(uri, "xpo", "r", {}, {}, MetricsLog(Path(path))) for path in run_dirs]
for run in runs:
    log(run, 1)
sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None).execute("BEGIN EXCLUSIVE")
for run, path in zip(runs, run_dirs):
    log(run, 2)
    log(run, 3)
    (Path(path) / "config.yaml").write_text("a: 1")
    run.set_tag("error", "none")
print(json.dumps([run.run_id for run in runs]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_behind_is_sent_by_the_resumed_run_or_by_replay(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    other_dir = run_dir.with_name("other")
    other_dir.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, uri, run_dir, other_dir], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed_id, replayed_id = json.loads(done.stdout)
    for path in (run_dir, other_dir):
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"loss": 9.0, "st')  # torn by the kill

    resumed = start(uri, run_dir, resumed_id)
    assert resumed.run_id == resumed_id
    assert points(uri, resumed_id) == losses(1, 2, 3)
    for step in (2, 3, 4):
        resumed.log.append({"loss": step / 8 if step == 4 else 9.0, "step": step})  # 2 and 3 are repeated
        resumed.follow()
    resumed.finish()
    assert replay(monkeypatch, other_dir) == 0
    assert "sent 2 points, 1 file, 1 tag" in capsys.readouterr().out
    for run_id, steps, status in ((resumed_id, (1, 2, 3, 4), "FINISHED"), (replayed_id, (1, 2, 3), "KILLED")):
        assert points(uri, run_id) == losses(*steps)
        stored = MlflowClient(uri).get_run(run_id)
        assert (stored.info.status, stored.data.tags["error"]) == (status, "none")
        assert [file.path for file in MlflowClient(uri).list_artifacts(run_id)] == ["config.yaml"]
    assert complete(run_dir)
    assert complete(other_dir)


def test_a_full_disk_loses_nothing_when_there_is_room_again(
    uri: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The database cannot grow, and soon the log cannot either: the rest waits in memory."""
    run = start(uri, run_dir)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        log(run, *range(1, 41))
        size = (run_dir / "metrics.jsonl").stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 0 < size <= 1000
    assert 0 < len(MetricsLog(run_dir).entries) < 40  # only whole lines
    run.log.sync()
    run.finish()
    assert [entry["step"] for entry in MetricsLog(run_dir).entries] == list(range(1, 41))
    assert points(uri, run.run_id) == losses(*range(1, 41))
    first, second, last = messages(caplog)
    assert "MLflow does not take what the run logs" in first
    assert "cannot be written (File too large); what it lacks waits in memory" in second
    assert "is back" in last


def test_the_file_catches_up_when_there_is_room_again(uri: str, run_dir: Path) -> None:
    run = start(uri, run_dir)
    hidden = run_dir.with_name("hidden")
    with locked(uri):
        log(run, 1)
        run_dir.rename(hidden)  # nothing can be written
        log(run, 2)
        hidden.rename(run_dir)
        log(run, 3)
    assert [entry["step"] for entry in MetricsLog(run_dir).entries] == [1, 2, 3]


def test_what_a_run_that_is_gone_logged_goes_to_the_one_that_replaces_it(uri: str, run_dir: Path) -> None:
    run = start(uri, run_dir)
    with locked(uri):
        log(run, 1, 2)
    MlflowClient(uri).delete_run(run.run_id)
    again = start(uri, run_dir, run.run_id)
    log(again, 2, 3)
    assert again.run_id != run.run_id
    assert points(uri, again.run_id) == losses(1, 2, 3)


# ---- python -m xpo.track replay ----------------------------------------------------------------


@pytest.fixture
def left_behind(uri: str, run_dir: Path) -> MLflowRun:
    """A run that ended while MLflow was away; of what it logged, step 1 had arrived."""
    run = start(uri, run_dir)
    with locked(uri):
        log(run, 1, 2)
        run.finish()
    first = MetricsLog(run_dir).entries[0]
    run.client.log_metric(run.run_id, "loss", first["loss"], first["time"], first["step"])
    return run


def test_points_that_had_arrived_are_not_sent_again(
    left_behind: MLflowRun, uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"time": ', '"time": 1'))  # other times: MLflow would store them
    assert replay(monkeypatch, run_dir) == 0
    assert "sent 1 point, 0 files, 0 tags; 1 point had arrived before" in capsys.readouterr().out
    assert points(uri, left_behind.run_id) == losses(1, 2)
    assert MlflowClient(uri).get_run(left_behind.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("live", "in use by a run"),
        ("deleted", "was deleted in MLflow; restore it (mlflow runs restore --run-id"),
        ("elsewhere", "knows no run"),
        ("nowhere", "does not answer"),
    ],
)
def test_what_cannot_be_sent_is_kept_with_one_line(
    left_behind: MLflowRun,
    uri: str,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    trouble: str,
    said: str,
) -> None:
    before = [(run_dir / name).read_text() for name in ("metrics.jsonl", "mlflow.json")]
    lock = FileLock(run_dir / "run.lock")
    arguments: list[Any] = [run_dir]
    if trouble == "live":
        lock.acquire()
    elif trouble == "deleted":
        MlflowClient(uri).delete_run(left_behind.run_id)
    elif trouble == "elsewhere":
        shutil.copy(tmp_path / "mlflow.db", tmp_path / "other.db")
        with closing(sqlite3.connect(tmp_path / "other.db")) as database:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                database.execute(f"DELETE FROM {table}")
            database.commit()
        arguments += ["--uri", f"sqlite:///{tmp_path}/other.db"]
    else:
        arguments += ["--uri", f"sqlite:///{tmp_path}/none.db"]
    assert replay(monkeypatch, *arguments) == 1
    lock.release()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run_dir}: ")
    assert said in line
    assert [(run_dir / name).read_text() for name in ("metrics.jsonl", "mlflow.json")] == before
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(("name", "content"), [(None, ""), ("mlflow.json", "{"), ("metrics.jsonl", '{"loss": \n')])
def test_bad_input_is_one_line(
    left_behind: MLflowRun, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str | None, content: str
) -> None:
    if name is None:
        (run_dir / "mlflow.json").unlink()
    else:
        (run_dir / name).write_text(content)
    assert replay(monkeypatch, run_dir) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xpo: error: ")
    assert str(run_dir) in line


def test_a_log_of_which_a_full_disk_left_nothing_is_no_trouble(
    left_behind: MLflowRun, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (run_dir / "metrics.jsonl").write_text("")
    assert replay(monkeypatch, run_dir) == 0
    assert "sent 0 points, 0 files, 0 tags" in capsys.readouterr().out
    assert complete(run_dir)
    assert replay(monkeypatch, run_dir) == 0
    assert "nothing to send" in capsys.readouterr().out


# ---- a run directory of somebody else's ---------------------------------------------------------


def test_only_files_of_the_run_directory_are_sent(
    left_behind: MLflowRun, uri: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file that a link leads to, nor one in a folder that is a link; a link within is a file of the run."""
    for folder in ("keys", "inside"):
        (tmp_path / folder).mkdir()
    (tmp_path / "keys" / "private").write_text("secret")
    (tmp_path / "inside" / "rank_0.json.gz").write_text("secret")
    (run_dir / "completions").mkdir(exist_ok=True)
    (run_dir / "completions" / "step_000002.json").symlink_to(tmp_path / "keys" / "private")
    (run_dir / "completions" / "step_000003.json").write_text("[]")
    (run_dir / "completions" / "step_000004.json").symlink_to("step_000003.json")
    (run_dir / "completions" / "step_000005.json").mkdir()
    (run_dir / "profile").symlink_to(tmp_path / "inside")
    (run_dir / "config.yaml").unlink(missing_ok=True)
    (run_dir / "config.yaml").symlink_to(tmp_path / "keys" / "private")
    assert replay(monkeypatch, run_dir) == 0
    client = MlflowClient(uri)
    assert not client.list_artifacts(left_behind.run_id, "profile")
    sent = [file.path for file in client.list_artifacts(left_behind.run_id, "completions")]
    assert sent == ["completions/step_000003.json", "completions/step_000004.json"]
    assert "config.yaml" not in [file.path for file in client.list_artifacts(left_behind.run_id)]
    resumed = start(uri, run_dir, left_behind.run_id)
    resumed.finish()
    assert "config.yaml" not in [file.path for file in client.list_artifacts(left_behind.run_id)]


def test_nobody_is_contacted_whom_only_the_run_directory_names(
    left_behind: MLflowRun, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The line names the place, and the option that confirms it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.setblocking(False)
        state = Followed.read(run_dir)
        state.uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        state.write(run_dir)
        assert replay(monkeypatch, run_dir) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{run_dir}: the run logged to {state.uri}, not to sqlite:///")
        assert "name that place with --uri" in line
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_damaged_run_keeps_no_other_from_being_sent(
    left_behind: MLflowRun, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "a").mkdir()
    (tmp_path / "outputs" / "a" / "mlflow.json").touch()
    assert replay(monkeypatch) == 2
    said = capsys.readouterr()
    assert "outputs/run: sent 1 point" in said.out
    assert said.err.startswith("xpo: error: outputs/a/mlflow.json cannot be read (")
