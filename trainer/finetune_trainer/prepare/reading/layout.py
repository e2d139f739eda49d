"""Which columns (or JSON keys) make up an example: of answers, of pairs, or of labelled answers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from finetune_trainer.contract import Columns, Dataset, Objective, Reason, StageError
from finetune_trainer.prepare.reading.record import name_of, names

INSTRUCTION, PROMPT, MESSAGES = "instruction", "prompt-completion", "messages"
PAIR, TEXT = "preference", "text"
TAKES_INPUT = (INSTRUCTION, PAIR)  # kinds with a column of further input
LABEL = "label"

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
    "conversations; prompt and completion (or response); question and answer; text alone"
)

OPENAI_PAIR = {
    "prompt": "input",
    "chosen": "preferred_output",
    "rejected": "non_preferred_output",
}
PAIRS_SAID = (
    "chosen and rejected, with prompt, instruction or question; chosen and rejected as whole "
    "conversations; input, preferred_output and non_preferred_output"
)
LABELLED_SAID = (
    "a column label beside prompt and completion (or response), instruction and response (or "
    "output), question and answer, messages or conversations"
)

FORMER_TOOLS = "functions"
BESIDE = ("tools", FORMER_TOOLS)  # what may stand beside a conversation; last in a layout
OPTIONAL = ("input", "system", *BESIDE)  # parts that may be blank
_WHOLE_LAYOUT = 1000  # outweighs any number of single names
_INVISIBLE = "\\s\u00ad\u200b-\u200f\u2060\ufeff"  # white space, with the hard and the narrow ones
_AROUND = re.compile(f"^[{_INVISIBLE}]+|[{_INVISIBLE}]+$")
_BESIDE_TEXT = {
    *("", "id", "idx", "index", "meta", "metadata", "source", "title", "url", "date", "timestamp"),
    *("author", "file_path", "path", "filename", "dump", "lang", "language", "language_score"),
    *("license", "score", "tokens", "token_count"),
}
"""Columns that say something about a text, and are nothing to learn from."""


@dataclass(frozen=True)
class Layout:
    """A layout, with the column that holds each part."""

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


Candidates = list[tuple[str, dict[str, str]]]
"""Kinds of layout, each with the names that it looks for by part; the first that is there whole."""


@dataclass(frozen=True)
class Wanted:
    """What is looked for in a file."""

    columns: Columns
    candidates: Candidates
    said: str = KNOWN_SAID
    """What is found without a mapping."""

    hint: Callable[[dict[str, str]], str] | None = None
    """What a file with such columns may be instead, by their plain names."""


def wanted_for(objective: Objective, columns: Columns) -> Wanted:
    """What an objective learns from: as mapped, or under the known names."""
    answers = _candidates(columns)
    if objective == "sft":
        return Wanted(columns, [*answers, *_text(columns)], hint=_hint_of_answers)
    if columns.text is not None:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.dataset.columns.text names plain text, and spec.training.objective {objective} "
            "learns from answers: set it to sft, or map the columns with the answers.",
        )
    if objective != "kto":
        return Wanted(columns, _pairs(columns), PAIRS_SAID, _hint_of_pairs(objective))
    label = {LABEL: columns.label or "label"}
    found = [(kind, asked | label) for kind, asked in answers]
    if columns.label is None:
        pairs = _pairs(columns)
        # What the mapping names is what a message asks for.
        found = [*pairs, *found] if columns.chosen or columns.rejected else [*found, *pairs]
    said = f"{LABELLED_SAID}; or pairs ({PAIRS_SAID})"
    return Wanted(columns, found, said, _hint_of_pairs(objective))


def check_text(layout: Layout, fields: Sequence[str], dataset: Dataset, uri: str) -> None:
    """Raise StageError(InvalidConfig) where text may be one side of an example, or is prompted."""
    if layout.kind != TEXT:
        return
    beside = [name for name in fields if plain(name) not in _BESIDE_TEXT | {TEXT}]
    column = layout.columns[TEXT]
    if dataset.columns.text is None and beside:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{uri} has the column {name_of(column)} beside {names(beside)}: is it plain text, or "
            "one side of an example? To learn the text alone, as it is, set spec.dataset.columns: "
            f"{{text: {column}}}. For questions and answers, map instruction and response there.",
        )
    if dataset.system_prompt:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.dataset.systemPrompt: plain text (the column {name_of(column)} of {uri}) is "
            "learnt as it is, without a system prompt. Leave systemPrompt out.",
        )


def check_objective(layout: Layout, fields: Sequence[str], wanted: Wanted, uri: str) -> None:
    """Raise StageError(InvalidConfig) where sft would learn answers that are marked as bad."""
    labelled = layout.kind == PROMPT and "completion" in layout.columns.values()
    label = Fields(fields).find("label")
    if wanted.said != KNOWN_SAID or wanted.columns != Columns() or not labelled or label is None:
        return
    prompt, completion = layout.columns["prompt"], layout.columns["completion"]
    raise StageError(
        Reason.INVALID_CONFIG,
        f"{uri} has the column {name_of(label)} beside {names((prompt, completion))}, as data for "
        "kto has, and spec.training.objective is sft: set it to kto. To learn every answer "
        f"whatever its label, map spec.dataset.columns: {{instruction: {prompt}, response: "
        f"{completion}}}.",
    )


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


def find_layout(names: Sequence[str], wanted: Wanted) -> Layout | None:
    """The layout of a file with these columns; None where it lacks one that is needed."""
    return _first_whole(Fields(names), wanted.candidates)


def find_json_layout(shapes: Sequence[tuple[str, ...]], wanted: Wanted, uri: str) -> Layout | None:
    """The layout of objects with these keys, by their exact names.

    An object of another layout than the rest, which could decide on how they are read, makes the
    file ambiguous: raises StageError(DatasetUnreadable).
    """
    candidates = wanted.candidates
    found: Candidates = []
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


def _first_whole(fields: Fields, candidates: Candidates) -> Layout | None:
    for kind, asked in candidates:
        found = {part: name for part, it in asked.items() if (name := fields.find(it)) is not None}
        if len(found) == len(asked):
            return _with_input(Layout(kind, found, asked), fields)
    return None


def _with_input(layout: Layout, fields: Fields) -> Layout:
    """The layout with a column named `input`, where there is one that is not used yet."""
    more, used = fields.find("input"), layout.columns
    known = layout.kind in TAKES_INPUT and used.keys() & {"instruction", "prompt"}
    if not known or "input" in used or more is None or more in used.values():
        return layout
    return Layout(layout.kind, used | {"input": more}, layout.asked | {"input": "input"})


def _text(columns: Columns) -> Candidates:
    """Plain text, where nothing else is mapped."""
    return [(TEXT, {TEXT: columns.text or TEXT})] if columns.text or columns == Columns() else []


def _candidates(columns: Columns) -> Candidates:
    if columns.text:
        return []
    system = {"system": columns.system} if columns.system else {}
    if columns.messages:
        return [(MESSAGES, {"messages": columns.messages} | system)]
    if maps_answers(columns):
        return [(INSTRUCTION, _mapped(columns))]
    return [(kind, asked | system) for kind, asked in KNOWN]


def _pairs(columns: Columns) -> Candidates:
    """The layouts of pairs. Whole conversations come last, since they have no column more."""
    pair = {"chosen": columns.chosen or "chosen", "rejected": columns.rejected or "rejected"}
    system = {"system": columns.system} if columns.system else {}
    further = {"input": columns.input} if columns.input else {}
    asked = columns.instruction
    known = (asked,) if asked != Columns().instruction else ("prompt", asked, "question")
    found = [(PAIR, {"prompt": name} | further | system | pair) for name in known]
    if len(known) == 1:
        return found
    if columns.chosen is None and columns.rejected is None:
        found.append((PAIR, OPENAI_PAIR | system))
    return [*found, (PAIR, pair | system)]


def maps_answers(columns: Columns) -> bool:
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


def default_layout(wanted: Wanted) -> Layout:
    """The layout of a file without a single readable object: each row says why it is none."""
    kind, asked = wanted.candidates[0]
    return Layout(kind, asked, asked)


def check_columns(columns: Columns) -> None:
    """One column can't be two things; raises StageError (InvalidConfig)."""
    seen: dict[str, str] = {}
    pair = {"chosen": columns.chosen, "rejected": columns.rejected, "label": columns.label}
    mapped = _mapped(columns) | {part: name for part, name in pair.items() if name is not None}
    for part, name in mapped.items():
        if name in seen:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"spec.dataset.columns: {seen[name]} and {part} are both {name!r}; "
                "name two columns.",
            )
        seen[name] = part


def fit(names: Sequence[str], wanted: Wanted) -> int:
    """How well a header suits: a whole layout is best, then as many wanted names as possible."""
    if find_layout(names, wanted):
        return _WHOLE_LAYOUT
    fields = Fields(names)
    every = {name for _, asked in wanted.candidates for name in asked.values()}
    return sum(bool(fields.alike(name)) for name in every)


def missing_column(
    given: Sequence[str], wanted: Wanted, uri: str, *, what: str = "column"
) -> StageError:
    """The error for a file that lacks a column, with what it has and a hint."""
    fields = Fields(given)
    _, asked = wanted.candidates[0]
    name = next(name for name in asked.values() if fields.find(name) is None)
    text = f"{uri} has no {what} {name_of(name)}; it has {names(given)}."
    if len(twice := fields.alike(name)) > 1:
        text += f" Which of {names(twice)} is it? Map it in spec.dataset.columns, or rename one."
        return StageError(Reason.COLUMN_NOT_FOUND, text)
    hint = _hint(name, given, wanted)
    text += hint
    if not hint and what == "column" and not any(fields.alike(each) for each in asked.values()):
        text += " Is its first row the header?"
    if wanted.columns == Columns():
        text += f" Found without a mapping are: {wanted.said}."
    text += " Map the columns in spec.dataset.columns, or rename them in the file."
    return StageError(Reason.COLUMN_NOT_FOUND, text)


def _hint(name: str, given: Sequence[str], wanted: Wanted) -> str:
    """What the file may be instead, or the column that was meant."""
    known = {plain(each): each for each in reversed(given)}
    if wanted.hint and (hint := wanted.hint(known)):
        return hint
    if known.keys() & {f"'{name}'", f"`{name}`"}:
        return " Its names stand in quotes: set spec.dataset.csv.quote."
    if f'"{name}"' in known:
        return " A quote opens a name only right behind the delimiter: no space before it."
    close = difflib.get_close_matches(plain(name), known, n=1)
    return f" Did you mean {name_of(known[close[0]])}?" if close else ""


def _hint_of_pairs(objective: Objective) -> Callable[[dict[str, str]], str]:
    def hint(known: dict[str, str]) -> str:
        pair = known.keys() & {"chosen", "rejected", "preferred_output", "non_preferred_output"}
        answers = any(set(asked.values()) <= known.keys() for _, asked in KNOWN)
        if pair or not answers:
            return ""
        needs = "a label (true or false)" if objective == "kto" else "a chosen and a rejected one"
        return (
            f" spec.training.objective is {objective}, which needs {needs} for each question. To "
            "learn answers as they are, set it to sft."
        )

    return hint


def _hint_of_answers(known: dict[str, str]) -> str:
    for pair in (("chosen", "rejected"), ("preferred_output", "non_preferred_output")):
        if known.keys() >= set(pair):
            return (
                f" Preferences ({', '.join(pair)}) are learnt by another objective: set "
                "spec.training.objective to dpo, orpo or kto. To learn the chosen answers alone, "
                "map columns.response to that column."
            )
    return ""


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
    if layout.kind not in (INSTRUCTION, TEXT):
        beside = {"tools": columns.tools or "tools", FORMER_TOOLS: FORMER_TOOLS}
    used = layout.columns.values()
    found = {part: name for part, name in beside.items() if name in fields and name not in used}
    return Layout(layout.kind, layout.columns | found, layout.asked)
