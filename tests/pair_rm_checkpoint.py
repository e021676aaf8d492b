"""A tiny PairRM with random weights, in both on-disk layouts: 0.3 s, 1.5 MB, no download."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceNormalizer, sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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
    whose tokenizer lacks the markers, whose vocabulary has another size, and whose own weights are
    float16, like microsoft/deberta-v3-large.
    """
    return write_pair_rm(directory, tiny_tokenizer(), tiny_config())


def write_pair_rm(directory: Path, tokenizer: Tokenizer, config: DebertaV2Config) -> tuple[Path, Path]:
    """The same of any tokenizer, without the markers, and size; the vocabulary's size is the tokenizer's."""
    hf, ranker, backbone = directory / "hf", directory / "ranker", directory / "backbone"
    for folder in (hf, ranker, backbone):
        folder.mkdir(parents=True)

    config.vocab_size = tokenizer.get_vocab_size() + 9
    config.dtype = torch.float16
    config.save_pretrained(backbone)
    own_weights = _weights(DebertaV2Model(config).half(), config.initializer_range)
    save_file(own_weights, backbone / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(backbone / "tokenizer.json"))

    tokenizer.add_tokens(list(MARKERS))
    vocabulary = tokenizer.get_vocab()
    config.vocab_size = len(vocabulary)
    config.dtype = torch.float32
    # What llm-blender's DebertaV2PairRM reads.
    config.n_tasks, config.drop_out, config.sep_token_id = 1, 0.05, vocabulary["[SEP]"]
    names = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    for name, marker in zip(names, MARKERS, strict=True):
        setattr(config, name, vocabulary[marker])
    tokenizer.save(str(hf / "tokenizer.json"))
    config.save_pretrained(hf)
    ranker_config = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": str(backbone),
        "source_maxlength": 1224,
        "candidate_maxlength": 412,
        "n_tasks": 1,
        "fp16": True,
    }
    (ranker / "config.json").write_text(json.dumps(ranker_config))
    weights = _weights(PairRMNetwork(config), config.initializer_range)
    for folder in (hf, ranker):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return hf, ranker


def tiny_tokenizer(corpus: Sequence[str] = CORPUS, vocab_size: int = 300) -> Tokenizer:
    """DeBERTa-v3's kind of tokenizer: Unigram, [PAD] [CLS] [SEP] [UNK] first and [MASK] last, nmt_nfkc before."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces = unigram_pieces(corpus, vocab_size - len(special))
    tokenizer = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *pieces], unk_id=3))
    rules = sentencepiece_model_pb2.ModelProto()
    rules.ParseFromString(SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(),
            normalizers.Precompiled(rules.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([*special, "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def unigram_pieces(corpus: Sequence[str], number: int) -> list[tuple[str, float]]:
    """All characters, then the substrings of words that spare the most tokens; with log-probabilities.

    In place of tokenizers' UnigramTrainer, whose vocabulary is another one in each process.
    """
    counts: Counter[str] = Counter()
    for word in (f"\u2581{word}" for text in corpus for word in text.split()):
        spans = itertools.combinations(range(len(word) + 1), 2)
        counts.update(word[start:end] for start, end in spans if end - start <= 12)
    longer = [piece for piece in counts if len(piece) > 1]
    longer.sort(key=lambda piece: (-counts[piece] * (len(piece) - 1), piece))
    characters = sorted(piece for piece in counts if len(piece) == 1)
    kept = [*characters, *longer[: number - len(characters)]]
    total = sum(counts[piece] for piece in kept)
    return [(piece, math.log(counts[piece] / total)) for piece in kept]


def tiny_config() -> DebertaV2Config:
    """DeBERTa-v3-large's settings at hidden size 32 with two layers."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.25,  # so large that logits differ between texts
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


def _weights(module: nn.Module, std: float) -> dict[str, torch.Tensor]:
    """Weights of this standard deviation; layer norms stay."""
    generator = torch.Generator().manual_seed(0)
    weights = module.state_dict()
    for name, value in sorted(weights.items()):
        if "LayerNorm" not in name:
            value.normal_(std=std, generator=generator)
    return weights
