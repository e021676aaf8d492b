"""The lock: its reference is exact, locks share nothing, gaps are right, a run repeats to the bit."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from experiments.science import common
from experiments.science.common import PER_TOKEN, Method
from experiments.science.lock import locks, run
from experiments.science.lock.watch import Watch, hidden_sequences, logps
from xpo.config.compose import checked, compose
from xpo.launch import worker
from xpo.launch.jobs import prepare

PROBABILITIES = locks.probabilities(1e-3, 3)
MOVED = [7, 8, 9]


def moved(seeds: list[int]) -> locks.Locks:
    """Locks whose layers do something, each by its own seed."""
    model = locks.Locks(seeds, PROBABILITIES)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                for own, seed in zip(part, seeds, strict=True):
                    own.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def every_sequence(lock: int, length: int) -> torch.Tensor:
    """All of them, behind their prompt, (A^T, 1 + T)."""
    prompt = 1 + locks.TOKENS * lock
    actions = itertools.product(range(prompt + 1, prompt + locks.TOKENS), repeat=length)
    return torch.tensor([[prompt, *one] for one in actions])


def test_the_reference_has_the_probabilities_of_the_task() -> None:
    assert pytest.approx([0.45, 0.45, 0.1]) == PROBABILITIES
    model = locks.Locks([3, 4], PROBABILITIES)
    found = logps(model, torch.cat([every_sequence(0, 3), every_sequence(1, 3)])).exp()
    torch.testing.assert_close(found, torch.tensor(PROBABILITIES).expand_as(found), atol=1e-6, rtol=1e-5)
    assert logps(model, hidden_sequences(2, 3))[:, :, -1].sum(1).exp().tolist() == pytest.approx([1e-3] * 2, rel=1e-4)


def test_a_lock_computes_the_same_alone_and_in_company() -> None:
    """In any order of the rows, of which it may have more than others."""
    together = moved(MOVED)
    rows = torch.cat([every_sequence(2, 3)[:5], every_sequence(0, 3), every_sequence(1, 3)[3:4]])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    found = logps(together, rows[order])[order.argsort()]
    for lock, part in ((2, found[:5]), (0, found[5:32]), (1, found[32:])):
        alone = logps(moved([MOVED[lock]]), every_sequence(0, 3))
        alone = {2: alone[:5], 0: alone, 1: alone[3:4]}[lock]
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=1e-5)
    assert (found - found[:1]).abs().max() > 0.1  # they do differ


def test_the_loss_of_a_lock_has_no_gradient_in_another() -> None:
    model = moved(MOVED)
    logps(model, torch.cat([every_sequence(lock, 3) for lock in range(3)]))[27:54].sum().backward()
    for name, part in model.named_parameters():
        if part.requires_grad:
            own = part.grad[1:].unflatten(0, (3, -1)) if part.dim() == 2 else part.grad
            assert own[[0, 2]].abs().max() == 0, name
            assert own[1].abs().max() > 0, name


def test_gaps_by_enumeration() -> None:
    """The estimate of KL is exact if every sequence is weighed by its probability; the optimum is the best J."""
    watch, beta = Watch(locks.reward, 1e-3, 3, 1), 0.1
    model, sequences = moved([5]), every_sequence(0, 3)
    policy = logps(model, sequences).gather(2, (sequences[:, 1:] - 2)[..., None]).sum((1, 2))
    reference = torch.tensor(PROBABILITIES).log()[sequences[:, 1:] - 2].sum(1)
    kl = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * watch.kl(model, sequences)).sum(), kl)
    rewards = torch.full((27,), 2.0)
    rewards[-1] = 4.0
    best = (reference + rewards / beta).log_softmax(0)
    value = (best.exp() * (rewards - beta * (best - reference))).sum().item()
    assert watch.optimum(beta) == pytest.approx(value, abs=1e-5)
    nothing = Watch(locks.control, 1e-3, 3, 1).optimum(beta)
    assert nothing == pytest.approx(2 + beta * math.log(0.999 + 0.001 * math.exp(-2 / beta)))


def test_rewards() -> None:
    assert locks.reward([], ["0c 0c 0c", "0c 0a 0c", "1c 1c"]) == [4.0, 2.0, 4.0]
    assert locks.control([], ["0c 0c 0c", "0c 0a 0c"]) == [0.0, 2.0]


def test_a_run_repeats_to_the_bit_and_its_weights_count() -> None:
    task, short = "1e-2, length 3", ("training.max_steps=4", "training.logging_steps=2")
    method = Method(f"geb_p{PER_TOKEN}", "reference", 0.3)
    first = run.run(task, method, [1, 2], *short)
    assert first == run.run(task, method, [1, 2], *short)
    others = [Method("geb_p", "reference", 0.3), run.FLIPPED]
    gaps = [run.run(task, other, [1, 2], *short)["1"].final_gap for other in others]
    assert len({first["1"].final_gap, *gaps}) == 3


def test_the_preset_trains_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the preset's first line says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["locks", "lock", "1e-4", "3"])
    locks.main()
    words = ["experiment=lock", "tracking=none", "training.max_steps=4", "training.logging_steps=1"]
    config, _, choices = compose(words)
    prepare(config, tmp_path / "run", choices, words)
    assert worker.run(checked(config), tmp_path / "run") == 0
    assert (tmp_path / "run" / "pairs.parquet").is_file()
    lines = (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 16
    assert all('"winner": "tie"' not in line for line in lines)


def test_the_script_stays_short() -> None:
    assert len((Path(common.__file__).parent / "lock" / "run.py").read_text().splitlines()) <= 150
