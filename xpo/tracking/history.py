"""The evaluations in a Trainer's log history. Layer 0: no project imports."""

from typing import Any

_SHOWN = ("win_rate", "tie_rate", "lose_rate", "score", "kl", "eos_rate", "length", "distinct_2")


def evaluations(history: list[dict[str, Any]], prefix: str = "eval") -> list[dict[str, float]]:
    """The evaluations in a Trainer's log history, in order, with their step."""
    return [entry for entry in history if f"{prefix}_runtime" in entry]


def measures(evaluation: dict[str, float], prefix: str = "eval") -> list[str]:
    """The metrics of an evaluation that a person wants to see first, then the scorers'."""
    names = [name.removeprefix(f"{prefix}_") for name in evaluation if name.startswith(f"{prefix}_")]
    scorers = [name.removeprefix("ref_") for name in names if name.startswith("ref_")]
    return [name for name in dict.fromkeys((*_SHOWN, *scorers)) if name in names]
