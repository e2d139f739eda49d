"""What the chart renders, for tests of it."""

from __future__ import annotations

import functools
from typing import Any

import helm_python as helm
import yaml

from hack import REPOSITORY
from hack.operator_process import is_hook

ROOT = REPOSITORY
CHART = ROOT / "charts" / "finetune-operator"

Objects = list[dict[str, Any]]


@functools.cache
def loaded() -> helm.Chart:
    """The chart, read once."""
    return helm.Chart.load(CHART)


def render_all(**values: Any) -> Objects:
    """Every object, those of `helm test` too."""
    rendered = loaded().render(values, name="finetune-operator", namespace="finetune-system")
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    return [doc for text in texts for doc in yaml.load_all(text, yaml.CSafeLoader) if doc]


def render(**values: Any) -> Objects:
    """What `helm install` makes."""
    return [each for each in render_all(**values) if not is_hook(each)]


def named(objects: Objects, kind: str, name: str = "finetune-operator") -> Any:
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)


def operators_pod(**values: Any) -> Any:
    """The spec of the operator's pod."""
    return named(render(**values), "Deployment")["spec"]["template"]["spec"]


def environment(**values: Any) -> dict[str, str]:
    """The operator's environment; a variable that the pod's own fields give has their path."""
    [container] = operators_pod(**values)["containers"]
    return {
        each["name"]: each["value"]
        if "value" in each
        else each["valueFrom"]["fieldRef"]["fieldPath"]
        for each in container["env"]
    }
