"""The rendered chart for some installations, whole, so that a change shows in a review.

FINETUNE_WRITE_GOLDEN=1 python -m pytest tests/unit/test_chart_snapshots.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart import render_all

SNAPSHOTS = Path(__file__).parent / "chart_snapshots"
INSTALLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "trying": {"demoStore": {"enabled": True}, "web": {"enabled": True}},
    "team": {"watchNamespaces": ["team-a", "team-b"], "rbac": {"readNodes": False}},
    "production": {
        "replicaCount": 2,
        "image": {"repository": "registry.example.com/operator", "digest": f"sha256:{'0' * 64}"},
        "trainer": {"image": {"repository": "registry.example.com/trainer", "tag": "0.2.0-cuda"}},
        "imagePullSecrets": [{"name": "registry"}],
        "metrics": {
            "service": {"enabled": True},
            "podMonitor": {"enabled": True},
            "rules": {"enabled": True},
        },
        "networkPolicy": {"enabled": True},
    },
}


def snapshot(values: dict[str, Any]) -> str:
    """All objects but the definition, which crds/ has; without the keys that Helm draws."""
    objects = [each for each in render_all(**values) if each["kind"] != "CustomResourceDefinition"]
    for each in objects:
        if each["kind"] == "Secret":
            each["data"] = dict.fromkeys(each["data"], "…")
    return yaml.safe_dump_all(objects, allow_unicode=True, sort_keys=True)


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_the_chart_renders_as_it_was_reviewed(name: str) -> None:
    file = SNAPSHOTS / f"{name}.yaml"
    rendered = snapshot(INSTALLATIONS[name])
    if os.environ.get("FINETUNE_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(rendered)
    assert rendered == file.read_text(), "FINETUNE_WRITE_GOLDEN=1 writes it anew"


def test_each_snapshot_is_of_an_installation() -> None:
    assert {file.stem for file in SNAPSHOTS.glob("*")} == set(INSTALLATIONS)
