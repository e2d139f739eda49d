"""One FineTuneJob on the real API server, and the test in the part of the kubelet."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import uuid4

import httpx

from finetune_trainer.contract import Artifact, Fingerprints, Reason, Resolved, Stage, StageResult
from hack.cluster.control_plane import ControlPlane

# More than any step takes. The garbage collector, which also stops the pods of a deleted Job, looks
# for new kinds every 30 seconds, and pauses meanwhile.
SECONDS = 90
FOLDER = "s3://models/support"
EXPORTED_VERSION = "0123456789ab"
VERSION_FOLDER = f"{FOLDER}/versions/{EXPORTED_VERSION}"
MANIFEST_URI = f"{VERSION_FOLDER}/manifest.json"
SPEC: dict[str, Any] = {
    "model": {"source": "org/base"},
    "dataset": {"source": "s3://data/faq.csv"},
    "output": {"uri": FOLDER},
}
CHILDREN = {
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "configmaps": "/api/v1",
    "serviceaccounts": "/api/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
}
MANAGED = "app.kubernetes.io/managed-by=finetune-operator"

Raw = dict[str, Any]


@contextmanager
def new_namespace(plane: ControlPlane) -> Iterator[Namespace]:
    """An empty namespace, which is deleted at the end."""
    namespace = Namespace(plane, f"test-{uuid4().hex[:8]}")
    plane.kubectl("create", "namespace", namespace.name)
    yield namespace
    namespace.close()
    plane.kubectl("delete", "namespace", namespace.name, "--wait=false")


class Namespace:
    """A namespace with one FineTuneJob named `support`, seen with the administrator's eyes."""

    def __init__(self, plane: ControlPlane, name: str) -> None:
        self.plane = plane
        self.name = name
        self._http = httpx.Client(
            base_url=plane.server,
            verify=ssl.create_default_context(cafile=str(plane.ca)),
            headers={"Authorization": f"Bearer {plane.admin_token}"},
            trust_env=False,
            timeout=10,
        )

    def close(self) -> None:
        self._http.close()

    # The user

    def apply(self, name: str = "support", **spec: Any) -> None:
        """What `kubectl apply` does: create, or replace the spec."""
        body = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self.name},
            "spec": {**SPEC, **spec},
        }
        answer = self._http.post(self._path("finetunejobs"), json=body)
        while answer.status_code == httpx.codes.CONFLICT:  # it exists, or its status has changed
            current = self._get(self._path("finetunejobs", name))
            body["metadata"] = current["metadata"]
            answer = self._http.put(self._path("finetunejobs", name), json=body)
        assert answer.is_success, answer.text

    def refusal(self, **spec: Any) -> str:
        """What the API server says against a spec, or nothing; it creates nothing."""
        body = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "refused", "namespace": self.name},
            "spec": {**SPEC, **spec},
        }
        answer = self._http.post(self._path("finetunejobs"), json=body, params={"dryRun": "All"})
        return "" if answer.is_success else str(answer.json()["message"])

    def delete(self) -> None:
        answer = self._http.delete(self._path("finetunejobs", "support"))
        assert answer.is_success, answer.text

    def create(self, api: str, resource: str, body: Raw, times: int = 1) -> None:
        """Create an object so many times; it has a `generateName` then."""
        for _ in range(times):
            answer = self._http.post(f"{api}/namespaces/{self.name}/{resource}", json=body)
            assert answer.is_success, answer.text

    # What is there

    def status(self) -> Raw:
        found = self._get(self._path("finetunejobs", "support"))
        status: Raw = found.get("status") or {}
        return {**status, "generation": found["metadata"]["generation"]}

    def spec(self) -> Raw:
        found: Raw = self._get(self._path("finetunejobs", "support"))["spec"]
        return found

    def stage(self, stage: Stage) -> Raw:
        """What status says of a stage."""
        stages: list[Raw] = self.status().get("stages") or [{}, {}, {}]
        return dict(zip(Stage, stages, strict=True))[stage]

    def condition(self, kind: str) -> tuple[str, str, str]:
        """Status, reason and message of a condition."""
        for condition in self.status().get("conditions") or []:
            if condition["type"] == kind:
                return condition["status"], condition["reason"], condition["message"]
        return "", "", ""

    def children(self, resource: str) -> list[Raw]:
        """Objects of a resource that bear the operator's label."""
        path = f"{CHILDREN[resource]}/namespaces/{self.name}/{resource}"
        items: list[Raw] = self._get(path, labelSelector=MANAGED)["items"]
        return items

    def jobs(self) -> list[tuple[str, int]]:
        """Stage and attempt of the Jobs that are there and not being deleted."""
        jobs = [job["metadata"] for job in self.children("jobs")]
        names = [meta["labels"] for meta in jobs if "deletionTimestamp" not in meta]
        found = [(each["finetune.dev/stage"], int(each["finetune.dev/attempt"])) for each in names]
        return sorted(found, key=lambda each: (list(Stage).index(Stage(each[0])), each[1]))

    def events(self) -> list[tuple[str, str]]:
        """Type and reason of the Events about the FineTuneJob."""
        return [(each["type"], each["reason"]) for each in self.whole_events()]

    def times_told(self, message: str) -> int:
        """How many Events say this."""
        return [each["message"] for each in self.whole_events()].count(message)

    def whole_events(self) -> list[Raw]:
        """The Events about the FineTuneJob."""
        items = self._get(f"/api/v1/namespaces/{self.name}/events")["items"]
        return [each for each in items if each["involvedObject"]["kind"] == "FineTuneJob"]

    def wait(self, what: str, happened: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """Wait until something is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := happened()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self._describe()}")
            time.sleep(0.1)
        return found

    def wait_until_nothing_is_left(self) -> None:
        """Wait until the garbage collector has removed all children."""
        for resource in CHILDREN:
            gone = partial(self._none, resource)
            self.wait(f"no {resource}", gone)

    def wait_phase(self, phase: str, seconds: float = SECONDS) -> Raw:
        """Wait until the present spec has led to a phase; the status then."""

        def reached() -> Raw | None:
            status = self.status()
            current = status.get("observedGeneration") == status["generation"]
            return status if current and status.get("phase") == phase else None

        found: Raw = self.wait(f"phase {phase}", reached, seconds)
        return found

    # The trainer

    def report(self, pod: Raw, **progress: Any) -> None:
        """What a trainer does to show how far it is."""
        job = pod["metadata"]["ownerReferences"][0]["name"]
        told = {"stage": "train", "job": job, **progress}
        path = f"{self._path('finetunejobs', 'support')}/status"
        self.merge_patch(path, {"status": {"progress": told}})

    def delete_pod(self, pod: Raw) -> None:
        """What `kubectl delete pod` does: the pod is told to stop, and has its grace period."""
        path = f"/api/v1/namespaces/{self.name}/pods/{pod['metadata']['name']}"
        answer = self._http.delete(path)
        assert answer.is_success, answer.text

    # The kubelet

    def bind(self, pod: Raw, node: str) -> None:
        """Put a pod on a node. From then on it vanishes only when it has stopped."""
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        path = f"/api/v1/namespaces/{self.name}/pods/{pod['metadata']['name']}/binding"
        answer = self._http.post(path, json=body)
        assert answer.is_success, answer.text

    def remove_pod(self, pod: Raw) -> None:
        """What the kubelet does when a pod that is being deleted has stopped."""
        path = f"/api/v1/namespaces/{self.name}/pods/{pod['metadata']['name']}"
        answer = self._http.delete(path, params={"gracePeriodSeconds": "0"})
        assert answer.is_success, answer.text

    def pod(self, stage: Stage, attempt: int = 1) -> Raw:
        """The live pod of an attempt, as soon as the Job's controller has made it."""

        def find() -> Raw | None:
            for pod in self.children("pods"):
                known, phase = pod["metadata"]["labels"], pod["status"].get("phase")
                mine = (str(stage), str(attempt)) == (
                    known["finetune.dev/stage"],
                    known["finetune.dev/attempt"],
                )
                alive = phase not in ("Succeeded", "Failed")
                if mine and alive and "deletionTimestamp" not in pod["metadata"]:
                    return pod
            return None

        found: Raw = self.wait(f"a pod of {stage}, attempt {attempt}", find)
        return found

    def another_pod(self, stage: Stage, than: Raw) -> Raw:
        """The pod of a stage that follows after another one, of whichever attempt."""

        def find() -> Raw | None:
            for pod in self.children("pods"):
                meta = pod["metadata"]
                mine = meta["labels"]["finetune.dev/stage"] == str(stage)
                if mine and meta["uid"] != than["metadata"]["uid"]:
                    return pod
            return None

        found: Raw = self.wait(f"another pod of {stage}", find)
        return found

    def set_pod(self, pod: Raw, phase: str, state: Raw | None = None, **status: Any) -> None:
        """Write a pod's status."""
        container = {
            "name": "trainer",
            "image": "trainer:test",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": state or {},
        }
        patch = {
            "phase": phase,
            "startTime": _now(),
            **({"containerStatuses": [container]} if state else {}),
            **status,
        }
        name = pod["metadata"]["name"]
        path = f"/api/v1/namespaces/{self.name}/pods/{name}/status"
        self.merge_patch(path, {"status": patch})

    def tell(self, pod: Raw, reason: str, message: str) -> None:
        """Record an Event about a pod, as its kubelet does."""
        meta = pod["metadata"]
        about = {"kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        event = {
            "metadata": {"generateName": f"{meta['name']}."},
            "involvedObject": {"apiVersion": "v1", "namespace": self.name, **about},
            "reason": reason,
            "message": message,
            "type": "Warning",
            "firstTimestamp": _now(),
            "lastTimestamp": _now(),
        }
        self.create("/api/v1", "events", event)

    def start_pod(self, stage: Stage, attempt: int = 1) -> Raw:
        """Let the pod of a stage run."""
        pod = self.pod(stage, attempt)
        self.set_pod(pod, "Running", {"running": {"startedAt": _now()}})
        return pod

    def end_pod(
        self, stage: Stage, code: int = 0, message: str | bytes = "", attempt: int = 1
    ) -> None:
        """Let the pod of a stage end."""
        text = message.decode() if isinstance(message, bytes) else message
        state = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": text,
            "startedAt": _now(),
            "finishedAt": _now(),
        }
        phase = "Failed" if code else "Succeeded"
        self.set_pod(self.pod(stage, attempt), phase, {"terminated": state})

    def succeed(self, result: StageResult, attempt: int = 1) -> None:
        """Let the pod of a stage end well."""
        self.end_pod(result.stage, 0, result.to_message(), attempt)

    def fail(
        self, stage: Stage, reason: Reason, message: str, attempt: int = 1, **fields: Any
    ) -> None:
        """Let the pod of a stage end as the trainer does when it gives up."""
        result = StageResult(stage=stage, reason=reason, message=message, **fields)
        self.end_pod(stage, int(reason.exit_code), result.to_message(), attempt)

    def run_all(self) -> Raw:
        """Apply, and let all three stages succeed."""
        self.apply()
        self.succeed(prepared())
        self.succeed(trained())
        self.succeed(exported())
        return self.wait_phase("Succeeded")

    def merge_patch(self, path: str, patch: Raw, token: str | None = None) -> httpx.Response:
        """Patch, as the administrator or with another token."""
        headers = {"Content-Type": "application/merge-patch+json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        answer = self._http.patch(path, json=patch, headers=headers)
        assert token or answer.is_success, answer.text
        return answer

    def _none(self, resource: str) -> bool:
        return not self.children(resource)

    def _describe(self) -> str:
        """For the message of a test that fails."""
        return self.plane.kubectl("get", "ftj,jobs,pods", "-n", self.name, "-o", "yaml")

    def _path(self, resource: str, name: str = "") -> str:
        base = f"/apis/finetune.dev/v1alpha1/namespaces/{self.name}/{resource}"
        return f"{base}/{name}" if name else base

    def _get(self, path: str, **query: str) -> Raw:
        answer = self._http.get(path, params=query)
        assert answer.is_success, answer.text
        found: Raw = answer.json()
        return found


def resolved(train: str = "train-a", export: str = "export-a") -> Resolved:
    return Resolved(
        fingerprints=Fingerprints(prepare="prepare-a", train=train, export=export),
        dataset_etag="etag",
        dataset_rows=120,
        eval_rows=6,
        model_revision="abc",
    )


def prepared(*complete: Stage, found: Resolved | None = None) -> StageResult:
    """What `prepare` says when all is well."""
    artifacts = exported() if Stage.EXPORT in complete else None
    return StageResult(
        stage=Stage.PREPARE,
        reason=Reason.SUCCEEDED,
        message="120 examples",
        resolved=found or resolved(),
        complete=complete,
        artifacts=artifacts.artifacts if artifacts else (),
        version=artifacts.version if artifacts else None,
        manifest_uri=artifacts.manifest_uri if artifacts else None,
    )


def trained(**fields: Any) -> StageResult:
    return StageResult(
        stage=Stage.TRAIN,
        reason=Reason.SUCCEEDED,
        message="45 steps",
        metrics={"trainLoss": 0.5},
        **fields,
    )


def exported() -> StageResult:
    return StageResult(
        stage=Stage.EXPORT,
        reason=Reason.SUCCEEDED,
        message="1 file",
        artifacts=(Artifact(path="gguf/model-F16.gguf", bytes=10, sha256="aa"),),
        version=EXPORTED_VERSION,
        manifest_uri=MANIFEST_URI,
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
