"""What a run says on the terminal."""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from datasets import disable_progress_bars
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from transformers import TrainingArguments

from xpo.config.errors import printable
from xpo.tracking.metrics_log import evaluations, measures

logger = logging.getLogger(__name__)

_NO_BONUS = (
    "pi of whole completions underflows (set bonus_per_token, lower max_new_tokens, or choose another bonus), "
    "all are beyond bonus_clip, or no pair has a rejected one"
)


class _Printable(logging.Formatter):
    """Warnings may quote what a prompt, a model or a server says."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def quiet() -> None:
    """Progress bars and warnings of our own; silence from libraries where nothing is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for talkative in (
        "hydra",
        "datasets",
        "huggingface_hub",
    ):  # they log the errors that they raise, which are reported here
        logging.getLogger(talkative).setLevel(logging.CRITICAL)
    # Under DeepSpeed it compares the accumulation steps with its own, which the Trainer does not use.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def say(args: TrainingArguments, message: str) -> None:
    """One line on the main process, at once."""
    if args.process_index == 0:
        print(message, flush=True)


def show_completions(records: list[dict[str, Any]], count: int) -> None:
    """A few prompts with the policy's and the reference's completions."""
    console = Console()
    verdicts = {1.0: "policy wins", -1.0: "reference wins", 0.0: "no preference"}
    for record in records[:count]:
        prompt, policy, reference = (
            escape(printable(record[name]).strip()) for name in ("prompt", "completion", "reference")
        )
        body = f"[bold green]policy[/]     {policy}\n[bold yellow]reference[/]  {reference}"
        title = f"{prompt}  [dim]({verdicts[record['label']]})[/]"
        console.print(Panel(body, title=title, title_align="left"))


def show_table(history: list[dict[str, Any]]) -> None:
    """The first and the last evaluation beside the reference."""
    kept = evaluations(history)
    if not kept:
        return
    first, last = kept[0], kept[-1]
    table = Table(title="Held-out prompts", title_justify="left")
    table.add_column("metric")
    for title in ("reference", f"step {first['step']}", f"step {last['step']}"):
        table.add_column(title, justify="right")
    for name in measures(last):
        values = (last.get(f"eval_ref_{name}"), first.get(f"eval_{name}"), last.get(f"eval_{name}"))
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    Console().print(table)


def warn_of_no_bonus(log: dict[str, float]) -> bool:
    """A warning if the bonus had no gradient in the steps of a log; whether the log could tell."""
    if "exploration/bonus_share" not in log:
        return False
    if log["alpha"] and log["exploration/bonus_share"] == 0:
        logger.warning("xpo: the bonus has no gradient so far (exploration/bonus_share is 0): %s", _NO_BONUS)
    return True


def show_best(history: list[dict[str, Any]]) -> None:
    """A line on the best iterate, by Algorithm 1 of the XPO paper, if several were evaluated and have scores."""
    kept = [entry for entry in evaluations(history) if math.isfinite(entry.get("eval_objective", math.nan))]
    if len(kept) > 1:
        best, last = max(kept, key=lambda entry: entry["eval_objective"]), kept[-1]
        print(
            f"Best iterate by score - beta * KL: step {best['step']} with {best['eval_objective']:.3f} "
            f"(step {last['step']}: {last['eval_objective']:.3f})."
        )


def show_exploration(history: list[dict[str, Any]], alpha: Any) -> None:
    """A line on what the bonus did in training, if there is one."""
    shares = [entry["exploration/bonus_share"] for entry in history if "exploration/bonus_share" in entry]
    if not shares or not any(alpha if isinstance(alpha, Sequence) else [alpha]):
        return
    share = sum(shares) / len(shares)
    if share == 0:
        print(f"The bonus had no gradient at all: {_NO_BONUS}")
    else:
        print(f"The bonus had {100 * share / (1 + share):.2g} % of the gradient (exploration/bonus_share).")


def show_where(run_dir: Path, ui: str | None) -> None:
    """The last lines: where the model is, and how to open the UI."""
    print(f"Model:   {run_dir / 'model'}", flush=True)
    if ui is not None:
        print(f"Compare: {ui}", flush=True)
