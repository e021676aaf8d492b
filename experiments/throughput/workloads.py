"""The prompts of a workload, drawn once and given to every contender, and the models that answer them."""

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

PROMPTS = Path(__file__).parents[2] / "xpo" / "data" / "assets" / "prompts" / "train.jsonl"
Prompt = list[dict[str, str]]


class Workload(NamedTuple):
    """Prompt lengths in tokens, chat template included, and new tokens of every completion."""

    new_tokens: int
    max_prompt: int
    about: str

    def draw_length(self, rng: random.Random) -> int:
        raise NotImplementedError


class Chat(Workload):
    def draw_length(self, rng: random.Random) -> int:
        return rng.randint(37, 53)


class UltraFeedback(Workload):
    def draw_length(self, rng: random.Random) -> int:
        # median 80 and, before the cap, mean 170: mean / median of a log-normal is exp(sigma**2 / 2)
        return min(self.max_prompt, round(rng.lognormvariate(math.log(80), math.sqrt(2 * math.log(170 / 80)))))


class Long(Workload):
    def draw_length(self, rng: random.Random) -> int:
        return self.max_prompt


WORKLOADS: dict[str, Workload] = {
    "chat": Chat(64, 64, "37 to 53 prompt tokens, 64 new"),
    "ultrafeedback": UltraFeedback(64, 512, "log-normal prompts (median 80, mean 170 before the cap of 512), 64 new"),
    "long": Long(128, 512, "512 prompt tokens, 128 new"),
}
MODELS = ("smollm2-135m", "qwen2-0.5b-random", "tiny")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens of a prompt through the chat template."""
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def embedded_texts() -> list[str]:
    return [json.loads(line)["prompt"][0]["content"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def draw_prompts(workload: Workload, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of words of the embedded set, each as long as drawn, short of a word at most.

    A length below that of the chat template with one word becomes that.
    """
    rng = random.Random(seed)
    texts = embedded_texts()
    words = " ".join(rng.sample(texts, len(texts))).split()

    def prompt(start: int, stop: int) -> Prompt:
        return [{"role": "user", "content": " ".join(words[start:stop])}]

    prompts = []
    for _ in range(count):
        length = workload.draw_length(rng)
        start = rng.randrange(len(words) - length)
        low, high = 1, length  # words; a word is a token at least
        while low < high:
            middle = (low + high + 1) // 2
            if len(prompt_ids(tokenizer, prompt(start, start + middle))) <= length:
                low = middle
            else:
                high = middle - 1
        prompts.append(prompt(start, start + low))
    return prompts


def model_directory(name: str, scratch: Path) -> Path:
    """A directory with weights and tokenizer that both environments can read; random models go to `scratch`."""
    if name == "smollm2-135m":
        from xpo.models.loading import smollm2_directory

        return smollm2_directory()
    target = scratch / name
    if name == "tiny":
        from xpo.models.loading import tiny_model, tiny_tokenizer

        model, tokenizer = tiny_model(), tiny_tokenizer()
    else:
        tokenizer = wide_tokenizer(151_936)
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=32_768,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = Qwen2ForCausalLM(config)
    logging.disable_progress_bar()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def wide_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the embedded prompts with a ChatML template, filled up with made-up words to `size`."""
    from xpo.models.loading import tiny_tokenizer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(embedded_texts(), trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for number in range(len(vocabulary), size):
        vocabulary[f"{'e' * (number % 4)}w{number}"] = number
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=tiny_tokenizer().chat_template,
        model_max_length=32_768,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)
