"""What is measured of locks while they are trained: whether they are open, and how far from the optimum they are.

Notation for shapes: K locks, N sequences of T actions behind a prompt, A actions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from experiments.science.lock import locks
from xpo import XPOConfig, XPOTrainer
from xpo.sampling.noise import sampling_noise

EVERY, DRAWS = 10, 64  # rounds between two gaps; sequences of each lock that its KL is estimated from
STREAM = 99  # of noise, none of the trainer's


class Watch(TrainerCallback):
    """Looks before each rollout, and when `look` is called at the end.

    Args:
        reward: `locks.reward` or `locks.control`.
        hidden: the probability of the hidden sequence under the reference.
        length: its actions.
        count: K.

    Attributes:
        trainer: must be set before it trains.
        found: pi(hidden) of each lock before each rollout and at the end, (K,) each.
        gaps: the optimum less J = E[reward] - beta KL, before every tenth rollout and at the end, (K,) each. KL is a
            mean over sequences of the policy, of the exact KL at each of their places.
    """

    def __init__(self, reward: Callable[..., list[float]], hidden: float, length: int, count: int):
        self.length, self.count, self.hidden = length, count, hidden
        self.best, self.others = reward([], ["c" * length, "a" * length])
        self.reference = torch.tensor(locks.probabilities(hidden, length)).log()
        self.prompts = 1 + locks.TOKENS * torch.arange(count)
        self.found: list[Tensor] = []
        self.gaps: list[Tensor] = []
        self.trainer: XPOTrainer

    def on_step_begin(self, args: XPOConfig, state: Any, control: Any, **_: Any) -> None:
        rounds, later = divmod(state.global_step, args.replay_updates)
        if not later:
            self.look(rounds, with_gap=rounds % EVERY == 0)

    @torch.no_grad()
    def look(self, rounds: int, with_gap: bool = True) -> None:
        """After so many rounds."""
        model, beta = self.trainer.model.eval(), self.trainer.beta
        self.found.append(logps(model, hidden_sequences(self.count, self.length))[:, :, -1:].sum((1, 2)).exp())
        if with_gap:
            prompts = self.prompts.repeat_interleave(DRAWS)[:, None]
            noise = sampling_noise((self.trainer.args.seed, rounds, STREAM), range(len(prompts)), self.length)
            drawn = self.trainer.sampler.sample(model, prompts.tolist(), noise, torch.device("cpu"))
            kl = self.kl(model, torch.cat([prompts, drawn.ids], 1)).view(self.count, DRAWS).mean(1)
            self.gaps.append(self.optimum(beta) - self.others - (self.best - self.others) * self.found[-1] + beta * kl)
        model.train()

    def kl(self, model: PreTrainedModel, sequences: Tensor) -> Tensor:
        """The sum, over the places of each sequence, of KL(pi, pi_ref) of the next action, (N,)."""
        policy = logps(model, sequences)
        return (policy.exp() * (policy - self.reference)).sum((1, 2))

    def optimum(self, beta: float) -> float:
        """The largest J: beta log E_ref[exp(reward / beta)]."""
        logs = math.log(self.hidden) + self.best / beta, math.log1p(-self.hidden) + self.others / beta
        return beta * torch.tensor(logs).double().logsumexp(0).item()


def hidden_sequences(count: int, length: int) -> Tensor:
    """Each lock's prompt, and its last action so many times, (K, 1 + T)."""
    prompts = 1 + locks.TOKENS * torch.arange(count)[:, None]
    return torch.cat([prompts, (prompts + locks.ACTIONS).expand(-1, length)], 1)


def logps(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """log pi of each action at each place of sequences, with their prompt in front, (N, T, A)."""
    actions = sequences[:, :1] + 1 + torch.arange(locks.ACTIONS)
    of_all = model(sequences).logits[:, :-1].log_softmax(-1)
    return of_all.gather(2, actions[:, None].expand(-1, of_all.shape[1], -1))
