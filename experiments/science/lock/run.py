"""A sequence that the reference almost never draws, looked for by a transformer under XPOTrainer: see README.md."""

from collections.abc import Iterable, Sequence
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset

from experiments.science.common import (
    BASELINES,
    CONTROL,
    PER_TOKEN,
    SAMPLERS,
    TUNING,
    Method,
    Outcome,
    Results,
    plot_shares,
    table,
    write_block,
)
from experiments.science.lock import locks
from experiments.science.lock.watch import Watch
from xpo import XPOTrainer
from xpo.config.compose import checked, compose
from xpo.launch.build import build_arguments
from xpo.tracking.terminal import quiet
from xpo.training.callbacks import PrintLines

HERE = Path(__file__).parent
PAIRS = 16  # of each lock in a round
TASKS = {  # the probability of the hidden sequence under the reference, and its length
    "1e-4, length 3": (1e-4, 3),
    "1e-4, length 12": (1e-4, 12),
    "1e-3, length 3": (1e-3, 3),
    "1e-2, length 3": (1e-2, 3),
    "1e-4, length 6": (1e-4, 6),
}
REPORTED, TUNED_ON = range(100, 120), TUNING[:8]
GRID = {  # of alpha, four each
    "xpo": (1e-3, 3e-3, 1e-2, 3e-2),
    "selm": (1e-2, 3e-2, 1e-1, 3e-1),
    "popo": (1.2e-2, 4e-2, 1.2e-1, 4e-1),
    "geb_p": (3e-2, 1e-1, 3e-1, 1.0),
    f"geb_p{PER_TOKEN}": (3e-2, 1e-1, 3e-1, 1.0),
    "geb_inverse": (1e-6, 1e-5, 1e-4, 1e-3),
    "geb_arctanh": (3e-3, 1e-2, 3e-2, 1e-1),
}
FLIPPED = Method("xpo", "reference", -3e-3)


def run(task: str, method: Method, seeds: Sequence[int], *further: str) -> dict[str, Outcome]:
    """The lock of each seed, all in one run of the trainer, through the configuration of `experiment=lock`."""
    count, options, (hidden, length) = len(seeds), method.options(), TASKS[task.removeprefix(CONTROL)]
    reward = locks.control if task.startswith(CONTROL) else locks.reward
    words = [f"sampler={method.second}", f"loss.bonus={options.bonus}", f"loss.alpha={abs(method.alpha)}"]
    words += [f"loss.bonus_per_token={options.bonus_per_token}", f"generation.max_new_tokens={length}"]
    words += [f"training.per_device_train_batch_size={PAIRS * count}", "training.tokens_per_micro_batch=1000000"]
    words += ["training.save_strategy=no", "training.disable_tqdm=true", f"training.seed={seeds[0]}"]
    quiet()
    with TemporaryDirectory() as directory:
        args = build_arguments(checked(compose(["experiment=lock", *words, *further])[0]), Path(directory))
        if method.alpha < 0:  # which no configuration may ask for
            args.alpha = method.alpha
        watch = Watch(reward, hidden, length, count)
        trainer = XPOTrainer(
            locks.Locks(seeds, locks.probabilities(hidden, length)),
            args=args,
            reward_model=reward,
            processing_class=locks.tokenizer(count),
            train_dataset=Dataset.from_dict({"prompt": [str(lock) for lock in range(count)] * PAIRS}),
            callbacks=[watch],
        )
        watch.trainer = trainer
        trainer.remove_callback(PrintLines)
        trainer.train()
        rounds = args.max_steps // args.replay_updates
        watch.look(rounds)
    lost = torch.stack(watch.found, 1) <= 0.5
    last_lost = torch.where(lost, torch.arange(rounds + 1), -1).amax(1).tolist()
    history = trainer.state.log_history
    share = [log["exploration/bonus_share"] for log in history if "exploration/bonus_share" in log]
    return {
        str(seed): Outcome(
            None if last == rounds else (last + 1) * PAIRS,
            gap[-1].item(),
            gap[1:].mean().item(),
            sum(share) / len(share),
        )
        for seed, last, gap in zip(seeds, last_lost, torch.stack(watch.gaps, 1), strict=True)
    }


Cell = tuple[str, Method, Sequence[int]]


def compute(cell: Cell) -> dict[str, Outcome]:
    torch.set_num_threads(1)  # sums in one order
    return run(*cell)


def fill(results: Results, cells: Iterable[Cell]) -> None:
    """Computes what is not there, two cells at a time; they are written in their order."""
    todo = [cell for cell in cells if not results.has(*cell)]
    with get_context("spawn").Pool(2) as pool:
        for (task, method, _), found in zip(todo, pool.imap(compute, todo), strict=True):
            results.add(task, method, found)


def kinds_of(task: str) -> list[tuple[str, str]]:
    """The bonuses, and who draws the second completion. Longer ones cost more: the reference alone, and no control."""
    return list(product(GRID, SAMPLERS if task.endswith("length 3") else SAMPLERS[:1]))


def methods_of(results: Results, task: str) -> list[Method]:
    return [*BASELINES[:2], *(results.tuned(task, *kind) for kind in kinds_of(task)), FLIPPED]


def main() -> None:
    results = Results(HERE / "results.csv", REPORTED)
    for number, task in enumerate(TASKS, 1):
        fill(results, [(task, Method(*kind, alpha), TUNED_ON) for kind in kinds_of(task) for alpha in GRID[kind[0]]])
        names = [task, CONTROL + task] if task.endswith("length 3") else [task]
        fill(results, [(name, method, REPORTED) for name in names for method in methods_of(results, task)])
        done = list(TASKS)[:number]
        tables = [f"**{name}**\n\n{table(results, name, methods_of(results, name))}" for name in done]
        write_block(HERE / "README.md", "\n\n".join(tables))
        plot_shares(
            results,
            [*((b.bonus, b.second) for b in BASELINES[:2]), *product(GRID, SAMPLERS)],
            done,
            HERE / "solved.png",
        )


if __name__ == "__main__":
    main()
