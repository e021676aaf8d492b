"""Sampling: from the right distribution, the same in any batch, without side effects."""

import pytest
import torch
from conftest import TrainerFactory, gpt2
from transformers import GenerationConfig, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from xpo.config.errors import ConfigError
from xpo.config.options import GenerationOptions
from xpo.sampling import sampler as drawing
from xpo.sampling.completions import Completions, PairBatch, joined, same_width, take_pairs, token_batches
from xpo.sampling.kv_cache import roomy_cache
from xpo.sampling.noise import InverseTransformSampler, sampling_noise
from xpo.sampling.sampler import Sampler, check_generation_kwargs, warpers

KEY = (42, 3, 0)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]


def sampler(tokenizer: PreTrainedTokenizerFast, **options) -> Sampler:
    given = GenerationOptions(**{"max_new_tokens": 8} | options)
    return Sampler(tokenizer, given, [0], given.batch_size, given.kwargs)


def draw(sampler: Sampler, model, prompts=PROMPTS, rows=None, key=KEY, greedy=False) -> Completions:
    noise = sampling_noise(key, rows or list(range(len(prompts))), sampler.max_new_tokens)
    return sampler.sample(model, prompts, noise, torch.device("cpu"), greedy)


def test_tokens_are_drawn_from_the_distribution():
    """20,000 draws from p = (.5, .3, .2, 0): shares within 4 standard errors, and never the impossible."""
    noise = sampling_noise((1, 2, 3), range(20_000), 1)
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20_000, 4)
    chosen = InverseTransformSampler(noise, 0)(torch.empty(20_000, 0, dtype=torch.long), logits).argmax(1)
    shares = torch.bincount(chosen, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=4 * 0.0036, rtol=0)
    assert shares[3] == 0


@pytest.mark.parametrize(
    ("budget", "packed", "batches"),
    [
        (None, False, [[1, 3, 0, 2]]),
        (12, False, [[1], [3, 0, 2]]),  # 9; 4 x 3
        (12, True, [[1], [3, 0, 2]]),  # 9 (13 with the next); 4 + 3 + 2
        (13, True, [[1, 3], [0, 2]]),
        (1, True, [[1], [3], [0], [2]]),
    ],
)
def test_batches_of_so_many_tokens(budget, packed, batches):
    """Rows of 3, 9, 2 and 4 tokens, the longest first; with padding all rows of a batch are as long as its longest."""
    assert token_batches(torch.tensor([3, 9, 2, 4]), range(4), budget, packed) == batches


def test_streams_are_independent():
    """Noise differs between steps, policy and reference, rows and seeds; and it is reproducible."""
    keys = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
    draws = [sampling_noise(key, [0, 1], 4) for key in keys]
    flat = torch.cat([d.flatten() for d in draws])
    assert flat.unique().numel() == flat.numel()
    assert torch.equal(draws[0], sampling_noise(keys[0], [0, 1], 4))


def test_a_row_is_the_same_in_any_batch(tokenizer, model):
    """Alone, in a batch, in chunks, in another order: the row's number and the prompt decide."""
    whole = draw(sampler(tokenizer), model)
    chunked = draw(sampler(tokenizer, batch_size=3), model)
    alone = [draw(sampler(tokenizer), model, [p], [i]) for i, p in enumerate(PROMPTS)]
    backwards = draw(sampler(tokenizer), model, PROMPTS[::-1], [3, 2, 1, 0])
    assert whole.texts == chunked.texts == [a.texts[0] for a in alone] == backwards.texts[::-1]
    assert len(set(whole.texts)) > 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_of_different_lengths_are_prefilled_apart(tokenizer, model, kind, monkeypatch: pytest.MonkeyPatch):
    """The same completions; the model reads no more padding than within a group."""
    network = model if kind == "llama" else gpt2()
    prompts = [[5] * 3, [6, 7] * 12, [8, 9, 10], [11] * 20, [12]]
    expected = draw(sampler(tokenizer), network, prompts)
    monkeypatch.setattr(drawing, "tokens_at_once", lambda device: 48)
    widths = []
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    grouped = draw(sampler(tokenizer), network, prompts)
    hook.remove()
    assert torch.equal(grouped.ids, expected.ids)
    assert widths[:3] == [(2, 23), (3, 2), (5, 1)]  # all but the last tokens, then the last tokens together


def test_prompts_of_one_token_are_prefilled_with_longer_ones(tokenizer, model, monkeypatch: pytest.MonkeyPatch):
    """By themselves they would be a batch without tokens."""
    prompts = [[5] * 20, [6] * 20, [7], [8]]
    expected = draw(sampler(tokenizer), model, prompts)
    monkeypatch.setattr(drawing, "tokens_at_once", lambda device: 20)
    assert torch.equal(draw(sampler(tokenizer), model, prompts).ids, expected.ids)
    single = [[number] for number in range(5, 30)]
    assert draw(sampler(tokenizer), model, single).ids.shape[0] == 25


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_keys_and_values_are_written_in_place(tokenizer, model, kind):
    """Into memory for up to twice as many tokens, but no more than will come; the model attends to views of it."""
    network = model if kind == "llama" else gpt2()
    cache = roomy_cache(network, 9)
    network.eval()(torch.tensor([[5, 6, 7], [8, 9, 10]]), past_key_values=cache)
    memory = cache.layers[0].keys.data_ptr()
    assert cache.layers[0].keys.stride(1) == 6 * cache.layers[0].keys.shape[3]
    expected = network(torch.tensor([[5, 6, 7, 11], [8, 9, 10, 12]])).logits[:, 3]
    got = network(torch.tensor([[11], [12]]), past_key_values=cache).logits[:, 0]
    assert cache.layers[0].keys.data_ptr() == memory
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(got, expected)
    network(torch.tensor([[13] * 3, [14] * 3]), past_key_values=cache)
    assert cache.layers[0].keys.stride(1) == 9 * cache.layers[0].keys.shape[3]
    whole = network(torch.tensor([[5, 6, 7, 11, 13, 13, 13, 15], [8, 9, 10, 12, 14, 14, 14, 16]])).logits[:, 7]
    torch.testing.assert_close(network(torch.tensor([[15], [16]]), past_key_values=cache).logits[:, 0], whole)


def test_models_with_other_caches_keep_them():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(vocab_size=32, num_hidden_layers=1, **sizes, sliding_window=8))
    assert roomy_cache(sliding, 9) is None


def test_a_cache_of_the_users_choice_is_used(tokenizer, model):
    expected = draw(sampler(tokenizer), model)
    for extra in ({"cache_implementation": "static"}, {"use_cache": False}, {"use_cache": True}):
        assert torch.equal(draw(sampler(tokenizer, kwargs=extra), model).ids, expected.ids)


def test_no_global_random_state_is_consumed(tokenizer, model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(sampler(tokenizer), model)
    assert torch.equal(before, torch.get_rng_state())


def test_greedy_takes_the_likeliest_token(tokenizer, model):
    expected = model.eval().generate(
        torch.tensor([PROMPTS[0]]),
        generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0),
    )[0, 3:]
    for completions in (draw(sampler(tokenizer), model, greedy=True), draw(sampler(tokenizer, temperature=0.0), model)):
        assert completions.ids[0][completions.mask[0]].tolist() == expected[: completions.mask[0].sum()].tolist()


def test_sampling_options_bite(tokenizer, model):
    """top_k=1, a tiny top_p and min_p=1 all leave the likeliest token; a temperature changes the draw."""
    greedy = draw(sampler(tokenizer), model, greedy=True).texts
    assert draw(sampler(tokenizer, top_k=1), model).texts == greedy
    assert draw(sampler(tokenizer, top_p=1e-6), model).texts == greedy
    assert draw(sampler(tokenizer, min_p=1.0), model).texts == greedy
    assert draw(sampler(tokenizer, temperature=1e-5), model).texts == greedy
    assert draw(sampler(tokenizer), model).texts != greedy


def test_nothing_changes_under_deterministic_algorithms(tokenizer, model):
    """On a GPU, sums along the vocabulary are then computed on the CPU."""
    free = draw(sampler(tokenizer, top_p=0.7), model).texts
    torch.use_deterministic_algorithms(True)
    try:
        assert "_OnCPU" in [type(one).__name__ for one in warpers(GenerationOptions(top_p=0.7))]
        assert draw(sampler(tokenizer, top_p=0.7), model).texts == free
    finally:
        torch.use_deterministic_algorithms(False)


def test_extra_generation_options_reach_generate(tokenizer, model):
    likeliest = draw(sampler(tokenizer), model, greedy=True).ids[0, 0].item()
    suppressed = draw(sampler(tokenizer, kwargs={"suppress_tokens": [likeliest]}), model, greedy=True)
    assert likeliest not in suppressed.ids[suppressed.mask].tolist()


@pytest.mark.parametrize(
    "option",
    [{"num_beams": 4}, {"do_sample": False}, {"num_return_sequences": 2}, {"eos_token_id": 5}, {"min_new_tokens": 9}],
)
def test_options_that_are_no_rollout_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        check_generation_kwargs(option, max_new_tokens=8)


def test_the_defaults_that_a_checkpoint_ships_stay_out(tokenizer, model):
    """A generation_config with top_k=1 and a repetition penalty changes no rollout, and is put back."""
    expected = draw(sampler(tokenizer), model)
    shipped = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=1.9, no_repeat_ngram_size=1)
    model.generation_config = shipped
    assert draw(sampler(tokenizer), model).texts == expected.texts
    assert model.generation_config is shipped


def test_sampling_is_in_eval_mode_and_training_mode_comes_back(tokenizer, model):
    modes = []
    model.train()
    handle = model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    draw(sampler(tokenizer), model)
    handle.remove()
    assert modes
    assert not any(modes)
    assert model.training


def test_the_kv_cache_stays_on_under_gradient_checkpointing(tokenizer, model):
    """After the prompt every forward pass reads one token."""
    model.gradient_checkpointing_enable()
    model.config.use_cache = False  # what Trainer sets
    model.train()
    widths = []
    embed = model.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    draw(sampler(tokenizer), model)
    handle.remove()
    assert widths[0] == 5
    assert set(widths[1:]) == {1}


def test_padding_changes_no_completion_with_absolute_positions(tokenizer):
    model: GPT2LMHeadModel = gpt2()
    together = draw(sampler(tokenizer), model)
    alone = [draw(sampler(tokenizer), model, [p], [i]).texts[0] for i, p in enumerate(PROMPTS)]
    assert together.texts == alone


def test_completions_end_where_their_eos_is(tokenizer, model):
    """The pad token is the EOS token; a bias makes EOS likely."""
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([0]), 4.5))
    completions = draw(sampler(tokenizer, max_new_tokens=16), model, PROMPTS * 8, list(range(32)))
    assert 0 < completions.ended.sum() < 32 or completions.ended.all()
    for ids, mask, ended in zip(completions.ids, completions.mask, completions.ended, strict=True):
        tokens = ids[mask].tolist()
        assert (tokens[-1] == 0) == ended.item()
        assert 0 not in tokens[:-1]


def test_micro_batches_lose_only_shared_padding():
    """Rows 1:2 of a rollout: the prompt's padding and the completion columns beyond both ends vanish."""
    prompt_ids = torch.tensor([[1, 2, 3], [0, 0, 4]])
    prompt_mask = torch.tensor([[1, 1, 1], [0, 0, 1]]).bool()

    def completions(lengths: list[int]) -> Completions:
        mask = torch.arange(4) < torch.tensor(lengths)[:, None]
        return Completions(torch.full((2, 4), 9).where(mask, 0), mask, torch.ones(2).bool(), ["", ""])

    pairs = PairBatch(prompt_ids, prompt_mask, completions([4, 1]), completions([1, 2]))
    batch = take_pairs(pairs.tensors(), [1])
    assert batch["prompt_ids"].tolist() == [[4]]
    assert batch["prompt_mask"].tolist() == [[True]]
    assert batch["completion_ids"].tolist() == [[[9, 0]], [[9, 9]]]
    assert batch["completion_mask"].int().tolist() == [[[1, 0]], [[1, 1]]]


def test_batches_are_joined_at_the_width_of_the_longest():
    """Prompts are padded on the left, completions on the right; index 0 of reference_logps stays the first's."""

    def batch(prompt: list[int], first: list[int], second: list[int], logps: list[float]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[first], [second]])
        return {
            "prompt_ids": torch.tensor([prompt]),
            "prompt_mask": torch.ones(1, len(prompt)).bool(),
            "completion_ids": ids,
            "completion_mask": torch.ones_like(ids).bool(),
            "reference_logps": torch.tensor(logps)[:, None],
            "label": torch.tensor([1.0]),
        }

    both = joined([batch([1, 2], [3], [4], [-1.0, -2.0]), batch([5], [6, 7], [8, 9], [-3.0, -4.0])], pad_token_id=0)
    assert both["prompt_ids"].tolist() == [[1, 2], [0, 5]]
    assert both["prompt_mask"].tolist() == [[True, True], [False, True]]
    assert both["completion_ids"].tolist() == [[[3, 0], [6, 7]], [[4, 0], [8, 9]]]
    assert both["completion_mask"].int().tolist() == [[[1, 0], [1, 1]], [[1, 0], [1, 1]]]
    assert both["reference_logps"].tolist() == [[-1, -3], [-2, -4]]
    assert both["label"].tolist() == [1, 1]


def test_both_completions_get_one_width():
    short = Completions(torch.ones(1, 2).long(), torch.ones(1, 2).bool(), torch.ones(1).bool(), ["a"])
    long = Completions(torch.ones(1, 5).long(), torch.ones(1, 5).bool(), torch.ones(1).bool(), ["b"])
    first, second = same_width(short, long, pad_token_id=7)
    assert first.ids.tolist() == [[1, 1, 7, 7, 7]]
    assert first.mask.sum() == 2
    assert second.ids.shape == (1, 5)
    assert first.mask.dtype == torch.bool


def test_a_static_cache_takes_no_mixed_precision(make_trainer: TrainerFactory) -> None:
    """Its keys would be float32 and its values bfloat16, which transformers finds out in the first rollout."""
    static = {"cache_implementation": "static"}
    with pytest.raises(ConfigError, match=r"cache_implementation='static' takes no mixed precision .*; leave it out"):
        make_trainer(bf16=True, generation_kwargs=static)
    make_trainer(generation_kwargs=static)
