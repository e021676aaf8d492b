"""RUN_DIR/pairs.jsonl: every labelled pair of a run, a JSON line each; and the preference data set that they are.

`python -m xpo.judges pairs=RUN_DIR/pairs.jsonl` reads it, too.
"""

import json
import logging
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xpo.config.errors import ConfigError
from xpo.config.files import jobs_of
from xpo.data.prompts import as_message

logger = logging.getLogger(__name__)

NAME = "pairs.jsonl"
_STEP = re.compile(rb'\{"step": (\d+),')  # what each line begins with
_AT_ONCE = 1000  # rows in memory
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_COMPLETION = ("by", "tokens", "score", "reference_logps")  # what is kept of each of the two


class PairFile:
    """Appends pairs to a file and reads any of them again. What a full disk refuses waits in memory.

    In memory it needs eight bytes for each pair.

    Args:
        path: of the file, which may hold the pairs of an earlier process; see `restore`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[bytes] = []
        self._end = 0  # of the last whole line in the file
        self._begins = array("q")  # where each pair begins, in the file and then in what waits
        self._steps: list[tuple[int, int]] = []  # optimizer steps that added pairs, and the index of the first one
        self._warned = False

    def restore(self, step: int) -> None:
        """Drops the pairs of later optimizer steps than this one, and what a kill has torn.

        ConfigError for a file that cannot be made.
        """
        self._waiting, self._end, self._begins, self._steps = [], 0, array("q"), []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        except OSError as error:
            why = f"pairs_file={str(self.path)!r} cannot be made ({error.strerror})"
            raise ConfigError(f"{why}; name a file in a directory that can be written") from error
        with self.path.open("rb") as file:
            for line in file:
                begins = _STEP.match(line)
                if begins is None or int(begins[1]) > step or not line.endswith(b"\n"):
                    break
                self._note(int(begins[1]), self._end)
                self._end += len(line)
        self.sync()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds pairs, each with its "step" first."""
        end = self._end + sum(map(len, self._waiting))
        for row in rows:
            self._waiting.append(json.dumps(row).encode() + b"\n")
            self._note(row["step"], end)
            end += len(self._waiting[-1])
        self._write()

    def _note(self, step: int, begin: int) -> None:
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append((step, len(self._begins)))
        self._begins.append(begin)

    def __len__(self) -> int:
        return len(self._begins)

    def since(self, step: int) -> int:
        """The index of the first pair of this optimizer step or, if it added none, of the next that did."""
        at = bisect_left(self._steps, (step, 0))
        return self._steps[at][1] if at < len(self._steps) else len(self)

    def read(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Some of the pairs, by their place in the order in which they were added."""
        rows, written = [], len(self) - len(self._waiting)
        with self.path.open("rb") if written else nullcontext() as file:
            for index in indices:
                if file is None or index >= written:
                    line = self._waiting[index - written]
                else:
                    file.seek(self._begins[index])
                    line = file.readline()
                rows.append(json.loads(line))
        return rows

    def sync(self) -> None:
        """Brings the file to the disk."""
        self._write(durable=True)

    def _write(self, durable: bool = False) -> None:
        try:
            with self.path.open("ab") as file:
                file.truncate(self._end)
                while self._waiting:
                    file.write(self._waiting[0])
                    file.flush()
                    self._end += len(self._waiting.pop(0))
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._warned:
                logger.warning("xpo: %s cannot be written (%s); its pairs wait in memory", self.path, error.strerror)
            self._warned = True


def read_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """The pairs in a file, in order; a torn last line is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def export(files: Sequence[Path], out: Path) -> tuple[int, int]:
    """Writes the pairs with a winner as a preference data set, in TRL's format: prompt, chosen, rejected.

    Beside these: run (its directory's name), step, epoch, margin, and of both completions who drew them, tokens, score
    and log pi_ref. If any prompt is conversational, all are lists of messages.

    Args:
        files: of `PairFile`, in the directories of their runs.
        out: a Parquet file.

    Returns:
        How many pairs were written, and how many have no winner.
    """
    chat = any(isinstance(row["prompt"], list) for path in files for row in read_pairs(path))
    text = _MESSAGES if chat else pa.string()
    fields = [("prompt", text), ("chosen", text), ("rejected", text), ("run", pa.string()), ("step", pa.int64())]
    fields += [("epoch", pa.int64()), ("margin", pa.float64())]
    for name in ("chosen", "rejected"):
        types = (pa.string(), pa.list_(pa.int32()), pa.float64(), pa.float64())
        fields += [(f"{name}_{part}", kind) for part, kind in zip(_COMPLETION, types, strict=True)]
    schema, counts = pa.schema(fields), [0, 0]

    def rows() -> Iterator[dict[str, Any]]:
        for path in files:
            for pair in read_pairs(path):
                counts[pair["winner"] == "tie"] += 1
                if pair["winner"] != "tie":
                    yield _preference(pair, chat) | {"run": path.absolute().parent.name}

    source = rows()
    with pq.ParquetWriter(out, schema) as writer:
        while part := list(islice(source, _AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, schema))
    return counts[0], counts[1]


def _preference(pair: dict[str, Any], chat: bool) -> dict[str, Any]:
    prompt, winner = pair["prompt"], int(pair["winner"] == "second")
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    # Where the last message is an answer's beginning, the answer goes on with it.
    begun = prompt[:-1] if chat and prompt[-1]["role"] == "assistant" else prompt
    row = {"prompt": begun} | {name: pair[name] for name in ("step", "epoch")}
    row["margin"] = -pair["margin"] if winner else pair["margin"]  # negative where a drawn label is the unlikelier one
    for name, index in (("chosen", winner), ("rejected", 1 - winner)):
        answer = pair[("first", "second")[index]]
        row[name] = [as_message(prompt, answer)] if chat else answer
        row |= {f"{name}_{part}": pair[part][index] for part in _COMPLETION}
    return row


def pair_files(names: Sequence[Path]) -> list[Path]:
    """The files of runs, and of the runs of sweeps; ConfigError where there is none."""
    found: list[Path] = []
    for name in names:
        if (name / "sweep.json").is_file():  # whose runs may lie elsewhere, and which may hold earlier ones
            places = [run_dir for _, run_dir in jobs_of(name)]
        else:
            places = [name] if (name / NAME).is_file() else sorted(file.parent for file in name.glob(f"*/{NAME}"))
        files = [place / NAME for place in places if (place / NAME).is_file()]
        if not files:
            raise ConfigError(f"RUN_OR_SWEEP={str(name)!r} holds no {NAME}; give outputs/DATE/TIME, or that of a sweep")
        found += files
    return found
