"""The chart's schema and README, made from the comments of its values.yaml; and `helm lint`.

python -m hack.chart generate FOLDER   writes both into the chart below that folder
python -m hack.chart lint              asks Helm itself; any warning is a failure

The comment right above a key describes it. A default's type is the key's type. A line `@schema`
in the comment adds to that, as YAML; `{additionalProperties: …}` opens an object, which else takes
only the keys that the file has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

from hack import REPOSITORY
from hack.stage_table import write_into

CHART = Path("charts") / "finetune-operator"
MARK = "@schema "
WARNING = 2  # of Helm's severities
DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that every Helm 3 and 4 reads
DEFAULT_WIDTH = 60

Schema = dict[str, Any]

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
NAMES: Schema = {"type": "array", "items": {"type": "string"}}
POLICY_LISTS = ("namespaces", "images", "serviceAccounts", "priorityClasses", "nodeSelectors")


@dataclass(frozen=True)
class Value:
    """One key of values.yaml; `children` has the keys of an object that isn't open."""

    key: str
    default: Any
    description: str
    extra: Schema
    children: tuple[Value, ...] = ()

    @property
    def schema(self) -> Schema:
        """What Helm holds a user's value against."""
        if "$ref" in self.extra:
            return self.extra
        known: Schema = {"description": self.description}
        if isinstance(self.default, dict):
            known |= {"type": "object"}
            if self.children:
                known |= closed({child.key: child.schema for child in self.children})
        else:
            known |= {"type": TYPES[type(self.default)]}
        return known | self.extra


def closed(properties: Schema) -> Schema:
    """An object that takes these keys alone."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def read_values(text: str) -> tuple[Value, ...]:
    """The keys of a values.yaml; raises ValueError for one without a comment."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return tuple(_mapping(root, text.splitlines(), yaml.safe_load(text)))


def _mapping(node: Any, lines: list[str], values: dict[str, Any]) -> Iterator[Value]:
    for key, value in node.value:
        default = values[key.value]
        description, extra = _comment(lines, key.start_mark.line)
        if not description:
            raise ValueError(f"line {key.start_mark.line + 1}: no comment above {key.value}")
        inner = isinstance(value, yaml.MappingNode) and "additionalProperties" not in extra
        children = tuple(_mapping(value, lines, default)) if inner else ()
        yield Value(key.value, default, description, extra, children)


def _comment(lines: list[str], line: int) -> tuple[str, Schema]:
    """Words and schema of the comment that ends right above a line."""
    words: list[str] = []
    extra: Schema = {}
    while line and lines[line - 1].strip().startswith("#"):
        line -= 1
        text = lines[line].strip().removeprefix("#").strip()
        if text.startswith(MARK):
            extra = yaml.safe_load(text.removeprefix(MARK))
        else:
            words.insert(0, text)
    return " ".join(words), extra


def schema(values: tuple[Value, ...], definition: Schema) -> Schema:
    """The whole values.schema.json; `definition` is the CustomResourceDefinition."""
    properties = {value.key: value.schema for value in values}
    # A chart that has this one as a part may hand it values of all its parts.
    properties["global"] = {"type": "object"}
    reference = closed({"name": {"type": "string", "minLength": 1}}) | {"required": ["name"]}
    policy = closed({"name": {"type": "string"}} | dict.fromkeys((*POLICY_LISTS, "queues"), NAMES))
    return {
        "$schema": DRAFT,
        "title": "Values of finetune-operator",
        **closed(properties),
        "definitions": {
            "modelCache": _model_cache(definition),
            "named": {"type": "object", "required": ["name"]},
            "policy": policy | {"required": ["name"]},
            "reference": reference,
            "stages": _stages(definition),
        },
    }


def _stages(definition: Schema) -> Schema:
    root = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return _plain(root["properties"]["spec"]["properties"]["stages"])


def _model_cache(definition: Schema) -> Schema:
    """A claim, or an image as a stage's volume takes it."""
    volumes = _stages(definition)["properties"]["train"]["properties"]["volumes"]
    claim = closed(
        {"claimName": {"type": "string", "minLength": 1}, "readOnly": {"type": "boolean"}}
    )
    sources = {
        "persistentVolumeClaim": claim | {"required": ["claimName"]},
        "image": volumes["items"]["properties"]["image"],
    }
    return closed(sources) | {"maxProperties": 1}


def _plain(node: Schema) -> Schema:
    """A part of the definition as plain JSON Schema, which refuses keys that it doesn't know."""
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found: Schema = {
        key: node[key]
        for key in ("type", "enum", "pattern", "minimum", "maximum", "required", "minLength")
        if key in node
    }
    if "items" in node:
        found["items"] = _plain(node["items"])
    if isinstance(node.get("additionalProperties"), dict):
        found["additionalProperties"] = _plain(node["additionalProperties"])
    if "properties" in node:
        found["properties"] = {key: _plain(each) for key, each in node["properties"].items()}
        found["additionalProperties"] = node.get("x-kubernetes-preserve-unknown-fields", False)
    return found


def table(values: tuple[Value, ...]) -> str:
    """Rows of Markdown: each value that can be set, its default, and what it is for."""
    lines = ["| value | default | what it does |", "| --- | --- | --- |"]
    lines += (_row(path, value) for path, value in _leaves(values))
    return "\n".join(lines)


def _row(path: str, value: Value) -> str:
    default = json.dumps(value.default, ensure_ascii=False)
    shown = default if len(default) <= DEFAULT_WIDTH else "see values.yaml"
    cell = f"`{shown}`" if shown == default else shown
    words = value.description.replace("*", "\\*").replace("|", "\\|")
    return f"| `{path}` | {cell} | {words} |"


def _leaves(values: tuple[Value, ...], prefix: str = "") -> Iterator[tuple[str, Value]]:
    for value in values:
        if value.children:
            yield from _leaves(value.children, f"{prefix}{value.key}.")
        else:
            yield prefix + value.key, value


def generate(root: Path) -> None:
    """Write values.schema.json, and the table of README.md, of the chart below a folder."""
    folder = root / CHART
    values = read_values((folder / "values.yaml").read_text(encoding="utf-8"))
    definition = yaml.safe_load((folder / "files" / "finetunejob-crd.yaml").read_text())
    text = json.dumps(schema(values, definition), indent=1, ensure_ascii=False)
    (folder / "values.schema.json").write_text(text + "\n", encoding="utf-8")
    write_into(folder / "README.md", table(values))


def lint(chart: Path) -> list[str]:
    """What Helm finds wrong with the chart, and its warnings."""
    found = helm.lint(chart, strict=True)
    warnings = [
        f"{each['path']}: {each['error']}"
        for each in found["messages"]
        if each["severity"] >= WARNING
    ]
    return list(dict.fromkeys([*found["errors"], *warnings]))


def main(arguments: list[str]) -> str:
    """Do what the command line asks for; returns what is wrong, empty where nothing is."""
    match arguments:
        case ["generate", folder]:
            generate(Path(folder))
            return ""
        case ["lint"]:
            return "\n".join(lint(REPOSITORY / CHART))
    return f"usage: {__doc__}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) or None)
