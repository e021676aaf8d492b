"""What has never run on a GPU: is it right there, and how fast? gpu.sh runs this, and TRL beside it.

    python experiments/throughput/gpu.py RESULT.json                             # two minutes on a GPU
    python experiments/throughput/gpu.py RESULT.json --device cpu --model tiny   # does it run?

Each check stands alone: what fails is written down, and the next one runs. Log-probabilities and gradients are compared
with those of separate rows in float32, so an error has rounding in it: that of "separate" is what bfloat16 costs. The
likeliest tokens of random weights are near ties, which bfloat16 turns: --model smollm2-135m says more of "same_tokens".
"""

import argparse
import copy
import importlib.util
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from run import machine_facts
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from update import made_up_batch, now, update
from with_xpo import count_letters
from workloads import MODELS, WORKLOADS, draw_prompts, load_tokenizer, model_directory, prompt_ids

from xpo import XPOConfig, XPOTrainer
from xpo.config.options import SamplingOptions
from xpo.models.forward import Forward
from xpo.sampling.completions import tokens_at_once
from xpo.sampling.noise import sampling_noise
from xpo.sampling.sampler import Sampler
from xpo.sampling.vllm import VLLM, EngineOptions

WAYS = "separate", "shared", "packed"  # the last one is FlexAttention on a GPU
PROMPTS, TURNS = 8, 3
Result = dict[str, Any]


class Checks:
    """The checks, over one model and 8 prompts of `ultrafeedback`'s lengths; each returns what it found."""

    def __init__(self, device: str, model: str, scratch: Path):
        directory = model_directory(model, scratch)
        self.device = torch.device(device)
        self.tokenizer = load_tokenizer(directory)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device)
        self.workload = WORKLOADS["ultrafeedback"]
        self.prompts = draw_prompts(self.workload, self.tokenizer, PROMPTS)
        self.ids = [prompt_ids(self.tokenizer, prompt) for prompt in self.prompts]
        self.longest = max(map(len, self.ids)) + self.workload.new_tokens
        lengths = [len(ids) for ids in self.ids]
        self.batch = made_up_batch(lengths, self.workload.new_tokens, len(self.tokenizer), device)

    def all(self) -> dict[str, Callable[[], Result]]:
        ways = {f"forward, {way}": lambda way=way: self.forward(way) for way in WAYS}
        training = {f"training, {way}": lambda way=way: self.training(way) for way in WAYS}
        return {**ways, "static cache": self.static_cache, "draws": self.draws, **training, "vllm": self.vllm}

    def forward(self, way: str) -> Result:
        """Its errors, seconds of an update of 8 pairs and peak memory, in bfloat16 autocast."""
        exact, exact_gradient = self.logps("separate", autocast=False)
        logps, gradient = self.logps(way, autocast=True)
        error = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
        del gradient, exact_gradient
        forward = Forward(self.model, way, self.longest)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        budget = tokens_at_once(self.device)
        seconds = [update(forward, self.model, self.batch, budget) for _ in range(TURNS + 1)]
        return {
            "error_of_logps_nats": (logps - exact).abs().max().item(),
            "error_of_gradient": error,
            "update_s": min(seconds[1:]),
            "first_update_s": seconds[0],
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
        }

    def logps(self, way: str, autocast: bool) -> tuple[Tensor, Tensor]:
        """float32 (2, 8), and the gradient of their sum with respect to the token embeddings."""
        self.model.zero_grad()
        forward = Forward(self.model, way, self.longest)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logps = forward(self.model, self.batch)
        logps.sum().backward()
        gradient = self.model.get_input_embeddings().weight.grad
        assert isinstance(gradient, Tensor)
        return logps.detach().float(), gradient.clone()

    def sampler(self, **kwargs: Any) -> Sampler:
        options = SamplingOptions(max_new_tokens=self.workload.new_tokens, max_length=1024)
        return Sampler(self.tokenizer, options, [len(self.tokenizer) - 1], kwargs=kwargs)

    def rollout(
        self, sampler: Sampler, greedy: bool = False, rows: range = range(PROMPTS), model: Any = None
    ) -> Tensor:
        model = model or self.model
        noise = sampling_noise((0, 0, 0), rows, self.workload.new_tokens)
        autocast = self.device.type == "cuda" and model.dtype == torch.float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return sampler.sample(model, [self.ids[row] for row in rows], noise, self.device, greedy).ids

    def timed(self, sampler: Sampler, model: Any = None) -> tuple[Tensor, float, float]:
        """Greedy tokens, and seconds of the first rollout and of the best later one."""
        seconds = []
        for _ in range(TURNS + 1):
            before = now(self.device.type)
            tokens = self.rollout(sampler, greedy=True, model=model)
            seconds.append(now(self.device.type) - before)
        return tokens, seconds[0], min(seconds[1:])

    def static_cache(self) -> Result:
        """The static cache of transformers, whose decoding it compiles, against the project's own; bfloat16 weights."""
        model = copy.deepcopy(self.model).to(torch.bfloat16)
        own, _, own_s = self.timed(self.sampler(), model)
        static, first_s, static_s = self.timed(self.sampler(cache_implementation="static"), model)
        return {"same_tokens": same(own, static), "own_s": own_s, "static_s": static_s, "static_first_s": first_s}

    def draws(self) -> Result:
        """Whether a draw is its own, whatever the batch: in bfloat16 rounding may turn a token."""
        sampler = self.sampler()
        together = self.rollout(sampler)
        alone = torch.cat([self.rollout(sampler, rows=range(row, row + 1)) for row in range(PROMPTS)])
        return {"again": same(together, self.rollout(sampler)), "alone": same(together, alone)}

    def training(self, way: str) -> Result:
        """Six steps through XPOTrainer: what it logs of each, and of the last five the mean seconds of the phases."""
        with tempfile.TemporaryDirectory() as directory:
            args = XPOConfig(
                output_dir=directory,
                pair_forward=way,
                bf16=self.device.type == "cuda",
                use_cpu=self.device.type == "cpu",
                max_steps=6,
                per_device_train_batch_size=PROMPTS,
                max_new_tokens=self.workload.new_tokens,
                max_length=1024,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = XPOTrainer(
                copy.deepcopy(self.model),
                reward_model=count_letters,
                args=args,
                processing_class=self.tokenizer,
                train_dataset=Dataset.from_dict({"prompt": self.prompts * 6}),
            )
            trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        phases = {name: mean(log[name] for log in logs[1:]) for name in logs[-1] if name.endswith("_s")}
        return {name: [log[name] for log in logs] for name in ("loss", "logps/chosen", "objective/kl")} | phases

    def vllm(self) -> Result:
        """Greedy tokens and seconds beside the project's own, with the model's weights and with others; between two
        rollouts the engine sleeps. And what sending the weights takes.
        """
        if importlib.util.find_spec("vllm") is None:
            return {"left out": "vllm is not installed"}
        own = self.sampler()
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        # The first rollout alone is checked.
        options = EngineOptions(1024, dtype, 0, 1, memory=0.3, eager=False, sleep=True, check_steps=10**9)
        model = copy.deepcopy(self.model)
        engine = VLLM(model, own.options, own.eos_token_ids, {}, options)
        theirs = Sampler(self.tokenizer, own.options, own.eos_token_ids, engine=engine)
        expected, _, own_s = self.timed(own)
        tokens, first_s, vllm_s = self.timed(theirs, model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        after = same(self.rollout(own, greedy=True, model=model), self.rollout(theirs, greedy=True, model=model))
        engine._follow(model)  # awake
        before = now(self.device.type)
        engine._send(model)
        return {
            "same_tokens": same(expected, tokens),
            "same_tokens_of_other_weights": after,
            "own_s": own_s,
            "vllm_s": vllm_s,
            "vllm_first_s": first_s,
            "weights_s": now(self.device.type) - before,
        }


def same(one: Tensor, other: Tensor) -> float:
    """The share of equal tokens, up to the first one of a completion that differs."""
    width = min(one.shape[1], other.shape[1])
    return (one[:, :width] == other[:, :width]).cumprod(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a JSON file, written again after each check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=MODELS, default="qwen2-0.5b-random")
    args = parser.parse_args()
    found: Result = {"machine": machine_facts(args.device), "torch": torch.__version__, "model": args.model}
    with tempfile.TemporaryDirectory() as scratch:
        checks = Checks(args.device, args.model, Path(scratch))
        for name, check in checks.all().items():
            try:
                found[name] = check()
            except Exception as error:
                traceback.print_exc()
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            print(f"{name}: {json.dumps(found[name])}", flush=True)
            args.result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
