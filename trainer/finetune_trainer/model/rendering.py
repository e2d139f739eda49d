"""A conversation as text: the model's own chat template, applied under a time limit.

Templates differ in how they want tools: arguments as an object or as JSON text, no content beside a
call as "" or as none, reasoning under one key or another. What a template doesn't know it leaves
out without a word. So a conversation with more than questions and answers is rendered twice: first
with a mark in the place of each text, which shows what the template leaves out; then as it is.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Example, Message, Reason, StageError, Tool, is_document

SECONDS = 5.0
"""CPU time for one conversation. A question and an answer take a thousandth of that; a thousand
turns take 2 seconds with the slowest template in use (Gemma 4's, which is quadratic)."""

REASONING = ("reasoning_content", "thinking")
"""Where templates look for it: the second is gpt-oss's and LFM2's."""

BEGUN = 400  # characters of plain text that a model goes on from, at most
_PLAIN_TURNS = re.compile("s?(ua)+")  # initials of the roles
_NUMBER = 7_310_000_000  # marks that must be numbers begin here


class NotRenderedError(ValueError):
    """The chat template leaves out something that the row says; the text says what."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message] | Sequence[dict[str, Any]],
    *,
    prompt: bool = False,
    tools: Sequence[Tool] = (),
    today: Callable[[str], str] | None = None,
) -> str:
    """Messages as text; with `prompt` up to where the model's next answer begins.

    `today` makes the present time of a format, as strftime does; without it, it is now.

    Raises StageError(ModelUnsupported) when the template takes too long, and whatever the template
    raises for a conversation that it refuses.
    """
    # A template is a program, and may loop for days. Only a main thread can be interrupted so, and
    # there `prepare` renders, before any other stage does.
    limited = threading.current_thread() is threading.main_thread()
    # In place of transformers' own.
    more: dict[str, Any] = {"strftime_now": today} if today else {}
    if limited:
        _watch()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),  # type: ignore[arg-type]  # templates take more than text
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=prompt,
            **more,
        )
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return str(text)


def render_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The whole conversation as text; see `render`. Raises NotRenderedError.

    Of plain text: that, between the tokens that begin and end a text.
    """
    if is_document(example):
        return begin_of_text(tokenizer) + text_of(example) + str(tokenizer.eos_token)
    return script(tokenizer, example).render(tokenizer)


def render_prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The question as text, up to where the model's answer begins; as `render_example`.

    Of plain text: its beginning.
    """
    if is_document(example):
        return begin_of_text(tokenizer) + begun_and_rest(text_of(example))[0]
    part = script(tokenizer, example)
    return part.render(tokenizer, len(part.messages) - 1, prompt=True)


def text_of(document: Example) -> str:
    """Plain text as the dataset has it."""
    return document["completion"][-1]["content"]


def begun_and_rest(text: str) -> tuple[str, str]:
    """The beginning of plain text, which a model is asked to go on from, and how it goes on.

    It is the first half, or the first BEGUN characters, up to the end of a word.
    """
    middle = min(len(text) // 2, BEGUN)
    words = list(re.finditer(r"(?<=\S)(?=\s)", text[: middle + 1]))
    cut = words[-1].start() if words else middle
    return text[:cut], text[cut:]


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer puts before each text, where it does."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


@dataclass(frozen=True)
class Script:
    """A conversation in the form in which the model's chat template takes it."""

    messages: list[dict[str, Any]]
    tools: list[Tool]
    plain: bool = False
    """Whether there is nothing but questions and answers in turn."""

    leaves_reasoning_out: bool = False
    """Whether the template leaves out the reasoning of earlier answers, as several do."""

    def render(
        self, tokenizer: PreTrainedTokenizerBase, end: int | None = None, *, prompt: bool = False
    ) -> str:
        """The messages before `end` as text; see the function of this name."""
        return render(tokenizer, self.messages[:end], prompt=prompt, tools=self.tools)


def script(tokenizer: PreTrainedTokenizerBase, example: Example) -> Script:
    """The first form of a conversation of which the template renders everything.

    Raises NotRenderedError where there is none, and what the template raises where it refuses all.
    """
    messages = example["prompt"] + example["completion"]
    if _is_plain(example, messages):
        return Script([*messages], [], plain=True)  # type: ignore[list-item]  # as in `render`
    refusals: list[Exception] = []
    fewest: list[str] | None = None
    for form in _forms(messages):
        taken = Script([form.message(each) for each in messages], example.get("tools", []))
        try:
            lost = _lost(tokenizer, taken)
        except StageError:
            raise
        except Exception as error:  # the model's own template runs: anything can come out
            refusals.append(error)
            continue
        if not lost.needed:
            return replace(taken, leaves_reasoning_out=lost.reasoning)
        if fewest is None or len(lost.needed) < len(fewest):
            fewest = lost.needed
    if fewest is None:
        raise refusals[0]
    raise NotRenderedError(
        f"the model's chat template leaves out {', '.join(fewest)}: choose a model whose template "
        "knows that, or take it out of the rows"
    )


def _is_plain(example: Example, messages: Sequence[Message]) -> bool:
    turns = "".join(message["role"][0] for message in messages)
    return (
        "tools" not in example
        and all(len(message) == len(("role", "content")) for message in messages)
        and _PLAIN_TURNS.fullmatch(turns) is not None
    )


@dataclass(frozen=True)
class _Form:
    """How a template may want what goes beyond text."""

    arguments_as_text: bool
    no_content: str | None
    reasoning: str

    def message(self, message: Message) -> dict[str, Any]:
        found: dict[str, Any] = {**message}
        found.pop("weight", None)  # not the template's business
        if "reasoning_content" in found:
            found[self.reasoning] = found.pop("reasoning_content")
        if "tool_calls" not in message:
            return found
        found["content"] = message["content"] or self.no_content
        if self.arguments_as_text:
            found["tool_calls"] = [
                {**call, "function": call["function"] | {"arguments": _as_text(call)}}
                for call in message["tool_calls"]
            ]
        return found


def _as_text(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)


def _forms(messages: Sequence[Message]) -> Iterator[_Form]:
    """The forms to try, transformers' own first; one where they would all be the same."""
    calls = [message for message in messages if "tool_calls" in message]
    reasons = any("reasoning_content" in message for message in messages)
    for form in product(
        (False, True) if calls else (False,),
        ("", None) if any(not message["content"] for message in calls) else ("",),
        REASONING if reasons else REASONING[:1],
    ):
        yield _Form(*form)


@dataclass
class _Marks:
    """Texts that stand for what a row says."""

    needed: dict[str, str] = field(default_factory=dict)
    """What each mark stands for."""

    thoughts: dict[str, int] = field(default_factory=dict)
    """Marks of the reasoning of earlier answers, with the messages up to each answer."""

    def text(self, what: str) -> str:
        mark = f"zq{len(self.needed)}qz"  # no template escapes this or takes it for something else
        self.needed[mark] = what
        return mark

    def thought(self, end: int) -> str:
        mark = f"zr{end}rz"
        self.thoughts[mark] = end
        return mark

    def value(self, value: Any, what: str) -> Any:
        """The value with a mark for each text and whole number in it."""
        if isinstance(value, str):
            return self.text(what) if value.strip() else value
        if isinstance(value, int) and not isinstance(value, bool):
            number = _NUMBER + len(self.needed)
            self.needed[str(number)] = what
            return number
        if isinstance(value, list):
            return [self.value(item, what) for item in value]
        if isinstance(value, dict):
            return {self.text(what): self.value(item, what) for item in value.values()}
        return value

    def message(self, message: Mapping[str, Any], end: int | None) -> dict[str, Any]:
        """The message with marks; `end` counts the messages up to it, where others follow."""
        found, role = {**message}, message["role"]
        calls = message.get("tool_calls", [])
        if message["content"]:
            beside = "beside tool_calls" if calls else f"of the role {role}"
            found["content"] = self.text(f"the content {beside}")
        for key in REASONING:
            if key in message:
                found[key] = self.text("reasoning_content") if end is None else self.thought(end)
        if "name" in message and role != "tool":  # a tool's answer has its place
            found["name"] = self.text("name")
        if calls:
            found["tool_calls"] = [
                {**call, "function": self._call(call["function"])} for call in calls
            ]
        return found

    def _call(self, function: Mapping[str, Any]) -> dict[str, Any]:
        what, arguments = "tool_calls", function["arguments"]
        if isinstance(arguments, str):
            arguments = json.dumps(self.value(json.loads(arguments), what))
        else:
            arguments = self.value(arguments, what)
        return {"name": self.text(what), "arguments": arguments}

    def tool(self, tool: Tool) -> Tool:
        """A tool's definition with marks for names and descriptions; types stay."""
        function = self._described(tool["function"])
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict):
            names = {name: self.text("tools") for name in properties}
            marked = {names[name]: self._described(about) for name, about in properties.items()}
            function["parameters"] = {**parameters, "properties": marked}
            if isinstance(required := parameters.get("required"), list):
                function["parameters"]["required"] = [names.get(name, name) for name in required]
        return {**tool, "function": {**function, "name": self.text("tools")}}

    def _described(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        about = value.get("description")
        if not (isinstance(about, str) and about.strip()):
            return {**value}
        return {**value, "description": self.text("tools")}


@dataclass(frozen=True)
class _Lost:
    """What a template leaves out."""

    needed: list[str]
    reasoning: bool
    """Whether earlier answers lose their reasoning, and the template means it so."""


def _lost(tokenizer: PreTrainedTokenizerBase, taken: Script) -> _Lost:
    marks, last = _Marks(), len(taken.messages)
    tools = [marks.tool(tool) for tool in taken.tools]
    messages = [
        marks.message(message, end if end < last else None)
        for end, message in enumerate(taken.messages, start=1)
    ]
    text = render(tokenizer, messages, tools=tools)
    needed = [what for mark, what in marks.needed.items() if mark not in text]
    thoughts = [(mark, end) for mark, end in marks.thoughts.items() if mark not in text]
    if thoughts:
        mark, end = thoughts[0]
        # A template that knows reasoning shows it in the last answer, and maybe in no other.
        if mark not in render(tokenizer, messages[:end], tools=tools):
            needed.append("reasoning_content")
    return _Lost(list(dict.fromkeys(needed)), bool(thoughts))


@cache
def _watch() -> None:
    signal.signal(signal.SIGPROF, _too_slow)


def _too_slow(_signal: int, _frame: object) -> NoReturn:
    raise StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model's chat template computes for more than {SECONDS:g} seconds on one "
        "conversation: does it loop? Correct chat_template in tokenizer_config.json or "
        "chat_template.jinja, or choose another base model.",
    )
