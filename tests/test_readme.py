"""What the README says can be done is done."""

import json
import re
import subprocess
import sys
from pathlib import Path

from xpo.tracking.metrics_log import read_metrics

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The one code block of the README in this language that contains some words."""
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    return found


def test_the_example_judge_trains_and_is_inspected(tmp_path: Path) -> None:
    """Its class and its YAML file, as they stand in the README, in an empty directory."""
    (tmp_path / "my_judges.py").write_text(block("python", "ShorterJudge"))
    (tmp_path / "my_conf" / "judge").mkdir(parents=True)
    (tmp_path / "my_conf" / "judge" / "shorter.yaml").write_text(block("yaml", "ShorterJudge"))
    judge = ["judge=shorter", "judge.per_character=0.05", f"hydra.searchpath=[file://{tmp_path}/my_conf]"]
    assert "judge=shorter judge.per_character=0.05" in README

    def run(module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *judge, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    run("xpo.train", "experiment=smoke", "tracking=none", "hydra.run.dir=trained")
    first = read_metrics(tmp_path / "trained")[-1]
    assert first["eval_invalid_rate"] == 0
    completions = next((tmp_path / "trained" / "completions").glob("step_*.json"))
    run("xpo.judges", f"pairs={completions}", "hydra.run.dir=inspected")
    verdicts = [json.loads(line) for line in (tmp_path / "inspected" / "verdicts.jsonl").read_text().splitlines()]
    assert verdicts
    for verdict in verdicts:
        margin = 0.05 * (len(verdict["second"]) - len(verdict["first"]))
        assert abs(verdict["judge"] - margin) < 1e-5
