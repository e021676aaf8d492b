"""PairRM: a 0.4 B judge that reads two completions side by side (LLM-Blender, arXiv 2306.02561).

One row of tokens asks whether completion a of prompt x is better than completion b:

    [CLS] <|source|> x [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP]
    logit(a, b) = head([h_source; h_candidate1]) - head([h_source; h_candidate2])

where h_* are DeBERTa's last hidden states at the markers. The logit depends on which completion stands
first, so both orders are asked. Shapes: B pairs, N rows, L tokens of the longest row, H hidden size.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DebertaV2Config, DebertaV2Model
from transformers.initialization import no_init_weights

from xpo.checks import number, one_of
from xpo.errors import ConfigError
from xpo.hub import local_directory
from xpo.judges.base import Judge
from xpo.prompts import Prompt, plain_text

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")  # in the order of their ids
SOURCE_TOKENS = 1224  # of a prompt, including [CLS], its marker and [SEP]
TOTAL_TOKENS = 2048  # of a row; the completions share equally what the prompt leaves, 412 each at least
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PairRMJudge(Judge):
    """PairRM's log-odds that one completion beats another.

    Args:
        model: hub name, or local directory in the layout of `llm-blender/PairRM-hf` (all files in one
            place) or of `llm-blender/PairRM` (`config.json` names the backbone).
        revision: branch, tag or commit of a hub name; None is its default branch.
        batch_size: rows per forward pass; it changes speed and memory only.
        both_orders: ask logit(a, b) and logit(b, a). False asks one of them, at half the cost. Which
            one is random, but fixed by `seed` and the texts, so that swapping `first` and `second`
            still flips the sign. Such margins are about half as large and keep the position bias.
        seed: of the random order; unused with both orders.
        temperature: divides the logits; larger values give milder odds.
        dtype: "float32", "bfloat16" or "float16".
        device: a torch device; None is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: an argument is out of range, the hub is out of reach, or files of the model are
            missing or do not fit together.
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
    ):
        number("judge.batch_size", batch_size, minimum=1)
        number("judge.temperature", temperature, above=0)
        one_of("judge.dtype", dtype, DTYPES)
        self.batch_size = batch_size
        self.both_orders = both_orders
        self.seed = seed
        self.temperature = temperature
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer, network = load_pair_rm(model, revision)
        self.network = network.to(self.device, DTYPES[dtype]).requires_grad_(False).eval()
        vocabulary = self.tokenizer.get_vocab()
        self.cls, self.sep, *self.markers = [vocabulary[token] for token in ("[CLS]", "[SEP]", *MARKERS)]

    def margins(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """(logit(first, second) - logit(second, first)) / temperature, float32 (B,) on the CPU.

        With `both_orders=False` one of the two logits is not asked and counts as 0. Completions that read
        the same to the model give exactly 0; logits that are not finite give NaN.
        """
        rows: list[list[int]] = []
        pairs: list[int] = []  # (N,) which pair a row belongs to
        signs: list[float] = []  # (N,) 1 where the row's first candidate is `first`, else -1
        texts = [self._tokens(texts) for texts in ([plain_text(prompt) for prompt in prompts], first, second)]
        for pair, (x, a, b) in enumerate(zip(*texts, strict=True)):
            x = x[: SOURCE_TOKENS - 3]  # right truncation; [CLS], marker and [SEP] take three
            room = (TOTAL_TOKENS - len(x) - 3) // 2 - 3
            a, b = a[:room], b[:room]
            if a == b:
                continue
            orders = sorted([(a, b, 1.0), (b, a, -1.0)])  # alike for swapped arguments, but for the signs
            if not self.both_orders:
                digest = hashlib.sha256(repr((self.seed, x, *orders[0][:2])).encode()).digest()
                orders = [orders[digest[0] % 2]]
            for one, two, sign in orders:
                rows.append(self._row(x, one, two))
                pairs.append(pair)
                signs.append(sign)
        signed = torch.tensor(signs) * self._logits(rows) / self.temperature  # (N,)
        margins = torch.zeros(len(prompts)).index_add(0, torch.tensor(pairs, dtype=torch.long), signed)
        return margins.where(margins.isfinite(), torch.nan)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as they read behind a marker, uncut, without what poses as structure."""
        markers = "|".join(map(re.escape, MARKERS))
        texts = [MARKERS[0] + re.sub(markers, "", text).replace("[SEP]", " ") for text in texts]
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        # Drop the leading marker, and those that nested markers and Unicode look-alikes have turned into.
        return [[token for token in encoding.ids if token not in self.markers] for encoding in encodings]

    def _row(self, source: list[int], one: list[int], two: list[int]) -> list[int]:
        """The row of tokens that asks whether candidate `one` is better than candidate `two`."""
        parts = zip(self.markers[:3], (source, one, two), strict=True)
        return [token for marker, text in parts for token in (self.cls, marker, *text, self.sep)]

    @torch.no_grad()
    def _logits(self, rows: list[list[int]]) -> Tensor:
        """The logit of each row, float32 (N,) on the CPU. Rows of similar length share a batch."""
        logits = torch.empty(len(rows))
        longest_first = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        for start in range(0, len(rows), self.batch_size):
            batch = longest_first[start : start + self.batch_size]
            ids = pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True)  # (N, L)
            lengths = torch.tensor([len(rows[i]) for i in batch])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (N, L)
            output = self.network(ids.to(self.device), mask.to(self.device), self.markers)
            logits[batch] = output.float().cpu()
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


def load_pair_rm(model: str, revision: str | None = None) -> tuple[Tokenizer, PairRMNetwork]:
    """The tokenizer, and the network on the CPU, of a checkpoint in either layout.

    Raises:
        ConfigError: the hub is out of reach, or files are missing or do not fit together.
    """
    directory = local_directory("judge.model", model, revision)
    config = json.loads(_file(model, directory, "config.json").read_text(encoding="utf-8"))
    backbone = directory
    if config.get("ranker_type") == "pairranker":
        try:
            backbone = local_directory("model_name", config["model_name"])
        except ConfigError as error:
            raise ConfigError(f"judge.model={model!r}, its config.json: {error}") from error
        config = json.loads(_file(model, backbone, "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "deberta-v2":
        raise ConfigError(f"judge.model={model!r} is no PairRM; use llm-blender/PairRM-hf or a copy of it")

    # Never AutoTokenizer: transformers 5 rebuilds DeBERTa's tokenizer without its Unicode normaliser.
    home = directory if (directory / "tokenizer.json").is_file() else backbone
    tokenizer = Tokenizer.from_file(str(_file(model, home, "tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_tokens([marker for marker in MARKERS if tokenizer.token_to_id(marker) is None])

    try:
        weights = load_file(_file(model, directory, "model.safetensors"))
        config["vocab_size"] = len(weights["pretrained_model.embeddings.word_embeddings.weight"])
        with no_init_weights():
            network = PairRMNetwork(DebertaV2Config.from_dict(config))
        network.load_state_dict(weights, assign=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"judge.model={model!r}: model.safetensors does not fit ({reason}); "
            "point judge.model at a complete copy of llm-blender/PairRM-hf"
        ) from error
    return tokenizer, network


def _file(model: str, directory: Path, name: str) -> Path:
    """The path of a file, which must be there."""
    if not (directory / name).is_file():
        raise ConfigError(
            f"judge.model={model!r}: {directory} has no {name}; "
            "point judge.model at a complete copy of llm-blender/PairRM-hf"
        )
    return directory / name
