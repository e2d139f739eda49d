"""The alerts and the dashboard ask for what /metrics has, by the names and labels that it has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.api.observed import FineTuneJobStatus, StageStatus, StageUsage, UsageStatus
from finetune_operator.monitoring import Metrics
from tests.chart import named, render

TARGET = {"pod", "namespace", "job", "instance"}  # labels that a scrape adds
MONITORING: dict[str, Any] = {
    "metrics": {
        "service": {"enabled": True},
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True},
        "dashboard": {"enabled": True},
    }
}
STAGE: dict[str, Any] = {"name": "train", "state": "Succeeded", "attempt": 1, "disruptions": 1}
TIMES = {"start_time": "2026-01-01T00:00:00Z", "completion_time": "2026-01-01T00:01:00Z"}
FAILED = STAGE | {"state": "Failed", "reason": "InternalError"}


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Names of the samples of an operator that has done everything once, with their labels."""
    metrics = Metrics()
    metrics.watch_queue(lambda: 0, lambda: 0)
    metrics.watch_events(lambda: 0, lambda: 0)
    metrics.requested("list", "200", 0.1)
    metrics.reconciled("changed", 0.1)
    metrics.in_phase("ml/support", "Training")
    metrics.leading(True)
    metrics.watches_failed()
    usage = UsageStatus(gpu_seconds=60, stages=(StageUsage(name="train", gpu_seconds=60),))
    for stage in (STAGE, FAILED):
        after = FineTuneJobStatus(stages=(StageStatus(**stage, **TIMES),), usage=usage)
        metrics.wrote("ml/support", FineTuneJobStatus(), after)
    families = text_string_to_metric_families(metrics.render().decode())
    found: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def alerts() -> list[dict[str, Any]]:
    rule = named(render(**MONITORING), "PrometheusRule")
    return [each for group in rule["spec"]["groups"] for each in group["rules"]]


def dashboard() -> Any:
    config = named(render(**MONITORING), "ConfigMap", "finetune-operator-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    return json.loads(config["data"]["finetune-operator.json"])


def queries() -> list[str]:
    shown = [query["expr"] for panel in dashboard()["panels"] for query in panel.get("targets", ())]
    return [*(each["expr"] for each in alerts()), *shown]


def selectors(node: Any) -> Iterator[Any]:
    """Each series that a parsed query asks for."""
    if isinstance(node, promql.VectorSelector):
        yield node
    for part in ("vector_selector", "expr", "lhs", "rhs"):
        if (child := getattr(node, part, None)) is not None:
            yield from selectors(child)
    for argument in getattr(node, "args", ()):
        yield from selectors(argument)


def groups(node: Any) -> Iterator[tuple[Any, set[str]]]:
    """Each aggregation with the labels that it keeps."""
    if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
        yield node.expr, set(node.modifier.labels)
    for part in ("expr", "lhs", "rhs"):
        if (child := getattr(node, part, None)) is not None:
            yield from groups(child)
    for argument in getattr(node, "args", ()):
        yield from groups(argument)


def parsed(query: str) -> Any:
    """The query with Grafana's variables filled in."""
    return promql.parse(query.replace("$__rate_interval", "5m").replace("$namespace", "ml"))


def problems(query: str, exposed: dict[str, set[str]]) -> list[str]:
    tree = parsed(query)
    found = [f"no metric {each.name}" for each in selectors(tree) if each.name not in exposed]
    for each in selectors(tree):
        asked = {matcher.name for matcher in each.matchers.matchers}
        unknown = asked - exposed.get(each.name, set())
        found += [f"{each.name} has no label {label}" for label in sorted(unknown)]
    for inner, kept in groups(tree):
        for each in selectors(inner):
            unknown = kept - exposed.get(each.name, set()) - TARGET
            found += [f"{each.name} has no label {label}" for label in sorted(unknown)]
    return found


def test_every_query_asks_for_series_that_there_are(exposed: dict[str, set[str]]) -> None:
    asked = queries()
    assert len(asked) > 20
    assert {query: found for query in asked if (found := problems(query, exposed))} == {}


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("sum(rate(finetune_gpu_second_total[5m])) > 1", "no metric finetune_gpu_second_total"),
        ('finetune_jobs{stage="train"}', "finetune_jobs has no label stage"),
        ("sum by (reason) (finetune_jobs)", "finetune_jobs has no label reason"),
    ],
)
def test_a_query_for_what_there_is_not_is_found(
    query: str, problem: str, exposed: dict[str, set[str]]
) -> None:
    assert problem in problems(query, exposed)


def test_every_metric_of_the_operator_is_shown_or_watched(exposed: dict[str, set[str]]) -> None:
    asked = {each.name for query in queries() for each in selectors(parsed(query))}
    stems = {name.removesuffix("_bucket") for name in asked}
    own = {each for each in exposed if each.startswith("finetune_") and "_created" not in each}
    shown = {name for name in own if any(name.startswith(stem) for stem in stems)}
    # How long the watches have been silent says nothing where nothing happens.
    assert own - shown == {"finetune_watch_last_event_age_seconds"}


def test_every_alert_says_what_is_wrong() -> None:
    assert all(each["annotations"]["summary"] for each in alerts())


def test_every_panel_has_a_title_and_words() -> None:
    panels = [each for each in dashboard()["panels"] if each["type"] != "row"]
    assert all(each["title"] and each["description"] and each["targets"] for each in panels)
    assert len({each["id"] for each in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_prometheus_finds_every_operator() -> None:
    objects = render(**MONITORING)
    service = named(objects, "Service", "finetune-operator-metrics")
    labels = named(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    monitor = named(objects, "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert not {"Service", "PodMonitor", "PrometheusRule"} & {o["kind"] for o in render()}
