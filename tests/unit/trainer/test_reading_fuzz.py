"""The reader on tables that nobody thought of: it reads or it refuses, and loses nothing."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from finetune_trainer.contract import Csv, Dataset, Reason
from tests.unit.trainer.reading_fuzz import (
    CELL,
    FAIL,
    FILLED,
    HEADER,
    SKIP,
    Reading,
    fuzz,
    is_within,
    read,
)

CORPUS = Path(__file__).parents[2] / "data" / "corpus"

PREFIXES = [
    b"", HEADER, HEADER + b"a,b\n", b'"instruction"\t"response"\n', b"messages\n",
    b"sep=;\ninstruction;response\n", b'{"instruction": ', b"[", b'[{"',
    b'{"messages": [{"role": "user", "content": "', b"\xef\xbb\xbf", b"\xff\xfei\0n\0", b"\xfe\xff",
    b"\xff\xfe\0\0", b"PAR1", b"\x1f\x8b\x08\0",
]  # fmt: skip


@fuzz(400)
@given(st.sampled_from(PREFIXES), st.binary(max_size=600), st.booleans())
def test_any_bytes_are_read_or_refused(prefix: bytes, data: bytes, zipped: bool) -> None:
    whole = prefix + data
    read(gzip.compress(whole, mtime=0) if zipped else whole, SKIP)


@fuzz(300)
@given(
    st.sampled_from(PREFIXES),
    st.text(alphabet="ab ,;\t|\"'\\\r\n{}[]:é\u2028", max_size=200),
    st.sampled_from([SKIP, FAIL]),
)
def test_any_text_is_read_or_refused(prefix: bytes, text: str, dataset: Dataset) -> None:
    read(prefix + text.encode(), dataset)


NAMES = st.text(st.sampled_from("abcdxyz _-"), max_size=6).filter(lambda name: name != "input")


@st.composite
def tables(draw: st.DrawFn) -> list[list[str]]:
    """A header with further columns around the two, and rows of any text."""
    before, after = draw(st.lists(NAMES, max_size=2)), draw(st.lists(NAMES, max_size=2))
    header = [*before, "instruction", *after, "response"]
    cells = [FILLED if name in ("instruction", "response") else CELL for name in header]
    rows = draw(st.lists(st.tuples(*cells), min_size=1, max_size=6))
    return [header, *(list(row) for row in rows)]


def write(table: list[list[str]], **dialect: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **dialect).writerows(table)
    return out.getvalue()


def examples(table: list[list[str]]) -> list[tuple[str, str]]:
    first, last = table[0].index("instruction"), table[0].index("response")
    return [(row[first], row[last]) for row in table[1:]]


def contents(found: Reading) -> list[tuple[str, str]]:
    if found.error:
        raise found.error
    return [(r.messages[0]["content"], r.messages[1]["content"]) for r in found.records]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"]


@fuzz(400)
@given(
    tables(),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(ENCODINGS),
    st.booleans(),
)
def test_a_table_is_read_as_it_was_written(
    table: list[list[str]], delimiter: str, end: str, encoding: str, quoted: bool
) -> None:
    quoting = csv.QUOTE_ALL if quoted or end != "\r\n" else csv.QUOTE_MINIMAL
    text = write(table, delimiter=delimiter, lineterminator=end, quoting=quoting)
    if encoding[-2:] in ("le", "be"):  # without a mark, only letters give these away
        assume(text[:2].isascii() and "\0" not in text[:2])
    assert contents(read(text.encode(encoding), FAIL)) == examples(table)


@fuzz(400)
@given(tables(), st.sampled_from(",;\t|"), st.sampled_from("\"'"), st.booleans())
def test_other_quotes_are_read_as_they_were_written_where_they_are_named(
    table: list[list[str]], delimiter: str, quote: str, backslash: bool
) -> None:
    dialect: dict[str, Any] = {"delimiter": delimiter, "quotechar": quote, "strict": True}
    if backslash:
        dialect |= {"doublequote": False, "escapechar": "\\"}
    text = write(table, quoting=csv.QUOTE_ALL, **dialect)
    assume(parse(text, **dialect) == table)  # csv.writer forgets some backslashes
    named = Csv(quote=quote, escape="\\" if backslash else None)
    found = read(text.encode(), FAIL.model_copy(update={"csv": named}))
    assert contents(found) == examples(table)


BAD_ROW = st.one_of(
    st.text(st.sampled_from("ab ,;\t\"'\\\n"), max_size=30),
    st.lists(CELL, max_size=4).map(",".join),
    st.sampled_from(["Simplify,a\\,b", '"Hello" she said\tHi', "'a','b'", '"', '"open\na,', ",,,"]),
)


@st.composite
def among_good_rows(draw: st.DrawFn) -> tuple[str, list[tuple[str, str]]]:
    """A table as csv writes it with any one row put in somewhere, and its good rows."""
    rows = draw(st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=6))
    delimiter = draw(st.sampled_from(",;\t|"))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    lines = [
        write([row], delimiter=delimiter, quoting=quoting, lineterminator="\n")
        for row in [["instruction", "response"], *(list(row) for row in rows)]
    ]
    bad = draw(BAD_ROW).replace(",", draw(st.sampled_from([",", delimiter])))
    lines.insert(draw(st.integers(1, len(lines))), f"{bad}\n")
    return "".join(lines), rows


@fuzz(500)
@given(among_good_rows(), st.sampled_from([SKIP, FAIL]))
def test_a_bad_row_leaves_the_good_ones_as_they_were(
    made: tuple[str, list[tuple[str, str]]], dataset: Dataset
) -> None:
    """Or the file is refused."""
    text, good = made
    assume(csv_keeps(good))
    found = read(text.encode(), dataset)
    if not found.error:
        assert is_within(good, contents(found)), (text, contents(found))


def csv_keeps(rows: list[tuple[str, str]]) -> bool:
    """Whether csv.writer and csv.reader agree on them: a lone carriage return is not quoted."""
    return not any("\r" in cell for row in rows for cell in row)


def parse(text: str, **dialect: Any) -> list[list[str]] | None:
    try:
        return list(csv.reader(io.StringIO(text, newline=""), **dialect))
    except csv.Error:
        return None


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode()) or not data
    except UnicodeDecodeError:
        return False


OLD = st.text(st.sampled_from("abc déèàçüöäßñ€“”\u2019\u2013…"), min_size=1).filter(str.strip)


@fuzz(100)
@given(st.lists(st.tuples(OLD, OLD), min_size=1))
def test_old_western_text_is_read_where_it_is_named_and_else_refused(
    rows: list[tuple[str, str]],
) -> None:
    table = [["instruction", "response"], *(list(row) for row in rows)]
    data = write(table).encode("cp1252")
    named = FAIL.model_copy(update={"encoding": "windows-1252"})
    assert contents(read(data, named)) == examples(table)
    if not is_utf8(data):
        error = read(data, FAIL).error
        assert error
        assert error.reason is Reason.DATASET_UNREADABLE


GOOD = [
    (CORPUS / name).read_bytes()
    for name in [
        "quoted-newlines.csv", "more-columns.csv", "mac-lines.csv", "utf-16.csv", "utf-32-be.csv",
        "tabs.tsv", "messages.csv", "good.csv.gz", "good.csv.bz2", "good.csv.xz", "good.csv.zst",
        "kaggle.zip", "sharegpt.json", "excel-utf-8.csv", "good.jsonl", "messages.jsonl",
        "array.json", "good.jsonl.gz",
    ]
]  # fmt: skip
PARQUET = [
    (CORPUS / name).read_bytes()
    for name in ["good.parquet", "messages.parquet", "row-groups.parquet", "dictionary.parquet"]
]


@st.composite
def damaged(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """A good file with some bytes flipped, put in or taken out, or its end cut off."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "insert", "delete", "repeat", "cut"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[at:at] = draw(
                    st.sampled_from([b'"', b"\n", b",", b"\\", b"\0", b"\xff", b"'"])
                )
            case "delete":
                del data[at : at + draw(st.integers(1, 8))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case "cut":
                del data[at:]
    return bytes(data)


def nameless() -> bytes:
    """A zip archive whose directory gives its file no name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", HEADER + b"Who?,Me")
    data = bytearray(file.getvalue())
    entry = data.index(b"PK\x01\x02")
    data[entry + 28], data[entry + 30] = 0, 1  # lengths of the name, and of what comes after it
    return bytes(data)


@fuzz(500)
@given(damaged(GOOD), st.sampled_from([SKIP, FAIL]))
@example(nameless(), SKIP)
def test_a_damaged_file_is_read_or_refused(data: bytes, dataset: Dataset) -> None:
    read(data, dataset)


@fuzz(200)
@given(damaged(PARQUET))
def test_damaged_parquet_is_read_or_refused(data: bytes) -> None:
    read(data, SKIP)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'"', b"'", b"(", b"\\"])
def test_a_long_row_of_openings_ends_in_time(opening: bytes) -> None:
    read(HEADER + opening * 100_000, SKIP)
    read(opening * 100_000, SKIP)
