"""`python -m xpo.push RUN [--to OWNER/NAME]`: sends the model of a finished run to the hub, and its pairs if asked.

With tokenizer and card; never checkpoints or optimizer states. For a run of training.push_to_hub=true whose hub was out
of reach, or for one that was not to be pushed. The token is $HF_TOKEN, or that of `hf auth login`.
"""

import argparse
import logging
import sys
from pathlib import Path

from xpo.config.errors import ConfigError
from xpo.launch.command import exit_status, speak_to_any_console
from xpo.launch.trained import written_config
from xpo.tracking.hub import make_repositories, push_run
from xpo.tracking.runs import RunRecord


def main() -> None:
    """The command line. Exit status 2 for bad input, and for a hub that is out of reach or refuses."""
    speak_to_any_console()
    parser = argparse.ArgumentParser(
        prog="python -m xpo.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, outputs/DATE/TIME")
    parser.add_argument("--to", metavar="OWNER/NAME", help="the repository (the run's training.hub_model_id)")
    help_pairs = "the labelled pairs, too, to the data set OWNER/NAME-pairs (the run's training.push_pairs)"
    parser.add_argument("--pairs", action="store_true", help=help_pairs)
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    options = parser.parse_args()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs attempts that it repeats
    try:
        print(*push_later(options.run, options.to, options.pairs, options.private), sep="\n")
    except ConfigError as error:
        sys.exit(exit_status(error))


def push_later(run_dir: Path, to: str | None, pairs: bool, private: bool) -> list[str]:
    """Sends what a finished run has left; the addresses. ConfigError if it has not, or the hub does not take it."""
    if not (run_dir / "run.json").is_file():
        raise ConfigError(f"RUN={str(run_dir)!r} holds no run.json; give a run directory, outputs/DATE/TIME")
    record, training = RunRecord.read(run_dir), written_config(run_dir).training
    if not record.finished:
        raise ConfigError(f"RUN={str(run_dir)!r} has not finished; go on with it: {record.command(run_dir)}")
    name, pairs = to or training.hub_model_id, pairs or training.push_pairs
    if name is None:
        raise ConfigError(f"RUN={str(run_dir)!r} has no training.hub_model_id; give --to OWNER/NAME")
    repository = make_repositories(name, pairs, private or training.hub_private_repo)
    return push_run(run_dir, repository, pairs, training.kwargs.get("hub_revision"))


if __name__ == "__main__":
    main()
