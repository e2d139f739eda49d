"""The plan when the quality gate finds fault with files of an export, or lets them pass."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.observed import ArtifactStatus, FineTuneJobStatus, Phase
from finetune_operator.plan import Plan
from finetune_trainer.contract import Artifact, Quality, Reason
from tests.unit.operator.build import (
    DONE_MESSAGE,
    EXPORT,
    EXPORTED_VERSION,
    FINE,
    FINISHED,
    PREPARE,
    TRAIN,
    VERSION_FOLDER,
    cached,
    conditions,
    dead,
    ended,
    failing,
    finetunejob,
    finished_status,
    job,
    prepared,
    resolved,
    running,
    said,
    status,
    succeeded,
)
from tests.unit.operator.edits import NEW_EXPORT, answer, preparing, working
from tests.unit.operator.endings import PREPARING
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    start,
    started,
    unchanged,
    warning,
    was_cached,
)


def quality(kl: float, limit: float | None, *, passed: bool = True) -> Quality:
    return Quality(
        kl_divergence=kl,
        same_top_token=0.9,
        perplexity=5.5,
        max_kl_divergence=limit,
        passed=passed,
    )


GOOD = quality(0.002, 0.005)
BAD = quality(0.412345, 0.08, passed=False)
OTHERWISE = quality(0.01, 0.08, passed=False)
MANIFEST = f"{VERSION_FOLDER}/manifest.json"
PUBLISHED: dict[str, Any] = {"version": EXPORTED_VERSION, "manifest_uri": MANIFEST}


def file(path: str, measured: Quality | None = None) -> Artifact:
    return Artifact(path=path, bytes=10, sha256="aa", quality=measured)


def shown(path: str, measured: Quality | None = None) -> ArtifactStatus:
    return ArtifactStatus(uri=f"{VERSION_FOLDER}/{path}", bytes=10, sha256="aa", quality=measured)


F16, Q4 = "gguf/model-F16.gguf", "rejected/model-Q4_K_M.gguf"
MESSAGE = (
    "model-Q4_K_M.gguf: KL divergence 0.4123, limit 0.08. Drop Q4_K_M from spec.export.gguf, or "
    "raise its limit in spec.export.qualityLimits."
)
SHORT_OF = "mean KL divergence 0.4123 nats per token, limit 0.08."
TRAINED = (
    succeeded(PREPARE, fingerprint="prepare-a"),
    succeeded(TRAIN, fingerprint="train-a"),
)
EXPORTING: FineTuneJobStatus = status(
    Phase.EXPORTING,
    EXPORT,
    *TRAINED,
    running(EXPORT, since=-60, fingerprint="export-a"),
    resolved=resolved(),
    metrics=FINISHED["metrics"],
)


def exports(*files: Artifact) -> Any:
    """An export that ended well."""
    return job(EXPORT, **ended(0, said(EXPORT, artifacts=files, **PUBLISHED)))


def refused(*files: Artifact, manifest: str | None = MANIFEST) -> Any:
    """The end of an export whose quality gate refused a file."""
    words = said(
        EXPORT,
        Reason.QUALITY_GATE_FAILED,
        message=MESSAGE,
        artifacts=files,
        version=EXPORTED_VERSION,
        manifest_uri=manifest,
    )
    return job(EXPORT, **ended(15, words))


def failed(**fields: Any) -> FineTuneJobStatus:
    """`export` has failed for good; without `fields` it has published something."""
    published = {
        "artifacts": (shown(F16, GOOD), shown(Q4, BAD)),
        **PUBLISHED,
        "lineage": FINISHED["lineage"],
    }
    given: FineTuneJobStatus = status(
        Phase.FAILED,
        EXPORT,
        *TRAINED,
        failing(EXPORT, Reason.QUALITY_GATE_FAILED, MESSAGE, fingerprint="export-a"),
        resolved=resolved(),
        metrics=FINISHED["metrics"],
        conditions=dead(Reason.QUALITY_GATE_FAILED, MESSAGE),
        **(fields or published),
    )
    return given


def let_pass(words: str, **fields: Any) -> FineTuneJobStatus:
    """The export succeeded, and Ready says this of its files."""
    exported = succeeded(EXPORT, fingerprint="export-a")
    given: FineTuneJobStatus = finished_status(*TRAINED, exported, **fields).model_copy(
        update={
            "conditions": conditions(
                ready=(True, "Succeeded", f"{DONE_MESSAGE}{words}"),
                progressing=(False, "Succeeded", "There is nothing to do."),
                degraded=FINE,
            )
        }
    )
    return given


WARNED = f" Short of the quality asked for: model-Q4_K_M.gguf: {SHORT_OF}"
PASSED_Q4 = "gguf/model-Q4_K_M.gguf"

CASES = [
    Case(
        "figures of the files stand in status",
        finetunejob(EXPORTING),
        [exports(file(F16, GOOD))],
        Plan(
            let_pass("", artifacts=(shown(F16, GOOD),)),
            events=(finished(EXPORT), normal("Succeeded", DONE_MESSAGE)),
        ),
    ),
    Case(
        "a refused file ends the job, and what was published is shown with its figures",
        finetunejob(EXPORTING),
        [refused(file(F16, GOOD), file(Q4, BAD))],
        Plan(failed(), events=(warning("QualityGateFailed", f"{Q4}: {SHORT_OF}"),)),
    ),
    Case(
        "each refused file is an event",
        finetunejob(EXPORTING),
        [refused(file("rejected/a.gguf"), file("rejected/b.gguf", OTHERWISE))],
        Plan(
            failed(
                artifacts=(shown("rejected/a.gguf"), shown("rejected/b.gguf", OTHERWISE)),
                **PUBLISHED,
                lineage=FINISHED["lineage"],
            ),
            events=tuple(
                warning(
                    "QualityGateFailed",
                    f"rejected/{name}.gguf did not pass the checks; the manifest says why.",
                )
                for name in "ab"
            ),
        ),
    ),
    Case(
        "a gate that failed before anything was published leaves what an earlier spec made",
        finetunejob(EXPORTING.model_copy(update={"manifest_uri": MANIFEST})),
        [refused(manifest=None)],
        Plan(
            failed(manifest_uri=MANIFEST),
            events=(warning("QualityGateFailed", MESSAGE),),
        ),
    ),
    Case(
        "a job whose file was refused is not tried again",
        finetunejob(failed()),
        [refused(file(F16, GOOD), file(Q4, BAD))],
        unchanged(failed()),
    ),
    Case(
        "with another limit only the export runs again",
        finetunejob(
            preparing(
                *failed().stages[1:],
                resolved=resolved(),
                artifacts=failed().artifacts,
                metrics=FINISHED["metrics"],
            ),
            generation=2,
        ),
        [
            refused(file(F16, GOOD), file(Q4, BAD)),
            answer([PREPARE, TRAIN], found=NEW_EXPORT),
        ],
        Plan(
            working(
                Phase.EXPORTING,
                EXPORT,
                succeeded(PREPARE, fingerprint="prepare-a"),
                succeeded(TRAIN, fingerprint="train-a"),
                running(EXPORT, fingerprint="export-b"),
                resolved=NEW_EXPORT,
                artifacts=failed().artifacts,
                metrics=FINISHED["metrics"],
            ),
            (start(EXPORT, found=NEW_EXPORT, key="export-b"),),
            (finished(PREPARE), started(EXPORT)),
        ),
    ),
    Case(
        "with verify: warn a file over its limit is an event and stands in the Ready message",
        finetunejob(EXPORTING),
        [exports(file(F16, GOOD), file(PASSED_Q4, BAD))],
        Plan(
            let_pass(WARNED, artifacts=(shown(F16, GOOD), shown(PASSED_Q4, BAD))),
            events=(
                finished(EXPORT),
                warning("QualityLimitExceeded", f"{PASSED_Q4}: {SHORT_OF}"),
                normal("Succeeded", f"{DONE_MESSAGE}{WARNED}"),
            ),
        ),
    ),
    Case(
        "an export that the store already holds is shown with its figures, without an event",
        finetunejob(PREPARING),
        [
            job(
                PREPARE,
                **ended(
                    0,
                    prepared(
                        [PREPARE, TRAIN, EXPORT],
                        artifacts=(file(F16, GOOD), file(PASSED_Q4, BAD)),
                        **PUBLISHED,
                    ),
                ),
            )
        ],
        Plan(
            let_pass(
                WARNED,
                artifacts=(shown(F16, GOOD), shown(PASSED_Q4, BAD)),
                metrics={},
                lineage=FINISHED["lineage"].model_copy(update={"image": None}),
            ).model_copy(
                update={
                    "stages": (
                        succeeded(PREPARE, fingerprint="prepare-a"),
                        cached(TRAIN, "train-a"),
                        cached(EXPORT, "export-a"),
                    )
                }
            ),
            events=(
                finished(PREPARE),
                was_cached(TRAIN),
                was_cached(EXPORT),
                normal("Succeeded", f"{DONE_MESSAGE}{WARNED}"),
            ),
        ),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan


def test_a_long_list_of_files_keeps_the_message_within_its_limit() -> None:
    files = tuple(file(f"gguf/model-{n}.gguf", BAD) for n in range(40))
    made = decide(Case("", finetunejob(EXPORTING), [exports(*files)], Plan(EXPORTING)))
    ready = made.status.conditions[0]
    assert ready.status == "True"
    assert len(ready.message) <= 1024
    assert ready.message.startswith(DONE_MESSAGE)
