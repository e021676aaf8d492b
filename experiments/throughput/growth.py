"""How does the time of a step grow with prompts, prompt length and new tokens?

    python experiments/throughput/growth.py                     # a quarter of an hour on two cores
    python experiments/throughput/growth.py --device cuda
    python experiments/throughput/growth.py --model tiny        # does it run?

One of the three changes at a time, the others stay at the middle value. All prompts of a step have the same length, and
every completion is as long as it may be; nothing is stored, so a step draws y and y~. Writes growth-DEVICE-MODEL.json
and a plot to results/.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from run import device_name, machine_facts, markdown, number
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from with_xpo import count_letters
from workloads import MODELS, model_directory

from xpo import XPOConfig, XPOTrainer
from xpo.models.devices import keep_freed_memory
from xpo.training.callbacks import PrintLines

HERE = Path(__file__).parent
VALUES = {"prompts": (4, 8, 16, 32), "prompt tokens": (32, 64, 128, 256), "new tokens": (16, 32, 64, 128)}
MIDDLE = {"prompts": 8, "prompt tokens": 64, "new tokens": 32}
SHOWN = ("rollout", "reference", "update")  # phases; the others take next to nothing here


class StepTimes(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, and those that the trainer logs."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *arguments: Any, **others: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *arguments: Any, logs: dict[str, float], **others: Any) -> None:
        self.logs.append(logs)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, point: dict[str, int], steps: int, device: str
) -> dict[str, float]:
    """Median seconds of a step and of its phases, after one step that does not count."""
    generator = torch.Generator().manual_seed(0)
    size = (point["prompts"] * (steps + 1), point["prompt tokens"])
    prompts = torch.randint(100, len(tokenizer) - 1, size, generator=generator).tolist()
    times = StepTimes()
    with tempfile.TemporaryDirectory() as directory:
        trainer = XPOTrainer(
            model=model,
            reward_model=count_letters,
            args=XPOConfig(
                output_dir=directory,
                per_device_train_batch_size=point["prompts"],
                max_steps=steps + 1,
                max_new_tokens=point["new tokens"],
                max_length=point["prompt tokens"] + point["new tokens"],
                generation_kwargs={"min_new_tokens": point["new tokens"]},
                bf16=device == "cuda",
                use_cpu=device == "cpu",
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [""] * len(prompts), "prompt_ids": prompts}),
            callbacks=[times],
        )
        trainer.remove_callback(PrintLines)
        trainer.train()
    seconds = [end - start for start, end in zip(times.ends[1:], times.ends[2:], strict=False)]
    logs = [entry for entry in times.logs if "perf/rollout_s" in entry][1:]
    phases = {phase: statistics.median(entry[f"perf/{phase}_s"] for entry in logs) for phase in SHOWN}
    return {"step": statistics.median(seconds), **phases}


class Line(NamedTuple):
    """The straight line through the seconds of a step: what it takes anyhow, what each further one costs."""

    start: float
    each: float
    correlation: float

    def __str__(self) -> str:
        return f"{self.start:.3g} s + {self.each:.3g} s each (r = {self.correlation:.4f})"


def line(values: Sequence[int], seconds: Sequence[float]) -> Line:
    slope, intercept = statistics.linear_regression(values, seconds)
    return Line(intercept, slope, statistics.correlation(values, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, help="default smollm2-135m on a CPU, qwen2-0.5b-random on a GPU")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each point")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="a directory")
    args = parser.parse_args()
    args.model = args.model or ("qwen2-0.5b-random" if args.device == "cuda" else "smollm2-135m")
    if args.device == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory(args.model, Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = []
    for name, values in VALUES.items():
        for value in values:
            point = MIDDLE | {name: value}
            rows.append({"changes": name, **point, **measure(model, tokenizer, point, args.steps, args.device)})
            print(f"{name} {value}: {rows[-1]['step']:.3g} s per step", flush=True)
    lines = {
        name: line(values, [row["step"] for row in rows if row["changes"] == name]) for name, values in VALUES.items()
    }
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"growth-{device_name(args.device)}-{args.model}.json"
    facts = {
        "machine": machine_facts(args.device),
        "steps": args.steps,
        "rows": rows,
        "lines": {k: v._asdict() for k, v in lines.items()},
    }
    file.write_text(json.dumps(facts, indent=1) + "\n")
    header = [*MIDDLE, "s/step", *(f"{phase} s" for phase in SHOWN)]
    cells = [[*(str(row[key]) for key in MIDDLE), *(number(row[key]) for key in ("step", *SHOWN))] for row in rows]
    print(f"\n{markdown(header, cells)}\n")
    for name, found in lines.items():
        print(f"{name}: {found}")
    plot(rows, lines, file.with_suffix(".png"))
    print(f"Written to {file} and {file.with_suffix('.png').name}")


def plot(rows: list[dict[str, Any]], lines: dict[str, Line], file: Path) -> None:
    """Seconds of a step and its phases against each of the three."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(VALUES), figsize=(12, 3.8), layout="constrained")
    for panel, (name, values) in zip(panels, VALUES.items(), strict=True):
        part = [row for row in rows if row["changes"] == name]
        for phase in SHOWN:
            panel.plot(values, [row[phase] for row in part], marker="o", markersize=4, linewidth=1.2, label=phase)
        panel.plot(values, [row["step"] for row in part], "ko", markersize=5, label="step")
        ends = [0, values[-1]]
        fitted = [lines[name].start + lines[name].each * value for value in ends]
        panel.plot(ends, fitted, "k:", linewidth=1, label="straight line")
        panel.set(xlabel=name, title=str(lines[name]), xlim=(0, None), ylim=(0, None))
        panel.set_xticks(values)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend(frameon=False)
    fixed = ", ".join(f"{value} {name}" for name, value in MIDDLE.items())
    figure.suptitle(f"Time of a step, one thing changed at a time (otherwise {fixed})")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
