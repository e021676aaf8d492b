"""A short run on any number of processes; rank 0 writes its logs and weights. Started by torchrun.

torchrun --standalone --nproc_per_node 2 tests/distributed_run.py OUT PAIRS_PER_PROCESS ACCUMULATION [WORD ...]

Words: lora; learned (adapters that were trained before); zero1, zero2, zero3, zero3_offload; synced (generation);
sharded (reference); resume (from step 4); replay (of all pairs, with a reference that moves), past (the sampler).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import prompts, share_of_e, step_logs
from peft import LoraConfig, get_peft_model

from xpo import XPOConfig, XPOTrainer
from xpo.launch.processes import exit_at_once
from xpo.models.loading import tiny_model, tiny_tokenizer

CONF = Path(__file__).parents[1] / "conf" / "deepspeed"
# DeepSpeed keeps small parameters whole: without this, all of a tiny model's, and nothing would be tested.
NOTHING_STAYS_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}

REPLAY: dict[str, Any] = {
    "replay": "all",
    "replay_ratio": 0.9,  # 7 for 8 fresh pairs: not as many for each process
    "replay_updates": 2,
    "iterations": 2,
    "reference_update": "iteration",
}


def deepspeed_config(name: str) -> dict[str, Any]:
    """The configuration of the group's option; under ZeRO-3 every parameter is divided."""
    config: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())["config"]
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"] |= NOTHING_STAYS_WHOLE
    return config


def run(out: Path, pairs: int, accumulation: int, words: list[str]) -> None:
    """Eight steps, a log every two, checkpoints after four and eight, an evaluation at the end."""
    zero = [word for word in words if word.startswith("zero")]
    args = XPOConfig(
        output_dir=str(out / "model"),
        max_steps=8,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=4,
        generation_batch_size=2 if "synced" in words else None,  # in an evaluation, rank 0 has a batch more than rank 1
        max_new_tokens=6,
        max_length=128,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        logging_steps=2,
        save_strategy="steps",
        save_steps=4,
        disable_tqdm=True,
        alpha=1e-3,
        deepspeed=deepspeed_config(zero[0]) if zero else None,
        ds3_gather_for_generation="synced" not in words,
        shard_reference="sharded" in words,
        pairs_file=str(out / "pairs.jsonl"),
        **(REPLAY if "replay" in words else {}),
        sampler="past" if "past" in words else "reference",
        probe_prompts=3,
        probe_samples=3,
    )
    model, lora = tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if "learned" in words:
        torch.manual_seed(0)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    trainer = XPOTrainer(
        model,
        reward_model=share_of_e,
        args=args,
        processing_class=tiny_tokenizer(),
        train_dataset=prompts(24),
        eval_dataset=prompts(5),
        peft_config=lora if "lora" in words else None,
    )
    trainer.train(resume_from_checkpoint=str(out / "model" / "checkpoint-4") if "resume" in words else None)
    evaluation = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        evaluation.pop("eval_runtime")
        result = {
            "world_size": args.world_size,
            "engine": type(trainer.model_wrapped).__name__,
            "optimizer": type(getattr(trainer.model_wrapped, "optimizer", trainer.optimizer)).__name__,
            "logs": step_logs(trainer),
            "evaluation": evaluation,
        }
        (out / ("resumed.json" if "resume" in words else "logs.json")).write_text(json.dumps(result))
    if args.world_size > 1:  # together: gloo may abort a rank whose peer has gone
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    exit_at_once(0)
