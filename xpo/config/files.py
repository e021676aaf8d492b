"""Files that other processes may read at any moment. Layer 0: no project imports."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text)
    unfinished.replace(path)
