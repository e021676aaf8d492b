"""`python -m xpo.runs [DIRECTORY ...] [--json]`: the runs and sweeps here, and how those that were interrupted go on.

Below outputs/ and multirun/, where training.resume=auto and xpo.compare look, too. "age" is the time since a run last
wrote something; win rate ("wins"), score and KL are those of its last evaluation.
"""

import argparse
from pathlib import Path

from xpo.launch.command import speak_to_any_console
from xpo.launch.overview import as_json, runs_below, show, sweeps_below
from xpo.tracking.runs import ROOTS


def main() -> None:
    """The command line."""
    speak_to_any_console()
    parser = argparse.ArgumentParser(
        prog="python -m xpo.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="*", type=Path, default=ROOTS, metavar="DIRECTORY", help="other places")
    parser.add_argument("--json", action="store_true", help="for scripts: all that is known of each")
    options = parser.parse_args()
    runs, sweeps = runs_below(options.directories), sweeps_below(options.directories)
    if options.json:
        print(as_json(runs, sweeps))
    elif not runs and not sweeps:
        print(f"no runs below {' or '.join(map(str, options.directories))}")
    else:
        show(runs, sweeps)


if __name__ == "__main__":
    main()
