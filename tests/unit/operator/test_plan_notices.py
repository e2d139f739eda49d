"""The plan when the training has something to say of itself, and when `prepare` counts rows."""

from __future__ import annotations

import pytest

from finetune_operator.api.observed import FineTuneJobStatus, Phase
from finetune_operator.observe import ObservedFineTuneJob, ObservedJob, ReportedProgress
from finetune_operator.plan import Event, Plan, Policy, plan
from finetune_operator.plan.results import NOTICES_LIMIT
from finetune_trainer.contract import (
    BadRow,
    DatasetSummary,
    Notice,
    NoticeCode,
    Reason,
    TrainingPlan,
)
from tests.unit.operator.build import (
    ALL_DONE,
    DONE_MESSAGE,
    EXPORT,
    FINE,
    FINISHED,
    NOT_YET,
    NOW,
    PREPARE,
    SETTINGS,
    TRAIN,
    conditions,
    dead,
    ended,
    exported,
    failing,
    finetunejob,
    finished_status,
    job,
    pending,
    prepared,
    resolved,
    running,
    said,
    status,
    succeeded,
)
from tests.unit.operator.edits import (
    NEW_TRAIN,
    PREPARED,
    START_NEW_TRAIN,
    TRAINED,
    answer,
    preparing,
    training_anew,
    working,
)
from tests.unit.operator.endings import DONE, LAST, NOTHING_YET, PREPARING, training
from tests.unit.operator.expect import (
    Case,
    decide,
    finished,
    normal,
    start,
    started,
    unchanged,
    warning,
)

RISING = Notice(
    code=NoticeCode.LOSS_RISING, step=40, evidence="loss 1.2, then 3.4", remedy="Lower it."
)
HALVED = Notice(
    code=NoticeCode.BATCH_HALVED, step=3, evidence="CUDA ran out.", remedy="batchSize 1 now."
)
RESUMED = Notice(code=NoticeCode.RESUMED, evidence="checkpoint of step 30", remedy="Nothing.")
READ_AGAIN = Notice(
    code=NoticeCode.MODEL_READ_AGAIN, evidence="the export takes 3 h, not 1 h", remedy="Wait."
)
SAID_READ_AGAIN = Event("Normal", "ModelReadAgain", "the export takes 3 h, not 1 h. Wait.")
SAID_RISING = Event("Warning", "LossRising", "step 40: loss 1.2, then 3.4. Lower it.")
SAID_HALVED = Event("Warning", "BatchHalved", "step 3: CUDA ran out. batchSize 1 now.")
SAID_RESUMED = Event("Normal", "Resumed", "checkpoint of step 30. Nothing.")
ROWS = DatasetSummary(rows=120, examples=114, eval_examples=6, tokens=5000)
BAD_ROWS = DatasetSummary(rows=120, invalid=2, first_invalid=(BadRow(row=7, cause="no response"),))


def reports(*notices: Notice, finetunejob: str = "train-1") -> ReportedProgress:
    return ReportedProgress(finetunejob, notices)


def noticed(*notices: Notice, warned: str = "") -> FineTuneJobStatus:
    """`train` runs, and status holds these."""
    hint = f" The training warned of {warned}: see status.notices." if warned else ""
    told = conditions(
        ready=(False, "Training", NOT_YET),
        progressing=(True, "Training", f"train is at work, attempt 1.{hint}"),
        degraded=FINE,
    )
    return training().model_copy(update={"notices": notices, "conditions": told})


def failed_training(*notices: Notice) -> FineTuneJobStatus:
    given: FineTuneJobStatus = status(
        Phase.FAILED,
        TRAIN,
        DONE,
        failing(TRAIN, Reason.TRAINING_DIVERGED, "loss is nan", fingerprint="train-a"),
        LAST,
        resolved=resolved(),
        conditions=dead(Reason.TRAINING_DIVERGED, "loss is nan"),
        notices=notices,
    )
    return given


def bad_rows(summary: DatasetSummary | None, reason: Reason = Reason.INVALID_ROWS) -> Plan:
    return Plan(
        status(
            Phase.FAILED,
            PREPARE,
            failing(PREPARE, reason, "2 rows"),
            *NOTHING_YET,
            conditions=dead(reason, "2 rows"),
            dataset=summary,
        ),
        events=(warning(reason, "2 rows"),),
    )


def exporting(*notices: Notice) -> FineTuneJobStatus:
    given: FineTuneJobStatus = status(
        Phase.EXPORTING,
        EXPORT,
        *ALL_DONE[:2],
        running(EXPORT, fingerprint="export-a"),
        resolved=resolved(),
        metrics=FINISHED["metrics"],
        notices=notices,
    )
    return given


CASES = [
    Case(
        "what an export says of its time stands beside what the training said",
        finetunejob(exporting(RISING), reported=reports(READ_AGAIN, finetunejob="export-1")),
        [job(EXPORT)],
        Plan(exporting(RISING, READ_AGAIN), notices=(SAID_READ_AGAIN,)),
    ),
    Case(
        "a live notice is an Event, stands in status, and is hinted at",
        finetunejob(training(), reported=reports(RISING)),
        [job(TRAIN)],
        Plan(noticed(RISING, warned="LossRising"), notices=(SAID_RISING,)),
    ),
    Case(
        "what is no warning needs no hint",
        finetunejob(training(), reported=reports(RESUMED)),
        [job(TRAIN)],
        Plan(noticed(RESUMED), notices=(SAID_RESUMED,)),
    ),
    Case(
        "a notice that status holds already is not announced again",
        finetunejob(noticed(RISING, warned="LossRising"), reported=reports(RISING)),
        [job(TRAIN)],
        unchanged(noticed(RISING, warned="LossRising")),
    ),
    Case(
        "only what is new is announced, and each code is hinted at once",
        finetunejob(
            noticed(RISING, warned="LossRising"),
            reported=reports(
                RISING, RISING.model_copy(update={"step": 80}), HALVED, RESUMED, RESUMED
            ),
        ),
        [job(TRAIN)],
        Plan(
            noticed(
                RISING,
                RISING.model_copy(update={"step": 80}),
                HALVED,
                RESUMED,
                warned="LossRising, BatchHalved",
            ),
            notices=(
                Event(
                    "Warning",
                    "LossRising",
                    "step 80: loss 1.2, then 3.4. Lower it.",
                ),
                SAID_HALVED,
                SAID_RESUMED,
            ),
        ),
    ),
    Case(
        "a notice that the trainer no longer lists stays in status",
        finetunejob(noticed(RISING, warned="LossRising"), reported=reports()),
        [job(TRAIN)],
        unchanged(noticed(RISING, warned="LossRising")),
    ),
    Case(
        "the notices of another training, which stand until this one reports, are not this one's",
        finetunejob(
            training(), reported=reports(RISING, finetunejob="train-of-another-fingerprint")
        ),
        [job(TRAIN)],
        unchanged(training()),
    ),
    Case(
        "an earlier attempt at the same training counts",
        finetunejob(training(attempt=2), reported=reports(RISING)),
        [job(TRAIN, **ended(14)), job(TRAIN, 2)],
        Plan(
            training(attempt=2).model_copy(
                update={
                    "notices": (RISING,),
                    "conditions": conditions(
                        ready=(False, "Training", NOT_YET),
                        progressing=(
                            True,
                            "Training",
                            "train is at work, attempt 2. "
                            "The training warned of LossRising: see status.notices.",
                        ),
                        degraded=FINE,
                    ),
                }
            ),
            notices=(SAID_RISING,),
        ),
    ),
    Case(
        "the last word of a training that failed counts as well, and it is not tried again",
        finetunejob(noticed(RISING, warned="LossRising")),
        [
            job(
                TRAIN,
                **ended(
                    11,
                    said(
                        TRAIN,
                        Reason.TRAINING_DIVERGED,
                        message="loss is nan",
                        notices=(RISING, HALVED),
                    ),
                ),
            )
        ],
        Plan(
            failed_training(RISING, HALVED),
            events=(warning(Reason.TRAINING_DIVERGED, "loss is nan"),),
            notices=(SAID_HALVED,),
        ),
    ),
    Case(
        "a training that warned and succeeded is not degraded",
        finetunejob(
            status(
                Phase.EXPORTING,
                EXPORT,
                *ALL_DONE[:2],
                running(EXPORT, fingerprint="export-a"),
                resolved=resolved(),
                metrics=FINISHED["metrics"],
                notices=(RISING, RESUMED),
            )
        ),
        [job(EXPORT, **ended(0, exported()))],
        Plan(
            finished_status(
                *ALL_DONE[:2],
                succeeded(EXPORT, since=0, fingerprint="export-a"),
                notices=(RISING, RESUMED),
            ).model_copy(
                update={
                    "conditions": conditions(
                        ready=(
                            True,
                            "Succeeded",
                            f"{DONE_MESSAGE} The training warned of LossRising: "
                            "see status.notices.",
                        ),
                        progressing=(False, "Succeeded", "There is nothing to do."),
                        degraded=FINE,
                    )
                }
            ),
            events=(
                finished(EXPORT),
                normal(
                    "Succeeded",
                    f"{DONE_MESSAGE} The training warned of LossRising: see status.notices.",
                ),
            ),
        ),
    ),
    Case(
        "the training of another fingerprint begins with no notices",
        finetunejob(
            preparing(TRAINED, pending(EXPORT, fingerprint="export-a"), notices=(RISING,)),
            generation=2,
            reported=reports(RISING),
        ),
        [answer([PREPARE], NEW_TRAIN), job(TRAIN, **ended(0, said(TRAIN, notices=(RISING,))))],
        Plan(
            training_anew(metrics={}),
            (START_NEW_TRAIN,),
            (finished(PREPARE), started(TRAIN)),
        ),
    ),
    Case(
        "an edit that leaves the training as it is keeps its notices",
        finetunejob(
            preparing(TRAINED, pending(EXPORT, fingerprint="export-a"), notices=(RISING,)),
            generation=2,
        ),
        [answer([PREPARE, TRAIN], resolved(export="export-b"))],
        Plan(
            working(
                Phase.EXPORTING,
                EXPORT,
                PREPARED,
                TRAINED,
                running(EXPORT, fingerprint="export-b"),
                resolved=resolved(export="export-b"),
                notices=(RISING,),
            ),
            (start(EXPORT, found=resolved(export="export-b"), key="export-b"),),
            (finished(PREPARE), started(EXPORT)),
        ),
    ),
    Case(
        "what prepare counted is shown",
        finetunejob(PREPARING),
        [job(PREPARE, **ended(0, prepared(dataset=ROWS)))],
        Plan(
            status(
                Phase.TRAINING,
                TRAIN,
                succeeded(PREPARE, fingerprint="prepare-a"),
                running(TRAIN, fingerprint="train-a"),
                LAST,
                resolved=resolved(),
                dataset=ROWS,
            ),
            (start(TRAIN),),
            (finished(PREPARE), started(TRAIN)),
        ),
    ),
    Case(
        "bad rows that made prepare fail are shown",
        finetunejob(PREPARING),
        [
            job(
                PREPARE,
                **ended(10, said(PREPARE, Reason.INVALID_ROWS, message="2 rows", dataset=BAD_ROWS)),
            )
        ],
        bad_rows(BAD_ROWS),
    ),
    Case(
        "a prepare that fails for another reason says nothing of the dataset any more",
        finetunejob(PREPARING.model_copy(update={"dataset": ROWS})),
        [job(PREPARE, **ended(11, said(PREPARE, Reason.MODEL_NOT_FOUND, message="2 rows")))],
        bad_rows(None, Reason.MODEL_NOT_FOUND),
    ),
    Case(
        "while prepare runs, what the last one counted stays in sight",
        finetunejob(PREPARING.model_copy(update={"dataset": ROWS})),
        [job(PREPARE)],
        unchanged(PREPARING.model_copy(update={"dataset": ROWS})),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    made = decide(case)
    assert made == case.plan
    assert {each.scope for each in made.notices} <= {"train-a"}


def decided(given: ObservedFineTuneJob, *jobs: ObservedJob) -> Plan:
    return plan(given, jobs, SETTINGS, Policy(), NOW)


def test_a_flood_of_notices_is_cut() -> None:
    flood = tuple(RISING.model_copy(update={"step": step}) for step in range(NOTICES_LIMIT + 5))
    given = decided(finetunejob(training(), reported=reports(*flood)), job(TRAIN))
    assert given.status.notices == flood[:NOTICES_LIMIT]
    assert len(given.notices) == NOTICES_LIMIT
    again = finetunejob(given.status, reported=reports(*flood[-20:]))
    assert decided(again, job(TRAIN)) == unchanged(given.status)


def test_another_plan_for_other_hardware_leaves_a_running_training_alone() -> None:
    # Say, the GPU's memory was learnt from a node that came in the meantime.
    split = TrainingPlan(batch_size=8, gradient_accumulation_steps=1, gradient_checkpointing=False)
    other = resolved().model_copy(update={"plan": split})
    given = finetunejob(preparing(running(TRAIN, fingerprint="train-a"), LAST), generation=2)
    made = decided(given, answer([PREPARE], other), job(TRAIN))
    assert made.actions == ()
    assert made.status.resolved == other
    assert made.status.stages[1] == running(TRAIN, fingerprint="train-a")
