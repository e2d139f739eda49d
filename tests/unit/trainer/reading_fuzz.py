"""Reads whatever it is given as a dataset, and checks that what comes of it makes sense."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from finetune_trainer.contract import Dataset, Reason, StageError, as_example
from finetune_trainer.prepare.dataset_files import row_hash
from finetune_trainer.prepare.reading import Problems, Record
from tests.reading import open_source

URI = "s3://data/train.csv"
HEADER = b"instruction,response\n"
REASONS = {
    Reason.DATASET_EMPTY,
    Reason.DATASET_UNREADABLE,
    Reason.COLUMN_NOT_FOUND,
    Reason.INVALID_ROWS,
}
SKIP = Dataset(source=URI, on_invalid_row="skip", max_invalid_rows="100%")
FAIL = Dataset(source=URI)


def fuzz(examples: int) -> settings:
    """Other examples in every run, each within twenty seconds on however busy a machine."""
    return settings(
        max_examples=examples,
        deadline=20_000,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@dataclass
class Reading:
    """What became of a file."""

    records: list[Record]
    problems: Problems
    error: StageError | None = None


def read(data: bytes, dataset: Dataset) -> Reading:
    """Read the file; whatever it is, what comes of it must make sense."""
    found = Reading([], Problems())
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            source = open_source(Path(file.name), dataset, URI)
            found.records.extend(source.records(found.problems))
        except StageError as error:
            check_error(error, found.problems)
            found.error = error
        else:
            assert len(found.records) + found.problems.count == source.rows
            assert found.records
            source.detected.model_dump_json().encode()
    if dataset is FAIL and found.error is None:
        assert not found.problems.count
    for record in found.records:
        check_record(record)
    return found


def check_error(error: StageError, problems: Problems) -> None:
    assert error.reason in REASONS
    assert URI in error.message
    assert "\n" not in error.message
    assert len(error.message) < 3500
    error.message.encode()
    if error.reason is Reason.INVALID_ROWS:
        assert error.dataset is not None
        assert error.dataset.invalid == problems.count == len(list(problems)) > 0
        assert error.dataset.rows >= problems.count


def check_record(record: Record) -> None:
    roles = [message["role"] for message in record.messages]
    assert record.number >= 1
    assert {*roles} <= {"system", "user", "assistant", "tool"}
    assert len(roles) > 1
    assert roles[-1] == "assistant"
    for message in record.messages:
        assert message["content"].strip() or message["role"] == "tool" or message["tool_calls"]
    json.dumps(as_example(record.messages, record.tools), ensure_ascii=False).encode()
    row_hash(record.messages, 1, record.tools)


CELL = st.text(
    st.one_of(
        st.sampled_from(" ,;\t|\"'\\\r\n=#{}[]"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=12,
)
FILLED = CELL.filter(str.strip)


def is_within(part: list[Any], whole: list[Any]) -> bool:
    """Whether the items of `part` are in `whole`, in that order."""
    rest = iter(whole)
    return all(item in rest for item in part)
