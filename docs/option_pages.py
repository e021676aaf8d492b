"""The configuration reference: every key with its type, default, range and meaning, from the code and conf/."""

import os
import re
from collections.abc import Iterator
from functools import partial
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from xpo.config import checks
from xpo.config.compose import CONF, compose
from xpo.config.options import Check, Key, Options, keys
from xpo.config.schema import GROUPS

TRANSFORMERS = "As in `transformers.TrainingArguments`."
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "number, text or list"}


def markdown() -> str:
    """The whole page but its introduction."""
    defaults = _defaults()
    parts = [_group(group, defaults[group.group()]) for group in GROUPS]
    return "\n\n".join([*parts, *map(_open_group, ("judge", "reward_model"))])


def _group(group: type[Options], defaults: dict[str, Any]) -> str:
    name = group.group()
    types, meant = get_type_hints(group), meanings(name)
    parts = [f"## {name}", *_choices(name)]
    for key in keys(group):
        facts = [_type(types[key.name]), f"default `{_shown(defaults[key.name])}`", allowed(key.check), _argument(key)]
        parts += [f"### `{name}.{key.name}`", " · ".join(filter(None, facts)), meant.get(key.name, TRANSFORMERS)]
    return "\n\n".join(parts)


def _open_group(name: str) -> str:
    """A group whose keys are the arguments of a class: a list for each of its files."""
    parts = [f"## {name}", *_choices(name)]
    for file in sorted((CONF / name).glob("*.yaml")):
        if lines := list(_commented(file.read_text())):
            parts += [f"### `{name}={file.stem}`", "\n".join(lines)]
    return "\n\n".join(parts)


def _commented(text: str) -> Iterator[str]:
    """`key: value  # meaning` of a file, the defaults list left out."""
    for key, value, meaning in re.findall(r"^(\w+):(?: +([^#\n]+?))?(?: +# (.*(?:\n +# .*)*))?$", text, re.MULTILINE):
        if value and key not in ("_target_", "defaults"):
            said = re.sub(r"\n +# +", " ", meaning)
            default = "required" if value == "???" else f"`{value}`"
            yield f"- `{key}`: {default}" + (f"; {said}" if said else "")


def _choices(group: str) -> Iterator[str]:
    """What the files of a group are, one line each."""
    for file in sorted((CONF / group).glob("*.yaml")):
        said = _introduction(file.read_text())
        if said:
            yield f"- `{group}={file.stem}`: {said}"


def _introduction(text: str) -> str:
    """The words of a file's head between its commands and its keys, without the pointer to where the keys are."""
    head = [line[2:] for line in text.splitlines() if line.startswith("# ") and not line.startswith("# python -m")]
    sentences = []
    for line in head:
        if re.match(r"\w+  +\S", line) or line.startswith(" "):
            break
        sentences.append(line)
    return re.sub(r" *All keys: ?\S*.*$", "", " ".join(sentences)).strip()


def meanings(group: str) -> dict[str, str]:
    """What the comments of a group's files say of its keys: "key   meaning", in one line or more."""
    found: dict[str, str] = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        last = ""
        for line in file.read_text().splitlines():
            if start := re.match(r"# (\w+)  +(\S.*)$", line):
                last, found[start[1]] = start[1], start[2]
            elif last and (more := re.match(r"#  +(\S.*)$", line)):
                found[last] += f" {more[1]}"
            elif not line.startswith("#"):
                last = ""
    return found


def allowed(check: Check | None) -> str:
    """The range of values that a check accepts, in words; empty where the meaning says it."""
    function = check.func if isinstance(check, partial) else check
    bounds = check.keywords if isinstance(check, partial) else {}
    if function is checks.one_of:
        return "one of " + ", ".join(f"`{choice}`" for choice in bounds["choices"])
    if function is checks.fraction:
        return "above 0, at most 1"
    if function is checks.seed:
        return "0 to 2^32 - 1"
    if function not in (checks.number, checks.count, checks.per_epoch):
        return ""
    if "above" in bounds:
        return f"above {bounds['above']}"
    return f"at least {bounds.get('minimum', 1)}"


def _type(kind: Any) -> str:
    if isinstance(kind, UnionType):
        inner = [one for one in get_args(kind) if one is not NoneType]
        return f"{_type(inner[0])} or null"
    return "mapping" if get_origin(kind) is dict else "list" if get_origin(kind) is list else _PLAIN[kind]


def _argument(key: Key) -> str:
    """Where XPOConfig has the key by another name than its last word, and where it has none."""
    if key.argument is None:
        return ""
    return f"`{key.argument}` in `XPOConfig`" if key.argument != key.name else "the same in `XPOConfig`"


def _defaults() -> dict[str, Any]:
    """What every key is where nobody sets it, and no preset does."""
    for name in ("XPO_STORES", "MLFLOW_EXPERIMENT_NAME"):  # the reader's, not the builder's
        os.environ.pop(name, None)
    config, _, _ = compose(["experiment=none"])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...").strip("'")
