"""python -m xpo.compare: figures against numbers derived by hand, readers that agree, and a report of any sweep."""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from xpo.compare import main
from xpo.config.errors import ConfigError
from xpo.config.schema import flatten
from xpo.evaluation.compare.plots import plots
from xpo.evaluation.compare.read import Run, Sweep, _with_swept, find_sweep, from_directory, from_mlflow
from xpo.evaluation.compare.report import TAG, as_csv, cells, log, side_by_side, verdict_words, write
from xpo.evaluation.compare.statistics import (
    Point,
    cell_means,
    compare,
    difference,
    estimate,
    final_queries,
    group,
    is_balanced,
    label,
    levels,
    main_effect,
    queries_at,
    resampled_means,
)
from xpo.tracking.completions import write_table
from xpo.tracking.metrics_log import MetricsLog, read_metrics
from xpo.tracking.mlflow_client import metric_name
from xpo.tracking.runs import RunRecord

# ---- made runs -------------------------------------------------------------------------------------

Log = list[dict[str, Any]]


def rows(wins: str, scores: list[float] | None = None, step: int = 4) -> list[list[Any]]:
    """Completions of one evaluation; a letter for each prompt: w(in), l(oss) or n(one)."""
    verdicts = {"w": "policy", "l": "reference", "n": "none"}
    values = scores or [None] * len(wins)
    return [
        [f"prompt {i}", f"completion {i}", f"reference {i}", verdicts[letter], value, value and 0.5, step]
        for i, (letter, value) in enumerate(zip(wins, values, strict=True))
    ]


def made_log(table: list[list[Any]], evaluations: int = 3, kl: float = 3.0, pairs: int | None = None) -> Log:
    """A log_history whose last evaluation is that of the rows, and of so many pairs a step, if they were counted."""
    final = {"eval_win_rate": float(np.mean([row[3] == "policy" for row in table])), "eval_eos_rate": 0.75}
    if table[0][4] is not None:
        final["eval_score"] = float(np.mean([row[4] for row in table]))
    entries: Log = []
    for i in range(evaluations):
        part = (i + 1) / evaluations
        entries.append({"loss": 0.7 - 0.1 * part, "objective/kl": kl * part, "epoch": part, "step": 2 * i + 1})
        if pairs is not None:
            entries[-1]["preference/queries"] = float(pairs * (2 * i + 1))
        grown = {name: value * part for name, value in final.items()}
        entries.append({**grown, "eval_kl": kl * part, "eval_length": 20.5, "eval_runtime": 1.0, "step": 2 * i + 2})
    return [*entries, {"train_runtime": 9.0, "train_loss": 0.6, "total_flos": 0.0, "step": 2 * evaluations}]


Job = tuple[dict[str, Any], list[list[Any]], Log]


def job(
    wins: str,
    scores: list[float] | None = None,
    evaluations: int = 3,
    kl: float = 3.0,
    pairs: int | None = None,
    **config: Any,
) -> Job:
    """A finished job; keys of `config` are `loss__alpha` for loss.alpha."""
    table = rows(wins, scores, step=2 * evaluations)
    flat = {key.replace("__", "."): value for key, value in config.items()}
    return {"training.seed": 42} | flat, table, made_log(table, evaluations, kl, pairs)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        group_name, _, name = key.partition(".")
        tree.setdefault(group_name, {})[name] = value
    return tree


def make_sweep(
    directory: Path,
    keys: list[str],
    jobs: list[Job],
    unfinished: tuple[dict[str, Any], ...] = (),
    uri: str | None = None,
) -> Path:
    """A sweep's directory as xpo.train leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (config, table, history) in enumerate(jobs):
        run_dir = directory / str(number)
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(yaml.safe_dump(nested(config)))
        RunRecord(name=f"job {number}", choices={"judge": "reward"}, finished=True).write(run_dir)
        MetricsLog(run_dir).restore(history)
        write_table(run_dir / "completions" / "step_000000.json", rows("l" * len(table), step=0))
        write_table(run_dir / "completions" / f"step_{table[0][-1]:06d}.json", table)
        listed.append({"name": f"job {number}", "run_dir": str(run_dir), "state": "finished", "reason": None})
    record = {
        "name": "2026-11-22 19-15-04",
        "command": "python -m xpo.train -m loss.alpha=0,1e-5",
        "keys": keys,
        "jobs": [*listed, *unfinished],
        "tracking_uri": uri,
        "experiment": "xpo",
    }
    (directory / "sweep.json").write_text(json.dumps(record))
    return directory


def failed(name: str = "job 9", state: str = "failed", reason: str | None = "CUDA out of memory") -> dict[str, Any]:
    return {"name": name, "run_dir": "/nowhere/9", "state": state, "reason": reason}


def two_by_two(scores: bool = True) -> list[Job]:
    """alpha 0, 1e-5; beta 0.05, 0.1; seeds 1, 2; eight prompts."""
    wins = {
        (0.0, 0.05): ("wwwwllll", "wwwlllll"),
        (0.0, 0.1): ("wwllllll", "wwwlllll"),
        (1e-5, 0.05): ("wwwwwwwl", "wwwwwwwn"),
        (1e-5, 0.1): ("wwwwllll", "wwwwwlll"),
    }
    return [
        job(text, [0.1 * i + alpha * 1e4 for i in range(8)] if scores else None, kl=beta * 40 + seed,
            loss__alpha=alpha, loss__beta=beta, training__seed=seed)
        for (alpha, beta), texts in wins.items()
        for seed, text in enumerate(texts, 1)
    ]  # fmt: skip


KEYS = ["loss.alpha", "loss.beta"]


def run_with(value: float, **config: Any) -> Run:
    flat = {key.replace("__", "."): value for key, value in config.items()}
    return Run("r", "finished", None, flat, {"m": [(1, 0.0), (2, value)]})


# ---- statistics ------------------------------------------------------------------------------------


def test_the_mean_of_three_seeds() -> None:
    """1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, so 2 -+ 4.3027 / sqrt(3) = 2 -+ 2.4841."""
    assert estimate([run_with(v) for v in (1.0, 2.0, 3.0)], "m") == (
        2.0,
        pytest.approx(-0.4841, abs=1e-4),
        pytest.approx(4.4841, abs=1e-4),
        3,
        "seeds",
    )
    assert estimate([run_with(1.0)], "other") is None


def test_one_seed_has_an_interval_for_its_win_rate_only() -> None:
    """8 of 10: Wilson's 95 % interval is 0.490 to 0.943."""
    run = Run("r", "finished", history={"eval/win_rate": [(4, 0.8)], "eval/kl": [(4, 3.0)]})
    run.completions = [{"verdict": "policy"}] * 8 + [{"verdict": "none"}, {"verdict": "reference"}]
    wins = estimate([run], "eval/win_rate")
    assert wins == (0.8, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4), 1, "prompts")
    kl = estimate([run], "eval/kl")
    assert kl is not None
    assert (kl.value, kl.over) == (3.0, "")
    assert math.isnan(kl.low)


def test_an_interval_of_a_share_stays_within_its_ends() -> None:
    """0.25 and 0.75: s / sqrt(2) = 0.25, times t(0.975, 1) = 12.7 is 3.18; a score may be that far away, a rate not."""
    names = ("eval/eos_rate", "eval/score")
    runs = [Run("r", "finished", history={name: [(4, value)] for name in names}) for value in (0.25, 0.75)]
    rate, score = (estimate(runs, name) for name in names)
    assert rate == (0.5, 0.0, 1.0, 2, "seeds")
    assert score is not None
    assert (score.low, score.high) == (pytest.approx(-2.6766, abs=1e-3), pytest.approx(3.6766, abs=1e-3))


def test_effects_of_a_two_by_two() -> None:
    """Cells 1, 2 | 3, 8: means of a are 1.5 and 5.5, of b 2 and 5; t(0.975, 1) = 12.7062, s of 1 and 2 is 0.7071."""
    runs = [run_with(v, a=a, b=b) for (a, b), v in {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0, (1, 1): 8.0}.items()]
    points = group(runs, ["a", "b"])
    effect = main_effect(points, "a", "m")
    assert effect == {"0": (1.5, pytest.approx(-4.8531), pytest.approx(7.8531), 2, "seeds"), "1": effect["1"]}
    assert [e.value for e in effect.values() if e] == [1.5, 5.5]
    assert [e.value for e in main_effect(points, "b", "m").values() if e] == [2, 5]
    assert is_balanced(points, ["a", "b"])
    assert not is_balanced(points[:3], ["a", "b"])
    table = cell_means(points[:3], "a", "b", "m")
    assert {place: cell and cell.value for place, cell in table.items()} == {
        ("0", "0"): 1, ("0", "1"): 2, ("1", "0"): 3, ("1", "1"): None,
    }  # fmt: skip


def test_points_are_settings_with_their_seeds_pooled() -> None:
    values = [None, 1.0, 0.0, 1e-5, "xpo", [1e-5, 1e-6]]
    runs = [run_with(0, a=value, training__seed=seed) for seed in (2, 1) for value in values if value is not None]
    runs += [run_with(0, training__seed=1)]  # null is what is not there
    points = group(runs, ["a"])
    assert levels(points, "a") == ["null", "0", "1e-05", "1", "[1e-05, 1e-06]", "xpo"]
    assert [run.config["training.seed"] for run in points[1].runs] == [1, 2]
    assert (points[0].name, group(runs, [])[0].name) == ("a=null", "all runs")
    assert [label(value) for value in (0.1234567, 0.1, True, 3)] == ["0.1234567", "0.1", "True", "3"]


def test_prompts_are_resampled_together() -> None:
    """The second point is the first less 1/4 for every prompt: differences do not vary, though the means do."""
    values = np.array([[0.0, 1.0, 1.0, 0.0, 1.0]])
    draws = resampled_means([values, values - 0.25], same_seeds=True)
    assert draws.shape == (4000, 2)
    assert draws[:, 0].std() == pytest.approx(math.sqrt(0.24 / 5), rel=0.05)  # the variance of one is 0.6 * 0.4
    assert np.allclose(draws[:, 0] - draws[:, 1], 0.25)
    assert difference(0.25, draws[:, 0] - draws[:, 1]) == pytest.approx((0.25, 0.25, 0.25, 1.0))
    assert (draws == resampled_means([values, values - 0.25], same_seeds=True)).all()


def test_the_variance_over_few_seeds_is_unbiased() -> None:
    """Seeds at 0 and 1: the variance of their mean is s^2 / 2 = 0.5 / 2, whatever the prompts."""
    values = np.array([[0.0] * 4, [1.0] * 4])
    assert resampled_means([values], same_seeds=True).var() == pytest.approx(0.25, rel=0.05)
    three = np.array([[0.0], [1.0], [2.0]])  # s^2 / 3 = 1 / 3
    assert resampled_means([three], same_seeds=False).var() == pytest.approx(1 / 3, rel=0.07)
    shared = resampled_means([values, values + 1], same_seeds=True)
    assert np.allclose(shared[:, 1] - shared[:, 0], 1)
    apart = resampled_means([values, values + 1], same_seeds=False)
    assert (apart[:, 1] - apart[:, 0]).var() == pytest.approx(0.5, rel=0.07)


def test_missing_values_are_left_out_of_means() -> None:
    draws = resampled_means([np.array([[2.0, math.nan, 2.0]])], same_seeds=True)
    assert np.nanmin(draws) == np.nanmax(draws) == 2


def test_probability_counts_ties_by_half() -> None:
    assert difference(0, np.array([-1.0, 0.0, 0.0, 1.0])).probability == 0.5
    assert not difference(0, np.array([-1.0, 1.0])).distinguishable
    assert difference(-1, np.full(5, -1.0)).distinguishable


def test_the_verdict_of_a_clear_and_of_an_unclear_sweep(tmp_path: Path) -> None:
    clear = make_sweep(
        tmp_path / "a", ["loss.alpha"], [job("w" * 20, loss__alpha=1.0), job("w" * 4 + "l" * 16, loss__alpha=0.0)]
    )
    words = verdict_words(compare(from_directory(clear)))
    assert words[0] == "Best by win rate (higher is better): loss.alpha=1, 1.000 ± 0.081*."
    assert words[1].startswith("Better than the runner-up, loss.alpha=0: difference +0.800, 95 % interval +0.6")
    assert "best of all 2 settings in 100 % of the resamples" in words[2]
    assert words[3].startswith("Better than the reference")
    assert "only one seed" in words[4]
    close = make_sweep(
        tmp_path / "b", ["loss.alpha"], [job("wlwlwlww", loss__alpha=1.0), job("lwlwlwlw", loss__alpha=0.0)]
    )
    comparison = compare(from_directory(close))
    words = verdict_words(comparison)
    assert words[1].startswith("Not distinguishable from the runner-up")
    assert words[3].startswith("Not distinguishable from the reference")
    assert 0.5 < comparison.verdict.best_share < 0.95


def test_settings_that_made_no_difference(tmp_path: Path) -> None:
    """No best is named; for a penalty on what does not end there is a reason."""
    jobs = [job("wwll", loss__missing_eos_penalty=penalty) for penalty in (1.0, 2.0)]
    for one in jobs:
        one[2][-2]["eval_eos_rate"] = 0.0  # of the last evaluation
    words = verdict_words(compare(from_directory(make_sweep(tmp_path / "s", ["loss.missing_eos_penalty"], jobs))))
    assert words[0] == "These settings made no difference: win rate is 0.500 ± 0.350* for each."
    assert words[1].startswith("On the held-out prompts no completion ended by itself")
    assert not any("runner-up" in line or line.startswith("Best") for line in words)


def test_another_metric_ranks_and_says_what_it_cannot_tell(tmp_path: Path) -> None:
    jobs = [job("wwll", kl=2.0, loss__alpha=0.0), job("wlll", kl=5.0, loss__alpha=1.0)]
    comparison = compare(from_directory(make_sweep(tmp_path / "s", ["loss.alpha"], jobs)), "eval/kl")
    assert comparison.points[0].settings == {"loss.alpha": 1.0}
    assert comparison.verdict.over_parity is None
    assert "cannot be told: a setting has only one seed" in verdict_words(comparison)[1]
    assert cells(comparison)[0][:4] == ["loss.alpha", "runs", "KL (nats)", "win rate"]


# ---- readers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep of two by two settings and two seeds, a failed and a stopped job: its directory, and its database."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    root = tmp_path_factory.mktemp("tracked")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    unfinished = (failed("job 8"), failed("job 9", "killed", None))
    directory = make_sweep(root / "multirun" / "a" / "b", KEYS, two_by_two(), unfinished, uri)
    client = MlflowClient(uri)
    experiment = client.create_experiment("xpo", artifact_location=(root / "mlruns").as_uri())
    tags = [RunTag("xpo.sweep", "2026-11-22 19-15-04"), RunTag("xpo.sweep_keys", ",".join(KEYS))]
    for number in range(8):
        run_dir = directory / str(number)
        config = {"judge": "reward"} | flatten(yaml.safe_load((run_dir / "config.yaml").read_text()))
        points = [
            Metric(metric_name(name), value, 0, entry["step"])
            for entry in read_metrics(run_dir)[:-1]
            for name, value in entry.items()
            if name != "step"
        ]
        last = read_metrics(run_dir)[-2]
        points += [
            Metric(name.replace("eval_", "final/"), value, 0, last["step"])
            for name, value in last.items()
            if name.startswith("eval_")
        ]
        points += [Metric("system/cpu", 3.0, 0, 0)]
        run_id = client.create_run(experiment, run_name=f"job {number}").info.run_id
        params = [Param(key, str(value)) for key, value in config.items()]
        # The first one is of an earlier command, with other keys.
        client.log_batch(run_id, points, params, tags if number else [tags[0], RunTag("xpo.sweep_keys", "loss.beta")])
        client.log_artifacts(run_id, str(run_dir / "completions"), "completions")
        client.set_terminated(run_id)
    for number, status in ((8, "FAILED"), (9, "KILLED")):
        error = [RunTag("error", "Traceback\nCUDA out of memory\n")] if status == "FAILED" else []
        run_id = client.create_run(experiment, run_name=f"job {number}").info.run_id
        client.log_batch(run_id, tags=tags + error)
        client.set_terminated(run_id, status)
    return directory, uri


def test_directory_and_mlflow_tell_the_same(tracked: tuple[Path, str]) -> None:
    directory, uri = tracked
    here, there = from_directory(directory), from_mlflow("2026-11-22 19-15-04", uri, "xpo")
    assert here.runs == there.runs
    assert here.keys == there.keys == KEYS
    assert [(run.state, run.reason) for run in here.runs[8:]] == [("failed", "CUDA out of memory"), ("killed", None)]
    assert here.runs[0].history["eval/win_rate"] == [
        (2, pytest.approx(1 / 6)), (4, pytest.approx(1 / 3)), (6, 0.5),
    ]  # fmt: skip
    assert here.runs[0].config["judge"] == "reward"
    assert len(here.runs[0].completions) == 8
    one, other = compare(here), compare(there)
    assert cells(one) == cells(other)
    assert as_csv(one) == as_csv(other)
    assert verdict_words(one) == verdict_words(other)


def test_the_model_that_was_kept_counts(tracked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the best model loaded at the end, the last evaluation is its own; MLflow keeps that step's first value."""
    uri = tracked[1]
    find = MlflowClient.search_runs

    def with_others(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        runs = find(self, *arguments, **options)
        for run in runs:
            run.data.metrics["final/win_rate"] = 0.9
        return runs

    monkeypatch.setattr(MlflowClient, "search_runs", with_others)
    run = from_mlflow("2026-11-22 19-15-04", uri, "xpo").runs[0]
    assert run.history["eval/win_rate"] == [(2, pytest.approx(1 / 6)), (4, pytest.approx(1 / 3)), (6, 0.9)]


def test_keys_that_are_dictionaries_or_that_mlflow_spells_differently(tmp_path: Path) -> None:
    """Otherwise all runs would be one point, and pass for its seeds."""
    key = "reward_model.weights"
    weights = ({"one": 1, "two": 0.5}, {"one": 1, "two": 1})
    made = [job("wl", reward_model__weights=value) for value in weights]
    runs = from_directory(make_sweep(tmp_path / "a", [key], made)).runs
    assert [run.config[key] for run in runs] == ["one: 1, two: 0.5", "one: 1, two: 1"]
    assert len(group(runs, [key])) == 2
    (run,) = (_with_swept(Run("job", "finished", config=config), ["judge@judge.judge", "loss.beta"]) for config in (
        {"judge_judge.judge": "reward", "loss.beta": None},
    ))  # fmt: skip
    assert run.config["judge@judge.judge"] == "reward"
    assert run.config["loss.beta"] is None


def test_runs_whose_completions_are_lost_do_not_stand_in_the_way(tmp_path: Path) -> None:
    directory = make_sweep(tmp_path / "a", ["loss.alpha"], [job("wl", loss__alpha=a) for a in (0.0, 1.0)])
    for file in (directory / "0" / "completions").iterdir():
        file.unlink()
    assert len(compare(from_directory(directory)).points) == 2


def test_the_table(tracked: tuple[Path, str]) -> None:
    """Win rates at (1e-5, 0.05) are 7/8 in both seeds, at (0, 0.05) 4/8 and 3/8: +- 0.794, all of 0 to 1."""
    comparison = compare(from_directory(tracked[0]))
    header, body = cells(comparison)
    assert header == [*KEYS, "runs", "win rate", "score", "KL (nats)", "EOS rate", "length (tokens)"]
    assert body[0][:5] == ["1e-05", "0.05", "2", "0.875 ± 0.000", "0.450 ± 0.000"]
    assert body[2][:4] == ["0", "0.05", "2", "0.438 ± 0.500"]
    first = as_csv(comparison).splitlines()[1]
    assert first.startswith("1e-05,0.05,2,0.875,0.875,0.875,")
    assert "0.75" in first


def test_a_sweep_that_was_moved(tmp_path: Path) -> None:
    directory = make_sweep(tmp_path / "old", ["loss.alpha"], [job("wl", loss__alpha=0.0)])
    directory.rename(tmp_path / "new")
    assert from_directory(tmp_path / "new").runs[0].state == "finished"
    (tmp_path / "new" / "0" / "metrics.jsonl").unlink()
    (run,) = from_directory(tmp_path / "new").runs
    assert (run.state, run.reason) == ("missing", f"{tmp_path / 'new' / '0'} holds no metrics.jsonl")


def test_runs_that_were_started_one_by_one(tmp_path: Path) -> None:
    """What they differ in are the keys: an option of a group stands for its values, operation and seeds count not."""
    jobs = [
        job("wwll", loss__alpha=0.0, loss__bonus="none", tracking__experiment="a", training__save_steps=4),
        job("wwwl", loss__alpha=0.0, loss__bonus="none", tracking__experiment="b", training__save_steps=8),
        job("wlll", loss__alpha=0.1, loss__bonus="selm", training__beta1=0.5),
    ]
    make_sweep(tmp_path, [], jobs)
    RunRecord(name="third", choices={"judge": "reward", "loss": "selm"}, finished=True).write(tmp_path / "2")
    sweep = find_sweep([str(tmp_path / name) for name in "012"], None, "xpo")
    assert sorted(sweep.keys) == ["loss", "training.beta1"]
    points = compare(sweep).points  # the first two differ in nothing that changes a number
    assert [(len(point.runs), point.settings["loss"]) for point in points] == [(2, "null"), (1, "selm")]
    RunRecord(name="third", choices={}, finished=False).write(tmp_path / "2")
    assert find_sweep([str(tmp_path / name) for name in "012"], None, "xpo").runs[2].state == "stopped"
    with pytest.raises(ConfigError, match=r"RUN='nowhere' holds no run\.json; give outputs/DATE/TIME"):
        find_sweep(["nowhere", str(tmp_path / "0")], None, "xpo")


def test_runs_are_not_pooled_that_differ_in_numbers(tmp_path: Path) -> None:
    """Within one option of a group, or in their steps."""
    jobs = [job("wl", loss__alpha=alpha, training__max_steps=steps) for alpha, steps in ((0.1, 4), (0.2, 4), (0.2, 8))]
    make_sweep(tmp_path, [], [*jobs, job("wl", loss__alpha=0.2, training__max_steps=8)])
    RunRecord(name="third", choices={"loss": "selm"}, finished=True).write(tmp_path / "3")
    sweep = find_sweep([str(tmp_path / name) for name in "0123"], None, "xpo")
    assert sorted(sweep.keys) == ["judge", "loss", "loss.alpha", "training.max_steps"]
    assert [len(point.runs) for point in compare(sweep).points] == [1, 1, 1, 1]


def test_the_newest_sweep_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"multirun/ holds no sweep\.json"):
        find_sweep([], None, "xpo")
    make_sweep(tmp_path / "multirun" / "1" / "1", ["loss.alpha"], [job("wl", loss__alpha=0.0)])
    assert find_sweep([], None, "xpo").directory == Path("multirun/1/1")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}', '{"unknown": 1}'])
def test_damaged_files_stop_no_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    """Neither those of a newer sweep, unless it is named, nor those of one of the runs."""
    monkeypatch.chdir(tmp_path)
    sweep = make_sweep(tmp_path / "multirun" / "1" / "1", ["loss.alpha"], [job("wl", loss__alpha=a) for a in range(5)])
    damaged = tmp_path / "multirun" / "1" / "2" / "sweep.json"
    damaged.parent.mkdir()
    damaged.write_text(content)
    os.utime(damaged, (2e9, 2e9))
    (sweep / "0" / "run.json").write_text("{")
    (sweep / "1" / "metrics.jsonl").write_text("{\n")
    next((sweep / "2" / "completions").iterdir()).write_text("[]")
    (sweep / "3" / "config.yaml").unlink()
    found = find_sweep([], None, "xpo")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xpo: a sweep is passed over: multirun/1/2/sweep.json cannot be read (")
    assert [run.state for run in found.runs] == ["missing"] * 4 + ["finished"]
    assert all(str(sweep) in str(run.reason) or "1/1" in str(run.reason) for run in found.runs[:4])
    with pytest.raises(ConfigError, match=r"sweep\.json cannot be read .*; mend it or delete it$"):
        find_sweep([str(damaged.parent)], None, "xpo")


def test_of_its_end_a_run_knows_best(tmp_path: Path) -> None:
    """A job that failed and was finished alone; one that goes on; one that has gone on with other settings."""
    jobs = [job("wl", loss__alpha=a) for a in range(4)]
    sweep = make_sweep(tmp_path / "1", ["loss.alpha"], jobs)
    record = json.loads((sweep / "sweep.json").read_text())
    record["jobs"][0] |= {"state": "timed out", "reason": "too slow"}
    (sweep / "sweep.json").write_text(json.dumps(record))
    RunRecord(finished=False).write(sweep / "1")
    RunRecord(finished=True, mixed=True).write(sweep / "2")
    found = find_sweep([str(sweep)], None, "xpo")
    assert [run.state for run in found.runs] == ["finished", "stopped", "changed", "finished"]


def test_many_runs_have_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It names a directory; one that cannot be written is one line."""
    sweep = make_sweep(tmp_path / "1", ["loss.alpha"], [job("wl", loss__alpha=a) for a in range(12)])
    runs = [str(sweep / str(number)) for number in range(12)]
    assert find_sweep(runs, None, "xpo").name == "0 to 11, 12 runs"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["xpo.compare", *runs, "--no-log", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.count("\n") == 1


# ---- odd sweeps ------------------------------------------------------------------------------------

ODD: dict[str, tuple[list[str], list[Job]]] = {
    "one seed": (KEYS, two_by_two()[::2]),
    "one evaluation": (
        ["loss.alpha"],
        [job("wl", [0.1, 0.2], 1, loss__alpha=0.0), job("ww", None, 1, loss__alpha=1.0)],
    ),
    "null": (["loss.penalty"], [job("wl", loss__penalty=None), job("ll", loss__penalty=1.0)]),
    "texts": (
        ["model.name", "loss.alpha"],
        [job("wl", model__name="HuggingFaceTB/SmolLM2-135M-Instruct", loss__alpha=a) for a in (0.0, 1e-6, 1e-5)]
        + [job("ww", model__name="Qwen/Qwen2-0.5B-Instruct", loss__alpha=0.0)],
    ),
    "no score": (KEYS, two_by_two(scores=False)),
    "a zero among powers of ten": (["loss.alpha"], [job("wlww", loss__alpha=a) for a in (0.0, 1e-7, 1e-6, 1e-5)]),
    "one point": (["loss.alpha"], [job("wlww", loss__alpha=0.0)]),
    "only seeds": ([], [job("wlww", training__seed=seed) for seed in (1, 2, 3)]),
    "seeds at one point only": (
        ["loss.alpha"],
        [job("wlww", loss__alpha=0.0, training__seed=1), job("wlwl", loss__alpha=0.0, training__seed=2),
         job("llll", loss__alpha=1.0)],
    ),
    "many levels": (
        ["loss.alpha", "loss.beta"],
        [job("wlwl", loss__alpha=a / 10, loss__beta=b / 10) for a in range(9) for b in range(3)],
    ),
    "lists": (["loss.alpha"], [job("wl", loss__alpha=[1e-5, 1e-6]), job("wl", loss__alpha=1e-5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_sweeps_have_a_report(tmp_path: Path, name: str) -> None:
    keys, jobs = ODD[name]
    comparison = compare(from_directory(make_sweep(tmp_path / "sweep", keys, jobs)))
    paths = write(comparison, plots(comparison), tmp_path / "out")
    page = paths[0].read_text()
    expected = {"frontier.png", "learning_curves.png"} | ({"main_effects.png"} if keys else set())
    expected |= {f"interaction_{keys[0]}_{keys[1]}.png"} if len(keys) == 2 else set()
    if name == "one evaluation":
        expected -= {"learning_curves.png"}
    assert {path.name for path in paths[3:]} == expected
    assert all(path.stat().st_size > 5000 for path in paths[3:])
    assert page.count("data:image/png;base64,") == len(expected)
    assert '<input type="radio"' not in page  # these runs are older than preference/queries
    if name == "no score":
        assert "score" not in cells(comparison)[0]
    if name == "one point":
        assert "only setting" in page
    if name == "only seeds":
        assert "Nothing but seeds was swept" in page


def test_a_run_without_evaluation_is_left_out(tmp_path: Path) -> None:
    config, table, history = job("wl", loss__alpha=1.0)
    without = [entry for entry in history if "eval_runtime" not in entry]
    sweep = make_sweep(tmp_path / "s", ["loss.alpha"], [job("ww", loss__alpha=0.0), (config, table, without)])
    comparison = compare(from_directory(sweep))
    assert [(run.state, run.reason) for run in comparison.left_out] == [("finished", "without eval/win_rate")]


# ---- preference queries --------------------------------------------------------------------------


def with_queries(*points: tuple[int, float]) -> Run:
    return Run("r", "finished", None, {}, {"preference/queries": list(points), "m": [(0, 0.0), (10, 1.0)]})


def test_pairs_labelled_at_the_steps_of_evaluations() -> None:
    """Logged at 4 and 8: 8 pairs a step to step 4, then 4, and so on; the mean of two runs; unknown if one's is."""
    run, other = with_queries((4, 32.0), (8, 48.0)), with_queries((1, 16.0))
    steps = [0, 2, 4, 6, 10]
    assert np.array_equal(queries_at([run], steps), [0, 16, 32, 40, 56])
    assert np.array_equal(queries_at([run, other], steps), [0, 24, 48, 68, 108])
    assert queries_at([run, run_with(1.0)], steps) is None
    assert final_queries(Point({}, [run, other]), "m") == 108
    assert final_queries(Point({}, [run, run_with(1.0)]), "m") is None


def test_methods_that_label_differently_compare_by_pairs(tmp_path: Path) -> None:
    """Evaluated at steps 2, 4 and 6, with 4 pairs a step or 16; a third one is of an older version."""
    jobs = [job("wwwl", pairs=4, loss__bonus="xpo"), job("wwll", pairs=16, loss__bonus="selm")]
    sweep = make_sweep(tmp_path / "s", ["loss.bonus"], [*jobs, job("wlll", loss__bonus="popo")])
    comparison = compare(from_directory(sweep))
    drawn = {plot.name: plot for plot in plots(comparison)}
    by_step, by_queries = drawn["learning_curves"], drawn["learning_curves_queries"]
    lines = [[list(line.get_xdata()) for line in plot.figure.axes[0].lines[:-1]] for plot in (by_step, by_queries)]
    assert lines == [[[2, 4, 6]] * 3, [[8, 16, 24], [32, 64, 96]]]  # the last line is that of parity
    assert "1 of the settings did not count them" in by_queries.caption
    header, body = cells(comparison)
    assert header[:4] == ["loss.bonus", "runs", "preference queries", "win rate"]
    assert [row[:3] for row in body] == [["xpo", "1", "24"], ["selm", "1", "96"], ["popo", "1", ""]]
    assert as_csv(comparison).splitlines()[2].startswith("selm,1,96,0.5,")
    paths = write(comparison, list(drawn.values()), tmp_path / "out")
    page, curves = paths[0].read_text(), (tmp_path / "out" / "learning_curves.csv").read_text().splitlines()
    assert re.findall(r'<label for="view-2-\d">(.*)</label>', page) == ["by step", "by preference queries"]
    assert page.count(" checked>") == 1
    assert curves[0] == "loss.bonus,metric,step,preference/queries,mean,low,high"
    assert "selm,eval/win_rate,4,64,0.333333,0.333333,0.333333" in curves
    assert "popo,eval/win_rate,6,,0.25,0.25,0.25" in curves


def test_exploration_is_compared(tmp_path: Path) -> None:
    jobs = [job("wl", loss__alpha=alpha) for alpha in (0.0, 1.0)]
    for _, _, history in jobs:
        for entry in history:
            if "eval_runtime" in entry:
                entry |= {"eval_exploration/unique": 0.5, "eval_exploration/novel_ngrams": 0.25}
    comparison = compare(from_directory(make_sweep(tmp_path / "s", ["loss.alpha"], jobs)))
    header, body = cells(comparison)
    assert header[-2:] == ["unique completions", "novel 4-grams"]
    assert body[0][-2:] == ["0.500", "0.250"]
    curves = next(plot.figure for plot in plots(comparison) if plot.name == "learning_curves")
    assert {"unique completions", "novel 4-grams"} <= {axis.get_ylabel() for axis in curves.axes}


# ---- the report ------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_escapes_text(tmp_path: Path) -> None:
    config, table, history = job("wl", [0.5, 0.25], loss__alpha=0.0)
    table[0][:3] = ["<b>why</b> & how?", "<script>alert(1)</script> http://example.org", "<img src=x onerror=y>"]
    directory = make_sweep(tmp_path / "s", ["loss.alpha"], [(config, table, history)], (failed("<i>", reason="a < b"),))
    comparison = compare(from_directory(directory))
    page = write(comparison, plots(comparison), tmp_path / "out")[0].read_text()
    for written in (
        "&lt;script&gt;alert(1)",
        "&lt;b&gt;why",
        "&lt;img src=x",
        "&lt;i&gt;: failed, a &lt; b",
        "score 0.50",
    ):
        assert written in page
    assert "<script" not in page
    assert "<link" not in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    assert set(re.findall(r'src="([^:]+):', page)) == {"data"}


def test_completions_of_the_best_beside_the_reference(tracked: tuple[Path, str]) -> None:
    samples = side_by_side(compare(from_directory(tracked[0])).points)
    assert len(samples) == 8
    names = [answer["name"] for answer in samples[7]["answers"]]
    assert names[:2] == ["reference", "loss.alpha=1e-05, loss.beta=0.05, seed 1"]
    assert [answer["verdict"] for answer in samples[7]["answers"]] == ["", "loses", "loses", "loses"]
    assert len(names) == 4


# ---- the command -----------------------------------------------------------------------------------

Command = Callable[..., None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """command(argument, ...): the command line, in an empty directory."""

    def run(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["xpo.compare", *map(str, arguments)])
        main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # as main does, for this process
    return run


def test_the_command_shows_writes_and_logs_once(
    tracked: tuple[Path, str], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, uri = tracked
    command(directory, "--tracking-uri", uri)
    command(directory, "--tracking-uri", uri)
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in ("0.875 ± 0.000", "Left out: job 8: failed, CUDA out of memory", "Best by win rate", "Report:  "):
        assert words in printed.out
    out = directory / "compare"
    assert {path.name for path in out.iterdir()} == {
        "report.html", "table.csv", "learning_curves.csv", "frontier.png", "learning_curves.png", "main_effects.png",
        "interaction_loss.alpha_loss.beta.png",
    }  # fmt: skip
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("xpo")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{TAG}` = '2026-11-22 19-15-04'")
    assert run.info.run_name == "compare 2026-11-22 19-15-04"
    assert run.info.status == "FINISHED"
    assert "xpo.sweep" not in run.data.tags
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {path.name for path in out.iterdir()}


def test_by_name_from_mlflow(
    tracked: tuple[Path, str], command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("2026-11-22 19-15-04", "--tracking-uri", tracked[1], "--no-log")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "compare" / "2026-11-22 19-15-04" / "report.html").is_file()
    command("2026-11-22 19-15-04", "--tracking-uri", tracked[1], "--no-log", "--out", "elsewhere")
    assert (tmp_path / "elsewhere" / "table.csv").is_file()


def test_a_job_that_was_run_again_counts_once(tracked: tuple[Path, str]) -> None:
    """As with sweep.rerun=true: of each job the newest that has finished, or else the newest."""
    client = MlflowClient(tracked[1])
    experiment = client.create_experiment("again")
    for name, key, status in (
        ("one", "a", "FINISHED"),
        ("two", "b", "FINISHED"),
        ("three", "c", "FAILED"),
        ("one again", "a", "FINISHED"),
        ("two again", "b", "FAILED"),
        ("three again", "c", "KILLED"),
    ):
        run_id = client.create_run(experiment, run_name=name, tags={"xpo.sweep": "s", "xpo.job_key": key}).info.run_id
        client.set_terminated(run_id, status)
    assert [run.name for run in from_mlflow("s", tracked[1], "again").runs] == ["one again", "two", "three again"]


def test_a_server_that_is_gone_is_a_warning(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "http://127.0.0.1:9"
    directory = make_sweep(tmp_path / "s", ["loss.alpha"], [job("wl", loss__alpha=0.0)], uri=uri)
    command(directory)  # which may be somebody else's
    assert f"the sweep's runs are in {uri}, not in sqlite:///" in capsys.readouterr().err
    command(directory, "--tracking-uri", uri)
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"xpo: the report is not in MLflow: --tracking-uri='{uri}' does not answer")
    assert len(stderr.splitlines()) == 1
    assert (tmp_path / "s" / "compare" / "report.html").is_file()
    assert log(Sweep("s", None, [], [], None, "xpo"), [], uri) is None
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["multirn"], "SWEEP='multirn' is no directory"),
        (["multirn"], "unable to open database file); name the database or server"),
        (["multirun/1/2"], "SWEEP='multirun/1/2' is no directory; did you mean 'multirun/1/1'?, and --tracking-uri="),
        (["."], "holds no sweep.json; give multirun/1/1"),
        (["2026-11-22 19-15-40", "--tracking-uri", "URI"], "did you mean '2026-11-22 19-15-04'?"),
        (["x", "--tracking-uri", "URI", "--experiment", "xpoo"], "--experiment='xpoo' is not in"),
        (["x", "--tracking-uri", "http://127.0.0.1:9"], "does not answer"),
        (
            ["SWEEP", "--metric", "eval/winrate"],
            "is in no finished run; did you mean 'eval/win_rate'?; they have eval/",
        ),
        (["9"], "has no finished run (1 failed, 1 timed out)"),
        (["8"], "data.eval: 'job 1' was evaluated on other prompts than 'job 0'"),
    ],
)
def test_bad_input_is_one_line(
    tracked: tuple[Path, str],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make_sweep(tmp_path / "9", [], [], (failed(), failed("b", "timed out", None)))
    make_sweep(tmp_path / "multirun" / "1" / "1", [], [])
    if arguments == ["8"]:
        make_sweep(tmp_path / "8", ["loss.alpha"], [job("wl", loss__alpha=0.0), job("wll", loss__alpha=1.0)])
    places = {"SWEEP": str(tracked[0]), "URI": tracked[1]}
    with pytest.raises(SystemExit) as caught:
        command(*(places.get(argument, argument) for argument in arguments))
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("xpo: error: ")
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_a_point_is_named_after_its_settings() -> None:
    assert Point({"loss.alpha": 1e-5, "loss.penalty": None}, []).name == "loss.alpha=1e-05, loss.penalty=null"
