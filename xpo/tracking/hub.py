"""What of a run goes to the hub: the model with its card and, as a data set of its own, the pairs. Layer 0: no torch.

Nothing else does: checkpoints, optimizer states, iterates and training_args.bin stay, which hold paths of this machine.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from xpo.config.errors import ConfigError, first_line
from xpo.tracking.card import model_name, pairs_card

T = TypeVar("T")

# Card, weights, configurations, tokenizers of each kind, code that a model brings, further adapters.
_MODEL = (
    *("README.md", "*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*.jinja", "vocab*"),
    *("merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*.jinja"),
    *("[!z]*.py", "[!_c]*/adapter_*", "c[!h]*/adapter_*"),  # without zero_to_fp32.py, _iterates and checkpoint-N
)
_ADAPTER = "adapter_config.json"


def model_files(directory: Path) -> list[Path]:
    """What of a directory of a model, or of a checkpoint, goes to the hub."""
    return sorted({file for pattern in _MODEL for file in directory.glob(pattern) if file.is_file()})


def make_repositories(repository: str, pairs: bool, private: bool | None = None, token: str | None = None) -> str:
    """Makes a repository for a model, and one for its pairs if asked, unless they are there.

    Returns:
        The full name: the user's own is put before one without an owner.

    Raises:
        ConfigError: the hub is out of reach, or refuses.
    """

    def make() -> str:
        api = HfApi(token=token)
        full = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if pairs:
            api.create_repo(pairs_repository(full), private=private, exist_ok=True, repo_type="dataset")
        return full

    return _ask(f"no repository {repository} can be made", make)


def pairs_repository(repository: str) -> str:
    """The data set of a model's pairs."""
    return f"{repository}-pairs"


def push_run(run_dir: Path, repository: str, pairs: bool, revision: str | None = None) -> list[str]:
    """Sends the model of a finished run, and its pairs if asked, to repositories that are there; their addresses."""
    sent = [push_model(run_dir / "model", repository, revision=revision)]
    sent += [push_pairs(run_dir / "pairs.parquet", repository)] if pairs else []
    return [commit.repo_url for commit in sent]


def push_model(
    directory: Path,
    repository: str,
    message: str = "End of training",
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Sends a model to a repository that is there.

    Args:
        directory: with weights, tokenizer and card.
        repository: owner/name.
        message: of the commit.
        token: None: $HF_TOKEN, or that of `hf auth login`.
        revision: a branch; None: the main one.

    Raises:
        ConfigError: the hub is out of reach, or refuses. What has arrived is not sent again.
    """
    files = {str(file.relative_to(directory)): _content(file) for file in model_files(directory)}
    return _commit(repository, "model", files, message, token, revision)


def push_pairs(pairs: Path, repository: str, message: str = "End of training", token: str | None = None) -> CommitInfo:
    """Sends a file of `xpo.data.pair_file.export` to the data set of a model's pairs; as `push_model`."""
    to = pairs_repository(repository)
    files: dict[str, str | bytes] = {pairs.name: str(pairs), "README.md": pairs_card(pairs, to, repository).encode()}
    return _commit(to, "dataset", files, message, token)


def _commit(
    repository: str,
    kind: str,
    files: Mapping[str, str | bytes],
    message: str,
    token: str | None,
    revision: str | None = None,
) -> CommitInfo:
    added = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi(token=token)
    return _ask(
        f"{repository} did not arrive on the hub",
        lambda: api.create_commit(repository, added, commit_message=message, repo_type=kind, revision=revision),
    )


def _content(file: Path) -> str | bytes:
    """A file by its path; but adapters name a directory of this machine as the model that they belong to."""
    if file.name != _ADAPTER:
        return str(file)
    adapter = json.loads(file.read_text())
    base = adapter["base_model_name_or_path"]  # null for one that was made, not loaded
    adapter["base_model_name_or_path"] = base and model_name(base)
    return json.dumps(adapter, indent=2).encode()


def _ask(failure: str, request: Callable[[], T]) -> T:
    try:
        return request()
    except Exception as error:  # of the hub, its client, a socket or a file
        reason = first_line(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)
        raise ConfigError(f"{failure} ({reason}); see to the network and to `hf auth login`") from error
