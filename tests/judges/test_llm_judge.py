"""The judge behind a server, over real HTTP: a tiny real model answers, and fails in every way it is told to."""

import inspect
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_server import Faults, LLMServer, no_faults, parse_faults
from omegaconf import OmegaConf
from torch import Tensor

from xpo.config.compose import CONF, checked, compose
from xpo.config.errors import ConfigError, JudgeStopped
from xpo.judges import bounded, llm
from xpo.judges.llm import LLMJudge, log_odds
from xpo.judges.question import TEMPLATE, check_template, question
from xpo.launch.groups import build_group

PROMPTS = ["Hello!", "What is the capital of France?", "Tell a story.", "2 + 2 = ?", "", "A or B?"]
FIRST = ["Hi!", "Paris.", "Once upon a time there was a robot.", "4", "a", "B"]
SECOND = ["Go away", "The capital is Rome", "No", "five", "", "answer A"]
MANY = (PROMPTS * 3, FIRST * 3, SECOND * 3)
KEY = "sk-s3cret/of+the=house"

FAULTS = ["400", "429", "500", "hang", "malformed", "html", "half_closed", "reset", "no_choices", "wrong_types"]
ODD_ANSWERS = ["wrong_content", "say=C", "say=banana", "say=", "say=A or B", "say=A is better", "say=AB"]


@pytest.fixture(scope="module")
def running() -> Iterator[LLMServer]:
    with LLMServer() as server:
        yield server


@pytest.fixture
def server(running: LLMServer) -> Iterator[LLMServer]:
    """A server without faults, which a test may give some."""
    yield running
    running.faults, running.delay_s, running.busiest = no_faults, 0, 0
    running.requests.clear()
    running.keys.clear()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, and a client that hardly waits before it tries again."""
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)


def judge_at(server: LLMServer, **options: Any) -> LLMJudge:
    return LLMJudge(**({"model": "m", "base_url": server.url, "timeout_s": 5, "max_retries": 2} | options))


@cache
def by_hand(server: LLMServer, prompt: str, a: str, b: str) -> float:
    """Log-odds of the letters as next token, from the model itself: log p(A) - log p(B) = logit(A) - logit(B)."""
    text = TEMPLATE.replace("{prompt}", prompt).replace("{first}", a).replace("{second}", b)
    text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = server.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = server.network(input_ids=ids).logits[0, -1]
    letter_a, letter_b = server.tokenizer.convert_tokens_to_ids(["A", "B"])
    return (logits[letter_a] - logits[letter_b]).item()


def expected(server: LLMServer) -> Tensor:
    return torch.tensor([by_hand(server, *texts) for texts in zip(PROMPTS, FIRST, SECOND, strict=True)])


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)


def one_question(fault: str, marker: str) -> Faults:
    """The fault for each request whose question holds the marker."""
    return lambda number, question: fault if marker in question else None


# What it says when all is well


def test_log_odds_are_those_of_the_model_by_hand(server: LLMServer):
    wanted = expected(server)
    assert wanted.std() > 0.01  # the model does read the texts
    close(judge_at(server).preferences(PROMPTS, FIRST, SECOND), wanted)


def test_margin_is_the_mean_of_both_orders_and_swaps_its_sign(server: LLMServer):
    judge = judge_at(server)
    backward = [by_hand(server, x, b, a) for x, a, b in zip(PROMPTS, FIRST, SECOND, strict=True)]
    margin, flipped, _ = judge.verdicts(PROMPTS, FIRST, SECOND)
    close(margin, (expected(server) - torch.tensor(backward)) / 2)
    assert set(flipped.tolist()) <= {0.0, 1.0}
    close(judge.margins(PROMPTS, SECOND, FIRST), -margin)


def test_one_order_asks_half_and_swaps_its_sign(server: LLMServer):
    judge = judge_at(server, both_orders=False)
    margins = judge.margins(PROMPTS, FIRST, SECOND)
    assert len(server.requests) == len(PROMPTS) == judge.requests
    close(judge.margins(PROMPTS, SECOND, FIRST), -margins)
    shown = judge_at(server, both_orders=False, seed=1).margins(PROMPTS, FIRST, SECOND)
    assert not torch.allclose(shown, margins, atol=1e-4)


def test_temperature_divides_the_margin(server: LLMServer):
    close(judge_at(server, temperature=4.0).preferences(PROMPTS, FIRST, SECOND), expected(server) / 4)


def test_a_conversation_is_asked_as_text(server: LLMServer):
    message = [{"role": "user", "content": PROMPTS[1]}]
    close(judge_at(server).preferences([message], FIRST[1:2], SECOND[1:2]), expected(server)[1:2])
    longer = [{"role": "system", "content": "Be kind."}, *message]
    judge_at(server).preferences([longer], FIRST[1:2], SECOND[1:2])
    assert "System: Be kind.\n\nUser: What is" in server.requests[-1]["messages"][0]["content"]


def test_what_is_sent(server: LLMServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    judge_at(server, template="{first}|{second}|{prompt}").preferences(["x"], ["a"], ["b"])
    assert server.keys == [KEY]
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "a|b|x"}],
            "max_tokens": 4,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ]


def test_nothing_to_ask(server: LLMServer):
    assert judge_at(server).preferences([], [], []).shape == (0,)
    assert judge_at(server).margins(["x"], ["same"], ["same"]).tolist() == [0.0]
    assert server.requests == []


# How an answer is read


def listing(*tokens: tuple[Any, Any], text: Any = "A") -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    return {"message": {"content": text}, "logprobs": {"content": [{"token": "A", "top_logprobs": top}]}}


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        ([("A", -0.5), ("B", -2.0)], 1.5),
        ([("B", -0.5), ("x", -1.0), ("A", -2.0)], -1.5),
        # p(A) = 0.2 + 0.3, p(B) = 0.25: log 2
        ([("A", math.log(0.2)), (" A", math.log(0.3)), ("B\n", math.log(0.25)), ("a", -0.1)], math.log(2)),
        ([("A", -0.5), ("x", -3.0), ("y", -4.0)], 3.5),  # p(B) is at most that of y
        ([("x", -0.5), ("B", -1.0), ("y", -4.0)], -3.0),
        ([("A", -0.5), ("x", -3.0), ("B", -9999.0)], 2.5),  # OpenAI: too improbable to have a number
        ([("A", -0.5), ("x", -3.0), ("B", -math.inf)], 2.5),
        ([("A", 0), ("B", -1)], 1.0),
        # p(B) is at most what A leaves, if nothing else is listed: .75 / .25, and 1 / 1e-6 at the most
        ([("A", math.log(0.75))], math.log(3)),
        ([(" B", math.log(0.5)), ("B", math.log(0.25))], -math.log(3)),
        ([("A", 0.0), ("B", -9999.0), ("x", -9999.0)], math.log(1e6)),
    ],
)
def test_log_odds_of_listed_tokens(tokens: list[tuple[str, float]], value: float):
    assert log_odds(listing(*tokens)) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    "choice",
    [
        listing(("x", -0.5), ("a", -1.0)),  # neither letter; the text does not count then
        listing(("<think>", -0.001), ("A", -17.0), ("B", -18.0)),  # noise
        listing(("A", math.nan), ("B", -1.0)),
        listing(("A", 3.0), ("B", -1.0)),
        listing(("A", "0"), ("B", -1.0)),
        listing(("A", True), ("B", -1.0)),
        listing((None, -0.5), ("B", -1.0)),
        {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": {"A": -0.1}}]}},
        {"message": {"content": "A"}, "logprobs": {"content": 5}},
        {"message": {"content": "A"}, "logprobs": [1]},
        {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A"}]}},
    ],
)
def test_strange_log_probabilities_are_no_verdict(choice: dict[str, Any]):
    with pytest.raises(ValueError, match=r"malformed|neither A nor B|less than 0.1% .* the likeliest is '<think>'"):
        log_odds(choice)


NO_LOGPROBS: list[dict[str, Any]] = [{}, {"logprobs": None}, {"logprobs": {}}, {"logprobs": {"content": None}}]


@pytest.mark.parametrize("rest", [*NO_LOGPROBS, {"logprobs": {"content": [{"token": "A", "top_logprobs": []}]}}])
@pytest.mark.parametrize("text", ["A", " a", "A.", "'A'", '"A".', '"A."', "“a”", "\nA \n"])
def test_without_log_probabilities_the_letter_is_the_verdict(text: str, rest: dict[str, Any]):
    assert log_odds({"message": {"content": text}, **rest}) == 1.0
    assert log_odds({"message": {"content": text.replace("A", "B").replace("a", "b")}, **rest}) == -1.0


@pytest.mark.parametrize("text", ["", None, "C", "banana", "AB", "A B", "A or B", "A is better", "А"])
def test_any_other_answer_is_no_verdict(text: str | None):
    with pytest.raises(ValueError, match="neither A nor B"):
        log_odds({"message": {"content": text}})


def test_a_server_without_log_probabilities(server: LLMServer):
    server.faults = lambda number, question: "no_logprobs"
    assert torch.equal(judge_at(server).preferences(PROMPTS, FIRST, SECOND), expected(server).sign())
    server.faults = no_faults
    assert torch.equal(judge_at(server, logprobs=False).preferences(PROMPTS, FIRST, SECOND), expected(server).sign())
    assert "logprobs" not in server.requests[-1]


def test_a_refusal_of_log_probabilities_is_remembered(server: LLMServer):
    server.faults = lambda number, question: "refuse_logprobs"
    judge = judge_at(server, concurrency=2)
    assert torch.equal(judge.preferences(PROMPTS, FIRST, SECOND), expected(server).sign())
    assert sum("logprobs" in body for body in server.requests) <= 2
    server.requests.clear()
    judge.preferences(PROMPTS, FIRST, SECOND)
    assert not any("logprobs" in body for body in server.requests)
    assert judge.state() == {"requests": 2 * len(PROMPTS)}
    assert judge.failures == 0


def test_a_model_that_thinks_before_it_answers(server: LLMServer):
    server.faults = lambda number, question: "thinks_first"
    with pytest.raises(JudgeStopped, match=r"'max_completion_tokens' instead .* see to the server or to judge.request"):
        judge_at(server).preferences(*MANY)
    server.requests.clear()
    request = {"max_tokens": None, "temperature": None, "max_completion_tokens": 2048, "reasoning_effort": "low"}
    judge = judge_at(server, request=request, concurrency=1)
    assert torch.equal(judge.preferences(PROMPTS, FIRST, SECOND), expected(server).sign())
    fields = set(server.requests[-1])
    assert fields == {"model", "messages", "max_completion_tokens", "reasoning_effort"}
    assert sum("logprobs" in body for body in server.requests) == 1
    assert judge.failures == 0


def test_fields_of_a_request_from_a_configuration(server: LLMServer):
    request = {"chat_template_kwargs": {"enable_thinking": False}, "stop": ["\n"], "max_tokens": 1}
    build_group(
        {"_target_": "xpo.judges.LLMJudge", "model": "m", "base_url": server.url, "request": request}
    ).preferences(PROMPTS[:1], FIRST[:1], SECOND[:1])
    assert server.requests[-1].items() >= request.items()


def test_the_examples_of_the_preset_can_be_given():
    examples = re.findall(r"'(judge\.request=.+)'", (CONF / "judge" / "llm.yaml").read_text())
    assert len(examples) == 2
    for example in examples:
        config, _, _ = compose(["judge=llm", "judge.model=m", example])
        checked(config)
        assert set(config.judge.request) & {"max_completion_tokens", "chat_template_kwargs"}


def test_an_error_that_quotes_the_word_logprobs_is_no_refusal(server: LLMServer):
    server.faults = one_question("400", "of logprobs")
    judge = judge_at(server)
    answers = judge.preferences(["Speak of logprobs", *PROMPTS], ["a", *FIRST], ["b", *SECOND])
    assert answers[0].isnan()
    close(answers[1:], expected(server))
    close(judge.preferences(PROMPTS, FIRST, SECOND), expected(server))


# Where something fails


@pytest.mark.parametrize("fault", FAULTS + ODD_ANSWERS)
def test_a_question_that_fails_is_no_verdict_and_harms_no_other(
    server: LLMServer, caplog: pytest.LogCaptureFixture, fault: str
):
    server.faults = one_question(fault, PROMPTS[2])
    server.hang_s = 1
    judge = judge_at(server, max_retries=1, timeout_s=0.4)
    answers = judge.preferences(PROMPTS, FIRST, SECOND)
    wanted = expected(server)
    wanted[2] = torch.nan
    torch.testing.assert_close(answers, wanted, atol=1e-4, rtol=0, equal_nan=True)
    assert judge.failures == 1
    (message,) = [record.getMessage() for record in caplog.records if record.name == "xpo.judges.llm"]
    assert message.startswith("The judge gave no verdict on 1 of 6 questions; the last: ")
    assert "\n" not in message
    assert len(message) < 260

    margin, flipped, _ = judge.verdicts(PROMPTS, FIRST, SECOND)
    assert margin.isnan().tolist() == flipped.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("fault", ["500", "hang", "reset"])
def test_a_question_that_fails_alone_does_not_stop_the_run(server: LLMServer, fault: str):
    """As after a resume, when a cache has the others of its step: the server answers another."""
    judge = judge_at(server, max_retries=0, timeout_s=0.4)
    server.faults = one_question(fault, PROMPTS[2])
    server.hang_s = 1
    assert judge.preferences(PROMPTS[2:3], FIRST[2:3], SECOND[2:3]).isnan().all()
    assert judge.requests == 1


def test_whether_a_server_lives_is_asked_once(server: LLMServer):
    """Also where it refuses log-probabilities first."""
    server.faults = lambda number, _: "refuse_logprobs" if number in (1, 5) else "500"
    with pytest.raises(JudgeStopped, match="answered none of 1 questions"):
        judge_at(server, max_retries=2).preferences(PROMPTS[:1], FIRST[:1], SECOND[:1])
    assert ["logprobs" in body for body in server.requests] == [True, False, False, False, True, False]


def test_one_failed_order_spoils_the_pair(server: LLMServer):
    server.faults = one_question("500", f"<answer_A>\n{FIRST[1]}")
    margin, flipped, _ = judge_at(server, max_retries=0).verdicts(PROMPTS, FIRST, SECOND)
    assert margin.isnan().tolist() == flipped.isnan().tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("fault", ["429", "500", "reset", "half_closed", "hang"])
def test_a_fault_that_passes_costs_nothing_but_time(server: LLMServer, fault: str):
    server.faults = parse_faults(f"2-4:{fault}")
    judge = judge_at(server, timeout_s=0.4, max_retries=3)
    close(judge.preferences(PROMPTS, FIRST, SECOND), expected(server))
    assert len(server.requests) == len(PROMPTS) + 3
    assert judge.state() == {"requests": len(PROMPTS)}  # tries that are repeated are no questions


def test_a_storm_of_faults_never_gives_a_wrong_verdict(server: LLMServer):
    storm = ["429", None, "500", "malformed", None, "reset", "no_choices", None, "half_closed", "say=C", "html"]
    server.faults = lambda number, question: storm[number % len(storm)]
    judge, wanted, found = judge_at(server, max_retries=1), expected(server), 0
    for _ in range(6):
        answers = judge.preferences(PROMPTS, FIRST, SECOND)
        there = answers.isfinite()
        close(answers[there], wanted[there])
        found += int(there.sum())
    assert 0 < found == judge.requests - judge.failures < judge.requests


def test_a_restart_of_the_server_is_survived():
    # The third question waits for an answer until the server stops, and never gets one.
    with LLMServer(faults=lambda number, question: "hang" if number == 3 else None) as server:
        judge = judge_at(server, concurrency=2, max_retries=40)

        def restart() -> None:
            while len(server.requests) < 3:
                time.sleep(0.01)
            server.stop()
            time.sleep(0.3)
            server.start()

        thread = threading.Thread(target=restart)
        thread.start()
        close(judge.preferences(PROMPTS, FIRST, SECOND), expected(server))
        thread.join()
        assert len(server.requests) > len(PROMPTS)  # the third was asked again
        assert judge.requests == len(PROMPTS)


def test_a_server_that_is_gone_stops_the_run():
    with LLMServer() as server:
        judge = judge_at(server, max_retries=1)
        judge.preferences(PROMPTS, FIRST, SECOND)
    with pytest.raises(JudgeStopped) as stopped:
        judge.preferences(PROMPTS, FIRST, SECOND)
    message = str(stopped.value)
    assert message.startswith(f"judge.base_url='{server.url}/' answered none of 6 questions (the last: Connection ")
    assert "refused" in message
    assert message.endswith("see to the server and continue the run")
    assert "\n" not in message


@pytest.mark.parametrize("fault", ["429", "500", "hang", "malformed", "html", "no_choices", "reset"])
def test_a_server_that_only_fails_stops_the_run(server: LLMServer, fault: str):
    server.faults = lambda number, question: fault
    server.hang_s = 1
    with pytest.raises(JudgeStopped, match=r"answered none of 6 questions"):
        judge_at(server, max_retries=0, timeout_s=0.4).preferences(PROMPTS, FIRST, SECOND)


@pytest.mark.parametrize("fault", ["400", "403"])
def test_many_refused_questions_stop_the_run(server: LLMServer, fault: str):
    """A few may be too long: the only ones of a call whose other verdicts a cache had, say."""
    server.faults = lambda number, question: fault
    with pytest.raises(JudgeStopped, match=rf"of 18 questions \(the last: HTTP {fault}: .*; see to the server or to"):
        judge_at(server).preferences(*MANY)
    judge = judge_at(server)
    for _ in range(2):
        assert judge.preferences(PROMPTS, FIRST, SECOND).isnan().all()
    with pytest.raises(JudgeStopped):
        judge.preferences(PROMPTS, FIRST, SECOND)


@pytest.mark.parametrize(
    ("fault", "key", "remedy"),
    [
        ("401", "judge.api_key_env='MY_KEY'", "correct $MY_KEY"),
        ("404", "judge.model='m'", "correct judge.model, or judge.base_url, which mostly ends in /v1"),
    ],
)
def test_what_concerns_all_questions_stops_at_once(
    server: LLMServer, monkeypatch: pytest.MonkeyPatch, fault: str, key: str, remedy: str
):
    monkeypatch.setenv("MY_KEY", KEY)
    server.faults = parse_faults(f"3-99:{fault}")
    server.delay_s = 0.05
    judge = judge_at(server, api_key_env="MY_KEY", concurrency=2)
    with pytest.raises(JudgeStopped) as stopped:
        judge.preferences(PROMPTS * 8, FIRST * 8, SECOND * 8)
    assert str(stopped.value).startswith(key)
    assert f"(HTTP {fault}" in str(stopped.value)
    assert remedy in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert len(server.requests) < 8
    assert stopped.value.__cause__ is None is stopped.value.__context__


def test_a_server_that_forbids_one_text_costs_its_pair_only(server: LLMServer):
    """As gateways do that moderate."""
    judge = judge_at(server)
    server.faults = one_question("403", SECOND[1])
    for _ in range(4):
        assert judge.preferences(PROMPTS, FIRST, SECOND).isnan().nonzero().flatten().tolist() == [1]
        assert judge.preferences(PROMPTS[1:2], FIRST[1:2], SECOND[1:2]).isnan().all()


def test_a_model_that_never_says_a_or_b_stops_the_run(server: LLMServer):
    """A thinking model, say: the whole run would train without a verdict."""
    judge = judge_at(server)
    server.faults = lambda number, question: "say=Let me think"
    assert judge.preferences(PROMPTS, FIRST, SECOND).isnan().all()  # it may be the texts
    with pytest.raises(JudgeStopped, match=r"none of the last 24 questions with A or B .*without thinking aloud"):
        judge.preferences(*MANY)


def test_a_wrong_path_is_told_from_a_wrong_key(server: LLMServer):
    with pytest.raises(JudgeStopped, match="which mostly ends in /v1"):
        judge_at(server, base_url=server.url.removesuffix("/v1")).preferences(PROMPTS, FIRST, SECOND)


# The key


def test_the_key_is_never_shown(
    server: LLMServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    judge = judge_at(server, max_retries=1)
    told = [repr(judge), str(vars(judge)), judge.fingerprint, str(judge.state())]
    server.faults = parse_faults("1:500,2:429,3:reset,4:malformed")
    judge.preferences(PROMPTS, FIRST, SECOND)
    for fault in ("401", "403", "404", "500"):  # this server repeats the key, or a part of it
        server.faults = lambda number, question, fault=fault: fault
        with pytest.raises(JudgeStopped) as stopped:
            judge.preferences(["x"] * 16, ["a"] * 16, ["b"] * 16)
        told.append(str(stopped.value))
    assert server.keys[-1] == KEY
    assert "The key [key] may not use this model" in told[-3]
    assert "HTTP Request: POST" in caplog.text  # the client has logged all it can
    assert KEY[:8] not in "".join([*told, caplog.text, *capfd.readouterr()])


@pytest.mark.parametrize("said", [KEY, KEY.swapcase(), KEY[3:], f"{KEY[:12]} {KEY[12:]}", f"é\x1b[2J{KEY.upper()}" * 9])
def test_no_piece_of_the_key_is_shown(
    server: LLMServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, said: str
):
    """Of eight characters, in any case, whatever the text is cut to afterwards; nor what a terminal would obey."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = judge_at(server)
    server.faults = one_question(f"say={said}", PROMPTS[0])
    judge.preferences(PROMPTS, FIRST, SECOND)
    assert "the answer is" in caplog.text
    assert "\x1b" not in caplog.text
    shown = caplog.text.lower()
    assert not [i for i in range(len(KEY) - 7) if KEY[i : i + 8].lower() in shown]


# Servers that do not come to an end


@pytest.mark.parametrize(("fault", "said"), [("endless", "timed out"), (f"say={'x' * 5000}", "Connection error")])
def test_an_answer_without_end_is_none(
    server: LLMServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str, said: str
):
    """Neither in time nor in size; each piece of it comes soon enough."""
    monkeypatch.setattr(bounded, "MOST_BYTES", 4000)
    server.faults = one_question(fault, PROMPTS[0])
    begun = time.monotonic()
    answers = judge_at(server, timeout_s=0.5, max_retries=1).preferences(PROMPTS, FIRST, SECOND)
    assert time.monotonic() - begun < 5
    assert answers.isnan().tolist() == [True, *[False] * (len(PROMPTS) - 1)]
    assert said in caplog.text


def test_a_signal_ends_the_wait_for_answers(monkeypatch: pytest.MonkeyPatch):
    """With a checkpoint of the last step: the answers may take until the job is killed."""
    monkeypatch.setattr(llm, "GRACE_S", 0.1)
    monkeypatch.setattr(llm, "asked_to_stop", [15])
    with LLMServer(faults=lambda number, question: "endless") as server, pytest.raises(JudgeStopped, match="a signal"):
        judge_at(server, timeout_s=60).preferences(PROMPTS, FIRST, SECOND)


def test_no_request_is_announced_at_the_level_of_a_run(server: LLMServer, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    server.faults = parse_faults("1:429,2:500")
    judge_at(server).preferences(PROMPTS, FIRST, SECOND)
    assert caplog.messages == []


def test_without_a_key():
    with pytest.raises(ConfigError, match=r"^judge.api_key_env='OPENAI_API_KEY' is not set .*; export OPENAI_API_KEY"):
        LLMJudge("m")


def test_a_server_of_ones_own_needs_no_key(server: LLMServer):
    judge_at(server).preferences(["x"], ["a"], ["b"])
    assert server.keys == ["no-key"]


@pytest.mark.parametrize("mistaken", [KEY, "hf_abcdefg", ""])
def test_the_key_in_place_of_its_name_is_not_shown(mistaken: str):
    with pytest.raises(ConfigError, match=r"^judge.api_key_env is not shown and no name") as error:
        LLMJudge("m", api_key_env=mistaken)
    assert not mistaken or mistaken not in str(error.value)


def test_a_key_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-two\nlines")
    with pytest.raises(ConfigError, match="holds characters that no key has") as error:
        LLMJudge("m")
    assert "sk-two" not in str(error.value)


# Budget, state, concurrency


def test_the_budget_is_for_the_whole_run(server: LLMServer):
    judge = judge_at(server, max_requests=20)
    judge.margins(PROMPTS, FIRST, SECOND)
    assert judge.state() == {"requests": 12}
    with pytest.raises(JudgeStopped) as stopped:
        judge.margins(PROMPTS, FIRST, SECOND)
    assert str(stopped.value) == (
        "judge.max_requests=20 is used up: 12 questions asked, 12 more are needed; raise it and continue the run"
    )
    assert len(server.requests) == 12  # nothing asked that could not be paid
    assert judge.margins(PROMPTS[:4], FIRST[:4], SECOND[:4]).isfinite().all()  # what is left can be spent

    resumed = judge_at(server, max_requests=32)
    resumed.load_state(judge.state())
    assert resumed.state() == {"requests": 20}
    resumed.margins(PROMPTS, FIRST, SECOND)
    with pytest.raises(JudgeStopped, match="32 questions asked, 2 more are needed"):
        resumed.margins(["x"], ["a"], ["b"])


def test_processes_share_the_budget(server: LLMServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    judge = judge_at(server, max_requests=51)
    judge.margins(PROMPTS, FIRST, SECOND)
    with pytest.raises(JudgeStopped, match=r"=51 is used up: 12 questions asked on each of 4 processes, 2 more"):
        judge.margins(["x"], ["a"], ["b"])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_the_same_time_than_allowed(server: LLMServer, concurrency: int):
    server.delay_s = 0.05
    judge_at(server, concurrency=concurrency).margins(PROMPTS, FIRST, SECOND)
    assert server.busiest == concurrency


# Settings


def test_fingerprints_differ_where_verdicts_may(server: LLMServer, monkeypatch: pytest.MonkeyPatch):
    base = {"model": "m", "base_url": "http://localhost:1/v1"}
    variants: list[dict[str, Any]] = [
        {},
        {"model": "n"},
        {"base_url": "http://localhost:2/v1"},
        {"template": "{prompt} {first} {second}"},
        {"logprobs": False},
        {"max_tokens": 1},
        {"request": {"reasoning_effort": "low"}},
        {"temperature": 2.0},
        {"both_orders": False},
        {"both_orders": False, "seed": 1},
    ]
    prints = [LLMJudge(**(base | variant)).fingerprint for variant in variants]
    assert len(set(prints)) == len(variants)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    same: list[dict[str, Any]] = [
        {"seed": 1},
        {"concurrency": 1, "timeout_s": 1, "max_retries": 0, "max_requests": 5},
        {"template": TEMPLATE},
    ]
    assert {LLMJudge(**(base | variant)).fingerprint for variant in same} == {prints[0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "judge.concurrency=0 is too small"),
        ({"timeout_s": 0}, "judge.timeout_s=0 is too small"),
        ({"max_retries": -1}, "judge.max_retries=-1 is too small"),
        ({"max_requests": 0}, "judge.max_requests=0 is too small"),
        ({"request": {"top_k": 1, "n": 2}}, "judge.request.n=2 is not free to choose"),
        ({"request": "top_k"}, "judge.request='top_k' is not a mapping"),
        ({"max_tokens": 0}, "judge.max_tokens=0 is too small"),
        ({"temperature": 0}, "judge.temperature=0 is too small"),
        ({"timeout_s": "long"}, "judge.timeout_s='long' is not a number"),
        ({"base_url": "localhost:8000"}, "judge.base_url='localhost:8000' is no address of a server"),
        ({"base_url": "http://[::1/v1"}, "judge.base_url='http://[::1/v1' is no address"),
        ({"base_url": "http://host:port/v1"}, "judge.base_url='http://host:port/v1' is no address"),
        ({"base_url": 8000}, "judge.base_url=8000 is no address"),
        ({"template": "{prompt} {first}"}, "judge.template='{prompt} {first}' lacks {second}"),
        ({"template": 3}, "judge.template=3 is not text"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        LLMJudge(**({"model": "m", "base_url": "http://localhost:1/v1"} | options))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"LLMJudge needs the package openai.*; pip install 'xpo\[llm\]'"):
        LLMJudge("m", base_url="http://localhost:1/v1")


def test_the_preset_holds_the_defaults():
    preset = OmegaConf.load(Path(__file__).parents[2] / "conf" / "judge" / "llm.yaml")
    parameters = inspect.signature(LLMJudge).parameters
    for key, default in ((name, parameter.default) for name, parameter in parameters.items() if name != "model"):
        assert preset[key] == default, key
    assert {key for key in preset if key not in parameters} <= {"_target_", "cache"}
    assert OmegaConf.is_missing(preset, "model")


# The question


def test_texts_cannot_reach_the_template():
    texts = ("{first} {", "{second} {{prompt}} {0}", r"{prompt} \1 \g<0> %s {}")
    asked = question("[{prompt}][{first}][{second}][{prompt}]", *texts)
    assert asked == f"[{texts[0]}][{texts[1]}][{texts[2]}][{texts[0]}]"


def test_the_default_template_is_a_good_one():
    check_template("judge.template", TEMPLATE)
    assert TEMPLATE.index("{prompt}") < TEMPLATE.index("{first}") < TEMPLATE.index("{second}")
    assert "exactly one letter, A or B" in TEMPLATE


def test_braces_around_anything_but_a_word_are_text():
    template = '{"request": "{prompt}", "a": "{first}", "b": "{second}"} { x } {1.5}'
    check_template("judge.template", template)
    assert question(template, "p", "f", "s") == '{"request": "p", "a": "f", "b": "s"} { x } {1.5}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{promt} {first} {second}", "has an unknown placeholder {promt}; did you mean 'prompt'?; use {prompt}, "),
        ("{prompt} {first} {second} {}", "has an unknown placeholder {}; use {prompt}, {first} and {second} only"),
        ("{prompt} {second}", "lacks {first}; put it where that text belongs"),
        ("Which\nis better? " * 50, "lacks {prompt}; put it where"),
    ],
)
def test_wrong_templates(template: str, message: str):
    with pytest.raises(ConfigError) as error:
        check_template("judge.template", template)
    assert str(error.value).startswith(f"judge.template={template!r}"[:60])
    assert message in str(error.value)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


# The server of these tests, by itself


def test_the_server_in_a_process_of_its_own(server: LLMServer):
    script = Path(__file__).parents[1] / "llm_server.py"
    command = [sys.executable, str(script), "--port", "0", "--faults", "2:500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            judge = LLMJudge("m", base_url=process.stdout.readline().strip())
            close(judge.preferences(PROMPTS, FIRST, SECOND), expected(server))
        finally:
            process.kill()


def test_faults_by_number():
    faults = parse_faults("3:500,5-6:hang,*10:say=C")
    assert [faults(number, "") for number in (1, 3, 5, 6, 7, 10, 20)] == [
        None, "500", "hang", "hang", None, "say=C", "say=C",
    ]  # fmt: skip
    assert parse_faults("")(1, "") is None
