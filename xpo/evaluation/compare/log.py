"""A comparison in MLflow: one run beside those that it compares."""

from collections.abc import Sequence
from pathlib import Path

from xpo.config.errors import first_line
from xpo.evaluation.compare.read import Sweep, connect, experiment_id, tagged

TAG = "xpo.report"


def log(sweep: Sweep, paths: Sequence[Path]) -> str | None:
    """Stores files as artifacts of the run "compare NAME", the same one when repeated.

    Returns:
        Why that could not be done, in one line; None if it was, or if the sweep is not tracked.
    """
    if sweep.tracking_uri is None:
        return None
    try:
        client = connect(sweep.tracking_uri)
        experiment = experiment_id(client, sweep.tracking_uri, sweep.experiment)
        mine = [run for run in tagged(client, experiment, TAG) if run.data.tags[TAG] == sweep.name]
        run = mine[0] if mine else client.create_run(experiment, run_name=f"compare {sweep.name}")
        client.set_tag(run.info.run_id, TAG, sweep.name)
        for path in paths:
            client.log_artifact(run.info.run_id, str(path))
        client.set_terminated(run.info.run_id)
    except Exception as error:  # the report is written, whatever the server or its client say
        return first_line(error)
    return None
