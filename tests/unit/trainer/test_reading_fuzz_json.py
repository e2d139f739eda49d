"""The reader on JSON that nobody thought of: it reads or it refuses, and loses nothing."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.contract import Columns
from tests.unit.trainer.reading_fuzz import (
    FILLED,
    SKIP,
    fuzz,
    is_within,
    read,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "weight", "from", "value"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
TEXT = st.text(max_size=4) | st.just("a")
FUNCTION = st.fixed_dictionaries(
    {"name": st.just("f") | TEXT},
    optional={"arguments": st.sampled_from(["{}", '{"a": 1}', "["]) | JSON, "parameters": JSON},
)
CALLED = st.fixed_dictionaries(
    {"function": FUNCTION},
    optional={"id": st.sampled_from(["1", "2", None]), "type": st.just("function") | JSON},
)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=2)
FURTHER: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "developer": {},
    "user": {"name": TEXT},
    "assistant": {
        "tool_calls": st.lists(CALLED, max_size=2),
        "reasoning_content": st.none() | TEXT,
        "weight": st.sampled_from([None, 0, 1, 1.0, 2]),
    },
    "tool": {"tool_call_id": st.sampled_from(["1", "2"])},
}
TURNS = {
    role: st.fixed_dictionaries({"role": st.just(role), "content": TEXT | PARTS}, optional=further)
    for role, further in FURTHER.items()
}
BEFORE = st.lists(st.one_of(*TURNS.values()), min_size=1, max_size=4)
CHAT = st.tuples(BEFORE, TURNS["assistant"]).map(lambda parts: [*parts[0], parts[1]])
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.text(max_size=4),
    }
)
VALUE = JSON | st.lists(MESSAGE | JSON, max_size=4) | CHAT | st.lists(CALLED, max_size=2)
KEYS = [
    "instruction", "input", "response", "system", "prompt", "completion", "messages",
    "conversations", "tools",
]  # fmt: skip


LAYOUTS = [
    ("instruction", "response"), ("instruction", "output"), ("prompt", "completion"),
    ("prompt", "response"), ("question", "answer"),
]  # fmt: skip


@fuzz(200)
@given(
    st.sampled_from(LAYOUTS),
    st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=5),
    st.one_of(
        st.dictionaries(st.sampled_from([*KEYS, "output", "question", "answer"]), JSON).map(
            json.dumps
        ),
        st.sampled_from(["{", "[", '{"a": NaN, "a": 1}', "null", '"', "{}}"]),
    ),
    st.integers(0, 5),
)
def test_a_bad_line_leaves_the_good_ones_as_they_were(
    keys: tuple[str, str], good: list[tuple[str, str]], bad: str, place: int
) -> None:
    """Or the file is refused."""
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in good]
    lines.insert(place, bad)
    found = read("".join(f"{line}\n" for line in lines).encode(), SKIP)
    if not found.error:
        assert is_within(
            good, [tuple(m["content"] for m in r.messages[-2:]) for r in found.records]
        )


@fuzz(200)
@given(
    st.lists(
        JSON | st.dictionaries(st.sampled_from(KEYS), VALUE),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([Columns(), Columns(system="system"), Columns(messages="messages")]),
    st.booleans(),
)
def test_any_json_is_mapped_or_refused(items: list[Any], columns: Columns, array: bool) -> None:
    lines = [json.dumps(item) for item in items]
    text = f"[{','.join(lines)}]" if array else "".join(f"{line}\n" for line in lines)
    read(text.encode(), SKIP.model_copy(update={"columns": columns}))


@fuzz(200)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"messages": CHAT}, optional={"tools": st.lists(CALLED, max_size=2) | JSON}
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_conversation_is_read_or_refused(items: list[Any]) -> None:
    read("".join(f"{json.dumps(item)}\n" for item in items).encode(), SKIP)
