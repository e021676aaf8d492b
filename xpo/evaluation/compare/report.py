"""What a comparison looks like: words, a table on the terminal and as CSV, an HTML page that needs nothing else."""

import base64
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xpo.config.errors import first_line, printable
from xpo.evaluation.compare.plots import Plot, band, curve_metrics, title
from xpo.evaluation.compare.read import Run, Sweep, connect, experiment_id, tagged
from xpo.evaluation.compare.statistics import (
    QUERIES,
    SEED,
    Comparison,
    Difference,
    Estimate,
    Point,
    estimate,
    final_queries,
    label,
    levels,
)

TAG = "xpo.report"  # of the run in MLflow, beside those that it compares
_COLUMNS = (
    *("eval/win_rate", "eval/score", "eval/kl", "eval/eos_rate", "eval/length"),
    *("eval/exploration/unique", "eval/exploration/novel_ngrams"),
)
_EOS = "eval/eos_rate"
_DIGITS = {"eval/kl": 2, "eval/length": 1}
_SIDE_BY_SIDE, _PROMPTS = 3, 8


def verdict_words(comparison: Comparison) -> list[str]:
    """The verdict in plain sentences."""
    verdict, metric, points = comparison.verdict, comparison.metric, comparison.points
    best = _number(estimate(verdict.best.runs, metric), metric)
    lines = [f"Best by {title(metric)} (higher is better): {verdict.best.name}, {best}."]
    if len(points) > 1 and len({tuple(sorted(run.final(metric) for run in point.runs)) for point in points}) == 1:
        lines = [f"These settings made no difference: {title(metric)} is {best} for each.", *_why_equal(comparison)]
    elif verdict.runner_up is None:
        lines.append("It is the only setting: there is nothing to compare it with.")
    elif verdict.over_runner_up is None:
        lines.append(
            f"Whether it is better than the runner-up, {verdict.runner_up.name}, cannot be told: a setting has only "
            f"one seed, and {title(metric)} is not kept for each prompt."
        )
    else:
        words = "Better than" if verdict.over_runner_up.distinguishable else "Not distinguishable from"
        lines.append(f"{words} the runner-up, {verdict.runner_up.name}: {_difference(verdict.over_runner_up)}.")
        lines.append(
            f"It is the best of all {len(points)} settings in {100 * verdict.best_share:.0f} % of the resamples; "
            "picked for its figure among several, it will look somewhat better here than on new prompts and seeds."
        )
    if verdict.over_parity is not None:
        sure, value = verdict.over_parity.distinguishable, verdict.over_parity.value
        words = ("Better than" if value > 0 else "Worse than") if sure else "Not distinguishable from"
        lines.append(f"{words} the reference (a win rate of 0.5, ties not won): {_difference(verdict.over_parity)}.")
    what = "held-out prompts and seeds" if verdict.by_prompt else "seeds"
    rough = f"; with {verdict.seeds} seeds they are rough" if verdict.seeds < 5 else ""
    if verdict.over_runner_up is None and verdict.over_parity is None:
        lines.append("Run more seeds (sweep.seeds=3) for intervals.")
    elif verdict.seeds == 1 and verdict.by_prompt:
        lines.append(
            "Intervals resample the held-out prompts, the same for all runs; a setting has only one seed, so they do "
            "not say how much another seed would change (sweep.seeds=3 would)."
        )
    else:
        lines.append(f"Intervals resample the {what}, together for all settings (paired bootstrap){rough}.")
    return lines


def _why_equal(comparison: Comparison) -> list[str]:
    rates = {run.final(_EOS) for point in comparison.points for run in point.runs if _EOS in run.history}
    if "loss.missing_eos_penalty" in comparison.sweep.keys and rates in ({0.0}, {1.0}):
        who = "no completion" if rates == {0.0} else "every completion"
        return [f"On the held-out prompts {who} ended by itself, so a missing-EOS penalty has little to tell apart."]
    return []


def _difference(value: Difference) -> str:
    return (
        f"difference {value.value:+.3f}, 95 % interval {value.low:+.3f} to {value.high:+.3f}, "
        f"probability of being better {value.probability:.2f}"
    )


def shown_metrics(comparison: Comparison) -> list[str]:
    """The metrics of the table: those of _COLUMNS that were measured, and the chosen one."""
    wanted = dict.fromkeys([comparison.metric, *_COLUMNS])
    return [metric for metric in wanted if any(estimate(point.runs, metric) for point in comparison.points)]


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table's header and rows as text, from best to worst."""
    metrics, names, counts = shown_metrics(comparison), *_counts(comparison)
    rows = []
    for point, counted in zip(comparison.points, counts, strict=True):
        numbers = [_number(estimate(point.runs, metric), metric) for metric in metrics]
        rows.append([*map(label, point.settings.values()), *counted, *numbers])
    return [*comparison.sweep.keys, *map(title, names), *map(title, metrics)], rows


def _counts(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """How many runs a point has, and pairs were labelled before its last evaluation, if that is known of any."""
    runs = [str(len(point.runs)) for point in comparison.points]
    queries = [final_queries(point, comparison.metric) for point in comparison.points]
    if queries == [None] * len(queries):
        return ["runs"], [[number] for number in runs]
    texts = ["" if pairs is None else f"{pairs:.0f}" for pairs in queries]
    return ["runs", QUERIES], [list(pair) for pair in zip(runs, texts, strict=True)]


def _number(value: Estimate | None, metric: str) -> str:
    """Mean and half the width of the interval; * is an interval over prompts."""
    if value is None:
        return ""
    digits = _DIGITS.get(metric, 3)
    if math.isnan(value.low):
        return f"{value.value:.{digits}f}"
    star = "*" if value.over == "prompts" else ""
    return f"{value.value:.{digits}f} ± {(value.high - value.low) / 2:.{digits}f}{star}"


def table_note(comparison: Comparison) -> str:
    """What ± means in this table."""
    found = [estimate(point.runs, metric) for point in comparison.points for metric in shown_metrics(comparison)]
    notes = {
        "seeds": "± is half of the 95 % interval over seeds (Student's t)",
        "prompts": "±* is half of the 95 % interval over prompts (Wilson), for there is one seed",
    }
    return "; ".join(note for kind, note in notes.items() if any(each and each.over == kind for each in found))


def as_csv(comparison: Comparison) -> str:
    """The table as CSV: keys, runs, queries, and mean, low and high of each metric; what is not known is empty."""
    metrics, names, counts = shown_metrics(comparison), *_counts(comparison)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [f"{metric}{part}" for metric in metrics for part in ("", "/low", "/high")]
    writer.writerow([*comparison.sweep.keys, *names, *parts])
    for point, counted in zip(comparison.points, counts, strict=True):
        found = [estimate(point.runs, metric) for metric in metrics]
        numbers = [number for each in found for number in (each[:3] if each else (math.nan,) * 3)]
        texts = ["" if math.isnan(number) else f"{number:.6g}" for number in numbers]
        writer.writerow([*map(label, point.settings.values()), *counted, *texts])
    return text.getvalue()


def curves_as_csv(comparison: Comparison) -> str:
    """The learning curves of all points as CSV: a row for each metric and step; queries are empty if not counted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*comparison.sweep.keys, "metric", "step", QUERIES, "mean", "low", "high"])
    for point in comparison.points:
        for metric in curve_metrics([point], comparison.metric):
            course = band(point, metric)
            queries = [""] * len(course.steps) if course.queries is None else course.queries
            for step, pairs, *values in zip(course.steps, queries, *course[2:], strict=True):
                numbers = [f"{value:.6g}" for value in values]
                count = pairs if pairs == "" else f"{pairs:.12g}"
                writer.writerow([*map(label, point.settings.values()), metric, step, count, *numbers])
    return text.getvalue()


def show(comparison: Comparison, report: Path) -> None:
    """The table, what is left out, the verdict, and where the report is."""
    console = Console()
    header, rows = cells(comparison)
    name, keys = escape(comparison.sweep.name), len(comparison.sweep.keys)
    table = Table(title=f"Sweep {name}", title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.caption = escape(table_note(comparison))
    for i, name in enumerate(header):
        table.add_column(escape(name.replace(".", ".\n")), justify="left" if i < keys else "right")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console.print(table)
    for line in [*map(left_out_words, comparison.left_out), *verdict_words(comparison)]:
        console.print(escape(printable(line)), highlight=False)
    print(f"Report:  {report}", flush=True)  # a path is not to be wrapped


def left_out_words(run: Run) -> str:
    """One line on a job that is not in the figures."""
    return f"Left out: {run.name}: {run.state}{f', {run.reason}' if run.reason else ''}"


def write(comparison: Comparison, drawn: Sequence[Plot], out: Path) -> list[Path]:
    """Writes report.html, the CSV files and a PNG for each plot to a directory; their paths, the report first."""
    out.mkdir(parents=True, exist_ok=True)
    images: dict[str, list[dict[str, Any]]] = {}  # by heading
    paths = [out / "report.html", out / "table.csv", out / "learning_curves.csv"]
    for plot in drawn:
        path = out / f"{plot.name}.png"
        plot.figure.savefig(path)
        image = {"plot": plot, "data": base64.b64encode(path.read_bytes()).decode()}
        images.setdefault(plot.heading, []).append(image)
        paths.append(path)
    paths[1].write_text(as_csv(comparison))
    paths[2].write_text(curves_as_csv(comparison))
    header, rows = cells(comparison)
    template = Path(__file__).with_name("report.html.j2").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        sweep=comparison.sweep,
        settings={key: ", ".join(levels(comparison.points, key)) for key in comparison.sweep.keys},
        verdict=verdict_words(comparison),
        header=header,
        rows=rows,
        note=table_note(comparison),
        images=images,
        samples=side_by_side(comparison.points),
        left_out=comparison.left_out,
        runs=sum(len(point.runs) for point in comparison.points),
    )
    paths[0].write_text(page)
    return paths


def side_by_side(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The first prompts with the reference's answer and those of the best points, each from its first seed."""
    best = [point for point in points if point.runs[0].completions][:_SIDE_BY_SIDE]
    if not best:
        return []
    verdicts = {"policy": "wins", "reference": "loses", "none": "no preference"}
    samples = []
    for i, row in enumerate(best[0].runs[0].completions[:_PROMPTS]):
        answers = [{"name": "reference", "text": row["reference"], "verdict": "", "score": _score(row["ref_score"])}]
        for point in best:
            run = point.runs[0]
            own = run.completions[i]
            name = point.name + (f", seed {run.config[SEED]}" if SEED in run.config else "")
            verdict, score = verdicts[own["verdict"]], _score(own["score"])
            answers.append({"name": name, "text": own["completion"], "verdict": verdict, "score": score})
        samples.append({"prompt": row["prompt"], "answers": answers})
    return samples


def _score(value: float | None) -> str:
    return "" if value is None else f"score {value:.2f}"


def log(sweep: Sweep, paths: Sequence[Path], uri: str) -> str | None:
    """Stores files as artifacts of MLflow's run "compare NAME", the same one when repeated.

    Returns:
        Why that could not be done, in one line; None if it was, or if the sweep is not tracked. It goes to `uri` only:
        the directory of a sweep may be somebody else's, and passwords go to the server that it names.
    """
    if sweep.tracking_uri is None:
        return None
    if sweep.tracking_uri != uri:
        return f"the sweep's runs are in {sweep.tracking_uri}, not in {uri}; name that place with --tracking-uri"
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
