"""Pairs of completions to be judged, from a data set or from a run's own evaluations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xpo.config.errors import ConfigError
from xpo.data.prompt_sets import check_prompt, load_rows
from xpo.data.prompts import Prompt, coin

_WINNERS = {"first": 1.0, "second": -1.0, "tie": 0.0, None: 0.0}


class Pair(NamedTuple):
    """Two completions of a prompt; `winner` is +1 if the first is better, -1 if the second is, 0 if that is unknown."""

    prompt: Prompt
    first: str
    second: str
    winner: float


def load_pairs(name: str, split: str = "train", limit: int | None = None, seed: int = 0) -> list[Pair]:
    """Pairs from a preference data set, or completions without a known winner.

    Rows have the columns `chosen` and `rejected`, texts or messages; `prompt` may be missing if both begin with the
    same messages. Or `prompt`, `first` and `second`, and perhaps `winner`: first, second or tie. Or they are what a run
    has kept: RUN_DIR/completions/step_N.json, whose winner is that of the run's judge. Chosen and rejected are put in
    an order drawn by `seed` and the texts: a judge that favours the first place must not look good.

    Args:
        name: a JSONL, JSON or Parquet file, a directory, or a hub data set.
        split: of the last two.

    Raises:
        ConfigError: no such data, or a row has other columns or values.
    """
    rows: Sequence[dict[str, Any]] = _kept_completions(Path(name).expanduser()) or list(load_rows("pairs", name, split))
    return [_pair(f"pairs={name!r}, row {i}", row, seed) for i, row in enumerate(rows[:limit])]


def _kept_completions(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's table of completions; none if the file is something else."""
    try:
        table = json.loads(path.read_text()) if path.suffix == ".json" and path.is_file() else None
    except ValueError:
        return []
    if not isinstance(table, dict) or not {"columns", "data"} <= table.keys():
        return []
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    winners: dict[Any, str] = {"policy": "first", "reference": "second", "none": "tie"}
    return [
        {"prompt": row["prompt"], "first": row["completion"], "second": row["reference"]}
        | {"winner": winners.get(row.get("verdict"))}
        for row in rows
    ]


def _pair(where: str, row: dict[str, Any], seed: int) -> Pair:
    if not isinstance(row.get("prompt"), str | None):
        check_prompt(row["prompt"], where)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        prompt, chosen, rejected = _preference(where, row)
        in_order = coin(seed, prompt, chosen, rejected)
        return Pair(prompt, chosen, rejected, 1.0) if in_order else Pair(prompt, rejected, chosen, -1.0)
    missing = [column for column in ("prompt", "first", "second") if row.get(column) is None]
    if missing:
        raise ConfigError(
            f"{where} has no {' and no '.join(missing)} (it has {', '.join(row)}); give the columns prompt, chosen and "
            "rejected, or prompt, first and second"
        )
    if row.get("winner") not in _WINNERS:
        raise ConfigError(f"{where}: winner={row['winner']!r} is not one of first, second, tie")
    return Pair(row["prompt"], _text(where, row["first"]), _text(where, row["second"]), _WINNERS[row.get("winner")])


def _preference(where: str, row: dict[str, Any]) -> tuple[Prompt, str, str]:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ConfigError(f"{where}: chosen and rejected are of different kinds; give two texts or two message lists")
    if isinstance(chosen, str):
        if prompt is None:
            raise ConfigError(f"{where} has no prompt; add the column, or give chosen and rejected as messages")
        return prompt, chosen, rejected
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if prompt is None and common == 0:
        raise ConfigError(f"{where} has no prompt, and chosen and rejected begin with different messages; add a prompt")
    return prompt or chosen[:common], _text(where, chosen[common:]), _text(where, rejected[common:])


def _text(where: str, completion: Any) -> str:
    """A completion as text: itself, or the content of its one message."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise ConfigError(f"{where}: a completion has {len(completion)} messages; give it one answer of the assistant")
    return str(completion[0]["content"])
