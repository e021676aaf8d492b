"""XPOTrainer: Exploratory Preference Optimization as a transformers Trainer."""

import errno
import json
import logging
import math
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from transformers.trainer_utils import has_length

from xpo.config.errors import ConfigError, JudgeStopped
from xpo.data.prompt_sets import collate_prompts, tokenize_prompts
from xpo.data.store import Store
from xpo.evaluation.evaluator import Evaluator
from xpo.judges import FunctionJudge, Judge, RewardJudge
from xpo.judges.labelling import Preference, Rules, ScoreScale, judge_pairs, judged_by
from xpo.models.checks import check_adapters, check_models, warn_of_half_precision
from xpo.models.forward import Forward
from xpo.models.hub import local_directory
from xpo.models.reference import Reference, base_model
from xpo.models.zero import check_engine, divide, gathered, is_divided, loading_whole, sampling
from xpo.objectives.losses import Labels, xpo_loss
from xpo.rewards import ClassifierReward, FunctionReward, RewardModel
from xpo.sampling.draws import Draw, ReferenceDraws
from xpo.sampling.rollout import (
    LABEL,
    POLICY,
    REFERENCE,
    Completions,
    Rollout,
    Sampler,
    Sampling,
    eval_mode,
    same_width,
    sampling_noise,
    take_pairs,
    token_batches,
    tokens_at_once,
)
from xpo.tracking.card import model_card
from xpo.tracking.metrics import Mean, MeanTracker, distinct_bigrams, mean_of, pair_metrics, preference_metrics
from xpo.tracking.runs import is_complete, last_complete_checkpoint
from xpo.training.config import SAMPLING_FIELDS, XPOConfig, value_at_epoch

logger = logging.getLogger(__name__)

PromptDataset: TypeAlias = Dataset | IterableDataset


class XPOTrainer(Trainer):
    """Trains a language model with XPO (arXiv 2405.21046).

    For each optimizer step::

        prompts      B prompts of the whole step, all micro-batches at once
        rollout      y ~ policy, y~ ~ reference                  one batched generation each
        preference   margin = log-odds that y beats y~           judge, or difference of rewards
        label        y wins / y~ wins / tie / invalid            the last two carry no preference loss
        reference    log pi_ref(y), log pi_ref(y~)               no gradient
        for each micro-batch:
            forward  log pi(y), log pi(y~)
            loss     preference_loss(beta * log-ratio difference) + alpha * log pi(y~)
            backward
        optimizer step, metrics

    `get_batch_samples` does everything down to the reference, `compute_loss` the rest.

    How it departs from Algorithm 1 of the paper: each optimizer step uses its own pairs only (no
    accumulated data set), and takes one gradient step instead of solving for the minimiser.

    Args:
        model: the policy, or its name.
        ref_model: the reference, or its name; None for a frozen copy of the policy, or under LoRA its base model.
        judge: says who wins: a `Judge`, or a function (prompts, first, second) -> B margins. None: the
            reward model's score difference does.
        reward_model: scores completions: a `RewardModel`, a sequence classifier, its name, or a function
            (prompts, completions) -> B scores. Needed if there is no judge.
        args: the configuration.
        processing_class: the policy's tokenizer; None loads the one that belongs to the model.
        reward_processing_class: the tokenizer of a classifier; None loads the one that belongs to it.
        train_dataset: a column "prompt", of text or of messages.
        eval_dataset: held-out prompts, or several sets by name.
        peft_config: trains adapters instead of the whole model.
        scorers: independent reward models for evaluation, by metric name. Training never sees them.
        callbacks: transformers' callbacks.
        optimizers: as in `transformers.Trainer`.
        reward_funcs: TRL's name of `reward_model`; a list of one counts as that one.
        reward_processing_classes: TRL's name of `reward_processing_class`, likewise.

    Raises:
        ConfigError: what a user can mend, in one line.
        JudgeStopped: in training, a judge that cannot go on; there is a checkpoint of the last finished step.
    """

    args: XPOConfig
    control: TrainerControl
    # The loss of a micro-batch is already its share of the optimizer step's mean.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        ref_model: PreTrainedModel | str | None = None,
        *,  # TRL has the following ones in another order
        judge: Judge | Callable[..., Any] | None = None,
        reward_model: RewardModel | PreTrainedModel | Callable[..., Any] | str | None = None,
        args: XPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: PromptDataset | None = None,
        eval_dataset: PromptDataset | dict[str, PromptDataset] | None = None,
        peft_config: PeftConfig | None = None,
        scorers: dict[str, RewardModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
    ):
        args = args or XPOConfig(output_dir="xpo_output")
        reward_model = reward_model or _only("reward_funcs", reward_funcs) or args.reward_model_path
        reward_processing_class = reward_processing_class or _only(
            "reward_processing_classes", reward_processing_classes
        )
        if judge is None and reward_model is None:
            raise ConfigError("neither judge nor reward_model is given; pass one of them to say who wins a pair")
        if train_dataset is None:
            raise ConfigError("train_dataset=None; pass a data set with a column 'prompt'")
        if reward_model is None and isinstance(judge, RewardJudge):
            reward_model = judge.reward_model
        with loading_whole():
            self.reward_model = as_reward_model(reward_model, reward_processing_class, args.device)
        self.judge = as_judge(judge, self.reward_model)
        if (args.normalize_scores or args.clip_scores) and not judged_by(self.judge, self.reward_model):
            key, value = ("normalize_scores", True) if args.normalize_scores else ("clip_scores", args.clip_scores)
            raise ConfigError(f"{key}={value!r} changes the scores that judge=reward compares; choose that judge")

        if isinstance(model, str):
            model = _load_policy("model", model, args)
        if isinstance(ref_model, str):
            with loading_whole():
                ref_model = _load_policy("ref_model", ref_model, args)
        check_models(model, ref_model, peft_config, args.max_length)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(base_model(model).config.name_or_path)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        eos_token_ids = end_tokens(base_model(model), processing_class)

        self.tokenize = prompt_tokenizer(args, processing_class)
        train_dataset = self.tokenize(train_dataset, key="train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self.tokenize(part, key=f"eval_dataset[{name!r}]") for name, part in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self.tokenize(eval_dataset, key="eval_dataset")

        if args.disable_dropout:
            for part in [model] if ref_model is None else [model, ref_model]:
                _disable_dropout(part)
        if peft_config is not None:
            model = _with_adapters(model, peft_config, args.seed)
        if isinstance(model, PeftModel):
            check_adapters(model, ref_model)
        if args.deepspeed_plugin is None:
            warn_of_half_precision(model)
        self.reference = Reference(model, ref_model, args.device, reference_dtype(args), lambda: self.zero3_engine)
        if args.shard_reference and self.reference.frozen is not None:
            divide(self.reference.frozen, args.deepspeed_plugin.deepspeed_config)
        self.sampler = Sampler(processing_class, sampling_options(args), eos_token_ids)

        super().__init__(
            model=model,
            args=args,
            data_collator=collate_prompts,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # older Trainers read this one for loss_is_scaled_for_ga
        longest = args.max_length + args.max_new_tokens
        with gathered(self.model):
            self.policy_forward = Forward(base_model(self.model), args.pair_forward, longest, args.device)
        self.reference_forward = self.policy_forward
        if self.reference.frozen is not None:
            with gathered(self.reference.frozen):
                self.reference_forward = Forward(self.reference.frozen, args.pair_forward, longest, args.device)
        self.draws = ReferenceDraws(self.reference, self.sampler, reference_store(args), precision(args))
        self.evaluator = Evaluator(
            self.sampler,
            self.draws,
            (self.policy_forward, self.reference_forward),
            self.judge,
            self.reward_model,
            scorers or {},
        )
        self.scale = ScoreScale(args.normalize_scores, args.clip_scores, self._sum_over_ranks)
        self._epoch_iterator: Iterator[dict[str, list[Any]]] | None = None
        self._waiting: deque[dict[str, list[Any]]] = deque()  # batches of this epoch that are read already
        self._tracker = MeanTracker()
        self._step_logs: dict[str, float] = {}

    # ---- one optimizer step ------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, list[Any]]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """Everything of an optimizer step that needs no gradient: rollout, preference, reference.

        Returns:
            The labelled micro-batches (see `_micro_batches`), and the number of pairs on all ranks.
        """
        batches, ahead = self._next_batches(epoch_iterator, num_batches)
        if not batches or (len(batches) < num_batches and not has_length(self.train_dataset)):
            # At the end of a stream the Trainer takes no step for less than a whole one.
            return [], None
        if self.is_deepspeed_enabled:
            check_engine(self.model_wrapped, self._deepspeed_config, self.args.world_size)
        started = time.perf_counter()
        with record_function("rollout"):
            rollout, draw = self._rollout(batches, ahead)
        sampled = time.perf_counter()
        prompts = [prompt for batch in batches for prompt in batch["prompt"]]
        sizes = [len(batch["prompt"]) for batch in batches]
        with record_function("preference"):
            preference = self._preference(prompts, rollout, self._global_rows(sizes))
        judged = time.perf_counter()
        with record_function("reference"):
            reference_logps = self._reference_logps(rollout)
        micro_batches = self._micro_batches(rollout, preference, reference_logps, sizes)
        referred = time.perf_counter()
        self._tracker.add(self._rollout_metrics(rollout, preference))
        self._tracker.add(
            {
                "perf/rollout_s": Mean(sampled - started, 1),
                "perf/preference_s": Mean(judged - sampled, 1),
                "perf/reference_s": Mean(referred - judged, 1),
                "perf/update_s": Mean(0.0, 1),  # `training_step` adds to the total
            }
        )
        if self.draws.store is not None:
            self._tracker.add({"perf/reference_hit_rate": mean_of((~draw.fresh).float())})
        pairs = torch.tensor(sum(sizes), device=device)
        return micro_batches, self.accelerator.reduce(pairs, "sum")

    def _next_batches(
        self, epoch_iterator: Iterator[dict[str, list[Any]]], number: int
    ) -> tuple[list[dict[str, list[Any]]], list[dict[str, list[Any]]]]:
        """The next batches of an epoch; and those behind them, as far as the reference's draws look ahead."""
        if epoch_iterator is not self._epoch_iterator:
            self._epoch_iterator, self._waiting = epoch_iterator, deque()
        left = (self.state.max_steps - self.state.global_step) * self.args.gradient_accumulation_steps
        prompts = sum(len(batch["prompt_ids"]) for batch in self._waiting)
        while len(self._waiting) < number or (
            self.draws.store is not None
            and len(self._waiting) < left
            and prompts + self.args.per_device_train_batch_size <= self.args.reference_batch_size
        ):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            self._waiting.append(batch)
            prompts += len(batch["prompt_ids"])
        batches = [self._waiting.popleft() for _ in range(min(number, len(self._waiting)))]
        return batches, list(self._waiting)

    def _rollout(
        self, batches: Sequence[dict[str, list[Any]]], ahead: Sequence[dict[str, list[Any]]]
    ) -> tuple[Rollout, Draw]:
        """Completions of the whole step's prompts by the policy and by the reference, which may draw some ahead."""
        prompts, later = ([ids for batch in part for ids in batch["prompt_ids"]] for part in (batches, ahead))
        equal = [number for batch in (*batches, *ahead) for number in batch["occurrence"]]
        rows = self._global_rows([len(batch["prompt_ids"]) for batch in batches])
        noise = sampling_noise((self.args.seed, self.state.global_step, POLICY), rows, self.sampler.max_new_tokens)
        epoch = int(self.state.epoch or 0)
        with self.accelerator.autocast():
            with sampling(self.model, self.zero3_engine, self.args.ds3_gather_for_generation) as synced:
                policy = self.sampler.sample(base_model(self.model), prompts, noise, self.args.device, synced=synced)
            draw = self.draws.draw(
                prompts, self.args.seed, REFERENCE, epoch, self.args.device, ahead=later, occurrences=equal
            )
        prompt_ids, prompt_mask = self.sampler.pad_prompts(prompts, self.args.device)
        pairs = same_width(policy, draw.completions, self.sampler.pad_token_id)
        return Rollout(prompt_ids, prompt_mask, *pairs), draw

    def _preference(self, prompts: list[Any], rollout: Rollout, rows: Sequence[int]) -> Preference:
        """The labels of the whole step's pairs."""
        stopped: JudgeStopped | None = None
        preference: Preference | None = None
        try:
            preference = judge_pairs(
                self.judge,
                self.reward_model,
                prompts,
                rollout.policy,
                rollout.reference,
                Rules(
                    self.args.missing_eos_penalty,
                    self.args.tie_threshold,
                    self.args.labels,
                    self.args.label_temperature,
                ),
                self.scale,
                sampling_noise((self.args.seed, self.state.global_step, LABEL), rows, 1)[:, 0],
            )
        except JudgeStopped as error:
            stopped = error
        if self._sum_over_ranks(torch.tensor(float(stopped is not None))).item():  # all ranks stop, or none does
            self._keep_checkpoint()
            raise stopped or JudgeStopped("the judge of another process has stopped; its error says why")
        assert preference is not None
        return preference

    def _keep_checkpoint(self) -> None:
        """A checkpoint of the last finished step, unless there is one, for a run that cannot go on."""
        step = self.state.global_step
        if step and not is_complete(Path(self.args.output_dir) / f"checkpoint-{step}"):
            self._save_checkpoint(self.model, trial=None)

    def _global_rows(self, sizes: Sequence[int]) -> list[int]:
        """The place of each of this rank's prompts in the optimizer batch of all ranks.

        Micro-batch m of rank r is number m * world + r, as accelerate deals them.
        """
        world, rank, full = self.args.world_size, self.args.process_index, self.args.per_device_train_batch_size
        return [(m * world + rank) * full + i for m, size in enumerate(sizes) for i in range(size)]

    @property
    def _tokens_at_once(self) -> int:
        return self.args.tokens_per_micro_batch or tokens_at_once(self.args.device)

    @property
    def _deepspeed_config(self) -> dict[str, Any]:
        return self.accelerator.state.deepspeed_plugin.deepspeed_config

    @property
    def zero3_engine(self) -> nn.Module | None:
        """The DeepSpeed engine that divides the policy's parameters; None before training and below ZeRO-3."""
        return self.model_wrapped if self.model_wrapped is not self.model and is_divided(self.model) else None

    @torch.no_grad()
    def _reference_logps(self, rollout: Rollout) -> Tensor:
        """log pi_ref(y) and log pi_ref(y~), (2, B)."""
        logps = torch.empty(2, len(rollout.tokens), device=self.args.device)
        with self.reference.model() as model, eval_mode(model), self.accelerator.autocast():
            packed = self.reference_forward.way == "packed"
            for rows in token_batches(rollout.tokens, range(len(rollout.tokens)), self._tokens_at_once, packed):
                logps[:, rows] = self.reference_forward(model, rollout.pairs(rows))
        return logps

    def _micro_batches(
        self, rollout: Rollout, preference: Preference, reference_logps: Tensor, sizes: Sequence[int]
    ) -> list[dict[str, Tensor]]:
        """The pairs of each micro-batch with label and reference log-probabilities; similar lengths go together.

        Returns:
            What `Rollout.pairs` returns, with reference_logps (2, b), label (b,) and win_probability (b,).
        """
        (order,) = token_batches(rollout.tokens, range(sum(sizes)), None)
        micro_batches, start = [], 0
        for size in sizes:
            rows = order[start : start + size]
            batch = rollout.pairs(rows)
            batch["reference_logps"] = reference_logps[:, rows]
            for name, values in preference.labels._asdict().items():
                batch[name] = values[rows].to(self.args.device)
            micro_batches.append(batch)
            start += size
        return micro_batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The share of a micro-batch in the mean loss over the pairs of the optimizer step.

        Args:
            model: the policy, wrapped for distributed training.
            inputs: see `_micro_batches`.
            return_outputs: not supported.
            num_items_in_batch: pairs of the optimizer step on all ranks.
        """
        alpha, beta = self.alpha, self.beta
        policy_logps, reference_logps = self.policy_forward(model, inputs), inputs["reference_logps"]
        labels = Labels(inputs["label"], inputs["win_probability"])
        dpo, xpo = xpo_loss(policy_logps, reference_logps, labels, alpha, beta, self.args.loss_type)
        self._tracker.add(pair_metrics(policy_logps.detach(), reference_logps, labels.label, beta, dpo, xpo))
        self._step_logs = {"alpha": alpha, "beta": beta}
        # Gradients are averaged over the ranks.
        return (dpo + xpo).sum() * self.args.world_size / num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, in parts of `tokens_per_micro_batch`.

        A loss that is not finite stops the run.
        """
        started = time.perf_counter()
        lengths = inputs["prompt_mask"].sum(dim=1) + inputs["completion_mask"].sum(dim=(0, 2))
        # Under DeepSpeed, every process must do equally many passes.
        budget = None if self.is_deepspeed_enabled else self._tokens_at_once
        packed = self.policy_forward.way == "packed"
        *first, last = token_batches(lengths, range(len(lengths)), budget, packed)
        loss = torch.zeros((), device=self.args.device)
        for rows in first:
            with self.accelerator.no_sync(model):
                loss += super().training_step(model, take_pairs(inputs, rows), num_items_in_batch)
        loss += super().training_step(model, take_pairs(inputs, last), num_items_in_batch)
        if not loss.isfinite():
            raise self._diverged(f"the loss is {loss.item()}")
        self._tracker.add({"perf/update_s": Mean(time.perf_counter() - started, 0)})
        return loss

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # They are on the device. Under DeepSpeed in bf16 the Trainer would round the reference's log-probabilities.
        return inputs

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last look before the optimizer step: a bad gradient must not reach weights or checkpoints.
        # A scaler (fp16) skips such steps by itself.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and self.accelerator.scaler is None and not math.isfinite(grad_norm):
            raise self._diverged(f"the gradient norm is {float(grad_norm)}")
        return grad_norm

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {self.state.global_step + 1}; lower learning_rate or alpha, or raise beta "
            f"(the checkpoints up to step {self.state.global_step} in {self.args.output_dir} are sound)"
        )

    @property
    def alpha(self) -> float:
        """The weight of the exploration bonus in force."""
        return value_at_epoch(self.args.alpha, self.state.epoch)

    @property
    def beta(self) -> float:
        """The strength of the KL regularisation in force."""
        return value_at_epoch(self.args.beta, self.state.epoch)

    # ---- metrics -----------------------------------------------------------------------------

    def _rollout_metrics(self, rollout: Rollout, preference: Preference) -> dict[str, Mean]:
        lengths = rollout.policy.mask.sum(dim=1)
        verdicts = preference_metrics(preference.margin, preference.labels.label, preference.flipped)
        metrics = verdicts | {
            "val/model_contain_eos_token": mean_of(rollout.policy.ended.float()),
            "val/ref_contain_eos_token": mean_of(rollout.reference.ended.float()),
            "completions/length": mean_of(lengths),
            "completions/distinct_2": self._distinct_2(rollout.policy),
            "generated_tokens": Mean(float(lengths.sum() + rollout.reference.mask.sum()), 0),
        }
        if preference.scores is not None:
            scored = preference.scores.isfinite()
            metrics |= {
                "objective/model_scores": mean_of(preference.scores[0], scored[0]),
                "objective/ref_scores": mean_of(preference.scores[1], scored[1]),
                "objective/scores_margin": mean_of(preference.scores[0] - preference.scores[1], scored.all(0)),
            }
        for name, part in preference.parts.items():
            metrics[f"objective/model_scores/{name}"] = mean_of(part[0], part[0].isfinite())
            metrics[f"objective/ref_scores/{name}"] = mean_of(part[1], part[1].isfinite())
        return metrics

    def _distinct_2(self, policy: Completions) -> Mean:
        """distinct-2 over the completions of all ranks, each rank holding an equal share of the counts."""
        ids = policy.ids.masked_fill(~policy.mask, -1)
        ids = self.accelerator.gather(self.accelerator.pad_across_processes(ids, dim=1, pad_index=-1))
        distinct = distinct_bigrams([[token for token in row if token >= 0] for row in ids.tolist()])
        return Mean(distinct.total / self.args.world_size, distinct.count / self.args.world_size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the pairs since the last log to the Trainer's own, reduced over the ranks."""
        if "learning_rate" in logs:  # a step of training; evaluations and the final summary have none
            logs = logs | self._pop_metrics() | self._step_logs
        super().log(logs, start_time)

    def _pop_metrics(self) -> dict[str, float]:
        tokens, _ = self._tracker.sums.pop("generated_tokens", (0.0, 0.0))
        seconds = sum(
            self._tracker.sums[f"perf/{part}_s"][0] for part in ("rollout", "preference", "reference", "update")
        )
        steps = self._tracker.sums["perf/rollout_s"][1]
        self._tracker.add({"tokens_per_step": Mean(tokens, steps), "seconds_per_step": Mean(seconds, steps)})
        metrics = self._tracker.pop(self._sum_over_ranks)
        tokens_per_step = metrics.pop("tokens_per_step") * self.args.world_size
        metrics["perf/tokens_per_s"] = tokens_per_step / metrics.pop("seconds_per_step")
        return metrics

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.args.device), "sum").cpu()

    # ---- evaluation --------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: PromptDataset | dict[str, PromptDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Win rate against the reference, scores, KL and more on held-out prompts; see `evaluation.py`."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, dict):
            return {
                key: value
                for name, part in dataset.items()
                for key, value in self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}").items()
            }
        if dataset is None:
            raise ConfigError("eval_dataset=None; pass held-out prompts to XPOTrainer or to evaluate()")
        dataset = self.tokenize(dataset, key="eval_dataset")
        if self.model_wrapped is self.model and self.model.device != self.args.device and not is_divided(self.model):
            self.model.to(self.args.device)  # before training, the Trainer may have left it where it was
        try:
            result = self.evaluator(
                self.model, dataset, self.accelerator, self.args, metric_key_prefix, self.zero3_engine
            )
        except JudgeStopped:
            self._keep_checkpoint()
            raise
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        self._memory_tracker.stop_and_update_metrics(result)
        return result

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output directory, with the run's own numbers. Arguments are ignored."""
        if self.is_world_process_zero():
            name = base_model(self.model).config.name_or_path or type(base_model(self.model)).__name__
            card = model_card(vars(self.args), name, self.state.log_history, isinstance(self.model, PeftModel))
            (Path(self.args.output_dir) / "README.md").write_text(card)

    # ---- checkpoints -------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """On a full disk, training goes on without this checkpoint. Several processes stop: one of them may have it."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # safetensors and torch have errors of their own
            if self.args.world_size > 1 or not _is_full_disk(error):
                raise
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(checkpoint, ignore_errors=True)
            logger.warning("xpo: no room for %s; training goes on without it (%s)", checkpoint, str(error)[:100])

    def _save_rng_state(self, output_dir: str) -> None:
        # Called on every rank, before rank 0 writes trainer_state.json: its presence means that the
        # checkpoint is complete, so no rank may lag behind.
        super()._save_rng_state(output_dir)
        state = {
            "metrics": self._tracker.sums,
            "scale": self.scale.moments,
            "judge": self.judge.state(),
            "zero_stage": _zero_stage(self.args),
            "processes": self.args.world_size,
        }
        self._state_file(output_dir).write_text(json.dumps(state))
        if self.is_deepspeed_enabled and self.args.save_on_each_node and self.args.local_process_index == 0:
            # DeepSpeed reads this on every machine and writes it on the first one only.
            (Path(output_dir) / "latest").write_text(f"global_step{self.model_wrapped.global_steps}")
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self._state_file(checkpoint).is_file():
            state = json.loads(self._state_file(checkpoint).read_text())
            self._tracker.sums = {name: (total, count) for name, (total, count) in state["metrics"].items()}
            self.scale.moments = state["scale"]
            self.judge.load_state(state["judge"])
        elif _state_file(checkpoint, 0).is_file():  # more processes than before: they share the history of scores
            self.scale.moments = json.loads(_state_file(checkpoint, 0).read_text())["scale"]

    def _state_file(self, checkpoint: str | Path) -> Path:
        return _state_file(checkpoint, self.args.process_index)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`.

        Raises:
            ConfigError: a checkpoint of other DeepSpeed processes, or none to resume.
        """
        if resume_from_checkpoint is True:  # a killed run may leave a half-written checkpoint, which the Trainer takes
            newest = last_complete_checkpoint(Path(self.args.output_dir))
            resume_from_checkpoint = None if newest is None else str(newest)
            if newest is None:
                raise ConfigError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir!r} holds no complete checkpoint; "
                    "leave it out"
                )
        if isinstance(resume_from_checkpoint, str):
            check_same_zero(Path(resume_from_checkpoint), self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _state_file(checkpoint: str | Path, rank: int) -> Path:
    return Path(checkpoint) / f"xpo_state_{rank}.json"


def _is_full_disk(error: Exception) -> bool:
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return no_room or any(words in str(error) for words in ("No space left", "PytorchStreamWriter failed writing"))


def _zero_stage(args: XPOConfig) -> int | None:
    """The stage of DeepSpeed ZeRO; None without DeepSpeed."""
    return None if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage


def check_same_zero(checkpoint: Path, args: XPOConfig) -> None:
    """ConfigError unless DeepSpeed can read the optimizer state in a checkpoint: each process has its own part.

    Without it, another number of processes is another batch, of which a warning tells.
    """
    if not _state_file(checkpoint, 0).is_file():
        return
    state = json.loads(_state_file(checkpoint, 0).read_text())
    then, now = (state["zero_stage"], state["processes"]), (_zero_stage(args), args.world_size)
    if then != now and (then[0] is not None or now[0] is not None):

        def say(stage: int | None, processes: int) -> str:
            return f"{'no DeepSpeed' if stage is None else f'ZeRO-{stage}'} and {processes} processes"

        raise ConfigError(
            f"resume: {str(checkpoint)!r} was written with {say(*then)}, not {say(*now)}; go on with these"
        )
    if then != now:
        logger.warning(
            "xpo: %s was written by %d processes, not %d: unless per_device_train_batch_size or "
            "gradient_accumulation_steps make up for it, a step now has another number of prompts",
            checkpoint,
            then[1],
            now[1],
        )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS and those of the model's generation config."""
    shipped = model.generation_config.eos_token_id
    shipped = [] if shipped is None else [shipped] if isinstance(shipped, int) else list(shipped)
    tokens = [token for token in dict.fromkeys([tokenizer.eos_token_id, *shipped]) if token is not None]
    if not tokens:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token; set tokenizer.eos_token")
    return tokens


def as_judge(judge: Judge | Callable[..., Any] | None, reward_model: RewardModel | None) -> Judge:
    """The judge that `judge` stands for; without one, the reward model judges."""
    if judge is None:
        assert reward_model is not None
        return RewardJudge(reward_model)
    if isinstance(judge, Judge):
        return judge
    if callable(judge):
        return FunctionJudge(judge)
    raise ConfigError(f"judge={judge!r} is no judge; pass an xpo.judges.Judge or a function (prompts, first, second)")


def as_reward_model(
    reward_model: RewardModel | PreTrainedModel | Callable[..., Any] | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
) -> RewardModel | None:
    """The reward model that `reward_model` stands for."""
    if reward_model is None or isinstance(reward_model, RewardModel):
        return reward_model
    if isinstance(reward_model, str):
        return ClassifierReward.from_pretrained(reward_model, device=str(device), tokenizer=tokenizer)
    if isinstance(reward_model, PreTrainedModel):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(reward_model.config.name_or_path)
        return ClassifierReward(reward_model.to(device), tokenizer)
    if callable(reward_model):
        return FunctionReward(reward_model)
    raise ConfigError(
        f"reward_model={reward_model!r} is no reward model; pass an xpo.rewards.RewardModel, a sequence "
        "classifier, or a function (prompts, completions)"
    )


def _only(key: str, value: Any) -> Any:
    """The one thing in a list, as TRL takes several reward functions; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise ConfigError(f"{key} holds {len(value)}; pass one, such as an xpo.rewards.MixReward of several")
    return value[0]


def _load_policy(key: str, name: str, args: XPOConfig) -> PreTrainedModel:
    directory = local_directory(key, name, with_code=args.trust_remote_code)
    options = _options(args.model_init_kwargs)
    if "torch_dtype" in options:  # an older name, which transformers ignores beside the newer one
        options = {name: value for name, value in options.items() if name != "torch_dtype"} | {
            "dtype": options["torch_dtype"]
        }
    return AutoModelForCausalLM.from_pretrained(
        directory,
        trust_remote_code=args.trust_remote_code,
        **{"dtype": torch.float32} | options,  # not the checkpoint's own, often bfloat16
    )


def prompt_tokenizer(args: XPOConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[..., PromptDataset]:
    """A function (dataset, key) that tokenizes prompts, unless that has been done, for these arguments."""

    def tokenize(dataset: PromptDataset, key: str) -> PromptDataset:
        if "prompt_ids" in (dataset.column_names or ()):  # a mapped stream does not know its columns
            return dataset
        room, template = args.max_length - args.max_new_tokens, _options(args.chat_template_kwargs)
        return tokenize_prompts(dataset, tokenizer, room, args.prompt_overflow, key, template)

    return tokenize


def _with_adapters(model: PreTrainedModel, peft_config: PeftConfig, seed: int) -> PeftModel:
    set_seed(seed)  # the adapters' first weights are random
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"peft_config: {reason}; correct target_modules (lora.target_modules)") from error


def sampling_options(args: XPOConfig) -> Sampling:
    """The sampling options of a configuration."""
    return Sampling(
        **{name: getattr(args, name) for name in SAMPLING_FIELDS},
        extra=_options(args.generation_kwargs),
        batch_size=args.generation_batch_size,
    )


def reference_store(args: XPOConfig) -> Store | None:
    """The store that a configuration names; None for none."""
    if args.reference_store in ("off", False, None):
        return None
    try:
        return Store(args.reference_store)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"reference_store={args.reference_store!r} cannot be written ({error}); choose another file, or off"
        ) from error


def reference_dtype(args: XPOConfig) -> torch.dtype | None:
    """Of a second model; None leaves its own."""
    # Under DeepSpeed the policy is trained in half precision, without autocast.
    if args.deepspeed_plugin is None:
        return None
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def precision(args: XPOConfig) -> str:
    """What the numbers of a forward pass depend on besides the weights."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights"


def _options(options: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(options, str)  # TrainingArguments has parsed JSON from a command line
    return options or {}


def _disable_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "lora_dropout" in name:  # has its own setting
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that functions are called with: dropout, attention_dropout, layerdrop, resid_pdrop.
        for rate, value in vars(module).items():
            if "drop" in rate and isinstance(value, float):
                vars(module)[rate] = 0.0
