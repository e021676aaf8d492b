"""`python -m xpo.compare [SWEEP | RUN RUN ...]`: runs beside each other, and which setting is best.

Writes report.html, its plots and table.csv to SWEEP/compare/, and logs them to MLflow as the run "compare NAME".
"""

import argparse
import os
import sys
from pathlib import Path

from xpo.config.errors import ConfigError, printable
from xpo.config.options import TrackingOptions
from xpo.evaluation.compare.plots import plots
from xpo.evaluation.compare.read import find_sweep
from xpo.evaluation.compare.report import log, show, write
from xpo.evaluation.compare.statistics import WIN_RATE, compare
from xpo.launch.command import exit_status, speak_to_any_console
from xpo.tracking.mlflow_client import tracking_uri


def main() -> None:
    """The command line. Exit status 2 for bad input."""
    speak_to_any_console()
    parser = argparse.ArgumentParser(
        prog="python -m xpo.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "multirun/DATE/TIME, or the name of a sweep in MLflow (tag xpo.sweep); default: the newest in multirun/. "
    what += "Or several runs, outputs/DATE/TIME"
    parser.add_argument("sweep", metavar="SWEEP", nargs="*", help=what)
    parser.add_argument("--metric", default=WIN_RATE, help="what the best is best by, higher is better (%(default)s)")
    parser.add_argument("--out", type=Path, help="directory of the report (SWEEP/compare; from MLflow compare/NAME)")
    parser.add_argument("--tracking-uri", help="MLflow server or database ($MLFLOW_TRACKING_URI, else ./mlflow.db)")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", TrackingOptions.experiment)
    parser.add_argument("--experiment", default=experiment, help="MLflow's experiment (%(default)s)")
    parser.add_argument("--no-log", action="store_true", help="do not log the report to MLflow")
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for each run
    try:
        sweep = find_sweep(options.sweep, options.tracking_uri, options.experiment)
        comparison = compare(sweep, options.metric)
        uri = None if options.no_log else tracking_uri(options.tracking_uri)
    except ConfigError as error:
        sys.exit(exit_status(error))
    out = options.out or (sweep.directory / "compare" if sweep.directory else Path("compare") / sweep.name)
    try:
        paths = write(comparison, plots(comparison), out)
    except OSError as error:
        sys.exit(exit_status(ConfigError(f"--out={str(out)!r} cannot be written ({error.strerror}); give another")))
    show(comparison, paths[0])
    if uri is not None and (problem := log(sweep, paths, uri)):
        print(f"xpo: the report is not in MLflow: {printable(problem)}", file=sys.stderr)


if __name__ == "__main__":
    main()
