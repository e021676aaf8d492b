"""What is said in a conversation, and what is said of it."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from xpo.config.errors import ConfigError
from xpo.config.options import GenerationOptions, PreferenceOptions
from xpo.data.pairs import Pair, load_pairs
from xpo.data.prompts import PromptEncoder
from xpo.evaluation.conversation import POLICY, REFERENCE, Conversation, Turn
from xpo.judges import FunctionJudge
from xpo.judges.labelling import Labeller
from xpo.models.loading import tiny_model, tiny_tokenizer
from xpo.rewards import FunctionReward


def talking(
    policy: LlamaForCausalLM | None = None,
    reference: LlamaForCausalLM | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    margin: float | None = None,
    **options: Any,
) -> Conversation:
    """A conversation of tiny models; a judge says `margin` of every pair, which scores 2 and 2."""
    tokenizer = tokenizer or tiny_tokenizer()
    models = {POLICY: policy or tiny_model(1), REFERENCE: reference or tiny_model(0)}
    judge = FunctionJudge(lambda prompts, first, second: [margin] * len(prompts))
    reward = FunctionReward(lambda prompts, completions: [2.0] * len(prompts))
    drawn = GenerationOptions(**{"max_new_tokens": 8, "temperature": 1.0} | options)
    return Conversation(
        models={name: partial(nullcontext, model) for name, model in models.items()},
        tokenizer=tokenizer,
        encode=PromptEncoder(tokenizer),
        options=drawn,
        ends=[0],
        extra={},
        labeller=Labeller(judge, reward, PreferenceOptions()),
        device=torch.device("cpu"),
        plain=tokenizer.chat_template is None,
        seed=3,
    )


def silent(name: str, text: str) -> None:
    pass


def texts(turn: Turn) -> list[str]:
    return [answer.texts[0] for answer in turn.answers.values()]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# ---- answers -----------------------------------------------------------------------------------


def test_at_temperature_0_each_says_what_its_model_generates() -> None:
    models = {POLICY: tiny_model(1), REFERENCE: tiny_model(0)}
    conversation = talking(*models.values(), temperature=0.0)
    turn = conversation.answer("Hello", silent)
    ids = torch.tensor([conversation.encode([says("user", "Hello")])])
    for name, model in models.items():
        generated = model.eval().generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert turn.answers[name].texts == [conversation.tokenizer.decode(generated, skip_special_tokens=True)]


def test_what_is_streamed_is_the_answer() -> None:
    heard = {POLICY: "", REFERENCE: ""}

    def say(name: str, text: str) -> None:
        assert not (name == POLICY and heard[REFERENCE])  # one after the other
        heard[name] += text

    assert texts(talking().answer("Hello", say)) == list(heard.values())


def test_equal_models_say_the_same_as_their_noise_is_the_same() -> None:
    first, second = texts(talking(tiny_model(0), tiny_model(0)).answer("Hello", silent))
    assert first == second


def test_after_reset_the_seed_decides() -> None:
    conversation = talking()
    first = texts(conversation.answer("Hello", silent))
    later = texts(conversation.answer("Hello", silent))
    conversation.reset()
    assert texts(conversation.answer("Hello", silent)) == first != later
    conversation.reset()
    conversation.seed = 4
    assert texts(conversation.answer("Hello", silent)) != first


def test_all_see_what_the_policy_said_before() -> None:
    conversation = talking()
    conversation.set_system("Be brief.")
    said, _ = texts(conversation.answer("Hello", silent))
    before = [says("system", "Be brief."), says("user", "Hello"), says("assistant", said)]
    assert conversation.answer("And?", silent).prompt == [*before, says("user", "And?")]
    conversation.reset()
    assert conversation.answer("And?", silent).prompt == [says("system", "Be brief."), says("user", "And?")]


def test_without_a_template_each_message_is_a_prompt_as_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    conversation = talking(tokenizer=tokenizer)
    conversation.answer("The sea", silent)
    assert conversation.answer("The weather", silent).prompt == "The weather"
    with pytest.raises(ConfigError, match="/system needs a chat template"):
        conversation.set_system("Be brief.")


@pytest.mark.parametrize(("model", "max_length"), [(30, 512), (2048, 30)], ids=["of the model", "max_length"])
def test_a_conversation_that_is_too_long_is_refused_and_not_remembered(model: int, max_length: int) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = model
    conversation = talking(tokenizer=tokenizer, max_length=max_length)
    count = len(conversation.encode([says("user", "a" * 30)]))
    with pytest.raises(ConfigError, match=f"has {count} tokens, .*max_new_tokens=8 the model takes 30; /reset begins"):
        conversation.answer("a" * 30, silent)
    assert conversation.history == []


@pytest.mark.parametrize("who", [POLICY, REFERENCE])
def test_ctrl_c_leaves_what_the_policy_has_said(who: str) -> None:
    conversation, heard = talking(), []

    def say(name: str, text: str) -> None:
        if name == who and text:
            heard.append(text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Hello", say)
    whole = texts(talking().answer("Hello", silent))[0]
    said = heard[0] if who == POLICY else whole
    assert conversation.history == [says("user", "Hello"), says("assistant", said)]
    assert whole.startswith(said)


# ---- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "winner"), [(1.5, "first"), (-1.5, "second"), (0.0, "tie"), (None, None)], ids=["+", "-", "0", "none"]
)
def test_a_saved_pair_is_what_the_judges_command_reads(
    tmp_path: Path, margin: float | None, winner: str | None
) -> None:
    conversation = talking(margin=margin)
    turn = conversation.answer("Hello", silent)
    verdict = conversation.judge(turn)
    assert verdict is not None
    assert (verdict.winner, verdict.scores) == (winner, [2.0, 2.0])
    row = conversation.row(turn, verdict)
    assert (row["margin"], row["by"]) == (margin, ["policy", "reference"])
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(row) + "\n")
    expected = {"first": 1.0, "second": -1.0}.get(str(winner), 0.0)
    assert load_pairs(str(file)) == [Pair([says("user", "Hello")], *texts(turn), expected)]


def test_the_same_answer_twice_is_a_tie() -> None:
    conversation = talking(tiny_model(0), tiny_model(0), margin=1.5)
    verdict = conversation.judge(conversation.answer("Hello", silent))
    assert verdict is not None
    assert (verdict.winner, verdict.margin) == ("tie", 0.0)


def test_one_answer_is_neither_judged_nor_saved() -> None:
    conversation = talking(margin=1.5)
    del conversation.models[REFERENCE]
    turn = conversation.answer("Hello", silent)
    assert conversation.judge(turn) is None
    with pytest.raises(ConfigError, match="there is no pair to save"):
        conversation.row(turn, None)
