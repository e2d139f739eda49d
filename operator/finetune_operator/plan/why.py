"""Why a stage runs, is done already or stays as it is, and what made its former result stale. Pure.

The fingerprints decide; this module finds the words. It compares the fields of the spec, and what
`prepare` found, with those that it last resolved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import (
    FineTuneJobStatus,
    LookCause,
    PlannedStatus,
    StageState,
    StageStatus,
)
from finetune_trainer.contract import (
    UNCHANGING,
    Dataset,
    JobReference,
    Model,
    Output,
    Resolved,
    RunConfig,
    Stage,
    digest,
)

Inputs = Mapping[str, str]

VALUE_LIMIT = 48  # characters of a value that is quoted
CAUSES_LIMIT = 12  # lines of staleBecause
DIGEST_LENGTH = 12  # characters of an ETag or a revision that are quoted
BATCH = ("training.batchSize", "training.gradientAccumulationSteps")  # only their product counts

DIRECT = {
    Stage.TRAIN: ("model.trustRemoteCode", "dataset.maxTruncatedRows", "training."),
    Stage.EXPORT: (
        "model.source",
        "dataset.systemPrompt",
        "training.maxSequenceLength",
        "export.",
    ),
}
"""How the fields begin that are part of a stage's fingerprint."""

OF_THE_MODEL = ("model.source", "model.revision")
OF_THE_EXAMPLES = ("model.", "dataset.", "training.maxSequenceLength", "training.seed")
OF_NO_RESULT = frozenset(
    {"model.storage", "dataset.storage", *(f"training.{to_camel(name)}" for name in UNCHANGING)}
)
WHERE = ("output.", "storage.")  # where results are looked for, and what becomes of them


@dataclass(frozen=True)
class Why:
    """Two fields of a stage's status."""

    why: str | None
    stale_because: tuple[str, ...] = ()


def spec_inputs(spec: FineTuneJobSpec) -> dict[str, str]:
    """The fields that the stages depend on, without those that have their default."""
    return _flat(spec.run_config(JobReference(name="", namespace=""), None), defaults=False)


def why_prepare(before: FineTuneJobStatus, planned: PlannedStatus, spec: FineTuneJobSpec) -> Why:
    """Why `prepare` looks, for the first time or again."""
    if before.planned is None:
        return Why("It is the first look at dataset and model.")
    if planned.cause is LookCause.REFRESH:
        return Why("dataset.refresh asks for a look at dataset and model.")
    if planned.cause is LookCause.RETRY_REQUESTED:
        return Why("A retry was requested.")
    found = _differences(before.resolved_inputs, spec_inputs(spec), ("",))
    if before.planned.hardware != planned.hardware:
        found.append("spec.stages.train.resources")
    if found or before.planned.inputs != planned.inputs:
        return Why("The spec has changed.", _limited(found))
    return Why("The spec was edited after a failure.")


@dataclass(frozen=True)
class Change:
    """What `prepare` resolved before, and what it has resolved now."""

    before: Resolved | None
    inputs_before: Inputs
    now: Resolved
    inputs_now: Inputs

    def explain(self, was: StageStatus, now: StageStatus, *, kept: bool) -> Why:
        """Say why a stage after `prepare` is as it is now; `was` is how it was before."""
        if kept and now.state is not StageState.SUCCEEDED:
            return Why(now.why, now.stale_because)
        if kept:
            return Why("Nothing that it depends on has changed.")
        changed = was.fingerprint is not None and was.fingerprint != now.fingerprint
        causes = _limited(self._causes(now.name)) if changed else ()
        if now.cached:
            return Why("The object store holds its result.", causes)
        return Why("What it depends on has changed.", causes) if changed else self._again(was)

    def _again(self, was: StageStatus) -> Why:
        """Why a stage runs with the fingerprint that it had, or with its first one."""
        if was.state is StageState.SUCCEEDED:
            where = _limited(_differences(self.inputs_before, self.inputs_now, WHERE))
            return Why("The object store doesn't hold all that the spec asks for.", where)
        if was.state is StageState.FAILED:
            return Why("It failed, and is tried again.")
        return Why(was.why or "There is no result yet.", was.stale_because)

    def _causes(self, stage: Stage) -> list[str]:
        """What differs of what a stage depends on, fields of the spec first."""
        starts, found = DIRECT[stage], list[str]()
        if self.before is None:
            return found
        if stage is Stage.TRAIN:
            if self.now.model_revision != self.before.model_revision:
                words = _quoted("revision", self.before.model_revision, self.now.model_revision)
                starts, found = (*starts, *OF_THE_MODEL), [f"model: {words}"]
            if self.now.init_revision != self.before.init_revision:
                found = [*found, "training.initFrom: another adapter"]
            if self._examples_differ:
                starts, found = (*starts, *OF_THE_EXAMPLES), [*found, *self._dataset()]
        elif self.now.fingerprints.train != self.before.fingerprints.train:
            found = ["train: another training"]
        left_out = OF_NO_RESULT | self._same_batch()
        found = [*_differences(self.inputs_before, self.inputs_now, starts, left_out), *found]
        return found or (["another version of the trainer"] if self.inputs_before else [])

    @property
    def _examples_differ(self) -> bool:
        before, now = self.before, self.now
        if before is None:
            return False
        if before.examples is None or now.examples is None:  # an older trainer doesn't say
            return before.dataset_etag != now.dataset_etag
        return before.examples != now.examples

    def _dataset(self) -> list[str]:
        before = self.before
        if before is None or before.dataset_etag == self.now.dataset_etag:
            return ["dataset: other examples"]
        return [f"dataset: {_quoted('ETag', before.dataset_etag, self.now.dataset_etag)}"]

    def _same_batch(self) -> frozenset[str]:
        products = [
            _number(inputs, BATCH[0]) * _number(inputs, BATCH[1])
            for inputs in (self.inputs_before, self.inputs_now)
        ]
        return frozenset(BATCH) if products[0] == products[1] else frozenset()


def _differences(
    before: Inputs,
    now: Inputs,
    starts: tuple[str, ...],
    left_out: frozenset[str] = frozenset(),
) -> list[str]:
    """The fields that begin so and differ, each with both values; none if those are unknown."""
    if not before:
        return []
    paths = sorted({*before, *now})
    return [
        f"spec.{path}: {_shown(before, path)} → {_shown(now, path)}"
        for path in paths
        if before.get(path) != now.get(path)
        and path.startswith(starts)
        and not path.startswith(tuple(left_out))
    ]


def _shown(inputs: Inputs, path: str) -> str:
    return inputs.get(path) or DEFAULTS.get(path) or "none"


def _number(inputs: Inputs, path: str) -> int:
    return int(_shown(inputs, path))


def _quoted(what: str, before: str, now: str) -> str:
    return f"{what} {before[:DIGEST_LENGTH]} → {now[:DIGEST_LENGTH]}"


def _limited(causes: list[str]) -> tuple[str, ...]:
    if len(causes) <= CAUSES_LIMIT:
        return tuple(causes)
    more = len(causes) - CAUSES_LIMIT + 1
    return (*causes[: CAUSES_LIMIT - 1], f"and {more} more")


def _flat(config: RunConfig, *, defaults: bool) -> dict[str, str]:
    """The fields by their path, as text."""
    data = config.model_dump(
        mode="json",
        by_alias=True,
        exclude={"job", "resolved", "hardware"},
        exclude_defaults=not defaults,
        exclude_none=True,
    )
    return dict(_leaves(data, ""))


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        inside = [_leaves(each, f"{path}.{name}" if path else name) for name, each in value.items()]
        return [leaf for leaves in inside for leaf in leaves]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > VALUE_LIMIT:
        text = f"{text[:VALUE_LIMIT]}… ({digest(value)[:8]})"
    return [(path, text)]


DEFAULTS = _flat(
    RunConfig(
        model=Model(source="org/name"),
        dataset=Dataset(source="s3://bucket/key"),
        output=Output(uri="s3://bucket/key"),
    ),
    defaults=True,
)
