"""Status explains itself: why each stage ran or didn't have to, and what made its result stale."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.api.observed import FineTuneJobStatus, PlannedStatus, StageState
from finetune_operator.plan import Policy, plan
from finetune_operator.plan.why import DIRECT, OF_NO_RESULT, OF_THE_EXAMPLES, OF_THE_MODEL
from finetune_trainer.contract import Reason, Resolved, Stage
from hack import stage_table
from tests.unit.operator.build import (
    EXPORT,
    PREPARE,
    SETTINGS,
    TRAIN,
    at,
    ended,
    exported,
    finetunejob,
    job,
    prepared,
    resolved,
    said,
    spec,
)

NO_CHANGE = "Nothing that it depends on has changed."
CHANGED = "What it depends on has changed."
STORED = "The object store holds its result."
Told = dict[Stage, tuple[str | None, tuple[str, ...]]]


class Life:
    """One FineTuneJob through its generations, as the operator goes on from its own status."""

    def __init__(self) -> None:
        self.status = FineTuneJobStatus()
        self.generation = 0
        self.spec = spec()

    def edit(self, **fields: Any) -> None:
        self.generation += 1
        self.spec = spec(**fields)
        self._pass()

    def prepare(self, found: Resolved, *complete: Stage, examples: str | None = "e1") -> None:
        """`prepare` ends with this."""
        planned = self.status.planned
        assert planned is not None
        answer = prepared(complete, found.model_copy(update={"examples": examples}))
        self._pass(job(PREPARE, key=planned.prepare_key, **ended(0, answer)))

    def fail(self) -> None:
        planned = self.status.planned
        assert planned is not None
        bad = said(PREPARE, Reason.DATASET_EMPTY, message="no rows")
        self._pass(job(PREPARE, key=planned.prepare_key, **ended(10, bad)))

    def finish(self) -> None:
        """What is left of train and export ends well."""
        for stage, result in ((TRAIN, said(TRAIN)), (EXPORT, exported())):
            status = self.status.stages[list(Stage).index(stage)]
            if status.state is StageState.RUNNING:
                key = status.fingerprint
                self._pass(job(stage, status.attempt, key=key, **ended(0, result)))

    def told(self) -> Told:
        return {each.name: (each.why, each.stale_because) for each in self.status.stages}

    def _pass(self, *jobs: Any) -> None:
        given = finetunejob(self.status, generation=self.generation, spec=self.spec)
        now = at(3600 * self.generation)  # an edit an hour
        self.status = plan(given, jobs, SETTINGS, Policy(), now).status


@pytest.fixture
def life() -> Life:
    """A finished model."""
    made = Life()
    made.edit()
    made.prepare(resolved())
    made.finish()
    return made


def test_a_new_job_has_no_results_yet(life: Life) -> None:
    assert life.told() == {
        PREPARE: ("It is the first look at dataset and model.", ()),
        TRAIN: ("There is no result yet.", ()),
        EXPORT: ("There is no result yet.", ()),
    }


def test_a_job_that_is_created_anew_finds_everything_in_the_store() -> None:
    life = Life()
    life.edit()
    life.prepare(resolved(), PREPARE, TRAIN, EXPORT)
    assert life.told()[TRAIN] == life.told()[EXPORT] == (STORED, ())


def test_more_epochs_are_named_with_both_values(life: Life) -> None:
    life.edit(training={"epochs": 4})
    epochs = ("spec.training.epochs: 3 → 4",)
    assert life.told()[PREPARE] == ("The spec has changed.", epochs)
    life.prepare(resolved("train-b", "export-b"), PREPARE)
    assert life.told()[TRAIN] == (CHANGED, epochs)
    assert life.told()[EXPORT] == (CHANGED, ("train: another training",))
    life.finish()
    assert life.told()[TRAIN] == (CHANGED, epochs), "it stays said when it is done"


def test_another_quantization_is_of_no_interest_to_the_training(life: Life) -> None:
    life.edit(export={"gguf": ["F16"]}, training={"loggingSteps": 5})
    life.prepare(resolved("train-a", "export-b"), PREPARE, TRAIN)
    assert life.told()[TRAIN] == (NO_CHANGE, ())
    assert life.told()[EXPORT] == (
        CHANGED,
        ('spec.export.gguf: ["F16", "Q8_0", "Q4_K_M"] → ["F16"]',),
    )


def test_new_data_under_the_same_name_is_told_by_its_etag(life: Life) -> None:
    life.edit(training={"epochs": 3, "seed": 42}, dataset={"source": "s3://data/new.csv"})
    found = resolved("train-b", "export-b").model_copy(update={"dataset_etag": "etag-2"})
    life.prepare(found, examples="e2")
    assert life.told()[TRAIN] == (
        CHANGED,
        (
            "spec.dataset.source: s3://data/faq.csv → s3://data/new.csv",
            "dataset: ETag etag → etag-2",
        ),
    )


def test_a_file_with_the_same_rows_is_no_reason_to_train(life: Life) -> None:
    life.edit(training={"epochs": 4}, dataset={"source": "s3://data/copy.csv"})
    found = resolved("train-b", "export-b").model_copy(update={"dataset_etag": "etag-2"})
    life.prepare(found)
    assert life.told()[TRAIN][1] == ("spec.training.epochs: 3 → 4",)


def test_a_model_that_moved_is_told_by_its_revision(life: Life) -> None:
    life.edit(model={"source": "org/base", "revision": "v2"})
    life.prepare(resolved("train-b", "export-b").model_copy(update={"model_revision": "def"}))
    assert life.told()[TRAIN][1] == (
        "spec.model.revision: main → v2",
        "model: revision abc → def",
    )


def test_the_same_batch_in_other_parts_is_not_named(life: Life) -> None:
    life.edit(training={"batchSize": 4, "gradientAccumulationSteps": 2, "epochs": 4})
    life.prepare(resolved("train-b", "export-b"))
    assert life.told()[TRAIN][1] == ("spec.training.epochs: 3 → 4",)
    life.edit(training={"batchSize": 8, "gradientAccumulationSteps": 2, "epochs": 4})
    life.prepare(resolved("train-c", "export-c"))
    assert life.told()[TRAIN][1] == ("spec.training.batchSize: 4 → 8",)


def test_an_edit_that_goes_back_says_so_beside_the_cached_result(life: Life) -> None:
    life.edit(training={"epochs": 4})
    life.prepare(resolved("train-b", "export-b"))
    life.finish()
    life.edit()
    life.prepare(resolved(), PREPARE, TRAIN, EXPORT)
    assert life.told()[TRAIN] == (STORED, ("spec.training.epochs: 4 → 3",))


def test_what_changed_is_told_across_a_spec_that_could_not_be_reached(life: Life) -> None:
    life.edit(training={"epochs": 4}, dataset={"source": "s3://data/empty.csv"})
    life.fail()
    life.edit(training={"epochs": 4})
    assert life.told()[PREPARE] == ("The spec has changed.", ("spec.training.epochs: 3 → 4",))
    life.prepare(resolved("train-b", "export-b"))
    assert life.told()[TRAIN][1] == ("spec.training.epochs: 3 → 4",)


def test_an_edit_after_a_failure_that_touches_nothing_makes_it_look_again(life: Life) -> None:
    life.edit(training={"epochs": 4})
    life.fail()
    life.spec = spec(training={"epochs": 4}, backoffLimit=3)
    life.edit(training={"epochs": 4}, backoffLimit=3)
    assert life.told()[PREPARE][1] == ("spec.training.epochs: 3 → 4",)


def test_a_result_that_is_gone_is_missed_by_name(life: Life) -> None:
    life.edit(output={"uri": "s3://models/elsewhere"})
    life.prepare(resolved())
    assert life.told()[TRAIN] == (
        "The object store doesn't hold all that the spec asks for.",
        ("spec.output.uri: s3://models/support → s3://models/elsewhere",),
    )


def test_another_recipe_is_named_when_nothing_else_differs(life: Life) -> None:
    life.edit(dataset={"source": "s3://data/copy.csv"})
    life.prepare(resolved("train-b", "export-b"))
    assert life.told()[TRAIN] == (CHANGED, ("another version of the trainer",))


def test_another_adapter_to_go_on_from_is_named(life: Life) -> None:
    life.edit(dataset={"source": "s3://data/copy.csv"})
    life.prepare(resolved("train-b", "export-b").model_copy(update={"init_revision": "sha256:b"}))
    assert life.told()[TRAIN] == (CHANGED, ("training.initFrom: another adapter",))


def test_a_status_of_before_names_no_field(life: Life) -> None:
    life.status = life.status.model_copy(update={"resolved_inputs": {}})
    life.edit(training={"epochs": 4})
    assert life.told()[PREPARE] == ("The spec has changed.", ())
    life.prepare(resolved("train-b", "export-b"))
    assert life.told()[TRAIN] == (CHANGED, ())


def test_long_values_are_cut_and_still_differ(life: Life) -> None:
    life.edit(dataset={"source": "s3://data/faq.csv", "systemPrompt": "a" * 500})
    life.prepare(resolved("train-b", "export-b"), examples="e2")
    first = life.status.resolved_inputs["dataset.systemPrompt"]
    assert len(first) < 70
    life.edit(dataset={"source": "s3://data/faq.csv", "systemPrompt": "a" * 499})
    (cause,) = life.told()[PREPARE][1]
    assert cause.startswith(f"spec.dataset.systemPrompt: {first} → aaa")


def test_many_causes_are_counted(life: Life) -> None:
    names = ("epochs", "batchSize", "gradientAccumulationSteps", "seed", "evalSteps")
    lora = {"r": 3, "alpha": 7, "dropout": 0.5, "useRslora": True, "useDora": True}
    more = {"learningRate": 0.5, "warmupRatio": 0.5, "weightDecay": 0.5, "scheduler": "cosine"}
    life.edit(training={**dict.fromkeys(names, 7), **more, "lora": lora})
    causes = life.told()[PREPARE][1]
    assert len(causes) == 12
    assert causes[-1] == "and 3 more"


def test_other_hardware_is_named(life: Life) -> None:
    life.status = life.status.model_copy(
        update={
            "planned": PlannedStatus(
                generation=1, inputs=life.spec.inputs_digest, hardware="another"
            ),
            "stages": (life.status.stages[0], *reset(life.status)),
        }
    )
    life.edit()
    assert life.told()[PREPARE] == ("The spec has changed.", ("spec.stages.train.resources",))


def reset(status: FineTuneJobStatus) -> list[Any]:
    """Train and export as they are before they run."""
    return [each.model_copy(update={"state": StageState.PENDING}) for each in status.stages[1:]]


COUNTS = {
    TRAIN: (*DIRECT[TRAIN], *OF_THE_MODEL, *OF_THE_EXAMPLES),
    EXPORT: DIRECT[EXPORT],
}


@pytest.mark.parametrize("field", list(stage_table.spec_fields()), ids=lambda field: field.path)
def test_each_field_that_reruns_a_stage_can_be_named(field: stage_table.SpecField) -> None:
    """As measured on the fingerprints."""
    cells = stage_table.row(field)
    named = {stage: field.path.startswith(starts) for stage, starts in COUNTS.items()}
    if field.path.startswith(tuple(OF_NO_RESULT)):
        named = dict.fromkeys(named, False)
    if cells[TRAIN] != stage_table.NO:
        assert named[TRAIN]
    elif field.path.startswith("training."):
        assert not named[TRAIN]
    if cells[EXPORT] != stage_table.NO:
        assert named[EXPORT] or named[TRAIN], "by itself, or by the training"
    elif not named[TRAIN]:
        assert not named[EXPORT] or "ecretRef" in field.path


def test_the_defaults_are_those_of_the_spec(life: Life) -> None:
    assert isinstance(life.spec, FineTuneJobSpec)
    life.edit(training={"lora": {"targetModules": ["q_proj"]}})
    assert life.told()[PREPARE][1] == (
        'spec.training.lora.targetModules: ["q_proj", "k_proj", "v_proj", "o_proj"] → ["q_proj"]',
    )
