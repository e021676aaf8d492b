"""A run killed at any moment and resumed ends as the uninterrupted one."""

import errno
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import TrainerFactory, prompts, share_of_e, step_logs
from hydra.core.override_parser.overrides_parser import OverridesParser
from kill_and_resume import KINDS, MOMENTS, RANDOM
from omegaconf import OmegaConf
from transformers import TrainerCallback, TrainerControl, TrainerState

from xpo import XPOTrainer
from xpo.config.compose import checked, compose
from xpo.config.errors import ConfigError
from xpo.config.schema import to_dict
from xpo.data.pair_file import export
from xpo.judges.base import asked_to_stop
from xpo.launch.jobs import compare_with_run
from xpo.sampling.draws import ReferenceDraws
from xpo.tracking.metrics_log import read_metrics
from xpo.tracking.runs import (
    RunRecord,
    drop_training_state,
    has_optimizer,
    job_key,
    last_complete_checkpoint,
    resolve_resume,
    resumable_checkpoint,
)
from xpo.training.callbacks import StopOnSignal

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=KINDS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs that train on their own pairs, and of some that recall earlier ones and whose reference moves."""
    root = tmp_path_factory.mktemp(f"runs_{request.param}")
    subprocess.run(
        [sys.executable, str(HERE / "kill_and_resume.py"), str(root), request.param],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_end(runs: Path, moment: str):
    """SIGKILL in step 6 (in the rollout, between two micro-batches, while saving): same losses, same weights."""
    whole, resumed = (torch.load(runs / name / "result.pt") for name in ("whole", moment))
    assert whole["logs"] == resumed["logs"]
    assert len(whole["logs"]) == 4
    pairs = [(runs / name / "pairs.jsonl").read_text() for name in ("whole", moment)]
    assert pairs[0] == pairs[1]
    assert pairs[0].count("\n") == (16 if "replay" in runs.name else 32)
    for name, weights in whole["weights"].items():
        assert torch.equal(weights, resumed["weights"][name]), name


@pytest.mark.parametrize("moment", MOMENTS + RANDOM)
def test_the_data_set_of_a_killed_run_is_that_of_the_uninterrupted_one(runs: Path, moment: str, tmp_path: Path):
    """All columns but the name of the run's directory."""
    tables = []
    for name in ("whole", moment):
        pairs, ties = export([runs / name / "pairs.jsonl"], tmp_path / f"{name}.parquet")
        assert pairs + ties == (16 if "replay" in runs.name else 32)
        assert pairs > 0
        tables.append(pq.read_table(tmp_path / f"{name}.parquet").drop(["run"]))
    assert tables[0] == tables[1]


@pytest.mark.parametrize("moment", MOMENTS + RANDOM)
def test_the_metrics_of_a_killed_run_are_those_of_the_uninterrupted_one_line_by_line(runs: Path, moment: str):
    """Aside from wall-clock figures, and from what the Trainer says of a process at its end (train_*)."""

    def lines(name: str) -> list[str]:
        logs = read_metrics(runs / name)
        own = ("perf/", "train_")
        return [str({key: value for key, value in log.items() if not key.startswith(own)}) for log in logs]

    assert len(lines("whole")) == 5
    assert lines(moment) == lines("whole")


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_killed_behind_its_last_checkpoint_takes_no_step_more(make_trainer: TrainerFactory, steps: int):
    """In the middle of an epoch of four steps, where the Trainer itself would take one more, and at its end."""
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": steps}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == steps
    assert step_logs(resumed) == step_logs(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598"),
    ],
    ids=["disk", "limit", "torch"],
)
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    make_trainer: TrainerFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
):
    """One line says so; nothing half-written is left; the steps, and the next checkpoint, are as ever."""
    whole = make_trainer(max_steps=3)
    whole.train()
    save, full = torch.save, []

    def save_or_not(*args: object, **kwargs: object) -> None:
        if not full:
            full.append(True)
            raise error
        save(*args, **kwargs)

    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(torch, "save", save_or_not)
    trainer.train()
    assert step_logs(trainer) == step_logs(whole)
    left = {path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-3"}
    assert "no room for" in caplog.text
    assert "training goes on without it" in caplog.text


@pytest.fixture
def nobody_asked() -> Iterator[None]:
    """After a test, no signal counts as come."""
    yield
    asked_to_stop.clear()


@pytest.mark.parametrize(
    ("machine", "alive", "steps"),
    [("here", True, 2), ("here", False, 1), ("elsewhere", False, 2)],
    ids=["alive", "killed", "on another machine"],
)
def test_a_run_whose_command_was_killed_stops(
    make_trainer: TrainerFactory,
    monkeypatch: pytest.MonkeyPatch,
    nobody_asked: None,
    machine: str,
    alive: bool,
    steps: int,
):
    """Also before the run has looked at its parent, or behind a launcher that lives on. Numbers of another machine's
    processes mean nothing."""
    command = subprocess.Popen(["sleep", "60"])
    if not alive:
        command.kill()
        os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    monkeypatch.setenv("XPO_PARENT", f"{command.pid}@{socket.gethostname() if machine == 'here' else machine}")
    trainer = make_trainer(callbacks=[StopOnSignal()])
    trainer.train()
    command.kill()
    command.wait()
    assert trainer.state.global_step == steps


def test_a_signal_in_an_evaluation_ends_the_run_with_its_step(make_trainer: TrainerFactory, nobody_asked: None):
    """Another step might take longer than the time that is left; the checkpoint knows of the evaluation."""

    def reward(completions: Sequence[str]) -> list[float]:
        if trainer.state.global_step == 2 and not stop.signal and len(completions) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return share_of_e([], completions)

    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "eval_dataset": prompts(3)}
    whole = make_trainer(**options)
    whole.train()
    stop = StopOnSignal()
    trainer = make_trainer(reward_model=reward, callbacks=[stop], output_dir=whole.args.output_dir, **options)
    trainer.train()
    assert stop.signal == signal.SIGTERM
    assert trainer.state.global_step == 2
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(step_logs(resumed), step_logs(whole), strict=True):
        assert set(ours) == set(theirs)
        assert ours.get("loss/dpo") == theirs.get("loss/dpo")


BEST = {"save_strategy": "best", "metric_for_best_model": "tie_rate", "eval_strategy": "steps", "eval_steps": 1}
EPOCHS = {"save_strategy": "epoch", "load_best_model_at_end": True, "eval_strategy": "epoch"}


@pytest.mark.parametrize("kind", [BEST, EPOCHS], ids=["best", "epoch"])
def test_a_stop_has_its_checkpoint_and_no_evaluation_of_its_own(
    make_trainer: TrainerFactory, tmp_path: Path, kind: dict[str, Any], nobody_asked: None
):
    """Where the Trainer saves only what is best, and where it would end the epoch with an evaluation."""

    def reward(completions: Sequence[str]) -> list[float]:
        if stop is not None and trainer.state.global_step == 2 and len(completions) == 4:
            stop.signal = signal.SIGTERM  # in the third of four steps
        return [1.0] * len(completions)

    options = kind | {"eval_dataset": prompts(3), "max_steps": -1, "num_train_epochs": 1, "reward_model": reward}
    stop: StopOnSignal | None = None
    whole = make_trainer(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    stop = StopOnSignal()
    trainer = make_trainer(callbacks=[stop], **options)
    trainer.train()
    assert trainer.state.global_step == 3
    assert last_complete_checkpoint(Path(trainer.args.output_dir)).name == "checkpoint-3"
    stop = None
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(resumed.state.log_history, whole.state.log_history, strict=True):
        assert set(ours) == set(theirs)
        assert ours.get("loss/xpo") == theirs.get("loss/xpo")


class Rates(TrainerCallback):
    """What each step is taken with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_: Any) -> None:
        group = optimizer.param_groups[0]
        self.seen.append((state.global_step + 1, group["lr"], group["weight_decay"]))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_run_goes_on_with_what_its_command_asks_for(make_trainer: TrainerFactory, schedule: str) -> None:
    """Rate and decay; a longer schedule as if it had been as long from the start; checkpoints and evaluations."""
    options = {"lr_scheduler_type": schedule, "save_strategy": "steps", "eval_dataset": prompts(3)}
    make_trainer(**options, save_steps=1, max_steps=2).train()
    changed = {"learning_rate": 8e-3, "weight_decay": 0.1, "max_steps": 4, "save_steps": 2}
    changed |= {"eval_strategy": "steps", "eval_steps": 1}
    rates = Rates()
    trainer = make_trainer(**options | changed, callbacks=[rates])
    trainer.train(resume_from_checkpoint=True)
    wanted = [0.5, 0.25] if schedule == "linear" else [1.0, 1.0]
    assert rates.seen == [(3, 8e-3 * wanted[0], 0.1), (4, 8e-3 * wanted[1], 0.1)]
    assert [log["step"] for log in trainer.state.log_history if "eval_score" in log] == [3, 4]
    assert not (Path(trainer.args.output_dir) / "checkpoint-3").exists()
    assert (Path(trainer.args.output_dir) / "checkpoint-4").exists()


def test_a_signal_behind_the_last_step_is_known_to_all_ranks(monkeypatch: pytest.MonkeyPatch, nobody_asked: None):
    """Or one would leave while the others evaluate, and wait for it. Before, none changes what its epoch ends with."""
    stop, args, control = StopOnSignal(), SimpleNamespace(world_size=2, device="cpu"), TrainerControl()
    state = TrainerState(epoch=0.5)
    control.should_evaluate = True
    stop.signal = signal.SIGTERM
    stop.on_epoch_end(args, state, control)
    assert control.should_evaluate
    stop.signal = None
    monkeypatch.setattr("xpo.training.callbacks.most", lambda number, device: max(number, signal.SIGTERM))
    stop.on_train_end(args, state, control)
    assert stop.signal == signal.SIGTERM


def test_no_checkpoint_is_made_of_the_best_weights(make_trainer: TrainerFactory) -> None:
    """Behind a training that has loaded them, a judge may still stop."""
    options = EPOCHS | {"eval_dataset": prompts(3), "max_steps": -1, "num_train_epochs": 1, "save_total_limit": 1}
    trainer = make_trainer(**options)
    trainer.train()
    last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    shutil.rmtree(last, ignore_errors=True)
    trainer.keep_checkpoint()
    assert not last.exists()
    trainer.args.load_best_model_at_end = False
    trainer.keep_checkpoint()
    assert last.exists()


def test_other_errors_of_a_checkpoint_are_errors(make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch):
    """Only a full disk is waited out."""

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    trainer = make_trainer(save_strategy="steps", save_steps=1)
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="Read-only"):
        trainer.train()


def test_a_finished_run_can_drop_what_only_training_needs(make_trainer: TrainerFactory, tmp_path: Path):
    """The weights of its checkpoints stay."""
    trainer = make_trainer(output_dir=str(tmp_path / "model"), save_strategy="steps", save_steps=1)
    trainer.train()
    assert resumable_checkpoint(tmp_path) == tmp_path / "model" / "checkpoint-2"
    (tmp_path / "model" / "_iterates").mkdir()
    drop_training_state(tmp_path)
    assert not (tmp_path / "model" / "_iterates").exists()
    assert resumable_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "model") == tmp_path / "model" / "checkpoint-2"
    left = {path.name for path in (tmp_path / "model" / "checkpoint-2").iterdir()}
    assert "model.safetensors" in left
    assert not left & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_a_run_has_one_branch(make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture, nobody_asked: None):
    """Whoever goes on from an earlier checkpoint, with another alpha perhaps, does not meet the later ones again."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**options)
    whole.train()
    out = Path(whole.args.output_dir)
    stop = StopOnSignal()
    branch = make_trainer(callbacks=[stop], alpha=0.1, **options)
    stop.signal = signal.SIGTERM  # after its first step
    branch.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert "checkpoint-3 is of before" in caplog.text
    assert {path.name for path in out.iterdir() if path.is_dir()} == {
        *("checkpoint-1", "checkpoint-2", "_abandoned-checkpoint-2", "_abandoned-checkpoint-3")
    }
    assert last_complete_checkpoint(out) == out / "checkpoint-2"
    resumed = make_trainer(alpha=0.1, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [log["alpha"] for log in step_logs(resumed)] == [pytest.approx(value) for value in (1e-5, 0.1, 0.1)]


def test_a_run_that_keeps_models_only_goes_on_after_a_stop(make_trainer: TrainerFactory, nobody_asked: None):
    """Its other checkpoints have no optimizer state."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    stop = StopOnSignal()

    def reward(completions: Sequence[str]) -> list[float]:
        if trainer.state.global_step == 1:
            stop.signal = signal.SIGTERM
        return share_of_e([], completions)

    trainer = make_trainer(reward_model=reward, callbacks=[stop], **options)
    trainer.train()
    out = Path(trainer.args.output_dir)
    assert [has_optimizer(out / f"checkpoint-{step}") for step in (1, 2)] == [False, True]
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in step_logs(resumed)] == [1, 2, 3]


def test_a_stream_goes_on_within_its_first_pass(make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch):
    """Each pass has draws of its own, from its first step; in a later one a run would begin the pass again."""
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    passes: list[int] = []
    original = ReferenceDraws.draw

    def draw(this: ReferenceDraws, prompts: Any, seed: int, stream: int, number: int, *rest: Any, **more: Any) -> Any:
        passes.append(number)
        return original(this, prompts, seed, stream, number, *rest, **more)

    monkeypatch.setattr(ReferenceDraws, "draw", draw)

    def trainer() -> XPOTrainer:
        return make_trainer(train_dataset=prompts(4).to_iterable_dataset(), save_total_limit=5, **options)

    whole = trainer()
    whole.train()
    assert passes == [0, 0, 1, 1, 2]
    out = Path(whole.args.output_dir)
    with pytest.raises(ConfigError, match="is of a later pass of a stream"):
        trainer().train(resume_from_checkpoint=str(out / "checkpoint-3"))
    for step in (2, 1):
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
        assert step_logs(resumed) == step_logs(whole)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "model.safetensors": (cut, Path.unlink, lambda file: file.write_text("")),
    "optimizer.pt": (cut,),
    "scheduler.pt": (cut, Path.unlink),
    "rng_state.pth": (cut, Path.unlink),
    "xpo_state_0.json": (cut, Path.unlink, lambda file: file.write_text("[]")),
    "trainer_state.json": (cut, Path.unlink, lambda file: file.write_text("{}")),
}


@pytest.mark.parametrize(("name", "spoil"), [(name, way) for name, ways in DAMAGE.items() for way in ways])
def test_damaged_checkpoints_are_passed_over(
    make_trainer: TrainerFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    spoil: Callable[[Path], None],
):
    """With a line; where it is named, or the only one, that line is an error."""
    run_dir = tmp_path / "run"
    make_trainer(output_dir=str(run_dir / "model"), save_strategy="steps", save_steps=1).train()
    RunRecord().write(run_dir)
    whole, damaged = run_dir / "model" / "checkpoint-1", run_dir / "model" / "checkpoint-2"
    spoil(damaged / name)
    capsys.readouterr()
    assert resolve_resume(str(run_dir), "", []) == (run_dir, whole)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"xpo: {damaged} is passed over: (the weights are|\S+ is) (missing|damaged)", line)
    with pytest.raises(ConfigError, match=f"training.resume='{damaged}' (is damaged|holds no complete checkpoint)"):
        resolve_resume(str(damaged), "", [])
    with pytest.raises(ConfigError, match=f"resume_from_checkpoint='{damaged}': .*; give another checkpoint"):
        make_trainer().train(resume_from_checkpoint=str(damaged))
    shutil.rmtree(whole)
    if spoil is not Path.unlink or name != "trainer_state.json":  # which a kill leaves: the run starts again
        with pytest.raises(ConfigError, match=rf"is damaged \({damaged}: .*; give another run or checkpoint"):
            resolve_resume(str(run_dir), "", [])


@pytest.mark.parametrize("content", [None, "", "a: [", "- a"])
def test_a_run_without_its_configuration_goes_on_with_its_own_command(tmp_path: Path, content: str | None):
    """The record knows whether it is that."""
    words = ["experiment=smoke", "loss.alpha=0.1"]
    ours, theirs = (to_dict(checked(compose([*words, *more])[0])) for more in ([], ["loss.alpha=0.2"]))
    RunRecord(job_key=job_key(ours), overrides=words).write(tmp_path)
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert not compare_with_run(ours, tmp_path)
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read .* give that run's command: .* loss.alpha=0.1"):
        compare_with_run(theirs, tmp_path)


def test_copies_beside_checkpoints_are_passed_over(tmp_path: Path):
    """Of names that people give them."""
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-best", "checkpoint-10-copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 2}')
        (tmp_path / name / "pytorch_model.bin").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_an_option_that_is_given_no_more_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = {"loss": {"alpha": 0.1}, "data": {"chat_template_kwargs": {"enable_thinking": False}}}
    OmegaConf.save(OmegaConf.create(before), tmp_path / "config.yaml")
    assert not compare_with_run(before, tmp_path)
    assert compare_with_run({"loss": {"alpha": 0.1}, "data": {"chat_template_kwargs": {}}}, tmp_path)
    assert "data.chat_template_kwargs.enable_thinking=None instead of False" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["outputs/1", "a,b=1", "it's", 'a "b" c', "ends\\", 'a\\"b', "{x}", "~/runs"])
def test_the_command_that_goes_on_can_be_read(text: str):
    """By Hydra, after the shell."""
    word = shlex.split(RunRecord().command(text))[-1]
    assert OverridesParser.create().parse_override(word).value() == text
