"""Go's text/template, by way of Helm, which renders charts with it."""

from __future__ import annotations

from pathlib import Path

import helm_python as helm

from finetune_trainer.contract import Message

_BETWEEN = "\N{INVERTED INTERROBANG}next\N{INVERTED INTERROBANG}"


def render(template: str, conversations: list[list[Message]], folder: Path) -> list[str]:
    """Each conversation as Ollama would give it to the template (template/template.go: collate)."""
    chart = folder / "chart"
    (chart / "templates").mkdir(parents=True, exist_ok=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: chart\nversion: 0.1.0\n")
    (chart / "templates" / "out.yaml").write_text(
        '{{ define "it" }}' + template + "{{ end }}"
        '{{ range .Values.all }}{{ template "it" . }}' + _BETWEEN + "{{ end }}"
    )
    values = {"all": [given(messages) for messages in conversations]}
    with helm.Chart.load(chart) as loaded:
        rendered = loaded.render(values, name="it", namespace="it")
    (text,) = rendered.values()
    return text.split(_BETWEEN)[:-1]


def given(messages: list[Message]) -> dict[str, object]:
    """Ollama's variables for a conversation."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"]:
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            collated.append({"Role": message["role"], "Content": message["content"]})
    return {"System": "\n\n".join(system), "Messages": collated}


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
