"""An OpenAI-compatible server around a real small model, which fails where it is told to.

    python tests/llm_server.py --port 8000 --faults 3:429,7:reset,10-12:500,*5:malformed

The faults, by the number of the request, from 1:

    429             too many requests, with Retry-After
    500 401 403 404 that status; a 401 shows the beginning of the key, a 403 all of it
    400             refuses the question, quoting it
    endless         an answer of spaces, one after the other
    hang            no answer for `hang_s` seconds
    malformed       status 200, but the JSON breaks off
    html            status 200 with a web page
    half_closed     headers and part of the body, then the connection ends
    reset           the connection is reset before an answer
    no_choices      a chat completion without choices
    wrong_types     choices of the wrong type
    wrong_content   a message that is a list, without log-probabilities
    no_logprobs     an answer without log-probabilities
    refuse_logprobs 400 if log-probabilities are asked for
    thinks_first    400 for max_tokens or a temperature, 403 for log-probabilities
    say=TEXT        that answer, without log-probabilities
"""

import argparse
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel

from xpo.config.options import ModelOptions
from xpo.models.loading import load_model, load_tokenizer, policy_directory

THINKS_FIRST = {"max_tokens": "refuse_max_tokens", "temperature": "refuse_temperature", "logprobs": "forbid_logprobs"}
REFUSALS = {"refuse_logprobs": 400, "refuse_max_tokens": 400, "refuse_temperature": 400, "forbid_logprobs": 403}

Body = dict[str, Any]
Faults = Callable[[int, str], str | None]  # of the number of the request and the question


def sharpened(network: PreTrainedModel, factor: float) -> PreTrainedModel:
    """The model with larger weights: what a tiny random one says next then depends on all of the text."""
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(factor if weights.dim() == 2 else 1)
    return network


def no_faults(number: int, question: str) -> str | None:
    return None


class LLMServer:
    """Serves POST /v1/chat/completions on 127.0.0.1, once started; may be stopped and started again.

    Args:
        model: "embedded:tiny" (random weights), "embedded:smollm2_135m", or a directory.
        faults: what goes wrong with a request, if anything.
        port: 0 takes a free one, and keeps it from then on.
        only_letters: answers are A or B, and both are always among the tokens listed, with their true
            log-probabilities: a tiny random model would say neither. False: whatever the model says.
        hang_s: how long a "hang" lasts.
        delay_s: what each answer takes at least.
    """

    def __init__(
        self,
        model: str = "embedded:tiny",
        faults: Faults = no_faults,
        port: int = 0,
        only_letters: bool = True,
        hang_s: float = 30,
        delay_s: float = 0,
    ):
        schema = ModelOptions(name=model)
        directory = policy_directory(model, None)
        self.network = sharpened(load_model(directory, schema).eval(), 6 if model == "embedded:tiny" else 1)
        self.tokenizer = load_tokenizer(directory, schema)
        self.name = model
        self.faults = faults
        self.port = port
        self.only_letters = only_letters
        self.hang_s = hang_s
        self.delay_s = delay_s
        self.requests: list[Body] = []  # the bodies of all requests so far
        self.keys: list[str] = []  # what they were authorized with
        self.busiest = 0  # most requests at the same time
        self._busy = 0
        self._lock = threading.Lock()
        self._http: _HTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> "LLMServer":
        self._http = _HTTPServer(("127.0.0.1", self.port), self)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stops listening, and drops the connections that are open."""
        if self._http is not None:
            self._http.stopping.set()
            self._http.shutdown()
            self._http.server_close()
            self._http.drop_connections()
            self._http = None

    def __enter__(self) -> "LLMServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def enter(self, body: Body, authorization: str) -> str | None:
        """Notes a request; the fault that it meets."""
        with self._lock:
            self.requests.append(body)
            self.keys.append(authorization.removeprefix("Bearer "))
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
            return self.faults(len(self.requests), body["messages"][-1]["content"])

    def leave(self) -> None:
        with self._lock:
            self._busy -= 1

    @torch.no_grad()
    def logprobs(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """Log-probabilities of the first token of the answer, (V,)."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with self._lock:
            return self.network(input_ids=ids).logits[0, -1].float().log_softmax(dim=-1)

    def choice(self, body: Body) -> Body:
        """What the model answers, in one token."""
        logprobs = self.logprobs(body["messages"])
        letters = [self.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB"]
        listed = logprobs.topk(body.get("top_logprobs", 0)).indices.tolist()
        if self.only_letters and listed:
            listed = [*[token for token in listed if token not in letters][:-2], *letters]
        best = max(letters, key=lambda token: logprobs[token]) if self.only_letters else int(logprobs.argmax())
        entries = [
            {"token": self.tokenizer.decode([token]), "logprob": logprobs[token].item(), "bytes": None}
            for token in [best, *listed]
        ]
        content = [{**entries[0], "top_logprobs": entries[1:]}]
        return {
            "index": 0,
            "message": {"role": "assistant", "content": entries[0]["token"]},
            "finish_reason": "length",
            "logprobs": {"content": content} if body.get("logprobs") else None,
        }


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], llm: LLMServer):
        self.llm = llm
        self.stopping = threading.Event()
        self.open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def drop_connections(self) -> None:
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed already

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    server: _HTTPServer

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        llm = self.server.llm
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = llm.enter(body, self.headers.get("Authorization", ""))
        try:
            self.server.stopping.wait(llm.delay_s)
            if self.path != "/v1/chat/completions":
                fault = "404"
            if fault == "refuse_logprobs" and not body.get("logprobs"):
                fault = None
            if fault == "thinks_first":
                fault = next((refusal for field, refusal in THINKS_FIRST.items() if field in body), None)
            self._answer(body, fault)
        finally:
            llm.leave()

    def _answer(self, body: Body, fault: str | None) -> None:
        llm = self.server.llm
        reason = self._reason(body, fault)
        if reason:
            status = REFUSALS.get(fault or "") or int(fault or 0)
            data = json.dumps({"error": {"message": reason, "code": fault}}).encode()
            self._send(status, data, "application/json")
            return
        if fault == "hang":
            self.server.stopping.wait(llm.hang_s)
            self.close_connection = True
            return
        if fault == "reset":
            # With no time to linger, closing resets the connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            os.close(self.connection.detach())
            return
        if fault == "endless":
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the client has gone
                while not self.server.stopping.wait(0.05):
                    self.wfile.write(b" ")
            return
        if fault == "html":
            self._send(200, b"<html>Welcome to our proxy</html>", "text/html")
            return
        choice: Any = llm.choice(body)
        if fault == "no_logprobs":
            choice["logprobs"] = None
        elif fault is not None and fault.startswith("say="):
            choice |= {"logprobs": None, "message": {"role": "assistant", "content": fault.removeprefix("say=")}}
        elif fault == "wrong_content":
            choice |= {"logprobs": None, "message": {"role": "assistant", "content": ["A"]}}
        choices: Any = [choice]
        if fault == "no_choices":
            choices = []
        elif fault == "wrong_types":
            choices = {"0": "A"}
        number = len(llm.requests)
        completion = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": 0, "model": llm.name}
        data = json.dumps({**completion, "choices": choices}).encode()
        if fault == "malformed":
            data = data[: len(data) // 2]
        if fault == "half_closed":
            self._send(200, data[: len(data) // 2], "application/json", claimed=len(data))
            self.close_connection = True
            return
        self._send(200, data, "application/json")

    def _reason(self, body: Body, fault: str | None) -> str:
        """What an error says; "" where there is none."""
        key = self.server.llm.keys[-1]
        reasons = {
            "400": f"This is too long: {body['messages'][-1]['content']}",
            "401": f"Incorrect key: {key[:8]}***",
            "403": f"The key {key} may not use this model",
            "404": f"The model {body['model']} does not exist",
            "429": "Slow down",
            "500": "Out of memory",
            "refuse_logprobs": f"{'.' * 300} Unsupported parameter: logprobs",
            "refuse_max_tokens": "Use 'max_completion_tokens' instead of 'max_tokens' with this model",
            "forbid_logprobs": "This key may not request logprobs from this model",
            "refuse_temperature": "Only the default 'temperature' is supported",
        }
        return reasons.get(fault or "", "")

    def _send(self, status: int, data: bytes, kind: str, claimed: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if claimed is None else claimed))
        if status == 429:
            self.send_header("Retry-After", "0.05")
        self.end_headers()
        self.wfile.write(data)


def parse_faults(text: str) -> Faults:
    """Faults by number: "3:500" the third request, "5-8:hang" a range, "*4:reset" each fourth, "*:429" all."""
    rules: list[tuple[Callable[[int], bool], str]] = []
    for part in text.split(",") if text else []:
        where, _, fault = part.partition(":")
        if where.startswith("*"):
            step = int(where[1:] or 1)
            rules.append((lambda number, step=step: number % step == 0, fault))
        else:
            low, _, high = where.partition("-")
            rules.append((lambda number, low=int(low), high=int(high or low): low <= number <= high, fault))

    def faults(number: int, question: str) -> str | None:
        return next((fault for applies, fault in rules if applies(number)), None)

    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: a free one, which is printed")
    parser.add_argument("--model", default="embedded:tiny", help="embedded:tiny, embedded:smollm2_135m or a directory")
    parser.add_argument("--faults", default="", help="such as 3:429,10-12:500,*5:malformed")
    parser.add_argument("--any-answer", action="store_true", help="not only A and B")
    parser.add_argument("--hang-s", type=float, default=30)
    parser.add_argument("--delay-s", type=float, default=0)
    options = parser.parse_args()
    server = LLMServer(
        options.model,
        parse_faults(options.faults),
        options.port,
        only_letters=not options.any_answer,
        hang_s=options.hang_s,
        delay_s=options.delay_s,
    )
    with server:
        print(f"{server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
