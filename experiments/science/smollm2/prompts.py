"""Prompts whose usual answer scores badly and a rare one well: `python -m experiments.science.smollm2.prompts`.

The reference answers each candidate 64 times, as in training (24 tokens, temperature 1). `usual` is the median score of
these answers, `rare` the second best. Of the half of the candidates whose usual answers score worst, those with the
largest rare - usual are kept.
"""

import json
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xpo.config.options import SamplingOptions
from xpo.data.prompt_sets import load_prompts
from xpo.data.prompts import PromptEncoder
from xpo.models.loading import end_tokens, smollm2_directory
from xpo.rewards import EmbeddedReward
from xpo.sampling.noise import sampling_noise
from xpo.sampling.sampler import Sampler

HERE = Path(__file__).parent
SPLITS = {"train": 1, "heldout": 2}  # how often a prompt stands in the file: held-out ones are answered twice
ANSWERS, TOKENS = 64, 24
CANDIDATES = 64  # the first so many of each split of the embedded prompts
KEPT = 24


def scored(split: str) -> list[dict]:
    """The candidates of a split with what the reference's answers score."""
    torch.set_num_threads(1)
    directory = smollm2_directory()
    tokenizer, reward = AutoTokenizer.from_pretrained(directory), EmbeddedReward()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sampler = Sampler(tokenizer, SamplingOptions(max_new_tokens=TOKENS), end_tokens(model, tokenizer))
    encode = PromptEncoder(tokenizer)
    rows = list(load_prompts("data.train", "embedded", split))[:CANDIDATES]
    for number, row in enumerate(rows):
        noise = sampling_noise((number,), range(ANSWERS), TOKENS)
        drawn = sampler.sample(model, [encode(row["prompt"])] * ANSWERS, noise, model.device)
        scores = reward.scores([row["prompt"]] * ANSWERS, drawn.texts).sort().values
        row |= {"usual": round(scores.median().item(), 3), "rare": round(scores[-2].item(), 3)}
        print(split, number, row["usual"], row["rare"], flush=True)
    return rows


def hidden(rows: list[dict]) -> list[dict]:
    """Of the half of the prompts whose usual answers score worst, those with the largest rare - usual."""
    bad = sorted(rows, key=lambda row: row["usual"])[: len(rows) // 2]
    return sorted(bad, key=lambda row: row["usual"] - row["rare"])[:KEPT]


def main() -> None:
    with get_context("spawn").Pool(2) as pool:
        for split, rows in zip(SPLITS, pool.map(scored, SPLITS), strict=True):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in hidden(rows)] * SPLITS[split]
            (HERE / f"hidden_{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
