"""A tiny PairRM with random weights, in both on-disk layouts: 0.3 s, 0.5 MB, no download."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model

from xpo.judges.pair_rm import MARKERS, PairRMNetwork

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "What is the capital of France? The capital of France is Paris.",
    "I love you! I hate you! Hello, hi, how are you today?",
    "Write a short story about a robot that learns to paint: once upon a time there was a robot.",
    "Please explain (briefly) why 2 + 2 = 4; numbers such as 0, 1, 2, 3, 5, 6, 7, 8, 9 help.",
]


def build_tiny_pair_rm(directory: Path) -> tuple[Path, Path]:
    """Writes one random PairRM twice and its backbone once; returns (hf layout, ranker layout).

    hf: config, tokenizer with the markers and weights in one place, like llm-blender/PairRM-hf.
    ranker: a RankerConfig and the weights, like llm-blender/PairRM; `model_name` is the local backbone,
    whose tokenizer lacks the markers and whose vocabulary has another size, like microsoft/deberta-v3-large.
    """
    hf, ranker, backbone = directory / "hf", directory / "ranker", directory / "backbone"
    for folder in (hf, ranker, backbone):
        folder.mkdir(parents=True)

    tokenizer = _tokenizer()
    config = _config(vocab_size=tokenizer.get_vocab_size() + 9)
    config.save_pretrained(backbone)
    save_file(_weights(DebertaV2Model(config)), backbone / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(backbone / "tokenizer.json"))

    tokenizer.add_tokens(list(MARKERS))
    config.vocab_size = tokenizer.get_vocab_size()
    tokenizer.save(str(hf / "tokenizer.json"))
    config.save_pretrained(hf)
    ranker_config = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": str(backbone),
        "source_maxlength": 1224,
        "candidate_maxlength": 412,
        "n_tasks": 1,
        "fp16": False,
    }
    (ranker / "config.json").write_text(json.dumps(ranker_config))
    weights = _weights(PairRMNetwork(config))
    for folder in (hf, ranker):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return hf, ranker


def _tokenizer() -> Tokenizer:
    """DeBERTa-v3's kind of tokenizer: Unigram, [PAD] [CLS] [SEP] [UNK] first and [MASK] last."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        unk_token="[UNK]",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def _config(vocab_size: int) -> DebertaV2Config:
    """DeBERTa-v3-large's settings at hidden size 32 with two layers."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "type_vocab_size": 0,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_buckets": 16,
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
    }
    config: DebertaV2Config = DebertaV2Config.from_dict(settings)
    return config


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of standard deviation 0.25, so that logits differ between texts; layer norms stay."""
    generator = torch.Generator().manual_seed(0)
    weights = module.state_dict()
    for name, value in sorted(weights.items()):
        if "LayerNorm" not in name:
            value.normal_(std=0.25, generator=generator)
    return weights
