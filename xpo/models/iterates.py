"""The policies that the iterations of a run began with, on disk."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from xpo.config.errors import ConfigError
from xpo.models.reference import Reference
from xpo.models.zero import gathered


class Iterates:
    """Keeps the trained parameters of a policy by optimizer step: DIRECTORY/step_N.safetensors."""

    def __init__(self, directory: Path):
        self.directory = directory

    def _file(self, step: int) -> Path:
        return self.directory / f"step_{step}.safetensors"

    def keep(self, policy: nn.Module, engine: nn.Module | None, step: int, writes: bool) -> None:
        """The policy as it is before this step. All processes together.

        Args:
            policy: unwrapped.
            engine: the ZeRO-3 engine around it, if there is one.
            writes: whether this process is the one of its machine that writes.
        """
        with gathered(policy, engine):
            if writes:
                self.directory.mkdir(parents=True, exist_ok=True)
                part = self._file(step).with_suffix(f".{uuid.uuid4().hex}")  # machines may share the directory
                trained = ((name, one) for name, one in policy.named_parameters() if one.requires_grad)
                save_file({name: one.detach().cpu().contiguous() for name, one in trained}, part)
                os.replace(part, self._file(step))

    def steps(self) -> list[int]:
        """The optimizer steps before which a policy was kept, in order."""
        return sorted(int(file.stem.removeprefix("step_")) for file in self.directory.glob("step_*.safetensors"))

    def drop_since(self, step: int) -> None:
        """Deletes the policies from before this step on: of a run that goes on there, or of another one before it."""
        for later in self.steps():
            if later >= step:
                self._file(later).unlink(missing_ok=True)  # machines may share the directory

    def values(self, step: int) -> dict[str, Tensor]:
        """What was kept, on the CPU; ConfigError if it is not there, for a run that goes on elsewhere."""
        if not self._file(step).is_file():
            raise ConfigError(
                f"resume: {str(self._file(step))!r} is missing, the policy that the iteration began with; "
                "go on in the run's own directory, with its iterations, max_steps and replay_updates"
            )
        return load_file(self._file(step))


class PastPolicies:
    """The policies that the iterations so far began with, one at a time.

    Args:
        model: which becomes each of them.

    Attributes:
        policies: their parameters, read when they are needed; set when an iteration begins.
    """

    def __init__(self, model: Reference):
        self.policies: list[Callable[[], dict[str, Tensor]]] = []
        self._model = model

    def __iter__(self) -> Iterator[AbstractContextManager[PreTrainedModel]]:
        """Each as a model within a block. All processes together."""
        return map(self._as_model, self.policies)

    @contextmanager
    def _as_model(self, values: Callable[[], dict[str, Tensor]]) -> Iterator[PreTrainedModel]:
        self._model.become(values())
        with self._model.model() as model:
            yield model
