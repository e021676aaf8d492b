"""XPO from a command line in TRL's words. README.md has the documented commands.

Arguments are those of ScriptArguments and ModelArguments below and of XPOConfig: `python xpo.py --help`.
"""

import sys
from dataclasses import dataclass, field

sys.path.append(sys.path.pop(0))  # this file has the name of the package, which is not to be looked for here

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from xpo import LogCompletionsCallback, XPOConfig, XPOTrainer


@dataclass
class ScriptArguments:
    """The data set."""

    dataset_name: str = field(metadata={"help": "of the hub, or a directory; a column 'prompt'"})
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"


@dataclass
class ModelArguments:
    """The policy, and the adapters to train instead of all of it."""

    model_name_or_path: str
    model_revision: str = "main"
    dtype: str = field(default="float32", metadata={"help": "of the trained weights, which bfloat16 rounds away"})
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False


def lora(arguments: ModelArguments) -> LoraConfig | None:
    """The adapters' configuration; None to train the whole model."""
    if not arguments.use_peft:
        return None
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
        modules_to_save=arguments.lora_modules_to_save,
        use_rslora=arguments.use_rslora,
        task_type="CAUSAL_LM",
    )


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, XPOConfig, ModelArguments))
    script, training, model = parser.parse_args_into_dataclasses()
    source = {"revision": model.model_revision, "trust_remote_code": model.trust_remote_code}
    dataset = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = XPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path, dtype=model.dtype, attn_implementation=model.attn_implementation, **source
        ),
        args=training,  # --reward_model_path or --judge pair_rm says who wins
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path, **source),
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=lora(model),
    )
    if training.eval_strategy != "no":
        trainer.add_callback(LogCompletionsCallback(trainer, num_prompts=8))
    trainer.train()
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()
