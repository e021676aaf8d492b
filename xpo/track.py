"""`python -m xpo.track replay [RUN_DIR ...]`: sends to MLflow what runs could not while it was out of reach.

Without RUN_DIR, of every run under outputs/ and multirun/. A point that MLflow holds already is not sent again.
Exit status 1 if something could not be sent, which is kept; 2 for bad input.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from xpo.config.errors import ConfigError, first_line, printable
from xpo.config.secrets import no_secret
from xpo.launch.command import exit_status, speak_to_any_console
from xpo.tracking.metrics_log import MetricsLog
from xpo.tracking.mlflow_client import held_points, naming, reach, tracking_uri
from xpo.tracking.mlflow_follower import Followed, Follower, in_words
from xpo.tracking.runs import ROOTS


class NotSent(Exception):
    """MLflow still lacks something of a run: why."""


def main() -> None:
    """The command line."""
    speak_to_any_console()
    parser = argparse.ArgumentParser(prog="python -m xpo.track", description=__doc__)
    parser.add_argument("command", choices=["replay"])
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="run directories; default: all")
    parser.add_argument(
        "--uri", help="where MLflow is now, and the runs in it ($MLFLOW_TRACKING_URI, else ./mlflow.db)"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a server that goes away ends this in seconds
    status = 0
    run_dirs = options.run_dirs or sorted(path.parent for root in ROOTS for path in root.rglob("mlflow.json"))
    try:
        no_secret("--uri", options.uri)
    except ConfigError as error:
        sys.exit(exit_status(error))
    lacking = []
    for run_dir in run_dirs:
        try:
            lacking += [run_dir] if lacks(run_dir) else []
        except ConfigError as error:
            if options.run_dirs:
                sys.exit(exit_status(error))
            status = exit_status(error)  # the others are sent
    if not lacking and not status:
        print(f"nothing to send of {' '.join(map(str, options.run_dirs)) or 'runs under outputs or multirun'}")
    for run_dir in lacking:
        try:
            print(f"{run_dir}: {replay(run_dir, options.uri)}", flush=True)
        except NotSent as error:
            status = 1
            print(printable(f"{run_dir}: {error}"), file=sys.stderr, flush=True)
    sys.exit(status)


def lacks(run_dir: Path) -> bool:
    """Whether MLflow may lack something of a run; ConfigError if it is not tracked, or its files cannot be read."""
    if not (run_dir / "mlflow.json").exists():
        raise ConfigError(
            f"RUN_DIR={str(run_dir)!r} has no mlflow.json, as tracked runs of this version have; "
            "leave RUN_DIR out to send all there is"
        )
    MetricsLog(run_dir)
    return not Followed.read(run_dir).complete


def replay(run_dir: Path, uri: str | None = None) -> str:
    """Sends what MLflow lacks of a run, and says in words what was sent.

    One that was killed before it could say how it ended is KILLED then. `uri` is where MLflow is now. NotSent if MLflow
    or the run in it is out of reach, if the run is alive, or if it logged to a place that nobody has named here: its
    directory may be somebody else's, and passwords go to the server.
    """
    try:
        with FileLock(run_dir / "run.lock", timeout=0):
            return _replay(MetricsLog(run_dir), Followed.read(run_dir), uri)
    except Timeout:
        raise NotSent("in use by a run, which sends the rest itself") from None


def _replay(log: MetricsLog, state: Followed, uri: str | None) -> str:
    from mlflow.exceptions import MlflowException

    run_id = state.run_id
    if uri is None and naming("--uri", state.uri):
        raise NotSent(f"the run logged to {state.uri}, not to {tracking_uri(None)}; name that place with --uri, kept")
    uri = tracking_uri(uri) if uri else state.uri
    otherwise = f"or delete {log.path.parent / 'mlflow.json'}"
    try:
        client = reach(uri)
        run = client.get_run(run_id)
        follower = Follower(log, state, held_points(client, run))
        follower.read()
    except Exception as error:  # drivers of databases raise their own
        if isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotSent(f"{uri} knows no run {run_id}; name the right place with --uri, {otherwise}") from error
        raise NotSent(f"{uri} does not answer ({first_line(error)}); kept") from error
    if run.info.lifecycle_stage == "deleted":
        restore = f"mlflow runs restore --run-id {run_id}"
        raise NotSent(f"run {run_id} was deleted in MLflow; restore it ({restore}) {otherwise}")
    if state.ended is None:
        state.ended = log.entries[-1]["time"] if log.entries else run.info.start_time
        state.status = "KILLED" if run.info.status == "RUNNING" else None
    if uri != state.uri:
        state.uri, state.files = uri, {}
    before = follower.lacks()
    failure = follower.send(client, lambda: None)
    sent = {kind: before[kind] - left for kind, left in follower.lacks().items()}
    follower.save()
    words = f"sent {in_words(sent)}; {in_words({'point': follower.arrived})} had arrived before"
    if failure is not None:
        raise NotSent(f"{words}; MLflow did not take the rest ({first_line(failure)}), which is kept")
    return words


if __name__ == "__main__":
    main()
