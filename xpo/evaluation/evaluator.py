"""Evaluation on held-out prompts: the policy beside the reference, on the same prompts and noise each time."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments

from xpo.config.errors import JudgeStopped
from xpo.data.prompts import plain_text
from xpo.judges.labelling import Labeller, one_per_pair
from xpo.models.forward import Forward, eval_mode
from xpo.models.reference import base_model
from xpo.models.zero import is_divided, sampling
from xpo.rewards import RewardModel
from xpo.sampling.completions import Completions
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.noise import EVAL_POLICY, EVAL_REFERENCE, sampling_noise
from xpo.sampling.sampler import Sampler
from xpo.tracking.metrics import distinct_bigrams

Record = dict[str, Any]


class Evaluator:
    """Compares a policy with the reference on held-out prompts.

    Each prompt is answered once by the policy and once by the reference, with noise that depends on
    the run's seed and the prompt (for the policy, its place in the data set) only: evaluations of a run, and of
    runs with the same seed, differ by the policy alone. The reference answers once and is remembered.

    Verdicts and scores are those of judge and reward model, without the missing-EOS penalty, so that
    runs with different penalties compare.

    Args:
        sampler: draws the completions.
        draws: the reference's answers.
        forwards: how the log-probabilities of policy and reference are computed.
        labeller: says who wins, and gives `score` if there is a reward model.
        scorers: further reward models by metric name, which training never sees.
        greedy: take the likeliest tokens instead of drawing some.
        gather: see `xpo.models.zero.sampling`.
        in_step: whether the reference's processes compute together, so that none may end early.
    """

    def __init__(
        self,
        sampler: Sampler,
        draws: ReferenceDraws,
        forwards: tuple[Forward, Forward],
        labeller: Labeller,
        scorers: dict[str, RewardModel],
        greedy: bool = False,
        gather: bool = True,
        in_step: bool = False,
    ):
        self.sampler = sampler
        self.draws = draws
        self.forwards = forwards
        self.labeller = labeller
        self.scorers = scorers
        self.greedy = greedy
        self.gather = gather
        self.in_step = in_step
        self.records: list[Record] = []  # of the latest evaluation, one per prompt, on every rank
        # The reference's completions of a data set by its prefix, and what they are the answer to.
        self._answers: dict[str, tuple[Any, list[Completions]]] = {}

    def __call__(
        self,
        policy: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        accelerator: Accelerator,
        args: TrainingArguments,
        prefix: str = "eval",
        engine: nn.Module | None = None,
    ) -> dict[str, float]:
        """Metrics named `{prefix}_...`, the same on every rank; leaves the completions in `records`.

        win_rate, tie_rate, lose_rate, invalid_rate: shares of the prompts. flip_rate: share of the
        verdicts that changed with the order of the completions, where both orders were asked. score,
        ref_score, score_margin: mean rewards. kl: mean of log pi(y) - log pi_ref(y) over the policy's
        completions, the unbiased estimate of KL(pi || pi_ref) when sampling at temperature 1, in nats.
        eos_rate, length (tokens), distinct_2: of the policy's completions; ref_* of the reference's.
        One value per scorer, and ref_* beside it; score_NAME per part of a mix of reward models.

        Args:
            policy: unwrapped.
            dataset: tokenized prompts.
            accelerator: of the trainer.
            args: of the trainer.
            prefix: of the metrics' names.
            engine: the ZeRO-3 engine around the policy, if there is one.

        Raises:
            JudgeStopped: the judge of some rank could not go on; raised on every rank.
        """
        started = time.perf_counter()
        rows = list(dataset)
        chunks, own = shares(len(rows), args.eval_batch_size, args.process_index, args.world_size)
        question = (
            [rows[i]["prompt_ids"] for chunk in chunks[:own] for i in chunk],
            self.greedy,
            args.seed,
            len(chunks),
        )
        answered, answers = self._answers.get(prefix, (None, []))
        if answered != question:
            answers = []
        records: list[Record] = []
        stopped: str | None = None
        silent = args.disable_tqdm or not accelerator.is_local_main_process
        for number, chunk in enumerate(tqdm(chunks, desc="Evaluating", leave=False, disable=silent)):
            prompts = [rows[i] for i in chunk]
            if len(answers) <= number:
                with accelerator.autocast():
                    answers.append(self._reference_answer(prompts, args))
            with accelerator.autocast():  # as in training; judge and reward model keep their own precision
                with sampling(policy, engine, self.gather) as synced:
                    completions = self._policy_answer(policy, prompts, chunk, args, synced)
                    policy_logps = self._logps(policy, self.forwards[0], prompts, completions, args)
                with self.draws.reference.model() as reference:
                    ratio = policy_logps - self._logps(reference, self.forwards[1], prompts, completions, args)
            if stopped is not None or number >= own:  # the other ranks need this one's company
                continue
            try:
                records += self._compare(prompts, chunk, completions, answers[number], ratio)
            except JudgeStopped as error:  # the other ranks wait for this one below
                stopped = str(error)
                if not (is_divided(policy) or self.in_step):
                    break
        self._answers[prefix] = (question, answers)
        reasons = [reason for reason in gather_object([stopped]) if reason is not None]
        if reasons:
            raise JudgeStopped(reasons[0])
        self.records = sorted(gather_object(records), key=lambda record: record["index"])
        metrics = summarize(self.records, list(self.scorers)) | {"runtime": time.perf_counter() - started}
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _policy_answer(
        self,
        policy: PreTrainedModel,
        prompts: Sequence[Record],
        indices: Sequence[int],
        args: TrainingArguments,
        synced: bool,
    ) -> Completions:
        noise = sampling_noise((args.seed, 0, EVAL_POLICY), list(indices), self.sampler.max_new_tokens)
        ids = [prompt["prompt_ids"] for prompt in prompts]
        return self.sampler.sample(base_model(policy), ids, noise, args.device, self.greedy, synced)

    def _reference_answer(self, prompts: Sequence[Record], args: TrainingArguments) -> Completions:
        ids = [prompt["prompt_ids"] for prompt in prompts]
        equal = [prompt.get("occurrence", 0) for prompt in prompts]
        draw = self.draws.draw(ids, args.seed, EVAL_REFERENCE, 0, args.device, self.greedy, occurrences=equal)
        return draw.completions

    def _compare(
        self,
        rows: Sequence[Record],
        indices: Sequence[int],
        completions: Completions,
        answers: Completions,
        ratio: Tensor,
    ) -> list[Record]:
        prompts = [row["prompt"] for row in rows]
        labelled = self.labeller(prompts, completions, answers)
        extra = {
            name: torch.stack(
                [one_per_pair(name, scorer.scores(prompts, c.texts), prompts) for c in (completions, answers)]
            )
            for name, scorer in self.scorers.items()
        }
        records = []
        for i, index in enumerate(indices):
            record = {
                "index": index,
                "prompt": plain_text(prompts[i]),
                "completion": completions.texts[i],
                "reference": answers.texts[i],
                "margin": labelled.margin[i].item(),
                "label": labelled.labels.label[i].item(),
                "flipped": None if labelled.flipped[i].isnan() else bool(labelled.flipped[i]),
                "log_ratio": ratio[i].item(),
                "ended": completions.ended[i].item(),
                "ref_ended": answers.ended[i].item(),
                "tokens": completions.ids[i][completions.mask[i]].tolist(),
                "ref_tokens": answers.ids[i][answers.mask[i]].tolist(),
            }
            if labelled.scores is not None:
                record |= {"score": labelled.scores[0, i].item(), "ref_score": labelled.scores[1, i].item()}
            parts = {f"score_{name}": part for name, part in labelled.parts.items()}
            for name, scores in (extra | parts).items():
                record |= {name: scores[0, i].item(), f"ref_{name}": scores[1, i].item()}
            records.append(record)
        return records

    @torch.no_grad()
    def _logps(
        self,
        model: PreTrainedModel,
        forward: Forward,
        rows: Sequence[Record],
        completions: Completions,
        args: TrainingArguments,
    ) -> Tensor:
        """The log-probability of each completion, (b,)."""
        ids, mask = self.sampler.pad_prompts([row["prompt_ids"] for row in rows], args.device)
        batch = {
            "prompt_ids": ids,
            "prompt_mask": mask,
            "completion_ids": completions.ids[None],
            "completion_mask": completions.mask[None],
        }
        with eval_mode(model):
            return forward(model, batch)[0]


def shares(count: int, batch: int, rank: int, world: int) -> tuple[list[Sequence[int]], int]:
    """The rows of a data set that a rank answers, in equally many batches on every rank; and how many are its own.

    Ranks with fewer rows end with the first row of the data set, for company: under ZeRO-3 no rank can work alone.
    """
    mine = range(rank, count, world)
    batches: list[Sequence[int]] = [mine[i : i + batch] for i in range(0, len(mine), batch)]
    of_rank_0 = math.ceil(math.ceil(count / world) / batch)
    company: list[Sequence[int]] = [[0]] * (of_rank_0 - len(batches))
    return batches + company, len(batches)


def summarize(records: Sequence[Record], scorers: Sequence[str] = ()) -> dict[str, float]:
    """The metrics of an evaluation, from one record per prompt; see `Evaluator.__call__`."""

    def mean(values: Sequence[float]) -> float:
        finite = [value for value in values if value == value and abs(value) != float("inf")]
        return sum(finite) / len(finite) if finite else float("nan")

    labels = [record["label"] for record in records]
    invalid = [not torch.tensor(record["margin"]).isfinite().item() for record in records]
    distinct, ref_distinct = (distinct_bigrams(r[key] for r in records) for key in ("tokens", "ref_tokens"))
    metrics = {
        "win_rate": mean([label > 0 for label in labels]),
        "lose_rate": mean([label < 0 for label in labels]),
        "tie_rate": mean([label == 0 and not bad for label, bad in zip(labels, invalid, strict=True)]),
        "invalid_rate": mean(invalid),
        "kl": mean([record["log_ratio"] for record in records]),
        "eos_rate": mean([record["ended"] for record in records]),
        "ref_eos_rate": mean([record["ref_ended"] for record in records]),
        "length": mean([len(record["tokens"]) for record in records]),
        "ref_length": mean([len(record["ref_tokens"]) for record in records]),
        "distinct_2": distinct.total / max(distinct.count, 1),
        "ref_distinct_2": ref_distinct.total / max(ref_distinct.count, 1),
    }
    flips = [record["flipped"] for record in records if record["flipped"] is not None]
    if flips:
        metrics["flip_rate"] = mean(flips)
    scored = [name for name in (records[0] if records else {}) if name == "score" or name.startswith("score_")]
    for name in [*scored, *scorers]:
        metrics[name] = mean([record[name] for record in records])
        metrics[f"ref_{name}"] = mean([record[f"ref_{name}"] for record in records])
    if "score" in metrics:
        metrics["score_margin"] = metrics["score"] - metrics["ref_score"]
    return metrics
