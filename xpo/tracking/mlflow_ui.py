"""Links into the MLflow UI, and the view of a sweep in it."""

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from xpo.tracking.mlflow_client import attempt, is_server, tracking_uri

_FIRST_SECTIONS = ("eval", "objective", "rewards", "preference", "loss")
_BEST = "metrics.`final/win_rate`"


def chart_link(uri: str | None, experiment_id: str, sweep: str | None = None, view: str | None = None) -> str:
    """The UI's charts of an experiment, or of one sweep (tag xpo.sweep). A database needs `mlflow ui` running.

    Args:
        view: the key of a saved view, from `save_view`; it brings its own filter.
    """
    uri = tracking_uri(uri)
    base = uri.rstrip("/") if is_server(uri) else "http://127.0.0.1:5000"
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    if view is not None:
        query["viewStateShareKey"] = view  # the UI would ignore it beside a filter
    elif sweep is not None:
        query |= {"searchFilter": _filter(sweep), "orderByKey": _BEST, "orderByAsc": "false"}
    return f"{base}/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote, safe='')}"


def _filter(sweep: str) -> str:
    return f'tags."xpo.sweep" = "{sweep}"'


def save_view(uri: str | None, experiment_id: str, sweep: str, keys: Sequence[str]) -> str | None:
    """Saves a view of a sweep's runs, "Sweep NAME" in the UI's menu Views: the charts that compare them, then the rest.

    The UI keeps saved views in tags of the experiment.

    Args:
        keys: what was swept, as dotted keys.

    Returns:
        The key of the view, for `chart_link`; None if MLflow did not take it.
    """
    params = ["loss.log10_alpha" if key == "loss.alpha" else key for key in keys]  # alphas are powers of ten
    lines: list[dict[str, Any]] = [
        {"type": "LINE", "metricKey": key, "selectedMetricKeys": [key], "xAxisKey": "step", "useGlobalXaxisKey": True}
        | {"useGlobalLineSmoothing": True, "lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear"}
        | {"yAxisKey": "metric", "yAxisExpressions": [], "range": {}, "displayName": key}
        for key in ("eval/win_rate", "eval/score", "eval/kl")
    ]
    axes = {axis: {"key": key, "type": "METRIC"} for axis, key in (("xaxis", "final/kl"), ("yaxis", "final/win_rate"))}
    others: list[dict[str, Any]] = [
        {"type": "SCATTER", **axes},
        {"type": "PARALLEL", "selectedParams": params, "selectedMetrics": ["final/win_rate"], "showAllRuns": False},
    ]
    common = {"metricSectionId": "Sweep", "deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    state = {
        "searchFilter": _filter(sweep),
        "orderByKey": _BEST,
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",  # the UI would draw ten of them
        "compareRunCharts": [chart | common | {"uuid": f"sweep {n}"} for n, chart in enumerate(lines + others)],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False} for name in ("Sweep", *_FIRST_SECTIONS)
        ],
        "isAccordionReordered": True,  # those that are not named follow
    }
    now = int(time.time() * 1000)
    view = {"name": f"Sweep {sweep}", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    key = hashlib.sha256(sweep.encode()).hexdigest()[:12]
    tag = (experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(view))
    return key if attempt(uri, lambda client: client.set_experiment_tag(*tag)) else None
