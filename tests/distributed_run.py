"""A short run on any number of processes; rank 0 writes its logs and weights. Started by torchrun.

torchrun --standalone --nproc_per_node 2 tests/distributed_run.py OUT PAIRS_PER_PROCESS ACCUMULATION [lora]
"""

import json
import sys
from pathlib import Path

import torch
from conftest import prompts, share_of_e, step_logs
from peft import LoraConfig

from xpo import XPOConfig, XPOTrainer
from xpo.models import tiny_model, tiny_tokenizer


def run(out: Path, pairs: int, accumulation: int, lora: bool) -> None:
    """Four steps, a log every two, an evaluation at the end."""
    args = XPOConfig(
        output_dir=str(out / "model"),
        max_steps=4,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=2,
        max_new_tokens=6,
        max_length=128,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        logging_steps=2,
        save_strategy="steps",
        save_steps=4,
        disable_tqdm=True,
        use_cpu=True,
        alpha=1e-3,
    )
    trainer = XPOTrainer(
        tiny_model(),
        reward_model=share_of_e,
        args=args,
        processing_class=tiny_tokenizer(),
        train_dataset=prompts(16),
        eval_dataset=prompts(5),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, out / "weights.pt")
        evaluation.pop("eval_runtime")
        result = {"world_size": args.world_size, "logs": step_logs(trainer), "evaluation": evaluation}
        (out / "logs.json").write_text(json.dumps(result))
    if args.world_size > 1:  # together: gloo may abort a rank whose peer has gone
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), "lora" in sys.argv[4:])
