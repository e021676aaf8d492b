"""`python -m xpo.pairs export RUN_OR_SWEEP ... [--out FILE]`: the labelled pairs of runs as a preference data set.

A Parquet file with the columns prompt, chosen and rejected, as DPO trainers read it. Runs may be in progress.
"""

import argparse
import sys
from pathlib import Path

from xpo.config.errors import ConfigError
from xpo.data.pair_file import export, pair_files
from xpo.launch.command import exit_status


def main() -> None:
    """The command line. Exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m xpo.pairs", description=__doc__)
    parser.add_argument("command", choices=["export"])
    what = "run directories, or directories of sweeps: all of their runs together"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help=what)
    parser.add_argument("--out", type=Path, default=Path("pairs.parquet"), help="the file to write (%(default)s)")
    options = parser.parse_args()
    try:
        files = pair_files(options.runs)
        written, left_out = export(files, options.out)
    except ConfigError as error:
        sys.exit(exit_status(error))
    except OSError as error:
        sys.exit(exit_status(ConfigError(f"--out={str(options.out)!r} cannot be written ({error.strerror})")))
    print(f"{written} pairs of {len(files)} runs, {left_out} without a winner left out: {options.out}")


if __name__ == "__main__":
    main()
