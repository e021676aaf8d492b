"""Repositories of the hub, from a cache on disk."""

from pathlib import Path

import pytest

from xpo.config.errors import ConfigError
from xpo.models.hub import local_directory


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached snapshot of owner/name, with a configuration only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    directory = repository / "snapshots" / ("0" * 40)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return directory


def test_a_cached_model_is_found_without_a_hub(snapshot: Path) -> None:
    (snapshot / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert local_directory("model.name", "owner/name") == snapshot


def test_weights_as_pickles_are_told_as_such(snapshot: Path) -> None:
    """They are not downloaded, so that the library would only say what it does not find."""
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model.name='owner/name' has no weights in the form of safetensors; save"):
        local_directory("model.name", "owner/name")
    assert local_directory("model.name", "owner/name", weights=False) == snapshot


@pytest.mark.parametrize(("offline", "remedy"), [(True, "or unset HF_HUB_OFFLINE"), (False, "or check the connection")])
def test_a_hub_out_of_reach_is_told_with_what_would_help(
    offline: bool, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    with pytest.raises(ConfigError, match=f"model.name='a/b' .* out of reach; .*{remedy}"):
        local_directory("model.name", "a/b")
