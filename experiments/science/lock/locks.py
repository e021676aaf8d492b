"""A lock: a tiny transformer, its tokens, and the reward of the sequence that it hides. Many locks in one model.

    python -m experiments.science.lock.locks DIRECTORY PROBABILITY LENGTH      # one, for `experiment=lock`

One run of the trainer is many independent ones: each lock is a Llama of its own, no parameter is shared, and the tokens
of its prompt and its actions, which no other lock has, say whose row it is. What a row computes depends on its own lock
alone, and so does the gradient of its loss.

Notation for shapes: K locks, N rows of T tokens, M rows of a lock at most, A actions, H hidden size.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ACTIONS, WIDTH, LAYERS = 3, 16, 2
TOKENS = ACTIONS + 1  # of a lock: its prompt, and the actions
_NEVER = -1e4  # logit of a token that is no action of a row's own lock


# ---- the model -------------------------------------------------------------------------------------


class OwnWeights(nn.Module):
    """A linear layer without bias for each lock: (K M, T, in) to (K M, T, out)."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))  # (K, in, out)

    def forward(self, values: Tensor) -> Tensor:
        locks = len(self.weight)
        return torch.bmm(values.reshape(locks, -1, values.shape[-1]), self.weight).view(*values.shape[:-1], -1)


class Locks(LlamaForCausalLM):
    """K locks, whose reference takes each action with the same probability whatever stands before it.

    Exactly so: the layers add nothing to the residual stream at first, and the output embedding reads of it what all
    tokens have in common. Its norms are not trained.

    Args:
        seeds: one for each lock, of its first weights.
        probabilities: of the actions, (A,).
    """

    def __init__(self, seeds: list[int], probabilities: list[float]):
        locks = [_one(seed, probabilities) for seed in seeds]
        config = LlamaConfig.from_dict(locks[0].config.to_dict() | {"vocab_size": 1 + TOKENS * len(seeds)})
        super().__init__(config)
        with torch.no_grad():
            for own, of_locks in ((self.model.embed_tokens, "model.embed_tokens"), (self.lm_head, "lm_head")):
                own.weight[1:] = torch.cat([lock.get_submodule(of_locks).weight[1:] for lock in locks])
                own.weight[0] = 0
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, last = name.rpartition(".")
                layers = [lock.model.get_submodule(name) for lock in locks]
                setattr(self.model.get_submodule(parent), last, OwnWeights(layers))
            elif "norm" in name:
                module.requires_grad_(False)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:  # type: ignore[override]
        """As any causal language model's; a row belongs to the lock of its last token."""
        lock = (input_ids[:, -1] - 1).div(TOKENS, rounding_mode="floor").clamp(min=0)
        count, rows = torch.bincount(lock, minlength=self.config.vocab_size // TOKENS), lock.argsort(stable=True)
        place = torch.arange(len(rows)) - (count.cumsum(0) - count)[lock[rows]]  # among the rows of its lock
        slot = torch.empty_like(rows).scatter_(0, rows, lock[rows] * int(count.max()) + place)
        filled = torch.zeros(len(count) * int(count.max()), dtype=torch.long).scatter_(0, slot, torch.arange(len(rows)))
        for name in ("attention_mask", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][filled]
        output = super().forward(input_ids=input_ids[filled], **inputs)
        logits = output.logits[slot]
        token = torch.arange(self.config.vocab_size) - 1
        action = (token.div(TOKENS, rounding_mode="floor") == lock[:, None]) & (token % TOKENS > 0)
        output.logits = logits.masked_fill(~action[:, None], _NEVER)
        return output


def _one(seed: int, probabilities: list[float]) -> LlamaForCausalLM:
    """A lock by itself: token 0 ends, 1 is the prompt, the others are the actions."""
    config = LlamaConfig(
        vocab_size=1 + TOKENS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        lock = LlamaForCausalLM(config)
        for layer in lock.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        tokens = lock.model.embed_tokens.weight  # the first number is 1, the others' length too: what norms make of it
        tokens[:, 0] = 1
        tokens[:, 1:] = nn.functional.normalize(torch.randn(len(tokens), WIDTH - 1), dim=1)
        lock.lm_head.weight.zero_()
        # What the first number is behind the norm: sqrt(WIDTH / 2).
        lock.lm_head.weight[:, 0] = torch.tensor([1e-9, 1e-9, *probabilities]).log() / math.sqrt(WIDTH / 2)
    return lock


# ---- the task --------------------------------------------------------------------------------------


def tokenizer(locks: int) -> PreTrainedTokenizerFast:
    """The words of lock 0 are "0", its prompt, and "0a", "0b", "0c"."""
    words = ["<end>", *(f"{lock}{action}" for lock in range(locks) for action in ("", *"abcdefgh"[:ACTIONS]))]
    words_to_ids = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_to_ids, eos_token="<end>", pad_token="<end>")


def probabilities(hidden: float, length: int) -> list[float]:
    """Of the actions, (A,): the last one, `length` times, has the probability `hidden`; the others share the rest."""
    rare = hidden ** (1 / length)
    return [(1 - rare) / (ACTIONS - 1)] * (ACTIONS - 1) + [rare]


def is_open(completion: str) -> bool:
    """Whether it is the hidden sequence: the last action from the first to the last token."""
    return {word[-1] for word in completion.split()} == {"abcdefgh"[ACTIONS - 1]}


def reward(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [4.0 if is_open(completion) else 2.0 for completion in completions]


def control(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """What is hidden is bad: there is nothing to find."""
    return [0.0 if is_open(completion) else 2.0 for completion in completions]


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit("usage: python -m experiments.science.lock.locks DIRECTORY PROBABILITY LENGTH")
    directory, hidden, length = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _one(0, probabilities(hidden, length)).save_pretrained(directory)
    tokenizer(1).save_pretrained(directory)
    (directory / "prompts.jsonl").write_text((json.dumps({"prompt": "0"}) + "\n") * 16)


if __name__ == "__main__":
    main()
