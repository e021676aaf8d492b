"""MLflow within seconds: a server that is gone or hangs, or a locked database, does not hold anybody up.

Imports neither torch nor, before a run is tracked, MLflow: a parent process starts at once.
"""

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from xpo.config.errors import first_line
from xpo.config.secrets import no_secret

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_SQLITE = "sqlite:///"
_MAX_KEY = 250  # characters of the name of a param or metric
_REACH_S = 10.0  # how long a server may take to answer for the first time: it may have to wake up

# MLflow's client would try for minutes; a run does not lose anything by giving up early.
_SHORT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def tracking_uri(uri: str | None) -> str:
    """The tracking server or database: `uri`, $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the working directory.

    ConfigError if it holds a password.
    """
    no_secret("tracking.uri" if uri else "MLFLOW_TRACKING_URI", uri or os.environ.get("MLFLOW_TRACKING_URI"))
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if not uri.startswith(_SQLITE):
        return uri
    _, question, options = uri.partition("?")
    path = str(database(uri))
    for sign in "%?#":  # "%" first; SQLAlchemy decodes them
        path = path.replace(sign, quote(sign))
    return f"{_SQLITE}{path}{question}{options}"


def naming(option: str, uri: str) -> list[str]:
    """The words that name `uri` on a command line; none where a command goes there by itself."""
    return [] if uri == tracking_uri(None) else [option, uri]


def database(uri: str) -> Path:
    """The file of a database by its URI."""
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0])).absolute()


def is_server(uri: str) -> bool:
    """Whether a URI names a server instead of a database."""
    return uri.startswith(("http://", "https://"))


def knock(uri: str, seconds: float) -> None:
    """Finds out in `seconds` what MLflow's client would wait for: a server that is gone or hangs, a locked database.

    Raises:
        ConnectionError, sqlite3.Error: nobody answers.
    """
    if is_server(uri):
        from mlflow.exceptions import MlflowException, RestException

        # By MLflow's client, which knows the user's certificates and passwords; and not by /health, which answers
        # while the server's database is locked.
        try:
            with _environment(_SHORT | {"MLFLOW_HTTP_REQUEST_TIMEOUT": f"{seconds:.0f}"}):
                make_client(uri).get_experiment("0")
        except RestException:
            pass  # a refusal is an answer
        except MlflowException as error:
            raise ConnectionError(first_line(_first_cause(error))) from error
    elif uri.startswith(_SQLITE):
        file = f"file:{quote(str(database(uri)))}?mode=rw"
        with contextlib.closing(sqlite3.connect(file, timeout=seconds, isolation_level=None, uri=True)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def short_calls() -> Iterator[None]:
    """Within it, MLflow's HTTP client gives up after seconds, unless the environment says otherwise."""
    with _environment({name: value for name, value in _SHORT.items() if name not in os.environ}):
        yield


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


def make_client(uri: str) -> "MlflowClient":
    """A client that leaves it to its caller to speak of errors."""
    from mlflow import MlflowClient

    # mlflow.store.db logs tracebacks of what it raises, which is reported here in one line.
    for name, level in (("alembic", "WARNING"), ("mlflow", "WARNING"), ("mlflow.store.db", "CRITICAL")):
        logging.getLogger(name).setLevel(level)
    return MlflowClient(uri)


def reach(uri: str) -> "MlflowClient":
    """A client of a server or database that exists and answers; if it does not, its driver raises whatever it likes."""
    knock(uri, _REACH_S)
    return make_client(uri)


def attempt(uri: str | None, act: Callable[["MlflowClient"], object]) -> bool:
    """Does something in MLflow that nothing depends on; whether that could be done."""
    try:
        with short_calls():
            act(reach(tracking_uri(uri)))
    except Exception:  # drivers of databases raise their own
        return False
    return True


def mark_ended(uri: str | None, run_id: str, status: str) -> bool:
    """Sets a run that MLflow still calls running to KILLED or FAILED; whether MLflow was reached."""

    def act(client: "MlflowClient") -> None:
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status)

    return attempt(uri, act)


def set_tags(uri: str | None, run_ids: Iterable[str], tags: dict[str, str]) -> bool:
    """Sets tags of runs; whether MLflow took all of them."""
    from mlflow.entities import RunTag

    texts = [RunTag(key, value) for key, value in tags.items()]
    return attempt(uri, lambda client: [client.log_batch(run_id, tags=texts) for run_id in run_ids])


def held_points(client: "MlflowClient", run: "Run") -> set[tuple[str, int]]:
    """(key, step) of every point that MLflow holds of a run."""
    history = client.get_metric_history
    return {(key, point.step) for key in run.data.metrics for point in history(run.info.run_id, key)}


def _first_cause(error: BaseException) -> BaseException:
    """What an error came of in the end; MLflow tells of the whole request."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def stored_key(name: str) -> str:
    """`name` as MLflow takes it for a param or metric."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_MAX_KEY]


def metric_name(name: str) -> str:
    """MLflow's name of a Trainer log: "eval_win_rate" is eval/win_rate; the UI groups by the prefix."""
    return name.replace("eval_", "eval/", 1) if name.startswith("eval_") else name
