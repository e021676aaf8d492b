"""Prompts: where they come from, their tokens, and what happens to those that are too long."""

import gzip
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from xpo.config.compose import checked, compose
from xpo.config.errors import ConfigError, hydra_value
from xpo.config.schema import to_dict
from xpo.data.prompt_sets import EMBEDDED, collate_prompts, load_prompts, prompts_of, tokenize_prompts
from xpo.data.prompts import PromptEncoder, plain_text, render
from xpo.launch.build import build_arguments
from xpo.models.loading import tiny_tokenizer
from xpo.tracking.runs import job_key

USER = {"role": "user", "content": "Tell me of the sea"}
STARTED = {"role": "assistant", "content": "The sea is "}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, rows): a JSONL or Parquet file, and its name."""

    def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


def of(*prompts: Any) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


# ---- tokens ----------------------------------------------------------------------------------


def test_plain_text_is_tokenized_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = PromptEncoder(tokenizer)("Tell me of the sea")
    assert tokenizer.decode(ids) == "Tell me of the sea"


def test_a_conversation_goes_through_the_chat_template_up_to_the_assistants_turn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = PromptEncoder(tokenizer)([USER])
    assert tokenizer.decode(ids) == "<|im_start|>user\nTell me of the sea<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.eos_token_id) == 1  # one token, not its letters


def test_an_assistant_turn_that_was_begun_is_continued(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = PromptEncoder(tokenizer)([USER, STARTED])
    expected = "<|im_start|>user\nTell me of the sea<|im_end|>\n<|im_start|>assistant\nThe sea is "
    assert tokenizer.decode(ids) == expected


def test_a_template_that_writes_a_bos_token_does_not_get_a_second_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert PromptEncoder(tokenizer)("sea")[0] == tokenizer.bos_token_id
    assert PromptEncoder(tokenizer)([USER]).count(tokenizer.bos_token_id) == 1


def test_messages_without_a_chat_template_are_refused_with_the_remedy() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template .*; set tokenizer.chat_template"):
        PromptEncoder(tokenizer)([USER])
    assert PromptEncoder(tokenizer)("sea")


def test_a_template_gets_its_own_arguments() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking is false %} at once{% endif %}"

    def tokens(prompt: Any, **options: Any) -> str:
        return tokenizer.decode(tokenize_prompts(of(prompt), tokenizer, 64, "drop", **options)[0]["prompt_ids"])

    assert tokens([USER]) == USER["content"]
    assert tokens([USER], template_kwargs={"enable_thinking": False}) == USER["content"] + " at once"
    assert tokens("plain", template_kwargs={"enable_thinking": False}) == "plain"
    config, _, _ = compose(["+data.chat_template_kwargs.enable_thinking=false"])
    assert build_arguments(checked(config), Path("run")).chat_template_kwargs == {"enable_thinking": False}


# ---- rendering for reward models and people ----------------------------------------------------


def test_a_rendered_completion_is_the_assistants_message(tokenizer: PreTrainedTokenizerFast) -> None:
    text = render(tokenizer, [USER], "blue")
    assert text == "<|im_start|>user\nTell me of the sea<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n"
    assert render(tokenizer, "It is ", "blue") == "It is blue"


def test_a_completion_of_a_begun_turn_is_rendered_as_one_message(tokenizer: PreTrainedTokenizerFast) -> None:
    text = render(tokenizer, [USER, STARTED], "blue")
    assert text.endswith("<|im_start|>assistant\nThe sea is blue<|im_end|>\n")
    assert text.count("assistant") == 1


def test_rendering_does_not_change_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [dict(USER), dict(STARTED)]
    render(tokenizer, prompt, "blue")
    assert prompt == [USER, STARTED]


def test_plain_text_of_a_conversation_names_the_speakers() -> None:
    assert plain_text([USER]) == "Tell me of the sea"
    assert plain_text([USER, STARTED]) == "User: Tell me of the sea\n\nAssistant: The sea is "


# ---- length ----------------------------------------------------------------------------------


def test_longer_prompts_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="xpo.data.prompt_sets"):
        kept = tokenize_prompts(of("sea", "s" * 10, "s" * 11, "t" * 40), tokenizer, 10, "drop")
    assert kept["prompt"][:] == ["sea", "s" * 10]
    assert caplog.messages == ["train_dataset: dropped 2 of 4 prompts longer than 10 tokens"]


def test_nothing_is_logged_when_nothing_is_dropped(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="xpo.data.prompt_sets"):
        tokenize_prompts(of("sea"), tokenizer, 10, "drop")
    assert caplog.messages == []


def test_dropping_every_prompt_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"eval_dataset: all 2 prompts exceed .* = 3 tokens; raise max_length"):
        tokenize_prompts(of("s" * 10, "t" * 9), tokenizer, 3, "drop", key="eval_dataset")


def test_truncation_keeps_the_end_of_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    cut, whole = tokenize_prompts(of("0123456789", "abc"), tokenizer, 4, "truncate")["prompt_ids"]
    assert [tokenizer.decode(ids) for ids in (cut, whole)] == ["6789", "abc"]


def test_a_longer_prompt_can_be_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"a prompt of 10 tokens exceeds max_length - max_new_tokens = 4"):
        tokenize_prompts(of("abc", "0123456789"), tokenizer, 4, "error")
    assert len(tokenize_prompts(of("abc", "0123"), tokenizer, 4, "error")) == 2


# ---- what is in a data set ---------------------------------------------------------------------


def test_the_columns_of_the_user_stay_beside_the_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Functions that score or judge may ask for them."""
    dataset = Dataset.from_dict({"prompt": ["sea"], "topic": ["y"]})
    collated = collate_prompts([tokenize_prompts(dataset, tokenizer, 10, "drop")[0]])
    ids = tokenizer("sea").input_ids
    assert collated == {"prompt": ["sea"], "prompt_ids": [ids], "occurrence": [0], "topic": ["y"]}
    assert prompts_of(collated) == ["sea"]
    assert prompts_of(collated).known == {"topic": ["y"]}


def test_a_prompt_without_tokens_is_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer that leaves out what it does not know: nothing would stand before the completion."""
    monkeypatch.setattr(PromptEncoder, "__call__", lambda *_: [])
    with pytest.raises(ConfigError, match=r"train_dataset: prompt='海' has no tokens; leave it out"):
        tokenize_prompts(Dataset.from_dict({"prompt": ["海"]}), tokenizer, 4, "drop")


@pytest.mark.parametrize("streamed", [False, True])
def test_equal_prompts_are_numbered(tokenizer: PreTrainedTokenizerFast, streamed: bool) -> None:
    """In each pass from 0 on."""
    dataset = Dataset.from_dict({"prompt": ["sea", "sky", "sea", "far too long", "sea"]})
    tokenized = tokenize_prompts(dataset.to_iterable_dataset() if streamed else dataset, tokenizer, 4, "drop")
    for _ in range(2):
        assert [row["occurrence"] for row in tokenized] == [0, 0, 1, 2]


def test_messages_stay_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenized = tokenize_prompts(of([USER], [USER, STARTED]), tokenizer, 100, "drop")
    assert tokenized["prompt"][:] == [[USER], [USER, STARTED]]


@pytest.mark.parametrize(
    "prompt",
    ["", [], [{"role": "user"}], [{"content": "x"}], [{"role": None, "content": "x"}], 3],
    ids=["no text", "no messages", "no content", "no role", "empty role", "number"],
)
def test_a_malformed_prompt_is_refused_with_an_example(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"neither text nor a list of messages; write \{"):
        tokenize_prompts(of(prompt), tokenizer, 10, "drop")


def test_an_empty_set_and_a_missing_column_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="eval_dataset is empty"):
        tokenize_prompts(Dataset.from_dict({"prompt": []}), tokenizer, 10, "drop", key="eval_dataset")
    with pytest.raises(ConfigError, match=r"no column 'prompt' \(it has question\)"):
        tokenize_prompts(Dataset.from_dict({"question": ["x"]}), tokenizer, 10, "drop")


# ---- streams -----------------------------------------------------------------------------------


def stream(*rows: dict[str, Any]) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate)


@pytest.mark.parametrize(
    ("overflow", "kept"), [("drop", ["abc", "de"]), ("truncate", ["abc", "6789", "de"])], ids=["drop", "truncate"]
)
def test_a_stream_of_prompts_is_tokenized_like_a_set(
    tokenizer: PreTrainedTokenizerFast, overflow: str, kept: list[str]
) -> None:
    rows = [{"prompt": text} for text in ("abc", "0123456789", "de")]
    tokenized = tokenize_prompts(stream(*rows), tokenizer, 4, overflow)
    assert isinstance(tokenized, IterableDataset)
    assert [tokenizer.decode(row["prompt_ids"]) for row in tokenized] == kept
    assert [row["prompt"] for row in tokenized][-1] == "de"  # and a second time


def test_a_stream_is_not_read_before_it_is_used(tokenizer: PreTrainedTokenizerFast) -> None:
    read = []

    def generate() -> Iterator[dict[str, Any]]:
        for text in ("a", "b", "c"):
            read.append(text)
            yield {"prompt": text}

    tokenized = tokenize_prompts(IterableDataset.from_generator(generate), tokenizer, 4, "drop")
    assert read == []
    assert next(iter(tokenized))["prompt"] == "a"


def test_a_stream_without_prompts_is_refused_at_its_first_row(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"no column 'prompt' \(it has question\)"):
        list(tokenize_prompts(stream({"question": "x"}), tokenizer, 4, "drop"))


def test_a_long_prompt_of_a_stream_can_be_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="a prompt of 10 tokens"):
        list(tokenize_prompts(stream({"prompt": "0123456789"}), tokenizer, 4, "error"))


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.parquet"])
def test_a_file_gives_its_prompts(write: Callable[..., str], name: str) -> None:
    file = write(name, [{"prompt": "one", "topic": "x"}, {"prompt": "two", "topic": "y"}])
    dataset = load_prompts("data.train", file)
    assert dataset["prompt"][:] == ["one", "two"]
    assert load_prompts("data.train", file, column="topic")[:] == {"prompt": ["x", "y"]}


CSV = 'id,prompt\n1,one\n2,"two, or\nmore"\n'
JSONL = '{"id": 1, "prompt": "one"}\n{"id": 2, "prompt": "two, or\\nmore"}\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.csv", CSV),
        ("prompts.tsv", CSV.replace("id,", "id\t").replace("1,", "1\t").replace("2,", "2\t")),
        ("prompts.csv.gz", CSV),
        ("prompts.jsonl.gz", JSONL),
        ("prompts.json", JSONL),
        ("Prompts.JSONL", JSONL),
        ("prompts[1]*?.jsonl", JSONL),
        ("a b/prompts.jsonl", JSONL),
    ],
)
def test_what_a_file_is_its_ending_says(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert load_prompts("data.train", str(tmp_path / name))["prompt"][:] == ["one", "two, or\nmore"]


def test_a_pattern_stands_for_its_files(write: Callable[..., str], tmp_path: Path) -> None:
    """In the order of their names; what they hold is part of what a run computes."""
    for number in (2, 1):
        write(f"part{number}.jsonl", [{"prompt": str(number)}])
    pattern = str(tmp_path / "part*.jsonl")
    assert load_prompts("data.train", pattern)["prompt"][:] == ["1", "2"]
    config = to_dict(checked(compose(["experiment=smoke", f"data.train={hydra_value(pattern)}"])[0]))
    before = job_key(config)
    directory = config | {"data": config["data"] | {"train": str(tmp_path)}}  # all of its files
    before_of_directory = job_key(directory)
    write("part2.jsonl", [{"prompt": "another"}])
    assert job_key(config) != before
    assert job_key(directory) != before_of_directory


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.parquet"])
def test_a_file_may_hold_messages(write: Callable[..., str], name: str) -> None:
    file = write(name, [{"prompt": [USER]}, {"prompt": [USER, STARTED]}])
    assert load_prompts("data.train", file)["prompt"][:] == [[USER], [USER, STARTED]]


def test_the_column_with_the_prompts_can_be_named(write: Callable[..., str]) -> None:
    file = write("prompts.jsonl", [{"prompt": "no", "question": "yes"}])
    dataset = load_prompts("data.train", file, column="question")
    assert dataset.to_dict() == {"prompt": ["yes"]}


def test_a_missing_column_is_told_with_the_nearest_one(write: Callable[..., str]) -> None:
    file = write("prompts.jsonl", [{"prompts": "x", "id": 1}])
    with pytest.raises(ConfigError, match=r"has no column 'prompt' \(it has .*\); did you mean 'prompts'\?"):
        load_prompts("data.train", file)


def test_a_directory_gives_the_split_that_was_asked_for(write: Callable[..., str], tmp_path: Path) -> None:
    write("set/train.jsonl", [{"prompt": "learn"}])
    write("set/test.jsonl", [{"prompt": "hold out"}])
    for split, prompt in (("train", "learn"), ("test", "hold out")):
        assert load_prompts("data.train", str(tmp_path / "set"), split)["prompt"][:] == [prompt]


def test_nothing_is_left_in_the_cache_of_datasets(
    write: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each run would leave a copy of all prompts that no other finds."""
    dataset = load_prompts("data.train", write("some.jsonl", [{"prompt": "a"}, {"prompt": "a longer one"}]))
    cache = Path(dataset.cache_files[0]["filename"]).parent
    before = set(cache.iterdir())
    assert len(tokenize_prompts(dataset, tokenizer, 2, "drop")) == 1
    assert set(cache.iterdir()) == before
    assert datasets.is_caching_enabled()


def test_several_data_sets_in_a_directory_are_named(tmp_path: Path) -> None:
    """As openai/gsm8k has main and socratic."""
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "a"}\n')
    parts = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("main", "socratic"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    with pytest.raises(ConfigError) as caught:
        load_prompts("data.train", str(tmp_path))
    assert "it is several data sets, 'main', 'socratic'; name the files of one, as in data.train='" in str(caught.value)
    assert load_prompts("data.train", str(tmp_path / "main" / "*.jsonl"))["prompt"][:] == ["a"]


def test_errors_of_data_name_the_key_and_the_remedy(write: Callable[..., str], tmp_path: Path) -> None:
    write("set/train.jsonl", [{"prompt": "learn"}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{ no json")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "prompts.txt").write_text("one")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Größe"}'.encode("latin-1"))
    (tmp_path / "latin.csv").write_bytes("prompt\nGröße\n".encode("latin-1"))
    write("loud/train.JSONL", [{"prompt": "learn"}])
    nothing = tmp_path / "nothing.parquet"
    Dataset.from_dict({"prompt": []}).to_parquet(nothing)
    Dataset.from_dict({"prompt": ["x"]}).save_to_disk(tmp_path / "saved")
    for name, split, message in [
        ("missing.jsonl", "train", "does not exist; point it at a JSONL, JSON, CSV"),
        (str(tmp_path / "empty.jsonl"), "train", "is empty; give a file with one row per line"),
        (str(nothing), "train", "cannot be read as parquet: .* no data!; mend the file"),
        (str(tmp_path / "broken.jsonl"), "train", "cannot be read as jsonl: .*; mend the file"),
        (str(tmp_path / "broken.parquet"), "train", "cannot be read as parquet: .*; mend the file"),
        (str(tmp_path / "latin.jsonl"), "train", "cannot be read as jsonl: .*UTF8.*; mend the file"),
        (str(tmp_path / "latin.csv"), "train", "cannot be read as csv: .*utf-8.*; mend the file"),
        (str(tmp_path / "prompts.txt"), "train", "is not of one kind that can be read; give a JSONL, JSON, CSV"),
        (str(tmp_path / "*.*"), "train", "is not of one kind that can be read; .* or several of one kind"),
        (str(tmp_path / "loud"), "train", "holds train.JSONL; rename it"),
        (str(tmp_path / "set"), "heldout", "split 'heldout': .*; correct data.eval_split, or give a directory"),
        (str(tmp_path / "empty"), "train", "give a directory of JSONL or Parquet files"),
        (str(tmp_path / "saved"), "train", "give a directory of JSONL or Parquet files"),
        (str(tmp_path / "nowhere"), "train", "point data.eval at a"),
        ("embedded", "test", "data.eval_split='test' is not a split of 'embedded'; choose one of heldout, train"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            load_prompts("data.eval", name, split)
        assert str(caught.value).startswith("data.eval"), name
        assert "\n" not in str(caught.value), name


# ---- the embedded set --------------------------------------------------------------------------


def test_the_embedded_set_has_640_and_64_different_prompts_of_disjoint_topics() -> None:
    topics, texts = {}, {}
    for split, count in (("train", 640), ("heldout", 64)):
        rows = [json.loads(line) for line in (EMBEDDED / f"{split}.jsonl").read_text().splitlines()]
        prompts = load_prompts("data.train", "embedded", split)["prompt"][:]
        assert prompts == [row["prompt"] for row in rows]
        assert len(prompts) == count
        topics[split] = {row["topic"] for row in rows}
        texts[split] = [" ".join(plain_text(prompt).lower().split()) for prompt in prompts]
    assert len(set(texts["train"] + texts["heldout"])) == 704
    assert not topics["train"] & topics["heldout"]


def test_every_embedded_prompt_is_one_user_message(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = load_prompts("data.eval", "embedded", "heldout")
    assert {(len(p), p[0]["role"]) for p in prompts["prompt"]} == {(1, "user")}
    assert len(tokenize_prompts(prompts, tokenizer, 400, "error")) == 64
