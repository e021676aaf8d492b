"""The keys and values that decoding keeps: written in place, and computed for the prompts in batches of similar length.

Notation for shapes: b rows, S tokens so far.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from xpo.models.logprobs import positions


class RoomyLayer(DynamicLayer):
    """Keys and values with room for the tokens to come, at most `room` in all.

    The library's layer copies all of them for each new token: on a CPU a fifth of the time to decode long prompts.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds new keys and values, (b, heads, new tokens, size); returns all of them, (b, heads, S, size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._memory = [states[:, :, :0] for states in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._memory[0].shape[2]:
            self._memory = [self._enlarged(states, end) for states in self._memory]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        return self.keys, self.values

    def _enlarged(self, states: Tensor, tokens: int) -> Tensor:
        # For twice as many tokens as there are: completions may end early.
        enlarged = states.new_empty(*states.shape[:2], max(tokens, min(2 * tokens, self.room)), states.shape[3])
        enlarged[:, :, : states.shape[2]] = states
        return enlarged


def roomy_cache(model: PreTrainedModel, room: int) -> DynamicCache | None:
    """An empty cache for `room` tokens; None for models whose cache holds anything else than all keys and values."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache


def prefill(cache: DynamicCache, model: PreTrainedModel, ids: Tensor, mask: Tensor, batches: list[list[int]]) -> None:
    """Fills an empty cache with left-padded prompts but for their last tokens, computed in batches.

    In one batch, short prompts cost as much as the longest.

    Args:
        cache: see `roomy_cache`.
        model: whose cache it is.
        ids: prompts, (b, P).
        mask: True on real tokens, (b, P).
        batches: rows that are computed together; each row is in one of them.
    """
    width, lengths = ids.shape[1], mask.sum(dim=1)
    # Prompts of one token have nothing to compute before their last one: they go along with longer ones.
    short = [row for rows in batches if lengths[rows].max() == 1 for row in rows]
    batches = [rows for rows in batches if lengths[rows].max() > 1]
    if not batches:
        return
    batches[-1] = batches[-1] + short
    for rows in batches:
        columns = slice(width - int(lengths[rows].max()), width - 1)
        real = mask[rows, columns]
        computed = model(
            input_ids=ids[rows, columns],
            attention_mask=real.long(),
            position_ids=positions(real),
            past_key_values=DynamicCache(config=model.config),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        for layer, new in zip(cache.layers, computed.layers, strict=True):
            if not layer.is_initialized:
                both = (new.keys, new.values)
                layer.update(*(part.new_zeros(len(ids), part.shape[1], width - 1, part.shape[3]) for part in both))
            layer.keys[rows, :, columns] = new.keys
            layer.values[rows, :, columns] = new.values
