"""What XPOTrainer asks of its base: checkpoints from which a run goes on exactly, and no step on bad numbers."""

import errno
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import get_sampler
from accelerate.scheduler import AcceleratedScheduler
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, has_length
from transformers.training_args import OptimizerNames

from xpo.config.errors import ConfigError, first_line
from xpo.data.prompt_sets import RepeatedSteps
from xpo.judges.labelling import Labeller
from xpo.models.zero import is_divided
from xpo.tracking.metrics import Meter, without_share
from xpo.tracking.runs import damage, has_optimizer, is_complete, last_complete_checkpoint, set_aside
from xpo.training import iterations
from xpo.training.callbacks import print_short_lines
from xpo.training.config import XPOConfig, value_at
from xpo.training.pair_memory import PairMemory
from xpo.training.pushing import PushingTrainer

logger = logging.getLogger(__name__)

# Of an optimizer's groups, what arguments may say; other entries may be its state.
_GROUP_OPTIONS = ("weight_decay", "betas", "eps", "momentum")


class _Asked(NamedTuple):
    """What the arguments say of a group of an optimizer's parameters."""

    rate: float  # before any schedule
    options: dict[str, Any]
    is_empty: bool  # it has no parameters


class OneBranch(TrainerCallback):
    """A run that goes on from an earlier checkpoint leaves none behind of how it went on before."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step and args.should_save:
            for path in set_aside(Path(args.output_dir), state.global_step):
                logger.warning("xpo: the run goes on from step %d; %s is of before", state.global_step, path)


class StreamPasses(TrainerCallback):
    """The epoch at the beginning of a stream's later passes, which the Trainer counts from behind their first step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = False

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._begun:
            state.epoch = float(int(state.epoch or 0) + 1)
        self._begun = True


class ResumableTrainer(PushingTrainer):
    """A Trainer whose checkpoints hold, for each process, what the meter and the labeller need to go on.

    Subclasses set `meter`, `labeller` and `memory` before they train. Of each log it prints one short line.
    """

    args: XPOConfig
    meter: Meter
    labeller: Labeller
    memory: PairMemory
    model: Any = None  # until the Trainer is made, as the next one
    model_wrapped: Any = None

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.add_callback(OneBranch())
        if not has_length(self.train_dataset):
            self.add_callback(StreamPasses())
        print_short_lines(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; ConfigError for a checkpoint of other DeepSpeed processes, or for none."""
        if resume_from_checkpoint is True:  # a killed run may leave a half-written checkpoint, which the Trainer takes
            newest = last_complete_checkpoint(Path(self.args.output_dir))
            if newest is None:
                raise ConfigError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir!r} holds no complete checkpoint; "
                    "leave it out"
                )
            resume_from_checkpoint = str(newest)
        if isinstance(resume_from_checkpoint, str):
            if what := damage(Path(resume_from_checkpoint)):
                raise ConfigError(f"resume_from_checkpoint={resume_from_checkpoint!r}: {what}; give another checkpoint")
            check_same_zero(Path(resume_from_checkpoint), self.args)
            state = Path(resume_from_checkpoint) / "trainer_state.json"
            if not has_length(self.train_dataset) and (TrainerState.load_from_json(str(state)).epoch or 0) >= 1:
                raise ConfigError(  # the Trainer would begin the pass with its first prompt
                    f"resume_from_checkpoint={resume_from_checkpoint!r} is of a later pass of a stream, where no run "
                    "goes on exactly; give a data set with a length, or start a new run with this model"
                )
        self.meter.load_state(Meter().state())  # this trainer may have trained before
        self.labeller.in_vain, self.labeller.scale.moments = 0, [0.0, 0.0, 0.0]
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        place = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # a checkpoint brings those of the command that wrote it
        return place

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """ConfigError for one that is not installed, or does not know its options."""
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
            # That of a file of DeepSpeed's options is made later, and keeps what its checkpoint says.
            self._asked_for = [
                _Asked(
                    rate=group.get("initial_lr", group["lr"]),
                    options={name: group[name] for name in _GROUP_OPTIONS if name in group},
                    is_empty=not group["params"],
                )
                for group in (optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else [])
            ]
            return optimizer
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(
                f"optim={OptimizerNames(self.args.optim).value!r} with optim_args={self.args.optim_args!r} cannot be "
                f"made ({first_line(error)}); choose another, or mend that"
            ) from error

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """ConfigError: prompts have no labels to predict."""
        raise ConfigError('predict() has nothing to do here; call evaluate(dataset, metric_key_prefix="test")')

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        stops = self.control.should_save and self.control.should_training_stop
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stops and self.args.save_strategy == SaveStrategy.BEST:  # the Trainer has kept this step only if it is best
            self.keep_checkpoint()

    def keep_checkpoint(self) -> None:
        """A checkpoint of the last finished step, unless there is one, for a run that cannot go on now."""
        if not self.is_in_train and self.args.load_best_model_at_end:
            return  # the weights are of another step by now
        step, self.args.save_only_model = self.state.global_step, False
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{step}"
        if step and not (is_complete(checkpoint) and has_optimizer(checkpoint)):
            self._save_checkpoint(self.model, trial=None)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """On a full disk, training goes on without this checkpoint. Several processes stop: one of them may have it."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # safetensors and torch have errors of their own
            if self.args.world_size > 1 or not is_full_disk(error):
                raise
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(checkpoint, ignore_errors=True)
            logger.warning("xpo: no room for %s; training goes on without it (%s)", checkpoint, str(error)[:100])

    def _save_rng_state(self, output_dir: str) -> None:
        # Called on every rank, before rank 0 writes trainer_state.json: it says that the checkpoint is complete, so no
        # rank may lag behind.
        super()._save_rng_state(output_dir)
        state = self.labeller.state() | {
            "meter": self.meter.state(),
            "zero_stage": _zero_stage(self.args),
            "processes": self.args.world_size,
            "pairs": self.memory.count(self.state.global_step),
        }
        (Path(output_dir) / f"xpo_state_{self.args.process_index}.json").write_text(json.dumps(state))
        if self.is_deepspeed_enabled and self.args.save_on_each_node and self.args.local_process_index == 0:
            # DeepSpeed reads this on every machine and writes it on the first one only.
            (Path(output_dir) / "latest").write_text(f"global_step{self.model_wrapped.global_steps}")
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        if not self._load_adapters(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_adapters(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_adapters(self, checkpoint: str) -> bool:
        """Loads adapters where the Trainer looks for weights in vain; whether these are of that kind."""
        model = self.model
        if self.is_deepspeed_enabled or not (isinstance(model, PeftModel) or model._hf_peft_config_loaded):
            return False
        names = model.active_adapters if isinstance(model, PeftModel) else model.active_adapters()
        if names == ["default"] and isinstance(model, PeftModel):
            return False
        for name in names:
            own = Path(checkpoint) / name  # PEFT gives each a directory, but for "default"
            file = (own if own.is_dir() else Path(checkpoint)) / "adapter_model.safetensors"
            set_peft_model_state_dict(model, load_file(file), name)
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._renew_options()
        rank, first = self.args.process_index, _read_state(checkpoint, 0)
        self.memory.expected = None if first is None else first.get("pairs")  # earlier versions' lack it
        if (state := _read_state(checkpoint, rank)) is not None:
            self.meter.load_state(state["meter"])
            self.labeller.load_state(state)
        elif first is not None:  # more processes than before share what was scored
            if rank < first["processes"]:
                raise ConfigError(f"resume: {checkpoint!r} lacks xpo_state_{rank}.json; give another checkpoint")
            self.labeller.scale.moments, self.labeller.in_vain = first["scale"], first.get("in_vain", 0)
            self.meter.load_state(without_share(first["meter"]))

    def _renew_options(self) -> None:
        """The optimizer's options and rate are those of the arguments again: a checkpoint brings its own.

        What a schedule by loss (reduce_lr_on_plateau) has made of the rate stays: it is its state.
        """
        if not self._asked_for:
            return
        schedule, groups = self.lr_scheduler, self.optimizer.param_groups
        if isinstance(schedule, AcceleratedScheduler):
            schedule = schedule.scheduler
        follows = isinstance(schedule, LambdaLR)
        if follows:
            schedule.base_lrs = [asked.rate for asked in self._asked_of(len(schedule.base_lrs))]
        for number, (group, asked) in enumerate(zip(groups, self._asked_of(len(groups)), strict=True)):
            group |= asked.options
            if follows:
                part = schedule.lr_lambdas[min(number, len(schedule.lr_lambdas) - 1)]
                group |= {"initial_lr": asked.rate, "lr": asked.rate * part(schedule.last_epoch)}

    def _asked_of(self, number: int) -> list[_Asked]:
        """What is asked of so many groups: DeepSpeed leaves out the empty ones, as with adapters alone."""
        everything = number == len(self._asked_for)
        return [asked for asked in self._asked_for if everything or not asked.is_empty]

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # They are on the device. Under DeepSpeed in bf16 the Trainer would round the reference's log-probabilities.
        return inputs

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last look before the optimizer step: a bad gradient must not reach weights or checkpoints.
        # A scaler (fp16) skips such steps by itself.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and self.accelerator.scaler is None and not math.isfinite(grad_norm):
            raise self.diverged(f"the gradient norm is {float(grad_norm)}")
        return grad_norm

    def diverged(self, what: str) -> FloatingPointError:
        """The error that ends a run whose numbers are lost."""
        return FloatingPointError(
            f"{what} at step {self.state.global_step + 1}; lower learning_rate or alpha, or raise beta "
            f"(the checkpoints up to step {self.state.global_step} in {self.args.output_dir} are sound)"
        )

    @property
    def alpha(self) -> float:
        """The weight of the exploration bonus in force."""
        return value_at(self.args.alpha, self._part)

    @property
    def beta(self) -> float:
        """The strength of the KL regularisation in force."""
        return value_at(self.args.beta, self._part)

    @property
    def _part(self) -> float | None:
        """Of the run, for which `alpha` and `beta` may have a value each."""
        return self.state.epoch if self.args.iterations == 1 else iterations.number(self.args, self.state)

    def get_train_dataloader(self) -> Any:
        """As `transformers.Trainer.get_train_dataloader`, with the prompts of a step again for all its updates."""
        loader, args = super().get_train_dataloader(), self.args
        if args.replay_updates > 1:
            # Of several processes, each has its part of the batches that the sampler makes.
            sampler = get_sampler(loader) or loader.batch_sampler.batch_sampler.sampler
            loader.set_sampler(RepeatedSteps(sampler, args.pairs_of_a_step, args.replay_updates))
        return loader

    @property
    def zero3_engine(self) -> nn.Module | None:
        """The DeepSpeed engine that divides the policy's parameters; None before training and below ZeRO-3."""
        return self.model_wrapped if self.model_wrapped is not self.model and is_divided(self.model) else None

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """A collective that adds a tensor up over the ranks; on the CPU."""
        return self.accelerator.reduce(values.to(self.args.device), "sum").cpu()


def _read_state(checkpoint: str | Path, rank: int) -> dict[str, Any] | None:
    """What a rank left in a checkpoint; None if it left nothing."""
    file = Path(checkpoint) / f"xpo_state_{rank}.json"
    if not file.is_file():
        return None
    state: dict[str, Any] = json.loads(file.read_text())
    if "metrics" in state:  # of xpo 0.1, whose meter kept seconds and tokens among the means
        sums = state.pop("metrics")
        seconds = {name[5:-2]: sums.pop(name) for name in list(sums) if name.startswith("perf/") and name[-2:] == "_s"}
        steps = max((int(count) for _, count in seconds.values()), default=0)
        tokens = sums.pop("generated_tokens", (0, 0))[0]
        totals = {part: total for part, (total, _) in seconds.items()}
        state["meter"] = {"sums": sums, "seconds": totals, "steps": steps, "tokens": tokens, "last": {}}
    return state


# What torch and safetensors say where the system has no room; the last ones are torch's when its writer is torn down.
_NO_ROOM = ("No space left", "quota exceeded", "File too large", "PytorchStreamWriter failed writing", "unexpected pos")


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk, or what this user may have of it, is full."""
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return no_room or any(words in str(error) for words in _NO_ROOM)


def _zero_stage(args: XPOConfig) -> int | None:
    """The stage of DeepSpeed ZeRO; None without DeepSpeed."""
    return None if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage


def check_same_zero(checkpoint: Path, args: XPOConfig) -> None:
    """ConfigError unless DeepSpeed can read the optimizer state in a checkpoint: each process has its own part.

    Without it, another number of processes is another batch, of which a warning tells.
    """
    state = _read_state(checkpoint, 0)
    if state is None:
        return
    then, now = (state["zero_stage"], state["processes"]), (_zero_stage(args), args.world_size)
    if then == now:
        return
    if then[0] is None and now[0] is None:
        logger.warning(
            f"xpo: {checkpoint} was written by {then[1]} processes, not {now[1]}: unless per_device_train_batch_size "
            "or gradient_accumulation_steps make up for it, a step now has another number of prompts"
        )
        return
    written, asked = (
        f"{'no DeepSpeed' if stage is None else f'ZeRO-{stage}'} and {processes} processes"
        for stage, processes in (then, now)
    )
    raise ConfigError(f"resume: {str(checkpoint)!r} was written with {written}, not {asked}; go on with these")
