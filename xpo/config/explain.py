"""Hydra's errors in one line, with the nearest valid word. Layer 0: no torch."""

import errno
import inspect
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException

from xpo.config.errors import ConfigError, first_line, nearest
from xpo.config.schema import TrainSchema, flatten

# Groups whose keys are the arguments of their `_target_`: the schema does not list them, their files do.
_TARGETS = ("judge", "reward_model")
_NAMES = {"model": "model.name", "data": "data.train"}  # of groups: the key for what no file of theirs names
_DEFAULTS = "a file's defaults read - smoke, then - override /judge: random (see conf/experiment)"
_SHORT = {"lr": "learning_rate"}  # what people write for a key


def explain(error: BaseException, conf: Path, arguments: Sequence[str] = (), schema: type = TrainSchema) -> str | None:
    """One line for an error that the command line, `arguments`, caused; None for any other error.

    Args:
        error: what composing the configuration raised.
        conf: the directory of the config groups.
        schema: the dataclass of the configuration.
    """
    chain = _chain(error)
    for cause in chain:
        if isinstance(cause, ConfigError):  # raised by a range check while OmegaConf built the schema
            return str(cause)
    if isinstance(error, MissingConfigException):
        return _missing_option(error, conf, schema)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.filename or 'the disk'} has no room left; make room, and repeat the command"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            return (
                f"hydra.run.dir={error.filename!r} cannot be written ({error.strerror}); choose another hydra.run.dir"
            )
        return f"{error.filename}: {error.strerror}" if error.filename else None
    if isinstance(error, OverrideParseException):
        reason = first_line(chain[1] if len(chain) > 1 else error)
        return f"{error.override!r} cannot be read ({reason}); write key=value, special characters as 'key=\"a=b\"'"
    if isinstance(error, yaml.YAMLError):
        return f"a file of the configuration is no YAML ({' '.join(str(error).split())}); mend it"
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return _group_value(arguments, conf)
    if isinstance(error, ValueError) and re.search("default item|[Dd]efaults list", str(error)):
        return f"{first_line(error)}; {_DEFAULTS}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    said = first_line(error)
    if twice := re.search(r"Multiple values for ([\w/]+).*: (\S+)'", said):
        if not any(word.startswith(f"+{twice[1]}=") for word in arguments):
            return f"{twice[1]} has a value already, where a file gives it {twice[2]}; {_DEFAULTS}"
        return f"{twice[1]} has a value already; choose another with {twice[1]}={twice[2]}, without the +"
    if there := re.match(r"Could not append to config\. An item is already at '([^']+)'", said):
        return f"{there[1]} has a value already; give another with {there[1]}=..., without the +"
    for cause in chain:
        if isinstance(cause, InterpolationResolutionError):
            return f"{first_line(cause)}; correct what stands in ${{...}}"
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            return unknown_key(cause.full_key or str(cause.key), conf, schema)
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return _wrong_type(cause, said, schema)
    if in_file := re.match(r"In '?([\w/]+)'?: (.*?)\.?$", said):
        group = re.search(r"Could not override '([^'@]+)", said)
        hint = nearest(group[1].rpartition("/")[2], [path.name for path in conf.iterdir()]) if group else ""
        return f"{in_file[1]}.yaml: {in_file[2]}{hint}; {_DEFAULTS}"
    if unknown := re.match(r"Could not override '([^']+)'", said):
        return unknown_key(unknown[1], conf, schema)
    if "Ambiguous value" in said:
        return f"{said}; sweep over the values with -m, or write a list: key=[1,2]"
    return f"{said}; see --hydra-help"


def unknown_key(key: str, conf: Path, schema: type = TrainSchema) -> str:
    """The message for a key that does not exist."""
    parts = key.split(".")
    for depth, kind in enumerate(_schema_types(key, schema)[:-1], start=1):
        owner, inner = ".".join(parts[:depth]), ".".join(parts[depth:])
        if get_origin(kind) is dict and owner not in _TARGETS:
            return f"{owner} has no {inner!r} yet; add it with +{key}=..."
    if key == "experiment":
        return "a file of the group 'experiment' puts its keys under experiment; begin it with # @package _global_"
    if parts[0] in _TARGETS and len(parts) == 2:  # another option's, which `_hint` would name
        files = sorted((conf / parts[0]).glob("*.yaml"))
        if having := [
            f"{parts[0]}={path.stem}" for path in files if parts[1] in {*OmegaConf.load(path)} - {"defaults"}
        ]:
            return f"{key!r} is a key of {', '.join(having)}, and not of the chosen one; see --cfg job"
    return f"unknown config key {key!r}{_hint(key, conf, schema)} (--cfg job lists the keys)"


def _hint(key: str, conf: Path, schema: type) -> str:
    """The keys that end like this one, else the nearest one."""
    known = valid_keys(conf, schema)
    group, _, word = key.rpartition(".")
    same = [repr(one) for one in known if one.rpartition(".")[2] == _SHORT.get(word, word)]
    if same and group in ("", "training"):
        return f"; did you mean {' or '.join(same)}?"
    if group == "training" and not get_close_matches(key, known, n=1, cutoff=0.8):
        return f"; other names of TrainingArguments are given as +training.kwargs.{word}=..."
    return nearest(key, known)


def valid_keys(conf: Path, schema: type = TrainSchema) -> list[str]:
    """Every dotted key of the schema and of the files of open groups, and every config group."""
    keys = flatten(OmegaConf.to_container(OmegaConf.structured(schema)))  # type: ignore[arg-type]
    files = [path for group in _TARGETS for path in (conf / group).glob("*.yaml")]
    options = {f"{path.parent.name}." + str(key) for path in files for key in OmegaConf.load(path) if key != "defaults"}
    groups = [str(path.relative_to(conf)) for path in conf.rglob("*") if path.is_dir()]
    return [*keys, *sorted(options), *(group for group in groups if not group.startswith("hydra"))]


def _missing_option(error: MissingConfigException, conf: Path, schema: type) -> str:
    group, _, option = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
    options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    if not group:
        return f"--config-name={option} does not exist; leave it out"
    if group.startswith("hydra/"):
        extra = "pip install 'xpo[slurm]'" if option.startswith("submitit") else "install the Hydra plugin that has it"
        return f"{group}={option} is not installed; {extra}, or leave it out"
    top, _, name = f"{group}/{option}".partition("/")
    elsewhere = f", or give {_NAMES[top]}={name}" if top in _NAMES else ""
    if elsewhere:
        group, option = top, name
        options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    if not options:
        return f"there is no config group {group!r}{nearest(group, valid_keys(conf, schema))}; see --help"
    choose = f"choose one of {', '.join(options)}{elsewhere}"
    return f"{group}={option} does not exist{nearest(option, options)}; {choose}"


def _group_value(arguments: Sequence[str], conf: Path) -> str:
    """Hydra says neither which group nor which value: look for a group without a name behind it."""
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        if group and (conf / group).is_dir():
            options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
            if value not in options:
                return f"{argument} is no option of the group {group!r}; choose one of {', '.join(options)}"
    return "a config group takes the name of one of its options, neither null nor a number; see --help"


def _wrong_type(error: OmegaConfBaseException, said: str, schema: type) -> str:
    key = str(error.full_key)
    if "does not support deletion" in str(error):
        return f"{key} cannot be removed; give it another value, or {key}=null where null is one"
    override = re.search(r"Error merging override \+*([^=]+=.*)", said)
    if override is None:
        return f"{key}: {first_line(error)}; correct {key}"
    kind, wanted = _schema_types(key, schema)[-1], "another value"
    if kind is not None and not is_dataclass(kind):
        wanted = f"a value of type {inspect.formatannotation(kind).replace('None', 'null').replace('typing.', '')}"
    return f"{override[1]} is of the wrong type; give {wanted}"


def _schema_types(key: str, schema: type) -> list[Any]:
    """The schema's type of each part of a dotted key; None for what it does not list."""
    kinds: list[Any] = [schema]
    for part in key.split("."):
        kinds.append(get_type_hints(kinds[-1]).get(part) if is_dataclass(kinds[-1]) else None)
    return kinds[1:]


def _chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_chain(error.__cause__ or error.__context__)]
