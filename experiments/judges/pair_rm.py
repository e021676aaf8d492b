"""PairRM, native against the original package: do the logits agree, and how fast is each?

    pip install 'xpo[pairrm-parity]'
    python experiments/judges/pair_rm.py --size base --pairs 32 --threads 1

Both backends of PairRMJudge read one random checkpoint of PairRM's shape (published: large) from a temporary
directory and answer for the same pairs, one order each: prompts of the embedded set, completions of 8 to 128
words out of the same texts. They take turns, and the seconds are those of this process's threads on the CPU, of the
clock on a GPU, so that other load on the machine matters little. Speed is the median of the repetitions, from
texts to logits; a ratio is the median of those within a repetition.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

import xpo
from xpo.judges import PairRMJudge

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from pair_rm_checkpoint import tiny_config, tiny_tokenizer, write_pair_rm

SHAPES = {  # layers, hidden size, heads, intermediate size; "tiny" is that of the tests
    "tiny": (2, 32, 4, 64),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}
VOCABULARY = 128_000

Pairs = tuple[list[str], list[str], list[str]]  # prompts, first and second completions


class Timing(NamedTuple):
    seconds: list[float]  # one number per repetition
    answer: Tensor


def embedded_prompts() -> list[str]:
    lines = (
        (Path(xpo.__file__).parent / "data" / "assets" / "prompts" / "train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    return [json.loads(line)["prompt"][0]["content"] for line in lines]


def draw_pairs(texts: list[str], count: int) -> Pairs:
    """Prompts with two completions each, whose numbers of words are log-uniform in 8 to 128."""
    rng = random.Random(0)
    words = " ".join(rng.sample(texts, len(texts))).split()

    def completion() -> str:
        length = round(2 ** rng.uniform(3, 7))
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    return rng.sample(texts, count), [completion() for _ in range(count)], [completion() for _ in range(count)]


def vocabulary_of_128k(texts: list[str]) -> Tokenizer:
    """Real pieces for the texts, then as many that never occur as DeBERTa-v3's vocabulary has in all."""
    tokenizer = json.loads(tiny_tokenizer(texts, vocab_size=4000).to_str())
    pieces = tokenizer["model"]["vocab"]
    pieces += [[f"\ue000{i}", -1e3] for i in range(VOCABULARY - len(pieces))]
    (mask,) = (token for token in tokenizer["added_tokens"] if token["content"] == "[MASK]")
    mask["id"] = VOCABULARY
    return Tokenizer.from_str(json.dumps(tokenizer))


def build(directory: Path, size: str, texts: list[str]) -> Path:
    """A random PairRM in the layout that the original's Blender loads."""
    config = tiny_config()
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size = SHAPES[size]
    if size == "tiny":
        return write_pair_rm(directory, tiny_tokenizer(), config)[1]
    config.position_buckets = 256
    config.initializer_range = 0.02  # with 0.25, so deep a network says the same of all texts
    return write_pair_rm(directory, vocabulary_of_128k(texts), config)[1]


def take_turns(repeats: int, clock: Callable[[], float], *functions: Callable[[], Tensor]) -> list[Timing]:
    """Runs each function `repeats` times, one after the other, and once before to warm up."""
    timings = [Timing([], function()) for function in functions]
    for _ in range(repeats):
        for timing, function in zip(timings, functions, strict=True):
            start = clock()
            function()  # its answer is on the CPU: a GPU has finished
            timing.seconds.append(clock() - start)
    return timings


def original_logits(judge: PairRMJudge, pairs: Pairs) -> Tensor:
    """What a caller of the package runs, without what PairRMJudge adds (cleaning of texts, ties)."""
    starts = range(0, len(pairs[0]), judge.batch_size)
    return torch.cat([judge.original.logits(*(part[i : i + judge.batch_size] for part in pairs)) for i in starts])


def ratio(slow: Timing, fast: Timing) -> str:
    """Median, and the lowest and highest of the repetitions."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="base")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of both backends")
    parser.add_argument("--short", action="store_true", help="leave out one order and bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.device == "cpu" else time.perf_counter

    texts = embedded_prompts()
    pairs = draw_pairs(texts, options.pairs)
    with tempfile.TemporaryDirectory() as directory:
        model = str(build(Path(directory), options.size, texts))
        settings = {"device": options.device, "dtype": options.dtype}
        native = PairRMJudge(model, **settings)
        one_order = PairRMJudge(model, both_orders=False, **settings)
        bfloat16 = PairRMJudge(model, device=options.device, dtype="bfloat16")
        original = PairRMJudge(model, backend="llm_blender", **settings)
    judges = (native, one_order, bfloat16, original)

    parameters = sum(weight.numel() for weight in native.network.parameters())
    lengths = [len(ids) for part in pairs for ids in native._tokens(part)]
    print(
        f"{options}; {parameters / 1e6:.0f} M parameters; {sum(lengths) / options.pairs:.0f} tokens a pair on average"
    )
    print("batch | native pairs/s | llm-blender pairs/s | native is faster by | largest difference of logits")
    for batch_size in options.batch_sizes:
        for judge in judges:
            judge.batch_size = batch_size
        ours, theirs = take_turns(
            options.repeats, clock, lambda: native.preferences(*pairs) / 2, lambda: original_logits(original, pairs)
        )
        speeds = [f"{options.pairs / statistics.median(timing.seconds):.2f}" for timing in (ours, theirs)]
        difference = (ours.answer - theirs.answer).abs().max()
        print(f"{batch_size} | {' | '.join(speeds)} | {ratio(theirs, ours)} | {difference:.1e}")

    if options.short:
        return
    both, one, half = take_turns(
        options.repeats, clock, *(lambda judge=judge: judge.margins(*pairs) for judge in (native, one_order, bfloat16))
    )
    logits = native.preferences(*pairs) / 2
    print(f"batch {batch_size}: logits are {logits.abs().mean():.2g} in the mean")
    print(f"one order against both: faster by {ratio(both, one)}")
    difference, flips = (half.answer - both.answer).abs(), (half.answer * both.answer < 0).sum()
    print(
        f"bfloat16 against {options.dtype}: faster by {ratio(both, half)}; margins differ by {difference.mean():.1e} "
        f"in the mean, {difference.max():.1e} at most, of {both.answer.abs().mean():.2g}; {flips} other winners"
    )


if __name__ == "__main__":
    main()
