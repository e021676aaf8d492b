"""Files by name, and files that other processes may read at any moment. Layer 0: no project imports."""

import glob
from pathlib import Path


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
