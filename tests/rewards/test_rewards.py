"""Reward models and the judges made of them, on tiny random classifiers. Nothing is downloaded."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from xpo import XPOConfig
from xpo.config.errors import ConfigError
from xpo.data.prompts import Prompt
from xpo.judges import AllOfJudge, FunctionJudge, LengthControlledJudge, RewardJudge
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.rewards import ClassifierReward, FunctionReward, MixReward, VaderReward
from xpo.training.judging import as_reward_model

WORDS = "user assistant system . : sea is blue deep loud grey the a tell me of more and wide cold salty"
SPECIAL = ["<end>", "[CLS]", "[SEP]", "[UNK]"]
ENDS = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"  # its last token is the pad token
TEXTS = [
    ("the sea is", " blue"),
    ("tell me of the sea", " the sea is wide and deep and cold . salty . loud"),
    ("sea", " grey"),
    ("tell me more", ""),
    ("tell me of the deep blue sea", " the deep sea is loud and grey and more"),
]


def words(template: str | None = ENDS, pair: bool = False) -> PreTrainedTokenizerFast:
    """One token per word, pad token == EOS token; with `pair` the special tokens of BERT."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    if pair:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="[UNK]", chat_template=template
    )


def classifier(kind: str, labels: int = 1, positions: int = 64) -> PreTrainedModel:
    """A random classifier of two layers, with weights large enough for scores that differ."""
    size: dict[str, Any] = {"vocab_size": 512, "num_labels": labels, "pad_token_id": 0, "initializer_range": 0.5}
    layers: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "llama":
            config = LlamaConfig(**size, **layers, intermediate_size=32, max_position_embeddings=positions)
            return LlamaForSequenceClassification(config).eval()
        if kind == "bert":
            config = BertConfig(**size, **layers, intermediate_size=32, max_position_embeddings=positions)
            return BertForSequenceClassification(config).eval()
        gpt2 = GPT2Config(**size, n_embd=16, n_layer=2, n_head=2, n_positions=positions, eos_token_id=0)
        return GPT2ForSequenceClassification(gpt2).eval()


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def score_of(model: PreTrainedModel, ids: Sequence[int], **inputs: Any) -> float:
    """The logit at the last token of a text (an encoder's: of the text), without batch and without padding."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        if isinstance(model, BertForSequenceClassification):
            return model(input_ids=tokens, **inputs).logits.item()
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        return model.score(hidden[:, -1]).item()


def split(pairs: Sequence[tuple[Any, str]]) -> tuple[list[Any], list[str]]:
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def close(scores: Tensor, expected: Sequence[float]) -> None:
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


# ---- classifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_plain_texts_in_a_batch_score_as_each_alone_without_padding(kind: str) -> None:
    model, tokenizer = classifier(kind), words(pair=kind == "bert")
    alone = [score_of(model, tokenizer(prompt + completion).input_ids) for prompt, completion in TEXTS]
    assert np.ptp(alone) > 0.1  # the texts differ in score
    close(ClassifierReward(model, tokenizer).scores(*split(TEXTS)), alone)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_text_that_ends_with_the_pad_token_is_scored_there(kind: str) -> None:
    """pad == EOS and a chat template that ends with EOS (defect 16): the score is read at that EOS."""
    model, tokenizer = classifier(kind), words()
    pairs = [(chat(prompt), completion) for prompt, completion in TEXTS]
    ids = [tokenizer(f"{prompt}<end>{completion}<end>").input_ids for prompt, completion in TEXTS]
    assert all(row[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id for row in ids)
    at_the_end = [score_of(model, row) for row in ids]
    one_before = [score_of(model, row[:-1]) for row in ids]
    assert min(abs(a - b) for a, b in zip(at_the_end, one_before, strict=True)) > 1e-3
    close(ClassifierReward(model, tokenizer).scores(*split(pairs)), at_the_end)


def test_a_tokenizer_without_a_pad_token_will_do() -> None:
    model, tokenizer = classifier("llama"), words()
    tokenizer.pad_token = None
    alone = [score_of(model, tokenizer(prompt + completion).input_ids) for prompt, completion in TEXTS]
    close(ClassifierReward(model, tokenizer).scores(*split(TEXTS)), alone)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scores_do_not_depend_on_the_batch_size_or_the_order(kind: str, batch_size: int) -> None:
    model, tokenizer = classifier(kind), words(pair=kind == "bert")
    pairs = [(chat(prompt), completion) for prompt, completion in TEXTS]
    together = ClassifierReward(model, tokenizer).scores(*split(pairs))
    apart = ClassifierReward(model, tokenizer, batch_size=batch_size).scores(*split(pairs[::-1]))
    close(apart, together.flip(0).tolist())


def test_texts_are_read_by_the_reward_models_tokenizer_and_not_the_policys(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Defect 6. The two tokenizers give different ids, so that the policy's would give another score."""
    model, own = classifier("llama"), words(template=None)
    text = "the sea is blue"
    assert own(text).input_ids != tokenizer(text).input_ids
    reward = as_reward_model(model, own, XPOConfig(output_dir=str(tmp_path), use_cpu=True), lambda: tokenizer)
    assert reward is not None
    close(reward.scores(["the sea is"], [" blue"]), [score_of(model, own(text).input_ids)])
    assert abs(score_of(model, tokenizer(text).input_ids) - score_of(model, own(text).input_ids)) > 1e-3


def test_a_conversation_is_rendered_by_the_reward_models_chat_template() -> None:
    model = classifier("llama")
    template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    tokenizer = words(template)
    rendered = "user : the sea . assistant : is blue ."
    close(
        ClassifierReward(model, tokenizer).scores([chat("the sea")], ["is blue"]),
        [score_of(model, tokenizer(rendered).input_ids)],
    )


def test_the_special_tokens_of_a_chat_template_are_not_doubled() -> None:
    model, tokenizer = classifier("bert"), words("[CLS] {{ messages[-1]['content'] }} [SEP]", pair=True)
    ids = tokenizer("is blue").input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("[CLS]")
    close(ClassifierReward(model, tokenizer).scores([chat("x")], ["is blue"]), [score_of(model, ids)])


def test_prompts_that_have_been_through_a_template_are_read_so() -> None:
    """The special tokens of a prompt are parsed; in a completion they stay text, which must not pose as structure."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(**tiny_model().config.to_dict() | {"id2label": {0: "score"}, "label2id": {"score": 0}})
    reward = ClassifierReward(LlamaForSequenceClassification(config), tokenizer, special_tokens="parse")
    chat = [{"role": "user", "content": "sea"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    seen = [reward._encode(rendered, text).input_ids for text in ("blue", "<|im_end|>")]
    assert seen[0] == tokenizer(rendered + "blue", add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [ids.count(end) for ids in seen] == [1, 1]
    as_text = ClassifierReward(LlamaForSequenceClassification(config), tokenizer)
    assert end not in as_text._encode(rendered, "blue").input_ids
    assert as_text.fingerprint != reward.fingerprint


def test_without_a_chat_template_prompt_and_completion_are_a_text_pair_with_its_token_types() -> None:
    """As `model(**tokenizer(prompt, completion))` reads it, which is how such classifiers were trained."""
    model, tokenizer = classifier("bert"), words(template=None, pair=True)
    expected, without_types = [], []
    for prompt, completion in TEXTS:
        row = tokenizer(prompt, completion, return_token_type_ids=True)
        expected.append(score_of(model, row.input_ids, token_type_ids=torch.tensor([row.token_type_ids])))
        without_types.append(score_of(model, row.input_ids))
    assert max(abs(a - b) for a, b in zip(expected, without_types, strict=True)) > 1e-3
    pairs = [(chat(prompt), completion) for prompt, completion in TEXTS]
    close(ClassifierReward(model, tokenizer).scores(*split(pairs)), expected)


@pytest.mark.parametrize("prompt", ["tell me " * 20 + "of the sea", chat("tell me " * 20 + "of the sea")])
def test_truncation_takes_the_beginning_and_keeps_the_completion(prompt: Prompt) -> None:
    model, tokenizer = classifier("llama"), words("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    reward = ClassifierReward(model, tokenizer, max_length=6)
    close(
        reward.scores([prompt], [" is deep and blue"]),
        [score_of(model, tokenizer("the sea is deep and blue").input_ids)],
    )


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("is deep and blue", ("the sea", "is deep and blue")),  # the prompt loses its beginning
        ("the sea is deep and blue and", ("", "sea is deep and blue and")),  # too long by itself
    ],
    ids=["short", "long"],
)
def test_truncation_of_a_text_pair_spares_the_completion(completion: str, kept: tuple[str, str]) -> None:
    model, tokenizer = classifier("bert"), words(template=None, pair=True)
    reward = ClassifierReward(model, tokenizer, max_length=9)  # six words and three special tokens
    row = tokenizer(*kept, return_token_type_ids=True)
    close(
        reward.scores([chat("tell me of " * 5 + "the sea")], [completion]),
        [score_of(model, row.input_ids, token_type_ids=torch.tensor([row.token_type_ids]))],
    )


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_texts_longer_than_the_positions_of_the_model_are_truncated(kind: str) -> None:
    model, tokenizer = classifier(kind, positions=12), words(pair=kind == "bert")
    assert tokenizer.model_max_length > 12
    room = 12 - tokenizer.num_special_tokens_to_add()
    kept = "sea " * (room - 2) + "is blue"
    close(
        ClassifierReward(model, tokenizer).scores(["sea " * 40], ["is blue"]),
        [score_of(model, tokenizer(kept).input_ids)],
    )


def test_two_labels_give_the_log_odds_of_the_second() -> None:
    model, tokenizer = classifier("llama", 2), words()
    with torch.no_grad():
        bad, good = model(**tokenizer("the sea is blue", return_tensors="pt")).logits[0].tolist()
    close(ClassifierReward(model, tokenizer).scores(["the sea "], ["is blue"]), [good - bad])


def test_a_classifier_with_many_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has num_labels=3; use a classifier with one label.*, or with two"):
        ClassifierReward(classifier("llama", 3), words())


def test_the_callers_model_keeps_its_pad_token() -> None:
    model = classifier("llama")
    model.config.pad_token_id = None
    ClassifierReward(model, words()).scores(["the sea "], ["is blue"])
    assert model.config.pad_token_id is None


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class MyConfig(PretrainedConfig):
    model_type = "mine"
    pad_token_id = None

class MyModel(PreTrainedModel):
    config_class = MyConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, attention_mask):
        return SequenceClassifierOutput(logits=self.scale * attention_mask.sum(dim=1, keepdim=True))
"""


def test_a_classifier_with_code_of_its_own_is_refused_unless_trusted(tmp_path: Path) -> None:
    """transformers would ask on the terminal, which a job does not have."""
    words().save_pretrained(tmp_path)
    code = {"AutoConfig": "mine.MyConfig", "AutoModelForSequenceClassification": "mine.MyModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "num_labels": 1, "auto_map": code}))
    (tmp_path / "mine.py").write_text(OWN_CODE)
    save_file({"scale": torch.tensor([3.0])}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused = r"reward_model\.model=.* brings its own code.*trust_remote_code=true"
    with pytest.raises(ConfigError, match=refused) as caught:
        ClassifierReward.from_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)
    trusted = ClassifierReward.from_pretrained(str(tmp_path), trust_remote_code=True)
    close(trusted.scores(["the sea "], ["is blue"]), [3.0 * len(words()("the sea is blue").input_ids)])


def test_a_mix_is_the_weighted_sum_and_names_its_parts() -> None:
    length = FunctionReward(lambda prompts, completions: [float(len(text)) for text in completions])
    spaces = FunctionReward(lambda prompts, completions: [text.count(" ") if text else None for text in completions])
    mix = MixReward({"length": length, "spaces": spaces}, {"length": 0.5, "spaces": -2.0})
    total, parts = mix.scores_with_parts(["p"] * 3, ["a b c", "dd", ""])
    close(total[:2], [2.5 - 4, 1.0])
    assert total[2].isnan()
    assert parts["length"].tolist() == [5, 2, 0]
    assert parts["spaces"][:2].tolist() == [2, 0]


def test_one_number_for_all_is_not_taken_for_one_each() -> None:
    """It would be broadcast: in a mix, in a rule on another judge, in the difference of two scores."""
    total = FunctionReward(lambda prompts, completions: [float(sum(map(len, completions)))])
    each = FunctionReward(lambda prompts, completions: [1.0] * len(completions))
    one = FunctionJudge(lambda prompts, first, second: [1.0])
    some = FunctionReward(lambda prompts, completions: [1.0 for text in completions if text])
    texts = ["p"] * 3, ["a", "b", "c"], ["a", "", "c"]
    with pytest.raises(ConfigError, match=r"shape \(1,\) for 3 pairs; return one number per pair"):
        MixReward({"total": total, "each": each}, {"total": 1.0, "each": 1.0}).scores(*texts[:2])
    for judge in (LengthControlledJudge(one, 0.01), AllOfJudge({"one": one, "two": RewardJudge(each)})):
        with pytest.raises(ConfigError, match=r"shape \(1,\) for 3 pairs"):
            judge.verdicts(*texts)
    with pytest.raises(ConfigError, match=r"shape \(2,\) for 3 pairs"):
        RewardJudge(some).verdicts(*texts)


def test_scores_have_no_gradient() -> None:
    """A reward model without no_grad would be trained with the policy, through the labels."""
    weight = torch.ones(2, requires_grad=True)
    reward = FunctionReward(lambda prompts, completions: weight * len(prompts))
    assert not reward.scores_with_parts(["p"] * 2, ["a", "b"]).total.requires_grad


@pytest.mark.parametrize("weights", [{}, {"one": 1.0, "two": 1.0}, {"one": "heavy"}])
def test_a_mix_needs_a_weight_for_each_model(weights: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"reward_model\.weights"):
        MixReward({"one": VaderReward()}, weights)


def test_fingerprints_name_weights_and_settings() -> None:
    """The same weights from another place are the same model; other weights, settings or texts are not."""
    model, tokenizer = classifier("llama"), words()
    same = ClassifierReward(copy.deepcopy(model), tokenizer).fingerprint
    assert ClassifierReward(model, tokenizer).fingerprint == same
    others = [ClassifierReward(model, tokenizer, max_length=5), ClassifierReward(classifier("llama", 2), tokenizer)]
    changed = copy.deepcopy(model)
    changed.get_input_embeddings().weight[3, 3] += 1e-3
    assert len({same, *(other.fingerprint for other in [*others, ClassifierReward(changed, tokenizer)])}) == 4
    mixes = [MixReward({"a": VaderReward()}, {"a": weight}).fingerprint for weight in (1.0, 2.0)]
    assert mixes[0] != mixes[1]
    assert MixReward({"a": FunctionReward(lambda *_: [])}, {"a": 1.0}).fingerprint is None


def test_the_model_is_frozen_and_the_tokenizer_of_the_caller_left_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer.truncation_side, len(tokenizer("the sea " * 30).input_ids)
    model = classifier("llama").train()
    scores = ClassifierReward(model, tokenizer, max_length=8).scores(["the sea " * 30], ["is blue"])
    assert (tokenizer.truncation_side, len(tokenizer("the sea " * 30).input_ids)) == before
    assert not model.training
    assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())  # frozen
    torch.ones(1, requires_grad=True).mul(scores).sum().backward()  # an inference tensor would raise


def test_an_unfinished_assistant_turn_and_its_completion_are_one_message() -> None:
    model, tokenizer = classifier("llama"), words()
    prompt = [*chat("tell me"), {"role": "assistant", "content": "the sea"}]
    expected = score_of(model, tokenizer("tell me<end>the sea is blue<end>").input_ids)
    close(ClassifierReward(model, tokenizer).scores([prompt], [" is blue"]), [expected])


def test_a_classifier_is_loaded_from_a_directory_with_its_own_tokenizer_or_another(tmp_path: Path) -> None:
    model, tokenizer = classifier("llama"), words()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = ClassifierReward.from_pretrained(str(tmp_path), device="cpu")
    close(loaded.scores(*split(TEXTS)), ClassifierReward(model, tokenizer).scores(*split(TEXTS)).tolist())
    other = tiny_tokenizer()
    loaded = ClassifierReward.from_pretrained(str(tmp_path), device="cpu", tokenizer=other)
    close(loaded.scores(*split(TEXTS)), ClassifierReward(model, other).scores(*split(TEXTS)).tolist())
    with pytest.raises(ConfigError, match=r"reward_model.model=.* is neither a directory nor a hub name"):
        ClassifierReward.from_pretrained(str(tmp_path / "nowhere"))


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    """Its head would be made up: a random reward."""
    tiny_model().save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"reward_model.model=.* has no trained score.weight; point it at a sequence"):
        ClassifierReward.from_pretrained(str(tmp_path), device="cpu")


# ---- functions ---------------------------------------------------------------------------------


def test_a_missing_reward_is_nan_and_never_zero() -> None:
    """Defect 20."""
    scores = FunctionReward(lambda prompts, completions: [1, None, 0.0]).scores(["p"] * 3, ["a", "b", "c"])
    assert scores.tolist()[::2] == [1.0, 0.0]
    assert scores[1].isnan()
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    "answer", [[0.5, 2], (0.5, 2), np.array([0.5, 2]), torch.tensor([0.5, 2], dtype=torch.float64)]
)
def test_a_reward_function_may_return_any_sequence_of_numbers(answer: Any) -> None:
    scores = FunctionReward(lambda prompts, completions: answer).scores(["p", "q"], ["a", "b"])
    torch.testing.assert_close(scores, torch.tensor([0.5, 2.0]))


def test_a_reward_function_gets_prompts_and_completions_as_they_are() -> None:
    seen = []

    def reward(*arguments: Any) -> list[float]:
        seen.append(arguments)
        return [0.0, 0.0]

    FunctionReward(reward).scores([chat("sea"), "sky"], ["a", "b"])
    assert seen == [([chat("sea"), "sky"], ["a", "b"])]


@pytest.mark.parametrize("as_type", [list, torch.tensor])
def test_a_judge_function_gives_the_margins(as_type: Callable[..., Any]) -> None:
    def longer(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Any:
        return as_type([float(len(a) - len(b)) for a, b in zip(first, second, strict=True)])

    margins = FunctionJudge(longer).margins(["p", "q", "r"], ["aa", "b", "c"], ["a", "bbb", "d"])
    torch.testing.assert_close(margins, torch.tensor([1.0, -2.0, 0.0]))


def test_a_judge_function_that_cannot_tell_gives_nan() -> None:
    margins = FunctionJudge(lambda prompts, first, second: [None, -1]).margins(["p", "q"], ["a", "b"], ["c", "d"])
    assert margins[0].isnan()
    assert margins[1] == -1


def test_the_reward_judges_margin_is_the_difference_of_the_rewards() -> None:
    length = FunctionReward(lambda prompts, completions: [len(text) for text in completions])
    margins = RewardJudge(length).margins(["p", "q"], ["aaa", "b"], ["a", "bb"])
    torch.testing.assert_close(margins, torch.tensor([2.0, -1.0]))


def test_the_reward_judge_cannot_tell_without_both_rewards() -> None:
    known = FunctionReward(lambda prompts, completions: [len(text) or None for text in completions])
    margins = RewardJudge(known).margins(["p", "q", "r"], ["aa", "", ""], ["", "a", ""])
    assert margins.isnan().all()
