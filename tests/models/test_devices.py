"""Which device a judge computes on."""

import pytest
import torch

from xpo.config.errors import ConfigError
from xpo.models.devices import chosen_device


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert chosen_device("judge.device", None) == chosen_device("judge.device", "cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"judge.device='{name}', but torch sees 0 GPUs; give cpu or null"):
            chosen_device("judge.device", name)


@pytest.mark.parametrize(("rank", "gpus", "index"), [(None, 8, 0), ("3", 8, 3), ("3", 1, 0), ("5", 4, 1)])
def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch, rank: str | None, gpus: int, index: int) -> None:
    """Also before anything has told torch; where each process sees one GPU only, that one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    for name in (None, "cuda"):
        assert chosen_device("judge.device", name) == torch.device("cuda", index)
    assert chosen_device("judge.device", f"cuda:{gpus - 1}") == torch.device("cuda", gpus - 1)
    with pytest.raises(ConfigError, match=f"judge.device='cuda:{gpus}', but torch sees {gpus} GPUs"):
        chosen_device("judge.device", f"cuda:{gpus}")


def test_a_word_that_is_no_device() -> None:
    with pytest.raises(ConfigError, match=r"reward_model.device='gpu' is no torch device; give cpu, cuda"):
        chosen_device("reward_model.device", "gpu")
