"""Linear layers laid out for decoding: the same results, in place for as long as the block lasts."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xpo.config.options import SamplingOptions
from xpo.sampling import linears
from xpo.sampling.linears import decoding_linears
from xpo.sampling.noise import sampling_noise
from xpo.sampling.sampler import Sampler


def layers(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512, bias=bias), nn.Tanh(), nn.Linear(512, 256, bias=bias), nn.Linear(256, 8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 256), (3, 1, 256), (1, 256), (4, 40, 256)])
def test_results_are_the_same(shape: tuple[int, ...], bias: bool):
    """The last shape has more rows than is worth while, as prompts do."""
    model, values = layers(bias), torch.randn(shape)
    with torch.no_grad():
        expected = model(values)
        with decoding_linears(model, 8):
            assert [("forward" in vars(layer)) for layer in model] == [True, False, True, False]
            torch.testing.assert_close(model(values), expected, atol=1e-5, rtol=1e-5)
        assert not any("forward" in vars(layer) for layer in model)
        assert torch.equal(model(values), expected)


def test_the_layers_come_back_after_an_error_and_see_new_weights():
    model, values = layers(), torch.randn(2, 256)
    with pytest.raises(KeyError), decoding_linears(model, 2):
        raise KeyError
    with torch.no_grad():
        model[0].weight.mul_(2)
        expected = model(values)
        with decoding_linears(model, 2):
            torch.testing.assert_close(model(values), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reason", ["bfloat16", "rows", "autocast"])
def test_where_it_is_not_for_nothing_happens(reason: str):
    model = layers().bfloat16() if reason == "bfloat16" else layers()
    rows = linears.MOST_ROWS + 1 if reason == "rows" else 8
    with torch.autocast("cpu", enabled=reason == "autocast"), decoding_linears(model, rows):
        assert not any("forward" in vars(layer) for layer in model)


def test_frozen_weights_are_rounded_once_under_autocast():
    """To the last bit what autocast computes, which would round them for each token; trained ones it remembers."""
    model, values = layers(), torch.randn(3, 1, 256)
    model[0].requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(values)
        with decoding_linears(model, 8), profile(activities=[ProfilerActivity.CPU]) as found:
            assert [("forward" in vars(layer)) for layer in model] == [True, False, False, False]
            assert torch.equal(model(values), expected)
            assert torch.equal(model[0](values), model[0](values))
        copies = {event.key: event.count for event in found.key_averages()}["aten::_to_copy"]
        with profile(activities=[ProfilerActivity.CPU]) as found:
            model(values), model[0](values), model[0](values)
        assert copies == {event.key: event.count for event in found.key_averages()}["aten::_to_copy"] - 6
    assert expected.dtype == torch.bfloat16


def test_a_rollout_draws_the_same_tokens(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, eos_token_id=0, pad_token_id=0, **sizes))
    sampler = Sampler(tokenizer, SamplingOptions(max_new_tokens=12), [0])
    arguments = (model, [[5, 6, 7], [8, 9]], sampling_noise((1, 2, 3), [0, 1], 12), torch.device("cpu"))
    used: list[int] = []
    pack = linears._packed_forward
    monkeypatch.setattr(linears, "_packed_forward", lambda module, rows: used.append(rows) or pack(module, rows))
    quick = sampler.sample(*arguments)
    assert set(used) == {2}
    monkeypatch.setattr(linears, "SMALLEST", 10**9)
    assert torch.equal(quick.ids, sampler.sample(*arguments).ids)
