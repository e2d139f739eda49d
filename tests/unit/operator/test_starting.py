"""What the operator remembers of the Jobs that it has started."""

from __future__ import annotations

import asyncio
import time
from typing import cast

import pytest

from finetune_operator.api import POD_SETTINGS_ANNOTATION, STAGE_LABEL, JsonObject
from finetune_operator.cluster import (
    Cluster,
    ClusterError,
    DeniedError,
    ForbiddenError,
    InvalidError,
    UnavailableError,
)
from finetune_operator.observe import observe_finetunejob
from finetune_operator.starting import Starts, _likeness, _remember


def test_what_is_too_old_to_count_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many namespaces and kinds of Jobs there were; what comes again stays."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    times = dict[int, float]()
    for now in range(1000):
        _remember(times, now, 60)
        _remember(times, -1, 60)
        assert len(times) <= 61
    assert times == {-1: 999, **{at: at for at in range(940, 1000)}}


class Refusing:
    """A cluster that creates nothing."""

    def __init__(self, error: ClusterError) -> None:
        self._error = error

    async def create(self, body: JsonObject, *, dry_run: bool) -> JsonObject:
        del body, dry_run
        raise self._error


@pytest.mark.parametrize(
    ("error", "admitted"),
    [
        (UnavailableError("the API server can't be reached"), True),
        (DeniedError("a webhook says no"), False),
        (ForbiddenError("exceeded quota"), False),
        (InvalidError("spec.template: Invalid value"), False),
    ],
)
def test_only_a_job_that_was_denied_makes_the_next_one_doubtful(
    error: ClusterError, admitted: bool
) -> None:
    """Of an API server that was away for a moment nothing follows for other Jobs."""
    meta = {"name": "a", "namespace": "team", "uid": "1", "generation": 1, "resourceVersion": "1"}
    finetunejob = observe_finetunejob({"metadata": meta, "spec": {}})
    metadata: JsonObject = {"namespace": "team", "name": "a-train"}
    metadata |= {"labels": {STAGE_LABEL: "train"}, "annotations": {POD_SETTINGS_ANNOTATION: "1"}}
    job: JsonObject = {"kind": "Job", "metadata": metadata, "spec": {"template": {"spec": {}}}}
    cluster = Refusing(error)
    starts = Starts(cast("Cluster", cluster), lambda: True)
    starts._admitted[_likeness(job)] = time.monotonic()
    with pytest.raises(type(error)):
        asyncio.run(starts.create_job(finetunejob, job))
    assert starts._was_admitted(job) is admitted
