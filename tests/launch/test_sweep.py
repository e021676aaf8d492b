"""Sweeps: what runs, what is skipped, what goes on, and what is said about it."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import made_checkpoint
from filelock import FileLock
from mlflow import MlflowClient
from omegaconf import OmegaConf

from xpo import train
from xpo.config.errors import ConfigError
from xpo.config.options import LaunchOptions
from xpo.launch import processes as launch
from xpo.launch import sweep
from xpo.launch.processes import Outcome
from xpo.launch.sweep_record import Sweep, short_name
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.runs import RunRecord, resolve_resume


class Fake:
    """Stands for JobProcess: does in the parent's process what `act` says a job does."""

    act: Callable[["Fake"], Outcome]
    started: list["Fake"]
    lock = threading.Lock()

    def __init__(self, run_dir: Path, devices: list[int] | None, at_once: int, output: Path | None):
        self.run_dir, self.devices, self.at_once, self.output = run_dir, devices, at_once, output
        self.config = OmegaConf.load(run_dir / "config.yaml")
        self.stopped_by: list[int] = []
        with Fake.lock:
            Fake.started.append(self)

    def stop(self, number: int) -> None:
        self.stopped_by.append(number)

    def wait(self) -> Outcome:
        return Fake.act(self)


def finish(job: Fake) -> Outcome:
    """Leaves what a worker leaves at its end."""
    record = RunRecord.read(job.run_dir)
    record.finished = True
    record.write(job.run_dir)
    alpha = float(job.config.loss.alpha)
    entry = {"step": 3, "eval_win_rate": alpha, "eval_runtime": 1.0}
    MetricsLog(job.run_dir).restore([entry])
    return Outcome("finished", 0)


# Another command, whose jobs are fakes too.
SECOND = f"""
import sys
sys.path[:0] = {[str(place) for place in Path(__file__).parents[:2]]!r}
from test_sweep import Fake, finish, launch, sweep, train
sweep.JobProcess, Fake.act, Fake.started = Fake, finish, []
train.main()
"""

Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """command("loss.alpha=1,2") runs the sweep with fake jobs in an empty directory; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "JobProcess", Fake)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(Fake, "act", finish, raising=False)

    def run(*arguments: str) -> int:
        Fake.started = []
        launch.exit_statuses.clear()
        launch.signals.clear()
        monkeypatch.setattr(sys, "argv", ["xpo.train", "-m", "experiment=smoke", "tracking=none", *arguments])
        with pytest.raises(SystemExit) as end:
            train.main()
        launch.signals.clear()
        return int(end.value.code)

    return run


def latest() -> dict[str, Any]:
    """The newest sweep.json."""
    files = sorted(Path("multirun").rglob("sweep.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(files[-1].read_text())


def states() -> list[str]:
    return [job["state"] for job in latest()["jobs"]]


# ---- what runs ---------------------------------------------------------------------------------


def test_every_point_is_a_job(command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """In a directory of its own; the file, the tags and the table say which it is."""
    assert command("loss.alpha=1e-6,1e-5", "loss.beta=0.05,0.1", "training.max_steps=3") == 0
    assert [(job.config.loss.alpha, job.config.loss.beta) for job in Fake.started] == [
        (1e-6, 0.05),
        (1e-6, 0.1),
        (1e-5, 0.05),
        (1e-5, 0.1),
    ]
    content = latest()
    assert content["keys"] == ["loss.alpha", "loss.beta"]
    assert content["command"].startswith("python -m xpo.train -m experiment=smoke")
    assert [job["name"] for job in content["jobs"]] == ["a1e-6 b0.05", "a1e-6 b0.1", "a1e-5 b0.05", "a1e-5 b0.1"]
    assert [Path(job["run_dir"]).name for job in content["jobs"]] == ["0", "1", "2", "3"]
    assert content["jobs"][2]["metrics"]["win_rate"] == 1e-5
    records = [RunRecord.read(job.run_dir) for job in Fake.started]
    assert {record.tags["xpo.sweep"] for record in records} == {content["name"]}
    assert {record.tags["xpo.sweep_keys"] for record in records} == {"loss.alpha,loss.beta"}
    assert len({record.tags["mlflow.runColor"] for record in records}) == 4
    printed = capfd.readouterr().out
    assert "Job 4 of 4  a1e-5 b0.1  finished" in printed
    assert "Compare: python -m xpo.compare multirun/" in printed
    assert "Repeat" not in printed


def test_seeds_repeat_every_point(command: Command):
    """The seed is no key that settings are told apart by."""
    assert command("loss.alpha=1,2", "sweep.seeds=3", "training.seed=7") == 0
    assert [(job.config.loss.alpha, job.config.training.seed) for job in Fake.started] == [
        (alpha, seed) for alpha in (1, 2) for seed in (7, 8, 9)
    ]
    assert latest()["keys"] == ["loss.alpha"]
    assert latest()["jobs"][0]["name"] == "a1 s7"
    assert len({job["job_key"] for job in latest()["jobs"]}) == 6


def test_seeds_and_batches_have_directories_of_their_own(command: Command):
    """A sweeper that knows seeds from points only counts the latter."""
    assert command("loss.alpha=1,2,3", "sweep.seeds=2", "hydra.sweeper.max_batch_size=2") == 0
    assert [job.run_dir.name for job in Fake.started] == ["0", "1", "2", "3", "4", "5"]
    assert states() == ["finished"] * 6


def test_seeds_are_swept_once(command: Command, capfd: pytest.CaptureFixture[str]):
    """Seeds 2 and 3 would be there twice, and count as independent."""
    assert command("training.seed=1,2,3", "sweep.seeds=2") == 2
    assert "sweep.seeds=2 goes over training.seed, which is swept too; remove one of them" in capfd.readouterr().err


def test_a_preset_can_be_a_sweep(command: Command):
    """Without -m: its own keys, and its seeds."""
    assert command("experiment=sweep_alpha_beta") == 0
    assert len(Fake.started) == 12
    assert latest()["keys"] == ["loss.alpha", "loss.beta"]


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ({"loss.alpha": "1e-05", "loss.beta": "0.1"}, "a1e-5 b0.1"),
        ({"loss.alpha": "0.0001", "loss.beta": "0.10"}, "a1e-4 b0.1"),
        ({"loss.missing_eos_penalty": "1.0", "training.seed": "3"}, "eos1 s3"),
        ({"loss.missing_eos_penalty": "null", "training.max_steps": "2e1"}, "eos=null ms20"),
        ({"training.max_steps": "5", "model.max_size": "6"}, "max_steps5 max_size6"),
        ({"judge": "pair_rm", "loss.loss_type": "inf"}, "judge=pair_rm loss_type=inf"),
    ],
)
def test_names_are_short(point: dict[str, str], name: str):
    """Two keys with the same letters keep their words."""
    assert short_name(point) == name


def test_nothing_starts_when_one_point_is_bad(command: Command, capfd: pytest.CaptureFixture[str]):
    """All are checked first: a sweep does not fail in its last hour."""
    assert command("loss.beta=1,-1,2") == 2
    assert Fake.started == []
    assert capfd.readouterr().err == "xpo: error: loss.beta=-1 is too small; give a value greater than 0\n"


def test_a_sweep_goes_on_by_itself(command: Command, capfd: pytest.CaptureFixture[str]):
    """training.resume names one run."""
    assert command("loss.beta=1,2", "training.resume=auto") == 2
    assert "training.resume='auto' names one run, and a sweep goes on by itself; remove it" in capfd.readouterr().err


def test_a_job_sees_its_environment_and_its_own_place_in_hydra(command: Command):
    """As a run that is not part of a sweep does."""
    seen: list[str | None] = []

    def act(job: Fake) -> Outcome:
        seen.append(os.environ.get("XPO_SEEN"))
        return finish(job)

    Fake.act = act
    name = "tracking.run_name=${hydra:runtime.choices.model}_${hydra:job.num}"
    assert command("loss.alpha=1,2", "+hydra.job.env_set.XPO_SEEN=5", name) == 0
    assert seen == ["5", "5"]
    assert [job.config.tracking.run_name for job in Fake.started] == ["tiny_0", "tiny_1"]
    assert "XPO_SEEN" not in os.environ
    assert "+hydra.job.env_set.XPO_SEEN=5" in RunRecord.read(Fake.started[0].run_dir).overrides


# ---- several at once ---------------------------------------------------------------------------


def test_jobs_at_once_share_the_devices(command: Command):
    """Two jobs of two GPUs each run together, never on the same ones; the third takes what is free."""
    together = threading.Barrier(2, timeout=20)
    busy: list[int] = []

    def act(job: Fake) -> Outcome:
        assert job.devices is not None
        with Fake.lock:
            assert not set(busy) & set(job.devices)
            busy.extend(job.devices)
        together.wait()
        with Fake.lock:
            for device in job.devices:
                busy.remove(device)
        return finish(job)

    Fake.act = act
    options = ["launch.num_processes=2", "launch.devices=[4,5,6,7]", "launch.jobs=2"]
    assert command("loss.alpha=1,2,3,4", *options) == 0
    assert {tuple(job.devices or ()) for job in Fake.started} == {(4, 5), (6, 7)}
    assert all(job.at_once == 2 and job.output == job.run_dir / "output.log" for job in Fake.started)


def test_too_few_devices(command: Command, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Found before anything starts, whoever named them: two jobs never share a GPU unasked."""
    assert command("loss.alpha=1,2", "launch.devices=[0]", "launch.jobs=2") == 2
    assert "launch.devices=[0] is too few for launch.jobs=2" in capfd.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert command("loss.alpha=1,2", "launch.jobs=2") == 2
    assert "needs 2 GPUs of its own, and launch.devices=[3]; give it that many" in capfd.readouterr().err
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweep.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert command("loss.alpha=1,2", "launch.jobs=2") == 2
    assert "needs 2 GPUs of its own, and launch.devices=None" in capfd.readouterr().err
    assert Fake.started == []


def test_the_devices_of_the_environment_are_shared(monkeypatch: pytest.MonkeyPatch):
    """As launch.devices would be."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert sweep.slots(LaunchOptions(jobs=2, num_processes=2)) == [[2, 3], [5, 7]]
    assert sweep.slots(LaunchOptions(num_processes=2)) == [None]


# ---- what goes wrong ---------------------------------------------------------------------------


def test_a_job_that_fails_costs_itself_only(command: Command, capfd: pytest.CaptureFixture[str]):
    """The others run, the reason is in one line, the exit status is 1."""

    def act(job: Fake) -> Outcome:
        return Outcome("failed", 1, "the loss is nan [at step 2]") if job.config.loss.alpha == 2 else finish(job)

    Fake.act = act
    assert command("loss.alpha=1,2,3") == 1
    assert states() == ["finished", "failed", "finished"]
    printed = capfd.readouterr().out
    assert "a2: failed: the loss is nan [at step 2]" in printed
    assert "Repeat the command to finish the rest." in printed


def test_a_full_disk_costs_the_record_and_no_job(
    command: Command, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The others run, and their table is printed."""
    write = Sweep.write

    def fills_up(self: Sweep, directory: Path, jobs: Any) -> None:
        if any(job.state == "finished" for job in jobs):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, directory, jobs)

    monkeypatch.setattr(Sweep, "write", fills_up)
    assert command("loss.alpha=1,2") == 0
    printed = capfd.readouterr()
    assert "sweep.json cannot be written (No space left on device)" in printed.err
    assert printed.out.count("finished") >= 2


def test_a_signal_ends_the_whole_sweep(command: Command):
    """It is passed on to the job that runs, and no other starts."""

    def act(job: Fake) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            if job.stopped_by:
                return Outcome("stopped", 143, "SIGTERM")
            threading.Event().wait(0.01)
        return finish(job)

    Fake.act = act
    assert command("loss.alpha=1,2,3") == 143
    assert states() == ["stopped", "not started", "not started"]
    assert len(Fake.started) == 1


# ---- again -------------------------------------------------------------------------------------


def test_a_repeated_sweep_does_the_rest(command: Command, capfd: pytest.CaptureFixture[str]):
    """Finished jobs are skipped; one with a checkpoint goes on in its directory, one without starts again in it."""

    def act(job: Fake) -> Outcome:
        if job.config.loss.alpha == 1:
            return finish(job)
        if job.config.loss.alpha == 2:
            made_checkpoint(job.run_dir)
        return Outcome("killed", 137, "SIGKILL")

    Fake.act = act
    assert command("loss.alpha=1,2,3") == 1
    first = latest()
    Fake.act = finish
    capfd.readouterr()
    assert command("loss.alpha=1,2,3") == 0
    again = latest()
    assert [job.config.loss.alpha for job in Fake.started] == [2, 3]
    assert [job["run_dir"] for job in again["jobs"]] == [job["run_dir"] for job in first["jobs"]]
    assert [job["before"] for job in again["jobs"]] == [True, False, False]
    assert again["name"] == first["name"]  # one sweep in MLflow
    assert len(list(Path("multirun").glob("*/*"))) == 1  # and one directory here, with its report
    resumed = [RunRecord.read(job.run_dir).resume_from for job in Fake.started]
    assert resumed == [str(Fake.started[0].run_dir / "model" / "checkpoint-2"), None]
    assert "3 jobs, 1 finished before, 1 go on from a checkpoint" in capfd.readouterr().out

    assert command("loss.alpha=1,2,3") == 0
    assert Fake.started == []
    assert states() == ["finished"] * 3


def test_a_sweep_with_more_points_runs_those(command: Command):
    """It is another sweep, which shows all of its points."""
    command("loss.alpha=1,2")
    first = latest()
    assert command("loss.alpha=1,2,3") == 0
    assert [job.config.loss.alpha for job in Fake.started] == [3]
    assert latest()["name"] != first["name"] or latest()["jobs"] != first["jobs"]
    assert len(latest()["jobs"]) == 3


def test_rerun_does_everything_anew(command: Command):
    """In new directories."""
    command("loss.alpha=1,2", "hydra.sweep.dir=multirun/first")
    assert command("loss.alpha=1,2", "sweep.rerun=true", "hydra.sweep.dir=multirun/second") == 0
    assert [job.run_dir.parent.name for job in Fake.started] == ["second", "second"]


def test_a_directory_may_hold_several_sweeps(command: Command):
    """Job 0 of the second one is another job than that of the first, and so is a job that is done anew."""
    options = ["hydra.sweep.dir=multirun/mine"]
    command("loss.alpha=2,3", *options)
    assert command("loss.alpha=1,2,3", *options) == 0
    assert [(job.run_dir.name, job.config.loss.alpha) for job in Fake.started] == [("0-2", 1)]
    assert command("loss.alpha=1", *options, "sweep.rerun=true") == 0
    assert [job.run_dir.name for job in Fake.started] == ["0-3"]


def test_a_job_that_another_command_takes_up_meanwhile_is_left_to_it(command: Command):
    """It had not begun when this command looked."""

    def act(job: Fake) -> Outcome:
        if job.config.loss.alpha == 1:
            second = Path(latest()["jobs"][1]["run_dir"])
            finish(Fake(second, None, 1, None))
            third.append(FileLock(Path(latest()["jobs"][2]["run_dir"]) / "run.lock"))
            third[0].acquire()
        return finish(job)

    third: list[FileLock] = []
    Fake.act = act
    assert command("loss.alpha=1,2,3") == 0
    third[0].release()
    assert states() == ["finished", "finished", "running elsewhere"]
    assert [job.config.loss.alpha for job in Fake.started] == [1, 2]  # 2 by the other command


@pytest.mark.parametrize("place", ["hydra.sweep.dir=multirun/both", "hydra.sweep.dir=multirun/${now:%Y}"])
def test_two_sweeps_at_once_lose_nothing_of_each_other(command: Command, place: str):
    """In one directory, or in one that both would have called by the time: that is another one for the second."""

    def act(job: Fake) -> Outcome:
        if job.config.loss.alpha == 1:
            Fake.act = finish
            second = [sys.executable, "-c", SECOND, "-m", "experiment=smoke", "tracking=none", "loss.alpha=3,4", place]
            done = subprocess.run(second, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return finish(job)

    Fake.act = act
    assert command("loss.alpha=1,2", place) == 0
    found = {}
    for file in Path("multirun").rglob("sweep.json"):
        found |= {job["name"]: (job["state"], job["run_dir"]) for job in json.loads(file.read_text())["jobs"]}
    assert {name: state for name, (state, _) in found.items()} == dict.fromkeys(["a1", "a2", "a3", "a4"], "finished")
    assert len({run_dir for _, run_dir in found.values()}) == 4
    assert len(list(Path("multirun").rglob("sweep.json"))) == (1 if "both" in place else 2)


def test_where_configurations_lie_is_part_of_the_command(command: Command, tmp_path: Path):
    """Without it the printed command would not find the judge."""
    (tmp_path / "my_conf" / "judge").mkdir(parents=True)
    (tmp_path / "my_conf" / "judge" / "mine.yaml").write_text("_target_: xpo.judges.FunctionJudge\nfunction: m:f\n")
    search = f"hydra.searchpath=[file://{tmp_path}/my_conf]"
    assert command(search, "judge=mine", "loss.alpha=1,2") == 0
    assert search in RunRecord.read(Fake.started[0].run_dir).overrides


def test_a_job_at_work_elsewhere_is_left_alone(command: Command):
    """Its lock tells."""
    Fake.act = lambda job: Outcome("killed", 137, "SIGKILL")
    command("loss.alpha=1,2")
    Fake.act = finish
    with FileLock(Path(latest()["jobs"][0]["run_dir"]) / "run.lock"):
        assert command("loss.alpha=1,2") == 0
    assert states() == ["running elsewhere", "finished"]
    assert [job.config.loss.alpha for job in Fake.started] == [2]


def test_what_matters_not_is_not_another_job(command: Command):
    """Where it is tracked, how many run at once, the name of the sweep, what is shown."""
    command("loss.alpha=1,2")
    other = ["launch.jobs=2", "sweep.name=mine", "reference.store=off", "evaluation.show=0"]
    assert command("loss.alpha=1,2", *other, "training.disable_tqdm=true", "training.save_total_limit=1") == 0
    assert Fake.started == []
    assert latest()["name"] == "mine"


def test_other_prompts_are_another_job(command: Command, tmp_path: Path):
    """Also if they are in the same file."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one"}\n')
    arguments = ["data.train=mine.jsonl", "loss.alpha=1"]
    command(*arguments)
    assert command(*arguments) == 0
    assert Fake.started == []
    (tmp_path / "mine.jsonl").write_text('{"prompt": "two"}\n')
    assert command(*arguments) == 0
    assert len(Fake.started) == 1


# ---- the real thing ----------------------------------------------------------------------------

JUDGE = '''
"""Prefers the completion with more letters e; kills or crashes its process once, where the test says so."""
import os, signal, sys
from pathlib import Path

CALLS = []

def judge(prompts, first, second):
    CALLS.append(1)
    run_dir = Path(sys.argv[1])
    marker = run_dir.parent / f"{run_dir.name}.done"
    if len(CALLS) == 4 and run_dir.name in ("1", "2") and not marker.exists():
        marker.touch()
        if run_dir.name == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the judge fell over")
    return [a.count("e") - b.count("e") for a, b in zip(first, second)]
'''


@pytest.mark.timeout(900)  # five starts of a process group
def test_a_sweep_over_deepspeed_with_a_kill_and_a_crash(tmp_path: Path):
    """Three jobs under ZeRO-2 on two processes: one finishes; the same command again completes the other two only.

    In MLflow every step of every job is there exactly once.
    """
    (tmp_path / "mine.py").write_text(JUDGE)
    arguments = [
        *("-m", "experiment=smoke", "loss.alpha=1e-3,1e-2,1e-1"),
        *("judge=function", "judge.function=mine:judge", "reward_model=none", "evaluation=plain"),
        *("deepspeed=zero2", "launch.num_processes=2", "data.eval=null"),
        *("training.max_steps=6", "training.save_steps=1", "training.disable_tqdm=true"),
    ]

    def run() -> tuple[int, str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "xpo.train", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    status, printed = run()
    jobs = json.loads(next(tmp_path.glob("multirun/*/*/sweep.json")).read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["finished", "failed", "failed"], printed[-4000:]
    assert jobs[2]["reason"] == "RuntimeError: the judge fell over"
    assert status == 1
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    states = [client.get_run(job["mlflow_run_id"]).info.status for job in jobs]
    assert states == ["FINISHED", "FAILED", "FAILED"]

    status, printed = run()
    assert status == 0, printed[-4000:]
    assert "3 jobs, 1 finished before, 2 go on from a checkpoint" in printed
    (experiment,) = client.search_experiments(filter_string="name = 'xpo'")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_id for run in runs) == sorted(job["mlflow_run_id"] for job in jobs)
    for run_ in runs:
        assert run_.info.status == "FINISHED"
        for key in ("loss", "objective/kl", "perf/rollout_s"):
            points = client.get_metric_history(run_.info.run_id, key)
            assert sorted(point.step for point in points) == [1, 2, 3, 4, 5, 6], (run_.info.run_name, key)
    assert {run_.data.params["deepspeed"] for run_ in runs} == {"zero2"}


DAMAGED = ["", "[]", '{"unknown": 1}']


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_of_other_commands_stop_no_sweep(
    command: Command, capfd: pytest.CaptureFixture[str], content: str
):
    """A run and a sweep below the roots, and the sweep's own record: one line on each."""
    place = "hydra.sweep.dir=multirun/a/b"
    assert command("loss.alpha=1,2", place) == 0
    damaged = ("outputs/x/run.json", "multirun/y/sweep.json", "multirun/a/b/sweep.json", "multirun/a/b/0/metrics.jsonl")
    for name in damaged:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{content}\n")
    os.utime("multirun/y/sweep.json", (2e9, 2e9))  # the newest
    for arguments in ((place,), ()):  # with a record of its own, and looking for another's name
        capfd.readouterr()
        assert command("loss.alpha=1,2", *arguments) == 0
        assert not Fake.started
        lines = capfd.readouterr().err.splitlines()
        assert all("is passed over: " in line for line in lines)
        assert any("outputs/x/run.json cannot be read" in line for line in lines)
        assert any("sweep.json cannot be read" in line for line in lines)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_run_stops_no_other_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str):
    """training.resume=auto passes it over, newest or not; named, it is one line."""
    RunRecord(job_key="mine").write(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(content)
    assert resolve_resume("auto", "mine", [tmp_path, tmp_path / "x"]) == (tmp_path, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"xpo: a run is passed over: {tmp_path}/x/run.json cannot be read (")
    with pytest.raises(ConfigError, match=r"run\.json cannot be read .*; mend it or delete it$"):
        resolve_resume(str(tmp_path / "x"), "mine", [])
