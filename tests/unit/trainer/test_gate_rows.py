"""Which rows and tokens the gate measures on."""

from __future__ import annotations

import pytest

from finetune_trainer.export.gate.rows import (
    CONTEXTS,
    FEWEST_ANSWER_TOKENS,
    MAX_ANSWER_TOKENS,
    MAX_ANSWER_TOKENS_OF_ROW,
    MAX_TOKENS,
    MeasuredRows,
    measured_part,
    pick,
    spread,
    within_budget,
)
from finetune_trainer.export.reference import MeasuredRow
from finetune_trainer.model.tokenizer import IGNORED, Encoded

MOST = CONTEXTS[0]


def encoded(prompt: int, answer: int) -> Encoded:
    """A question of some tokens, whose answer is learnt."""
    ids = list(range(prompt + answer))
    return Encoded(ids, [IGNORED] * prompt + ids[prompt:], only_last=False)


def part(prompt: int, answer: int, head: int = 0, context: int = MOST) -> MeasuredRow:
    return measured_part(encoded(prompt, answer), head, context)


def sizes(found: dict[int, MeasuredRow]) -> tuple[int, int]:
    """Answer tokens, and all tokens."""
    rows = found.values()
    return sum(len(row.measured) for row in rows), sum(len(row.ids) for row in rows)


def test_a_short_row_is_measured_whole() -> None:
    assert part(3, 2) == MeasuredRow(ids=(0, 1, 2, 3, 4), measured=(3, 4))


def test_of_a_long_answer_the_beginning_is_measured() -> None:
    row = part(10, 1000)
    assert len(row.measured) == MAX_ANSWER_TOKENS_OF_ROW
    assert row.ids[-1] == row.ids[row.measured[-1]] == 10 + MAX_ANSWER_TOKENS_OF_ROW - 1


def test_of_a_long_prompt_beginning_and_end_are_kept() -> None:
    """BOS and system prompt of 9 tokens, then what is next to the answer."""
    row = part(5000, 4, head=9)
    assert len(row.ids) == MOST + 4
    assert row.ids[:10] == (*range(9), 5000 - (MOST - 9))
    assert [row.ids[position] for position in row.measured] == [5000, 5001, 5002, 5003]


def test_of_a_long_system_prompt_the_beginning_is_kept() -> None:
    row = part(5000, 4, head=3000, context=64)
    assert row.ids == (*range(64), 5000, 5001, 5002, 5003)
    assert row.measured == (65, 66, 67), "what is predicted without its prompt is not measured"


def test_a_token_without_one_before_it_can_not_be_measured() -> None:
    assert measured_part(Encoded([7, 8], [7, 8], only_last=False), 0, MOST) == MeasuredRow(
        ids=(7, 8), measured=(1,)
    )
    assert measured_part(Encoded([7], [7], only_last=False), 0, MOST).measured == ()


def test_rows_are_taken_until_the_budget_of_answers_is_used_up() -> None:
    """From all over the file, the last one in part."""
    found = within_budget([part(5, 100) for _ in range(20)], MAX_TOKENS)
    assert sizes(found)[0] == MAX_ANSWER_TOKENS
    assert list(found) == [0, 3, 6, 10, 13, 16]
    assert [len(row.measured) for row in found.values()] == [100] * 5 + [12]


@pytest.mark.parametrize(
    ("rows", "prompt", "answer"),
    [(256, 200, 2), (256, 500, 3), (40, 900, 60), (30, 8000, 20), (256, 60, 60)],
)
def test_prompts_do_not_use_up_the_budget(rows: int, prompt: int, answer: int) -> None:
    """They are cut, until at least so many answer tokens are measured."""
    found = pick([encoded(prompt, answer)] * rows, [10] * rows)
    answers, tokens = sizes(found)
    assert FEWEST_ANSWER_TOKENS <= answers <= MAX_ANSWER_TOKENS
    assert tokens <= MAX_TOKENS + CONTEXTS[-1] * len(found)
    assert all(row.ids[:10] == tuple(range(10)) for row in found.values())


def test_where_the_data_has_fewer_answer_tokens_all_are_measured() -> None:
    assert sizes(pick([encoded(900, 3)] * 20, [10] * 20))[0] == 60


def test_a_row_without_an_answer_is_not_measured() -> None:
    found = within_budget([MeasuredRow((1, 2), ()), MeasuredRow((1, 2), (1,))], MAX_TOKENS)
    assert sizes(found) == (1, 4)


def test_the_choice_is_spread_over_the_file() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(3), 4) == [0, 1, 2]


def test_tokens_are_known_by_conversation_and_block() -> None:
    rows = tuple(part(5, answer) for answer in (20, 3))
    chosen = MeasuredRows((), (), (), (), rows, places=(1, 4))
    assert chosen.conversations == (1,) * 20 + (4,) * 3
    assert [chosen.blocks.count(block) for block in dict.fromkeys(chosen.blocks)] == [16, 4, 3]
