"""The link of a sweep opens, in a real browser, the charts of its runs. No network; needs Debian's chromium."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_run import MLflowRun
from xpo.tracking.mlflow_ui import chart_link, save_view

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BROWSER is None or BASH is None, reason="no chromium here: apt install chromium")

WAIT_S = 120  # until a page counts as broken; on two busy cores it takes half a minute
SWEEP, OTHER = ("a1e-5 b0.1", "a1e-5 b0.2", "a1e-6 b0.1"), ("r16 s1", "r16 s2")
# A metric of each section: lines over the steps; FINAL has one value, and gets bars.
CHARTS = {
    "eval": "eval/vader",
    "loss": "loss/dpo",
    "objective": "objective/kl",
    "rewards": "rewards/margins",
    "final": "final/score",
    "Model metrics": "grad_norm",  # those without a prefix
}
FINAL = CHARTS["final"]
COURSES = [metric for metric in CHARTS.values() if metric != FINAL]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An `mlflow server` on an empty database."""
    directory = tmp_path_factory.mktemp("server")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--artifacts-destination", f"{directory}/a"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + WAIT_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail((directory / "log").read_text())
                time.sleep(0.1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Browser:
    """Headless chromium, spoken to in its DevTools protocol: JSON and a zero byte, on descriptors 3 and 4."""

    def __init__(self, profile: Path):
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        # Tall, as charts are drawn when they come into view.
        flags += ["--window-size=1400,3200", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            [str(BASH), "-c", f'exec "$0" "$@" 3<&{commands} 4>&{answers}', str(BROWSER), *flags],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(answers)
        self._number, self._buffer = 0, b""

    def open(self, url: str) -> None:
        """Begins to load a page."""
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def text(self) -> str:
        """What a reader of the page sees now."""
        expression = "document.body ? document.body.innerText : ''"
        return self._call("Runtime.evaluate", self._session, expression=expression)["result"]["value"]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        call = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(call).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                chunk = os.read(self._read, 1 << 20)
                assert chunk, "the browser has ended"
                self._buffer += chunk
            message, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self._number:  # the others are events
                assert "result" in answer, answer
                return answer["result"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def log_run(uri: str, name: str, sweep: str, height: float) -> str:
    """A finished run with three evaluations; the id of its experiment."""
    run = MLflowRun(uri, "xpo", name, {"loss.alpha": height}, {"xpo.sweep": sweep}, MetricsLog(Path(mkdtemp())))
    for step in (0, 2, 4):
        run.log.append(dict.fromkeys(COURSES, height + step) | {"step": step})
    run.log.append({FINAL: height, "step": 0})
    run.finish()
    return run.experiment_id


def missing(text: str) -> list[str]:
    """What the charts of the sweep should show and do not show."""
    expected = [f"{name} ({key})" for name in SWEEP for key in COURSES]  # the legend of a drawn chart
    lacking = [words for words in expected if words not in text]
    for section, metric in CHARTS.items():  # a section's title, how many charts it holds, the title of its chart
        if not re.search(rf"^{section}\s*\([1-9]\d*\)\s*Add chart\s*{metric}$", text, re.MULTILINE):
            lacking.append(f"section {section} with {metric}")
    return lacking


def test_the_link_of_a_sweep_shows_the_charts_of_its_runs_and_no_others(server: str, browser: Browser) -> None:
    """Without a click, in a profile that has never seen MLflow."""
    for i, name in enumerate(SWEEP):
        experiment = log_run(server, name, "first & best", i / 10)
    for name in OTHER:
        log_run(server, name, "second", 1.0)
    browser.open(chart_link(server, experiment, "first & best"))
    until = time.monotonic() + WAIT_S
    while missing(text := browser.text()) and time.monotonic() < until:
        time.sleep(1)
    assert not missing(text), text
    assert f"{len(SWEEP)} matching runs" in text
    assert not [name for name in OTHER if name in text]


def test_the_saved_view_of_a_sweep_begins_with_the_charts_that_compare_its_runs(server: str, browser: Browser) -> None:
    """All of its runs: without a view the UI draws ten. The best one comes first, though it began first."""
    names = [f"a{i}" for i in range(12, 0, -1)]
    for i, name in enumerate(names):
        run = MLflowRun(server, "views", name, {"loss.beta": i}, {"xpo.sweep": "twelve"}, MetricsLog(Path(mkdtemp())))
        run.log.append({"eval/win_rate": 0.5, "eval/kl": 1.0, "completions/length": 8.0, "step": 1})
        run.log.append({"final/win_rate": 0.9 - i / 100, "final/kl": 1.0 + i, "step": 0})
        run.finish()
    view = save_view(server, run.experiment_id, "twelve", ["loss.beta"])
    browser.open(chart_link(server, run.experiment_id, "twelve", view))
    expected = ["final/kl vs. final/win_rate", "Parallel Coordinates"]
    expected += [f"{name} ({metric})" for name in names for metric in ("eval/win_rate", "eval/kl")]
    until = time.monotonic() + WAIT_S
    while not all(words in (text := browser.text()) for words in expected) and time.monotonic() < until:
        time.sleep(1)
    assert [words for words in expected if words not in text] == [], text
    listed = text[: text.index("12 matching runs")].splitlines()
    assert [line for line in listed if line in names] == names
    sections = re.findall(r"^(.+)\s*\(\d+\)\s*Add chart$", text, re.MULTILINE)
    assert sections[0].strip() == "Sweep"
