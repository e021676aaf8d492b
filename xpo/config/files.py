"""Files by name, and files that other processes may read at any moment. Layer 0: no torch."""

import glob
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from xpo.config.errors import ConfigError, first_line

T = TypeVar("T")


def matching_files(name: str) -> list[Path]:
    """The file of this name, or those that a pattern such as prompts/*.jsonl stands for."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    return [file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if file.is_file()]


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text)
    unfinished.replace(path)


def without_nan(value: Any) -> Any:
    """Numbers, lists and dicts as JSON can say them, which knows neither NaN nor infinity: None instead."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: Path, build: Callable[..., T]) -> T:
    """What `build` makes of the keys of a JSON object in a file; ConfigError if the file or a key is not as it was."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return build(**content)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}); mend it or delete it") from error


def jobs_of(directory: Path) -> list[tuple[dict[str, Any], Path]]:
    """The jobs in a directory's sweep.json, each with its run directory: beside the file, if the sweep was moved."""
    jobs: list[dict[str, Any]] = read_object(directory / "sweep.json", lambda jobs, **_: jobs)
    there = [Path(job["run_dir"]) for job in jobs]
    return [(job, path if path.is_dir() else directory / path.name) for job, path in zip(jobs, there, strict=True)]
