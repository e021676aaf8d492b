"""Models and data sets by name: a directory, a snapshot of a hub repository, a package that brings them. Layer 0."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, errors, snapshot_download

from xpo.config.errors import ConfigError

# Weights as pickles (*.bin) may run code when they are loaded.
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_TIMEOUT_S = 2  # the hub client asks twice


def writable(path: Path | str) -> Path:
    """Makes a directory for what is kept between runs, if need be; ConfigError if nothing can be written there."""
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written ({error.strerror}), where data or models are to be kept; "
            "set HF_HOME, XPO_CACHE and XPO_STORES to directories that can be"
        ) from error


def _hub_answers(name: str, kind: str, revision: str | None) -> bool:
    """Whether the hub says anything about `name`; a refusal is an answer, which snapshot_download explains."""
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S)
    except Exception as error:  # whatever the HTTP client below huggingface_hub raises
        return isinstance(error, errors.HfHubHTTPError)
    return True


def local_directory(
    key: str,
    name: str,
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
    with_code: bool = False,
    weights: bool = True,
) -> Path:
    """Where the files of a model or data set lie on this machine; downloads them if need be.

    A hub that cannot be reached is told from the cache within seconds, where the loading functions of
    transformers and datasets retry for 24 seconds.

    Args:
        key: the config key that holds `name`, for the error message.
        name: a local directory, or a hub repository such as "Qwen/Qwen2-0.5B-Instruct".
        revision: branch, tag or commit on the hub.
        with_code: fetch Python files too, for models that bring their own code.
        weights: whether a model is of no use without its weights.

    Raises:
        ConfigError: neither a directory nor something the hub can deliver.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    wanted = _MODEL_FILES + (["*.py"] if with_code else []) if kind == "model" else None
    connect = "check the connection (HF_HUB_OFFLINE=1 uses the cache only)"
    if constants.HF_HUB_OFFLINE:
        connect = "unset HF_HUB_OFFLINE"
    remedy = f"point {key} at a local directory, or {connect}"
    try:
        offline = not _hub_answers(name, kind, revision)
        if not offline:
            writable(constants.HF_HUB_CACHE)
        path = Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=wanted, local_files_only=offline)
        )
        if kind == "dataset" or not weights or any(path.glob("*.safetensors")):
            return path
        reason = "has no weights in the form of safetensors"
        remedy = f"save the model with save_pretrained and point {key} at that directory"
    except errors.HFValidationError:
        reason = "is neither a directory nor a hub name"
        remedy = f"point {key} at an existing directory or at a hub name such as owner/name"
    except errors.GatedRepoError:
        reason, remedy = "is gated on the hub", "ask for access on its page and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason, remedy = f"has no revision {revision!r} on the hub", f"correct {key.rpartition('.')[0]}.revision"
    except errors.RepositoryNotFoundError:
        reason, remedy = "is not on the hub", f"correct {key}, or log in with `hf auth login` if it is private"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError):
        reason = "is not on this machine and the hub is out of reach"
    raise ConfigError(f"{key}={name!r} {reason}; {remedy}")


def package_directory(key: str, package: str, remedy: str) -> Path:
    """Where an installed package lies, which is not imported; ConfigError without it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{key} needs the package {package}, which is not installed; {remedy}")
    return Path(spec.submodule_search_locations[0])


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer: without its files, some kinds load as an empty one."""
    return any(any(directory.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken"))
