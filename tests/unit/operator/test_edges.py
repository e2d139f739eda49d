"""The edges: the client's errors, and how the log is written."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from kubernetes.aio import client

from finetune_operator import cluster
from finetune_operator.monitoring import HumanLine, JsonLine


def refusal(status: int, what: str, **body: Any) -> cluster.ClusterError:
    return cluster._refusal(status, "Reason", json.dumps(body).encode(), what)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (400, "BadRequest", cluster.DeniedError),
        (403, "Forbidden", cluster.ForbiddenError),
        (404, "NotFound", cluster.NotFoundError),
        (409, "AlreadyExists", cluster.AlreadyExistsError),
        (409, "Conflict", cluster.ConflictError),
        (422, "Invalid", cluster.DeniedError),
        (429, "TooManyRequests", cluster.UnavailableError),
        (500, "InternalError", cluster.UnavailableError),
    ],
)
def test_a_refusal_becomes_an_error_of_our_own(
    status: int, reason: str, expected: type[cluster.ClusterError]
) -> None:
    error = refusal(status, "GET /x", reason=reason, message="no such luck")
    assert type(error) is expected
    assert str(error) == "GET /x: no such luck"
    assert error.detail == "no such luck"


FIELD = {"reason": "FieldValueInvalid", "field": "spec.template", "message": "must be"}
UNDECODABLE = 'Job in version "v1" cannot be handled as a Job: quantities must match'
WEBHOOK = 'admission webhook "images.example.org" denied the request: no'


@pytest.mark.parametrize(
    ("status", "message", "causes", "expected"),
    [
        pytest.param(422, 'Job "x" is invalid', [FIELD], cluster.InvalidError, id="a field"),
        pytest.param(400, UNDECODABLE, [], cluster.InvalidError, id="a value of the wrong form"),
        pytest.param(400, WEBHOOK, [], cluster.DeniedError, id="a webhook"),
        pytest.param(422, WEBHOOK, [FIELD], cluster.DeniedError, id="a webhook that names a field"),
        pytest.param(
            422,
            "jobs \"x\" is forbidden: ValidatingAdmissionPolicy 'images' denied request: no",
            [{"message": "no"}],
            cluster.DeniedError,
            id="a policy",
        ),
    ],
)
def test_only_a_fault_in_a_field_is_the_specs(
    status: int, message: str, causes: list[Any], expected: type[cluster.ClusterError]
) -> None:
    error = refusal(status, "POST /x", message=message, details={"causes": causes})
    assert type(error) is expected


async def test_nodes_are_not_listed_again_within_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    async def listed(kind: str, namespace: str, selector: str) -> AsyncIterator[Any]:
        asked.append(f"{kind} {namespace}{selector}")
        yield {"metadata": {"labels": {selector: str(len(asked))}}}

    here = cluster.Cluster(client.Configuration(), 1.0, lambda *_: None)
    monkeypatch.setattr(here, "_list", listed)
    assert await here.node_labels("memory") == ({"memory": "1"},)
    assert await here.node_labels("memory") == ({"memory": "1"},)
    assert await here.node_labels("other") == ({"other": "2"},)
    monkeypatch.setattr(cluster, "NODES_SECONDS", -1.0)  # the minute is over
    assert await here.node_labels("memory") == ({"memory": "3"},)
    assert asked == ["Node memory", "Node other", "Node memory"]
    await here.close()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"https_proxy": "http://proxy:3128"}, "http://proxy:3128"),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "api.example.com"}, None),
        ({"http_proxy": "http://proxy:3128"}, None),
    ],
    ids=["none", "a proxy", "not for this host", "not for this scheme"],
)
def test_the_proxy_is_the_environments(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        for each in (name, name.upper()):
            monkeypatch.delenv(each, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cluster._proxy_of_environment("https://api.example.com:6443") == expected


def test_the_same_words_about_something_else_are_another_event() -> None:
    about = {"namespace": "ml", "name": "support", "uid": "uid-1"}
    names = {
        scope: cluster._event(about, "Warning", "LossRising", "step 4", scope)["metadata"]["name"]
        for scope in ("", "train-a", "train-b")
    }
    assert len(set(names.values())) == 3
    again = cluster._event(about, "Warning", "LossRising", "step 4", "train-a")
    assert again["metadata"]["name"] == names["train-a"]


def test_an_answer_that_is_no_status_is_told_by_its_reason() -> None:
    error = cluster._refusal(502, "Bad Gateway", b"<html>", "GET /x")
    assert str(error) == "GET /x: Bad Gateway"


def test_an_event_has_a_name_that_fits_whatever_the_job_is_called() -> None:
    about = {"namespace": "ml", "name": "a." * 126, "uid": "uid-1"}
    event = cluster._event(about, "Normal", "StageStarted", "Started.")
    assert len(event["metadata"]["name"]) <= 253
    assert ".." not in event["metadata"]["name"]
    assert event["involvedObject"]["kind"] == "FineTuneJob"


def record(**fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("finetune", logging.INFO, __file__, 1, "Started %s", ("it",), None)
    made.__dict__.update(fields)
    return made


def test_json_lines_name_the_finetunejob() -> None:
    line = json.loads(JsonLine().format(record(finetunejob="ml/support")))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "finetune",
        "message": "Started it",
        "finetunejob": "ml/support",
    }


def test_json_lines_of_kopf_name_the_object() -> None:
    line = json.loads(
        JsonLine().format(record(k8s_ref={"namespace": "ml", "name": "x"}, k8s_skip=True))
    )
    assert line["finetunejob"] == "ml/x"
    assert line.keys() == {"time", "level", "logger", "message", "finetunejob"}


def test_json_lines_hold_a_stack_trace_in_one_line() -> None:
    error = ValueError("no")
    text = JsonLine().format(record(exc_info=(ValueError, error, None)))
    assert "\n" not in text
    assert json.loads(text)["exception"] == "ValueError: no"


def test_lines_for_people_begin_with_the_finetunejob() -> None:
    assert "[ml/support] Started it" in HumanLine().format(record(finetunejob="ml/support"))
