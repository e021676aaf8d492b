"""Rollouts by transformers and by vLLM, in turns, in one process: the same prompts, the same greedy tokens.

    .venv-vllm/bin/python experiments/throughput/engines.py --workloads chat long --prompts 8 --turns 5

Needs vLLM (`make test-vllm` makes .venv-vllm) and an idle machine. Completions do not end early. "weights":
what it takes to send the policy's weights to vLLM, once for each optimizer step.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM
from update import now
from workloads import MODELS, WORKLOADS, draw_prompts, load_tokenizer, model_directory, prompt_ids

from xpo.config.options import SamplingOptions
from xpo.models.devices import keep_freed_memory
from xpo.sampling.sampler import Sampler
from xpo.sampling.vllm import VLLM, EngineOptions


def seconds(device: torch.device, work: Callable[..., object], *given: object) -> float:
    started = now(device.type)
    work(*given)
    return now(device.type) - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["chat"], choices=WORKLOADS)
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--prompts", type=int, default=8, help="of a rollout")
    parser.add_argument("--turns", type=int, default=5, help="of each engine, after one that warms up")
    parser.add_argument("--eager", action="store_true", help="do not compile vLLM's model")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory(given.model, Path(scratch))
        tokenizer = load_tokenizer(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device)
    on = f"{device}, {torch.get_num_threads()} threads"
    print(f"{given.model} on {on}, {given.prompts} prompts, median of {given.turns}")
    print("workload  transformers    vLLM   ratio   weights")
    for name in given.workloads:
        workload = WORKLOADS[name]
        options = SamplingOptions(max_new_tokens=workload.new_tokens, max_length=1024)
        ends = [len(tokenizer) - 1]  # which nothing ends with
        engine_options = EngineOptions(1024, model.dtype, 0, 1, 0.3, given.eager, sleep=True, check_steps=None)
        engine = VLLM(model, options, ends, {}, engine_options)
        ids = [prompt_ids(tokenizer, prompt) for prompt in draw_prompts(workload, tokenizer, given.prompts)]
        noise = torch.zeros(len(ids), workload.new_tokens)
        samplers = Sampler(tokenizer, options, ends), Sampler(tokenizer, options, ends, engine=engine)
        rollout = model, ids, noise, device, True  # greedy
        answers = [sampler.sample(*rollout).ids for sampler in samplers]
        assert torch.equal(*answers)
        times: list[list[float]] = [[], []]
        for _ in range(given.turns):
            for sampler, its in zip(samplers, times, strict=True):
                its.append(seconds(device, sampler.sample, *rollout))
        weights = median(seconds(device, engine._send, model) for _ in range(given.turns))
        ours, theirs = map(median, times)
        print(f"{name:8}  {ours:10.2f} s  {theirs:6.2f} s  {ours / theirs:4.2f}  {weights:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
