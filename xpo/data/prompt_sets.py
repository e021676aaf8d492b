"""Prompt data sets: where they come from, and their tokens."""

import glob
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, IterableDataset, load_dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from xpo.config.errors import ConfigError, nearest
from xpo.config.files import matching_files
from xpo.config.options import DataOptions
from xpo.data.prompts import Batch, PromptEncoder
from xpo.models.hub import local_directory, writable

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "assets" / "prompts"
PromptDataset: TypeAlias = Dataset | IterableDataset
_OURS = ("prompt", "prompt_ids", "occurrence")
_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}  # of `datasets`
_READ = "a JSONL, JSON, CSV, TSV or Parquet file, perhaps with .gz behind its name"


def load_prompts(key: str, name: str, split: str = "train", column: str = "prompt") -> Dataset:
    """Prompts from a file, a directory or the hub: the column "prompt", and those beside it.

    Args:
        key: the config key that holds `name`, for error messages.
        name: "embedded", or see `load_rows`.
        split: for "embedded" one of train and heldout.

    Raises:
        ConfigError: no such data, out of reach, no rows, or no such column.
    """
    source = name
    if name == "embedded":
        splits = sorted(path.stem for path in EMBEDDED.glob("*.jsonl"))
        if split not in splits:
            hint = f"{nearest(split, splits)}; choose one of {', '.join(splits)}"
            raise ConfigError(f"{key}_split={split!r} is not a split of 'embedded'{hint}")
        source = str(EMBEDDED / f"{split}.jsonl")
    dataset = load_rows(key, source, split)
    there = dataset.column_names
    if column not in there:
        hint = f"(it has {', '.join(there)}){nearest(column, there)}; set data.prompt_column"
        raise ConfigError(f"{key}={name!r} has no column {column!r} {hint}")
    if column == "prompt":
        return dataset
    return dataset.remove_columns([name for name in there if name == "prompt"]).rename_column(column, "prompt")


def load_rows(key: str, name: str, split: str = "train") -> Dataset:
    """All columns of a data set.

    Args:
        key: the config key that holds `name`, for error messages.
        name: a JSONL, CSV, TSV or Parquet file or a pattern for several, a data set directory, or a hub data set.
        split: of a directory or hub data set; for files it is ignored.

    Raises:
        ConfigError: no such data, out of reach, or no rows.
    """
    files = matching_files(name)
    if files or _ending(Path(name)) in _BUILDERS:
        source = _of_files(key, name, files)
        failed, remedy = f" cannot be read as {_ending(files[0])}", "mend the file"
    else:
        directory = local_directory(key, name, kind="dataset")
        for file in directory.iterdir():  # `datasets` would leave it out
            if file.suffix[1:] not in _BUILDERS and file.suffix[1:].lower() in _BUILDERS:
                raise ConfigError(f"{key}={name!r} holds {file.name}; rename it: in a directory endings are lower case")
        source = {"path": str(directory), "split": split}
        failed, remedy = f", split {split!r}", f"correct {key}_split, or give a directory of JSONL or Parquet files"
    writable(datasets.config.HF_DATASETS_CACHE)
    try:
        dataset = load_dataset(**source)
        dataset.data.validate(full=True)  # that texts are UTF-8
    except Exception as error:  # no such split, no data files, or whatever pyarrow and json raise, wrapped
        said = str(error.__cause__ or error) or type(error).__name__
        reason = said.splitlines()[0]
        if configurations := re.search(r"configs: \[(.*?)\]", said):
            reason = f"it is several data sets, {configurations[1]}"
            remedy = f"name the files of one, as in {key}='{source['path']}/main/*.parquet'"
        raise ConfigError(f"{key}={name!r}{failed}: {reason}; {remedy}") from error
    return dataset


def _ending(file: Path) -> str:
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def _of_files(key: str, name: str, files: list[Path]) -> dict[str, Any]:
    """What load_dataset takes for files of one kind."""
    if not files:
        raise ConfigError(f"{key}={name!r} does not exist; point it at {_READ}")
    ending, *others = {_ending(file) for file in files}
    if others or ending not in _BUILDERS:
        raise ConfigError(f"{key}={name!r} is not of one kind that can be read; give {_READ}, or several of one kind")
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"{key}={name!r} is empty; give a file with one row per line")
    options = {"sep": "\t"} if ending == "tsv" else {}
    paths = [glob.escape(str(file)) for file in files]
    return {"path": _BUILDERS[ending], "data_files": paths, "split": "train"} | options


def check_prompt(prompt: Any, key: str = "train_dataset") -> None:
    """ConfigError unless `prompt` is text or a list of messages with role and content."""
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and all(_is_message(part) for part in prompt))
    if not (is_one and prompt):
        examples = '{"prompt": "..."} or {"prompt": [{"role": "user", "content": "..."}]}'
        raise ConfigError(f"{key}: prompt={prompt!r:.80} is neither text nor a list of messages; write {examples}")


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str) or (value.get("content", "") is None and bool(value.get("tool_calls")))


def tokenize_prompts(
    dataset: PromptDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    overflow: str,
    key: str = "train_dataset",
    special_tokens: str = DataOptions.special_tokens,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PromptDataset:
    """The data set with the further columns "prompt_ids", of at most `max_prompt_length` tokens, and "occurrence".

    An occurrence is how many equal prompts stand before a row, as each has a reference completion of its own.

    Args:
        dataset: has a column "prompt".
        tokenizer: the policy's.
        max_prompt_length: what max_length - max_new_tokens leaves, in tokens.
        overflow: "drop" longer prompts (and log how many, but for streams), "truncate" to their last tokens, "error".
        key: what the data set is called in error messages.
        special_tokens, template_kwargs: see `PromptEncoder`.

    Raises:
        ConfigError: no rows, no column "prompt", a malformed prompt, no chat template or one that refuses a prompt, or
            nothing left after dropping.
    """
    streamed = isinstance(dataset, IterableDataset)
    if not streamed and len(dataset) == 0:
        raise ConfigError(f"{key} is empty; give at least one prompt")
    room = f"max_length - max_new_tokens = {max_prompt_length}"
    before: Counter[int] = Counter()  # equal prompts, by the hash of their tokens
    encode, special = PromptEncoder(tokenizer, special_tokens, **(template_kwargs or {})), set()

    def tokenize(row: dict[str, Any], number: int) -> dict[str, Any]:
        if number == 0:  # a stream may be read several times
            before.clear()
        if "prompt" not in row:  # a stream may not know its columns before
            raise ConfigError(f"{key} has no column 'prompt' (it has {', '.join(row)}); rename the one that holds them")
        check_prompt(row["prompt"], key)
        ids = encode(row["prompt"])
        if encode.has_special(row["prompt"]):
            special.add(number)
        if overflow == "error" and len(ids) > max_prompt_length:
            raise ConfigError(
                f"{key}: a prompt of {len(ids)} tokens exceeds {room}; "
                "raise max_length, or set prompt_overflow to drop or truncate"
            )
        if overflow == "truncate":
            ids = ids[-max_prompt_length:]
        if not ids:
            raise ConfigError(f"{key}: prompt={row['prompt']!r} has no tokens; leave it out")
        equal = hash(tuple(ids))
        before[equal] += 1
        return {"prompt": row["prompt"], "prompt_ids": ids, "occurrence": before[equal] - 1}

    options: dict[str, Any] = {} if streamed else {"desc": "Tokenizing prompts"}
    with _no_cache():
        tokenized = dataset.map(tokenize, with_indices=True, **options)
    if special and encode.as_text:
        logger.warning(
            "%s: what reads like a special token in %d of %d prompts is text; if it is meant: special_tokens=parse",
            *(key, len(special), len(tokenized)),
        )
    if overflow != "drop":
        return tokenized
    with _no_cache():
        kept = tokenized.filter(lambda ids: len(ids) <= max_prompt_length, input_columns="prompt_ids")
    if streamed or len(kept) == len(tokenized):
        return kept
    given, dropped = len(tokenized), len(tokenized) - len(kept)
    if dropped == given:
        raise ConfigError(
            f"{key}: all {given} prompts exceed {room} tokens; raise max_length, or set prompt_overflow=truncate"
        )
    logger.warning("%s: dropped %d of %d prompts longer than %d tokens", key, dropped, given, max_prompt_length)
    return kept


@contextmanager
def _no_cache() -> Iterator[None]:
    """What is made within lies in a temporary directory that ends with the process, not in the cache of `datasets`.

    It is seconds of work, and the cache would know it by this process alone: each run would leave its own there.
    """
    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


def collate_prompts(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of `tokenize_prompts` as one micro-batch: a list for each column."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["prompt_ids"] = list(map(list, columns["prompt_ids"]))
    return {"occurrence": [0] * len(rows)} | columns  # rows tokenized elsewhere lack it


def prompts_of(columns: dict[str, list[Any]]) -> Batch:
    """The prompts of collated rows, with the columns beside them that are the user's own."""
    return Batch(columns["prompt"], {name: column for name, column in columns.items() if name not in _OURS})


class RepeatedSteps(Sampler[int]):
    """The prompts of each optimizer step several times, as its rollout is trained on several times.

    A last step of an epoch that is not full is left out.

    Args:
        sampler: an order of prompts, for each epoch.
        size: prompts of a step, on all processes.
        times: how often each step comes.
    """

    def __init__(self, sampler: Any, size: int, times: int):
        self.sampler, self.size, self.times = sampler, size, times

    def __iter__(self) -> Iterator[int]:
        step: list[int] = []
        for index in self.sampler:
            step.append(index)
            if len(step) == self.size:
                yield from step * self.times
                step = []

    def __len__(self) -> int:
        return len(self.sampler) // self.size * self.size * self.times

    def __getattr__(self, name: str) -> Any:
        # A loader looks for set_epoch, which orders that depend on the epoch have and others lack.
        return getattr(self.sampler, name)
