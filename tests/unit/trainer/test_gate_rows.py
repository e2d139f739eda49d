"""Which rows and tokens the gate measures on."""

from __future__ import annotations

from finetune_trainer.export.gate.rows import (
    MAX_ANSWER_TOKENS,
    MAX_ANSWER_TOKENS_OF_ROW,
    MAX_TOKENS,
    MAX_TOKENS_OF_ROW,
    measured_part,
    spread,
    within_budget,
)
from finetune_trainer.export.reference import MeasuredRow
from finetune_trainer.model.tokenizer import IGNORED, Encoded


def encoded(prompt: int, answer: int) -> Encoded:
    """A question of some tokens, whose answer is learnt."""
    ids = list(range(prompt + answer))
    return Encoded(ids, [IGNORED] * prompt + ids[prompt:], only_last=False)


def test_a_short_row_is_measured_whole() -> None:
    assert measured_part(encoded(3, 2)) == MeasuredRow(ids=(0, 1, 2, 3, 4), measured=(3, 4))


def test_of_a_long_answer_the_beginning_is_measured() -> None:
    row = measured_part(encoded(10, 1000))
    assert len(row.measured) == MAX_ANSWER_TOKENS_OF_ROW
    assert row.ids[-1] == row.ids[row.measured[-1]] == 10 + MAX_ANSWER_TOKENS_OF_ROW - 1


def test_of_a_long_prompt_the_end_is_kept() -> None:
    row = measured_part(encoded(5000, 4))
    assert len(row.ids) == MAX_TOKENS_OF_ROW
    assert [row.ids[position] for position in row.measured] == [5000, 5001, 5002, 5003]


def test_a_token_without_one_before_it_can_not_be_measured() -> None:
    assert measured_part(Encoded([7, 8], [7, 8], only_last=False)) == MeasuredRow(
        ids=(7, 8), measured=(1,)
    )
    assert measured_part(Encoded([7], [7], only_last=False)).measured == ()


def test_rows_are_taken_until_the_budget_of_answers_is_used_up() -> None:
    rows = list(within_budget(measured_part(encoded(5, 100)) for _ in range(20)))
    assert sum(len(row.measured) for row in rows) == MAX_ANSWER_TOKENS
    assert [len(row.measured) for row in rows] == [100] * 5 + [12]
    assert rows[-1].ids[-1] == 5 + 12 - 1


def test_rows_are_taken_until_the_budget_of_all_tokens_is_used_up() -> None:
    sizes = [700] * 20 + [20]
    rows = list(within_budget(measured_part(encoded(size - 1, 1)) for size in sizes))
    assert [len(row.ids) for row in rows] == [700] * (MAX_TOKENS // 700) + [20]


def test_a_row_without_an_answer_is_left_out() -> None:
    rows = [MeasuredRow((1, 2), ()), MeasuredRow((1, 2), (1,))]
    assert list(within_budget(rows)) == rows[1:]


def test_the_choice_is_spread_over_the_file() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(3), 4) == [0, 1, 2]
