"""The command line from end to end: real processes in directories of their own, and an MLflow database."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import EVAL_METRICS, OWN_METRICS, TRL_METRICS, made_checkpoint
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from xpo import train
from xpo.config.compose import CONF, checked, choose_preset, compose
from xpo.config.errors import ConfigError, RunInUse
from xpo.config.schema import TrainSchema
from xpo.launch import processes as launch
from xpo.launch import worker
from xpo.launch.jobs import prepare, run_name
from xpo.launch.sweep import _runs_by_key
from xpo.models.loading import tiny_model
from xpo.tracking.metrics_log import evaluations, read_metrics
from xpo.tracking.runs import RunRecord, is_complete, last_complete_checkpoint, resolve_resume
from xpo.train import begun_before
from xpo.training import callbacks

STEPS = 8
SMOKE = ["experiment=smoke", f"training.max_steps={STEPS}", "training.logging_steps=1"]


def start(arguments: Sequence[str], directory: Path, **environment: str) -> subprocess.Popen[str]:
    """`python -m xpo.train ...` in `directory`; its stderr goes to the file `stderr` there."""
    command = [sys.executable, "-m", "xpo.train", *arguments]
    with (directory / "stderr").open("w") as stderr:
        return subprocess.Popen(
            command, cwd=directory, env=os.environ | environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )


@dataclass
class Ended:
    """What a command left behind; `run` and `points` are its MLflow run at that moment."""

    status: int
    stdout: str
    stderr: str
    directory: Path
    run: Run | None = None
    points: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    checkpoint: Path | None = None

    @property
    def run_dir(self) -> Path:
        """The only run directory."""
        (record,) = self.directory.glob("outputs/*/*/run.json")
        return record.parent

    @property
    def record(self) -> RunRecord:
        return RunRecord.read(self.run_dir)


def end(process: subprocess.Popen[str], directory: Path, uri: str | None = None, seen: str = "") -> Ended:
    """Waits for a command, of whose stdout `seen` has been read; looks into MLflow if it has a `uri`."""
    stdout, _ = process.communicate()
    ended = Ended(process.returncode, seen + stdout, (directory / "stderr").read_text(), directory)
    if uri is not None:
        client = MlflowClient(uri)
        ended.run = client.get_run(ended.record.mlflow_run_id)
        for key in ended.run.data.metrics:
            points = ended.points.setdefault(key, {})
            for point in client.get_metric_history(ended.run.info.run_id, key):
                points.setdefault(point.step, []).append(point.value)
        ended.checkpoint = last_complete_checkpoint(ended.run_dir / "model")
    return ended


def wait_for_steps(process: subprocess.Popen[str], count: int) -> str:
    """What the process writes to stdout until there are `count` lines of a training step."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        count -= line.startswith("step ")
        if count == 0:
            return seen
    return pytest.fail(f"the run ended with {process.wait()} before its step")


def in_one_process(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """`python -m xpo.train ...` in this process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # `main` sets it too: this one is taken back
    launch.exit_statuses.clear()
    launch.signals.clear()
    monkeypatch.setattr(sys, "argv", ["xpo.train", *arguments])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with pytest.raises(SystemExit) as exit_of_main:
        train.main()
    root.handlers[:] = handlers  # Hydra has replaced them
    root.setLevel(level)
    return exit_of_main.value.code  # type: ignore[return-value]


def prepared(arguments: Sequence[str], directory: Path) -> Path:
    """What the parent does before it starts a worker; returns the run directory."""
    arguments = choose_preset(list(arguments))
    config, _, choices = compose(arguments)
    return prepare(config, directory, choices, arguments)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all runs, as in a project: its tables take seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture(scope="module")
def finished(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("finished")
    return end(start([*SMOKE, f"tracking.uri={uri}"], directory), directory, uri)


# ---- one run -----------------------------------------------------------------------------------


def test_a_run_ends_well(finished: Ended):
    """Exit status 0, and the record says finished."""
    assert finished.status == 0, finished.stderr
    assert finished.record.finished
    assert finished.record.choices["model"] == "tiny"
    assert finished.record.choices["experiment"] == "smoke"


def test_the_run_directory_says_what_was_done(finished: Ended):
    """Configuration, metrics and completions."""
    assert {path.name for path in finished.run_dir.iterdir()} == {
        "config.yaml",
        "run.json",
        "run.lock",
        "metrics.jsonl",
        "pairs.jsonl",
        "pairs.parquet",
        "mlflow.json",
        "completions",
        "model",
    }
    config = OmegaConf.load(finished.run_dir / "config.yaml")
    assert config.model.name == "embedded:tiny"
    assert config.training.max_steps == STEPS
    history = read_metrics(finished.run_dir)
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, STEPS + 1))
    assert {path.name for path in (finished.run_dir / "completions").iterdir()} == {
        "step_000000.json",
        f"step_{STEPS:06d}.json",
        "eval_completions.json",
    }
    table = json.loads((finished.run_dir / "completions" / "eval_completions.json").read_text())
    assert table["columns"][:2] == ["prompt", "completion"]
    steps = [row[table["columns"].index("step")] for row in table["data"]]
    assert set(steps) == {0, STEPS}
    assert steps == sorted(steps, reverse=True)  # a table opens at its top: trained answers first


def test_the_model_loads_with_transformers_alone(finished: Ended):
    """Weights that training has moved, and the tokenizer with its chat template."""
    model = AutoModelForCausalLM.from_pretrained(finished.run_dir / "model")
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True)]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(finished.run_dir / "model").chat_template is not None


def test_the_model_card_holds_the_numbers_of_the_run(finished: Ended):
    """First and last evaluation, as in metrics.jsonl, and the settings."""
    card = (finished.run_dir / "model" / "README.md").read_text()
    first, last = evaluations(read_metrics(finished.run_dir))
    assert f"{STEPS} optimizer steps" in card
    assert f"| metric | step 0 | step {STEPS} |" in card
    for name in ("win_rate", "score", "kl", "vader"):
        assert f"| {name} | {first[f'eval_{name}']:.3f} | {last[f'eval_{name}']:.3f} |" in card
    assert "| learning_rate | 0.001 |" in card


def test_mlflow_knows_what_was_run(finished: Ended):
    """Params by dotted key, tags, artifacts."""
    assert finished.run is not None
    assert finished.run.info.status == "FINISHED"
    params = finished.run.data.params
    assert params["model.name"] == "embedded:tiny"
    assert params["loss.alpha"] == "1e-05"
    assert params["training.max_steps"] == str(STEPS)
    assert params["experiment"] == "smoke"
    tags = finished.run.data.tags
    assert tags["xpo.run_dir"] == str(finished.run_dir)
    assert tags["xpo.job_key"] == finished.record.job_key
    assert {"xpo.version", "torch", "transformers", "mlflow.loggedArtifacts", "mlflow.user"} <= tags.keys()
    assert tags["mlflow.source.name"] == finished.record.command()
    assert tags["mlflow.source.name"].startswith("python -m xpo.train experiment=smoke ")
    artifacts = Path(finished.run.info.artifact_uri.removeprefix("file://"))
    stored = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    assert stored == {
        "config.yaml",
        "pairs.parquet",
        "eval_completions.json",
        "completions/step_000000.json",
        f"completions/step_{STEPS:06d}.json",
    }


@pytest.mark.parametrize("metric", sorted(TRL_METRICS | OWN_METRICS))
def test_mlflow_holds_every_training_metric_of_every_step(finished: Ended, metric: str):
    """Once per step: all 17 of TRL's documentation, and ours."""
    assert {step: len(values) for step, values in finished.points[metric].items()} == dict.fromkeys(
        range(1, STEPS + 1), 1
    )


@pytest.mark.parametrize("metric", sorted(EVAL_METRICS))
def test_mlflow_holds_every_evaluation_and_the_final_one(finished: Ended, metric: str):
    """eval/* before the first step and after the last one, final/* at the latter: more steps bring newer ones."""
    points = finished.points[f"eval/{metric}"]
    assert {step: len(values) for step, values in points.items()} == {0: 1, STEPS: 1}
    assert finished.points[f"final/{metric}"] == {STEPS: points[STEPS]}


def test_mlflow_holds_no_other_metrics(finished: Ended):
    """What is logged is documented."""
    of_evaluations = {f"{family}/{metric}" for family in ("eval", "final") for metric in (*EVAL_METRICS, "runtime")}
    assert finished.points.keys() == TRL_METRICS | OWN_METRICS | of_evaluations | {
        "epoch",
        "final/epoch",
        "final/log10_alpha",
    }
    assert finished.points["final/log10_alpha"] == {STEPS: [-5.0]}


def test_the_last_lines_say_where_the_model_is_and_how_to_open_the_ui(finished: Ended, uri: str):
    assert finished.stdout.splitlines()[-2:] == [
        f"Model:   {finished.run_dir / 'model'}",
        f"Compare: mlflow ui --backend-store-uri {uri}",
    ]


def test_each_step_has_a_line(finished: Ended):
    """With the numbers that a person watches."""
    lines = [line for line in finished.stdout.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == list(range(1, STEPS + 1))
    losses = finished.points["loss"]
    assert [float(re.search(r"loss (\S+)", line)[1]) for line in lines] == [  # type: ignore[index]
        pytest.approx(losses[step][0], abs=5e-4) for step in range(1, STEPS + 1)
    ]


def test_a_console_that_cannot_show_a_character_fails_no_run(tmp_path: Path):
    """The completions of a random model are full of them."""
    directory = tmp_path / "straße"
    directory.mkdir()
    words = ["experiment=smoke", "training.max_steps=1", "tracking=none", f"hydra.run.dir='{directory}/run'"]
    ended = end(start(words, directory, PYTHONIOENCODING="ascii"), directory)
    assert ended.status == 0, ended.stderr
    assert RunRecord.read(directory / "run").finished
    assert "stra?e/run/model" in ended.stdout


def test_stderr_holds_progress_bars_only(finished: Ended):
    """A warning there would be one that nobody needs."""
    parts = re.split(r"[\r\n]+", finished.stderr.replace("\x1b[A", ""))
    assert [part for part in parts if part.strip() and not re.search(r"\d+%\|.*\| \d+/\d+ \[", part)] == []


# ---- what the command line shows ----------------------------------------------------------------


def test_cfg_job_imports_neither_torch_nor_mlflow(tmp_path: Path):
    """It answers at once because nothing heavy is imported."""
    code = (
        "import sys\n"
        "from xpo.train import main\n"
        "sys.argv = ['xpo.train', 'loss.alpha=0.5', '--cfg', 'job']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(*{'torch', 'transformers', 'mlflow', 'datasets', 'xpo'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert shown.stderr.split() == ["xpo"]
    config = OmegaConf.create(shown.stdout)
    assert config.loss.alpha == 0.5
    assert config.model.name == "embedded:smollm2_135m"
    assert list(tmp_path.iterdir()) == []


GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = sorted(f"{path.parent.name}/{path.stem}" for group in GROUPS for path in (CONF / group).glob("*.yaml"))
# What an option cannot do without.
NEEDS = {
    "data/local": ["data.train=prompts.jsonl"],
    "reward_model/classifier": ["reward_model.model=owner/name"],
    "reward_model/none": ["judge=pair_rm"],
    "reward_model/function": ["reward_model.function=module:function"],
    "judge/function": ["judge.function=module:function"],
    "judge/llm": ["judge.model=name"],
    "sampler/iterate": ["training.iterations=3"],
    "sampler/past": ["training.iterations=3"],
}


def test_help_lists_every_group_with_a_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """What each folder of conf/ is for, and the names of its options."""
    assert in_one_process(["--help"], monkeypatch) == 0
    lines = capfd.readouterr().out.splitlines()
    for group in GROUPS:
        assert f"{group}: {', '.join(sorted(path.stem for path in (CONF / group).glob('*.yaml')))}" in lines
    described = [line.split()[0] for line in lines if re.match(r"  \w+ {2,}\w", line)]
    assert sorted(described) == GROUPS


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_passes_the_schema(option: str, tmp_path: Path):
    """Its values arrive in the configuration, whose choice it is."""
    group, name = option.split("/")
    preset = [] if group == "experiment" else ["experiment=none"]
    run_dir = prepared([*preset, f"{group}={name}", *NEEDS.get(option, [])], tmp_path / "run")
    assert RunRecord.read(run_dir).choices[group] == name
    resolved = OmegaConf.load(run_dir / "config.yaml")
    file = OmegaConf.load(CONF / f"{option}.yaml")
    values = file if group == "experiment" else OmegaConf.create({group: file})
    for node in [values] if group == "experiment" else [values[group]]:
        node.pop("defaults", None)
        node.pop("hydra", None)
    missing = OmegaConf.missing_keys(values)
    for key in missing:
        OmegaConf.update(values, key, OmegaConf.select(resolved, key))
    assert OmegaConf.merge(resolved, values) == resolved


@pytest.mark.parametrize("option", OPTIONS)
def test_every_file_begins_with_the_command_that_runs_it(option: str, tmp_path: Path):
    """A command that works, and that reads the file it stands in."""
    group, name = option.split("/")
    lines = (CONF / f"{option}.yaml").read_text().splitlines()
    if group == "experiment":
        assert lines.pop(0) == "# @package _global_"
    command = re.fullmatch(r"# python -m xpo\.train (.+)", lines[0])
    assert command, lines[0]
    arguments = [argument for argument in shlex.split(command[1]) if not argument.endswith("=...")]
    if arguments[0] == "-m":  # the first job of a sweep
        arguments = [argument.partition(",")[0] for argument in arguments[1:]]
    run_dir = prepared(arguments, tmp_path / "run")
    assert RunRecord.read(run_dir).choices[group] == name


# ---- workers, names, directories -------------------------------------------------------------------------


def test_a_process_that_a_launcher_started_is_a_worker_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """torchrun sets RANK: rank 0 prepares the run directory, every rank works."""
    worked: list[tuple[TrainSchema, Path]] = []
    monkeypatch.setattr(worker, "run", lambda config, run_dir: worked.append((config, run_dir)) or 7)
    monkeypatch.chdir(tmp_path)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert in_one_process(["experiment=smoke", "loss.alpha=0.5", "hydra.run.dir=run"], monkeypatch) == 7
    for config, run_dir in worked:
        assert run_dir == Path("run")
        assert config.loss.alpha == 0.5
    assert len(worked) == 2
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").loss.alpha == 0.5
    assert RunRecord.read(tmp_path / "run").overrides == ["experiment=smoke", "loss.alpha=0.5"]


@pytest.mark.parametrize("arguments", [["-m", "loss.alpha=1,2"], ["experiment=sweep_alpha_beta"]])
def test_a_process_that_a_launcher_started_runs_no_sweep(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Whoever asks for it, the command line or a file: it would train with values that nobody swept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    assert in_one_process(arguments, monkeypatch) == 2
    assert "--multirun under a launcher is not supported; start the sweep without" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [None, "0"])
def test_what_a_command_reads_of_hydra_stands_in_the_command_that_goes_on(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Where its configurations lie, the environment; and ${hydra:...} in a value is known, with a launcher or not."""
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    (tmp_path / "my_conf" / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [smoke]\n")
    seen: list[str | None] = []

    def work(*arguments: object) -> int:
        seen.append(os.environ.get("XPO_SEEN"))
        return 7

    monkeypatch.setattr(worker, "run", work)
    monkeypatch.setattr(train, "start_worker", work)
    monkeypatch.chdir(tmp_path)
    if rank:
        monkeypatch.setenv("RANK", rank)
    name = "tracking.run_name=${hydra:job.name}_${hydra:runtime.choices.model}"
    words = ["--config-dir", "my_conf", "experiment=mine", "+hydra.job.env_set.XPO_SEEN=5", name, "hydra.run.dir=run"]
    assert in_one_process(words, monkeypatch) == 7
    assert seen == ["5"]
    assert OmegaConf.load("run/config.yaml").tracking.run_name == "train_tiny"
    assert RunRecord.read(Path("run")).name == "mine"
    again = shlex.split(RunRecord.read(Path("run")).command("run"))[3:]
    assert in_one_process(again, monkeypatch) == 7
    assert seen == ["5", "5"]


def test_the_experiment_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As MLflow's client would use it; a key wins."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    for words, name in (([], "ours"), (["tracking.experiment=mine"], "mine")):
        run_dir = prepared(["experiment=smoke", *words], tmp_path / name)
        assert OmegaConf.load(run_dir / "config.yaml").tracking.experiment == name


def test_a_job_does_not_move(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """hydra.job.chdir would take mlflow.db into the run directory."""
    monkeypatch.chdir(tmp_path)
    assert in_one_process(["experiment=smoke", "hydra.job.chdir=true"], monkeypatch) == 2
    assert "hydra.job.chdir=True" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "preset"),
    [
        ([], "quickstart"),
        (["loss.alpha=1"], "quickstart"),
        (["model=tiny"], "none"),
        (["loss.alpha=1", "data=local", "data.train=prompts.jsonl"], "none"),
        (["model.name=owner/name"], "none"),
        (["data.train=prompts.jsonl"], "none"),
        (["++data.train=prompts.jsonl"], "none"),
        (["model=tiny", "experiment=smoke"], "smoke"),
    ],
)
def test_the_default_preset_is_for_the_default_model_and_data(arguments: list[str], preset: str, tmp_path: Path):
    """Its learning rate and lengths fit nothing else."""
    assert RunRecord.read(prepared(arguments, tmp_path / "run")).choices["experiment"] == preset


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "quickstart"),
        (["experiment=smoke", "tracking.uri=http://x.y", "training.resume=auto"], "smoke"),
        (["loss.alpha=0.5", "+loss=ipo", "training.max_steps=3"], "alpha=0.5 loss=ipo max_steps=3"),
        (["data.train=a/b.jsonl"], "train=a/b.jsonl"),
    ],
)
def test_a_run_is_named_after_what_is_special_about_it(arguments: list[str], name: str):
    """Values may hold points."""
    assert (
        run_name({"experiment": "smoke" if arguments[:1] == ["experiment=smoke"] else "quickstart"}, arguments) == name
    )


def test_a_run_does_not_write_into_the_directory_of_another(tmp_path: Path):
    """Two commands of the same second, or a fixed hydra.run.dir."""
    prepared(["experiment=smoke"], tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=rf"hydra.run.dir='{tmp_path}' holds a run already; choose another"):
        prepared(["experiment=smoke", "loss.alpha=1"], tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_at_work_keeps_its_record(tmp_path: Path):
    """A second command that resumes it, with another value."""
    prepared(["experiment=smoke"], tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with FileLock(tmp_path / "run.lock"), pytest.raises(RunInUse, match=r"is in use by a run; wait for its end"):
        prepared(["experiment=smoke", "loss.beta=0.7", f"training.resume={tmp_path}"], tmp_path / "other")
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_without_a_checkpoint_starts_again_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As the printed command asks for; a finished one does not."""
    prepared(["experiment=smoke"], tmp_path / "run")
    resumed = prepared(["experiment=smoke", f"training.resume={tmp_path / 'run'}"], tmp_path / "other")
    assert resumed == tmp_path / "run"
    assert RunRecord.read(resumed).resume_from is None
    assert f"xpo: {tmp_path / 'run'} has no checkpoint, starting from the beginning" in capsys.readouterr().err
    record = RunRecord.read(resumed)
    record.finished = True
    record.write(resumed)
    with pytest.raises(ConfigError, match=r"training.resume='.*' holds no complete checkpoint"):
        prepared(["experiment=smoke", f"training.resume={tmp_path / 'run'}"], tmp_path / "other")


def test_a_job_of_a_sweep_that_is_resumed_alone_stays_one(tmp_path: Path):
    """Its name and its place in MLflow; not with another value, which is another run."""
    prepared(["experiment=smoke"], tmp_path / "run")
    record = RunRecord.read(tmp_path / "run")
    record.name, record.tags = "alpha=1", {"xpo.sweep": "s"}
    record.write(tmp_path / "run")
    for words, name, tags in (([], "alpha=1", {"xpo.sweep": "s"}), (["loss.beta=0.7"], "beta=0.7", {})):
        resumed = prepared(["experiment=smoke", *words, f"training.resume={tmp_path / 'run'}"], tmp_path / "other")
        assert (RunRecord.read(resumed).name, RunRecord.read(resumed).tags) == (name, tags)


# ---- sweeps ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two jobs, without MLflow."""
    directory = tmp_path_factory.mktemp("sweep")
    arguments = ["-m", "loss.alpha=1e-6,1e-5", "experiment=smoke", "tracking=none"]
    return end(start(arguments, directory), directory)


def test_a_sweep_runs_every_job_in_its_directory(sweep: Ended):
    """multirun/DATE/TIME/0 and 1, each with its own value and its own model."""
    assert sweep.status == 0, sweep.stderr
    jobs = sorted(sweep.directory.glob("multirun/*/*/*/run.json"))
    assert [job.parent.name for job in jobs] == ["0", "1"]
    assert len({job.parent.parent for job in jobs}) == 1
    assert [OmegaConf.load(job.parent / "config.yaml").loss.alpha for job in jobs] == [1e-6, 1e-5]
    assert [RunRecord.read(job.parent).name for job in jobs] == ["a1e-6", "a1e-5"]
    assert all(RunRecord.read(job.parent).finished for job in jobs)
    assert len({(job.parent / "model" / "model.safetensors").read_bytes() for job in jobs}) == 2
    assert not (sweep.directory / "outputs").exists()


def test_without_tracking_there_is_no_trace_of_mlflow(sweep: Ended):
    """Neither a database, nor a lock, nor artifacts, nor a word."""
    assert {path.name for path in sweep.directory.iterdir()} == {"multirun", "stderr"}
    assert "mlflow" not in (sweep.stdout + sweep.stderr).lower()
    assert "compareRunsMode" not in sweep.stdout


# ---- interrupted, killed, resumed ----------------------------------------------------------------


@pytest.fixture(scope="module")
def lives(finished: Ended, uri: str, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """One run in three processes: SIGTERM to the first, SIGKILL to the worker of the second, and the third finishes."""
    directory = tmp_path_factory.mktemp("lives")
    command = [*SMOKE, f"tracking.uri={uri}"]
    first = start(command, directory)
    seen = wait_for_steps(first, 2)
    first.terminate()
    lives = [end(first, directory, uri, seen)]

    command.append("training.resume=auto")
    second = start(command, directory)
    seen = wait_for_steps(second, 3)
    (its_worker,) = psutil.Process(second.pid).children()
    its_worker.kill()
    lives.append(end(second, directory, uri, seen))

    lives.append(end(start(command, directory), directory, uri))
    return lives


def test_sigterm_ends_the_run_after_the_step_with_a_checkpoint(lives: list[Ended]):
    """Exit status 128 + 15, a complete checkpoint of the step in progress, and the way to go on."""
    stopped = lives[0]
    assert stopped.status == 143, stopped.stderr
    assert stopped.checkpoint is not None
    last = max(stopped.points["loss"])
    assert 2 <= last < STEPS
    assert stopped.checkpoint.name == f"checkpoint-{last}"
    assert f"Stopped at step {last}. Continue with: python -m xpo.train experiment=smoke " in stopped.stdout
    assert "Traceback" not in stopped.stderr


def test_sigterm_loses_no_point_in_mlflow(lives: list[Ended]):
    """The run is KILLED, and holds every step that was logged."""
    stopped = lives[0]
    assert stopped.run is not None
    assert stopped.run.info.status == "KILLED"
    last = max(stopped.points["loss"])
    for metric in TRL_METRICS | OWN_METRICS:
        assert sorted(stopped.points[metric]) == list(range(1, last + 1)), metric


def test_a_killed_worker_is_reported(lives: list[Ended]):
    """By the parent, as nobody else can: exit status 128 + 9, and the way to go on."""
    killed = lives[1]
    assert killed.status == 137
    line = killed.stderr.splitlines()[-1].rpartition("\r")[2]
    assert "xpo: error: the worker of " in line
    assert "was killed (SIGKILL, for want of memory perhaps); continue with:" in line
    assert line.endswith(f"training.resume={killed.run_dir}")
    assert killed.run is not None
    assert killed.run.info.status == "RUNNING"


def test_resume_auto_goes_on_from_the_last_checkpoint(lives: list[Ended]):
    """Twice, in the directory of the first life."""
    stopped, killed, ended = lives
    assert ended.status == 0, ended.stderr
    for before, after in [(stopped, killed), (killed, ended)]:
        assert before.checkpoint is not None
        assert f"Training from {before.checkpoint}" in after.stdout
        first_step = next(line for line in after.stdout.splitlines() if line.startswith("step "))
        assert int(first_step.split()[1]) == int(before.checkpoint.name.rpartition("-")[2]) + 1
    assert len({life.run_dir for life in lives}) == 1
    assert ended.record.finished


def test_all_lives_are_one_mlflow_run(lives: list[Ended]):
    """It ends FINISHED, with every step exactly once, also the steps that were done twice."""
    assert len({life.run.info.run_id for life in lives if life.run}) == 1
    ended = lives[-1]
    assert ended.run is not None
    assert ended.run.info.status == "FINISHED"
    for metric in TRL_METRICS | OWN_METRICS:
        steps = {step: len(values) for step, values in ended.points[metric].items()}
        assert steps == dict.fromkeys(range(1, STEPS + 1), 1), metric
    assert {step: len(values) for step, values in ended.points["eval/win_rate"].items()} == {0: 1, STEPS: 1}


def test_a_run_of_three_lives_equals_an_undisturbed_one(lives: list[Ended], finished: Ended):
    """Every metric but the timings, to the last bit, and the weights."""
    assert lives[-1].record.job_key == finished.record.job_key
    for metric in finished.points:
        if not metric.startswith("perf/") and not metric.endswith("runtime"):
            assert lives[-1].points[metric] == finished.points[metric], metric
    weights, undisturbed = (load_file(end.run_dir / "model" / "model.safetensors") for end in (lives[-1], finished))
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights | undisturbed)


@pytest.fixture
def copied(lives: list[Ended], tmp_path: Path) -> Path:
    """A copy of the run of three lives, to go on with."""
    return Path(shutil.copytree(lives[-1].run_dir, tmp_path / "copied"))


def test_the_command_that_a_stopped_run_prints_goes_on_with_it(lives: list[Ended], copied: Path, tmp_path: Path):
    """The same configuration in the same directory, from the newest checkpoint."""
    printed = re.search(r"Continue with: python -m xpo.train (.*)", lives[0].stdout)
    assert printed
    arguments = shlex.split(printed[1].replace(str(lives[0].run_dir), str(copied)))
    before, record = OmegaConf.load(copied / "config.yaml"), RunRecord.read(copied)
    assert prepared(arguments, tmp_path / "unused") == copied
    after = OmegaConf.load(copied / "config.yaml")
    assert RunRecord.read(copied).mlflow_run_id == record.mlflow_run_id
    assert RunRecord.read(copied).job_key == record.job_key
    assert RunRecord.read(copied).resume_from == str(copied / "model" / f"checkpoint-{STEPS}")
    before.training.resume = after.training.resume = None
    assert before == after


def test_auto_goes_on_in_a_fixed_directory_with_or_without_a_checkpoint(tmp_path: Path):
    """A requeued job repeats its command: the same directory, the same MLflow run."""
    command = ["experiment=smoke", "training.resume=auto"]
    run_dir = tmp_path / "run"
    record = RunRecord.read(prepared(command, run_dir))
    record.mlflow_run_id = "abc"
    record.write(run_dir)
    assert prepared(command, run_dir) == run_dir
    assert RunRecord.read(run_dir).mlflow_run_id == "abc"
    assert RunRecord.read(run_dir).resume_from is None
    checkpoint = made_checkpoint(run_dir, with_optimizer=False)
    prepared(command, run_dir)
    assert RunRecord.read(run_dir).resume_from is None  # a model is not enough to go on from
    made_checkpoint(run_dir)
    prepared(command, run_dir)
    assert RunRecord.read(run_dir).resume_from == str(checkpoint)


def test_a_run_that_has_gone_on_with_other_settings_is_found_by_its_name_alone(tmp_path: Path):
    """Half of it is of other settings: neither `auto` nor a sweep may take it for a run of either command."""
    words, run_dir = ["experiment=smoke", "loss.alpha=1e-3"], tmp_path / "run"
    prepared(words, run_dir)
    made_checkpoint(run_dir)
    assert begun_before(compose(choose_preset(words))[0], run_dir).job_key == RunRecord.read(run_dir).job_key
    other = ["experiment=smoke", "loss.alpha=1e-2"]
    assert begun_before(compose(choose_preset(other))[0], run_dir) is None
    assert begun_before(compose(choose_preset(other))[0], tmp_path) is None
    key = RunRecord.read(run_dir).job_key
    assert _runs_by_key([tmp_path]) == {key: [run_dir]}
    for _ in range(2):  # repeated, it has the settings of its last command
        assert prepared([*other, f"training.resume={run_dir}"], run_dir) == run_dir
        assert RunRecord.read(run_dir).mixed
        assert RunRecord.read(run_dir).job_key != key
        assert resolve_resume("auto", RunRecord.read(run_dir).job_key, [tmp_path]) is None
    assert _runs_by_key([tmp_path]) == {}


def test_a_finished_run_is_said_to_be_one(finished: Ended, uri: str):
    """By its command, repeated in its directory with training.resume=auto: as a scheduler does."""
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    place = f"hydra.run.dir={finished.run_dir}"
    again = end(
        start([*SMOKE, f"tracking.uri={uri}", "training.resume=auto", place], finished.directory), finished.directory
    )
    assert (again.status, again.stderr) == (0, "")
    assert again.stdout.splitlines() == [
        f"The run in {finished.run_dir} has finished; for another one choose another hydra.run.dir"
    ]
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before
    assert finished.record.finished


def test_a_run_is_not_resumed_with_another_model(copied: Path, tmp_path: Path):
    """Its directory stays as it was, and the line names the right command."""
    before = (copied / "config.yaml").read_text()
    with pytest.raises(ConfigError) as error:
        prepared([f"training.resume={copied}"], tmp_path / "unused")
    assert "is a run with model.name='embedded:tiny', not 'embedded:smollm2_135m'" in str(error.value)
    assert "python -m xpo.train experiment=smoke " in str(error.value)
    assert (copied / "config.yaml").read_text() == before


def test_a_half_written_checkpoint_is_passed_over(copied: Path, tmp_path: Path):
    """Resuming takes the newest one that is whole."""
    last = copied / "model" / f"checkpoint-{STEPS}"
    shutil.copytree(last, copied / "model" / "checkpoint-1", dirs_exist_ok=True)  # a kill may have left no other one
    (last / "trainer_state.json").unlink()
    whole = [path for path in (copied / "model").glob("checkpoint-*") if is_complete(path)]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    prepared([*SMOKE, f"training.resume={copied}"], tmp_path / "unused")
    assert RunRecord.read(copied).resume_from == str(newest)


# ---- a crash -----------------------------------------------------------------------------------

BROKEN = """
from xpo.rewards import FunctionReward

calls = 0


def score(prompts, completions):
    global calls
    calls += 1
    if calls > 4:  # two calls a step
        raise RuntimeError("the reward server is down")
    return [float(len(text)) for text in completions]


def broken():
    return FunctionReward(score)
"""


@pytest.fixture(scope="module")
def crashed(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run whose reward model raises in its third step."""
    directory = tmp_path_factory.mktemp("crashed")
    (directory / "broken_reward.py").write_text(BROKEN)
    arguments = [*SMOKE, f"tracking.uri={uri}", "reward_model._target_=broken_reward.broken", "evaluation.before=false"]
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    return end(start(arguments, directory, PYTHONPATH=path), directory, uri)


def test_a_crash_is_exit_status_1_with_the_traceback(crashed: Ended):
    """Which names the line that raised."""
    assert crashed.status == 1
    assert "broken_reward.py" in crashed.stderr
    assert "RuntimeError: the reward server is down" in crashed.stderr
    assert not crashed.record.finished


def test_mlflow_knows_of_a_crash(crashed: Ended):
    """FAILED, the traceback in a tag, and every step before it."""
    assert crashed.run is not None
    assert crashed.run.info.status == "FAILED"
    assert "Traceback" in crashed.run.data.tags["error"]
    assert "RuntimeError: the reward server is down" in crashed.run.data.tags["error"]
    assert sorted(crashed.points["loss"]) == [1, 2]


@pytest.mark.parametrize(
    ("said", "lacks", "remedy"),
    [
        ("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598", "room on the disk", "make room"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "memory", "lower batch sizes"),
    ],
)
def test_no_room_for_the_final_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    said: str,
    lacks: str,
    remedy: str,
):
    """It names the checkpoint that is left, and the command that goes on from it; completions cost nothing more."""
    save_model = worker.XPOTrainer.save_model

    def full(self: Any, output_dir: str | None = None, **options: Any) -> None:
        if output_dir is None:
            raise RuntimeError(said)
        save_model(self, output_dir, **options)

    def no_table(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker.XPOTrainer, "save_model", full)
    monkeypatch.setattr(callbacks, "write_table", no_table)
    arguments = ["experiment=smoke", "tracking=none", "training.max_steps=1", "training.disable_tqdm=true"]
    run_dir = prepared([*arguments, "training.save_steps=1"], tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["xpo.launch.worker", str(run_dir)])
    with pytest.raises(SystemExit) as exit_of_worker:
        worker.main()
    assert exit_of_worker.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"xpo: error: no {lacks} ({said[:50]}")
    assert f"kept is {run_dir}/model/checkpoint-1; {remedy}" in line
    assert "make room, and continue with: python -m xpo.train" in line
    assert f"no {lacks}" in json.loads((run_dir / "failure.json").read_text())["reason"]


@pytest.mark.parametrize(("alpha", "shown"), [("1e-3", "-3.0"), ("0", "null")])
def test_every_swept_key_is_a_parameter(alpha: str, shown: str, tmp_path: Path):
    """Of a run where it is null, too: MLflow's parallel coordinates leave out a run that lacks one."""
    from mlflow import MlflowClient

    from xpo.launch.worker import _tracking
    from xpo.tracking.metrics_log import MetricsLog

    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    config, _, _ = compose(["experiment=smoke", f"loss.alpha={alpha}", "loss.missing_eos_penalty=null", uri])
    record = RunRecord(tags={"xpo.sweep": "s", "xpo.sweep_keys": "loss.alpha,loss.missing_eos_penalty"})
    run = _tracking(checked(config), MetricsLog(tmp_path), record)
    params = MlflowClient(run.uri).get_run(run.run_id).data.params
    assert (params["loss.log10_alpha"], params["loss.missing_eos_penalty"]) == (shown, "null")
    assert "model.revision" not in params  # null, and not swept


@pytest.mark.parametrize("status", [0, 3])
def test_a_judge_that_exits_ends_the_run_as_an_error_does(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not as a run that was asked to stop, and not with the status of one that came to its end."""
    from xpo.launch import worker

    def leave(*_: Any) -> int:
        sys.exit(status)

    monkeypatch.setattr(worker, "_run", leave)
    assert worker.run(checked(compose(["experiment=smoke"])[0]), tmp_path) == 1
    assert json.loads((tmp_path / "failure.json").read_text())["reason"] == f"SystemExit: {status}"
