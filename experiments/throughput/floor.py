"""The least time a step's phases can take: FLOPs over the measured matmul rate, bytes over the measured bandwidth."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


class Shape(NamedTuple):
    """What a model's cost depends on."""

    matrices: Counter[tuple[int, int]]  # (outputs, inputs) of the layers' matrices, and how many there are
    body: int  # parameters in these
    head: int  # parameters of the vocabulary projection
    parameters: int
    layers: int
    attention_width: int  # all query heads together
    kv_width: int  # keys and values of all heads together


class Machine(NamedTuple):
    """What was measured of the device."""

    flops: float  # a second, in matrix products of the model's shapes
    bandwidth: float  # bytes a second, read and written, of a big copy
    element_size: int  # bytes of a number in these products


class Need(NamedTuple):
    """The least that a phase of one step takes."""

    flops: float
    bytes: float
    seconds: float


def read_shape(directory: Path) -> Shape:
    """The shape of the model in `directory`, without its weights."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    matrices = Counter(
        tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    )
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        matrices=matrices,
        body=sum(rows * columns * count for (rows, columns), count in matrices.items()),
        head=head.weight.numel(),
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * head_width,
        kv_width=2 * config.num_key_value_heads * head_width,
    )


def best_seconds(function: Callable[[], object], device: str, at_least: float = 0.5) -> float:
    """The fastest of ten repetitions and more, for half a second: other load on the machine only slows one down."""
    times: list[float] = []
    calls = 20 if device == "cuda" else 1  # to start and to await a call takes as long as a small product
    begin = time.perf_counter()
    while len(times) < 11 or time.perf_counter() - begin < at_least:
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        _wait(device)
        times.append((time.perf_counter() - started) / calls)
    return min(times[1:])  # the first one warms up


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: Shape, device: str) -> Machine:
    """Matmul rate over the model's matrices and the bandwidth of a copy: seconds of work."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens, copied = (16_384, 2**31) if device == "cuda" else (1024, 2**28)
    flops = seconds = 0.0
    for (rows, columns), count in shape.matrices.items():
        weight = torch.randn(rows, columns, device=device, dtype=dtype)
        inputs = torch.randn(tokens, columns, device=device, dtype=dtype)
        flops += count * 2 * tokens * rows * columns
        seconds += count * best_seconds(lambda a=inputs, b=weight: a @ b.T, device)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    return Machine(flops / seconds, 2 * copied / copy, dtype.itemsize)


def better(one: Machine, other: Machine) -> Machine:
    """The faster of two measurements of a machine, rate by rate."""
    return Machine(max(one.flops, other.flops), max(one.bandwidth, other.bandwidth), one.element_size)


def forward_flops(shape: Shape, prompts: Sequence[int], completions: int, new_tokens: int) -> float:
    """A forward over [prompt | completion | ...] per prompt, each completion seeing the prompt and itself.

    Logits are needed on completion tokens only.
    """
    total = 0.0
    for prompt in prompts:
        tokens = prompt + completions * new_tokens
        seen = prompt**2 / 2 + completions * new_tokens * (prompt + new_tokens / 2)  # pairs of positions
        total += 2 * shape.body * tokens + 2 * shape.head * completions * new_tokens
        total += 4 * shape.layers * shape.attention_width * seen
    return total


def sampling_need(shape: Shape, machine: Machine, prompts: Sequence[int], new_tokens: int) -> Need:
    """One completion per prompt: the prompts at the matmul rate, then per token the weights and the cache once."""
    prefill = forward_flops(shape, prompts, 0, 0)
    need = Need(prefill, 0.0, prefill / machine.flops)
    per_token = 2 * (shape.body + shape.head) * len(prompts)
    for position in range(new_tokens):
        context = sum(prompts) + position * len(prompts)
        flops = per_token + 4 * shape.layers * shape.attention_width * context
        moved = machine.element_size * (shape.body + shape.head + shape.layers * shape.kv_width * context)
        seconds = max(flops / machine.flops, moved / machine.bandwidth)
        need = Need(need.flops + flops, need.bytes + moved, need.seconds + seconds)
    return need


def step_needs(
    shape: Shape, machine: Machine, prompts: Sequence[int], new_tokens: int, draws: int | None
) -> dict[str, Need]:
    """The least that each phase of a step takes.

    rollout: y; and y~ for `draws` such steps at once, one of which pays its share, or None if the store has y~.
    reference: a forward of the reference over [prompt | y]; it knew log pi_ref(y~) when it drew y~.
    update: a forward over [prompt | y | y~] and a backward of twice that.
    optimizer: AdamW reads weight, gradient and two moments, and writes three of them, in float32.
    """
    sampling = sampling_need(shape, machine, prompts, new_tokens)
    if draws is not None:
        together = sampling_need(shape, machine, [*prompts] * draws, new_tokens)
        sampling = Need(*(policy + reference / draws for policy, reference in zip(sampling, together, strict=True)))
    reference = forward_flops(shape, prompts, 1, new_tokens)
    update = 3 * forward_flops(shape, prompts, 2, new_tokens)
    optimizer = 7 * 4 * shape.parameters
    return {
        "rollout": sampling,
        "reference": Need(reference, 0.0, reference / machine.flops),
        "update": Need(update, 0.0, update / machine.flops),
        "optimizer": Need(0.0, optimizer, optimizer / machine.bandwidth),
    }
