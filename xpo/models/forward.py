"""How log-probabilities are computed for a given model: with the prompt shared by its completions, or apart.

The shared forward (`xpo.models.logprobs.shared_prompt_logps`) saves the second computation of each prompt and the
logits that nobody needs. It is right only where attention follows the mask it is given and logits
are what the output embedding returns, which `why_not` finds out by trying.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xpo.config.errors import ConfigError, first_line
from xpo.models.attention import blocks_of_pairs, lengths_of_pairs, packed_attention
from xpo.models.logprobs import Layout, block_mask, completion_logps, replaced_forward, shared_prompt_logps

_MASKS = {"packed": ("sdpa",), "shared": ("sdpa", "eager")}  # attention implementations that can be told who sees whom


class Forward:
    """Summed log-probabilities of completions under one model.

    Args:
        model: unwrapped, on its device.
        how: "packed", "shared" or "separate"; or "auto": the first of them that is right, but packed on CPUs only.
        longest: tokens of the longest row that will come.
        device: where the model will be, which DeepSpeed puts there later; None: where it is.

    Attributes:
        reason: why completions do not share their prompt's forward; None if they do.

    Raises:
        ConfigError: "packed" or "shared" was asked for and would be wrong; or any padding would be.
    """

    def __init__(self, model: PreTrainedModel, how: str, longest: int, device: torch.device | None = None) -> None:
        if padding_counts(model):
            raise ConfigError(
                f"model={model.config.name_or_path or type(model).__name__} ignores the attention mask: prompts "
                "that are padded in a batch get other numbers; use another architecture"
            )
        self._model = model
        self._head: nn.Module | None = model.get_output_embeddings()
        self._way: str = "separate"
        self.reason: str | None = "as asked for"
        ways = [] if how == "separate" else [how]
        if how == "auto":
            ways = ["packed", "shared"] if (device or model.device).type == "cpu" else ["shared"]
        for way in ways:
            self.reason = why_not(way, model, longest)
            if self.reason is None:
                self._way = way
                break
            if how != "auto":
                raise ConfigError(f"pair_forward={how!r} is wrong for this model: {self.reason}; set pair_forward=auto")

    @property
    def way(self) -> str:
        """The way in force: gradient checkpointing computes layers again when the packed attention is gone."""
        if self._way == "packed" and any(vars(part).get("gradient_checkpointing") for part in self._model.modules()):
            return "shared"
        return self._way

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """float32 (K, b), from what `PairBatch.rows` returns.

        Args:
            model: the same model, wrapped for distributed training or not.
            batch: prompt_ids and prompt_mask, (b, P); completion_ids and completion_mask, (K, b, C).
        """
        way = self.way
        texts = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        if way == "separate" or self._head is None:
            return completion_logps(model, *texts)
        with _layout(way, self._model) as layout:
            return shared_prompt_logps(model, self._head, layout, *texts)


@contextmanager
def _layout(way: str, model: PreTrainedModel) -> Iterator[Layout]:
    """How pairs are put before a model, for as long as the block lasts."""
    if way == "packed":
        with packed_attention(model):
            yield Layout(True, blocks_of_pairs if model.device.type == "cuda" else lengths_of_pairs)
    else:
        dtype = torch.bool if model.config._attn_implementation == "sdpa" else model.dtype
        yield Layout(False, partial(block_mask, dtype=dtype))


@torch.no_grad()
def padding_counts(model: PreTrainedModel) -> bool:
    """Whether padding before a prompt changes the log-probabilities behind it: recurrent models may read it."""
    tokens = torch.arange(1, 13, device=model.device) * 7 % min(model.config.get_text_config().vocab_size, 500)
    prompt, ids = tokens[None, :8], tokens[None, None, 8:]
    real = torch.arange(8, device=model.device)[None] >= 4
    with eval_mode(model):
        padded = completion_logps(model, prompt, real, ids, torch.ones_like(ids, dtype=torch.bool))
        alone = completion_logps(model, prompt[:, 4:], real[:, 4:], ids, torch.ones_like(ids, dtype=torch.bool))
    return bool((padded - alone).abs().max() > 1e-2 * alone.abs().max())


@torch.no_grad()
def why_not(way: str, model: PreTrainedModel, longest: int) -> str | None:
    """Why completions must not share their prompt's forward; None if they may. Arguments as of `Forward`."""
    config = model.config.get_text_config().to_dict()
    attention = model.config._attn_implementation
    if "position_ids" not in signature(model.forward).parameters:
        return "it takes no positions"
    if attention not in _MASKS[way]:
        return f"its attention {attention} cannot be told which tokens see each other"
    for kind in set(config.get("layer_types") or ["full_attention"]) - {"full_attention"}:
        window = config.get("sliding_window") if kind == "sliding_attention" else None
        if window is None or window < longest:
            return f"it has layers of the kind {kind}" + (f" over {window} tokens" if window else "")
    window = config.get("sliding_window")
    if "layer_types" not in config and window is not None and window < longest:
        return f"its attention slides over {window} tokens"
    for name in ("window_size", "attention_window_size"):  # GPT-Neo's, RecurrentGemma's
        if 0 < (config.get(name) or 0) < longest:
            return f"some of its layers attend to {config[name]} tokens only"
    head = model.get_output_embeddings()
    if head is None:
        return "it has no output embedding"
    try:
        with eval_mode(model):
            return _tried(way, model, head)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        return f"it refuses such a row ({first_line(error):.80})"


def _tried(way: str, model: PreTrainedModel, head: nn.Module) -> str | None:
    """The logits of a row; both ways on two pairs of made-up tokens, one prompt padded. The reason if they differ."""
    device = model.device
    tokens = torch.arange(34, device=device) * 7 % min(model.config.get_text_config().vocab_size, 500)
    prompt_ids, ids, other_ids = tokens[:10].view(2, 5), tokens[10:22].view(2, 2, 3), tokens[22:34].view(2, 2, 3)
    prompt_mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    prompt_mask[1, :2] = False
    mask = torch.ones(2, 2, 3, dtype=torch.bool, device=device)

    marks = torch.arange(12.0, device=device) * 1000
    with replaced_forward(head, lambda hidden: marks):
        returned = model(input_ids=prompt_ids, attention_mask=prompt_mask.long(), use_cache=False).logits
    if returned.shape != marks.shape or not torch.equal(returned.float(), marks):
        return "it changes its logits after the output embedding"
    others = torch.stack([other_ids[0], ids[1]])
    with _layout(way, model) as layout:
        shared, mixed = (
            shared_prompt_logps(model, head, layout, prompt_ids, prompt_mask, part, mask) for part in (ids, others)
        )
    apart = completion_logps(model, prompt_ids, prompt_mask, ids, mask)
    exact = model.dtype == torch.float32 and device.type == "cpu"  # a GPU may multiply float32 as TF32
    close = (1e-5 if exact else 1e-2) * apart.abs().max()
    if (shared[1] - mixed[1]).abs().max() > close or (shared - apart).abs().max() > close:
        return "its completions see each other, or its positions are not those that it is given"
    return None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
