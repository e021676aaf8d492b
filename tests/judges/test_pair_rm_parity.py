"""PairRM against the original package, llm-blender 0.0.2, on a tiny random checkpoint."""

import importlib.util
import logging
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pair_rm_checkpoint import build_tiny_pair_rm
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from xpo.config.errors import ConfigError
from xpo.judges.pair_rm import PairRMJudge

# Not importorskip: without the patches of xpo.judges.llm_blender_shim, the import fails on transformers 5.
if importlib.util.find_spec("llm_blender") is None:
    pytest.skip("needs llm-blender: pip install 'xpo[pairrm-parity]'", allow_module_level=True)

ORDINARY = [
    ("What is the capital of France?", "Paris.", "The capital of France is Paris. " * 5),
    ("Tell a story. " * 12, "Once upon a time there was a robot. " * 7, "No."),
    ("hello!", "hi!", "f**k off!"),
    ("I love you!", "I hate you!", "I love you, too!"),
    ("2 + 2 = ?", "4", "The sum of 2 and 2 is 4,\nas everybody knows.\n\n- so\n- there"),
    ("x " * 100, "y", "z"),
]
ODD = {
    "empty prompt": ("", "a", "b"),
    "empty completion": ("hi", "", "robot"),
    "only spaces": ("   ", " \n\t ", "robot"),
    "spaces around": ("  hi  there ", " a  b ", "\ta\nb\r\n"),
    "no-break space": ("a\u00a0b", "Paris\u00a0\u00a0is", "\u202fParis\u2009is\u3000here"),
    "full-width": ("ＷＨＡＴ？", "４", "ｆｏｕｒ，　ｏｒ　ｓｏ"),
    "ligatures and fractions": ("½ + ½", "ﬁve ﬂies", "Ⅳ ㎏ ™ ²"),
    "ellipsis and quotes": ("Well…", "“No…”", "‘Yes’ – — ‥"),
    "zero width": ("a\u200bb", "ro\u200dbot\ufeff", "ro\u00adbot\u2060"),
    "control characters": ("a\x00b\x01", "\x07robot\x1b[0m", "ro\x7fbot\x85"),
    "emoji": ("🤖?", "😀 robot 👩‍👩‍👧‍👦", "🏳️‍🌈 ✌🏽 robot"),
    "right to left": ("שלום עולם", "مرحبا \u202eabc\u202c", "\u200fרובוט\u200e"),
    "combining": ("e\u0301t\u00e9", "Zalgo H\u0321\u0345e\u0337", "A\u030a \u212b"),
    "combining at the start": ("\u0338hi", "\u0301a", "\u20dda"),
    "hangul and kana": ("한국 \u1112\u1161\u11ab", "カﾞ ｶﾞ", "が"),
    "unknown characters": ("漢字", "𝓇𝑜𝒷𝑜𝓉", "ሰላም ⵣ ∑∂"),
    "unpaired newlines": ("\u2028a\u2029", "a\vb\fc", "a\u0085b"),
    "markers": ("<|source|>hi", "a<|candidate1|>b", "<|candidate2|><|candidate|>robot"),
    "only a marker": ("<|source|>", "<|candidate|>", "robot"),
    "nested markers": ("hi", "<|sou<|source|>rce|>", "<|candi<|candi<|source|>date1|>date2|>robot"),
    "look-alike markers": ("＜｜ｓｏｕｒｃｅ｜＞ hi", "a ＜|candidate1|＞ b", "<\u200b|source|\u200b>robot"),
    "halves of markers": ("<|source|", "|>a<|", "candidate1|>"),
    "special tokens": ("[CLS] hi [MASK]", "a [PAD] b", "[UNK] robot"),
    "separators": ("a[SEP]b", "[SEP]", "ro[S[SEP]EP]bot [SE<|source|>P]"),
    "look-alike separator": ("［ＳＥＰ］", "a［ＳＥＰ］b", "robot [sep]"),
}
LONG = {  # around the limits of 1224 tokens for the prompt, 412 and more for each completion
    "all": ("the dog sleeps " * 500, "Paris is the capital " * 300, "a robot paints " * 300),
    "one completion": ("hello!", "Once upon a time " * 400, "No."),
    "room left by the prompt": ("the dog sleeps " * 60, "robot " * 900, "Yes."),
    "one word": ("a", "b" * 1500, "c"),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    # Words in the path by which the original takes a tokenizer for another model's.
    directory = tmp_path_factory.mktemp("sophia") / "llama-alpaca"
    return dict(zip(("hf", "ranker"), build_tiny_pair_rm(directory), strict=True))


@pytest.fixture(scope="module")
def native(layouts: dict[str, Path]) -> PairRMJudge:
    return PairRMJudge(str(layouts["hf"]), device="cpu")


@pytest.fixture(scope="module", params=["hf", "ranker"])
def original(layouts: dict[str, Path], request: pytest.FixtureRequest) -> PairRMJudge:
    return PairRMJudge(str(layouts[request.param]), device="cpu", backend="llm_blender")


@pytest.fixture(scope="module")
def ranker(layouts: dict[str, Path]) -> PairRMJudge:
    """The original's Blender."""
    return PairRMJudge(str(layouts["ranker"]), device="cpu", backend="llm_blender")


def logits(judge: PairRMJudge, *pairs: tuple[str, str, str]) -> Tensor:
    """Of the order given; log-odds are twice the logits."""
    return judge.preferences(*map(list, zip(*pairs, strict=True))) / 2


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def swapped(pairs: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(x, b, a) for x, a, b in pairs]


def test_ordinary_texts_in_both_orders(native: PairRMJudge, original: PairRMJudge) -> None:
    for pairs in (ORDINARY, swapped(ORDINARY)):
        expected = logits(original, *pairs)
        assert expected.std() > 0.1  # the checkpoint tells the texts apart
        close(logits(native, *pairs), expected)


@pytest.mark.parametrize("name", ODD)
def test_odd_texts(native: PairRMJudge, original: PairRMJudge, name: str) -> None:
    pairs = [ODD[name], *swapped([ODD[name]])]
    close(logits(native, *pairs), logits(original, *pairs))


def test_both_layouts_of_native(layouts: dict[str, Path], native: PairRMJudge, original: PairRMJudge) -> None:
    pairs = [*ORDINARY, ODD["full-width"]]
    other = PairRMJudge(str(layouts["ranker"]), device="cpu")
    assert torch.equal(logits(other, *pairs), logits(native, *pairs))
    close(logits(other, *pairs), logits(original, *pairs))


@pytest.mark.parametrize("name", LONG)
def test_long_texts(native: PairRMJudge, original: PairRMJudge, name: str) -> None:
    close(logits(native, LONG[name]), logits(original, LONG[name]))


def test_margins_of_any_batch_size(native: PairRMJudge, original: PairRMJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [list(column) for column in zip(*ORDINARY, *list(ODD.values())[::2], strict=True)]
    row_by_row = original.margins(*columns)
    for batch_size in (1, 7, 64):
        monkeypatch.setattr(original, "batch_size", batch_size)
        monkeypatch.setattr(native, "batch_size", batch_size)
        close(original.margins(*columns), row_by_row)
        close(native.margins(*columns), row_by_row)


def test_the_original_cuts_to_the_longest_prompt_of_its_batch(native: PairRMJudge, ranker: PairRMJudge) -> None:
    """PairRMJudge gives it such pairs alone, so that they are cut pair by pair as by the native judge."""
    pairs = [("the dog sleeps " * 500, "Yes.", "No."), ("hi", "Yes. " * 200 + "robot", "a")]
    assert ranker.batch_size > 2
    close(logits(ranker, *pairs), logits(native, *pairs))
    as_one_batch = ranker.original.logits(*map(list, zip(*pairs, strict=True)))
    assert (as_one_batch - logits(native, *pairs))[1].abs() > 1e-3


def test_one_order(layouts: dict[str, Path]) -> None:
    """The same coin for both."""
    columns = [list(column) for column in zip(*ORDINARY, *ODD.values(), strict=True)]
    options = {"both_orders": False, "seed": 3, "temperature": 0.7, "device": "cpu"}
    expected = PairRMJudge(str(layouts["ranker"]), backend="llm_blender", **options).margins(*columns)
    close(PairRMJudge(str(layouts["ranker"]), **options).margins(*columns), expected)


def test_ties_and_no_pairs(original: PairRMJudge) -> None:
    assert logits(original, ("hi", "Paris.", "Paris."), ("hi", "", "<|source|>")).tolist() == [0, 0]
    assert original.margins([], [], []).shape == (0,)


def test_conversational_prompts(native: PairRMJudge, original: PairRMJudge) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello!"}]
    close(original.margins([turns], ["a"], ["robot"]), native.margins([turns], ["a"], ["robot"]))


def test_fingerprints_name_the_backend(native: PairRMJudge, original: PairRMJudge) -> None:
    assert original.fingerprint != native.fingerprint


# What the patches repair.


def test_p1_the_constant_is_there_for_the_import_only(ranker: PairRMJudge) -> None:
    assert "llm_blender" in sys.modules
    with pytest.raises(ImportError):
        from transformers.utils.hub import TRANSFORMERS_CACHE  # noqa: F401


def test_p2_the_package_tokenises_with_what_is_gone(ranker: PairRMJudge) -> None:
    collator = unpatched("llm_blender.pair_ranker.collator")
    with pytest.raises(AttributeError, match="batch_encode_plus"):
        collator.encode_texts(["hi"], ranker.original.blender.ranker_tokenizer, 8)


def test_p3_the_backbone_would_be_half_precision(layouts: dict[str, Path], ranker: PairRMJudge) -> None:
    backbone = layouts["ranker"].parent / "backbone"
    assert AutoModel.from_pretrained(backbone).dtype == torch.float16
    assert {weight.dtype for weight in ranker.network.parameters()} == {torch.float32}


def test_p4_without_the_normaliser_odd_characters_differ(
    layouts: dict[str, Path], native: PairRMJudge, ranker: PairRMJudge
) -> None:
    tokenizer = ranker.original.blender.ranker_tokenizer.backend_tokenizer
    repaired = tokenizer.normalizer
    unpatched = AutoTokenizer.from_pretrained(layouts["ranker"].parent / "backbone").backend_tokenizer.normalizer
    tokenizer.normalizer = unpatched
    try:
        for name in ("full-width", "ellipsis and quotes", "zero width", "control characters"):
            assert (logits(ranker, ODD[name]) - logits(native, ODD[name])).abs() > 1e-3, name
    finally:
        tokenizer.normalizer = repaired


def unpatched(name: str) -> ModuleType:
    """A fresh copy of a module."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# As a part of a run.


def test_quiet_and_without_a_trace(
    layouts: dict[str, Path], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    random, handlers = torch.get_rng_state(), list(logging.getLogger().handlers)
    for directory in layouts.values():
        judge = PairRMJudge(str(directory), device="cpu", backend="llm_blender")
        judge.margins(["robot " * 600], ["Yes."], ["No."])
        assert not judge.network.training
        assert not any(weight.requires_grad for weight in judge.network.parameters())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET


def test_without_the_package(layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_blender", None)
    with pytest.raises(ConfigError, match=r"judge.backend='llm_blender'.*pip install 'xpo\[pairrm-parity\]'"):
        PairRMJudge(str(layouts["hf"]), device="cpu", backend="llm_blender")


@pytest.mark.parametrize("layout", ["hf", "ranker"])
def test_weights_that_do_not_fit(layouts: dict[str, Path], tmp_path: Path, layout: str) -> None:
    copy = tmp_path / layout
    shutil.copytree(layouts[layout], copy)
    weights = copy / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match=r"judge.model=.*model.safetensors does not fit") as caught:
        PairRMJudge(str(copy), device="cpu", backend="llm_blender")
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"judge.model=.*has no model.safetensors"):
        PairRMJudge(str(copy), device="cpu", backend="llm_blender")


def test_half_precision(layouts: dict[str, Path], native: PairRMJudge) -> None:
    expected = logits(native, *ORDINARY)
    for layout, dtype in (("hf", "bfloat16"), ("hf", "float16"), ("ranker", "float16")):
        half = PairRMJudge(str(layouts[layout]), device="cpu", backend="llm_blender", dtype=dtype)
        torch.testing.assert_close(logits(half, *ORDINARY), expected, atol=0.1, rtol=0.1)
    with pytest.raises(ConfigError, match=r"judge.dtype='bfloat16' does not run with judge.backend='llm_blender'"):
        PairRMJudge(str(layouts["ranker"]), device="cpu", backend="llm_blender", dtype="bfloat16")
