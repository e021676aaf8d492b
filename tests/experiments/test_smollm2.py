"""SmolLM2's experiment: its commands are valid, it goes on where it stopped, its table says what the runs say."""

import csv
import itertools
from pathlib import Path

import pytest

from experiments.science.smollm2 import prompts, report, run
from xpo.config.compose import checked, compose
from xpo.data.prompt_sets import load_prompts


def row(method: str, seed: int, score: float) -> report.Row:
    names = [*run.MEASURES, "bonus_share"]
    known = {"seed": seed, "prompts": "ordinary", "method": method, "kl": 4, "score": score}
    return {name: str(value) for name, value in (dict.fromkeys(names, 0.5) | known).items()}


@pytest.mark.parametrize("method", run.METHODS)
@pytest.mark.parametrize("of", run.PROMPTS)
def test_every_run_is_a_valid_command(of: str, method: str) -> None:
    words = run.Cell(1, of, method).command(Path("x"))
    config = checked(compose([word for word in words[3:] if not word.startswith("hydra.")])[0])
    assert config.loss.alpha == (0.0 if method in ("alpha = 0", "online DPO") else float(method.split()[1]))
    assert config.sampler.second == ("policy" if method == "online DPO" else "reference")


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that fails leaves those before it."""
    monkeypatch.setattr(run, "SEEDS", (1, 2))
    ran: list[run.Cell] = []

    def fake(cell: run.Cell) -> report.Row:
        ran.append(cell)
        if len(ran) == 4:
            raise RuntimeError("stopped")
        return row(cell.method, cell.seed, 1.0) | {"prompts": cell.prompts}

    monkeypatch.setattr(run, "run", fake)
    monkeypatch.setattr(run, "ThreadPool", lambda _: run_in_order())
    path = tmp_path / "runs.csv"
    with pytest.raises(RuntimeError, match="stopped"):
        run.compute(path)
    assert len(list(csv.DictReader(path.open()))) == 3
    rows = run.compute(path)
    assert list(csv.DictReader(path.open())) == rows
    assert len(ran) == len(rows) + 1 == 2 * len(run.PROMPTS) * len(run.METHODS) + 1
    assert ran[3] == ran[4]


class run_in_order:
    """ThreadPool's part that is used, without threads."""

    def __enter__(self) -> "run_in_order":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    imap = staticmethod(map)


def test_the_table_has_means_intervals_and_p() -> None:
    """Gains 1, 2, 3 of alpha = 0 and 2, 4, 6: differences 1, 2, 3, so t = 2 * sqrt(3), p = .0742 with two degrees."""
    rows = [row("alpha = 0", seed, 0.5 + seed) for seed in (1, 2, 3)]
    rows += [row("xpo 1e-5", seed, 0.5 + 2 * seed) for seed in (3, 1, 2)]
    lines = [line.split(" | ") for line in report.table(rows, "alpha = 0").splitlines()]
    assert [len(line) for line in lines[2:]] == [len(lines[0])] * 2
    assert lines[2][:4] == ["| alpha = 0", "2.00 ± 2.48", "4.00 ± 0.00", "0.50 ± 0.62"]
    assert lines[3][1] == "4.00 ± 4.97"
    assert lines[3][-1] == "0.074 |"
    assert lines[2][-1].strip() == "|"


def test_the_hidden_prompts_are_those_with_bad_usual_and_good_rare_answers() -> None:
    scores = [(0.1, 2.0), (0.9, 9.0), (0.2, 1.0), (0.8, 8.0)]
    rows = [{"prompt": str(i), "usual": usual, "rare": rare} for i, (usual, rare) in enumerate(scores)]
    assert [found["prompt"] for found in prompts.hidden(rows)] == ["0", "2"]
    for split, times in prompts.SPLITS.items():
        chosen = list(load_prompts("data.train", str(prompts.HERE / f"hidden_{split}.jsonl")))
        assert len(chosen) == times * prompts.KEPT
        known = [one["prompt"] for one in load_prompts("data.train", "embedded", split)]
        assert all(one["prompt"] in known[: prompts.CANDIDATES] for one in chosen)
        assert max(one["usual"] for one in chosen) < min(one["rare"] for one in chosen)


def test_the_tables_are_of_all_runs() -> None:
    rows = list(csv.DictReader((run.HERE / "runs.csv").open()))
    found = [(int(one["seed"]), one["prompts"], one["method"]) for one in rows]
    assert found == list(itertools.product(run.SEEDS, run.PROMPTS, run.METHODS))
    readme = (run.HERE / "README.md").read_text()
    for of in run.PROMPTS:
        assert report.table([one for one in rows if one["prompts"] == of], "alpha = 0") in readme
