"""A sequence that the reference almost never draws, looked for by a transformer under XPOTrainer: see README.md."""

import math
from collections.abc import Iterable, Sequence
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from experiments.science.common import BASELINES, CONTROL, PER_TOKEN, SAMPLERS, TUNING, Method, Outcome, Results
from experiments.science.lock import locks
from xpo import XPOConfig, XPOTrainer
from xpo.config.compose import checked, compose
from xpo.launch.build import build_arguments
from xpo.sampling.noise import sampling_noise
from xpo.tracking.terminal import quiet

HERE = Path(__file__).parent
TASKS = {  # the probability of the hidden sequence under the reference, and its length
    "1e-4, length 3": (1e-4, 3),
    "1e-3, length 3": (1e-3, 3),
    "1e-2, length 3": (1e-2, 3),
    "1e-4, length 12": (1e-4, 12),
    "1e-4, length 6": (1e-4, 6),
}
REPORTED, TUNED_ON = range(100, 120), TUNING[:8]
GRID = {  # of alpha, three each
    "xpo": (1e-3, 3e-3, 1e-2),
    "selm": (1e-2, 3e-2, 1e-1),
    "popo": (1.2e-2, 4e-2, 1.2e-1),
    "geb_p": (1e-1, 3e-1, 1.0),
    f"geb_p{PER_TOKEN}": (3e-2, 1e-1, 3e-1),
    "geb_inverse": (1e-6, 1e-5, 1e-4),
    "geb_arctanh": (3e-3, 1e-2, 3e-2),
}
FLIPPED = Method("xpo", "reference", -3e-3)
EVERY, DRAWS = 10, 64  # rounds between two gaps; sequences of each lock that a KL is estimated from
ELSEWHERE = 2.0  # the reward of all other sequences


class Watch(TrainerCallback):
    """Whether each lock's policy has found its sequence, before each round and at the end; and sometimes its gap."""

    def __init__(self, task: str, seeds: Sequence[int]):
        probability, self.length = TASKS[task.removeprefix(CONTROL)]
        self.count, self.reward = len(seeds), locks.control if task.startswith(CONTROL) else locks.reward
        self.hidden_reward = self.reward([], ["c" * self.length])[0]
        self.reference = torch.tensor(locks.probabilities(probability, self.length)).log()
        values = torch.tensor([math.log(probability), math.log1p(-probability)]).double()
        self.log_of_hidden, self.values = math.log(probability), values
        self.found: list[Tensor] = []
        self.gaps: list[Tensor] = []
        self.trainer: XPOTrainer

    def on_step_begin(self, args: XPOConfig, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.replay_updates == 0:
            self.look(state.global_step // args.replay_updates)

    @torch.no_grad()
    def look(self, turn: int, last: bool = False) -> None:
        model, beta = self.trainer.model.eval(), self.trainer.beta
        prompts = 1 + locks.TOKENS * torch.arange(self.count)
        sequences = torch.cat([prompts[:, None], (prompts + locks.ACTIONS)[:, None].expand(-1, self.length)], 1)
        found = self.logps(model, sequences).gather(2, torch.full((self.count, self.length, 1), locks.ACTIONS - 1))
        self.found.append(found.sum((1, 2)).exp())
        if turn % EVERY == 0 or last:
            every = prompts.repeat_interleave(DRAWS)
            noise = sampling_noise((self.trainer.args.seed, turn, 99), range(len(every)), self.length)
            drawn = self.trainer.sampler.sample(model, every[:, None].tolist(), noise, torch.device("cpu"))
            logps = self.logps(model, torch.cat([every[:, None], drawn.ids], 1))
            kl = (logps.exp() * (logps - self.reference)).sum((1, 2)).view(self.count, DRAWS).mean(1)
            rewards = torch.tensor([self.hidden_reward, ELSEWHERE]).double()
            optimum = beta * torch.logsumexp(self.values + rewards / beta, 0)
            self.gaps.append(optimum - ELSEWHERE - (self.hidden_reward - ELSEWHERE) * self.found[-1] + beta * kl)
        model.train()

    def logps(self, model: Any, sequences: Tensor) -> Tensor:
        """log pi of each action at each place of sequences behind a prompt, (N, T, A)."""
        own = sequences[:, :1, None] + 1 + torch.arange(locks.ACTIONS)
        logits = model(sequences).logits[:, :-1].log_softmax(-1)
        return logits.gather(2, own.expand(-1, logits.shape[1], -1))


def run(task: str, method: Method, seeds: Sequence[int]) -> dict[str, Outcome]:
    """The lock of each seed, all in one run of the trainer, through the configuration of `experiment=lock`."""
    watch, options = Watch(task, seeds), method.options()
    words = [f"sampler={method.second}", f"loss.bonus={options.bonus}", f"loss.alpha={abs(method.alpha)}"]
    words += [f"loss.bonus_per_token={options.bonus_per_token}", f"generation.max_new_tokens={watch.length}"]
    words += [f"training.per_device_train_batch_size={16 * len(seeds)}", "training.tokens_per_micro_batch=1000000"]
    words += ["training.save_strategy=no", "training.disable_tqdm=true", f"training.seed={seeds[0]}"]
    quiet()
    with TemporaryDirectory() as directory:
        args = build_arguments(checked(compose(["experiment=lock", *words])[0]), Path(directory))
        if method.alpha < 0:  # which no configuration may ask for
            args.alpha = method.alpha
        trainer = XPOTrainer(
            locks.Locks(seeds, locks.probabilities(*TASKS[task.removeprefix(CONTROL)])),
            args=args,
            reward_model=watch.reward,
            processing_class=locks.tokenizer(len(seeds)),
            train_dataset=Dataset.from_dict({"prompt": [str(lock) for lock in range(len(seeds))] * 16}),
            callbacks=[watch],
        )
        watch.trainer = trainer
        trainer.train()
        rounds = args.max_steps // args.replay_updates
        watch.look(rounds, last=True)
    found, gaps = torch.stack(watch.found, 1), torch.stack(watch.gaps, 1)
    lost_last = torch.where(found <= 0.5, torch.arange(rounds + 1), -1).amax(1).tolist()
    logged = [log["exploration/bonus_share"] for log in trainer.state.log_history if "exploration/bonus_share" in log]
    return {
        str(seed): Outcome(
            None if last == rounds else (last + 1) * 16,
            gap[-1].item(),
            gap[1:].mean().item(),
            sum(logged) / len(logged),
        )
        for seed, last, gap in zip(seeds, lost_last, gaps, strict=True)
    }


def compute(cell: tuple[str, Method, Sequence[int]]) -> dict[str, Outcome]:
    torch.set_num_threads(1)  # sums in one order
    return run(*cell)


def fill(results: Results, cells: Iterable[tuple[str, Method, Sequence[int]]]) -> None:
    """Computes what is not there, two cells at a time; they are written in their order."""
    todo = [cell for cell in cells if not results.of(*cell)]
    with get_context("spawn").Pool(2) as pool:
        for (task, method, _), found in zip(todo, pool.imap(compute, todo), strict=True):
            results.add(task, method, found)


def main() -> None:
    results = Results(HERE / "results.csv", REPORTED)
    for task in TASKS:
        kinds = list(product(GRID, SAMPLERS if task.endswith("length 3") else SAMPLERS[:1]))
        fill(results, [(task, Method(*kind, alpha), TUNED_ON) for kind in kinds for alpha in GRID[kind[0]]])
        methods = [*BASELINES[:2], *(results.tuned(task, *kind) for kind in kinds), FLIPPED]
        controls = [CONTROL + task] if task.endswith("length 3") else []
        fill(results, [(name, method, REPORTED) for name in (task, *controls) for method in methods])


if __name__ == "__main__":
    main()
