"""Names of a package that are imported at first use: a command line must not wait for torch. Layer 0."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def at_first_use(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562), from the names that each module has."""

    def get(name: str) -> Any:
        for module, names in homes.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
