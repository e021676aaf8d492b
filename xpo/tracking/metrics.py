"""What is logged of a step: pure functions of tensors, and a meter that pools them over steps and ranks.

Notation for shapes: B pairs. Index 0 of a (2, B) tensor is the first completion, the policy's; index 1 the second,
the reference's. `label` is +1 where the first won, -1 where the second did, 0 where there is no preference.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import record_function

from xpo.judges.labelling import Labelled
from xpo.sampling.completions import PairBatch

NGRAM = 4  # tokens whose sequence is new or not, in `novel_ngrams`


@dataclass(frozen=True)
class Mean:
    """A mean that can still be pooled with others: the sum of the values and how many there are."""

    total: float
    count: float


def mean_of(values: Tensor, where: Tensor | None = None) -> Mean:
    """The mean of `values` (B,) over the rows where `where` (bool, B) holds; all rows without it."""
    if where is not None:
        values = values[where]
    return Mean(values.double().sum().item(), values.numel())


def pair_metrics(
    policy_logps: Tensor, reference_logps: Tensor, label: Tensor, beta: float, dpo: Tensor, xpo: Tensor, fresh: Tensor
) -> dict[str, Mean]:
    """Metrics of pairs, from log-probabilities summed over completion tokens.

    Args:
        policy_logps: log pi(y), log pi(y~), (2, B).
        reference_logps: log pi_ref(y), log pi_ref(y~), (2, B).
        label: see above, (B,).
        beta: the KL regularisation strength in force.
        dpo: preference loss of each pair, (B,).
        xpo: exploration loss of each pair, (B,).
        fresh: whether the policy as it is has drawn the first completion, bool (B,).

    Returns:
        Name to mean. `rewards/*`, `logps/*` and `loss/dpo_labelled` are over the pairs with a preference, `objective/*`
        over fresh ones, as only these are the policy's own, the rest over all.
    """
    ratio = policy_logps - reference_logps
    labelled = label != 0
    chosen = (label < 0).long()[None]  # row of the chosen completion
    ratio_chosen, ratio_rejected = (ratio.gather(0, row).squeeze(0) for row in (chosen, 1 - chosen))
    logps_chosen, logps_rejected = (policy_logps.gather(0, row).squeeze(0) for row in (chosen, 1 - chosen))
    margin = beta * (ratio_chosen - ratio_rejected)
    return {
        "loss": mean_of(dpo + xpo),
        "loss/dpo": mean_of(dpo),
        "loss/dpo_labelled": mean_of(dpo, labelled),
        "loss/xpo": mean_of(xpo),
        "objective/kl": mean_of(ratio.mean(dim=0), fresh),
        "objective/kl_policy": mean_of(ratio[0], fresh),
        "objective/entropy": mean_of(-policy_logps.mean(dim=0), fresh),
        "exploration/ref_ratio": mean_of(ratio[1]),
        "rewards/chosen": mean_of(beta * ratio_chosen, labelled),
        "rewards/rejected": mean_of(beta * ratio_rejected, labelled),
        "rewards/margins": mean_of(margin, labelled),
        "rewards/accuracies": mean_of((margin > 0).float(), labelled),
        "logps/chosen": mean_of(logps_chosen, labelled),
        "logps/rejected": mean_of(logps_rejected, labelled),
    }


def bonus_share(preference: Tensor, bonus: Tensor) -> dict[str, Mean]:
    """How strongly the bonus pulls at log pi, over how strongly the preference loss does; see `gradient_sizes`."""
    return {"exploration/bonus_share": Mean(bonus.double().sum().item(), preference.double().sum().item())}


def preference_metrics(margin: Tensor, label: Tensor, flipped: Tensor) -> dict[str, Mean]:
    """The judge's verdicts on the policy's completions: shares of all pairs, from margins (B,).

    `flip_rate` is the share of verdicts that changed with the order of the completions, of the pairs
    where `flipped` (B,) is known: 1 for yes, 0 for no, NaN for unknown.
    """
    valid = margin.isfinite()
    return {
        "preference/win_rate": mean_of((label > 0).float()),
        "preference/tie_rate": mean_of((valid & (label == 0)).float()),
        "preference/invalid_rate": mean_of((~valid).float()),
        "preference/flip_rate": mean_of(flipped, ~flipped.isnan()),
    }


def ngrams(completions: Iterable[Sequence[int]], n: int = NGRAM) -> list[tuple[int, ...]]:
    """The n-grams of completions, those that repeat too."""
    return [gram for tokens in completions for gram in zip(*(tokens[i:] for i in range(n)), strict=False)]


def distinct_bigrams(completions: Iterable[Sequence[int]]) -> Mean:
    """distinct-2 of a set of completions: different bigrams over all bigrams (Li et al., 1510.03055)."""
    bigrams = ngrams(completions, 2)
    return Mean(len(set(bigrams)), len(bigrams))


def novel_ngrams(completions: Iterable[Sequence[int]], known: set[tuple[int, ...]]) -> Mean:
    """Of the different n-grams of a set of completions, how many are not among the known ones."""
    different = set(ngrams(completions))
    return Mean(len(different - known), len(different))


def rollout_metrics(pairs: PairBatch, labelled: Labelled, accelerator: Accelerator) -> dict[str, Mean]:
    """Metrics of completions and verdicts; scores that are missing are left out."""
    metrics = preference_metrics(labelled.margin, labelled.labels.label, labelled.flipped) | {
        "val/model_contain_eos_token": mean_of(pairs.first.ended.float()),
        "val/ref_contain_eos_token": mean_of(pairs.second.ended.float()),
        "completions/length": mean_of(pairs.first.mask.sum(dim=1)),
        "completions/distinct_2": distinct_2(pairs, accelerator),
    }
    if labelled.scores is not None:
        metrics["objective/scores_margin"] = mean_of(
            labelled.scores[0] - labelled.scores[1], labelled.scores.isfinite().all(dim=0)
        )
        scores = {"": labelled.scores} | {f"/{name}": part for name, part in labelled.parts.items()}
        for suffix, (first, second) in scores.items():
            metrics[f"objective/model_scores{suffix}"] = mean_of(first, first.isfinite())
            metrics[f"objective/ref_scores{suffix}"] = mean_of(second, second.isfinite())
    return metrics


def distinct_2(pairs: PairBatch, accelerator: Accelerator) -> Mean:
    """distinct-2 over the first completions of all ranks, each rank holding an equal share of the counts."""
    ids = pairs.first.ids.masked_fill(~pairs.first.mask, -1)
    ids = accelerator.gather(accelerator.pad_across_processes(ids, dim=1, pad_index=-1))
    distinct = distinct_bigrams([[token for token in row if token >= 0] for row in ids.tolist()])
    return Mean(distinct.total / accelerator.num_processes, distinct.count / accelerator.num_processes)


class Meter:
    """Pools what is measured from one log to the next: means, and how long the parts of a step take.

    Its state is part of a checkpoint.
    """

    def __init__(self) -> None:
        self.queries = 0.0  # pairs labelled by all processes since the run began; NaN: not known
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}  # of means: the sum of the values, and how many there are
        self.seconds: dict[str, float] = {}  # of each part, in all steps
        self.steps = 0
        self.tokens = 0  # generated by this process
        self.last: dict[str, float] = {}  # values of which the last one is logged

    def add(self, metrics: dict[str, Mean]) -> None:
        """Pools `metrics` with what was added before."""
        for name, mean in metrics.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total + mean.total, count + mean.count)

    def step(self, queries: float) -> None:
        """Counts an optimizer step, and what all processes asked the judge for it; see `Labeller.queries`."""
        self.steps += 1
        self.queries += queries
        self.last["preference/queries"] = self.queries

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time that the block takes to a part of the step; a profiler sees the part by its name."""
        started = time.perf_counter()
        with record_function(part):
            yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def pop(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What is logged: means over all ranks, seconds of a step, tokens per second of all ranks. Starts afresh.

        Args:
            sum_over_ranks: a collective that adds a float64 (2, n) tensor up over the ranks. Every
                rank must have added the same names.
        """
        pooled, last = dict(self.sums), self.last
        for part, seconds in self.seconds.items():
            pooled[f"perf/{part}_s"] = (seconds, self.steps)
        if self.steps:
            pooled["tokens"], pooled["seconds"] = (self.tokens, 1), (sum(self.seconds.values()), 1)
        self._clear()
        names = sorted(pooled)
        if not names:
            return last
        totals, counts = sum_over_ranks(torch.tensor([pooled[n] for n in names], dtype=torch.float64).T)
        means = {n: (total, count) for n, total, count in zip(names, totals.tolist(), counts.tolist(), strict=True)}
        tokens, (seconds, ranks) = means.pop("tokens", (0, 0)), means.pop("seconds", (0, 0))
        logged = {name: total / count for name, (total, count) in means.items() if count}
        if seconds:
            logged["perf/tokens_per_s"] = tokens[0] / (seconds / ranks)
        return logged | last

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(vars(self))

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self.seconds, self.steps, self.tokens = state["seconds"], state["steps"], state["tokens"]
        self.last = state["last"]
        self.queries = state.get("queries", math.nan)  # checkpoints of earlier versions lack it


def without_share(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a meter that has the same names and steps, and has measured nothing: of a process that is new."""
    return state | {
        "sums": dict.fromkeys(state["sums"], (0.0, 0.0)),
        "seconds": dict.fromkeys(state["seconds"], 0.0),
        "tokens": 0,
    }
