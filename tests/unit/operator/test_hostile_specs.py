"""Any spec that the schema of the definition lets through, and many that it doesn't.

The operator may call it invalid. It may not crash, go on for ever, or make a pod that can do more
than a FineTuneJob's author may. HOSTILE_EXAMPLES sets how many are tried; the release tries 10,000.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_operator.api.crd import custom_resource_definition
from finetune_operator.manifests import stage_objects
from finetune_operator.observe import observe_finetunejob
from finetune_operator.plan import Policy, StartStage, plan
from finetune_operator.resources import training_hardware
from finetune_operator.settings import Settings
from finetune_trainer.contract import Stage
from tests.unit.operator.build import NOW, resolved

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "150"))
PASSES = 4  # after which a plan that nothing answers must have come to rest
SETTINGS = Settings(trainer_image="trainer:1")
HOSTILE = (
    "",
    "null",
    "../../etc/passwd",
    "s3://bucket/../other",
    "{{ .Values.x }}",
    "$(HOME)",
    "${HOME}",
    "a" * 300,
    "\x00",
    "\n- hostPath: /",
    "ünïcödé ☕",
    "s3://data/faq.csv",
    "org/base",
    "1Gi",
    "lots",
)
FORBIDDEN = {"hostPath", "hostNetwork", "hostPID", "hostIPC", "privileged", "hostPort", "nfs"}

Schema = dict[str, Any]


def values(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of a schema, and at times of another type."""
    return st.one_of(_right(schema), _right(schema), _right(schema), _anything())


def _anything() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.sampled_from(HOSTILE),
        st.lists(st.sampled_from(HOSTILE), max_size=2),
        st.dictionaries(st.sampled_from(HOSTILE), st.sampled_from(HOSTILE), max_size=2),
    )


def _right(schema: Schema) -> st.SearchStrategy[Any]:
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return st.one_of(st.integers(), st.sampled_from(HOSTILE))
    kind = schema.get("type")
    if kind == "array":
        return st.lists(values(schema["items"]), max_size=3)
    if kind == "object":
        return _objects(schema) if "properties" in schema else _maps(schema)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        "boolean": st.booleans(),
        "integer": st.integers(schema.get("minimum"), schema.get("maximum")),
        "number": st.floats(allow_nan=False, allow_infinity=False),
    }
    return plain.get(kind, st.sampled_from(HOSTILE))


def _maps(schema: Schema) -> st.SearchStrategy[Any]:
    inner = schema.get("additionalProperties")
    kind = values(inner) if isinstance(inner, dict) else _anything()
    return st.dictionaries(st.sampled_from(HOSTILE), kind, max_size=3)


def _objects(schema: Schema) -> st.SearchStrategy[Any]:
    required = set(schema.get("required", ()))
    known = {name: values(inner) for name, inner in schema["properties"].items()}
    return st.fixed_dictionaries(
        {name: kind for name, kind in known.items() if name in required},
        optional={name: kind for name, kind in known.items() if name not in required},
    )


def _fields() -> dict[str, st.SearchStrategy[Any]]:
    version = custom_resource_definition()["spec"]["versions"][0]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return {name: values(schema) for name, schema in sorted(spec["properties"].items())}


SOUND = {
    "model": {"source": "org/base"},
    "dataset": {"source": "s3://data/faq.csv"},
    "output": {"uri": "s3://models/support"},
}


FIELDS = _fields()


@st.composite
def specs(draw: st.DrawFn) -> Any:
    """A sound spec with one or two hostile parts, so that most get as far as a pod."""
    spec: dict[str, Any] = dict(SOUND)
    for name in draw(st.lists(st.sampled_from(list(FIELDS)), min_size=1, max_size=2)):
        drawn = draw(FIELDS[name])
        before = spec.get(name)
        both = isinstance(before, dict) and isinstance(drawn, dict)
        spec[name] = {**drawn, **before} if both and before and draw(st.booleans()) else drawn
    return spec


def raw(spec: Any) -> dict[str, Any]:
    meta = {
        "name": "support",
        "namespace": "ml",
        "uid": "uid-1",
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": "2026-11-24T12:00:00Z",
    }
    return {"metadata": meta, "spec": spec}


def names_in(value: Any) -> set[str]:
    """Every key of an object, at any depth, but those of maps that are the user's."""
    if isinstance(value, dict):
        inner = (
            names_in(each)
            for key, each in value.items()
            if key not in {"labels", "annotations", "nodeSelector", "affinity", "data"}
        )
        return set(value).union(*inner)
    return set().union(*map(names_in, value)) if isinstance(value, list) else set()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_no_spec_makes_the_operator_crash_or_loop_or_make_an_unsafe_pod(spec: Any) -> None:
    seen = observe_finetunejob(raw(spec), {})
    assert (seen.spec is None) == (seen.spec_error is not None)
    digests = dict.fromkeys(Stage, "s1")
    status, starts = seen.status, set()
    for _ in range(PASSES):
        made = plan(_with(seen, status), (), digests, Policy(), NOW)
        starts |= {each for each in made.actions if isinstance(each, StartStage)}
        at_rest, status = made.status == status, made.status
    assert at_rest
    assert len(starts) <= 1, "the same attempt again, since no Job shows"
    if seen.spec is None:
        assert not starts
        assert status.phase == "Failed"
        return
    for stage in Stage:
        pod = _pod(seen, stage)
        assert not names_in(pod) & FORBIDDEN
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        [container] = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["command"] == ["finetune-trainer"]
        own = [each for each in container["env"] if each["name"] == "FINETUNE_JOB"]
        assert len(own) == 1


def _with(seen: Any, status: Any) -> Any:
    return replace(seen, status=status)


def _pod(seen: Any, stage: Stage) -> dict[str, Any]:
    objects = stage_objects(
        seen,
        seen.spec,
        SETTINGS,
        stage=stage,
        stage_key="1",
        attempt=1,
        resolved=None if stage is Stage.PREPARE else resolved(),
        hardware=training_hardware(seen.spec),
    )
    found: dict[str, Any] = objects.job["spec"]["template"]["spec"]
    return found


def test_what_is_forbidden_would_be_found() -> None:
    assert names_in({"volumes": [{"hostPath": {"path": "/"}}]}) & FORBIDDEN
    assert names_in({"containers": [{"securityContext": {"privileged": True}}]}) & FORBIDDEN
