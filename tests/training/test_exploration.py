"""Who draws the second completion, and what the bonus does: the rivals as configurations of one trainer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TrainerFactory, prompts, share_of_e, step_logs

from xpo import XPOConfig
from xpo.config.compose import CONF, checked, compose
from xpo.config.errors import ConfigError
from xpo.config.options import keys
from xpo.config.schema import GROUPS, trainer_arguments
from xpo.data.pair_file import read_pairs
from xpo.models.loading import tiny_model
from xpo.models.logprobs import completion_logps
from xpo.tracking.terminal import show_exploration

START = tiny_model().state_dict()
RIVALS = ("algorithm_1", "online_dpo", "iterative_dpo", "selm", "popo", "geb")
LOSSES = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))


def rollout(trainer: Any) -> dict[str, torch.Tensor]:
    (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return batch


def test_the_policys_second_completion_is_another_draw(make_trainer: TrainerFactory) -> None:
    """The first ones are what they are with any sampler; the second ones do not depend on the batch."""
    usual = rollout(make_trainer(per_device_train_batch_size=8))
    both = rollout(make_trainer(per_device_train_batch_size=8, sampler="policy"))
    assert torch.equal(usual["completion_ids"][0], both["completion_ids"][0])
    assert not torch.equal(both["completion_ids"][0], both["completion_ids"][1])
    assert not torch.equal(usual["completion_ids"][1], both["completion_ids"][1])


@pytest.mark.parametrize("sampler", ["reference", "policy"])
def test_one_batch_of_eight_equals_eight_of_one(make_trainer: TrainerFactory, tmp_path: Path, sampler: str) -> None:
    def logs(pairs: int, accumulation: int) -> list[dict[str, float]]:
        sizes = {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": accumulation}
        out = {"output_dir": str(tmp_path / str(pairs)), "optim": "sgd", "learning_rate": 0.5}
        trainer = make_trainer(sampler=sampler, max_steps=3, alpha=1e-3, **sizes, **out)
        trainer.train()
        return step_logs(trainer)

    for one, other in zip(logs(8, 1), logs(1, 8), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_online_dpo_by_hand(make_trainer: TrainerFactory) -> None:
    """sampler=policy without a bonus: -log sigmoid of the chosen's less the rejected's, of two draws of the policy."""
    trainer = make_trainer(sampler="policy", bonus="none", alpha=0.0, beta=0.5, learning_rate=0.05, max_steps=2)
    trainer.train()
    trainer.state.global_step = 1  # the prompts and the noise of the last step again, under the trained policy
    batch = rollout(trainer)
    texts = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
    with torch.no_grad():
        policy = completion_logps(trainer.model, *texts)
        reference = completion_logps(trainer.reference.frozen, *texts)
    ratio = policy - reference
    won = batch["label"] > 0
    chosen, rejected = torch.where(won, ratio[0], ratio[1]), torch.where(won, ratio[1], ratio[0])
    losses = torch.where(batch["label"] == 0, 0.0, -F.logsigmoid(0.5 * (chosen - rejected)))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(4))
    assert losses.abs().sum() > 0
    torch.testing.assert_close(loss, losses.mean())


@pytest.mark.parametrize("sampler", ["reference", "policy"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_preset_of_a_loss_trains(make_trainer: TrainerFactory, loss: str, sampler: str) -> None:
    config, _, _ = compose(["experiment=smoke", f"loss={loss}", f"sampler={sampler}"])
    given = dict(trainer_arguments(checked(config)))
    options = {name: given[name] for name in ("alpha", "beta", "loss_type", "bonus", "sampler") if name in given}
    trainer = make_trainer(**options, max_steps=2)
    trainer.train()
    for log in step_logs(trainer):
        assert log["loss"] == pytest.approx(log["loss/dpo"] + log["loss/xpo"], rel=1e-5)
        assert (log["exploration/bonus_share"] > 0) == (loss not in ("online_dpo", "no_exploration"))


@pytest.mark.parametrize("experiment", RIVALS)
def test_every_rival_trains(make_trainer: TrainerFactory, experiment: str) -> None:
    """What its preset says of who draws, what is recalled and what moves; on a tiny model, in six steps."""
    config, _, _ = compose([f"experiment={experiment}", "model=tiny"])
    given = dict(trainer_arguments(checked(config)))
    groups = ("loss", "sampler", "replay", "reference")
    names = {key.argument for group in GROUPS for key in keys(group) if key.group in groups} - {"reference_store"}
    options = {name: value for name, value in given.items() if name in names | {"iterations"}}
    trainer = make_trainer(**options, max_steps=6, eval_dataset=prompts(3))
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 6
    assert all(math.isfinite(log["loss"]) for log in logs)
    iterates = Path(trainer.args.output_dir) / "_iterates"
    assert len(list(iterates.glob("*.safetensors"))) == (0 if experiment == "online_dpo" else 3)
    moved = [name for name, part in trainer.reference.frozen.named_parameters() if not torch.equal(part, START[name])]
    assert bool(moved) == (experiment in ("selm", "geb"))


def test_the_share_of_the_bonus_by_hand(make_trainer: TrainerFactory) -> None:
    """At the first step the policy is the reference.

    The preference loss pulls by beta / 2 at both completions of a pair with a winner, XPO's bonus by alpha at one of
    each pair.
    """
    trainer = make_trainer(alpha=0.01, beta=0.5, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    log = step_logs(trainer)[0]
    labelled = 1 - log["preference/tie_rate"]
    assert log["exploration/bonus_share"] == pytest.approx(0.01 / (0.5 * labelled), rel=1e-5)


def test_a_resumed_run_with_two_draws_of_the_policy(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "sampler": "policy",
        "bonus": "popo",
        "alpha": 0.1,
        "max_steps": 4,
        "learning_rate": 0.05,
    }
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_dataset": prompts(3)}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert step_logs(resumed)[-2:] == step_logs(whole)[-2:]


def test_the_bonus_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """1e-5 of the preference loss's pull is 0.001 % of the gradient; a third of it, a quarter."""
    history: list[dict[str, Any]] = [
        {"exploration/bonus_share": 0.5e-5},
        {"eval_kl": 1.0},
        {"exploration/bonus_share": 1.5e-5},
    ]
    show_exploration(history, 1e-5)
    assert capsys.readouterr().out == "The bonus had 0.001 % of the gradient (exploration/bonus_share).\n"
    show_exploration([{"exploration/bonus_share": 1 / 3}], [1e-5, 0])
    assert "25 %" in capsys.readouterr().out
    show_exploration([{"exploration/bonus_share": 0.0}], 1.0)
    assert "no gradient at all" in capsys.readouterr().out
    for alpha, log in ((0.0, history), ([0.0], history), (1.0, [{"eval_kl": 1.0}])):
        show_exploration(log, alpha)
        assert not capsys.readouterr().out


def test_a_bonus_without_gradient_is_told_at_the_first_log(
    make_trainer: TrainerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """GEB's, on completions whose pi underflows; once, and not where there is a gradient or alpha is 0."""
    told = "the bonus has no gradient so far"
    long = {"bonus": "geb_p", "max_new_tokens": 60, "max_steps": 2}
    make_trainer(alpha=1.0, **long).train()
    assert caplog.text.count(told) == 1
    caplog.clear()
    make_trainer(alpha=[0.0], **long).train()
    make_trainer(alpha=1.0, bonus="popo").train()
    assert told not in caplog.text


def test_a_sampler_does_not_rename_earlier_runs(tmp_path: Path) -> None:
    """Keys that came later are left out of a run's name at their default."""
    from xpo.config.schema import identity, to_dict

    def name(*words: str) -> dict[str, Any]:
        return identity(to_dict(checked(compose(["experiment=smoke", *words])[0])))

    plain = name()
    assert "sampler" not in plain
    assert not {"bonus", "bonus_on", "bonus_clip"} & set(plain["loss"])
    assert name("sampler=policy") != plain
    assert name("loss.bonus=selm") != plain
    assert XPOConfig(output_dir=str(tmp_path), use_cpu=True).sampler == "reference"


def test_the_pairs_of_a_run_are_kept(make_trainer: TrainerFactory, tmp_path: Path) -> None:
    """In order, with what the step knew of them; exactly on resume, line by line; and not unless asked for."""
    path, other = tmp_path / "pairs.jsonl", tmp_path / "resumed.jsonl"
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    whole = make_trainer(pairs_file=str(path), **options)
    whole.train()
    rows = list(read_pairs(path))
    assert [(row["step"], row["row"]) for row in rows] == [(step, row) for step in (1, 2, 3, 4) for row in range(4)]
    for row in rows:
        completions = [row["first"], row["second"]]
        assert row["score"] == pytest.approx(share_of_e([], completions))
        assert row["margin"] == pytest.approx(row["score"][0] - row["score"][1])
        assert row["winner"] == ("first" if row["margin"] > 0 else "second" if row["margin"] < 0 else "tie")
        assert row["by"] == ["policy", "reference"]
        assert [whole.processing_class.decode(t, skip_special_tokens=True) for t in row["tokens"]] == completions
    log = step_logs(whole)
    assert log[1]["preference/win_rate"] == sum(row["winner"] == "first" for row in rows[4:8]) / 4

    lines = path.read_text()
    other.write_text(lines)  # as a killed run leaves it
    resumed = make_trainer(pairs_file=str(other), output_dir=str(tmp_path / "again"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert other.read_text() == lines
    assert sorted(file.name for file in tmp_path.glob("**/*.jsonl")) == ["pairs.jsonl", "resumed.jsonl"]


def test_a_weight_without_a_bonus_is_refused(tmp_path: Path) -> None:
    """A sweep over it would be flat."""
    with pytest.raises(ConfigError, match=r"alpha=\[0.1\] has no effect with bonus=none; set alpha=0, or choose"):
        XPOConfig(output_dir=str(tmp_path), use_cpu=True, bonus="none", alpha=[0.1])
    with pytest.raises(ConfigError, match=r"loss.alpha=0.1 has no effect with loss.bonus=none; set loss.alpha=0, or"):
        checked(compose(["experiment=smoke", "loss=online_dpo", "loss.alpha=0.1"])[0])
    assert XPOConfig(output_dir=str(tmp_path), use_cpu=True, bonus="none", alpha=[0.0]).bonus == "none"
