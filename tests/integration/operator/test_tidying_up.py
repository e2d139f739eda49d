"""Deleting a FineTuneJob leaves nothing behind, whatever it was at.

The garbage collector takes its time to learn of a new kind, so this comes late in the run.
"""

from __future__ import annotations

from finetune_trainer.contract import Stage
from tests.integration.operator.stage import CHILDREN, Namespace, prepared

WITHOUT_FINALIZERS = {"metadata": {"finalizers": None}}


def test_deleting_leaves_nothing_behind(here: Namespace) -> None:
    here.run_all()
    assert all(here.children(resource) for resource in CHILDREN)
    here.delete()
    here.wait_until_nothing_is_left()


def test_deleting_during_training_stops_it(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    here.start_pod(Stage.TRAIN)
    here.delete()
    here.wait_until_nothing_is_left()


def test_a_stage_waits_until_its_job_of_an_earlier_finetunejob_is_gone(here: Namespace) -> None:
    """The earlier one was deleted just before the operator created the Job."""
    here.apply()
    here.wait("its Job", lambda: here.jobs() == [("prepare", 1)])
    (job,) = here.children("jobs")
    here.delete()
    here.wait_until_nothing_is_left()
    meta = job["metadata"]
    pod = {**job["spec"]["template"], "metadata": {"labels": {"name": "late"}}}
    known = ("labels", "annotations", "ownerReferences")
    late = {
        "metadata": {
            "name": "late",
            "finalizers": ["test.finetune.dev/hold"],
            **{key: meta[key] for key in known},
        },
        "spec": {"template": pod, "suspend": True},
    }
    here.create("/apis/batch/v1", "jobs", late)
    here.apply()
    here.apply(name="another")  # when this one is at work, the first one has been looked at
    here.wait("the other's Job", lambda: names(here) == {"late", "another"})
    here.merge_patch(f"/apis/batch/v1/namespaces/{here.name}/jobs/late", WITHOUT_FINALIZERS)
    here.wait("the new one's Job", lambda: names(here) == {"support", "another"})


def names(here: Namespace) -> set[str]:
    """What the Jobs' names begin with."""
    return {each["metadata"]["name"].split("-")[0] for each in here.children("jobs")}
