"""How fast is xpo, next to TRL 1.13.0, on the same work? See README.md.

    python experiments/throughput/run.py --workloads chat ultrafeedback long
    python experiments/throughput/run.py --model tiny --workloads chat --steps 4     # does it run?
    python experiments/throughput/run.py --search --workloads chat                   # the settings of trl-best
    python experiments/throughput/run.py --device cuda --trl-python python3          # where TRL can be imported

The first use makes TRL's virtual environment.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contender import PHASES
from floor import Machine, Shape, better, measure, read_shape, step_needs
from workloads import MODELS, WORKLOADS, Prompt, draw_prompts, load_tokenizer, model_directory, prompt_ids

from xpo import XPOConfig

HERE = Path(__file__).parent
TRL = "1.13.0"
CONTENDERS = ("trl-default", "xpo-cold", "trl-best", "xpo-warm", "xpo-vllm")  # in turn
COLD = "xpo-cold", "xpo-vllm"  # each with a store of its own, which is empty
DEFAULTS: dict[str, Any] = {}  # gradient_checkpointing is on, and with it no KV cache in generation
NO_CHECKPOINTING = {"gradient_checkpointing": False}
STATIC_CACHE = {"cache_implementation": "static"}
SEARCH: dict[str, dict[str, Any]] = {  # for trl-best; one of UNSEARCHED, until a search has been run
    "no checkpointing, static cache": {"args": NO_CHECKPOINTING, "generation_kwargs": STATIC_CACHE},
    "no checkpointing, dynamic cache": {"args": NO_CHECKPOINTING},
    # Fewer rows at a time are padded less.
    "no checkpointing, static cache, 2 micro-batches": {
        "args": NO_CHECKPOINTING,
        "generation_kwargs": STATIC_CACHE,
        "micro_batches": 2,
    },
    "no checkpointing, static cache, 4 micro-batches": {
        "args": NO_CHECKPOINTING,
        "generation_kwargs": STATIC_CACHE,
        "micro_batches": 4,
    },
    "no checkpointing, dynamic cache, 4 micro-batches": {"args": NO_CHECKPOINTING, "micro_batches": 4},
    "no checkpointing, static cache, 8 micro-batches": {
        "args": NO_CHECKPOINTING,
        "generation_kwargs": STATIC_CACHE,
        "micro_batches": 8,
    },
    "no checkpointing, eager attention": {"args": NO_CHECKPOINTING, "model": {"attn_implementation": "eager"}},
    "checkpointing, KV cache": {"generation_kwargs": {"use_cache": True}},
}
UNSEARCHED = {  # a static cache takes no mixed precision, which runs on GPUs have
    "cpu": "no checkpointing, static cache",
    "cuda": "no checkpointing, dynamic cache",
}
HIT_RATE = "perf/reference_hit_rate"  # logged by xpo
Result = dict[str, Any]


def main() -> None:
    args = parse_arguments()
    trl_python = args.trl_python or trl_environment(args.trl_venv)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, trl_python, Path(scratch))
        for workload in args.workloads:
            if args.search:
                bench.search(workload)
            bench.compare(workload)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    there = CONTENDERS if importlib.util.find_spec("vllm") else CONTENDERS[:-1]
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(there))
    add("--steps", type=int, default=8, help="timed optimizer steps of each contender in each round")
    add(
        "--warmup",
        type=int,
        help="untimed steps before them, of xpo at least as many as it draws ahead; default 1 on a CPU, 2 on a GPU",
    )
    add("--rounds", type=int, default=1, help="turns that each contender gets, on new prompts")
    add("--batch", type=int, default=8, help="prompts of an optimizer step")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", choices=MODELS, help="default smollm2-135m on a CPU, qwen2-0.5b-random on a GPU")
    add("--budget", type=float, default=1800, help="seconds of training that a contender may take in a round")
    add("--search", action="store_true", help="first find the settings of trl-best, and keep them")
    add("--search-steps", type=int, default=2, help="timed steps of each setting in the search")
    add("--floor", action="store_true", help="say how far each phase is from what the machine could do")
    add("--xpo", nargs="*", default=[], metavar="KEY=VALUE", help="further XPOConfig arguments of xpo; JSON values")
    add("--headline-prompts", type=int, help="project this many prompts to hours on this device")
    add("--trl-venv", type=Path, default=Path.home() / ".cache" / "xpo" / f"trl-{TRL}")
    add("--trl-python", help="an interpreter that can import TRL; no environment is made then")
    add("--results", type=Path, default=HERE / "results", help="a directory")
    args = parser.parse_args()
    args.model = args.model or ("qwen2-0.5b-random" if args.device == "cuda" else "smollm2-135m")
    args.warmup = args.warmup if args.warmup is not None else 2 if args.device == "cuda" else 1
    if args.steps % cycle(args):
        parser.error(
            f"--steps {args.steps}: a multiple of {cycle(args)}, the steps that xpo draws references for at once"
        )
    return args


def cycle(args: argparse.Namespace) -> int:
    """Steps whose reference completions xpo draws at once: only whole cycles have their share of the drawing."""
    size = dict(map(parse_option, args.xpo)).get("reference_batch_size", XPOConfig.reference_batch_size)
    return max(1, size // args.batch)


def trl_environment(directory: Path) -> str:
    """The interpreter of TRL's own virtual environment, which is made if need be."""
    python = directory / "bin" / "python"
    question = "import importlib.metadata, requests; print(importlib.metadata.version('trl'))"
    if python.exists():
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True)
        if answer.stdout.strip() == TRL:
            return str(python)
    print(f"Making an environment with TRL {TRL} in {directory} (minutes, once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    constraints = HERE.parents[1] / "constraints.txt"  # the same torch and transformers on both sides
    packages = [f"trl=={TRL}", "torch", "transformers", "requests"]  # TRL imports requests without asking for it
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, *packages]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pip could not install {' '.join(packages)}:\n{done.stderr[-2000:]}")
    return str(python)


class Bench:
    """One run of the benchmark: model, tokenizer and machine, and what was measured so far."""

    def __init__(self, args: argparse.Namespace, trl_python: str, scratch: Path) -> None:
        self.args = args
        self.trl_python = trl_python
        self.scratch = scratch
        self.model = model_directory(args.model, scratch)
        self.tokenizer = load_tokenizer(self.model)
        self.shape = read_shape(self.model)
        self.machine = measure(self.shape, args.device) if args.floor else None
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the contenders are other processes
        args.results.mkdir(parents=True, exist_ok=True)
        self.file = args.results / f"{device_name(args.device)}-{args.model}.json"
        self.settings_file = args.results / f"{device_name(args.device)}-{args.model}-search.json"

    # ---- running contenders ------------------------------------------------------------------

    def run(
        self, contender: str, workload: str, prompts: list[Prompt], steps: int, settings: dict[str, Any], store: str
    ) -> Result | None:
        """A contender in a process of its own; None if it failed, which is printed."""
        result, log = self.scratch / "result.json", self.scratch / f"{contender}.log"
        result.unlink(missing_ok=True)
        is_trl = contender.startswith("trl")
        # xpo's timed steps begin where a draw for the next steps is due.
        more = 0 if is_trl else -self.args.warmup % cycle(self.args)
        extra = draw_prompts(WORKLOADS[workload], self.tokenizer, more * self.args.batch, seed=7)
        job = {
            "model": str(self.model),
            "prompts": extra + prompts,
            "batch": self.args.batch,
            "new_tokens": WORKLOADS[workload].new_tokens,
            "max_prompt": WORKLOADS[workload].max_prompt,
            "warmup": more + self.args.warmup,
            "steps": steps,
            "budget_s": self.args.budget,
            "device": self.args.device,
            "seed": 42,
            "settings": settings,
            "store": store,
            "result": str(result),
            "output_dir": str(self.scratch / "output"),
        }
        job_file = self.scratch / "job.json"
        job_file.write_text(json.dumps(job))
        python, script = (self.trl_python, "with_trl.py") if is_trl else (sys.executable, "with_xpo.py")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        with log.open("w") as output:
            code = subprocess.run(
                [python, str(HERE / script), str(job_file)], stdout=output, stderr=output, env=environment
            ).returncode
        shutil.rmtree(self.scratch / "output", ignore_errors=True)
        if code or not result.exists():
            tail = "\n".join(log.read_text().splitlines()[-12:])
            print(f"{workload}: {contender} FAILED (exit status {code}):\n{tail}", flush=True)
            return None
        return json.loads(result.read_text())

    def prompts(self, workload: str, steps: int, seed: int) -> list[Prompt]:
        count = (self.args.warmup + steps) * self.args.batch
        return draw_prompts(WORKLOADS[workload], self.tokenizer, count, seed)

    def search(self, workload: str) -> None:
        """Times TRL with each setting of SEARCH; the fastest becomes trl-best's for this workload.

        The settings take turns; the fastest step of a setting counts, as other load only ever slows one down.
        """
        prompts = self.prompts(workload, self.args.search_steps, seed=1)
        seconds: dict[str, list[float]] = {name: [] for name in SEARCH}
        for _ in range(self.args.rounds):
            for name, settings in SEARCH.items():
                result = self.run("trl-search", workload, prompts, self.args.search_steps, settings, store="")
                if result:
                    seconds[name] += result["seconds"]
                    said = f"{min(result['seconds']):.3g} s per step{disturbance(result)}"
                    print(f"{workload}: TRL, {name}: {said}", flush=True)
        if not any(seconds.values()):
            sys.exit(f"{workload}: TRL ran with no setting of the search")
        best = min((min(times), name) for name, times in seconds.items() if times)[1]
        found = read_json(self.settings_file)
        found[workload] = {"best": best, "seconds": seconds, "machine": machine_facts(self.args.device)}
        self.settings_file.write_text(json.dumps(found, indent=1) + "\n")
        show(
            f"{workload}: the search for TRL's best setting",
            ["setting", "s per step"],
            [
                [name + (" (best)" if name == best else ""), number(min(times, default=None))]
                for name, times in seconds.items()
            ],
        )

    def compare(self, workload: str) -> None:
        """Every contender in turn, then the tables and the file."""
        best = read_json(self.settings_file).get(workload, {}).get("best", UNSEARCHED[self.args.device])
        options = dict(parse_option(option) for option in self.args.xpo)
        xpo = {"generation_kwargs": options.pop("generation_kwargs", {}), "args": options}
        settings = {"trl-default": DEFAULTS, "trl-best": SEARCH[best], "xpo-cold": xpo, "xpo-warm": xpo}
        settings["xpo-vllm"] = xpo | {"args": options | {"generation_engine": "vllm"}}
        contenders = [name for name in CONTENDERS if name in self.args.contenders]
        turns: dict[str, list[Result]] = {name: [] for name in contenders}
        for turn in range(self.args.rounds):
            prompts = self.prompts(workload, self.args.steps, seed=100 + turn)
            if turn == 0:
                self.describe(workload, prompts)
            store = str(self.scratch / f"store-{workload}-{turn}.sqlite")
            if "xpo-warm" in contenders and "xpo-cold" not in contenders:
                self.run("xpo-cold", workload, prompts, self.args.steps, xpo, store)  # fills the store, untimed
            for name in contenders:
                its_store = f"{store}.vllm" if name == "xpo-vllm" else store
                result = self.run(name, workload, prompts, self.args.steps, settings[name], its_store)
                if result:
                    turns[name].append(result)
                    print(
                        f"{workload}: {name}, round {turn + 1}: {result['mean_s']:.3g} s per step, "
                        f"mean of {len(result['seconds'])}{'' if result['warm'] else ', without warm-up'}"
                        f"{disturbance(result)}",
                        flush=True,
                    )
        results = {name: pooled(parts, self.args.batch) for name, parts in turns.items() if parts}
        if results:
            self.check(workload, turns)
            needs = self.floor(workload, results)
            self.save(workload, results, best, needs)
            self.tables(workload, results, best, needs)

    # ---- what is said about it ---------------------------------------------------------------

    def describe(self, workload: str, prompts: list[Prompt]) -> None:
        lengths = [len(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        print(
            f"\n{workload}: {WORKLOADS[workload].about}. Drawn: {len(lengths)} prompts of {min(lengths)} to "
            f"{max(lengths)} tokens, mean {statistics.mean(lengths):.0f}, median {statistics.median(lengths):.0f}; "
            f"{self.args.batch} a step. Every completion has exactly {WORKLOADS[workload].new_tokens} tokens "
            "(min_new_tokens on both sides).",
            flush=True,
        )

    def check(self, workload: str, turns: dict[str, list[Result]]) -> None:
        """Says so if the contenders did not do the same work."""
        for parts in zip(*(parts for parts in turns.values() if parts), strict=False):
            for hashes in zip(*(part["prompt_hashes"] for part in parts), strict=False):
                if len(set(hashes)) > 1:
                    print(f"WARNING: {workload}: the contenders did not get the same prompt tokens", flush=True)
        for name, parts in turns.items():
            for part in parts:
                if part["new_tokens"] not in (None, WORKLOADS[workload].new_tokens):
                    print(f"WARNING: {workload}: {name} drew {part['new_tokens']:.1f} tokens a completion", flush=True)
                hits = [logs[HIT_RATE] for logs in part["logs"] if HIT_RATE in logs]
                if hits and statistics.mean(hits) != (name == "xpo-warm"):
                    print(f"WARNING: {workload}: {name} found {statistics.mean(hits):.0%} of its draws in the store")

    def floor(self, workload: str, results: dict[str, Result]) -> dict[str, Any]:
        """What each phase needs at least, a mean over the steps, for TRL and for xpo cold and warm."""
        if self.machine is None:
            return {}
        self.machine = better(self.machine, measure(self.shape, self.args.device))  # others were busy the first time?
        steps = max((result["prompt_tokens"] for result in results.values()), key=len)
        return {
            state: mean_needs(self.shape, self.machine, steps, WORKLOADS[workload].new_tokens, draws)
            for state, draws in {"trl": 1, "cold": cycle(self.args), "warm": None}.items()
        }

    def save(self, workload: str, results: dict[str, Result], best: str, needs: dict[str, Any]) -> None:
        """Merges a workload into the results file of this device and model."""
        content = read_json(self.file)
        content[workload] = {
            "machine": machine_facts(self.args.device),
            "measured": self.machine._asdict() if self.machine else None,
            "batch": self.args.batch,
            "trl_best": best,
            "contenders": results,
            "needs": needs,
        }
        self.file.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{workload}: written to {self.file}")

    def tables(self, workload: str, results: dict[str, Result], best: str, needs: dict[str, Any]) -> None:
        header = ["contender", "pairs/s", "s/step", "x trl-best", "x trl-default", "peak GB", *PHASES]
        rows = []
        for name, result in results.items():
            ratios = [
                f"{result['pairs_per_s'] / results[other]['pairs_per_s']:.2f}" if other in results else "-"
                for other in ("trl-best", "trl-default")
            ]
            shares = [number(result["phases_mean_s"][phase]) for phase in PHASES]
            label = name + ("" if result["warm"] else " *")
            peak = f"{result['peak_bytes'] / 1e9:.2f}"
            rows.append([label, number(result["pairs_per_s"]), number(result["mean_s"]), *ratios, peak, *shares])
        title = f"{workload} on {device_name(self.args.device)}, {self.args.model}; trl-best: {best}"
        show(title, header, rows)
        if not all(result["warm"] for result in results.values()):
            print("* no time was left after the first step, which is what is given")
        if needs:
            self.floor_table(workload, results, needs)
        if self.args.headline_prompts:
            for name, result in results.items():
                hours = self.args.headline_prompts / result["pairs_per_s"] / 3600
                print(f"{workload}: {name}: {self.args.headline_prompts} prompts take {hours:.3g} hours of this device")
        print(f"\n{title}\n\n{markdown(header, rows)}\n", flush=True)

    def floor_table(self, workload: str, results: dict[str, Result], needs: dict[str, Any]) -> None:
        assert self.machine is not None
        rows = []
        for name, result in results.items():
            needed = needs["trl" if name.startswith("trl") else "cold" if name in COLD else "warm"]
            for phase, need in needed.items():
                work = [f"{need['flops'] / 1e9:.4g}", f"{need['bytes'] / 1e9:.4g}"]
                rows.append([name, phase, *work, *against(need["seconds"], result["phases_mean_s"][phase])])
            total = sum(need["seconds"] for need in needed.values())
            rows.append([name, "whole step", "", "", *against(total, result["mean_s"])])
        show(
            f"{workload}: the floor, at {self.machine.flops / 1e9:.4g} GFLOP/s and "
            f"{self.machine.bandwidth / 1e9:.4g} GB/s as measured",
            ["contender", "phase", "GFLOP", "GB", "floor s", "measured s", "x floor", "floor / measured"],
            rows,
        )


def pooled(parts: Sequence[Result], batch: int) -> Result:
    """The rounds of one contender as one."""
    seconds = [second for part in parts for second in part["seconds"]]
    phases = [phase for part in parts for phase in part["phases"]]
    return parts[0] | {
        "seconds": seconds,
        "phases": phases,
        "logs": [logs for part in parts for logs in part["logs"]],
        "prompt_tokens": [tokens for part in parts for tokens in part["prompt_tokens"]],
        "warm": all(part["warm"] for part in parts),
        "mean_s": statistics.mean(seconds),
        "median_s": statistics.median(seconds),
        "pairs_per_s": batch / statistics.mean(seconds),
        "phases_mean_s": {name: statistics.mean(phase[name] for phase in phases) for name in PHASES},
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        "others_cores": max(part["others_cores"] for part in parts),
    }


def mean_needs(
    shape: Shape, machine: Machine, steps: Sequence[Sequence[int]], new_tokens: int, draws: int | None
) -> dict[str, dict[str, float]]:
    needs = [step_needs(shape, machine, prompts, new_tokens, draws) for prompts in steps]
    return {
        phase: {key: statistics.mean(getattr(need[phase], key) for need in needs) for key in needs[0][phase]._fields}
        for phase in needs[0]
    }


def disturbance(result: Result) -> str:
    """A remark if the machine was not idle beside a contender."""
    cores = result["others_cores"]
    return f" (NOT IDLE: other processes took {cores:.1f} cores)" if cores > 0.1 else ""


def against(floor: float, measured: float) -> list[str]:
    """Cells: the floor, what was measured, and the two in relation."""
    return [number(floor), number(measured), number(measured / floor), f"{floor / measured:.0%}"]


def parse_option(option: str) -> tuple[str, Any]:
    """KEY=VALUE with a JSON value, or a text."""
    key, _, value = option.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def device_name(device: str) -> str:
    """The device, as part of a file name."""
    if device == "cpu":
        return "cpu"
    return "-".join(torch.cuda.get_device_name().lower().split())


def machine_facts(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            facts["cpu"] = line.partition(":")[2].strip()
            break
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        print(f"\n{title}")
        for line in [header, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(200, shutil.get_terminal_size().columns)).print(table)


if __name__ == "__main__":
    main()
