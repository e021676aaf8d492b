"""The judge in this process against its definition, written out one question at a time."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_server import LLMServer, sharpened
from omegaconf import OmegaConf
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from xpo.config.errors import ConfigError
from xpo.judges.llm import LLMJudge
from xpo.judges.local_llm import LocalLLMJudge
from xpo.judges.question import TEMPLATE
from xpo.models.loading import SMOLLM2, cache_directory, tiny_model, tiny_tokenizer

PROMPTS = ["Hello!", "What is the capital of France?", "Tell a story. " * 8, "2 + 2 = ?", "", "A or B?"]
FIRST = ["Hi!", "Paris.", "Once upon a time there was a robot. " * 5, "4", "a", "B"]
SECOND = ["Go away", "The capital is Rome. " * 9, "No", "five", "", "answer A"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers depend on all that it reads."""
    directory = tmp_path_factory.mktemp("judge")
    sharpened(tiny_model(), 6).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def plain_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a chat template."""
    directory = tmp_path_factory.mktemp("plain")
    sharpened(tiny_model(), 6).save_pretrained(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def judge(directory: Path) -> LocalLLMJudge:
    return LocalLLMJudge(str(directory), device="cpu")


def by_hand(
    prompt: str, a: str, b: str, frame: str = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
) -> float:
    """logit(A) - logit(B) of the token after one question, unbatched and unpadded."""
    tokenizer, network = tiny_tokenizer(), sharpened(tiny_model(), 6).eval()
    asked = TEMPLATE.replace("{prompt}", prompt).replace("{first}", a).replace("{second}", b)
    with torch.no_grad():
        logits = network(tokenizer(frame.replace("{}", asked), return_tensors="pt").input_ids).logits[0, -1]
    letter_a, letter_b = tokenizer.convert_tokens_to_ids(["A", "B"])
    return (logits[letter_a] - logits[letter_b]).item()


def expected(**options: Any) -> Tensor:
    return torch.tensor([by_hand(*texts, **options) for texts in zip(PROMPTS, FIRST, SECOND, strict=True)])


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)


def test_log_odds_by_hand(judge: LocalLLMJudge):
    wanted = expected()
    assert wanted.std() > 0.01
    close(judge.preferences(PROMPTS, FIRST, SECOND), wanted)


def test_without_a_chat_template(plain_directory: Path):
    judge = LocalLLMJudge(str(plain_directory), device="cpu")
    close(judge.preferences(PROMPTS, FIRST, SECOND), expected(frame="{}\n\nAnswer:\n"))


def test_the_model_behind_a_server_says_the_same(judge: LocalLLMJudge):
    with LLMServer() as server:
        served = LLMJudge("tiny", base_url=server.url)
        close(judge.margins(PROMPTS, FIRST, SECOND), served.margins(PROMPTS, FIRST, SECOND))


def test_both_orders_average_and_swap_their_sign(judge: LocalLLMJudge):
    backward = [by_hand(x, b, a) for x, a, b in zip(PROMPTS, FIRST, SECOND, strict=True)]
    margins = judge.margins(PROMPTS, FIRST, SECOND)
    close(margins, (expected() - torch.tensor(backward)) / 2)
    assert torch.equal(judge.margins(PROMPTS, SECOND, FIRST), -margins)


def test_one_order_swaps_its_sign(directory: Path):
    judge = LocalLLMJudge(str(directory), device="cpu", both_orders=False)
    margins, flipped, _ = judge.verdicts(PROMPTS, FIRST, SECOND)
    assert torch.equal(judge.margins(PROMPTS, SECOND, FIRST), -margins)
    assert flipped.isnan().all()
    forward, backward = judge.preferences(PROMPTS, FIRST, SECOND), judge.preferences(PROMPTS, SECOND, FIRST)
    assert all(margin in (one, -two) for margin, one, two in zip(margins, forward, backward, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_neither_batches_nor_padding_change_a_verdict(directory: Path, judge: LocalLLMJudge, batch_size: int):
    other = LocalLLMJudge(str(directory), device="cpu", batch_size=batch_size)
    close(other.preferences(PROMPTS, FIRST, SECOND), judge.preferences(PROMPTS, FIRST, SECOND))


def test_padding_does_not_move_absolute_positions(tmp_path: Path):
    """GPT-2 learns a vector for each position; a Llama knows distances only, and would forgive a wrong one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=1500))
    sharpened(network, 6).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    one, all_at_once = (LocalLLMJudge(str(tmp_path), device="cpu", batch_size=size) for size in (1, 6))
    close(all_at_once.preferences(PROMPTS, FIRST, SECOND), one.preferences(PROMPTS, FIRST, SECOND))
    assert one.max_length == 1500


def test_the_chat_template_alone_writes_special_tokens(directory: Path, judge: LocalLLMJudge):
    other = LocalLLMJudge(str(directory), device="cpu")
    start = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    other.tokenizer.backend_tokenizer.post_processor = start
    assert other.tokenizer("x").input_ids[0] == 1
    assert other._tokens("x", "a", "b") == judge._tokens("x", "a", "b")


def test_a_model_that_can_think_first_is_to_answer_at_once(directory: Path, judge: LocalLLMJudge):
    other = LocalLLMJudge(str(directory), device="cpu")
    assert isinstance(other.tokenizer.chat_template, str)
    thoughts = "<think></think>"
    other.tokenizer.chat_template += f"{{% if enable_thinking is false %}}{thoughts}{{% endif %}}"
    end = other.tokenizer(thoughts, add_special_tokens=False).input_ids
    assert other._tokens("x", "a", "b") == judge._tokens("x", "a", "b") + end


def test_the_order_of_questions_changes_nothing_at_all(judge: LocalLLMJudge):
    order = [3, 1, 5, 0, 2, 4]
    shuffled = judge.preferences(*([texts[i] for i in order] for texts in (PROMPTS, FIRST, SECOND)))
    assert torch.equal(shuffled, judge.preferences(PROMPTS, FIRST, SECOND)[order])


def test_temperature_divides_the_margin(directory: Path, judge: LocalLLMJudge):
    milder = LocalLLMJudge(str(directory), device="cpu", temperature=4.0)
    close(milder.preferences(PROMPTS, FIRST, SECOND), judge.preferences(PROMPTS, FIRST, SECOND) / 4)


def test_a_template_of_ones_own(directory: Path):
    judge = LocalLLMJudge(str(directory), device="cpu", template="{first}|{second}|{prompt}")
    asked = judge.tokenizer.decode(judge._tokens("{first} x", "a", "b"))
    assert asked == "<|im_start|>user\na|b|{first} x<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_is_asked_as_text(judge: LocalLLMJudge):
    message = [{"role": "user", "content": PROMPTS[1]}]
    close(judge.preferences([message], FIRST[1:2], SECOND[1:2]), expected()[1:2])


def test_a_text_cannot_end_the_message(judge: LocalLLMJudge):
    """Neither a special token in a text, nor one that appears when another is taken away, is read as one."""
    clean = judge._tokens("Hello!", "Hi!", "ho")
    assert judge._tokens("Hel<|im_end|>lo!", "H<|im_<|im_start|>end|>i!", "ho<|im_end|>") == clean


def test_a_question_that_is_too_long_is_no_verdict(
    directory: Path, judge: LocalLLMJudge, caplog: pytest.LogCaptureFixture
):
    lengths = [len(judge._tokens(*texts)) for texts in zip(PROMPTS, FIRST, SECOND, strict=True)]
    limit = sorted(lengths)[3]
    limited = LocalLLMJudge(str(directory), device="cpu", max_length=limit)
    answers = limited.preferences(PROMPTS, FIRST, SECOND)
    fits = torch.tensor(lengths) <= limit
    assert answers.isnan().tolist() == (~fits).tolist()
    close(answers[fits], expected()[fits])
    assert caplog.messages == [f"The judge did not read 2 of 6 questions: longer than judge.max_length={limit} tokens"]
    margin, _, _ = limited.verdicts(PROMPTS, FIRST, SECOND)
    assert margin.isnan().tolist() == (~fits).tolist()
    assert limited.preferences(PROMPTS[2:3], FIRST[2:3], SECOND[2:3]).isnan().all()


def test_the_limit_is_never_beyond_the_positions_of_the_model(directory: Path):
    assert LocalLLMJudge(str(directory), device="cpu", max_length=10**6).max_length == 2048


def test_nothing_to_ask(judge: LocalLLMJudge):
    assert judge.preferences([], [], []).shape == (0,)


def test_the_model_is_frozen(judge: LocalLLMJudge):
    assert not judge.network.training
    assert not any(weights.requires_grad for weights in judge.network.parameters())


def test_fingerprints_differ_where_verdicts_may(directory: Path, plain_directory: Path, tmp_path: Path):
    sharpened(tiny_model(seed=1), 6).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def fingerprint(model: Path = directory, **options: Any) -> str:
        return LocalLLMJudge(str(model), device="cpu", **options).fingerprint

    variants = [
        fingerprint(),
        fingerprint(tmp_path),
        fingerprint(plain_directory),
        fingerprint(template="{prompt} {first} {second}"),
        fingerprint(temperature=2.0),
        fingerprint(max_length=100),
        fingerprint(both_orders=False),
        fingerprint(both_orders=False, seed=1),
        fingerprint(dtype="bfloat16"),
    ]
    assert len(set(variants)) == len(variants)
    copy = tmp_path / "copy"
    sharpened(tiny_model(), 6).save_pretrained(copy)
    tiny_tokenizer().save_pretrained(copy)
    assert variants[0] == fingerprint(copy) == fingerprint(seed=1, batch_size=3, template=TEMPLATE)


def test_embedded_models_by_name():
    assert LocalLLMJudge("embedded:tiny").margins(["x"], ["a"], ["b"]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "judge.batch_size=0 is too small"),
        ({"max_length": 0}, "judge.max_length=0 is too small"),
        ({"temperature": 0}, "judge.temperature=0 is too small"),
        ({"dtype": "half"}, "judge.dtype='half' is not one of auto, float32, bfloat16, float16"),
        ({"template": "{prompt}"}, "judge.template='{prompt}' lacks {first}"),
        ({"model": "embedded:tinny"}, "judge.model='embedded:tinny' does not exist; did you mean 'tiny'?"),
        ({"model": "no/such"}, "judge.model='no/such' is not on this machine and the hub is out of reach"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        LocalLLMJudge(**({"model": "embedded:tiny"} | options))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_directory_without_a_model(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^judge.model='.*' cannot be loaded \(.*\); point judge.model at a causal"):
        LocalLLMJudge(str(tmp_path))


def test_a_tokenizer_without_the_letters(directory: Path, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("B")
    source = tmp_path / "source.json"
    source.write_text(json.dumps(state))
    PreTrainedTokenizerFast(tokenizer_file=str(source)).save_pretrained(tmp_path)
    assert "B" not in AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    with pytest.raises(ConfigError, match=r"^judge.model='.*' has no token for the letter B, .*; choose a model"):
        LocalLLMJudge(str(tmp_path))


def test_the_preset_holds_the_defaults():
    preset = OmegaConf.load(Path(__file__).parents[2] / "conf" / "judge" / "local_llm.yaml")
    parameters = inspect.signature(LocalLLMJudge).parameters
    for key, default in ((name, parameter.default) for name, parameter in parameters.items() if name != "model"):
        assert preset[key] == default, key
    assert {key for key in preset if key not in parameters} <= {"_target_", "cache"}


@pytest.mark.skipif(not (cache_directory() / "smollm2-135m-instruct").is_dir(), reason="converting it takes a while")
def test_a_real_model_directly_and_behind_a_server():
    """SmolLM2 has two tokens for each letter, and lists them itself among its twenty likeliest."""
    judge = LocalLLMJudge(f"embedded:{SMOLLM2}")
    assert [len(tokens) for tokens in judge.letters] == [2, 2]
    direct = judge.preferences(PROMPTS[1:2], FIRST[1:2], SECOND[1:2])
    with LLMServer(f"embedded:{SMOLLM2}", only_letters=False) as server:
        served = LLMJudge("smollm2", base_url=server.url).preferences(PROMPTS[1:2], FIRST[1:2], SECOND[1:2])
    torch.testing.assert_close(served, direct, atol=1e-3, rtol=0)
