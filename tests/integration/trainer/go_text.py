"""Go's text/template, by way of Helm, which renders charts with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import helm_python as helm

from finetune_trainer.contract import Message, Tool

_BETWEEN = "\N{INVERTED INTERROBANG}next\N{INVERTED INTERROBANG}"


def render(
    template: str,
    conversations: Sequence[Sequence[Message | Mapping[str, Any]]],
    folder: Path,
    tools: Sequence[Tool] = (),
) -> list[str]:
    """Each conversation as Ollama would give it to the template (template/template.go: collate).

    JSON is written as Python does, where Ollama leaves blanks out.
    """
    chart = folder / "chart"
    (chart / "templates").mkdir(parents=True, exist_ok=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: chart\nversion: 0.1.0\n")
    (chart / "templates" / "out.yaml").write_text(
        '{{ define "it" }}' + template.replace("{{ json ", "{{ toJson ") + "{{ end }}"
        '{{ range .Values.all }}{{ template "it" . }}' + _BETWEEN + "{{ end }}"
    )
    values = {"all": [given(messages, tools) for messages in conversations]}
    with helm.Chart.load(chart) as loaded:
        rendered = loaded.render(values, name="it", namespace="it")
    (text,) = rendered.values()
    return text.split(_BETWEEN)[:-1]


def given(
    messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Tool] = ()
) -> dict[str, object]:
    """Ollama's variables for a conversation. What prints itself as JSON there is a text here."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    collated: list[dict[str, Any]] = []
    for message in messages:
        calls = [
            {"Function": {"Name": call["function"]["name"], "Arguments": _json(call, "arguments")}}
            for call in message.get("tool_calls", ())
        ]
        same = collated and collated[-1]["Role"] == message["role"] != "tool"
        if same and not calls:
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            said = {"Role": message["role"], "Content": message["content"], "ToolCalls": calls}
            collated.append(said)
    listed = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return {"System": "\n\n".join(system), "Messages": collated, "Tools": listed}


def _json(call: Mapping[str, Any], name: str) -> str:
    return json.dumps(call["function"][name], ensure_ascii=False)


def read_modelfile(text: str) -> dict[str, list[str]]:
    """A Modelfile's values by instruction, as Ollama's parser/parser.go reads them."""
    found: dict[str, list[str]] = {}
    rest = text
    while rest := rest.lstrip():
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
        if rest.startswith('"""'):
            value, _, rest = rest[3:].partition('"""')
        else:
            value, _, rest = rest.partition("\n")
            value = value.strip().strip('"')
        printable = "".join(c for c in value if c.isprintable() or c in "\n\r\t ")
        found.setdefault(name.lower(), []).append(printable)
    return found
