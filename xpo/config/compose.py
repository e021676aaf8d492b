"""From a command line to a checked configuration. Layer 0: no torch."""

import argparse
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError

from xpo.config.errors import ConfigError, hydra_value
from xpo.config.explain import unknown_key
from xpo.config.schema import TrainSchema, flatten
from xpo.config.secrets import no_secret

# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF = next(path for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if path.is_dir())

ConfigStore.instance().store(name="schema", node=TrainSchema)


def choose_preset(arguments: list[str]) -> list[str]:
    """Leaves the default preset out where a model or data set is chosen: quickstart is made for its own.

    Hydra's defaults list cannot say this: it knows no values, such as model.name, while it chooses options.
    """
    groups = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    chosen = [groups.index(key) for key in ("model", "data", "model.name", "data.train") if key in groups]
    if not chosen or "experiment" in groups:
        return arguments
    return [*arguments[: min(chosen)], "experiment=none", *arguments[min(chosen) :]]


def compose(arguments: list[str]) -> tuple[DictConfig, Path, dict[str, str]]:
    """The configuration that the command line asks for, its run directory, and the option of each group.

    Of Hydra's own flags it takes those that say where configurations lie. HydraConfig is set afterwards.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn", default="train")
    flags, overrides = parser.parse_known_args(arguments)
    if flags.config_dir:
        if any(word.startswith("hydra.searchpath=") for word in overrides):
            raise ConfigError(
                f"--config-dir={flags.config_dir} does not go with hydra.searchpath here; name both there"
            )
        overrides.append(f"hydra.searchpath=[{hydra_value(f'file://{Path(flags.config_dir).absolute()}')}]")
    with hydra.initialize_config_dir(str(CONF), job_name="train", version_base="1.3"):
        config = hydra.compose(flags.config_name, overrides=overrides, return_hydra_config=True)
    config.hydra.runtime.output_dir = str(Path(config.hydra.run.dir).absolute())
    HydraConfig.instance().set_config(config)
    check_hydra()
    return without_hydra(config), Path(config.hydra.run.dir), dict(config.hydra.runtime.choices)


def check_hydra() -> None:
    """ConfigError for what Hydra can do, and our runs do not bear."""
    if HydraConfig.get().job.chdir:
        raise ConfigError("hydra.job.chdir=True would move relative paths, mlflow.db among them; leave it out")


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy without Hydra's own part."""
    plain = config.copy()
    with open_dict(plain):
        del plain["hydra"]
    return plain


def checked(config: DictConfig) -> TrainSchema:
    """The configuration with its types; ConfigError for an unknown key, a missing or a bad value."""
    check_keys(OmegaConf.to_container(config))  # type: ignore[arg-type]
    check_complete(config)
    check_secrets(config)
    return OmegaConf.to_object(config)  # type: ignore[return-value]


def check_words(arguments: list[str]) -> None:
    """ConfigError for a secret on the command line, before anything writes or prints it, and for ~tracking."""
    for word in arguments:
        key, _, value = word.lstrip("+-").partition("=")
        if key == "~tracking":
            raise ConfigError("~tracking would leave it on, with its defaults; give tracking=none")
        no_secret(key, value)


def check_secrets(config: DictConfig, resolve: bool = True) -> None:
    """ConfigError for a secret among the values."""
    for key, value in flatten(OmegaConf.to_container(config, resolve=resolve)).items():  # type: ignore[arg-type]
        no_secret(key, value)


def check_keys(config: dict[Any, Any]) -> None:
    """ConfigError for a key that the schema does not know: `+key=value` gets past Hydra's own check."""
    try:
        OmegaConf.merge(TrainSchema, config)
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(str(error.full_key), CONF)) from error


def check_complete(config: DictConfig) -> None:
    """ConfigError for a required key without a value."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; give one with {missing[0]}=...")
