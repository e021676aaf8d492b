"""What a run pushes, and what becomes of it without a hub: rehearsed with one on this machine."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import TrainerFactory
from datasets import load_dataset
from hub_server import TOKEN, Hub, serving
from trained_run import finish, finished_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import xpo.push
from xpo import ConfigError
from xpo.config.compose import compose
from xpo.launch import worker
from xpo.launch.jobs import prepare
from xpo.tracking.hub import push_model
from xpo.tracking.runs import RunRecord, is_complete


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


def train(run_dir: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """A run that pushes, in this process; its exit status."""
    words = ("experiment=smoke", "training.disable_tqdm=true", "training.push_to_hub=true", *words)
    config, _, choices = compose([*words])
    prepare(config, run_dir, choices, [*words])
    monkeypatch.setattr(sys, "argv", ["xpo.launch.worker", str(run_dir)])
    with pytest.raises(SystemExit) as exit_of_worker:
        worker.main()
    return int(exit_of_worker.value.code or 0)


def later(run: str, *words: str) -> None:
    """`python -m xpo.push RUN`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xpo.push", run, *words])
        xpo.push.main()


def texts_with(word: str, directory: Path) -> list[Path]:
    """The files that hold a word."""
    return [path for path in directory.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def greedy(name: str) -> list[int]:
    """What a model answers; a name is one of the hub's."""
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    asked = tokenizer("Tell me about the sea", return_tensors="pt")
    with torch.no_grad():
        return model.generate(**asked, do_sample=False, max_new_tokens=16)[0].tolist()


FILES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json"}
FILES |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def check_pushed(hub: Hub, run_dir: Path) -> None:
    """The model and its pairs are there and nothing else, and those who fetch them have what the run has."""
    model, pairs = hub.repositories["models/me/tiny"], hub.repositories["datasets/me/tiny-pairs"]
    assert set(model.files) == FILES
    assert set(pairs.files) == {"README.md", "pairs.parquet"}
    for path, content in [*model.files.items(), *pairs.files.items()]:
        assert str(run_dir.parent).encode() not in content, path
        assert str(Path.home()).encode() not in content, path
    for card in (model.files["README.md"].decode(), pairs.files["README.md"].decode()):
        assert "xpo" in yaml.safe_load(card.split("---\n")[1])["tags"]
        assert "https://arxiv.org/abs/2405.21046" in card
    assert "| metric | step 0 | step 3 |" in model.files["README.md"].decode()
    assert greedy("me/tiny") == greedy(str(run_dir / "model"))
    fetched = load_dataset("me/tiny-pairs", split="train")
    kept = pq.read_table(run_dir / "pairs.parquet").to_pylist()
    assert fetched.to_list() == kept
    assert kept


def test_what_was_pushed_is_fetched_back_and_answers_as_before(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    words = ["training.hub_model_id=tiny", "training.push_pairs=true", "training.hub_private_repo=true"]
    words += ["+training.kwargs.hub_always_push=true", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    assert train(run_dir, monkeypatch, *words) == 0
    assert f"Hub:     {hub.endpoint}/me/tiny {hub.endpoint}/datasets/me/tiny-pairs\n" in capfd.readouterr().out
    model = hub.repositories["models/me/tiny"]
    assert model.messages == [*(f"Training in progress, step {step}" for step in (2, 3)), "End of training"]
    assert all(repository.private for repository in hub.repositories.values())
    check_pushed(hub, run_dir)
    assert texts_with(TOKEN, tmp_path) == []


def test_a_hub_that_goes_away_costs_the_run_nothing(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It breaks off while the weights are sent, at each checkpoint; afterwards the command of the message pushes."""
    run_dir = tmp_path / "run"
    hub.fault = lambda path: 0 if path.startswith("/large/") else None
    words = ["tracking=none", "training.hub_model_id=me/tiny", "training.push_pairs=true"]
    assert train(run_dir, monkeypatch, *words) == 0
    assert RunRecord.read(run_dir).finished
    assert hub.repositories["models/me/tiny"].files == {}
    (during,) = caplog.messages
    (after,) = re.findall(r"^xpo: .*", capfd.readouterr().err, re.MULTILINE)
    assert during.startswith("xpo: me/tiny did not arrive on the hub (")
    assert during.endswith("; training goes on, and its next checkpoints are sent")
    assert after.startswith("xpo: me/tiny did not arrive on the hub (")
    assert "see to the network and to `hf auth login`, and push later: python -m xpo.push" in after
    hub.fault = lambda path: None
    later(*shlex.split(after.partition("python -m xpo.push ")[2]))
    check_pushed(hub, run_dir)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that `python -m xpo.push` says."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        later(*words)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_one_line(
    status: int, hub: Hub, tmp_path: Path, make_trainer: TrainerFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(finished_run(tmp_path / "run"))
    hub.fault = lambda path: status
    line = refused(capsys, run, "--to", "me/tiny")
    assert line.startswith("xpo: error: no repository me/tiny can be made (")
    assert f"{status} " in line
    assert "`hf auth login`" in line
    with pytest.raises(ConfigError, match=f"no repository me/tiny can be made .*{status} "):
        make_trainer(push_to_hub=True, hub_model_id="me/tiny")


def test_what_cannot_be_pushed_later_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "run")

    assert "RUN='no/such' holds no run.json" in refused(capsys, "no/such")
    assert "has no training.hub_model_id; give --to OWNER/NAME" in refused(capsys, str(run))
    finish(run, False)
    unfinished = refused(capsys, str(run), "--to", "me/tiny")
    assert "has not finished; go on with it: python -m xpo.train experiment=smoke" in unfinished


def test_a_trainer_pushes_its_model_and_its_pairs(hub: Hub, make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """And keeps the token that it was given to itself, where transformers would write it beside every checkpoint."""
    options = {"push_pairs": True, "hub_model_id": "me/tiny", "hub_token": TOKEN, "save_strategy": "steps"}
    trainer = make_trainer(max_steps=1, save_steps=1, **options)
    trainer.train()
    assert hub.repositories == {}
    trainer.push_to_hub("Here it is", dataset_name="as TRL's scripts say")
    assert set(hub.repositories["models/me/tiny"].files) == FILES
    assert hub.repositories["models/me/tiny"].messages == ["Here it is"]
    assert set(hub.repositories["datasets/me/tiny-pairs"].files) == {"README.md", "pairs.parquet"}
    assert (tmp_path / "out" / "checkpoint-1" / "training_args.bin").is_file()
    assert texts_with(TOKEN, tmp_path) == []
    assert trainer.args.hub_token == TOKEN


def test_without_room_for_a_copy_the_checkpoint_stays(
    hub: Hub,
    make_trainer: TrainerFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xpo.training.pushing.shutil.copy", full)
    options = {"push_to_hub": True, "hub_model_id": "me/tiny", "save_strategy": "steps"}
    make_trainer(max_steps=1, save_steps=1, **options).train()
    assert hub.repositories["models/me/tiny"].messages == []
    assert is_complete(tmp_path / "out" / "checkpoint-1")
    assert "checkpoint-1, which is not sent (No space left on device)" in caplog.text


def test_pushed_adapters_name_the_model_that_others_know(hub: Hub, tmp_path: Path) -> None:
    """Below them is a directory of the hub's cache; theirs lies beside checkpoints and iterates, which stay."""
    for place in (".", "other", "checkpoint-2", "_iterates"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "adapter_model.safetensors").write_bytes(b"weights")
        base = None if place == "other" else f"{tmp_path}/models--Qwen--Qwen2-0.5B/snapshots/0a1b"
        below = {"base_model_name_or_path": base, "r": 4}
        (tmp_path / place / "adapter_config.json").write_text(json.dumps(below))
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "xpo_state_0.json", "pairs.jsonl"):
        (tmp_path / name).write_text("this stays")
    hub.create(json.dumps({"name": "lora", "organization": "me"}).encode())
    push_model(tmp_path, "me/lora")
    files = hub.repositories["models/me/lora"].files
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    assert set(files) == {*adapter, *(f"other/{name}" for name in adapter)}
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "Qwen/Qwen2-0.5B", "r": 4}
    assert json.loads(files["other/adapter_config.json"]) == {"base_model_name_or_path": None, "r": 4}
