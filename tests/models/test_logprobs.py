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
    GPTNeoConfig,
    GPTNeoForCausalLM,
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
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from xpo.config.errors import ConfigError
from xpo.models.attention import _completions_see, blocks_of_pairs, packed_attention
from xpo.models.forward import Forward, why_not
from xpo.models.logprobs import (
    Layout,
    block_mask,
    chunked_logps,
    completion_lengths,
    length_mask,
    positions,
    shared_prompt_logps,
    token_logps,
)
from xpo.sampling.completions import take_pairs


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


def test_the_gradient_of_token_logps_is_that_of_log_softmax():
    logits = torch.randn(3, 5, 11, requires_grad=True)
    ids, weights = torch.randint(11, (3, 5)), torch.randn(3, 5)
    expected = logits.log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), logits)
    (got,) = torch.autograd.grad((weights * token_logps(logits, ids)).sum(), logits)
    torch.testing.assert_close(got, wanted)


def test_no_copy_of_logits_is_kept_for_the_gradient():
    """In half precision as well: a float32 copy is twice as large as the logits."""
    logits = torch.randn(3, 5, 11).bfloat16().requires_grad_()
    ids, kept = torch.randint(11, (3, 5)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        logps = token_logps(logits, ids)
    assert [part.data_ptr() for part in kept if part.numel() == logits.numel()] == [logits.data_ptr()]
    (got,) = torch.autograd.grad(logps.sum(), logits)
    exact = logits.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(token_logps(exact, ids).sum(), exact)
    assert torch.equal(got, wanted.bfloat16())


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


WAYS: tuple[str, ...] = ("packed", "shared", "separate")
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
    "gpt neo": (
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=512,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=20,  # longer than what is tried
                max_position_embeddings=64,
            )
        ),
        "attend to 20 tokens only",
    ),
    # Tried in half precision, it differs by less than a sound model might.
    "mpt": (
        lambda: MptForCausalLM(MptConfig(vocab_size=512, d_model=32, n_heads=4, n_layers=2)).bfloat16(),
        "takes no positions",
    ),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)),
        "",
    ),
}
NOT_PACKED = ("llama, eager",)
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
@pytest.mark.parametrize("way", ["packed", "shared"])
@pytest.mark.parametrize("kind", SHARING)
def test_sharing_the_prompt_changes_nothing(kind: str, way: str, completions: int):
    """Log-probabilities and gradients; the weights of the sum tell the completions apart."""
    model, batch = built(SHARING[kind]), batch_of(completions)
    if way == "packed" and kind in NOT_PACKED:
        with pytest.raises(ConfigError, match="pair_forward='packed' is wrong for this model: its attention eager"):
            Forward(model, way, LONGEST)
        assert Forward(model, "auto", LONGEST).way == "shared"
        return
    attention = model.config._attn_implementation
    forward = Forward(model, way, LONGEST)
    assert forward.way == way
    weights = torch.randn(completions, 3, generator=torch.Generator().manual_seed(1))
    results, gradients = [], []
    for one in (forward, Forward(model, "separate", LONGEST)):
        model.zero_grad()
        logps = one(model, batch)
        (weights * logps).sum().backward()
        results.append(logps.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].shape == (completions, 3)
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-4, rtol=1e-3, msg=name)
    assert "forward" not in vars(model.get_output_embeddings())
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", SEPARATE)
def test_what_cannot_share_is_found_out(kind: str):
    make, reason = SEPARATE[kind]
    model = built(make)
    assert Forward(model, "auto", LONGEST).way == "separate"
    assert reason in (why_not("shared", model, LONGEST) or "none")
    for way in ("packed", "shared"):
        with pytest.raises(
            ConfigError, match=f"pair_forward='{way}' is wrong for this model: .*; set pair_forward=auto"
        ):
            Forward(model, way, LONGEST)
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("way", ["packed", "shared"])
def test_half_precision_shares_too(way: str):
    model = built(SHARING["llama"]).bfloat16()
    assert why_not(way, model, LONGEST) is None


def test_packed_pairs_do_not_go_with_gradient_checkpointing():
    """The layers are computed again during backward, when attention is the model's own again."""
    model, batch = built(SHARING["llama"]), batch_of()
    forward = Forward(model, "auto", LONGEST)
    assert forward.way == "packed"
    forward(model, batch).sum().backward()
    expected = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    assert forward.way == "shared"
    forward(model, batch).sum().backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected, atol=1e-4, rtol=1e-4)


def test_the_output_embedding_has_its_gradient_under_autocast():
    model, batch = built(SHARING["llama"]), batch_of()
    forward = Forward(model, "shared", LONGEST)
    gradients = []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            (forward(model, batch) * torch.tensor([[2.0], [-1.0]])).sum().backward()
        gradient = model.lm_head.weight.grad
        assert gradient is not None
        gradients.append(gradient.clone())
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


def test_packed_pairs_leave_no_masks_behind():
    model = built(SHARING["llama"])
    Forward(model, "packed", LONGEST)(model, batch_of())
    assert _completions_see.cache_info().currsize == 0


def test_on_a_gpu_pairs_are_not_packed_unless_asked():
    """DeepSpeed puts a model on its GPU after the choice."""
    model = built(SHARING["llama"])
    assert Forward(model, "auto", LONGEST, torch.device("cuda")).way == "shared"
    assert Forward(model, "auto", LONGEST, torch.device("cpu")).way == "packed"


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_takes_each_batch_as_it_comes(way: str):
    """training.torch_compile: no graph keeps the targets, lengths or masks of an earlier batch."""
    model = built(SHARING["llama"])
    compiled = torch.compile(model, backend="eager")  # traced and guarded as ever; nothing generated
    forward = Forward(model, way, LONGEST)
    whole = batch_of()
    for rows in ([0, 1, 2], [1, 2], [2, 0]):
        batch = take_pairs(whole, rows)
        results = []
        for one in (model, compiled):
            model.zero_grad()
            logps = forward(one, batch)
            (logps * torch.tensor([[2.0], [-1.0]])).sum().backward()
            gradient = model.model.embed_tokens.weight.grad
            assert gradient is not None
            assert gradient.abs().max() > 0
            results.append((logps.detach(), gradient.clone()))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_a_packed_row_has_no_padding_and_takes_no_logits_of_prompts():
    model, batch = built(SHARING["llama"]), batch_of()
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    forward = Forward(model, "packed", LONGEST)
    seen.clear()
    forward(model, batch)
    tokens = int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
    assert seen[0]["input_ids"].shape == (1, tokens)
    assert seen[0]["attention_mask"].tolist() == [[[[6, 4, 6], [2, 1, 3], [4, 7, 2]]]]
    assert seen[0]["position_ids"][0, :20].tolist() == [*range(6), *range(6, 10), *range(6, 12), 0, 1, 2, 2]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_flex_attention_does_the_same(kind: str, autocast: bool):
    """The kernel of GPUs, not compiled; it has no backward on CPUs."""
    model, batch = built(SHARING[kind]), batch_of()
    texts = (batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = Forward(model, "packed", LONGEST)(model, batch)
        with packed_attention(model):
            logps = shared_prompt_logps(model, model.lm_head, Layout(True, blocks_of_pairs), *texts)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("way", WAYS)
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
    batch = {"prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": completion, "completion_mask": mask}
    for way in WAYS:
        torch.testing.assert_close(Forward(model, way, LONGEST)(model, batch)[0, 0], expected)


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
