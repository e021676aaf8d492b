"""`python -m xpo.runs`: what is told of runs, and that it is what `training.resume` finds."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import made_checkpoint
from filelock import FileLock

import xpo.runs
from xpo.config.compose import compose
from xpo.config.files import write_whole
from xpo.launch.jobs import prepare
from xpo.launch.sweep_record import Job, Sweep
from xpo.tracking.runs import RunRecord, resolve_resume

WORDS = ["experiment=smoke", "tracking=none"]
EVALUATIONS = [{"eval_win_rate": 0.5, "eval_kl": 0.0}, {"eval_win_rate": 0.75, "eval_kl": 1.5, "eval_score": 2.0}]


def make_run(directory: Path, steps: int = 0, finished: bool = False, **tags: str) -> Path:
    """A run of the smoke test that has got so far, with an evaluation at each step."""
    config, _, choices = compose(WORDS)
    prepare(config, directory, choices, WORDS, name=directory.name, tags=tags)
    record = RunRecord.read(directory)
    record.finished = finished
    record.write(directory)
    logs = [EVALUATIONS[step % 2] | {"eval_runtime": 1.0, "step": step, "time": step} for step in range(steps)]
    if steps:
        (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(log)}\n" for log in logs))
    return directory


def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["xpo.runs", *words])
    xpo.runs.main()
    return capsys.readouterr().out


def test_every_state_of_a_run_and_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert output(monkeypatch, capsys) == "no runs below outputs or multirun\n"
    outputs = tmp_path / "outputs" / "day"
    make_run(outputs / "new")
    make_run(outputs / "done", 2, finished=True)
    made_checkpoint(make_run(outputs / "stopped", 1))
    (make_run(outputs / "failed", 2) / "failure.json").write_text('{"status": 1, "reason": "no room"}')
    (make_run(outputs / "torn") / "metrics.jsonl").write_text("{\n")
    sweep = tmp_path / "multirun" / "day" / "time"
    running = make_run(sweep / "0", 2, **{"xpo.sweep": "a sweep"})
    (running / "worker.pid").touch()
    jobs = [Job("0", {}, str(running), "key", "running"), Job("1", {}, str(sweep / "1"), "key", "finished")]
    write_whole(sweep / "sweep.json", json.dumps(vars(Sweep("a sweep", "", [], [vars(job) for job in jobs], None, ""))))
    shutil.copytree(running, outputs / "killed")  # its worker.pid is left
    with FileLock(running / "run.lock"):
        told = json.loads(output(monkeypatch, capsys, "--json"))
        table = output(monkeypatch, capsys)
    runs: dict[str, Any] = {run["run"]: run for run in told["runs"]}
    assert {name.rpartition("/")[2]: run["state"] for name, run in runs.items()} == {
        **{"new": "not started", "done": "finished", "stopped": "stopped", "failed": "failed", "torn": "damaged"},
        **{"0": "running", "killed": "stopped"},
    }
    done, failed = runs["outputs/day/done"], runs["outputs/day/failed"]
    assert [done[key] for key in ("step", "win_rate", "score", "kl", "resume")] == [1, 0.75, 2.0, 1.5, None]
    assert done["bytes"] == sum(file.stat().st_size for file in (outputs / "done").iterdir())
    assert 0 <= done["seconds"] < 100
    assert (failed["reason"], runs["multirun/day/time/0"]["sweep"]) == ("no room", "a sweep")
    assert told["sweeps"] == [{"sweep": "multirun/day/time", "name": "a sweep", "jobs": 2, "finished": 1}]
    # The words of the command, but for the program's: the run and the checkpoint that they go on with.
    command = runs["outputs/day/stopped"]["resume"]
    assert command == "python -m xpo.train experiment=smoke tracking=none training.resume=outputs/day/stopped"
    found = resolve_resume(command.rpartition("=")[2], "", [])
    assert found == (Path("outputs/day/stopped"), Path("outputs/day/stopped/model/checkpoint-2"))
    key = RunRecord.read(outputs / "stopped").job_key
    assert resolve_resume("auto", key, [tmp_path / "outputs"]) == tuple(map(Path.absolute, found))
    rows = [line.split() for line in table.splitlines()]
    (row,) = [row for row in rows if row[0] == "outputs/day/done"]
    assert row[2:7] == ["finished", "1", "0.75", "2.00", "1.50"]
    assert "Sweep a sweep: 1 of 2 jobs have finished. Compare: python -m xpo.compare multirun/day/time" in table
    assert f"outputs/day/failed: failed (no room). Go on: {failed['resume']}\n" in table
    assert table.count("Go on") == len([run for run in told["runs"] if run["resume"]]) == 5
