"""PairRM: a 0.4 B judge that reads two completions side by side (LLM-Blender, arXiv 2306.02561).

One row of tokens asks whether completion a of prompt x is better than completion b:

    [CLS] <|source|> x [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP]
    logit(a, b) = head([h_source; h_candidate1]) - head([h_source; h_candidate2])

where h_* are DeBERTa's last hidden states at the markers. The logit depends on which completion stands first, so both
orders are asked (see `PairwiseJudge`). Shapes: B pairs, N rows, L tokens of the longest row, H hidden size.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model
from transformers.initialization import no_init_weights

from xpo.config.checks import count, number, one_of
from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt, plain_text
from xpo.judges.llm_blender import OriginalPairRM, OriginalRanker
from xpo.judges.pairwise import PairwiseJudge
from xpo.models.batches import batches_by_length, padded
from xpo.models.devices import DTYPES, chosen_device
from xpo.models.fingerprints import digest, weights_digest
from xpo.models.hub import local_directory

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")  # in the order of their ids
ANY_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
SOURCE_TOKENS = 1224  # of a prompt, including [CLS], its marker and [SEP]
TOTAL_TOKENS = 2048  # of a row; the completions share equally what the prompt leaves
COMPLETION_TOKENS = (TOTAL_TOKENS - SOURCE_TOKENS) // 2  # 412, what the longest prompt leaves to each
BACKENDS = ("native", "llm_blender")


class PairRMJudge(PairwiseJudge):
    """PairRM's log-odds that one completion beats another.

    P(a beats b) = sigmoid((logit(a, b) - logit(b, a)) / temperature): a logit stands for log-odds of twice its size.
    Completions that read the same, cut to the model's length, are a tie; logits that are not finite are no verdict.

    Args:
        model: hub name, or local directory in the layout of `llm-blender/PairRM-hf` (all files in one place) or of
            `llm-blender/PairRM` (`config.json` names the backbone).
        revision: branch, tag or commit of a hub name; None is its default branch.
        batch_size: rows per forward pass; it changes speed and memory only.
        both_orders, seed: see `PairwiseJudge`.
        temperature: divides the logits; larger values give milder odds.
        dtype: "float32", "bfloat16" or "float16".
        device: a torch device; None is this process's GPU, or the CPU where there is none.
        backend: "native", or "llm_blender" for the original package, 0.0.2: the same logits more slowly.

    Raises:
        ConfigError: an argument is wrong; the hub, the backend or files of the model are missing, or do not fit.
    """

    def __init__(
        self,
        model: str = "llm-blender/PairRM-hf",
        revision: str | None = None,
        batch_size: int = 16,
        both_orders: bool = True,
        seed: int = 0,
        temperature: float = 1.0,
        dtype: str = "float32",
        device: str | None = None,
        backend: str = "native",
    ):
        count("judge.batch_size", batch_size)
        number("judge.temperature", temperature, above=0)
        one_of("judge.dtype", dtype, DTYPES)
        one_of("judge.backend", backend, BACKENDS)
        super().__init__(both_orders, seed)
        self.batch_size = batch_size
        self.temperature = temperature
        self.device = chosen_device("judge.device", device)
        self.backend = backend
        checkpoint = find_pair_rm(model, revision)
        self.tokenizer = load_tokenizer(checkpoint)
        vocabulary = self.tokenizer.get_vocab()
        self.cls, self.sep, *self.markers = [vocabulary[token] for token in ("[CLS]", "[SEP]", *MARKERS)]
        if backend == "native":
            self.network: nn.Module = load_network(checkpoint).to(self.device, DTYPES[dtype])
        else:
            self.original = load_original(checkpoint, self.tokenizer, DTYPES[dtype], self.device)
            self.network = self.original.network

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        texts = [[self._clean(text) for text in part] for part in (map(plain_text, prompts), first, second)]
        rows = []  # of tokens, cut on the right to what the model reads
        for source, one, two in zip(*map(self._tokens, texts), strict=True):
            source = source[: SOURCE_TOKENS - 3]  # [CLS], marker and [SEP] take three
            room = (TOTAL_TOKENS - len(source) - 3) // 2 - 3
            rows.append((source, one[:room], two[:room]))
        different = [i for i, (_, one, two) in enumerate(rows) if one != two]
        if self.backend == "native":
            logits = self._logits([self._join(*rows[i]) for i in different])
        else:
            long = [max(len(rows[i][1]), len(rows[i][2])) > COMPLETION_TOKENS - 3 for i in different]
            logits = self._original_logits([[part[i] for i in different] for part in texts], long)
        log_odds = torch.zeros(len(rows))
        log_odds[different] = 2 * logits / self.temperature
        return log_odds

    @property
    def fingerprint(self) -> str:
        settings = self.backend, self.both_orders, self.both_orders or self.seed, self.temperature
        return digest("PairRM", weights_digest(self.network), self.tokenizer.to_str(), settings)

    def _clean(self, text: str) -> str:
        """The text without what poses as structure: markers and [SEP], also in Unicode look-alikes."""
        while ANY_MARKER.search(text):  # taking out the inner one of nested markers leaves the outer one
            text = ANY_MARKER.sub("", text)
        text = text.replace("[SEP]", " ")
        as_read = MARKERS[0] + text
        if self.tokenizer.normalizer:
            as_read = self.tokenizer.normalizer.normalize_str(as_read)
        if not as_read.startswith(MARKERS[0]):  # a combining character at the start changes the marker's end
            return self._clean(" " + text)
        as_read = as_read.removeprefix(MARKERS[0])
        return self._clean(as_read) if "[SEP]" in as_read or ANY_MARKER.search(as_read) else text

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of clean texts as they read behind a marker, uncut."""
        encodings = self.tokenizer.encode_batch([MARKERS[0] + text for text in texts], add_special_tokens=False)
        return [encoding.ids[1:] for encoding in encodings]

    def _join(self, source: list[int], one: list[int], two: list[int]) -> list[int]:
        """The row of tokens that asks whether candidate `one` is better than candidate `two`."""
        parts = zip(self.markers[:3], (source, one, two), strict=True)
        return [token for marker, text in parts for token in (self.cls, marker, *text, self.sep)]

    @torch.no_grad()
    def _logits(self, rows: list[list[int]]) -> Tensor:
        """The logit of each row, float32 (N,) on the CPU."""
        logits = torch.empty(len(rows))
        for batch in batches_by_length([(len(row), row) for row in rows], self.batch_size, longest_first=True):
            ids, mask = padded([rows[i] for i in batch])
            logits[batch] = self.network(ids.to(self.device), mask.to(self.device), self.markers).float().cpu()
        return logits

    def _original_logits(self, texts: list[list[str]], long: list[bool]) -> Tensor:
        """The same by the original, which cuts to what the longest prompt of a batch leaves: long pairs go alone."""
        logits = torch.empty(len(long))
        short = [i for i in range(len(long)) if not long[i]]
        batches = [short[start : start + self.batch_size] for start in range(0, len(short), self.batch_size)]
        for batch in [*batches, *([i] for i in range(len(long)) if long[i])]:
            logits[batch] = self.original.logits(*([part[i] for i in batch] for part in texts))
        return logits


class PairRMNetwork(nn.Module):
    """DeBERTa and PairRM's head; the names of the parts are those in the checkpoints."""

    def __init__(self, config: DebertaV2Config):
        super().__init__()
        size = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(  # the identities stand where training has dropout
            nn.Identity(), nn.Linear(2 * size, size), nn.Tanh(), nn.Identity(), nn.Linear(size, 1)
        )

    def forward(self, ids: Tensor, mask: Tensor, markers: Sequence[int]) -> Tensor:
        """logit(a, b), (N,), from ids and mask, (N, L); each row holds the first three markers once."""
        hidden = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state  # (N, L, H)
        source, one, two = (hidden[ids == marker] for marker in markers[:3])  # (N, H) each
        candidates = torch.stack([torch.cat([source, one], -1), torch.cat([source, two], -1)])  # (2, N, 2H)
        scores: Tensor = self.head_layer(candidates).squeeze(-1)  # (2, N)
        return scores[0] - scores[1]


class Checkpoint(NamedTuple):
    """Where the files of a PairRM lie. In the layout of `llm-blender/PairRM-hf`, both directories are one."""

    model: str  # what the user calls it
    directory: Path  # holds the weights
    backbone: Path  # holds the backbone's configuration, `config`
    config: dict[str, Any]

    def misfit(self, error: Exception) -> ConfigError:
        return _incomplete(self.model, f"model.safetensors does not fit ({' '.join(str(error).split())[:160]})")


def find_pair_rm(model: str, revision: str | None = None) -> Checkpoint:
    """A checkpoint in either layout, from disk or from the hub; ConfigError if there is none, or no PairRM's."""
    directory = backbone = local_directory("judge.model", model, revision)
    config = json.loads(_file(model, directory, "config.json").read_text(encoding="utf-8"))
    if config.get("ranker_type") == "pairranker":
        try:
            backbone = local_directory("model_name", config["model_name"], weights=False)
        except ConfigError as error:
            raise ConfigError(f"judge.model={model!r}, its config.json: {error}") from error
        config = json.loads(_file(model, backbone, "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "deberta-v2":
        raise ConfigError(f"judge.model={model!r} is no PairRM; use llm-blender/PairRM-hf or a copy of it")
    return Checkpoint(model, directory, backbone, config)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer with the four markers, which neither cuts nor pads; ConfigError if it is missing."""
    directory = checkpoint.directory if (checkpoint.directory / "tokenizer.json").is_file() else checkpoint.backbone
    # Never AutoTokenizer: transformers 5 rebuilds DeBERTa's tokenizer without its Unicode normaliser.
    tokenizer = Tokenizer.from_file(str(_file(checkpoint.model, directory, "tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_tokens([marker for marker in MARKERS if tokenizer.token_to_id(marker) is None])
    return tokenizer


def load_network(checkpoint: Checkpoint) -> PairRMNetwork:
    """The frozen network on the CPU; ConfigError if the weights are missing, or do not fit the configuration."""
    try:
        weights = load_file(_file(checkpoint.model, checkpoint.directory, "model.safetensors"))
        vocabulary = len(weights["pretrained_model.embeddings.word_embeddings.weight"])
        with no_init_weights():
            network = PairRMNetwork(DebertaV2Config.from_dict(checkpoint.config | {"vocab_size": vocabulary}))
        network.load_state_dict(weights, assign=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise checkpoint.misfit(error) from error
    return network.requires_grad_(False).eval()


def load_original(
    checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device
) -> OriginalPairRM | OriginalRanker:
    """The same by the original package in either layout; ConfigError also if it is not installed."""
    _file(checkpoint.model, checkpoint.directory, "model.safetensors")
    try:
        if checkpoint.directory == checkpoint.backbone:
            return OriginalPairRM(checkpoint.directory, tokenizer.normalizer, dtype, device)
        return OriginalRanker(checkpoint.directory, checkpoint.backbone, tokenizer.normalizer, dtype, device)
    except (SafetensorError, RuntimeError, AttributeError) as error:
        raise checkpoint.misfit(error) from error


def _file(model: str, directory: Path, name: str) -> Path:
    """The path of a file, which must be there."""
    if not (directory / name).is_file():
        raise _incomplete(model, f"{directory} has no {name}")
    return directory / name


def _incomplete(model: str, what: str) -> ConfigError:
    return ConfigError(f"judge.model={model!r}: {what}; point judge.model at a complete copy of llm-blender/PairRM-hf")
