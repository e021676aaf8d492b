"""Equal parts of a run, Algorithm 1's t: the policy that each begins with is kept, and may become the reference."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xpo.config.errors import ConfigError
from xpo.config.schema import as_argument, check_weights
from xpo.models.iterates import Iterates, PastPolicies
from xpo.models.reference import Reference
from xpo.sampling.draws import ReferenceDraws
from xpo.tracking.runs import ITERATES
from xpo.training.config import XPOConfig


def number(args: XPOConfig, state: TrainerState) -> int:
    """The iteration, from 0, of the optimizer step that `state` comes before."""
    rollouts = math.ceil(state.max_steps / args.replay_updates)
    return state.global_step // args.replay_updates * args.iterations // max(rollouts, 1)


class Iterations(TrainerCallback):
    """Keeps the policy that each iteration begins with, and moves to it what follows.

    Args:
        reference, draws: what becomes that policy, with `reference_update`.
        past: what draws from the policies so far, with the samplers "past" and "iterate".
    """

    def __init__(
        self,
        args: XPOConfig,
        reference: Reference,
        draws: ReferenceDraws,
        past: PastPolicies | None,
    ):
        self.args = args
        self.reference_since = 0  # optimizer steps before the reference moved last
        self._iterates = Iterates(Path(args.output_dir) / ITERATES)
        self._reference, self._draws, self._past = reference, draws, past

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leaves the policies that this run kept before the step it goes on from; ConfigError if they are not its.

        Or for weights of epochs that never come: now their number is known.
        """
        check_weights(self.args, self.args.iterations, -1, state.num_train_epochs, as_argument)
        begins = [self.begin(state, iteration) for iteration in range(self.args.iterations)]
        kept, expected = ([step for step in of if step < state.global_step] for of in (self._iterates.steps(), begins))
        if kept and kept != expected:
            raise ConfigError(
                f"resume: iterations in {str(self._iterates.directory)!r} began after the steps {kept}, which would be "
                f"{expected} at iterations={self.args.iterations}, max_steps={state.max_steps} and "
                f"replay_updates={self.args.replay_updates}; go on with the run's own"
            )
        if self.reference_since and self.begin(state) == 0:
            raise ConfigError(
                "reference_update='iteration': the reference has moved in an earlier train(); make a new trainer"
            )
        if self.args.local_process_index == 0:
            self._iterates.drop_since(state.global_step)

    def enter(self, policy: nn.Module, engine: nn.Module | None, state: TrainerState) -> None:
        """Before an optimizer step; all processes together.

        Args:
            policy: unwrapped.
            engine: the ZeRO-3 engine around it, if there is one.
        """
        if self.args.iterations == 1:
            return
        if state.max_steps < self.args.iterations * self.args.replay_updates:
            raise ConfigError(
                f"iterations={self.args.iterations} is more than the {state.max_steps} steps of the run hold at "
                f"replay_updates={self.args.replay_updates}; give more prompts or max_steps"
            )
        begun = self.begin(state)
        if begun == state.global_step:
            self._iterates.keep(policy, engine, begun, self.args.local_process_index == 0)
            self.args.distributed_state.wait_for_everyone()
        if self._past is not None:
            now = number(self.args, state)
            first = now if self.args.sampler == "iterate" else 0
            begins = [self.begin(state, iteration) for iteration in range(first, now + 1)]
            self._past.policies = [partial(self._iterates.values, step) for step in begins]
        if self.args.reference_update == "iteration" and begun != self.reference_since:
            self._reference.become(self._iterates.values(begun))
            self._draws.reference_has_moved()
            self.reference_since = begun

    def begin(self, state: TrainerState, iteration: int | None = None) -> int:
        """The optimizer steps before an iteration; None: before the current one."""
        iteration = number(self.args, state) if iteration is None else iteration
        rollouts = math.ceil(state.max_steps / self.args.replay_updates)
        return math.ceil(iteration * rollouts / self.args.iterations) * self.args.replay_updates
