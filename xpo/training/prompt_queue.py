"""The prompts of an optimizer step, and a look at those of the next ones."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import TrainerState

from xpo.data.prompt_sets import prompts_of
from xpo.sampling.pairs import StepPrompts
from xpo.training.config import XPOConfig

MicroBatch = dict[str, list[Any]]  # see `xpo.data.prompt_sets.collate_prompts`


class PromptQueue:
    """Takes the micro-batches of an epoch; `reads_ahead` if a store keeps what the reference draws early."""

    def __init__(self, args: XPOConfig, reads_ahead: bool):
        self.args = args
        self.reads_ahead = reads_ahead
        self._epoch: Iterator[MicroBatch] | None = None
        self._waiting: deque[MicroBatch] = deque()  # of this epoch, read already

    def step(self, epoch: Iterator[MicroBatch], number: int, state: TrainerState) -> StepPrompts:
        """The prompts of `number` micro-batches, of fewer at the end of the epoch, and of the run.

        Args:
            epoch: the rest of it.
            number: micro-batches of an optimizer step.
            state: says how many optimizer steps are left, this one included: nothing is read for later ones.
        """
        if epoch is not self._epoch:
            self._epoch, self._waiting = epoch, deque()
        steps_left = state.max_steps - state.global_step
        if steps_left <= 0 < state.global_step:  # killed behind its last checkpoint: the Trainer would go on
            number = 0
        prompts = sum(len(batch["prompt_ids"]) for batch in self._waiting)
        while len(self._waiting) < number or (
            self.reads_ahead
            and len(self._waiting) < steps_left * self.args.gradient_accumulation_steps
            and prompts + self.args.per_device_train_batch_size <= self.args.reference_batch_size
        ):
            batch = next(epoch, None)
            if batch is None:
                break
            self._waiting.append(batch)
            prompts += len(batch["prompt_ids"])
        batches = [self._waiting.popleft() for _ in range(min(number, len(self._waiting)))]
        sizes = [len(batch["prompt"]) for batch in batches]
        # Micro-batch m of rank r is number m * world + r of the optimizer batch, as accelerate deals them.
        world, rank, full = self.args.world_size, self.args.process_index, self.args.per_device_train_batch_size
        rows = [(m * world + rank) * full + i for m, size in enumerate(sizes) for i in range(size)]

        def column(name: str, batches: Iterable[MicroBatch]) -> list[Any]:
            return [value for batch in batches for value in batch[name]]

        return StepPrompts(
            prompts=prompts_of({name: column(name, batches) for name in (batches[0] if batches else ("prompt",))}),
            ids=column("prompt_ids", batches),
            rows=rows,
            sizes=sizes,
            ahead=column("prompt_ids", self._waiting),
            occurrences=column("occurrence", [*batches, *self._waiting]),
        )
