"""Tables of completions, as the MLflow UI compares them side by side."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xpo.config.files import without_nan, write_whole

COMPLETION_COLUMNS = ("prompt", "completion", "reference", "verdict", "score", "ref_score", "step")
TABLE_NAME = "eval_completions.json"  # of all evaluations


def completion_rows(records: Iterable[dict[str, Any]], step: int) -> list[list[Any]]:
    """Evaluation records as rows of COMPLETION_COLUMNS; scores that JSON does not know (NaN) are empty."""
    verdicts = {1.0: "policy", -1.0: "reference", 0.0: "none"}
    rows = []
    for record in records:
        scores = without_nan([record.get("score"), record.get("ref_score")])
        texts = [record[name] for name in ("prompt", "completion", "reference")]
        rows.append([*texts, verdicts[record["label"]], *scores, step])
    return rows


def write_table(path: Path, rows: list[list[Any]]) -> None:
    """Writes rows in the UI's format, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"columns": COMPLETION_COLUMNS, "data": rows}, indent=1))
