"""Tools in Ollama's template: their definitions, the model's calls, and what the tools answer.

As with the conversation (export/ollama), the model's chat template is taken to pieces by trying it
out: what stands around each definition, between a question and a call, between a call and its
answer, and so on. The template must write definitions and arguments as JSON, and all definitions
before the first question. Else there are no tools, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from finetune_trainer.contract import Tool

Said = dict[str, Any]
"""A message as the chat template takes it."""

Kind = Literal["user", "answer", "name", "arguments", "tool", "end"]
Between = dict[tuple[Kind, Kind], str]


class RenderTools(Protocol):
    """The chat template: messages and tools to text, up to where the next answer begins."""

    def __call__(self, messages: Sequence[Said], tools: Sequence[Tool], /) -> str:
        """Raises whatever the template raises."""


class NoToolsError(Exception):
    """The template's tools can't be written for Ollama; the message says why."""


@dataclass(frozen=True)
class Definitions:
    """How tools are listed, before the first question."""

    head: str
    """Before the first definition, where there is no system prompt."""

    before_system: str | None
    """In place of the head's beginning; None where no system prompt has its place here."""

    after_system: str
    between: str
    after: str
    """Between the last definition and the first question."""

    function: bool
    """Whether a definition is the function's alone, without its `type` beside it."""

    def render(self, system: str, tools: Sequence[Tool]) -> str:
        text = self.head
        if system and self.before_system is not None:
            text = self.before_system + system + self.after_system
        given = (tool["function"] if self.function else tool for tool in tools)
        return text + self.between.join(map(written, given)) + self.after


@dataclass(frozen=True)
class ToolShape:
    """The fixed texts of a conversation with tools, which begins and ends with what isn't the
    model's."""

    definitions: Definitions
    between: Between
    """What stands between two contents: what is said, a call's name, a call's arguments."""

    quotes: bool
    """Whether what a tool says is written as a JSON string."""

    def render(self, messages: Sequence[Said], tools: Sequence[Tool]) -> str:
        """What the template in Go makes, with JSON as Python writes it.

        Raises KeyError for an order of messages that the model's template doesn't know.
        """
        rest = list(messages)
        system = rest.pop(0)["content"] if rest[0]["role"] == "system" else ""
        text, was = self.definitions.render(system, tools), cast("Kind | None", None)
        for kind, content in _contents(rest, beside=self.beside, quotes=self.quotes):
            text += ("" if was is None else self.between[was, kind]) + content
            was = kind
        return text + self.between[was or "user", "end"]

    @property
    def beside(self) -> bool:
        """Whether an answer may stand beside its calls; else the template leaves it out."""
        return ("answer", "name") in self.between

    @property
    def begin(self) -> str:
        """What begins every call; Ollama knows a call in what the model says by this."""
        before = [text for (_, to), text in self.between.items() if to == "name"]
        if ("arguments", "name") not in self.between:  # nothing but the answer's beginning tells
            begun = self.between["user", "answer"]
            before.append(self.between["user", "name"].removeprefix(begun))
        return common_end(before)

    @property
    def finish(self) -> str:
        """What ends every call."""
        again = self.between.get(("arguments", "name"), self.begin)
        return again.removesuffix(self.begin)


def _contents(
    messages: Sequence[Said], *, beside: bool, quotes: bool
) -> Iterator[tuple[Kind, str]]:
    for message in messages:
        role, content, calls = message["role"], message["content"], message.get("tool_calls", ())
        if role == "tool":
            yield "tool", written(content) if quotes else content
        elif role == "user":
            yield "user", content
        elif content and (beside or not calls):
            yield "answer", content
        for call in calls:
            yield "name", call["function"]["name"]
            yield "arguments", written(call["function"]["arguments"])


def written(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def one_line(error: Exception) -> str:
    """What a template says, for a comment in the Modelfile."""
    return " ".join(str(error).split())[:200]


def common_end(texts: Sequence[str]) -> str:
    """The longest text that all end with."""
    first, *others = texts
    for start in range(len(first)):
        if all(other.endswith(first[start:]) for other in others):
            return first[start:]
    return ""


# --- For Ollama ----------------------------------------------------------------------------------

DATE = re.compile("\ue000(.*?)\ue001", re.DOTALL)
"""What stands for today's date in a shape, with its format; both characters are for private use."""


def literal(text: str) -> str:
    """Text that Go and the Modelfile's parser leave as it is.

    Today's date becomes Ollama's function of that.

    The parser drops what can't be printed, and three quotes end a value; Go takes `{{` for the
    beginning of an action, also where the first brace is the text's last character.
    """
    if found := DATE.search(text):
        before, after = text[: found.start()], text[found.end() :]
        return literal(before) + "{{ currentDate }}" + literal(after)
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


def go_head(listed: Definitions, without: str) -> str:
    """The template up to the first question; `without` is what it is where there are no tools."""
    head = literal(listed.head)
    if listed.before_system is not None:
        system = literal(listed.before_system) + "{{ .System }}" + literal(listed.after_system)
        head = "{{ if .System }}" + system + "{{ else }}" + head + "{{ end }}"
    tool = "{{ .Function }}" if listed.function else "{{ . }}"
    between = "{{ if $n }}" + literal(listed.between) + "{{ end }}"
    tools = "{{ range $n, $_ := .Tools }}" + between + tool + "{{ end }}" + literal(listed.after)
    return "{{ if .Tools }}" + head + tools + "{{ else }}" + without + "{{ end }}"


def go_messages(shape: ToolShape, inside: str) -> list[str]:
    """The template's lines for the messages; `inside` stands before what the user says."""

    def before(to: Kind) -> str:
        """What stands before a content, by what was said last ($was)."""
        texts = {kind: text for (kind, other), text in shape.between.items() if other == to}
        if to == "name":
            texts.pop("arguments", None)  # between calls: their end and beginning
            texts = {kind: text.removesuffix(shape.begin) for kind, text in texts.items()}
        if "arguments" in texts:
            texts["arguments"] = texts["arguments"].removeprefix(shape.finish)
        cases = ['if eq $was "' + kind + '" }}' + literal(text) for kind, text in texts.items()]
        return "{{ " + "{{ else ".join(cases) + "{{ end }}"

    def then(kind: Kind) -> str:
        """What follows a content that may be the last one."""
        end = literal(shape.between[kind, "end"])
        return "{{ if $last }}" + end + '{{ end }}{{ $was = "' + kind + '" }}'

    answers = "if or .Content (not $calls)" if shape.beside else "if not $calls"
    told = "{{ json .Content }}" if shape.quotes else "{{ .Content }}"
    # The head begins the user's turn; Ollama drops old messages, so an answer may come first.
    return [
        '{{ $was := "user" }}{{ range $i, $_ := .Messages }}',
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}{{ $calls := .ToolCalls }}",
        '{{- if eq .Role "user" }}' + before("user") + inside + "{{ .Content }}" + then("user"),
        '{{- else if eq .Role "assistant" }}',
        "{{- " + answers + " }}" + before("answer"),
        '{{- .Content }}{{ $was = "answer" }}{{ end }}',
        "{{- if $calls }}" + before("name") + "{{ end }}",
        "{{- if .ToolCalls }}{{ range .ToolCalls }}" + _go_call(shape) + "{{ end }}",
        '{{- $was = "arguments" }}{{ end }}',
        '{{- else if eq .Role "tool" }}' + before("tool") + told + then("tool"),
        "{{- end }}",
        "{{- end }}",
    ]


def _go_call(shape: ToolShape) -> str:
    """A call. What begins one is text of its own, up to the first brace.

    Ollama looks for that in what the model says: the first text below `if .ToolCalls`
    (tools/template.go).
    """
    tag, brace, named = shape.begin.partition("{")
    middle = literal(shape.between["name", "arguments"])
    name = literal(tag) + literal(brace + named) + "{{ .Function.Name }}"
    return name + middle + "{{ .Function.Arguments }}" + literal(shape.finish)


# --- Taking a template to pieces -----------------------------------------------------------------


def _tool(name: str) -> Tool:
    about = {"type": "string", "description": f"What {name} needs"}
    parameters = {"type": "object", "properties": {"of": about}, "required": ["of"]}
    function = {"name": name, "description": f"Tells {name}", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [_tool("weather"), _tool("tide")]
_SYSTEM = "☃prompt☃"


def find_tools(render: RenderTools, *, system: bool) -> ToolShape:
    """Take a template to pieces; raises NoToolsError.

    `system` says whether a system prompt has its place before the first question.
    """
    try:
        shape = _between(render, _definitions(render, system=system))
        trials = trial_calls(shape, system=system)
        same = all(shape.render(each, TOOLS) == on_lines(render(each, TOOLS)) for each in trials)
    except NoToolsError:
        raise
    except Exception as error:  # the model's own template runs: anything can come out
        raise NoToolsError(f"it fails on a conversation with calls ({one_line(error)})") from error
    if not same:
        raise NoToolsError("what it writes depends on what is said")
    if not all(
        text.startswith(shape.finish)
        for (kind, _), text in shape.between.items()
        if kind == "arguments"
    ):
        raise NoToolsError("it writes the calls of one message as a list")
    return shape


def trial_calls(shape: ToolShape, *, system: bool) -> list[list[Said]]:
    """Conversations to compare renderings on."""
    one = [_user("And the tide?"), _calls("weather"), _answer_of_tool('{"high": "12:40"}')]
    found = [one, [*one, _answer("At noon."), _user('"Thanks", he <said>.')]]
    found.append([*one, _calls("tide"), _answer_of_tool("Two\n\nlines, 漢字 ☕")])
    if ("arguments", "name") in shape.between:
        two = [_answer_of_tool("18 °C"), _answer_of_tool("low")]
        found.append([_user("Both?"), _calls("weather", "tide"), *two])
    found.append([_user("Hi"), _answer("Hello"), *one])
    found.append([_user("Hi"), {**_calls("tide"), "content": "I look."}, _answer_of_tool("low")])
    if system:
        found += [[{"role": "system", "content": "Be brief.\nBe kind."}, *each] for each in found]
    return found


def _user(content: str) -> Said:
    return {"role": "user", "content": content}


def _answer(content: str) -> Said:
    return {"role": "assistant", "content": content}


def _answer_of_tool(content: str) -> Said:
    return {"role": "tool", "content": content}


def _calls(*names: str, of: str = "Åland") -> Said:
    functions = [{"name": name, "arguments": {"of": of, "at": 12.5}} for name in names]
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _definitions(render: RenderTools, *, system: bool) -> Definitions:
    ask = _user("☃ask☃")
    text, _ = _halves(on_lines(render([ask], TOOLS)), ask["content"])
    function = written(TOOLS[0]) not in text
    first, second = (written(tool["function"] if function else tool) for tool in TOOLS)
    if first not in text or second not in text:
        raise NoToolsError("it doesn't write definitions as JSON before the first question")
    head, rest = _halves(text, first)
    between, after = _halves(rest, second)
    before: str | None = None
    after_system = ""
    if system:
        prompt: Said = {"role": "system", "content": _SYSTEM}
        with_prompt, _ = _halves(on_lines(render([prompt, ask], TOOLS)), ask["content"])
        before, rest = _halves(with_prompt, _SYSTEM)
        after_system, same = _halves(rest, first)
        if same != between + second + after:
            raise NoToolsError("a system prompt changes how it lists them")
    return Definitions(head, before, after_system, between, after, function)


def _halves(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise NoToolsError("it leaves out, repeats or reorders what is said")
    return before, after


def on_lines(text: str) -> str:
    """The text with each definition on one line: some templates write it over several."""
    decoder, found, at = json.JSONDecoder(), "", 0
    known = [*TOOLS, *(tool["function"] for tool in TOOLS)]
    while (brace := text.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, brace)
        except ValueError:
            value, end = None, brace
        if value not in known:
            value, end = None, brace + 1
        found += text[at:brace] + (text[brace:end] if value is None else written(value))
        at = end
    return found + text[at:]


def _between(render: RenderTools, definitions: Definitions) -> ToolShape:
    """What stands between contents, of conversations that have each order of them."""
    ask, tell, call = _user("☃ask☃"), _answer("☃tell☃"), _calls("weather", of="☃of☃")
    known, two = _answer_of_tool("☃known☃"), _calls("weather", "tide", of="☃of☃")
    needed = [
        [ask, tell, ask],
        [ask, call, known, call, known],
        [ask, call, known, tell, ask, call, known],
    ]
    optional = [[ask, two, known, known], [ask, {**call, "content": tell["content"]}, known]]
    between: Between = {}
    for messages in needed:
        _add(between, render, messages)
    for messages in optional:
        extended = dict(between)
        try:
            _add(extended, render, messages)
        except Exception:  # noqa: S112 - templates refuse by raising an error of their own
            continue
        between = extended
    quotes = all(
        (kind != "tool" or text.startswith('"')) and (to != "tool" or text.endswith('"'))
        for (kind, to), text in between.items()
    )
    if quotes:
        between = {
            (kind, to): text[kind == "tool" : len(text) - (to == "tool")]
            for (kind, to), text in between.items()
        }
    return ToolShape(definitions, between, quotes)


def _add(between: Between, render: RenderTools, messages: Sequence[Said]) -> None:
    """Cut what the template makes at what is said."""
    rest, was = on_lines(render(messages, TOOLS)), cast("Kind | None", None)
    for kind, content in _contents(messages, beside=True, quotes=False):
        text, found, rest = rest.partition(content)
        if not found:
            raise NoToolsError("it leaves out or reorders what is said")
        if was is not None and between.setdefault((was, kind), text) != text:
            raise NoToolsError("it writes later calls in another way than the first")
        was = kind
    if between.setdefault((was or "user", "end"), rest) != rest:
        raise NoToolsError("how an answer begins depends on what was said before")
