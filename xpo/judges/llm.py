"""A language model behind an OpenAI-compatible server as judge: vLLM, llama.cpp, Ollama, OpenAI and others."""

import logging
import math
import os
import queue
import re
import string
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from scipy.special import logsumexp
from torch import Tensor

from xpo.config.checks import count, number
from xpo.config.errors import ConfigError, JudgeStopped, printable
from xpo.config.secrets import no_secret
from xpo.data.prompts import Prompt
from xpo.judges.base import asked_to_stop
from xpo.judges.pairwise import PairwiseJudge
from xpo.judges.question import TEMPLATE, check_template, question
from xpo.models.fingerprints import digest

logger = logging.getLogger(__name__)

TOP_LOGPROBS = 20  # the most that OpenAI lists
UNLISTED = -9999.0  # what OpenAI gives as the log-probability of a token that is too improbable to have one
REFUSALS = (400, 403, 413, 422)  # of one question: too long, say, or of something a gateway does not let through
IN_VAIN = 16  # questions in a row without a verdict, after which no other is expected
OURS = {"model", "messages", "logprobs", "top_logprobs", "stream", "n"}  # fields that reading an answer rests on
GRACE_S = 5.0  # for answers that are under way when a signal asks for the end
KEY_PIECE = 8  # characters of a key in a row, which nobody may see
LEAST_LEFT = 1e-6  # of the first token's probability for what is not listed
LEAST_SHARE = 0.001  # of the first token's probability that A and B have together, where it is a verdict


class Answer(NamedTuple):
    """What came of one question."""

    log_odds: float = math.nan  # that the completion shown first is better; NaN where there is a problem
    problem: str = ""  # why there are none, in one line
    heard: bool = False  # whether the server answered with a chat completion, whatever it says
    status: int | None = None  # of the HTTP response, if it is that of an error


class LLMJudge(PairwiseJudge):
    """Asks a language model which of two completions is better, A or B.

    With log-probabilities, the log-odds are those of the letters as first token of the answer: logsumexp over the
    listed tokens that read A, minus the same for B. A letter that is not listed gets the smallest listed
    log-probability, an upper bound of its own: the log-odds may be too close to 0, never too far. An answer that hardly
    ever begins with either letter is no verdict. Without, an answer that is exactly A or B counts as 1 or -1.

    A request that met a 429, a 5xx, a timeout or a lost connection is repeated, after a longer wait each time. A
    question that fails all the same, or gets any other answer, is no verdict (NaN) for its pair alone; see `failures`.

    Args:
        model: its name on the server.
        base_url: of the server, such as "http://localhost:8000/v1"; None is $OPENAI_BASE_URL, else OpenAI itself.
        api_key_env: the environment variable that holds the key. With a `base_url` it may be unset.
        both_orders, seed: see `PairwiseJudge`.
        template: the question, with {prompt}, {first} and {second}; None is `xpo.judges.question.TEMPLATE`.
        logprobs: ask for log-probabilities. A server that refuses them, or gives none, is read without.
        max_tokens: of an answer; the first of them decides where there are log-probabilities.
        temperature: divides the log-odds; larger values give milder odds. The answer is always drawn at 0.
        concurrency: requests at the same time.
        timeout_s: seconds until a silent request counts as lost, and an answer that has begun but does not end.
        max_retries: how often one request is repeated.
        max_requests: questions that the whole run may ask, shared equally by its processes; None is no limit.
        request: more fields of a request's body, also in place of max_tokens and temperature; None leaves one out.

    Raises:
        ConfigError: an argument is out of range, there is no key, or the package openai is not installed.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        both_orders: bool = True,
        seed: int = 0,
        template: str | None = None,
        logprobs: bool = True,
        max_tokens: int = 4,
        temperature: float = 1.0,
        concurrency: int = 8,
        timeout_s: float = 60,
        max_retries: int = 8,
        max_requests: int | None = None,
        request: Mapping[str, Any] | None = None,
    ):
        count("judge.max_tokens", max_tokens)
        number("judge.temperature", temperature, above=0)
        count("judge.concurrency", concurrency)
        number("judge.timeout_s", timeout_s, above=0)
        count("judge.max_retries", max_retries, minimum=0)
        if max_requests is not None:
            count("judge.max_requests", max_requests)
        request = {} if request is None else request
        if not isinstance(request, Mapping):
            raise ConfigError(f"judge.request={request!r} is not a mapping; give one such as {{top_k: 1}}")
        if ours := sorted(OURS.intersection(request)):
            raise ConfigError(f"judge.request.{ours[0]}={request[ours[0]]!r} is not free to choose; leave it out")
        if base_url is None:
            no_secret("OPENAI_BASE_URL", os.environ.get("OPENAI_BASE_URL"))
        if base_url is not None and not _is_http(base_url):
            raise ConfigError(
                f"judge.base_url={base_url!r} is no address of a server; give one such as http://localhost:8000/v1"
            )
        super().__init__(both_orders, seed)
        self.template = TEMPLATE if template is None else template
        check_template("judge.template", self.template)
        self.model = model
        self.logprobs = logprobs
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.concurrency = concurrency
        self.max_requests = max_requests
        self.request = dict(request)
        self.api_key_env = api_key_env
        self.requests = 0  # questions asked so far by this process; repetitions do not count
        self.failures = 0  # questions that brought no verdict
        self._in_vain = 0  # questions since the last call that brought a verdict
        self._logprobs_refused = False
        key = _api_key(api_key_env, required=base_url is None)
        try:
            from openai import OpenAI  # takes a second to import, which only this judge should cost

            from xpo.judges.bounded import bounded_client
        except ModuleNotFoundError as error:
            raise ConfigError(
                "LLMJudge needs the package openai, which is not installed; pip install 'xpo[llm]'"
            ) from error
        client = bounded_client(timeout_s)
        self._client = OpenAI(
            base_url=base_url, api_key=key, timeout=timeout_s, max_retries=max_retries, http_client=client
        )
        self.base_url = str(self._client.base_url)

    def preferences(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """JudgeStopped: these questions would exceed `max_requests`, and none was asked; the server refuses the key or
        does not know the model; none of the questions was answered, or none of the last 16 and more with A or B; a
        signal asked for the end of the run, and the answers that were under way did not come.
        """
        texts = [question(self.template, *row) for row in zip(prompts, first, second, strict=True)]
        if not texts:
            return torch.empty(0)
        self._spend(len(texts))
        answers = self._ask_all(texts)
        problems = [answer.problem for answer in answers if answer.problem]
        self.failures += len(problems)
        self._in_vain = self._in_vain + len(texts) if len(problems) == len(texts) else 0
        hopeless = self._in_vain >= IN_VAIN
        # A few questions may be too long: a server that refuses them is not useless for that.
        refused = all(answer.status in REFUSALS for answer in answers)
        if not any(answer.heard for answer in answers) and (hopeless or not (refused or self._lives())):
            remedy = "see to the server or to judge.request" if refused else "see to the server"
            raise JudgeStopped(
                f"judge.base_url={self.base_url!r} answered none of {len(texts)} questions "
                f"(the last: {problems[-1]}); {remedy} and continue the run"
            )
        if hopeless:
            raise JudgeStopped(
                f"judge.model={self.model!r} answered none of the last {self._in_vain} questions with A or B "
                f"(the last: {problems[-1]}); let it answer at once, without thinking aloud, or set "
                "judge.template, judge.max_tokens or judge.request"
            )
        if problems:
            logger.warning(
                "The judge gave no verdict on %d of %d questions; the last: %s", len(problems), len(texts), problems[-1]
            )
        return torch.tensor([answer.log_odds for answer in answers]) / self.temperature

    @property
    def fingerprint(self) -> str:
        asked = self.base_url, self.model, self.template, self.logprobs, self.max_tokens
        order = self.both_orders, self.both_orders or self.seed, self.temperature
        return digest("LLM", asked, order, *([sorted(self.request.items())] if self.request else []))

    def state(self) -> dict[str, Any]:
        return {"requests": self.requests}

    def load_state(self, state: dict[str, Any]) -> None:
        self.requests = state.get("requests", 0)

    def _spend(self, count: int) -> None:
        if self.max_requests is not None:
            processes = int(os.environ.get("WORLD_SIZE", 1))
            if self.requests + count > self.max_requests // processes:
                share = f" on each of {processes} processes" if processes > 1 else ""
                raise JudgeStopped(
                    f"judge.max_requests={self.max_requests} is used up: {self.requests} questions asked{share}, "
                    f"{count} more are needed; raise it and continue the run"
                )
        self.requests += count

    def _ask_all(self, texts: list[str]) -> list[Answer]:
        """The answers to all questions, `concurrency` at a time; JudgeStopped at the first that dooms the others."""
        to_ask = deque(enumerate(texts))
        answered: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()

        def work() -> None:
            with suppress(IndexError):  # none is left
                while True:
                    place, text = to_ask.popleft()
                    try:
                        answered.put((place, self._ask(text)))
                    except Exception as error:
                        answered.put((place, error))

        for _ in range(min(self.concurrency, len(texts))):
            threading.Thread(target=work, daemon=True).start()  # which a process that ends does not wait for
        answers: dict[int, Answer] = {}
        try:
            while len(answers) < len(texts):
                stopping = bool(asked_to_stop)
                try:
                    place, answer = answered.get(timeout=GRACE_S)
                except queue.Empty:
                    if stopping:
                        raise JudgeStopped(
                            f"judge.base_url={self.base_url!r} does not answer, and a signal asked for the end of the "
                            "run; continue it"
                        ) from None
                    continue
                if isinstance(answer, Exception):
                    raise answer
                answers[place] = answer
                if answer.status == 401:
                    raise JudgeStopped(
                        f"judge.api_key_env={self.api_key_env!r}: {self.base_url} refuses its key ({answer.problem}); "
                        f"correct ${self.api_key_env} and continue the run"
                    )
                if answer.status == 404:  # not 403, with which a gateway may refuse a single text
                    raise JudgeStopped(
                        f"judge.model={self.model!r} is not served at {self.base_url} ({answer.problem}); correct "
                        "judge.model, or judge.base_url, which mostly ends in /v1"
                    )
            return [answers[place] for place in range(len(texts))]
        finally:
            to_ask.clear()  # nobody waits for the rest

    def _lives(self) -> bool:
        """Whether the server answers another question: then the others failed by what they ask."""
        return self._ask("Say A.", retried=False).heard

    def _ask(self, text: str, with_logprobs: bool = True, retried: bool = True) -> Answer:
        """One question. Never raises: whatever goes wrong with it concerns its pair only."""
        from openai import APIStatusError, OpenAIError

        with_logprobs = with_logprobs and self.logprobs and not self._logprobs_refused
        fields: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": 0, **self.request}
        if with_logprobs:
            fields |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            client = self._client if retried else self._client.with_options(max_retries=0)
            response = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": text}],
                extra_body={name: value for name, value in fields.items() if value is not None},
            )
            choice = _choice(response.http_response.json())
        except APIStatusError as error:
            status, said = error.status_code, error.message
            if with_logprobs and status in (400, 403, 422) and "logprobs" in said:
                answer = self._ask(text, with_logprobs=False, retried=retried)
                # Errors may quote the texts, which may speak of logprobs: what succeeds without was refused for them.
                self._logprobs_refused |= answer.heard
                return answer
            if isinstance(error.body, dict) and "message" in error.body:
                said = error.body["message"]
            # What a server says of a refused key may repeat it, in part and so past recognition.
            problem = f"HTTP {status}" if status == 401 else f"HTTP {status}: {said}"
            return Answer(problem=self._line(problem), status=status)
        except OpenAIError as error:
            return Answer(problem=self._line(f"{error} {error.__cause__ or ''}"))
        except (ValueError, RecursionError) as error:  # from JSON that is malformed, or nested without end
            return Answer(problem=self._line(f"no chat completion: {error}"))
        try:
            return Answer(log_odds(choice, self._masked), heard=True)
        except ValueError as error:
            return Answer(problem=self._line(str(error)), heard=True)

    def _masked(self, text: str) -> str:
        """The beginning of a text without any piece of the key, in whatever case a server repeats it."""
        text, lower = text[:5000], str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
        key, said = self._client.api_key.translate(lower), text.translate(lower)
        size = min(KEY_PIECE, len(key))
        pieces = {key[i : i + size] for i in range(len(key) - size + 1)}
        hidden = {j for i in range(len(said)) if said[i : i + size] in pieces for j in range(i, i + size)}
        shown = ["" if i in hidden else char for i, char in enumerate(text)]
        for i in hidden - {i + 1 for i in hidden}:  # where a piece begins
            shown[i] = "[key]"
        return "".join(shown)

    def _line(self, text: str) -> str:
        """One short line without the key."""
        return " ".join(printable(self._masked(text)).split())[:160]


def log_odds(choice: dict[str, Any], masked: Callable[[str], str] = str) -> float:
    """Log-odds of A over B from the log-probabilities of a chat completion's choice, else from its text.

    ValueError if it names neither, or holds what no server should send; what it quotes is `masked` before it is cut.
    """
    listed = _listed(choice)
    if not listed:  # the answer must be the letter
        content = choice["message"]["content"]
        letter = re.fullmatch(r"""[\s"'`“”‘’]*([AaBb])\.?[\s"'`“”‘’]*\.?\s*""", content or "")
        if letter is None:
            shown = content and masked(content)
            shown = shown[:20] + "..." if shown and len(shown) > 20 else shown
            raise ValueError(f"the answer is {shown!r}, neither A nor B")
        return 1.0 if letter[1] in "Aa" else -1.0
    a, b = ([logprob for token, logprob in listed if token.strip() == letter] for letter in "AB")
    if not a and not b:
        raise ValueError(f"neither A nor B is among the {len(listed)} likeliest answers")
    if logsumexp([*a, *b]) < math.log(LEAST_SHARE):
        likeliest = masked(max(listed, key=lambda entry: entry[1])[0])
        raise ValueError(f"A and B have less than {LEAST_SHARE:.1%} of the probability; the likeliest is {likeliest!r}")
    if any(token.strip() not in ("A", "B") for token, _ in listed):
        bound = min(logprob for _, logprob in listed)
    else:  # a letter that is not listed has at most what the other leaves
        bound = math.log(max(1 - sum(math.exp(logprob) for _, logprob in listed), LEAST_LEFT))
    return float(logsumexp(a or [bound]) - logsumexp(b or [bound]))


def _listed(choice: dict[str, Any]) -> list[tuple[str, float]]:
    """The likeliest first tokens of an answer and their log-probabilities; none if the server gives none."""
    try:
        content = (choice.get("logprobs") or {}).get("content")
        listed = [(entry["token"], entry["logprob"]) for entry in content[0]["top_logprobs"] or []] if content else []
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError("the log-probabilities are malformed") from error
    for token, logprob in listed:
        # A sum over a vocabulary in low precision may exceed 1 a little.
        if not isinstance(token, str) or type(logprob) not in (int, float) or not logprob < 0.1:
            raise ValueError("the log-probabilities are malformed")
    return [(token, logprob) for token, logprob in listed if logprob > UNLISTED]


def _choice(body: Any) -> dict[str, Any]:
    """The one choice of a chat completion, with text or nothing as message; ValueError for any other body."""
    try:
        choice = body["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("it has no choices with a message") from error
    if not isinstance(content, str | None):
        raise ValueError("its message is not text")
    return choice


def _is_http(url: Any) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):
        return False


def _api_key(variable: str, required: bool) -> str:
    """The key in an environment variable; without one, a word that servers without keys accept. Never shows a key."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):  # it may well be the key itself
        raise ConfigError(
            "judge.api_key_env is not shown and no name of an environment variable; "
            "give the NAME of the variable that holds the key, in capitals, such as OPENAI_API_KEY"
        )
    key = os.environ.get(variable, "").strip()
    if not key and required:
        raise ConfigError(
            f"judge.api_key_env={variable!r} is not set in the environment; export {variable}=... with your key, "
            "or point judge.base_url at a server of your own"
        )
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"judge.api_key_env={variable!r} holds characters that no key has; export {variable} again")
    return key or "no-key"
