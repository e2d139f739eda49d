"""Modelfile: what `ollama create` needs to serve the tuned model as it was trained.

The chat template is the one that was trained with, taken to pieces by trying it out and written as
a Go text/template, as Ollama wants it. It is left out, with the reason in a comment, where it can't
be written so that the same text comes out; Ollama then guesses from the template in the GGUF file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Message, Quantization, RunConfig, Tool, display_name
from finetune_trainer.export import llama
from finetune_trainer.export.gguf import MODELFILE
from finetune_trainer.export.gguf.files import preferred
from finetune_trainer.export.llama import Reading, TokenizeRequest
from finetune_trainer.export.ollama_tools import (
    DATE,
    NoToolsError,
    Said,
    ToolShape,
    common_end,
    find_tools,
    go_head,
    go_messages,
    literal,
    one_line,
)
from finetune_trainer.model.rendering import render
from finetune_trainer.model.tokenizer import end_of_turn_ids, is_plain_template

CONTEXT = 4096  # tokens; Ollama's own default
CONTINUES = ("It was trained on plain text, and goes on from what it is given: it knows no chat.",)

ISO_DATE = "%Y-%m-%d"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OllamaTemplate:
    """A template for Ollama, or why there is none."""

    text: str | None
    notes: tuple[str, ...]
    """For the comments above it."""


def write_modelfile(
    folder: Path,
    files: Mapping[Quantization, Path],
    there: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    parameters: int,
    generation: Mapping[str, JsonValue],
    plain_text: bool = False,
) -> Path:
    """Write `Modelfile` to `folder`, which the GGUF files are below.

    `there` is one of them that is on this disk; others may have left it. `parameters` is how many
    the model has, `generation` what its generation_config.json says. `plain_text` says that it was
    trained on that, without a template.
    """
    file = files[preferred(files, parameters)]
    others = [other for other in files.values() if other != file]
    if plain_text and is_plain_template(tokenizer):
        template = OllamaTemplate("{{ .Prompt }}", CONTINUES)
    else:
        template = make_template(tokenizer, there, trained=not plain_text)
    if template.text is None:
        log.warning("The Modelfile has no TEMPLATE: %s", " ".join(template.notes))
    base = display_name(config.model.source)
    lines = [
        f"# {base}, fine-tuned. Serve it with: ollama create NAME -f Modelfile",
        *(f"# Also here: ./{other.relative_to(folder)}" for other in others),
        f"FROM ./{file.relative_to(folder)}",
        *(f"# {note}" for note in template.notes),
        *([f'TEMPLATE """{template.text}"""'] if template.text is not None else []),
        *_system_prompt(config.dataset.system_prompt),
        *_parameters(tokenizer, generation, config.training.max_sequence_length),
    ]
    target = folder / MODELFILE
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def make_template(
    tokenizer: PreTrainedTokenizerBase, file: Path, *, trained: bool = True
) -> OllamaTemplate:
    """The tokenizer's chat template for Ollama; `file` is a GGUF file, which is asked how it splits
    the same text. `trained` says whether the training used it."""
    reader = partial(render, tokenizer, prompt=True, today=dated)
    try:
        found = find_shape(reader)
        shape = without_bos(found, tokenizer, file)
    except NoShapeError as error:
        notes = [
            f"No TEMPLATE: the model's chat template can't be written for Ollama, since {error}.",
            "Ollama takes the one in the GGUF file where it knows it; else write one here.",
        ]
        return OllamaTemplate(None, tuple(notes))
    whose = "that the model was trained with" if trained else "of the base model"
    notes = [f"Written from the chat template {whose}."]
    if shape.system == "refused":
        notes.append("It knows no system prompt: one is put before the first question.")
    if shape.system == "ignored":
        notes.append("It leaves system prompts out.")
    tools: ToolShape | None = None
    if "tools" in str(tokenizer.get_chat_template()):
        try:
            tools = tools_beside(shape, tokenizer, head=found.head.removesuffix(shape.head))
        except NoToolsError as error:
            notes.append(f"It has no tools, since of the model's chat template {error}: let")
            notes.append("llama.cpp (--jinja) or vLLM serve a model that calls some.")
        else:
            notes.append(
                "Ollama writes tools and arguments as JSON without blanks; the model's chat"
            )
            notes.append("template, and so the training, writes them with blanks.")
    if formats := sorted({*DATE.findall(shape.head), *DATE.findall(shape.end)} - {ISO_DATE}):
        notes.append(
            f"It writes today's date as {date.today().isoformat()}, the only way that Ollama has; "
            f"the training's template writes {date.today().strftime(formats[0])}."
        )
    if shape.strips:
        notes.append("It removes blank space around what is said; Ollama leaves it.")
    return OllamaTemplate(go_template(shape, tools), tuple(notes))


def tools_beside(shape: ChatShape, tokenizer: PreTrainedTokenizerBase, *, head: str) -> ToolShape:
    """The tools of the tokenizer's chat template, for Ollama; raises NoToolsError.

    `head` is what Ollama itself puts at the beginning.
    """

    def reader(messages: Sequence[Said], tools: Sequence[Tool]) -> str:
        return render(tokenizer, messages, prompt=True, tools=tools, today=dated)

    if shape.system == "last":
        raise NoToolsError("it puts the system prompt before the last question")
    found = find_tools(reader, system=shape.system == "first")
    between = found.between
    if (shape.answer, shape.further, shape.end) != (
        between["user", "answer"],
        between["answer", "user"],
        between["user", "end"],
    ):
        raise NoToolsError("it writes turns in another way where there are tools")
    listed = found.definitions
    before = listed.before_system
    listed = replace(
        listed,
        head=listed.head.removeprefix(head),
        before_system=before and before.removeprefix(head),
    )
    return replace(found, definitions=listed)


def without_bos(shape: ChatShape, tokenizer: PreTrainedTokenizerBase, file: Path) -> ChatShape:
    """The shape without the token that Ollama itself puts at the beginning.

    Raises NoShapeError when the file's tokens are not those of the training.
    """
    said = trial_conversations(system=shape.system in ("first", "last"))
    iso = date.today().isoformat()  # as Ollama writes it, so both have the same
    texts = [render(tokenizer, messages, prompt=True, today=lambda _: iso) for messages in said]
    adds_bos = llama.call(TokenizeRequest(file=file, texts=()), Reading).adds_bos
    bos = str(tokenizer.bos_token or "")
    if adds_bos and bos:
        shape = replace(
            shape,
            head=shape.head.removeprefix(bos),
            before_system=shape.before_system.removeprefix(bos),
        )
    served = tuple(DATE.sub(iso, shape.render(messages)) for messages in said)
    reading = llama.call(TokenizeRequest(file=file, texts=served), Reading)
    trained = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if [list(tokens) for tokens in reading.tokens] != trained:
        raise NoShapeError("llama.cpp splits what it writes into other tokens than the training")
    return shape


def _system_prompt(prompt: str | None) -> list[str]:
    if not prompt:
        return []
    printable = all(c.isprintable() or c == "\n" for c in prompt)
    if not printable or '"""' in prompt or prompt.endswith('"'):
        return ["# The system prompt of the training can't be written here; pass it by the API."]
    return [f'SYSTEM """{prompt}"""']


def _parameters(
    tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, JsonValue], trained: int
) -> list[str]:
    ends = [str(tokenizer.decode([token])) for token in sorted(end_of_turn_ids(tokenizer))]
    found = [f'PARAMETER stop "{end}"' for end in ends]
    if trained > CONTEXT:
        found.append(f"PARAMETER num_ctx {trained}")
    if generation.get("do_sample"):
        names = ("temperature", "top_p", "top_k")
        found += [f"PARAMETER {n} {generation[n]}" for n in names if generation.get(n) is not None]
    else:
        found.append("PARAMETER temperature 0")
    penalty = generation.get("repetition_penalty") or 1.0
    return [*found, f"PARAMETER repeat_penalty {penalty}"]


def dated(format: str) -> str:  # noqa: A002 - as strftime names it
    """What stands for the present time in this format; ValueError for what is no date."""
    if not re.search("%[dejmyYxD]", format):
        raise ValueError("it writes the time of day, which Ollama can't")
    return f"\ue000{format}\ue001"


class Render(Protocol):
    """The chat template: messages to text, up to where the next answer begins."""

    def __call__(self, messages: Sequence[Message], /) -> str:
        """Raises whatever the template raises."""


class NoShapeError(Exception):
    """The template can't be written as fixed text around what is said; the message says why."""


@dataclass(frozen=True)
class ChatShape:
    """The fixed texts of a conversation that begins with the user and ends with the user."""

    head: str
    """Before the first thing that the user says, where there is no system prompt. A system prompt
    that the template has by itself is in here."""

    system: Literal["first", "last", "refused", "ignored"]
    """Where a system prompt goes: before the first or the last thing that the user says; or what
    the template does to one. A refused one can only be told as a part of the first question."""

    before_system: str
    """In the place of `head` where it goes first; else what stands just before it."""

    after_system: str
    answer: str
    """Between what the user says and an answer."""

    further: str
    """Between an answer and what the user says next."""

    end: str
    """Behind the last thing that the user says: here the model's answer begins."""

    strips: bool = False
    """Whether the template removes blank space around what is said."""

    def render(self, messages: Sequence[Message]) -> str:
        rest = list(messages)
        prompt = rest.pop(0)["content"] if rest[0]["role"] == "system" else ""
        parts = [self.head]
        if prompt and self.system == "first":
            parts = [self.before_system, prompt, self.after_system]
        elif prompt and self.system == "refused":
            parts += [prompt, "\n\n"]
        for index, message in enumerate(rest):
            if index:
                parts.append(self.further if message["role"] == "user" else self.answer)
            if prompt and self.system == "last" and message is rest[-1]:
                parts += [self.before_system, prompt, self.after_system]
            parts.append(message["content"])
        return "".join([*parts, self.end])


def find_shape(render: Render) -> ChatShape:
    """Take a template to pieces; raises NoShapeError."""
    try:
        shape = _pieces(render)
    except NoShapeError:
        raise
    except Exception as error:  # the model's own template runs: anything can come out
        raise NoShapeError(
            f"it fails on a conversation of several turns ({one_line(error)})"
        ) from error
    for messages in trial_conversations(system=shape.system not in ("refused", "ignored")):
        if shape.render(messages) != render(messages):
            raise NoShapeError("what it writes depends on what is said")
    spaced = _turns("  spaced \n")
    if shape.render(spaced) == render(spaced):
        return shape
    if shape.render(_turns("spaced")) != render(spaced):
        raise NoShapeError("what it writes depends on blank space in what is said")
    return replace(shape, strips=True)


def trial_conversations(*, system: bool) -> list[list[Message]]:
    """Conversations to compare renderings on."""
    said = [
        "What is 2+2?",
        "It is 4.",
        'Two\n\nlines, with {{ braces }} and "quotes".',
        "<b>Ünïcödé</b> 漢字 ☕",
        "a",
        "system",
        "user: no",
    ]
    found = []
    for length in (1, 3, 5, 7):
        turns = [_message("assistant" if n % 2 else "user", said[n]) for n in range(length)]
        found.append(turns)
        if system:
            found.append([_message("system", "Be brief.\nBe kind."), *turns])
    return found


_SYSTEM, _ASK1, _TELL1, _ASK2, _TELL2, _ASK3 = (f"☃{n}☃" for n in range(6))
_TURNS = (_ASK1, _TELL1, _ASK2, _TELL2, _ASK3)


def _pieces(render: Render) -> ChatShape:
    head, end = _split(render(_turns(_ASK1)), (_ASK1,))
    first, answer, further, answer_again, further_again, last = _split(
        render(_turns(*_TURNS)), _TURNS
    )
    if (first, answer, further, last) != (head, answer_again, further_again, end):
        raise NoShapeError("it writes later turns in another way than the first")
    system, before, after = _system(render, head, end)
    return ChatShape(head, system, before, after, answer, further, end)


def _system(
    render: Render, head: str, end: str
) -> tuple[Literal["first", "last", "refused", "ignored"], str, str]:
    prompt = _message("system", _SYSTEM)
    try:
        one = render([prompt, *_turns(_ASK1)])
    except Exception:  # templates refuse by raising an error of their own
        return "refused", "", ""
    if _SYSTEM not in one:
        return "ignored", "", ""
    before, after, ended = _split(one, (_SYSTEM, _ASK1))
    if ended != end:
        raise NoShapeError("a system prompt changes what follows the question")
    three = render([prompt, *_turns(*_TURNS)])
    if three.index(_SYSTEM) < three.index(_ASK1):
        return "first", before, after
    if not before.startswith(head):
        raise NoShapeError("a system prompt changes the beginning")
    return "last", before.removeprefix(head), after


def _turns(*said: str) -> list[Message]:
    return [_message("assistant" if n % 2 else "user", text) for n, text in enumerate(said)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """The text before, between and behind the marks, each of which must be there once."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise NoShapeError("it leaves out, repeats or reorders what is said")
        parts.append(before)
    return [*parts, text]


def go_template(shape: ChatShape, tools: ToolShape | None = None) -> str:
    """The template; its renderings equal `shape.render` for conversations that end with the user,
    and those of `tools` where there are some.

    One that ends with an assistant's message is rendered up to that message's end, so that the
    model goes on with it.
    """
    if tools is not None:
        head = go_head(tools.definitions, without=_head(shape, ""))
        return head + "\n".join(go_messages(tools, _inside(shape)))
    ask = common_end([shape.head, shape.further])
    if shape.system == "first":
        ask = common_end([ask, shape.after_system])
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
