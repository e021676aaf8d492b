"""Hydra's errors in one line, with the nearest valid word. Layer 0: no torch."""

import re
from pathlib import Path

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xpo.errors import ConfigError, nearest
from xpo.schema import TrainSchema, flatten


def explain(error: BaseException, conf: Path) -> str | None:
    """One line for an error that the command line caused; None for any other error.

    Args:
        error: what composing the configuration raised.
        conf: the directory of the config groups.
    """
    for cause in _chain(error):
        if isinstance(cause, ConfigError):  # raised by a range check while OmegaConf built the schema
            return str(cause)
    if isinstance(error, MissingConfigException):
        return _missing_option(error, conf)
    if isinstance(error, OSError):
        return f"hydra.run.dir={error.filename!r} cannot be written ({error.strerror}); choose another hydra.run.dir"
    if not isinstance(
        error, HydraException | ConfigCompositionException | OverrideParseException | OmegaConfBaseException
    ):
        return None
    text = "\n".join(str(cause) for cause in _chain(error))
    if unknown := re.search(r"(?:Could not override '|Error merging override \+)([\w./@]+)", text):
        key = unknown.group(1)
        if "could not be converted" in text or "Invalid type" in text or "Cannot convert" in text:
            return _wrong_type(text, key)
        return unknown_key(key, conf)
    if "could not be converted" in text or "Cannot convert" in text:
        return _wrong_type(text, "")
    if "Ambiguous value" in text:
        return f"{str(error).splitlines()[0]}; sweep over the values with -m, or write a list: key=[1,2]"
    return f"{str(error).splitlines()[0]}; quote the value, see --hydra-help"


def unknown_key(key: str, conf: Path) -> str:
    """The message for a key that does not exist."""
    return f"unknown config key {key!r}{nearest(key, valid_keys(conf))}; list the keys with --cfg job"


def valid_keys(conf: Path) -> list[str]:
    """Every dotted key of the schema and every config group."""
    schema = OmegaConf.to_container(OmegaConf.structured(TrainSchema))
    groups = [str(path.relative_to(conf)) for path in conf.rglob("*") if path.is_dir()]
    return [*flatten(schema), *groups]  # type: ignore[arg-type]


def _missing_option(error: MissingConfigException, conf: Path) -> str:
    name = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, option = name.rpartition("/")
    options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    if not options:
        return f"there is no config group {group!r}{nearest(group, valid_keys(conf))}; see --help"
    return f"{group}={option} does not exist{nearest(option, options)}; choose one of {', '.join(options)}"


def _wrong_type(text: str, key: str) -> str:
    full_key = re.search(r"full_key: ([\w.]+)", text)
    value = re.search(r"[Vv]alue '(.*?)'", text)
    kind = re.search(r"(?:converted to|convert '.*?' to) (\w+)", text)
    name = full_key.group(1) if full_key else key
    shown = f"={value.group(1)!r}" if value else ""
    return f"{name}{shown} is of the wrong type; give a value of type {kind.group(1) if kind else 'the schema'}"


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
