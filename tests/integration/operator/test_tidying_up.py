"""Nothing is left behind by a FineTuneJob that is deleted, and little by one that is over.

The garbage collector takes its time to learn of a new kind, so this comes late in the run.
"""

from __future__ import annotations

from finetune_trainer.contract import Reason, Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from tests.integration.operator.stage import (
    CHILDREN,
    Namespace,
    exported,
    new_namespace,
    prepared,
    trained,
)

WITHOUT_FINALIZERS = {"metadata": {"finalizers": None}}
SUPPORTS = ("configmaps", "serviceaccounts", "roles", "rolebindings")


def supports(here: Namespace) -> set[str]:
    """What there is beside Jobs and pods."""
    return {each for each in SUPPORTS if here.children(each)}


def test_what_the_stages_needed_goes_with_the_last_one_and_an_edit_brings_it_back(
    here: Namespace,
) -> None:
    here.apply()
    first = here.pod(Stage.PREPARE)
    assert supports(here) == set(SUPPORTS)
    here.apply(suspend=True)
    here.wait_phase("Suspended")
    assert supports(here) == set(SUPPORTS), "it goes on later"
    here.apply()
    labels = here.another_pod(Stage.PREPARE, than=first)["metadata"]["labels"]
    here.succeed(prepared(), int(labels["finetune.dev/attempt"]))
    here.succeed(trained())
    here.succeed(exported())
    here.wait_phase("Succeeded")
    here.wait("nothing but Jobs and pods", lambda: not supports(here))
    assert here.jobs(), "the logs of their pods are worth a look"
    here.apply(training={"seed": 3})
    here.pod(Stage.PREPARE)
    assert supports(here) == set(SUPPORTS)
    here.fail(Stage.PREPARE, Reason.DATASET_EMPTY, "no rows")
    here.wait_phase("Failed")
    here.wait("nothing but Jobs and pods", lambda: not supports(here))


def test_a_new_operator_tidies_up_what_the_last_one_left(
    installed: ControlPlane, operator: Operator, mortal: Operator
) -> None:
    """It was killed between the last status and the deletions."""
    operator.stop()
    with new_namespace(installed) as here:
        here.run_all()
        here.wait("nothing but Jobs and pods", lambda: not supports(here))
        mortal.stop()
        job = here.children("jobs")[0]["metadata"]
        left = {key: job[key] for key in ("labels", "ownerReferences")} | {"name": "left"}
        others = {"labels": job["labels"], "name": "of-somebody-else"}
        for meta in (left, others):
            here.create("/api/v1", "configmaps", {"metadata": meta})
        operator.start()
        here.wait("one ConfigMap", lambda: names_of(here, "configmaps") == ["of-somebody-else"])


def names_of(here: Namespace, resource: str) -> list[str]:
    return sorted(each["metadata"]["name"] for each in here.children(resource))


def test_deleting_leaves_nothing_behind(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    here.pod(Stage.TRAIN)
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
