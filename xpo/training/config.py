"""XPOConfig: transformers' TrainingArguments and what XPO adds to them."""

import os
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from xpo.config import options
from xpo.config.errors import ConfigError, first_line
from xpo.config.schema import (
    GROUPS,
    as_argument,
    check_best,
    check_bonus,
    check_deepspeed,
    check_engine,
    check_iterations,
    check_lengths,
    check_probe,
    check_replay,
    check_weights,
)
from xpo.data.pair_file import NAME as PAIRS
from xpo.models.zero import connect, prepare_environment
from xpo.sampling.completions import tokens_at_once
from xpo.sampling.sampler import check_generation_kwargs
from xpo.sampling.vllm import check_vllm

_DICTIONARIES = {  # of options, and an example of each
    "generation_kwargs": "{'no_repeat_ngram_size': 2}",
    "chat_template_kwargs": "{'enable_thinking': False}",
    "model_init_kwargs": "{'attn_implementation': 'eager'}",
}
_LESS_IS_BETTER = ("kl", "lose_rate", "invalid_rate", "flip_rate")  # of the metrics of evaluations
# Of TrainingArguments, what would have no effect or another one than its name says; and what to do instead.
_UNSUPPORTED = {
    "auto_find_batch_size": ", and set tokens_per_micro_batch: the pairs of a step are not the memory's to choose",
    "bf16_full_eval": ": evaluations compute as training does",
    "fp16_full_eval": ": evaluations compute as training does",
}
_TEMPLATE_ARGUMENTS = {"tokenize", "add_generation_prompt", "continue_final_message"}


@dataclass
class XPOConfig(options.LossOptions, options.PreferenceOptions, options.SamplingOptions, TrainingArguments):
    """Arguments of `XPOTrainer`. Names and meanings are those of TRL's XPOConfig.

    Everything of `transformers.TrainingArguments` applies too. Other defaults than there:
    learning_rate 5e-7, logging_steps 10, bf16 on GPUs that have it, report_to "none",
    remove_unused_columns and logging_nan_inf_filter False. hub_strategy is "every_save" or "end": no checkpoints there.

    Args:
        alpha: weight of the exploration bonus; a list gives one value per iteration if there are several, or else per
            epoch, the last one for the rest.
        beta: strength of the KL regularisation (for loss_type "ipo": tau); a list as for alpha.
        loss_type: "sigmoid" (DPO), "ipo", "hellinger" or "forward_kl"; see `xpo.objectives.losses`.
        bonus: "xpo", another one of `xpo.objectives.bonuses`, or "none".
        bonus_on: the completion that the bonus is on: "first", "second" or "rejected"; None: its paper's.
        bonus_clip: nats of log pi/pi_ref beyond which the bonus no longer grows; None for no limit.
        bonus_per_token: the bonus sees pi(y)^(1/|y|), which does not vanish with the number of tokens, for pi(y).
        sampler: who draws the second completion: "reference"; "policy", as in online DPO; "iterate", the policy that
            the iteration began with; "past", that of one of the iterations so far, each as likely; "best_of_n", where
            both are the policy's, the best and the worst of sampler_candidates.
        sampler_candidates: completions of each prompt that "best_of_n" chooses from.
        replay: earlier pairs to train on beside a step's own: none ("fresh"), those of a "window", or "all".
        replay_ratio: of these for each fresh one, drawn anew for each step; a large number takes all there are.
        replay_window: the last so many optimizer steps; None: the current iteration.
        replay_updates: optimizer steps for each rollout.
        iterations: equal parts of the run, Algorithm 1's t. The policy that each begins with is kept in output_dir.
        reference_update: "iteration": the reference becomes the policy that an iteration begins with; or "never".
        missing_eos_penalty: subtracted from the score of a completion without an EOS token; None for nothing.
        labels: "hard", the likelier winner has won; "soft", the loss weighs both directions by
            sigmoid(margin / label_temperature); "sampled", the winner is drawn with that probability.
        label_temperature: of soft and sampled labels.
        tie_threshold: margins of at most this size are ties, which carry no preference.
        normalize_scores: scale the reward model's scores to mean 0 and standard deviation 1 over all scores
            of the run so far; the EOS penalty is in these units then. Evaluation reports raw scores.
        clip_scores: the largest score by absolute value, after normalization; None for no limit.
        max_new_tokens: tokens of a completion at most.
        max_length: tokens of prompt and completion at most.
        prompt_overflow: prompts longer than max_length - max_new_tokens: "drop", "truncate" (keeps the end) or "error".
        special_tokens: what reads like a special token in a prompt (`<|im_start|>`) is "text", or it is one: "parse".
        chat_template_kwargs: what the chat template takes beside messages: {"enable_thinking": False} for Qwen3.
        temperature: of the sampling distribution; 0 decodes greedily.
        top_p: smallest set of tokens with this probability is kept; 1 keeps all.
        top_k: number of likeliest tokens kept; 0 keeps all.
        min_p: tokens at least this probable, relative to the likeliest, are kept; None keeps all.
        repetition_penalty: above 1 discourages tokens that occurred before.
        generation_kwargs: further options of transformers' GenerationConfig; they win over the ones above.
        generation_batch_size: prompts in one generate call, to bound memory; None: the whole optimizer step.
        eval_greedy: decode greedily in evaluation instead of sampling with a fixed seed.
        probe_prompts: the first so many held-out prompts show how much the policy explores; 0 for none. See
            `xpo.evaluation.probe`.
        probe_samples: completions of each, by policy and reference.
        pair_forward: "packed", one row [prompt | y | y~ | next prompt | ...] without padding; "shared", one row
            [prompt | y | y~] for each pair; "separate", one for each completion; "auto", the first that the
            architecture allows, packed on CPUs only (on a GPU it compiles FlexAttention). The results are equal up to
            rounding. Under gradient checkpointing packed becomes shared.
        tokens_per_micro_batch: tokens of one forward and backward, with padding if not packed, to bound memory: a
            larger micro-batch goes through in parts. None: 1,536 on a CPU, 16,384 elsewhere.
        reference_store: an SQLite file that keeps the reference's completions for all runs that need the same ones;
            None or "off" draws them afresh.
        reference_batch_size: where the store lacks completions, those of the next steps are drawn along with this
            step's, up to so many prompts in all; 1 draws each step's own.
        ds3_gather_for_generation: under DeepSpeed ZeRO-3, bring the whole policy together on every process to sample
            from it; False fetches it layer by layer, token after token: slower, in less memory.
        shard_reference: under DeepSpeed, leave each process its part of the reference, brought together when asked.
        pairs_file: keeps every labelled pair of the run, for `xpo.data.pair_file.export` and replay; None keeps none
            or, for replay and push_pairs, output_dir/pairs.jsonl.
        push_pairs: `push_to_hub` sends the pairs, too, as a data set of their own: hub_model_id + "-pairs".
        disable_dropout: set every dropout of policy and reference to 0; that of adapters stays as configured.
        model_init_kwargs: for `from_pretrained` of a model given by name; dtype is float32 unless they say otherwise.
        trust_remote_code: allow models that bring their own code; no field, as TRL's ModelConfig has one of this name.
        reward_model_path: a reward model by name or path, if no `reward_model` is passed to the trainer.
        reward_weights: of each reward model; None: all 1.
        judge: the name of a judge, "pair_rm", if none is passed to the trainer.
        generation_engine: what draws completions: "transformers" or "vllm", in the trainer's process. A reference with
            another configuration than the policy's is transformers' in any case.
        vllm_enforce_eager: do not compile vLLM's model.
        vllm_gpu_memory_utilization: the share of a GPU's memory that vLLM takes, weights included.
        vllm_enable_sleep_mode: vLLM gives a GPU's memory back between rollouts.
        vllm_check_steps: rollouts between two checks that vLLM's log-probabilities are the model's; None for none.
        use_vllm: True is generation_engine="vllm", as in TRL.
    """

    # transformers' own, with other defaults
    learning_rate: float = options.TrainingOptions.learning_rate
    logging_steps: float = options.TrainingOptions.logging_steps
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    report_to: None | str | list[str] = "none"  # noqa: RUF036  # HfArgumentParser needs this order
    dataloader_pin_memory: bool = True  # resolved in __post_init__, as the next ones
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    bf16: bool | None = None

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTIONARIES]

    # Of the groups of conf/. list[float] is what HfArgumentParser can read; a single number is welcome too.
    alpha: list[float] = field(default_factory=lambda: [options.LossOptions.alpha])
    beta: list[float] = field(default_factory=lambda: [options.LossOptions.beta])
    sampler: str = options.SamplerOptions.second
    sampler_candidates: int = options.SamplerOptions.candidates
    replay: str = options.ReplayOptions.pairs
    replay_ratio: float = options.ReplayOptions.ratio
    replay_window: int | None = options.ReplayOptions.window
    replay_updates: int = options.ReplayOptions.updates
    iterations: int = options.TrainingOptions.iterations
    reference_update: str = options.ReferenceOptions.update
    prompt_overflow: str = options.DataOptions.prompt_overflow
    special_tokens: str = options.DataOptions.special_tokens
    chat_template_kwargs: dict[str, Any] | str | None = None
    generation_kwargs: dict[str, Any] | str | None = None
    generation_batch_size: int | None = options.GenerationOptions.batch_size
    generation_engine: str = options.GenerationOptions.engine
    vllm_enforce_eager: bool = options.GenerationOptions.vllm_eager
    vllm_gpu_memory_utilization: float = options.GenerationOptions.vllm_memory
    vllm_enable_sleep_mode: bool = options.GenerationOptions.vllm_sleep
    vllm_check_steps: int | None = options.GenerationOptions.vllm_check_steps
    eval_greedy: bool = options.EvaluationOptions.greedy
    probe_prompts: int = options.EvaluationOptions.probe_prompts
    probe_samples: int = options.EvaluationOptions.probe_samples
    push_pairs: bool = options.TrainingOptions.push_pairs
    pair_forward: str = options.TrainingOptions.pair_forward
    tokens_per_micro_batch: int | None = options.TrainingOptions.tokens_per_micro_batch
    reference_store: str | None = options.ReferenceOptions.store
    reference_batch_size: int = options.ReferenceOptions.batch_size
    ds3_gather_for_generation: bool = options.DeepspeedOptions.gather_for_generation
    shard_reference: bool = options.DeepspeedOptions.shard_reference

    # of the library only
    pairs_file: str | None = None
    disable_dropout: bool = True
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: InitVar[bool] = False
    reward_model_path: str | None = None
    reward_weights: list[float] | None = None
    judge: str | None = None
    use_vllm: bool = False

    def __post_init__(self, trust_remote_code: bool) -> None:
        self.trust_remote_code = trust_remote_code
        if self.judge not in (None, "pair_rm"):
            raise ConfigError(f"judge={self.judge!r} is not 'pair_rm'; pass any other judge to the trainer")
        if self.use_vllm:
            self.generation_engine = "vllm"
        self.top_k = self.top_k or 0  # TRL has None for all tokens
        # Without this, several processes without a GPU would each believe to be alone. Apple's MPS knows no float64.
        if not torch.accelerator.is_available() or torch.backends.mps.is_available():
            self.use_cpu = True
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, imported by others, warns that it found none
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not (self.fp16 or self.use_cpu)
            self.bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        follows_metric = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        wants_metric = self.load_best_model_at_end or follows_metric or self.save_strategy == "best"
        if wants_metric and self.metric_for_best_model is None:
            self.metric_for_best_model = "win_rate"
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(_LESS_IS_BETTER):
            self.greater_is_better = False
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        zero = bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        check_deepspeed(self.tokens_per_micro_batch, self.shard_reference, zero, as_argument)
        if self.fsdp:
            raise ConfigError(
                f"fsdp={self.fsdp!r} is not supported, as rollouts need whole parameters; "
                "use DeepSpeed ZeRO-3 (deepspeed=zero3)"
            )
        if zero:
            prepare_environment(self.use_cpu)
        TrainingArguments.__post_init__(self)  # makes dictionaries of those given as JSON
        if follows_metric:  # which may be better the greater it is
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | (self.lr_scheduler_kwargs or {})  # type: ignore[operator]
        self._check_dictionaries()
        self._check_inherited()
        self._take_generation_kwargs()
        for group in GROUPS:
            for key in options.keys(group):
                if key.argument is not None:
                    key.check_value(key.argument, vars(self)[key.argument])
        check_lengths(self, as_argument)
        check_bonus(self, as_argument)
        check_weights(self, self.iterations, self.max_steps, self.num_train_epochs, as_argument)
        check_replay(self.replay, self.replay_ratio, self.replay_window, as_argument)
        moving = (self.sampler, self.sampler_candidates, self.iterations, self.reference_update)
        check_iterations(*moving, self.max_steps, self.replay_updates, as_argument)
        if (self.replays or self.push_pairs) and self.pairs_file is None:
            self.pairs_file = str(Path(self.output_dir) / PAIRS)
        check_probe(self.probe_prompts, self.temperature, as_argument)
        check_engine(self.generation_engine, self, self.ds3_gather_for_generation, as_argument)
        if self.generation_engine == "vllm":
            check_vllm(self.generation_kwargs or {})  # type: ignore[arg-type]
        if zero:
            connect(self.device)
        # One process drives one device; several GPUs need a launcher (torchrun, accelerate), not DataParallel.
        self._n_gpu = min(self.n_gpu, 1)
        if self.accelerator_config.dispatch_batches is None:
            # Batches hold texts, which accelerate cannot scatter from rank 0: each rank reads its own share.
            self.accelerator_config.dispatch_batches = False

    @property
    def replays(self) -> bool:
        """Whether steps train on pairs that were drawn before."""
        return self.replay != "fresh" or self.replay_updates > 1

    @property
    def pairs_of_a_step(self) -> int:
        """Pairs that all processes draw for an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a pass through a model: `tokens_per_micro_batch`, or what suits the device."""
        return self.tokens_per_micro_batch or tokens_at_once(self.device)

    def _check_inherited(self) -> None:
        """ConfigError for what TrainingArguments know and this trainer does not do, and for a schedule that fails."""
        check_best(self.save_strategy, self.eval_strategy, as_argument)
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect on pairs; leave it out, or set "
                "labels='soft' (preference=soft)"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ConfigError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} is not supported, as lengths are known only "
                "when completions are drawn; choose 'random' or 'sequential'"
            )
        for name, remedy in _UNSUPPORTED.items():
            if vars(self)[name]:
                raise ConfigError(f"{name}={vars(self)[name]!r} is not supported; leave it out{remedy}")
        if "schedule_free" in self.optim:
            raise ConfigError(
                f"optim={OptimizerNames(self.optim).value!r} is not supported: its weights in training are "
                "not those to evaluate and keep; choose another, such as 'adamw_torch'"
            )
        try:
            unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
            get_scheduler(self.lr_scheduler_type, unused, 0, 10**6, self.lr_scheduler_kwargs)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(
                f"lr_scheduler_type={SchedulerType(self.lr_scheduler_type).value!r} with lr_scheduler_kwargs="
                f"{self.lr_scheduler_kwargs!r} is no schedule ({first_line(error)}); correct them"
            ) from error

    def _check_dictionaries(self) -> None:
        for name, example in _DICTIONARIES.items():
            value = vars(self)[name]
            if not isinstance(value, dict | None):
                raise ConfigError(f"{name}={value!r} is no dictionary; give one such as {example}")
        for name in _TEMPLATE_ARGUMENTS.intersection(self.chat_template_kwargs or {}):
            raise ConfigError(f"chat_template_kwargs.{name} is set for each prompt; leave it out")

    def _take_generation_kwargs(self) -> None:
        """Options of sampling that generation_kwargs repeats win, and become the fields' values."""
        rest = dict(self.generation_kwargs or {})  # type: ignore[arg-type]
        for key in options.keys(options.SamplingOptions):
            if key.name != "max_length":  # of prompt and completion here
                setattr(self, key.name, rest.pop(key.name, vars(self)[key.name]))
        check_generation_kwargs(rest, self.max_new_tokens)
        self.generation_kwargs = rest or None


def value_at(values: float | Sequence[float], part: float | None) -> float:
    """The value in force in an iteration or a (fractional) epoch: one for each, the last one for all the rest."""
    if not isinstance(values, Sequence):
        return float(values)
    return float(values[min(int(part or 0), len(values) - 1)])
