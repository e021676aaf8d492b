"""Evaluation on held-out prompts: the policy beside the reference, on the same prompts and noise each time."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments

from xpo.config.errors import JudgeStopped
from xpo.config.options import LossOptions
from xpo.data.prompt_sets import collate_prompts, prompts_of
from xpo.data.prompts import plain_text
from xpo.evaluation.probe import MEASURES, Probe
from xpo.judges import RewardJudge
from xpo.judges.labelling import Labeller
from xpo.models.batches import shares
from xpo.models.forward import Forward, eval_mode
from xpo.models.reference import base_model
from xpo.models.zero import is_divided, sampling
from xpo.rewards import MixReward, RewardModel
from xpo.rewards.base import one_per_pair
from xpo.sampling.completions import Completions
from xpo.sampling.draws import ReferenceDraws
from xpo.sampling.noise import EVAL_POLICY, EVAL_REFERENCE, sampling_noise
from xpo.sampling.sampler import Sampler
from xpo.tracking.metrics import distinct_bigrams

Record = dict[str, Any]


@dataclass(eq=False)
class Evaluator:
    """Compares a policy with the reference on held-out prompts.

    Each prompt is answered once by the policy and once by the reference, with noise that depends on
    the run's seed and the prompt (for the policy, its place in the data set) only: evaluations of a run, and of
    runs with the same seed, differ by the policy alone. The reference answers once and is remembered.

    Verdicts and scores are those of judge and reward model, without the missing-EOS penalty, so that
    runs with different penalties compare.
    """

    sampler: Sampler  # draws the completions
    draws: ReferenceDraws  # the reference's answers
    forwards: tuple[Forward, Forward]  # how the log-probabilities of policy and reference are computed
    labeller: Labeller  # says who wins, and gives `score` if there is a reward model
    scorers: dict[str, RewardModel]  # further reward models by metric name, which training never sees
    greedy: bool = False  # take the likeliest tokens instead of drawing some
    gather: bool = True  # see `xpo.models.zero.sampling`
    in_step: bool = False  # whether the reference's processes compute together, so that none may end early
    probe: Probe | None = None  # measures exploration
    records: list[Record] = field(default_factory=list, init=False)  # of the latest evaluation, on every rank
    # The reference's completions of a data set by its prefix, and what they are the answer to.
    _answers: dict[str, tuple[Any, list[Completions]]] = field(default_factory=dict, init=False)

    def __call__(
        self,
        policy: PreTrainedModel,
        dataset: Dataset | IterableDataset,
        accelerator: Accelerator,
        args: TrainingArguments,
        prefix: str = "eval",
        engine: nn.Module | None = None,
        beta: float = LossOptions.beta,
    ) -> dict[str, float]:
        """Metrics named `{prefix}_...`, the same on every rank; leaves the completions in `records`.

        win_rate, tie_rate, lose_rate, invalid_rate: shares of the prompts. flip_rate: share of the
        verdicts that changed with the order of the completions, where both orders were asked. score,
        ref_score, score_margin: mean rewards. kl: mean of log pi(y) - log pi_ref(y) over the policy's
        completions, the unbiased estimate of KL(pi || pi_ref) when sampling at temperature 1, in nats.
        eos_rate, length (tokens), distinct_2: of the policy's completions; ref_* of the reference's.
        objective: score - beta * kl, by which Algorithm 1 of the XPO paper chooses among its iterates.
        One value per scorer, and ref_* beside it; score_NAME per part of a mix of reward models. Those of `Probe`.

        Args:
            policy, dataset: unwrapped; tokenized prompts.
            engine: the ZeRO-3 engine around the policy, if there is one.
            beta: the strength of the KL regularisation.

        Raises:
            JudgeStopped: the judge of some rank could not go on; raised on every rank.
        """
        started = time.perf_counter()
        rows = list(dataset)
        chunks, own = shares(len(rows), args.eval_batch_size, args.process_index, args.world_size)
        asked = [rows[i]["prompt_ids"] for chunk in chunks[:own] for i in chunk]
        question = (asked, self.greedy, args.seed, len(chunks))
        answered, answers = self._answers.get(prefix, (None, []))
        if answered != question:
            answers = []
        records: list[Record] = []
        stopped: str | None = None
        silent = args.disable_tqdm or not accelerator.is_local_main_process
        for number, chunk in enumerate(tqdm(chunks, desc="Evaluating", leave=False, disable=silent)):
            prompts = [rows[i] for i in chunk]
            ids = [row["prompt_ids"] for row in prompts]
            if len(answers) <= number:
                equal = [row.get("occurrence", 0) for row in prompts]
                key = (args.seed, EVAL_REFERENCE, 0)
                with accelerator.autocast():
                    draw = self.draws.draw(ids, *key, args.device, self.greedy, occurrences=equal)
                answers.append(draw.completions)
            noise = sampling_noise((args.seed, 0, EVAL_POLICY), list(chunk), self.sampler.max_new_tokens)
            with accelerator.autocast():  # as in training; judge and reward model keep their own precision
                with sampling(policy, engine, self.gather) as synced:
                    completions = self.sampler.sample(base_model(policy), ids, noise, args.device, self.greedy, synced)
                prompt_ids, prompt_mask = self.sampler.pad_prompts(ids, args.device)
                batch = {
                    "prompt_ids": prompt_ids,
                    "prompt_mask": prompt_mask,
                    "completion_ids": completions.ids[None],
                    "completion_mask": completions.mask[None],
                }
                with torch.no_grad(), eval_mode(policy):
                    logps = self.forwards[0](policy, batch)[0]  # (b,)
                with self.draws.reference.model() as reference, torch.no_grad(), eval_mode(reference):
                    ratio = logps - self.forwards[1](reference, batch)[0]
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
        metrics = summarize(self.records, list(self.scorers))
        if "score" in metrics:
            metrics["objective"] = metrics["score"] - beta * metrics["kl"]
        if self.probe is not None:
            metrics |= self.probe(policy, rows, accelerator, args, prefix, engine)
        metrics["runtime"] = time.perf_counter() - started
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    @property
    def measures(self) -> list[str]:
        """The metrics that an evaluation may have, without its prefix."""
        judge, scored = self.labeller.judge, self.labeller.reward_model
        if scored is None and isinstance(judge, RewardJudge):
            scored = judge.reward_model
        parts = [f"score_{name}" for name in scored.models] if isinstance(scored, MixReward) else []
        scores = (["score"] if scored is not None else []) + parts + list(self.scorers)
        margin = ["flip_rate"] + (["score_margin", "objective"] if scored is not None else [])
        probed = () if self.probe is None else MEASURES
        return [*summarize([]), *margin, *scores, *(f"ref_{name}" for name in scores), *probed]

    def _compare(
        self, rows: list[Record], indices: Sequence[int], completions: Completions, answers: Completions, ratio: Tensor
    ) -> list[Record]:
        prompts = prompts_of(collate_prompts(rows))
        labelled = self.labeller(prompts, completions, answers)
        scores = {} if labelled.scores is None else {"score": labelled.scores}  # by name, (2, b)
        for name, scorer in self.scorers.items():
            both = [scorer.scores(prompts, one.texts) for one in (completions, answers)]
            scores[name] = torch.stack([one_per_pair(name, values, prompts) for values in both])
        scores |= {f"score_{name}": part for name, part in labelled.parts.items()}
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
            for name, (own, reference) in scores.items():
                record |= {name: own[i].item(), f"ref_{name}": reference[i].item()}
            records.append(record)
        return records


def summarize(records: Sequence[Record], scorers: Sequence[str] = ()) -> dict[str, float]:
    """The metrics of an evaluation, from one record per prompt; see `Evaluator.__call__`."""

    def mean(values: Sequence[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    labels = [record["label"] for record in records]
    invalid = [not math.isfinite(record["margin"]) for record in records]
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
