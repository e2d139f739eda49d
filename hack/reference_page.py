"""The resource reference: every field of a FineTuneJob, written from the API's types.

`python -m hack.reference_page FOLDER` writes docs/reference.md below that folder. It reads the
schema that the API server gets, so its words, defaults, limits and rules are those of `kubectl
explain`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_operator.api.crd import PRINTER_COLUMNS, custom_resource_definition

Schema = dict[str, Any]
HEAD = """\
# Resource reference

<!-- Written by `make generate` from the API's types. Do not edit. -->

Every field of a FineTuneJob (`finetune.dev/v1alpha1`, short name `ftj`). `kubectl explain ftj.spec`
says the same on your cluster. Fields in **bold** are required where the object that they belong to
is there. In paths `[]` stands for an item of a list, `{}` for a value of a map, and `*` for each of
the names above it.
"""
LIMITS = {
    "minimum": ("at least", "above"),
    "maximum": ("at most", "below"),
    "minItems": ("at least", ""),
    "maxItems": ("at most", ""),
}
"""How a limit is written, and how where its value is not allowed itself; without lengths."""


def page() -> str:
    """The whole page, in Markdown."""
    version = custom_resource_definition()["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]["properties"]
    parts = [HEAD, *sections("spec", root["spec"]), *sections("status", root["status"]), columns()]
    return "\n".join(parts)


def sections(top: str, schema: Schema) -> Iterator[str]:
    """`spec` or `status`: its own fields, then a section for each object among them."""
    yield f"## {top}\n\n{sentence(schema)}\n"
    fields = schema["properties"]
    required = schema.get("required", [])
    simple = {name: each for name, each in fields.items() if not has_fields(each)}
    yield table([row(name, each, name in required) for name, each in simple.items()])
    yield from filter(None, [rules(schema)])
    for name, each in fields.items():
        if has_fields(each):
            needed = " Required." if name in required else ""
            yield f"### {top}.{name}{suffix(each)}\n\n{sentence(each)}{needed}\n"
            yield table(list(rows(inner(each))))
            yield from filter(None, [rules(each)])


def rows(schema: Schema, prefix: str = "") -> Iterator[str]:
    """A row for each field below an object, depth first; what is alike is written once."""
    fields = schema["properties"]
    alike = len(fields) > 1 and len({json.dumps(part(each)) for each in fields.values()}) == 1
    if alike and has_fields(next(iter(fields.values()))):
        for name, each in fields.items():
            yield row(f"{prefix}{name}", each, name in schema.get("required", []))
        yield from rows(inner(next(iter(fields.values()))), f"{prefix}*.")
        return
    for name, each in fields.items():
        path = f"{prefix}{name}"
        yield row(path, each, name in schema.get("required", []))
        if has_fields(each):
            yield from rows(inner(each), f"{path}{suffix(each)}.")


def row(path: str, schema: Schema, required: bool) -> str:
    """One field: its path, type, default, and what it is."""
    name = f"**`{path}`**" if required else f"`{path}`"
    default = f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
    words = [sentence(schema), *limits(schema), *messages(schema)]
    return f"| {name} | {kind(schema)} | {cell(default)} | {cell(' '.join(filter(None, words)))} |"


def kind(schema: Schema) -> str:
    """The type in a word or two."""
    if schema.get("x-kubernetes-int-or-string"):
        return "number or string"
    if "items" in schema:
        return f"list of {kind(schema['items'])}"
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        return f"map of {kind(extra)}"
    return str(schema.get("format") or schema.get("type") or "any")


def limits(schema: Schema) -> Iterator[str]:
    """Allowed values and bounds, of the field or of its items."""
    for each in (schema, schema.get("items", {})):
        if "enum" in each:
            yield f"One of {', '.join(f'`{value}`' for value in each['enum'])}."
        known = [limit(each, key) for key in LIMITS if key in each]
        if known:
            bounds = ", ".join(known)
            yield f"{bounds[0].upper()}{bounds[1:]}."


def limit(schema: Schema, key: str) -> str:
    """One bound in words."""
    within, beyond = LIMITS[key]
    exclusive = schema.get(f"exclusive{key.capitalize()}", False)
    unit = " items" if key.endswith("Items") else ""
    return f"{beyond if exclusive else within} {schema[key]}{unit}"


def messages(schema: Schema) -> Iterator[str]:
    """What the API server says when a rule of a field without fields of its own is broken."""
    if not has_fields(schema):
        for rule in schema.get("x-kubernetes-validations", []):
            yield f"Rule: {rule['message']}."


def rules(schema: Schema) -> str:
    """The rules between the fields of an object, as a list."""
    found = [rule["message"] for rule in schema.get("x-kubernetes-validations", [])]
    lines = [f"- {text(message)}" for message in found]
    return "\n".join(["Rules between these fields:", "", *lines, ""]) if lines else ""


def columns() -> str:
    """What `kubectl get ftj` prints."""
    head = ["## Columns of kubectl get", "", "| column | shows | only with `-o wide` |"]
    lines = [
        f"| {name} | {cell(description)} | {'yes' if priority else ''} |"
        for name, _, _, priority, description in PRINTER_COLUMNS
    ]
    return "\n".join([*head, "| --- | --- | --- |", *lines, ""])


def table(lines: list[str]) -> str:
    """A table of fields; nothing where there are none."""
    if not lines:
        return ""
    head = ["| field | type | default | what it is |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *lines, ""])


def has_fields(schema: Schema) -> bool:
    return "properties" in inner(schema)


def inner(schema: Schema) -> Schema:
    """An object itself, or that of a list's items or a map's values."""
    extra = schema.get("additionalProperties")
    found: Schema = schema.get("items") or (extra if isinstance(extra, dict) else None) or schema
    return found


def part(schema: Schema) -> Any:
    """What tells one object's fields from another's."""
    return inner(schema).get("properties")


def suffix(schema: Schema) -> str:
    if "items" in schema:
        return "[]"
    return "{}" if isinstance(schema.get("additionalProperties"), dict) else ""


def sentence(schema: Schema) -> str:
    """A description on one line."""
    return text(str(schema.get("description", "")))


def text(words: str) -> str:
    """Words as Markdown shows them: what looks like a tag outside of code is an entity."""
    parts = re.split(r"(`[^`]*`)", " ".join(words.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def cell(words: str) -> str:
    """Words as a table's cell."""
    return words.replace("|", r"\|")


if __name__ == "__main__":
    (Path(sys.argv[1]) / "docs" / "reference.md").write_text(page(), encoding="utf-8")
