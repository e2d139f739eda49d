"""Generate the CustomResourceDefinition from the pydantic types.

`python -m finetune_operator.api.crd FOLDER` writes it below the repository's folder. Pydantic's
JSON schema becomes a structural schema. References are inlined. "Or null" is dropped, since an
absent field means none. `additionalProperties: false` is dropped, since the API server prunes
unknown fields itself, or refuses them under strict validation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api import KIND
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.observed import NO_GENERATION
from finetune_trainer.contract import GROUP, PLURAL, VERSION

Schema = dict[str, Any]

HEADER = "# Generated from operator/finetune_operator/api by `make generate`. Do not edit.\n"
# Deleting the definition would delete every FineTuneJob: uninstalling the chart must not.
OF_THE_CHART = {"helm.sh/resource-policy": "keep"}

PRINTER_COLUMNS = [
    # name, type, JSON path, priority (1: only with -o wide), description
    ("Phase", "string", ".status.phase", 0, "What the FineTuneJob is doing"),
    ("Reason", "string", ".status.reason", 0, "What stands in the way, or why it failed"),
    ("Stage", "string", ".status.stage", 0, "The stage that runs, or ran last"),
    ("Progress", "string", ".status.progress.percent", 0, "Share of the stage that is done"),
    ("Loss", "string", ".status.progress.loss", 0, "Training loss at the last logging step"),
    ("ETA", "string", ".status.progress.eta", 0, "Time left in this stage"),
    ("Version", "string", ".status.version", 0, "The version that the artifacts are of"),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since creation"),
    (
        "EvalLoss",
        "string",
        ".status.metrics.evalLoss",
        1,
        "Loss of the tuned model on held-out rows",
    ),
    ("GPUSeconds", "integer", ".status.usage.gpuSeconds", 1, "GPU time of all ended pods"),
    ("Model", "string", ".spec.model.source", 1, "Base model"),
    ("Artifact", "string", ".status.manifestUri", 1, "Manifest of the artifacts"),
]


def custom_resource_definition(annotations: dict[str, str] | None = None) -> dict[str, Any]:
    """The whole CustomResourceDefinition of FineTuneJob."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            **({"annotations": annotations} if annotations else {}),
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["ml"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root_schema()},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*row) for row in PRINTER_COLUMNS],
                }
            ],
        },
    }


def render(annotations: dict[str, str] | None = None) -> str:
    """The CustomResourceDefinition as YAML text."""
    definition = custom_resource_definition(annotations)
    return HEADER + yaml.dump(definition, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full, without YAML anchors."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - the library's signature
        return True


def structural(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Turn a node of pydantic's JSON schema and all nodes below it into a structural schema."""
    node = _as_openapi(_without_null(_inlined(node, definitions), definitions))
    if "properties" in node:
        node["properties"] = {
            name: structural(child, definitions) for name, child in node["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = structural(node[key], definitions)
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    return _with_plain_default(node)


def _as_openapi(node: Schema) -> Schema:
    """Translate JSON schema to OpenAPI v3.0, which the API server reads."""
    node.pop("title", None)
    if node.get("additionalProperties") is False:
        del node["additionalProperties"]
    if node.get("x-kubernetes-preserve-unknown-fields"):
        node.pop("additionalProperties", None)
    if node.get("x-kubernetes-int-or-string"):
        # The server derives the type itself, and refuses another one beside it.
        for key in ("type", "anyOf", "const", "enum"):
            node.pop(key, None)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    for bound in ("Minimum", "Maximum"):
        # In JSON schema this is the bound itself, in OpenAPI v3.0 a flag beside the bound.
        if (value := node.pop(f"exclusive{bound}", None)) is not None:
            node |= {bound.lower(): value, f"exclusive{bound}": True}
    return node


def _with_plain_default(node: Schema) -> Schema:
    """An object's default becomes {}, which its fields' defaults fill; empty ones are dropped."""
    if "default" not in node or not isinstance(node["default"], dict | list | str | None):
        return node
    default = node.pop("default")
    if node.get("type") == "object":
        if any("default" in child for child in node.get("properties", {}).values()):
            node["default"] = {}
    elif default:
        node["default"] = default
    return node


def _root_schema() -> Schema:
    source = FineTuneJob.model_json_schema(by_alias=True, mode="validation")
    schema = structural(source, source.get("$defs", {}))
    schema.pop("$defs", None)
    schema["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        **schema["properties"],
    }
    # The server would write a default in status into every new object, and refuse the words of a
    # newer operator. Its only default says of a status that nobody has written yet that it is of no
    # generation: tools that go by kstatus would call a new object done otherwise.
    status = _without(schema["properties"]["status"], {"default", "enum"})
    schema["properties"]["status"] = {**status, "default": {"observedGeneration": NO_GENERATION}}
    return schema


def _inlined(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Replace a reference by its definition; keywords beside the reference win."""
    node = dict(node)
    while "$ref" in node:
        name = node.pop("$ref").rsplit("/", 1)[-1]
        node = {**definitions[name], **node}
    return node


def _without_null(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Reduce `X or null` to X, and keep the description and rules of the field."""
    branches = [b for b in node.get("anyOf", []) if b.get("type") != "null"]
    if len(branches) == 1 and len(branches) < len(node["anyOf"]):
        outer = {k: v for k, v in node.items() if k not in {"anyOf", "default"}}
        inner = _inlined(branches[0], definitions)
        return _without_null({**inner, **outer}, definitions)
    return node


def _without(node: Schema, keywords: set[str]) -> Schema:
    """The schema without these keywords, also in what is below it."""
    return {
        key: (
            {name: _without(child, keywords) for name, child in value.items()}
            if key == "properties"
            else _without(value, keywords)
            if isinstance(value, dict)
            else value
        )
        for key, value in node.items()
        if key not in keywords
    }


def _column(name: str, kind: str, path: str, priority: int, description: str) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    column["description"] = description
    return column | ({"priority": priority} if priority else {})


def main(root: Path) -> None:
    """Write the definition to crds/ and to the chart below the folder `root`."""
    crd = root / "crds" / f"{GROUP}_{PLURAL}.yaml"
    crd.write_text(render(), encoding="utf-8")
    chart = root / "charts" / "finetune-operator" / "files" / f"{KIND.lower()}-crd.yaml"
    chart.write_text(render(OF_THE_CHART), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
