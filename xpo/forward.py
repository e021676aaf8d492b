"""How log-probabilities are computed for a given model: with the prompt shared by its completions, or apart.

The shared forward (`xpo.logprobs.shared_prompt_logps`) saves the second computation of each prompt and the
logits that nobody needs. It is right only where attention follows the mask it is given and logits
are what the output embedding returns, which `why_separate` finds out by trying.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xpo.errors import ConfigError
from xpo.logprobs import completion_logps, replaced_forward, shared_prompt_logps

PairForward = Literal["auto", "shared", "separate"]
_MASKS = ("sdpa", "eager")  # attention implementations that take any mask of four dimensions


class Forward:
    """Summed log-probabilities of completions under one model.

    Args:
        model: unwrapped, on its device.
        how: "shared", "separate", or "auto": shared where that is right.
        longest: tokens of the longest row that will come.

    Raises:
        ConfigError: "shared" was asked for and would be wrong.
    """

    def __init__(self, model: PreTrainedModel, how: PairForward, longest: int):
        reason = "as asked for" if how == "separate" else why_separate(model, longest)
        if how == "shared" and reason is not None:
            raise ConfigError(f"pair_forward='shared' is wrong for this model: {reason}; set pair_forward=auto")
        self.shared = reason is None
        self.reason = reason
        self.head: nn.Module | None = model.get_output_embeddings()
        self.mask_dtype = _mask_dtype(model)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """float32 (K, b), from what `Rollout.pairs` returns.

        Args:
            model: the same model, wrapped for distributed training or not.
            batch: prompt_ids and prompt_mask, (b, P); completion_ids and completion_mask, (K, b, C).
        """
        texts = (batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"])
        if self.shared and self.head is not None:
            return shared_prompt_logps(model, self.head, self.mask_dtype, *texts)
        return completion_logps(model, *texts)


@torch.no_grad()
def why_separate(model: PreTrainedModel, longest: int) -> str | None:
    """Why completions must not share their prompt's forward; None if they may.

    Args:
        model: unwrapped, on its device.
        longest: tokens of the longest row that will come.
    """
    config = model.config.get_text_config().to_dict()
    attention = model.config._attn_implementation
    if attention not in _MASKS:
        return f"its attention {attention} takes no mask of four dimensions"
    for kind in set(config.get("layer_types") or ["full_attention"]) - {"full_attention"}:
        window = config.get("sliding_window") if kind == "sliding_attention" else None
        if window is None or window < longest:
            return f"it has layers of the kind {kind}" + (f" over {window} tokens" if window else "")
    window = config.get("sliding_window")
    if "layer_types" not in config and window is not None and window < longest:
        return f"its attention slides over {window} tokens"
    head = model.get_output_embeddings()
    if head is None:
        return "it has no output embedding"
    training = model.training
    model.eval()
    try:
        return _tried(model, head)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return f"it refuses such a row ({str(error).splitlines()[0]:.80})"
    finally:
        model.train(training)


def _tried(model: PreTrainedModel, head: nn.Module) -> str | None:
    """Both ways on two pairs of made-up tokens, one prompt padded; the reason if they differ."""
    device = model.device
    tokens = torch.arange(34, device=device) * 7 % min(model.config.get_text_config().vocab_size, 500)
    prompt_ids, ids, other_ids = tokens[:10].view(2, 5), tokens[10:22].view(2, 2, 3), tokens[22:34].view(2, 2, 3)
    prompt_mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    prompt_mask[1, :2] = False
    mask = torch.ones(2, 2, 3, dtype=torch.bool, device=device)
    dtype = _mask_dtype(model)

    marks = torch.arange(12.0, device=device) * 1000
    with replaced_forward(head, lambda hidden: marks):
        returned = model(input_ids=prompt_ids, attention_mask=prompt_mask.long(), use_cache=False).logits
    if returned.shape != marks.shape or not torch.equal(returned.float(), marks):
        return "it changes its logits after the output embedding"
    shared = shared_prompt_logps(model, head, dtype, prompt_ids, prompt_mask, ids, mask)
    others = torch.stack([other_ids[0], ids[1]])
    mixed = shared_prompt_logps(model, head, dtype, prompt_ids, prompt_mask, others, mask)
    apart = completion_logps(model, prompt_ids, prompt_mask, ids, mask)
    close = (1e-5 if model.dtype == torch.float32 else 1e-2) * apart.abs().max()
    if (shared[1] - mixed[1]).abs().max() > close or (shared - apart).abs().max() > close:
        return "its completions see each other, or its positions are not those that it is given"
    return None


def _mask_dtype(model: PreTrainedModel) -> torch.dtype:
    return torch.bool if model.config._attn_implementation == "sdpa" else model.dtype
