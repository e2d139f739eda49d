"""The manifest for krew, filled in as a release does, keeps krew's rules."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

TEMPLATE = Path(__file__).parents[3] / "hack" / "krew" / "finetune.yaml"


def test_the_manifest_is_one_that_krew_takes() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    filled = text.replace("{{ .TagName }}", "v0.1.0").replace("{{ .Sha256 }}", "0" * 64)
    assert "{{" not in filled.partition("apiVersion")[2]
    plugin = yaml.safe_load(filled)
    assert plugin["apiVersion"] == "krew.googlecontainertools.github.com/v1alpha2"
    assert plugin["kind"] == "Plugin"
    assert plugin["metadata"]["name"] == TEMPLATE.stem
    spec = plugin["spec"]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", spec["version"])
    assert 0 < len(spec["shortDescription"]) <= 50
    for platform in spec["platforms"]:
        assert re.fullmatch(r"[0-9a-f]{64}", platform["sha256"])
        assert platform["uri"].startswith("https://")
        assert platform["bin"] in [each["to"] for each in platform["files"]]
        expressions = platform["selector"]["matchExpressions"]
        assert {each["key"] for each in expressions} <= {"os", "arch"}
