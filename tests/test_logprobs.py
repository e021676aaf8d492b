"""Log-probabilities by both ways, masks and positions; which architectures share the prompt's forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from xpo.errors import ConfigError
from xpo.forward import Forward, why_separate
from xpo.logprobs import (
    block_mask,
    chunked_logps,
    completion_lengths,
    completion_logps,
    length_mask,
    positions,
    shared_prompt_logps,
    token_logps,
)


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


def test_who_sees_whom():
    """[pad x | y1 y2 | z]: everybody sees itself and what came before in the prompt and in its own completion."""
    real = torch.tensor([[False, True, True, True, True]])
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 1]], dtype=torch.bool
    )
    sees = block_mask(real, torch.tensor([0, 0, 1, 1, 2]), torch.bool)
    assert torch.equal(sees[0, 0], expected)
    additive = block_mask(real, torch.tensor([0, 0, 1, 1, 2]), torch.float32)
    assert torch.equal(additive == 0, sees)


# ---- both ways, on every architecture -----------------------------------------------------------------

SIZE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "initializer_range": 0.3,
}


def gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, bos_token_id=0, eos_token_id=0, **sizes))


SHARING: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attn_implementation="eager")),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZE)),
    "gpt2": gpt2,
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)),
    "mistral, wide": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=64)),
    "gemma3, wide": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, sliding_window=64)),
}
SEPARATE: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=8)), "over 8 tokens"),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, sliding_window=64)), "changes its logits"),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZE, sliding_window=8)), "sliding_attention over 8"),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=4.0)), "changes its logits"),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)),
        "",
    ),
}
LONGEST = 40


def batch_of(completions: int = 2) -> dict[str, Tensor]:
    """Three prompts of different lengths and completions of different lengths, one of them empty but for its EOS."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[4, 1, 7], [6, 3, 2], [5, 5, 5]])[:completions]
    return {
        "prompt_ids": torch.randint(1, 500, (3, 6), generator=generator),
        "prompt_mask": length_mask(torch.tensor([6, 2, 4]), 6).flip(1),
        "completion_ids": torch.randint(1, 500, (completions, 3, 7), generator=generator),
        "completion_mask": torch.stack([length_mask(part, 7) for part in lengths]),
    }


def built(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("completions", [1, 2, 3])
@pytest.mark.parametrize("kind", SHARING)
def test_sharing_the_prompt_changes_nothing(kind: str, completions: int):
    """Log-probabilities and gradients; the weights of the sum tell the completions apart."""
    model, batch = built(SHARING[kind]), batch_of(completions)
    forward = Forward(model, "auto", LONGEST)
    assert forward.shared, forward.reason
    weights = torch.randn(completions, 3, generator=torch.Generator().manual_seed(1))
    results, gradients = [], []
    for way in (forward, Forward(model, "separate", LONGEST)):
        model.zero_grad()
        logps = way(model, batch)
        (weights * logps).sum().backward()
        results.append(logps.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].shape == (completions, 3)
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-4, rtol=1e-3, msg=name)
    assert "forward" not in vars(forward.head)


@pytest.mark.parametrize("kind", SEPARATE)
def test_what_cannot_share_is_found_out(kind: str):
    make, reason = SEPARATE[kind]
    model = built(make)
    assert reason in (why_separate(model, LONGEST) or "shared")
    assert not Forward(model, "auto", LONGEST).shared
    with pytest.raises(ConfigError, match=r"pair_forward='shared' is wrong for this model: .*; set pair_forward=auto"):
        Forward(model, "shared", LONGEST)
    assert "forward" not in vars(model.get_output_embeddings())


def test_half_precision_shares_too():
    model = built(SHARING["llama"]).bfloat16()
    assert why_separate(model, LONGEST) is None


@pytest.mark.parametrize("way", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_changes_nothing(kind: str, way: str):
    """The same pairs one by one, and in a batch with padding on both sides. GPT-2 has absolute positions."""
    model, batch = built(SHARING[kind]), batch_of()
    forward = Forward(model, way, LONGEST)  # type: ignore[arg-type]
    together = forward(model, batch)
    for i in range(3):
        prompt = batch["prompt_mask"][i]
        width = int(batch["completion_mask"][:, i].sum(dim=1).max())
        alone = {
            "prompt_ids": batch["prompt_ids"][i : i + 1, prompt],
            "prompt_mask": torch.ones(1, int(prompt.sum()), dtype=torch.bool),
            "completion_ids": batch["completion_ids"][:, i : i + 1, :width],
            "completion_mask": batch["completion_mask"][:, i : i + 1, :width],
        }
        torch.testing.assert_close(forward(model, alone)[:, 0], together[:, i], atol=1e-4, rtol=1e-5)


def test_only_completion_tokens_count():
    """The sum over the completion of log softmax(logits)[token], without the prompt's tokens, by hand."""
    model = built(SHARING["llama"])
    prompt, completion = torch.tensor([[7, 8, 9]]), torch.tensor([[[10, 11]]])
    logits = model(torch.tensor([[7, 8, 9, 10, 11]])).logits.log_softmax(-1)
    expected = logits[0, 2, 10] + logits[0, 3, 11]
    prompt_mask, mask = torch.ones_like(prompt).bool(), torch.ones_like(completion).bool()
    torch.testing.assert_close(completion_logps(model, prompt, prompt_mask, completion, mask)[0, 0], expected)
    shared = shared_prompt_logps(model, model.lm_head, torch.bool, prompt, prompt_mask, completion, mask)
    torch.testing.assert_close(shared[0, 0], expected)


# ---- the projection to the vocabulary in chunks ---------------------------------------------------------


@pytest.mark.parametrize("logits_at_once", [1, 50, 64, 10_000])
def test_chunks_change_neither_values_nor_gradients(logits_at_once: int):
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(8, 50), torch.randn(13, 8, requires_grad=True), torch.randint(50, (13,))
    expected = token_logps(head(hidden), targets)
    weights = torch.randn(13)
    wanted = torch.autograd.grad((weights * expected).sum(), [hidden, *head.parameters()])
    logps = chunked_logps(head, hidden, targets, logits_at_once)
    torch.testing.assert_close(logps, expected)
    for got, want in zip(
        torch.autograd.grad((weights * logps).sum(), [hidden, *head.parameters()]), wanted, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_no_more_logits_at_once_than_allowed():
    """Neither in the forward pass nor when the gradient computes them again."""
    head, most = nn.Linear(8, 50), []
    head.register_forward_hook(lambda module, inputs, output: most.append(output.numel()))
    hidden = torch.randn(100, 8, requires_grad=True)
    chunked_logps(head, hidden, torch.randint(50, (100,)), 500).sum().backward()
    assert max(most) == 500
    assert sum(most) == 50 + 2 * 100 * 50  # one token to learn the size of the vocabulary, then everything twice
