"""The frozen model: a second one, or the base model under LoRA adapters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from xpo.models.fingerprints import model_digest
from xpo.models.zero import frozen_copy, gathered


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model that computes: `model` itself, or the one its LoRA layers sit in."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class Reference:
    """pi_ref. Use it as `with reference.model() as model:`, on all processes together.

    Args:
        policy: the unwrapped policy, before training.
        ref_model: the reference; None stands for the base model if the policy has LoRA adapters, and
            for a frozen copy of the policy otherwise.
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
        self.frozen: PreTrainedModel | None = None
        if self._adapted is None:
            frozen = frozen_copy(policy) if ref_model is None else ref_model
            self.frozen = frozen.requires_grad_(False).eval().to(device)
            if dtype is not None:  # a quantised model refuses any word of its dtype
                self.frozen = self.frozen.to(dtype)

    @property
    def fingerprint(self) -> str:
        """Names the frozen weights; under LoRA those of the base model."""
        if self.frozen is not None:
            with gathered(self.frozen):
                return model_digest(self.frozen)
        with gathered(self._adapted, self._policy_engine()):
            return model_digest(base_model(self._adapted), self._adapted.base_model.prefix)

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        """The whole reference as a transformers model. Under LoRA its adapters are off inside the block."""
        if self.frozen is not None:
            with gathered(self.frozen):
                yield self.frozen
        else:
            # The unwrapped model: DistributedDataParallel has no disable_adapter.
            with gathered(self._adapted, self._policy_engine()), self._adapted.disable_adapter():
                yield base_model(self._adapted)
