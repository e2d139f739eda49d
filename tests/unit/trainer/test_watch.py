"""Whether answers follow from their questions: which rows are compared, and what is concluded."""

from __future__ import annotations

import random

import pytest

from finetune_trainer.contract import Example, Message, NoticeCode
from finetune_trainer.train.recipe.watch import (
    FEWEST_PAIRS,
    AnswerLoss,
    judge_answers,
    swap_questions,
)

THOUGHT: Message = {"role": "assistant", "content": "b", "reasoning_content": "Hm."}


def row(question: str, answer: str, *before: str) -> Example:
    turns: list[Message] = [{"role": "assistant", "content": text} for text in before]
    return {
        "prompt": [*turns, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def test_each_answer_meets_the_question_of_a_row_far_from_it() -> None:
    rows = [row(f"q{number}", f"a{number}") for number in range(4)]
    pairs = [
        (own["prompt"][0]["content"], other["prompt"][0]["content"], other["completion"])
        for own, other in swap_questions(rows)
    ]
    assert [pair[:2] for pair in pairs] == [("q0", "q2"), ("q1", "q3"), ("q2", "q0"), ("q3", "q1")]
    assert [pair[2] for pair in pairs] == [each["completion"] for each in rows]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("q", "a")],
        [row("same", "a"), row("same", "b")],
        [row("p", "same"), row("q", "same")],
        [row("p", "a"), row("q", "b", "an earlier answer")],
        [row("p", "a"), {**row("q", "b"), "tools": [{"function": {"name": "f"}}]}],
        [row("p", "a"), {**row("q", "b"), "completion": [THOUGHT]}],
    ],
    ids=["nothing", "one row", "one question", "one answer", "conversations", "tools", "reasoning"],
)
def test_rows_that_can_not_tell_are_left_out(rows: list[Example]) -> None:
    assert swap_questions(rows) == []


def losses(own: float, gain: float, noise: float, count: int = 16) -> list[AnswerLoss]:
    chance = random.Random(1)  # noqa: S311 - noise
    return [AnswerLoss(own, own + gain + chance.gauss(0, noise)) for _ in range(count)]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        pytest.param(losses(2.84, -0.04, 0.17, 12), True, id="shuffled, as measured"),
        pytest.param(losses(2.29, 1.35, 0.44, 12), False, id="in order, as measured"),
        pytest.param(losses(2.0, 0.3, 0.2), False, id="questions that tell a little"),
        pytest.param(losses(2.2, 0.1, 0.06), False, id="long answers, which tell it more surely"),
        pytest.param(losses(2.0, 0.0, 1.5), False, id="too noisy to tell"),
        pytest.param(losses(0.2, 0.0, 0.01), False, id="all is learnt"),
        pytest.param(losses(2.84, 0.0, 0.1, FEWEST_PAIRS - 1), False, id="too few rows"),
    ],
)
def test_a_difference_of_nothing_is_said(pairs: list[AnswerLoss], expected: bool) -> None:
    notice = judge_answers(pairs, 87)
    assert (notice is not None) is expected
    if notice is not None:
        assert (notice.code, notice.step) == (NoticeCode.ANSWERS_UNRELATED, 87)
        assert "12 held-out answers have a mean loss of 2.84 with their own" in notice.evidence
