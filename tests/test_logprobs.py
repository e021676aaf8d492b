"""Log-probabilities, masks and positions."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from xpo.logprobs import completion_lengths, completion_logps, length_mask, positions, token_logps


def test_a_completion_ends_at_its_first_eos():
    """EOS is 0; what stands behind it is padding, even where it looks like tokens or like EOS."""
    ids = torch.tensor([[5, 0, 0, 0], [5, 6, 7, 8], [0, 9, 9, 9], [5, 6, 7, 0]])
    lengths, ended = completion_lengths(ids, torch.tensor([0]))
    assert lengths.tolist() == [2, 4, 1, 4]
    assert ended.tolist() == [True, False, True, True]


def test_several_tokens_may_end_a_completion():
    lengths, ended = completion_lengths(torch.tensor([[5, 3, 0], [5, 0, 3]]), torch.tensor([0, 3]))
    assert lengths.tolist() == [2, 2]
    assert ended.all()


def test_length_mask_and_positions():
    assert length_mask(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


def test_token_logps_are_log_softmax_in_float32():
    logits = torch.randn(3, 5, 11).bfloat16()
    ids = torch.randint(11, (3, 5))
    expected = logits.float().log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
    assert token_logps(logits, ids).dtype == torch.float32
    torch.testing.assert_close(token_logps(logits, ids), expected)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_changes_nothing(kind: str, model: LlamaForCausalLM):
    """The same pair alone, and in a batch with padding on both sides. GPT-2 has absolute positions."""
    network = model.eval() if kind == "llama" else gpt2()
    prompt, completion = [7, 8, 9], [10, 11]
    alone = completion_logps(
        network,
        torch.tensor([prompt + completion]),
        torch.ones(1, 5, dtype=torch.bool),
        torch.ones(1, 2, dtype=torch.bool),
    )
    padded = completion_logps(
        network,
        torch.tensor([[0, 0, *prompt, *completion, 0], [1, 2, 3, 4, 5, 6, 7, 8]]),
        torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8]).bool(),
        torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
    )
    torch.testing.assert_close(padded[0], alone[0])


def test_only_completion_tokens_count(model: LlamaForCausalLM):
    """The sum over the completion of log softmax(logits)[token], without the prompt's tokens."""
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    logits = model.eval()(ids).logits.log_softmax(-1)
    expected = logits[0, 2, 10] + logits[0, 3, 11]
    mask = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(completion_logps(model, ids, torch.ones_like(ids).bool(), mask)[0], expected)
