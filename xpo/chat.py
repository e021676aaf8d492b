"""`python -m xpo.chat RUN_OR_MODEL [KEY=VALUE ...]`: talk to a trained policy, with its reference beside it.

Both answer the same messages from the same seed; the run's judge says who wins and by how much. A run is
outputs/DATE/TIME, one of its checkpoints, or a job of a sweep; a model is a directory, of adapters perhaps, or a hub
name. KEY=VALUE are overrides as of xpo.train: generation.temperature=0.7, generation.max_new_tokens=256,
model.reference=NAME. Lines that begin with / are commands; /help lists them. Standard input may be a pipe.
"""

import argparse
import sys
from pathlib import Path

from xpo.config.compose import check_words
from xpo.config.errors import ConfigError, JudgeStopped
from xpo.launch.command import exit_status, print_error, speak_to_any_console
from xpo.launch.trained import NAME, Trained, find_trained


def main() -> None:
    """The command line. Exit status 2 for bad input, 1 for a judge that cannot go on in a script."""
    speak_to_any_console()
    parser = argparse.ArgumentParser(
        prog="python -m xpo.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar=NAME, help="whom to talk to")
    parser.add_argument("words", metavar="KEY=VALUE", nargs="*", help="overrides")
    what = "who judges: an option of conf/judge, or none (the run's; a model has none)"
    parser.add_argument("--judge", metavar="NAME", help=what)
    parser.add_argument("--no-reference", action="store_true", help="the policy alone, which nobody judges")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="say this and end; several: in their order")
    parser.add_argument("--save", metavar="FILE", type=Path, default=Path("chat.jsonl"), help="of /save (%(default)s)")
    options = parser.parse_intermixed_args()
    try:
        check_words(options.words)
        if options.no_reference and options.judge not in (None, "none"):
            raise ConfigError(f"--judge={options.judge} has nothing to compare; leave --no-reference out")
        trained = find_trained(options.name, options.words, options.judge)
        talk(trained, not options.no_reference, options.prompt, options.save)
    except JudgeStopped as error:
        print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(exit_status(error))


def talk(trained: Trained, with_reference: bool, prompts: list[str] | None, save_to: Path) -> None:
    """Loads the models, and talks: of `prompts` if there are any, else with who sits at the terminal or pipes lines."""
    from rich.console import Console  # all of this loads torch: --help and a wrong name are answered at once

    from xpo.evaluation.dialogue import Dialogue
    from xpo.launch.conversation import build_conversation
    from xpo.tracking.terminal import quiet

    quiet()
    dialogue = Dialogue(*build_conversation(trained, with_reference), Console(), save_to)
    if prompts is not None:
        dialogue.from_script(prompts)
    elif sys.stdin.isatty():
        dialogue.at_terminal()
    else:
        dialogue.from_script(sys.stdin)


if __name__ == "__main__":
    main()
