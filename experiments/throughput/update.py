"""How much of an update is matrix products? Its time against their rate, as it is and compiled, in turns.

    python experiments/throughput/update.py --workload chat         # five minutes on two cores
    python experiments/throughput/update.py --workload ultrafeedback
    python experiments/throughput/update.py --device cuda           # bfloat16 autocast
    python experiments/throughput/update.py --model tiny --turns 2  # does it run?

An update is the forward and backward pass over 8 pairs, without the optimizer. Before and after each one, the matrix
products of an update are run by themselves: one after the other through the model's weights, forward, gradient of the
input, gradient of the weight. Their rate is the sustained one of that minute, whereas floor.py keeps the best of
many repetitions on matrices that are in the cache; both shares are printed. Each is the median of all turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from floor import Shape, forward_flops, measure, read_shape
from run import markdown
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from workloads import MODELS, WORKLOADS, draw_prompts, load_tokenizer, model_directory, prompt_ids

from xpo.models.devices import keep_freed_memory
from xpo.models.forward import Forward
from xpo.sampling.completions import take_pairs, token_batches, tokens_at_once

PAIRS = 8


def made_up_batch(lengths: Sequence[int], new_tokens: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Pairs of random tokens as `Rollout.pairs` returns them, from the lengths of their prompts."""
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    completions = (2, len(lengths), new_tokens)
    batch = {
        "prompt_ids": torch.randint(vocabulary, mask.shape),
        "prompt_mask": mask,
        "completion_ids": torch.randint(vocabulary, completions),
        "completion_mask": torch.ones(completions, dtype=torch.bool),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def update(forward: Forward, model: nn.Module, batch: dict[str, Tensor], budget: int) -> float:
    """Seconds of the forward and backward pass over a batch, in micro-batches as the trainer makes them."""
    device = batch["prompt_ids"].device.type
    model.zero_grad()
    tokens = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=(0, 2))
    started = now(device)
    for rows in token_batches(tokens, range(len(tokens)), budget, forward.way == "packed"):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logps = forward(model, take_pairs(batch, rows))
        logps.sum().backward()
    return now(device) - started


def products(model: PreTrainedModel, tokens: int, completion_tokens: int) -> float:
    """FLOPs per second of the matrix products of an update by themselves."""
    device = model.device.type
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    counts = [completion_tokens if layer is head else tokens for layer in layers]
    sizes = {(count, width) for weight, count in zip(weights, counts, strict=True) for width in weight.shape}
    states = {size: torch.randn(size, device=device, dtype=dtype) for size in sizes}
    flops = 0.0
    started = now(device)
    for weight, count in zip(weights, counts, strict=True):
        outputs, inputs = weight.shape
        hidden, gradient = states[count, inputs], states[count, outputs]
        torch.mm(hidden, weight.T)
        torch.mm(gradient, weight)
        torch.mm(gradient.T, hidden)
        flops += 6 * count * weight.numel()
    return flops / (now(device) - started)


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    model: PreTrainedModel, shape: Shape, batches: list[list[int]], new_tokens: int, turns: int
) -> dict[str, dict[str, float]]:
    """Medians of seconds, sustained rate, and shares of both rates, for the update as it is and compiled."""
    device = model.device.type
    budget = tokens_at_once(model.device)
    forward = Forward(model, "auto", max(map(max, batches)) + 2 * new_tokens)
    contenders: dict[str, nn.Module] = {"eager": model, "compiled": torch.compile(model)}
    data = [made_up_batch(lengths, new_tokens, model.config.vocab_size, device) for lengths in batches]
    for name, contender in contenders.items():
        started = now(device)
        for batch in data[:3]:  # the first compiles, the second compiles for any number of tokens
            update(forward, contender, batch, budget)
        print(f"{name}: {now(device) - started:.0f} s for the first three updates", flush=True)
    turn_rows: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(turns):
        lengths, batch = batches[turn % len(batches)], data[turn % len(data)]
        tokens = sum(lengths) + 2 * len(lengths) * new_tokens
        flops = 3 * forward_flops(shape, lengths, 2, new_tokens)
        best = measure(shape, device).flops
        for name, contender in contenders.items():
            before = products(model, tokens, 2 * len(lengths) * new_tokens)
            seconds = update(forward, contender, batch, budget)
            after = products(model, tokens, 2 * len(lengths) * new_tokens)
            sustained = (before + after) / 2
            row = {"s": seconds, "GFLOP/s sustained": sustained / 1e9, "GFLOP/s best": best / 1e9}
            row |= {"share of sustained": flops / seconds / sustained, "share of best": flops / seconds / best}
            turn_rows[name].append(row)
            print(f"{turn + 1}/{turns} {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in turn_rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="chat")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, help="default smollm2-135m on a CPU, qwen2-0.5b-random on a GPU")
    parser.add_argument("--turns", type=int, default=8, help="updates of each kind")
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    name = args.model or ("qwen2-0.5b-random" if args.device == "cuda" else "smollm2-135m")
    workload = WORKLOADS[args.workload]
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory(name, Path(scratch))
        shape, tokenizer = read_shape(directory), load_tokenizer(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(args.device)
    prompts = draw_prompts(workload, tokenizer, 4 * PAIRS)
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    batches = [lengths[start : start + PAIRS] for start in range(0, len(lengths), PAIRS)]
    medians = compare(model, shape, batches, workload.new_tokens, args.turns)
    header = ["update", *next(iter(medians.values()))]
    cells = [[kind, *(f"{value:.3g}" for value in row.values())] for kind, row in medians.items()]
    print(f"\n{markdown(header, cells)}")


if __name__ == "__main__":
    main()
