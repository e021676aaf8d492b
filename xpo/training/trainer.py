"""XPOTrainer: Exploratory Preference Optimization as a transformers Trainer."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainerControl
from transformers.trainer_utils import has_length

from xpo.config.errors import ConfigError, JudgeStopped
from xpo.data.prompt_sets import PromptDataset, collate_prompts
from xpo.judges.labelling import Labelled, Labeller
from xpo.models.zero import check_engine, is_divided
from xpo.objectives.labels import Labels
from xpo.objectives.losses import gradient_sizes, xpo_loss
from xpo.rewards import RewardModel
from xpo.sampling.completions import Completions, micro_batches, take_pairs, token_batches, tokens_of_pairs
from xpo.sampling.noise import LABEL, sampling_noise
from xpo.sampling.pairs import StepPrompts
from xpo.sampling.reference_logps import ReferenceLogps
from xpo.tracking.metrics import Meter, bonus_share, mean_of, pair_metrics, rollout_metrics
from xpo.training import setup
from xpo.training.callbacks import WatchBonus
from xpo.training.checkpoints import ResumableTrainer
from xpo.training.config import XPOConfig
from xpo.training.iterations import Iterations
from xpo.training.judging import who_judges
from xpo.training.pair_memory import PairMemory
from xpo.training.prompt_queue import MicroBatch, PromptQueue


class XPOTrainer(ResumableTrainer):
    """Trains a language model with XPO (arXiv 2405.21046).

    For each optimizer step::

        prompts      B prompts of the whole step, all micro-batches at once    prompt_queue
        sample       first ~ policy, second ~ reference, or who `sampler` says sample_pairs
        label        first or second wins, tie, invalid                        labeller
        reference    log pi_ref(first), log pi_ref(second)                     reference
        remember     the pairs of the run so far; recall some of them          memory
        for each micro-batch:
            forward  log pi(first), log pi(second)                             policy_forward
            loss     preference loss of beta * difference of log-ratios        xpo_loss
                     + bonus, XPO's is alpha * log pi(second)
            backward
        optimizer step, metrics                                                meter

    `get_batch_samples` does everything down to the reference, `compute_loss` the rest.

    Each optimizer step trains on its own pairs, as in TRL. Algorithm 1 accumulates them: `replay="all"`.

    Args:
        model: the policy, or its name.
        ref_model: the reference, or its name; None for the policy as it is now, under new adapters without them.
        judge: says who wins: a `Judge`, one of TRL's kind, or a function (prompts, first, second) -> B margins. None:
            the reward model's score difference does.
        reward_model: scores completions: a `RewardModel`, a sequence classifier, its name, a function (prompts,
            completions) -> B scores, or a list of these: their sum. Needed if there is no judge.
        args: the configuration.
        processing_class: the policy's tokenizer; None loads the one that belongs to the model.
        reward_processing_class: the tokenizer of a classifier; None loads the one that belongs to it.
        train_dataset: a column "prompt", of text or of messages; functions may ask for others.
        eval_dataset: held-out prompts, or several sets by name.
        peft_config: trains adapters instead of the whole model.
        scorers: independent reward models for evaluation, by metric name. Training never sees them.
        callbacks, optimizers: as in `transformers.Trainer`.
        reward_funcs, reward_processing_classes: TRL's names of the above. The last three are None in TRL's scripts.

    Raises:
        ConfigError: what a user can mend, in one line.
        JudgeStopped: in training, a judge that cannot go on; there is a checkpoint of the last finished step.
    """

    control: TrainerControl
    # The loss of a micro-batch is already its share of the optimizer step's mean.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        ref_model: PreTrainedModel | str | None = None,
        *,  # TRL has the following ones in another order
        judge: Any = None,
        reward_model: Any = None,
        args: XPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_class: Any = None,
        train_dataset: PromptDataset | list[dict[str, Any]] | None = None,
        eval_dataset: PromptDataset | dict[str, PromptDataset] | None = None,
        peft_config: PeftConfig | None = None,
        scorers: dict[str, RewardModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        data_collator: None = None,
        compute_metrics: None = None,
        preprocess_logits_for_metrics: None = None,
    ):
        setup.check_unused(data_collator, compute_metrics, preprocess_logits_for_metrics)
        args = args or XPOConfig(output_dir="xpo_output")
        if train_dataset is None:
            raise ConfigError("train_dataset=None; pass a data set with a column 'prompt'")
        reward_model = reward_model or reward_funcs or args.reward_model_path
        reader = reward_processing_class or reward_processing_classes
        judge, reward_model = who_judges(judge, reward_model, reader, args, model, processing_class)
        model, ref_model, tokenizer = setup.prepare_models(model, ref_model, processing_class, peft_config, args)
        self.tokenize = setup.prompt_tokenizer(args, tokenizer, model, [judge, reward_model, *(scorers or {}).values()])
        train, held_out = self.tokenize(train_dataset, "train_dataset"), self.tokenize(eval_dataset, "eval_dataset")
        setup.check_batches(args, train)
        references = setup.build_references(args, model, ref_model, lambda: self.zero3_engine)
        self.reference = references.training
        self.sampler, _ = samplers = setup.build_samplers(args, model, tokenizer)
        self.draws = setup.build_reference_draws(args, self.reference, samplers)
        self.iterations = Iterations(args, self.reference, self.draws, references.past)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_prompts,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), self.iterations, WatchBonus()],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # older Trainers read this one for loss_is_scaled_for_ga
        self.policy_forward, forward, opponent_forward = setup.build_forwards(args, self.model, references)
        self.reference_logps = ReferenceLogps(self.reference, forward, args.tokens_at_once, self.accelerator.autocast)
        self.prompt_queue = PromptQueue(args, reads_ahead=self.draws.store is not None and args.sampler == "reference")
        self.sample_pairs = setup.build_pair_sampler(args, self.sampler, self.draws, references.past)
        self.labeller = Labeller(judge, reward_model, args, args.missing_eos_penalty, self.sum_over_ranks)
        self.meter = Meter()
        self.memory = PairMemory(args, self.sampler.pad_token_id, self.iterations, self.reference_logps, self.meter)
        self.add_callback(self.memory)
        moves = references.opponent is not self.reference
        draws = setup.build_reference_draws(args, references.opponent, samplers) if moves else self.draws
        forwards = self.policy_forward, opponent_forward
        self.evaluator = setup.build_evaluator(args, self.sampler, judge, reward_model, scorers or {}, draws, forwards)
        setup.check_metric(args, held_out, self.evaluator.measures)

    # ---- one optimizer step ------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[MicroBatch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """Everything of an optimizer step that needs no gradient: sample, label, reference.

        Returns:
            The micro-batches: what `PairBatch.tensors` returns, with reference_logps (2, b), label, win_probability
            and age, in steps, (b,) each. And the number of pairs on all ranks.
        """
        step = self.prompt_queue.step(epoch_iterator, num_batches, self.state)
        if not step.sizes or (len(step.sizes) < num_batches and not has_length(self.train_dataset)):
            setup.check_stream(self.args, self.state)
            return [], None
        if self.is_deepspeed_enabled:
            check_engine(self.model_wrapped, self.args.deepspeed_plugin.deepspeed_config, self.args.world_size)
        self.iterations.enter(self.model, self.zero3_engine, self.state)
        drawn = None if self.state.global_step % self.args.replay_updates else self._rollout(step)
        batch, older = self.memory.recall(step, drawn, self.state)
        fresh = self.accelerator.reduce(torch.tensor(sum(step.sizes), device=device), "sum")
        self.meter.step(queries=0 if drawn is None else int(fresh) * self.labeller.queries(self.sample_pairs.number))
        return micro_batches(batch, step.sizes), fresh + older

    def _rollout(self, step: StepPrompts) -> dict[str, Tensor]:
        """New pairs: sampled, labelled, with log pi_ref, and kept."""
        with self.meter.timed("rollout"), self.accelerator.autocast():
            when = self.state.global_step, int(self.state.epoch or 0)
            drawn, fresh = self.sample_pairs(self.model, self.zero3_engine, step, *when)
        with self.meter.timed("preference"):
            first, second, labelled = self._label(step, drawn)
        pairs = self.sample_pairs.pairs(step, first, second)
        batch = pairs.tensors()
        with self.meter.timed("reference"):
            reference_logps = self.reference_logps(batch, range(len(step.ids)))
        self.meter.tokens += sum(int(one.mask.sum()) for one in drawn) - int(drawn[1].mask[: len(fresh)][~fresh].sum())
        hits = {"perf/reference_hit_rate": mean_of((~fresh).float())}
        self.meter.add(rollout_metrics(pairs, labelled, self.accelerator) | hits)
        self.memory.keep(step, pairs, labelled, reference_logps, self.state)
        known = {name: values.to(self.args.device) for name, values in labelled.labels._asdict().items()}
        return batch | known | {"reference_logps": reference_logps, "age": torch.zeros_like(known["label"])}

    def _label(self, step: StepPrompts, drawn: list[Completions]) -> tuple[Completions, Completions, Labelled]:
        """The pairs of the whole step and their labels. All ranks stop if the judge of one cannot go on."""
        uniform = sampling_noise((self.args.seed, self.state.global_step, LABEL), step.rows, 1)[:, 0]
        labelled, verdicts = None, 0
        stopped: JudgeStopped | None = None
        try:
            first, second = self.labeller.best_and_worst(step.prompts, drawn)
            labelled = self.labeller(step.prompts, first, second, uniform, counted=len(drawn) > 2)
            verdicts = int(labelled.margin.isfinite().sum())
        except JudgeStopped as error:
            stopped = error
        any_stopped, verdicts = self.sum_over_ranks(torch.tensor([labelled is None, verdicts])).tolist()
        if labelled is not None and not any_stopped and (stopped := self.labeller.gives_up(verdicts)) is None:
            return first, second, labelled
        self.keep_checkpoint()
        raise stopped or JudgeStopped("the judge of another process has stopped; its error says why")

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
            inputs: a micro-batch, see `get_batch_samples`.
            num_items_in_batch: pairs of the optimizer step on all ranks.
        """
        alpha, beta, lengths = self.alpha, self.beta, inputs["completion_mask"].sum(dim=2)
        policy_logps, reference_logps = self.policy_forward(model, inputs), inputs["reference_logps"]
        labels, fresh = Labels(inputs["label"], inputs["win_probability"]), inputs["age"] == 0
        pairs = policy_logps, reference_logps, labels, alpha, beta, self.args, lengths
        dpo, xpo = xpo_loss(*pairs)
        self.meter.add(pair_metrics(policy_logps.detach(), reference_logps, labels.label, beta, dpo, xpo, fresh))
        self.meter.add(bonus_share(*gradient_sizes(*pairs)))
        self.meter.last |= {"alpha": alpha, "beta": beta}
        # Gradients are averaged over the ranks.
        return (dpo + xpo).sum() * self.args.world_size / num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, in parts of `tokens_per_micro_batch`; no step on a loss not finite."""
        with self.meter.timed("update"):
            lengths = tokens_of_pairs(inputs)
            # Under DeepSpeed, every process must do equally many passes.
            budget = None if self.is_deepspeed_enabled else self.args.tokens_at_once
            *first, last = token_batches(lengths, range(len(lengths)), budget, self.policy_forward.way == "packed")
            loss = torch.zeros((), device=self.args.device)
            for rows in first:
                with self.accelerator.no_sync(model):
                    loss += super().training_step(model, take_pairs(inputs, rows), num_items_in_batch)
            loss += super().training_step(model, take_pairs(inputs, last), num_items_in_batch)
        if not loss.isfinite():
            raise self.diverged(f"the loss is {loss.item()}")
        return loss

    # ---- metrics and evaluation --------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the pairs since the last log to the Trainer's own, reduced over the ranks."""
        if "learning_rate" in logs:  # a step of training; evaluations and the final summary have none
            logs = logs | self.meter.pop(self.sum_over_ranks)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: PromptDataset | dict[str, PromptDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Win rate against the reference, scores, KL and more on held-out prompts; see `xpo.evaluation.evaluator`."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, None, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {key: value for part in parts for key, value in part.items()}
        if dataset is None:
            raise ConfigError("eval_dataset=None; pass held-out prompts to XPOTrainer or to evaluate()")
        dataset = self.tokenize(dataset, "eval_dataset")
        if self.model_wrapped is self.model and self.model.device != self.args.device and not is_divided(self.model):
            self.model.to(self.args.device)  # before training, the Trainer may have left it where it was
        try:
            result = self.evaluator(
                self.model, dataset, self.accelerator, self.args, metric_key_prefix, self.zero3_engine, self.beta
            )
        except JudgeStopped:
            self.keep_checkpoint()
            raise
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        self._memory_tracker.stop_and_update_metrics(result)
        return result
