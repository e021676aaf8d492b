"""`python -m xpo.track replay [RUN_DIR ...]`: sends to MLflow what runs could not while it was out of reach.

Without RUN_DIR, every backlog under outputs/ and multirun/. A point that MLflow holds already is not sent again.
Exit status 1 if something could not be sent, which is kept; 2 for bad input.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from xpo.config.errors import ConfigError
from xpo.launch.command import exit_status
from xpo.tracking.backlog import Backlog, Entry, count, in_words, send
from xpo.tracking.mlflow_run import first_line, held_points, reach

ROOTS = (Path("outputs"), Path("multirun"))


class NotSent(Exception):
    """A backlog, or the end of it, is still there: why."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m xpo.track", description=__doc__)
    parser.add_argument("command", choices=["replay"])
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="run directories; default: all")
    parser.add_argument("--uri", help="where MLflow is now, if not where the run logged to")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a server that goes away ends this in seconds
    run_dirs = options.run_dirs or sorted(path.parent for root in ROOTS for path in root.rglob("backlog.jsonl"))
    if not run_dirs:
        print(f"nothing to send: no backlog under {' or '.join(map(str, ROOTS))}")
    try:
        for run_dir in run_dirs:
            check(run_dir)
    except ConfigError as error:
        sys.exit(exit_status(error))
    kept = False
    for run_dir in run_dirs:
        try:
            print(f"{run_dir}: {replay(run_dir, options.uri)}", flush=True)
        except NotSent as error:
            kept = True
            print(f"{run_dir}: {error}", file=sys.stderr, flush=True)
    sys.exit(int(kept))


def check(run_dir: Path) -> None:
    """Raises ConfigError unless the run directory has a backlog that can be read."""
    path = run_dir / "backlog.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"RUN_DIR={str(run_dir)!r} has no backlog.jsonl; leave RUN_DIR out to send every one there is"
        )
    Backlog(path)


def replay(run_dir: Path, uri: str | None = None) -> str:
    """Sends a run's backlog, and removes it. A run that was killed before it could say how it ended is KILLED then.

    Args:
        run_dir: the run directory.
        uri: the tracking server or database; None for the one that the run logged to.

    Returns:
        What was sent, in words.

    Raises:
        NotSent: MLflow or the run in it is out of reach, or a live run owns the backlog.
    """
    try:
        with FileLock(run_dir / "run.lock", timeout=0):
            return _replay(Backlog(run_dir / "backlog.jsonl"), uri)
    except Timeout:
        raise NotSent("in use by a run, which sends its backlog itself") from None


def _replay(backlog: Backlog, uri: str | None) -> str:
    from mlflow.exceptions import MlflowException

    if not backlog.entries:  # a full disk or a kill left only the beginning of the file
        backlog.drain(lambda entry: None)
        return "nothing to send"
    uri, run_id = uri or backlog.where["uri"], backlog.where["run_id"]
    try:
        client = reach(uri)
        run = client.get_run(run_id)
        keys = {point[0] for entry in backlog.entries for point in entry.get("metrics", ())}
        there = backlog.forget(held_points(client, run, keys))
    except Exception as error:  # see Backlog.drain
        if isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotSent(
                f"{uri} knows no run {run_id}; name the right place with --uri, or delete {backlog.path}"
            ) from error
        raise NotSent(f"{uri} does not answer ({first_line(error)}); kept") from error
    if run.info.lifecycle_stage == "deleted":
        raise NotSent(
            f"run {run_id} was deleted in MLflow; restore it (mlflow runs restore --run-id {run_id}) "
            f"or delete {backlog.path}"
        )
    if run.info.status == "RUNNING" and not any("status" in entry for entry in backlog.entries):
        last = max((point[2] for entry in backlog.entries for point in entry.get("metrics", ())), default=None)
        backlog.append({"status": "KILLED", "time": last})
    sent: list[Entry] = []
    with tqdm(total=len(backlog.entries), delay=1, disable=None, leave=False) as bar:

        def send_one(entry: Entry) -> None:
            if send(client, run_id, entry, backlog.directory):
                sent.append(entry)
            bar.update()

        failure = backlog.drain(send_one)
    words = f"sent {in_words(count(sent))}; {in_words(Counter(point=there))} had arrived before"
    if failure is not None:
        raise NotSent(f"{words}; MLflow did not take the rest ({first_line(failure)}), which is kept")
    return words


if __name__ == "__main__":
    main()
