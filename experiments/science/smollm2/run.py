"""SmolLM2-135M under the bonuses, on ordinary prompts and on those whose good answers are rare: see README.md."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from experiments.science.common import write_block
from experiments.science.smollm2.report import Row, plot, table
from xpo.config.errors import hydra_value
from xpo.config.files import write_whole

HERE = Path(__file__).parent
WORK = Path("multirun/smollm2")  # of runs under way; what they leave is in runs.csv
PAIRS, STEPS, SEEDS = 6, 24, (1, 2, 3)
PROMPTS = {
    "ordinary": [],
    "hidden": [
        f"data.{part}={hydra_value(str(HERE / f'hidden_{split}.jsonl'))}"
        for part, split in (("train", "train"), ("eval", "heldout"))
    ],
}
METHODS = {
    "alpha = 0": ["loss=no_exploration"],
    "online DPO": ["loss=online_dpo", "sampler=policy"],
    **{f"xpo {alpha}": [f"loss.alpha={alpha}"] for alpha in ("1e-6", "1e-5", "1e-4", "1e-3", "3e-2")},
    "popo 0.12": ["loss=popo", "loss.alpha=0.12"],
}
COMMON = [
    "experiment=quickstart",
    f"training.max_steps={STEPS}",
    f"training.per_device_train_batch_size={PAIRS}",
    "training.save_strategy=no",
    "evaluation.before=false",
    "training.disable_tqdm=true",
    "tracking=none",
    f"reference.store={WORK}/reference.sqlite",  # of its own: draws of others, in other batches, differ by rounding
]
MEASURES = ("score", "ref_score", "win_rate", "kl", "distinct_2", "eos_rate", "vader", "ref_vader")


class Cell(NamedTuple):
    """One run of the trainer."""

    seed: int
    prompts: str
    method: str

    def command(self, directory: Path) -> list[str]:
        words = [*COMMON, *PROMPTS[self.prompts], *METHODS[self.method], f"training.seed={self.seed}"]
        return [sys.executable, "-m", "xpo.train", *words, f"hydra.run.dir={directory}"]


def run(cell: Cell) -> Row:
    """Trains; what the log says at the end. The bonus's share is the mean over the steps."""
    directory = WORK / f"{cell.seed}_{cell.prompts}_{list(METHODS).index(cell.method)}"
    shutil.rmtree(directory, ignore_errors=True)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # sums in one order
    subprocess.run(cell.command(directory), check=True, stdout=subprocess.DEVNULL, env=one_thread)
    logs = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(directory)  # half a gigabyte of weights
    (evaluation,) = (log for log in logs if "eval_score" in log)
    share = fmean(log["exploration/bonus_share"] for log in logs if "loss" in log)
    found = {name: evaluation["eval_" + name] for name in MEASURES} | {"bonus_share": share}
    return {name: str(value) for name, value in cell._asdict().items()} | {
        name: f"{value:.6g}" for name, value in found.items()
    }


def compute(path: Path) -> list[Row]:
    """All rows; what the file lacks is run, two at a time, and written in order."""
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    there = {(row["seed"], row["prompts"], row["method"]) for row in rows}
    cells = [Cell(*cell) for cell in product(SEEDS, PROMPTS, METHODS)]
    todo = [cell for cell in cells if (str(cell.seed), *cell[1:]) not in there]
    with ThreadPool(2) as pool:
        for cell, new in zip(todo, pool.imap(run, todo), strict=True):
            rows.append(new)
            text = io.StringIO()
            writer = csv.DictWriter(text, new, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_whole(path, text.getvalue())
            print(*cell, new["score"], flush=True)
    return rows


def main() -> None:
    rows = compute(HERE / "runs.csv")
    tables = {prompts: [row for row in rows if row["prompts"] == prompts] for prompts in PROMPTS}
    text = [f"**{prompts} prompts**\n\n{table(found, 'alpha = 0')}" for prompts, found in tables.items()]
    write_block(HERE / "README.md", "\n\n".join(text))
    plot(tables, HERE / "gains.png")


if __name__ == "__main__":
    main()
