"""What kwok makes of nodes and pods: the kubelet's part, and the trainer's result.

A trainer's pod runs for a time and ends well, with the StageResult of its stage as its termination
message. Annotations of the pod change that. A FineTuneJob gives them to the pods of a stage by
`spec.stages.<stage>.annotations`; EXIT_NOW is for a pod that runs already. A pod that is deleted
goes on for its time to stop, as a trainer does that saves a checkpoint, and is gone then.
"""

from __future__ import annotations

from typing import Any

import yaml

from finetune_operator.api import ATTEMPT_LABEL, STAGE_LABEL, TRAINER_CONTAINER
from finetune_trainer.contract import (
    Artifact,
    Fingerprints,
    Reason,
    Resolved,
    Stage,
    StageResult,
)

PREFIX = "play.finetune.dev"
RUN_FOR = f"{PREFIX}/run-for"
"""How long the trainer works, such as 1500ms."""

STOP_FOR = f"{PREFIX}/stop-for"
"""How long it goes on when its pod is deleted, such as 3s."""

RESULT = f"{PREFIX}/result"
"""Its termination message when it ends well."""

EXIT_CODE = f"{PREFIX}/exit-code"
"""Its exit code; with `-2` appended, the one of the second attempt."""

FAILURE = f"{PREFIX}/failure"
"""Its termination message when the exit code isn't 0."""

EXIT_NOW = f"{PREFIX}/exit-now"
"""Set on a pod that runs: it ends at once, with this exit code."""

DEFAULT_RUN_MILLISECONDS = 1000
DEFAULT_STOP_MILLISECONDS = 1500
FAKE_NODE = "kwok.x-k8s.io/node"
"""Annotation of the nodes that kwok keeps alive. One that loses it is lost, with its pods."""

FOLDER = "s3://models/support"
VERSION = "0123456789ab"

Selector = list[dict[str, Any]]
Object = dict[str, Any]


def resolved(name: str = "a") -> Resolved:
    """What `prepare` finds; another name makes other fingerprints."""
    fingerprints = Fingerprints(
        prepare=f"prepare-{name}", train=f"train-{name}", export=f"export-{name}"
    )
    return Resolved(
        fingerprints=fingerprints,
        dataset_etag="etag",
        dataset_rows=120,
        eval_rows=6,
        model_revision="abc",
    )


def result(stage: Stage, name: str = "a", folder: str = FOLDER) -> StageResult:
    """What a stage says that has ended well."""
    match stage:
        case Stage.PREPARE:
            words: dict[str, Any] = {"message": "120 examples", "resolved": resolved(name)}
        case Stage.TRAIN:
            words = {"message": "45 steps", "metrics": {"trainLoss": 0.5}}
        case Stage.EXPORT:
            file = Artifact(path="gguf/model-F16.gguf", bytes=10, sha256="aa")
            manifest = f"{folder}/versions/{VERSION}/manifest.json"
            words = {"message": "1 file", "artifacts": (file,), "version": VERSION}
            words["manifest_uri"] = manifest
    return StageResult(stage=stage, reason=Reason.SUCCEEDED, **words)


def stopped(stage: Stage) -> StageResult:
    """What a stage says that was told to stop."""
    return StageResult(stage=stage, reason=Reason.STOPPED, message="Stopped when told to.")


def configuration() -> str:
    """kwok's configuration file."""
    return yaml.safe_dump_all([*_node_stages(), *_pod_stages()])


def _key(key: str, operator: str, *values: str) -> Object:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


def _annotation(name: str) -> str:
    return f'.metadata.annotations["{name}"]'


def _stage(name: str, kind: str, selector: Selector, next_: Object, **more: Any) -> Object:
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {"matchExpressions": selector},
            "next": next_,
            **more,
        },
    }


READY = '.status.conditions.[] | select( .type == "Ready" ) | .status'
LIVES = _key(".metadata.deletionTimestamp", "DoesNotExist")
IS_DELETED = _key(".metadata.deletionTimestamp", "Exists")
IN_JOB = _key(".metadata.ownerReferences.[].kind", "In", "Job")
RUNS = _key(".status.phase", "In", "Running")


def _node_stages() -> list[Object]:
    """A node becomes ready and, by its Lease, which kwok renews, stays so."""
    return [
        _stage("node-ready", "Node", [_key(READY, "NotIn", "True")], {"statusTemplate": NODE_READY})
    ]


def _pod_stages() -> list[Object]:
    """The life of a pod that the scheduler has bound to a node."""
    works = [LIVES, RUNS, IN_JOB]
    begins = [LIVES, _key(".status.phase", "In", "Pending"), _key(READY, "NotIn", "True")]
    told = _key(_annotation(EXIT_NOW), "Exists")
    untold = _key(_annotation(EXIT_NOW), "DoesNotExist")
    ended = _key(".status.phase", "In", "Pending", "Succeeded", "Failed")
    return [
        _stage("pod-runs", "Pod", begins, {"statusTemplate": POD_RUNS}),
        _stage(
            "pod-ends",
            "Pod",
            [*works, untold],
            {"statusTemplate": _pod_ends(told_to_stop=False)},
            delay=_delay(DEFAULT_RUN_MILLISECONDS, RUN_FOR),
        ),
        _stage(
            "pod-exits-now",
            "Pod",
            [*works, told],
            {"statusTemplate": _pod_ends(told_to_stop=False)},
        ),
        _stage(
            "pod-stops",
            "Pod",
            [IS_DELETED, RUNS],
            {"statusTemplate": _pod_ends(told_to_stop=True)},
            delay=_delay(DEFAULT_STOP_MILLISECONDS, STOP_FOR),
        ),
        _stage("pod-is-removed", "Pod", [IS_DELETED, ended], {"delete": True}),
    ]


def _delay(milliseconds: int, annotation: str) -> Object:
    expression = {"expressionFrom": _annotation(annotation)}
    return {"durationMilliseconds": milliseconds, "durationFrom": expression}


NODE_READY = """
{{ $now := Now }}
conditions:
{{ range NodeConditions }}
- type: {{ .type | Quote }}
  status: {{ .status | Quote }}
  reason: {{ .reason | Quote }}
  message: {{ .message | Quote }}
  lastHeartbeatTime: {{ $now | Quote }}
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
addresses:
- type: Hostname
  address: {{ NodeName | Quote }}
"""

POD_RUNS = """
{{ $now := Now }}
phase: Running
startTime: {{ $now | Quote }}
conditions:
{{ range $type := list "Initialized" "ContainersReady" "Ready" }}
- type: {{ $type | Quote }}
  status: "True"
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: true
  started: true
  restartCount: 0
  state:
    running:
      startedAt: {{ $now | Quote }}
{{ end }}
"""

POD_ENDS = """
{{ $now := Now }}
{{ $began := .status.startTime }}
{{ $labels := or .metadata.labels dict }}
{{ $notes := or .metadata.annotations dict }}
{{ $stage := or (index $labels "@STAGE@") "" }}
{{ $attempt := or (index $labels "@ATTEMPT@") "" }}
{{ $results := dict @RESULTS@ }}
{{ $nth := index $notes (printf "@EXIT_CODE@-%s" $attempt) }}
{{ $code := or @CODES@ "0" }}
{{ $message := or (index $notes "@MESSAGE@") (index $results $stage) "" }}
{{ if and (ne $code "0") (ne $code "@STOPPED@") }}
{{ $message = or (index $notes "@FAILURE@") "" }}
{{ end }}
phase: {{ if eq $code "0" }}Succeeded{{ else }}Failed{{ end }}
conditions:
{{ range $type := list "ContainersReady" "Ready" }}
- type: {{ $type | Quote }}
  status: "False"
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: false
  started: false
  restartCount: 0
  state:
    running: null
    terminated:
      exitCode: {{ $code }}
      reason: {{ if eq $code "0" }}Completed{{ else }}Error{{ end }}
      startedAt: {{ $began | Quote }}
      finishedAt: {{ $now | Quote }}
      message: {{ if eq .name "@TRAINER@" }}{{ $message | Quote }}{{ else }}""{{ end }}
{{ end }}
"""


def _pod_ends(*, told_to_stop: bool) -> str:
    told = int(Reason.STOPPED.exit_code)
    words = {each: stopped(each) if told_to_stop else result(each) for each in Stage}
    pairs = [f'"{stage}" `{said.to_message().decode()}`' for stage, said in words.items()]
    regular = f'(index $notes "{EXIT_NOW}") $nth (index $notes "{EXIT_CODE}")'
    blanks = {
        "STAGE": STAGE_LABEL,
        "ATTEMPT": ATTEMPT_LABEL,
        "RESULTS": " ".join(pairs),
        "EXIT_CODE": EXIT_CODE,
        "CODES": f'"{told}"' if told_to_stop else regular,
        "MESSAGE": "" if told_to_stop else RESULT,
        "STOPPED": str(told),
        "FAILURE": FAILURE,
        "TRAINER": TRAINER_CONTAINER,
    }
    text = POD_ENDS
    for blank, value in blanks.items():
        text = text.replace(f"@{blank}@", value)
    return text
