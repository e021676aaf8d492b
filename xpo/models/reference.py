"""The frozen model: a second one, or the base model under LoRA adapters."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from xpo.models.fingerprints import model_digest
from xpo.models.forward import eval_mode
from xpo.models.zero import frozen_copy, gathered, overwriting

logger = logging.getLogger(__name__)


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model that computes: `model` itself, or the one its LoRA layers sit in."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class Reference:
    """pi_ref. Use it as `with reference.model() as model:`, on all processes together.

    Args:
        policy: the unwrapped policy, before training.
        ref_model: the reference; None stands for the policy as it is now: a frozen copy, or, if it has adapters, its
            base model, with a copy of these adapters if they have learned something already.
        device, dtype: of a second model; None leaves its dtype as it is.
        policy_engine: the ZeRO-3 engine around the policy, once there is one.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
        policy_engine: Callable[[], nn.Module | None] = lambda: None,
    ):
        self._adapted: Any = policy if ref_model is None and isinstance(policy, PeftModel) else None
        self._policy_engine = policy_engine
        self._start: dict[str, Tensor] = {}  # the adapters' own parameters in it, if they do anything
        self.frozen: PreTrainedModel | None = None
        if self._adapted is not None and _has_learned(self._adapted):
            logger.warning("xpo: the reference is the policy as it is now, with its adapters; ref_model is another one")
            with gathered(policy):
                own = ((name, part) for name, part in policy.named_parameters() if part.requires_grad)
                self._start = {name: part.detach().clone() for name, part in own}
        if self._adapted is None:
            frozen = frozen_copy(policy) if ref_model is None else base_model(ref_model)
            self.frozen = frozen.requires_grad_(False).eval().to(device)
            if dtype is not None:  # a quantised model refuses any word of its dtype
                self.frozen = self.frozen.to(dtype)

    def become(self, values: dict[str, Tensor]) -> None:
        """Moves to these values of the policy's trained parameters, see `Iterates`. All processes together."""
        if self.frozen is None:
            self._start = values
            return
        with overwriting(self.frozen) as parameters, torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    @property
    def fingerprint(self) -> str:
        """Names the frozen weights; under new adapters those of the base model."""
        if self.frozen is not None or self._start:
            with self.model() as model:
                return model_digest(model)
        with gathered(self._adapted, self._policy_engine()):
            return model_digest(base_model(self._adapted), self._adapted.base_model.prefix)

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        """The whole reference as a transformers model. The policy's adapters are off, or as they were, in the block."""
        if self.frozen is not None:
            with gathered(self.frozen):
                yield self.frozen
            return
        # The unwrapped model: DistributedDataParallel has no disable_adapter.
        adapters = _values(self._adapted, self._start) if self._start else self._adapted.disable_adapter()
        with gathered(self._adapted, self._policy_engine()), adapters:
            yield base_model(self._adapted)


@torch.no_grad()
def _has_learned(model: PeftModel) -> bool:
    """Whether adapters change what the model computes: new ones do not."""
    tokens = torch.arange(4, device=model.device)[None]
    with gathered(model), eval_mode(model):
        adapted = model(input_ids=tokens).logits
        with model.disable_adapter():
            return not torch.equal(adapted, model(input_ids=tokens).logits)


@contextmanager
def _values(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Within, these parameters of a model have these values."""
    parameters = {name: part for name, part in model.named_parameters() if name in values}
    before = {name: part.data for name, part in parameters.items()}
    try:
        for name, part in parameters.items():
            part.data = values[name].to(part.device, part.dtype)
        torch.clear_autocast_cache()  # which has what they were
        yield
    finally:
        for name, part in parameters.items():
            part.data = before[name]
        torch.clear_autocast_cache()
