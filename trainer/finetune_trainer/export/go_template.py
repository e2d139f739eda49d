"""A chat template's shape, as a Go text/template for Ollama.

What Ollama gives a template (its template/template.go): `.System`, all system prompts joined by
blank lines; `.Messages`, the conversation with `.Role` and `.Content`, neighbours of one role
joined by blank lines. A template that reads `.Messages` is executed once, and what the model says
follows what it renders. Only functions of Go itself are used.
"""

from __future__ import annotations

from finetune_trainer.export.chat_shape import ChatShape


def go_template(shape: ChatShape) -> str:
    """The template; its renderings equal `shape.render` for conversations that end with the user.

    One that ends with an assistant's message is rendered up to that message's end, so that the
    model goes on with it.
    """
    ask = _common_end(shape.head, shape.further)
    if shape.system == "first":
        ask = _common_end(ask, shape.after_system)
    lines = [
        _head(shape, ask) + "{{ range $i, $_ := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{- if eq .Role "user" }}'
        + literal(ask)
        + _inside(shape)
        + "{{ .Content }}{{ if $last }}"
        + literal(shape.end)
        + "{{ end }}",
        '{{- else if eq .Role "assistant" }}'
        + literal(shape.answer)
        + "{{ .Content }}{{ if not $last }}"
        + literal(shape.further.removesuffix(ask))
        + "{{ end }}",
        "{{- end }}",
        "{{- end }}",
    ]
    return "\n".join(lines)


def literal(text: str) -> str:
    """Text that Go and the Modelfile's parser leave as it is.

    The parser drops what can't be printed, and three quotes end a value; Go takes `{{` for the
    beginning of an action, also where the first brace is the text's last character.
    """
    printable = all(c.isprintable() or c == "\n" for c in text)
    if printable and '"' not in text and "{{" not in text and not text.endswith("{"):
        return text
    return '{{ "' + "".join(_escaped(c) for c in text) + '" }}'


def _escaped(char: str) -> str:
    """A character in a Go string."""
    if char in '"\\':
        return "\\" + char
    if char == "\n":
        return "\\n"
    return char if char.isprintable() else f"\\U{ord(char):08x}"


def _head(shape: ChatShape, ask: str) -> str:
    plain = literal(shape.head.removesuffix(ask))
    if shape.system != "first":
        return plain
    return (
        "{{ if .System }}"
        + literal(shape.before_system)
        + "{{ .System }}"
        + literal(shape.after_system.removesuffix(ask))
        + "{{ else }}"
        + plain
        + "{{ end }}"
    )


def _inside(shape: ChatShape) -> str:
    """A system prompt that stands within what the user says."""
    if shape.system == "last":
        before, after = literal(shape.before_system), literal(shape.after_system)
        return "{{ if and $last $.System }}" + before + "{{ $.System }}" + after + "{{ end }}"
    if shape.system == "refused":  # the system prompt is message 0 where there is one
        return '{{ if and $.System (eq $i 1) }}{{ $.System }}{{ "\\n\\n" }}{{ end }}'
    return ""


def _common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
