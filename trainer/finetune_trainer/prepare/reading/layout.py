"""Which columns (or JSON keys) make up an example, and the messages that a row becomes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from finetune_trainer.contract import Columns, Message, Reason, StageError, Tool
from finetune_trainer.prepare.reading.conversation import (
    Conversation,
    InvalidError,
    cell_of,
    checked,
    from_json,
    kind_of,
    message_of,
    text_of,
    tools_of,
)
from finetune_trainer.prepare.reading.record import name_of, names

INSTRUCTION, PROMPT, MESSAGES = "instruction", "prompt-completion", "messages"

KNOWN: tuple[tuple[str, dict[str, str]], ...] = (
    (INSTRUCTION, {"instruction": "instruction", "response": "response"}),
    (INSTRUCTION, {"instruction": "instruction", "response": "output"}),
    (MESSAGES, {"messages": "messages"}),
    (MESSAGES, {"messages": "conversations"}),
    (PROMPT, {"prompt": "prompt", "completion": "completion"}),
    (PROMPT, {"prompt": "prompt", "completion": "response"}),
    (INSTRUCTION, {"instruction": "question", "response": "answer"}),
)
"""The layouts that are found by their names; the first that is there whole."""

KNOWN_SAID = (
    "instruction and response (or output), with input if there is more to it; messages or "
    "conversations; prompt and completion (or response); question and answer"
)

_FORMER_TOOLS = "functions"
_BESIDE = ("tools", _FORMER_TOOLS)  # what may stand beside a conversation; last in a layout
OPTIONAL = ("input", "system", *_BESIDE)  # parts that may be blank
_WHOLE_LAYOUT = 1000  # outweighs any number of single names
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
_INVISIBLE = "\\s\u00ad\u200b-\u200f\u2060\ufeff"  # white space, with the hard and the narrow ones
_AROUND = re.compile(f"^[{_INVISIBLE}]+|[{_INVISIBLE}]+$")
_BESIDE_TEXT = {"", "id", "idx", "index", "meta", "metadata", "source", "title", "url"}


@dataclass(frozen=True)
class Layout:
    """One of the three layouts, with the column that holds each part."""

    kind: str
    columns: dict[str, str]
    asked: dict[str, str]
    """The names that were looked for, by part."""

    @property
    def optional(self) -> set[str]:
        """Columns whose cells may be blank."""
        return {name for part, name in self.columns.items() if part in OPTIONAL}

    @property
    def loosely_matched(self) -> tuple[str, ...]:
        """Columns that differ from what was looked for, though not in what a person sees."""
        return tuple(n for part, n in self.columns.items() if n != self.asked.get(part, n))


class Fields:
    """The columns of a file, found by their names as a person would."""

    def __init__(self, names: Sequence[str], *, exact: bool = False) -> None:
        self._exact = set(names)
        self._only_exact = exact
        self._alike: dict[str, list[str]] = {}
        for name in names:
            self._alike.setdefault(plain(name), []).append(name)

    def alike(self, name: str) -> list[str]:
        """The columns that differ from it in case and in what surrounds it at most."""
        return self._alike.get(plain(name), [])

    def find(self, name: str) -> str | None:
        """The column of that name, or the only one that is alike."""
        if name in self._exact:
            return name
        found = self.alike(name)
        return found[0] if len(found) == 1 and not self._only_exact else None


def plain(name: str) -> str:
    """A name without white space and invisible characters around it, and without case."""
    return _AROUND.sub("", name).casefold()


def find_layout(names: Sequence[str], columns: Columns) -> Layout | None:
    """The layout of a file with these columns; None where it lacks one that is needed."""
    return _first_whole(Fields(names), _candidates(columns))


def find_json_layout(
    shapes: Sequence[tuple[str, ...]], columns: Columns, uri: str
) -> Layout | None:
    """The layout of objects with these keys, by their exact names.

    An object of another layout than the rest, which could decide on how they are read, makes the
    file ambiguous: raises StageError(DatasetUnreadable).
    """
    candidates = _candidates(columns)
    found: list[tuple[str, dict[str, str]]] = []
    for keys in shapes:
        fitting = (each for each in candidates if _needed(each[1]) <= set(keys))
        found += [each for each in islice(fitting, 1) if each not in found]
    if len(found) > 1:
        one, other = (names(sorted(_needed(asked))) for _, asked in found[:2])
        raise StageError(
            Reason.DATASET_UNREADABLE,
            f"{uri} has objects with {one} and others with {other}: keep one kind, or map the keys "
            "in spec.dataset.columns.",
        )
    every = list(dict.fromkeys(chain.from_iterable(shapes)))
    return _first_whole(Fields(every, exact=True), found or candidates)


def _needed(asked: dict[str, str]) -> set[str]:
    return {name for part, name in asked.items() if part not in OPTIONAL}


def _first_whole(fields: Fields, candidates: list[tuple[str, dict[str, str]]]) -> Layout | None:
    for kind, asked in candidates:
        found = {part: name for part, it in asked.items() if (name := fields.find(it)) is not None}
        if len(found) == len(asked):
            return _with_input(Layout(kind, found, asked), fields)
    return None


def _with_input(layout: Layout, fields: Fields) -> Layout:
    """The layout with a column named `input`, where there is one that is not used yet."""
    more, used = fields.find("input"), layout.columns
    known = layout.kind == INSTRUCTION and "input" not in used
    if not known or more is None or more in used.values():
        return layout
    return Layout(layout.kind, used | {"input": more}, layout.asked | {"input": "input"})


def _candidates(columns: Columns) -> list[tuple[str, dict[str, str]]]:
    """The layouts that are looked for: as mapped, or the known ones."""
    system = {"system": columns.system} if columns.system else {}
    if columns.messages:
        return [(MESSAGES, {"messages": columns.messages} | system)]
    if _maps_pairs(columns):
        return [(INSTRUCTION, _mapped(columns))]
    return [(kind, asked | system) for kind, asked in KNOWN]


def _maps_pairs(columns: Columns) -> bool:
    """Whether the user says which columns are questions or answers."""
    usual = Columns()
    given = columns.instruction, columns.response, columns.input
    return given != (usual.instruction, usual.response, usual.input)


def _mapped(columns: Columns) -> dict[str, str]:
    found = {
        "instruction": columns.instruction,
        "input": columns.input,
        "system": columns.system,
        "response": columns.response,
    }
    return {part: name for part, name in found.items() if name is not None}


def default_layout(columns: Columns) -> Layout:
    """The layout of a file without a single readable object: each row says why it is none."""
    kind, asked = _candidates(columns)[0]
    return Layout(kind, asked, asked)


def check_columns(columns: Columns) -> None:
    """One column can't be two things; raises StageError (InvalidConfig)."""
    seen: dict[str, str] = {}
    for part, name in _mapped(columns).items():
        if name in seen:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"spec.dataset.columns: {seen[name]} and {part} are both {name!r}; "
                "name two columns.",
            )
        seen[name] = part


def fit(names: Sequence[str], columns: Columns) -> int:
    """How well a header suits: a whole layout is best, then as many wanted names as possible."""
    if find_layout(names, columns):
        return _WHOLE_LAYOUT
    fields = Fields(names)
    wanted = {name for _, asked in _candidates(columns) for name in asked.values()}
    return sum(bool(fields.alike(name)) for name in wanted)


def missing_column(
    given: Sequence[str], columns: Columns, uri: str, *, what: str = "column"
) -> StageError:
    """The error for a file that lacks a column, with what it has and a hint."""
    fields = Fields(given)
    _, wanted = _candidates(columns)[0]
    name = next(name for name in wanted.values() if fields.find(name) is None)
    text = f"{uri} has no {what} {name_of(name)}; it has {names(given)}."
    if len(twice := fields.alike(name)) > 1:
        text += f" Which of {names(twice)} is it? Map it in spec.dataset.columns, or rename one."
        return StageError(Reason.COLUMN_NOT_FOUND, text)
    hint = _hint(name, given)
    text += hint
    if not hint and what == "column" and not any(fields.alike(each) for each in wanted.values()):
        text += " Is its first row the header?"
    if columns == Columns():
        text += f" Found without a mapping are: {KNOWN_SAID}."
    text += " Map the columns in spec.dataset.columns, or rename them in the file."
    return StageError(Reason.COLUMN_NOT_FOUND, text)


def _hint(name: str, given: Sequence[str]) -> str:
    """What the file may be instead, or the column that was meant."""
    known = {plain(each): each for each in reversed(given)}
    if {"chosen", "rejected"} <= known.keys():
        return (
            " Preferences (chosen, rejected) can't be learnt from; to learn the chosen answers, "
            "map columns.response to that column."
        )
    if "text" in known and known.keys() - _BESIDE_TEXT == {"text"}:
        return " Text alone is not supported: an example is a question with its answer."
    if known.keys() & {f"'{name}'", f"`{name}`"}:
        return " Its names stand in quotes: set spec.dataset.csv.quote."
    if f'"{name}"' in known:
        return " A quote opens a name only right behind the delimiter: no space before it."
    close = difflib.get_close_matches(plain(name), known, n=1)
    return f" Did you mean {name_of(known[close[0]])}?" if close else ""


def check_unique(fields: Sequence[str], layout: Layout, uri: str) -> None:
    """A column that is used must be there once; raises StageError (ColumnNotFound)."""
    for name in layout.columns.values():
        if (count := list(fields).count(name)) > 1:
            raise StageError(
                Reason.COLUMN_NOT_FOUND,
                f"The header of {uri} has the column {name_of(name)} {count} times: rename one.",
            )


def with_tools(
    layout: Layout, fields: Sequence[str], columns: Columns, uri: str, *, what: str
) -> Layout:
    """The layout with what stands beside a conversation; raises StageError (ColumnNotFound)."""
    if columns.tools is not None and columns.tools not in fields:
        raise StageError(
            Reason.COLUMN_NOT_FOUND,
            f"{uri} has no {what} {name_of(columns.tools)}; it has {names(fields)}. Correct "
            "spec.dataset.columns.tools, or leave it out.",
        )
    beside = {"tools": columns.tools} if columns.tools is not None else {}
    if layout.kind != INSTRUCTION:
        beside = {"tools": columns.tools or "tools", _FORMER_TOOLS: _FORMER_TOOLS}
    used = layout.columns.values()
    found = {part: name for part, name in beside.items() if name in fields and name not in used}
    return Layout(layout.kind, layout.columns | found, layout.asked)


Builder = Callable[[Sequence[Any]], Conversation]
"""Takes the values of the layout's columns, in their order; raises InvalidError."""

RowBuilder = Callable[[Sequence[Any]], tuple[Conversation, Sequence[Tool]]]
"""The same, and the tools that stand beside the conversation."""


def builder(layout: Layout, system_prompt: str | None, ignored: set[str]) -> RowBuilder:
    """Makes conversations of rows; `system_prompt` is for rows without one of their own.

    `ignored` gets the keys of messages that nothing is taken from.
    """
    beside = {part: name for part, name in layout.columns.items() if part in _BESIDE}
    own = {part: name for part, name in layout.columns.items() if part not in _BESIDE}
    fallback = message_of("system", system_prompt) if (system_prompt or "").strip() else None
    if layout.kind == INSTRUCTION:
        build = _instruction(own, fallback)
    else:
        build = _conversation(layout.kind, own, fallback, ignored)
    if not beside:
        return lambda values: (build(values), ())

    def build_row(values: Sequence[Any]) -> tuple[Conversation, Sequence[Tool]]:
        tools: Sequence[Tool] = ()
        for (part, name), value in zip(beside.items(), values[len(own) :], strict=True):
            if part != _FORMER_TOOLS:
                tools = tools_of(value, name)
            elif value not in (None, "", []):
                raise InvalidError(
                    f"it has {name_of(name)}, OpenAI's former notation: convert them to tools"
                )
        return build(values[: len(own)]), tools

    return build_row


def _conversation(
    kind: str, columns: dict[str, str], fallback: Message | None, ignored: set[str]
) -> Builder:
    turns = _prompt_completion if kind == PROMPT else _messages
    parts = list(columns)

    def build(values: Sequence[Any]) -> Conversation:
        row = dict(zip(parts, values, strict=True))
        items = turns(columns, row)
        if "system" in row and (text := cell_of(row["system"], columns["system"])):
            return checked(items, message_of("system", text), ignored)
        return checked(items, fallback, ignored)

    return build


def _instruction(columns: dict[str, str], fallback: Message | None) -> Builder:
    parts = list(columns)
    first, last = parts.index("instruction"), parts.index("response")
    further = parts.index("input") if "input" in parts else None
    own = parts.index("system") if "system" in parts else None
    labels = list(columns.values())

    def build(values: Sequence[Any]) -> Conversation:
        texts = [
            text_of(value, label) if isinstance(value, str) else cell_of(value, label)
            for value, label in zip(values, labels, strict=True)
        ]
        if not texts[first] or not texts[last]:
            blank = [labels[index] for index in (first, last) if not texts[index]]
            raise InvalidError(f"{names(blank)} {'is' if len(blank) == 1 else 'are'} blank")
        asked = texts[first]
        if further is not None and texts[further]:
            asked = f"{asked}\n\n{texts[further]}"
        turns = message_of("user", asked), message_of("assistant", texts[last])
        if own is not None and texts[own]:
            return message_of("system", texts[own]), *turns
        return (fallback, *turns) if fallback else turns

    return build


def _prompt_completion(columns: dict[str, str], row: dict[str, Any]) -> list[Any]:
    sides: list[list[Any]] = []
    for part, role in (("prompt", "user"), ("completion", "assistant")):
        value, label = row[part], columns[part]
        if isinstance(value, list) and value:
            sides.append([_usual(item) for item in value])
        elif value != [] and (text := cell_of(value, label)):
            sides.append([message_of(role, text)])
        else:
            raise InvalidError(f"{name_of(label)} is blank")
    first = sides[1][0]
    if isinstance(first, dict) and first.get("role") != "assistant":
        raise InvalidError(
            f"{name_of(columns['completion'])} does not begin with an assistant's message"
        )
    return [*sides[0], *sides[1]]


def _messages(columns: dict[str, str], row: dict[str, Any]) -> list[Any]:
    value, label = row["messages"], columns["messages"]
    if isinstance(value, str) and value.strip():
        value = from_json(value, label)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise InvalidError(f"{name_of(label)} is blank")
    if not isinstance(value, list):
        raise InvalidError(f"{name_of(label)} is {kind_of(value)}, not a list of messages")
    if isinstance(value[0], dict) and "role" in value[0]:
        return value
    return [_usual(item) for item in value]


def _usual(item: Any) -> Any:
    """ShareGPT's `from` and `value` as role and content; anything else as it is."""
    if not isinstance(item, dict) or "from" not in item or "role" in item:
        return item
    found = {key: value for key, value in item.items() if key not in ("from", "value")}
    speaker = item["from"]
    found["role"] = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if "value" in item:
        found["content"] = item["value"]
    return found
