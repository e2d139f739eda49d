"""The plan of a job that goes well, from a new resource to its artifacts."""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import Phase
from finetune_operator.observe import Finish
from finetune_operator.plan import Plan
from tests.unit.operator.build import (
    ALL_DONE,
    DONE_MESSAGE,
    EXPORT,
    FINISHED,
    FOLDER,
    PREPARE,
    TRAIN,
    at,
    cached,
    ended,
    exported,
    finetunejob,
    finished_status,
    job,
    pending,
    pod,
    prepared,
    resolved,
    running,
    said,
    status,
    succeeded,
    trouble,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    start,
    started,
    stop,
    unchanged,
    was_cached,
)

NOTHING_YET = (pending(TRAIN), pending(EXPORT))
PREPARING = status(Phase.PREPARING, PREPARE, running(PREPARE), *NOTHING_YET)
PREPARED = (
    succeeded(PREPARE, since=0, fingerprint="prepare-a"),
    running(TRAIN, fingerprint="train-a"),
    pending(EXPORT, fingerprint="export-a"),
)
TRAINING = status(Phase.TRAINING, TRAIN, *PREPARED, resolved=resolved())
TRAINED = (
    succeeded(PREPARE, since=0, fingerprint="prepare-a"),
    succeeded(TRAIN, since=0, fingerprint="train-a"),
    running(EXPORT, fingerprint="export-a"),
)
FIGURES = {"trainLoss": 0.5}
EXPORTING = status(Phase.EXPORTING, EXPORT, *TRAINED, resolved=resolved(), metrics=FIGURES)
FIRST_MANIFEST = f"{FOLDER}/manifest.json"
FIRST_DONE = f"The artifacts are in {FOLDER}; {FIRST_MANIFEST} lists them."
ANEW = normal("StageRecreated", "The pod of train is made anew with its changed settings.")

CASES = [
    Case(
        "a new resource starts prepare",
        finetunejob(),
        [],
        Plan(PREPARING, (start(PREPARE),), (started(PREPARE),)),
    ),
    Case(
        "a prepare that runs is waited for, without a change",
        finetunejob(PREPARING),
        [job(PREPARE)],
        unchanged(PREPARING),
    ),
    Case(
        "a Job of which the watch shows no pod yet is waited for",
        finetunejob(PREPARING),
        [job(PREPARE, pod=None, created=at(-10))],
        unchanged(PREPARING, requeue_after=20),
    ),
    Case(
        "a prepare that was started, but not written to status before a crash, is adopted",
        finetunejob(),
        [job(PREPARE)],
        Plan(status(Phase.PREPARING, PREPARE, running(PREPARE, since=-60), *NOTHING_YET)),
    ),
    Case(
        "after prepare, train starts with what prepare found",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(0, prepared()))],
        Plan(TRAINING, (start(TRAIN),), (finished(PREPARE), started(TRAIN))),
    ),
    Case(
        "after prepare, a train that was started, but not written to status, is adopted",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(0, prepared())), job(TRAIN)],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                running(TRAIN, since=-60, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
            ),
            events=(finished(PREPARE),),
        ),
    ),
    Case(
        "the pod's word counts before its Job says that it is complete",
        finetunejob(PREPARING),
        [job(PREPARE, **{**ended(0, prepared()), "finished": None, "finished_at": None})],
        Plan(TRAINING, (start(TRAIN),), (finished(PREPARE), started(TRAIN))),
    ),
    Case(
        "after train, export starts, and the figures of the training are shown",
        finetunejob(TRAINING),
        [job(TRAIN, **ended(0, said(TRAIN, metrics=FIGURES)))],
        Plan(EXPORTING, (start(EXPORT),), (finished(TRAIN), started(EXPORT))),
    ),
    Case(
        "after export the artifacts and their lineage are shown, and the job is ready",
        finetunejob(EXPORTING),
        [job(EXPORT, **ended(0, exported()))],
        Plan(
            finished_status(
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                succeeded(TRAIN, since=0, fingerprint="train-a"),
                succeeded(EXPORT, since=0, fingerprint="export-a"),
            ),
            events=(finished(EXPORT), normal("Succeeded", DONE_MESSAGE)),
        ),
    ),
    Case(
        "a job that has succeeded is left alone",
        finetunejob(finished_status(*ALL_DONE)),
        [job(EXPORT, **ended(0, exported()))],
        unchanged(finished_status(*ALL_DONE)),
    ),
    Case(
        "a job that has succeeded is left alone when its Jobs are gone",
        finetunejob(finished_status(*ALL_DONE)),
        [],
        unchanged(finished_status(*ALL_DONE)),
    ),
    Case(
        "a job that is being deleted starts nothing",
        finetunejob(deleting=True),
        [],
        unchanged(finetunejob().status),
    ),
    Case(
        "a created-anew job whose result is in the store runs prepare only",
        finetunejob(PREPARING),
        [
            job(
                PREPARE,
                **ended(
                    0,
                    prepared(
                        [PREPARE, TRAIN, EXPORT],
                        artifacts=exported().artifacts,
                        version=exported().version,
                        manifest_uri=exported().manifest_uri,
                    ),
                ),
            )
        ],
        Plan(
            finished_status(
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                cached(TRAIN, "train-a"),
                cached(EXPORT, "export-a"),
                metrics={},
                lineage=FINISHED["lineage"].model_copy(update={"image": None}),
            ),
            events=(
                finished(PREPARE),
                was_cached(TRAIN),
                was_cached(EXPORT),
                normal("Succeeded", DONE_MESSAGE),
            ),
        ),
    ),
    Case(
        "a store that holds the adapter goes on with export",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(0, prepared([PREPARE, TRAIN], metrics=FIGURES)))],
        Plan(
            status(
                Phase.EXPORTING,
                EXPORT,
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                cached(TRAIN, "train-a"),
                running(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
                metrics=FIGURES,
            ),
            (start(EXPORT),),
            (finished(PREPARE), was_cached(TRAIN), started(EXPORT)),
        ),
    ),
    Case(
        "a store that holds the export needs no adapter; what 0.1.0 left has no version",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(0, prepared([EXPORT], manifest_uri=FIRST_MANIFEST)))],
        Plan(
            finished_status(
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                cached(TRAIN, "train-a"),
                cached(EXPORT, "export-a"),
                metrics={},
                artifacts=(),
                version=None,
                manifest_uri=FIRST_MANIFEST,
                message=FIRST_DONE,
                lineage=FINISHED["lineage"].model_copy(update={"image": None}),
            ),
            events=(
                finished(PREPARE),
                was_cached(TRAIN),
                was_cached(EXPORT),
                normal("Succeeded", FIRST_DONE),
            ),
        ),
    ),
    Case(
        "a Job deleted by hand while its stage runs is made again, as the same attempt",
        finetunejob(TRAINING),
        [],
        Plan(TRAINING, (start(TRAIN),), (started(TRAIN),)),
    ),
    Case(
        "a Job that someone is deleting is waited for until it is gone",
        finetunejob(TRAINING),
        [job(TRAIN, deleting=True)],
        unchanged(TRAINING),
    ),
    Case(
        "a Job that someone is deleting still counts when its pod has succeeded",
        finetunejob(TRAINING),
        [job(TRAIN, deleting=True, **ended(0, said(TRAIN, metrics=FIGURES)))],
        Plan(EXPORTING, (start(EXPORT),), (finished(TRAIN), started(EXPORT))),
    ),
    Case(
        "a train whose Job is complete, but whose pod shows later, is waited for",
        finetunejob(TRAINING),
        [job(TRAIN, finished=Finish.COMPLETE, finished_at=at(-5))],
        unchanged(TRAINING, requeue_after=85),
    ),
    Case(
        "a train whose Job is complete, and whose pod is gone for good, has succeeded",
        finetunejob(TRAINING),
        [job(TRAIN, finished=Finish.COMPLETE, finished_at=at(-90), pod=None)],
        Plan(
            status(
                Phase.EXPORTING,
                EXPORT,
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                succeeded(TRAIN, since=0, until=-90, fingerprint="train-a", message=None),
                running(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
            ),
            (start(EXPORT),),
            (normal("StageSucceeded", "Finished train: done"), started(EXPORT)),
        ),
    ),
    Case(
        "a train that ended well without a word has succeeded",
        finetunejob(TRAINING),
        [job(TRAIN, **ended(0))],
        Plan(
            status(
                Phase.EXPORTING,
                EXPORT,
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                succeeded(TRAIN, since=0, fingerprint="train-a", message=None),
                running(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
            ),
            (start(EXPORT),),
            (normal("StageSucceeded", "Finished train: done"), started(EXPORT)),
        ),
    ),
    Case(
        "a train whose pod settings changed before its pod started is stopped, to be made anew",
        finetunejob(TRAINING),
        [job(TRAIN, pod_settings="settings-0", pod=pod(phase="Pending", started=False))],
        Plan(
            status(
                Phase.WAITING,
                TRAIN,
                succeeded(PREPARE, since=0, fingerprint="prepare-a"),
                pending(TRAIN, fingerprint="train-a"),
                pending(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
                conditions=trouble(
                    Phase.WAITING,
                    ("Stopping", "train starts when its earlier pod has stopped."),
                    None,
                ),
            ),
            (stop(TRAIN),),
            (
                ANEW,
                normal("StageStopped", "Stopped train (Job train-1)."),
            ),
        ),
    ),
    Case(
        "a train whose pod settings changed while it runs is left alone",
        finetunejob(TRAINING),
        [job(TRAIN, pod_settings="settings-0")],
        unchanged(TRAINING),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan
