"""The dataset reader on files that are too big for memory: what it takes stays small."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.contract import Dataset, Reason, StageError
from finetune_trainer.prepare.reading import Problems
from tests.reading import open_source, read_records

URI = "s3://data/train.csv"
HEADER = "instruction,response\n"

# Reads a file in a process of its own and says how much that took beyond the imports.
CHILD = """
import json, re, sys, time
from pathlib import Path
from finetune_trainer.contract import Dataset
from finetune_trainer.contract import StageError
from finetune_trainer.prepare.reading import Problems, open_shards

def peak():
    # Of this program alone: ru_maxrss also counts the process that it was forked from.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, began, problems, count, message = peak(), time.process_time(), Problems(), 0, ""
try:
    source = open_shards([(Path(sys.argv[1]), "/data")], Dataset(source="/data"), "/data")
    for record in source.records(problems):
        count += 1
    source.summary(problems)
except StageError as error:
    message = error.message
seconds = time.process_time() - began
print(json.dumps({"records": count, "problems": problems.count, "message": message,
                  "mebibytes": peak() - before, "seconds": seconds}))
"""


def read_in_child(file: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(file.name, f"{file.stat().st_size / 1e6:.0f} MB", found)
    return found


def write_csv(file: Path, rows: int) -> None:
    """Rows with quotes, line ends and backslashes, so that each is looked at closely."""
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "instruction", "response"])
        for number in range(rows):
            asked = f'What is "{number}", and why?'
            writer.writerow([number, asked, f"It's C:\\{number}.\nBecause of {number * 7}, é."])


def write_bad_csv(file: Path, rows: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.write(HEADER)
        out.writelines(f"What is {number}?,\n" for number in range(rows))


def write_jsonl(file: Path, rows: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            turns = [("user", f"What is {number}?"), ("assistant", f"{number}\nand no more")]
            messages = [{"role": role, "content": content} for role, content in turns]
            out.write(json.dumps({"messages": messages}) + "\n")


def write_array(file: Path, rows: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            example = {"instruction": f"What is {number}?", "response": "word " * 20}
            out.write(f"{',' if number else '['}\n  {json.dumps(example)}")
        out.write("\n]\n")


def write_parquet(file: Path, rows: int) -> None:
    schema = pa.schema({"prompt": pa.string(), "completion": pa.string()})
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, rows, 100_000):
            numbers = range(start, start + 100_000)
            columns = {
                "prompt": [f"What is {number}?" for number in numbers],
                "completion": [f"word {number} " * 20 for number in numbers],
            }
            writer.write_table(pa.table(columns, schema=schema))


@pytest.mark.parametrize(
    ("write", "rows", "mebibytes", "seconds"),
    [
        (write_csv, 1_000_000, 64, 40),
        (write_jsonl, 200_000, 64, 30),
        (write_array, 50_000, 64, 30),
        (write_parquet, 200_000, 150, 30),
    ],
    ids=["a million rows of CSV", "JSON lines", "a JSON array", "Parquet"],
)
def test_a_big_file_takes_little_memory(
    tmp_path: Path,
    write: Callable[[Path, int], None],
    rows: int,
    mebibytes: int,
    seconds: int,
) -> None:
    """The time is the processor's; the limits leave room for a slower one."""
    file = tmp_path / "big"
    write(file, rows)
    found = read_in_child(file)
    assert (found["records"], found["problems"]) == (rows, 0)
    assert found["mebibytes"] < mebibytes
    assert found["seconds"] < seconds


def test_many_bad_rows_take_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "big"
    write_bad_csv(file, 300_000)
    found = read_in_child(file)
    assert (found["records"], found["problems"]) == (0, 300_000)
    assert "and 299,990 more" in found["message"]
    assert found["mebibytes"] < 60


def zipped(file: Path, start: bytes, piece: bytes, mebibytes: int) -> Path:
    """What the start and then nothing but the piece, over and over, shrinks to."""
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(start)
        for _ in range(mebibytes):
            out.write(piece * ((1 << 20) // len(piece)))
    return file


@pytest.mark.parametrize(
    ("start", "piece", "mebibytes", "part"),
    [
        (b"", b"\n", 80, "more than 200 times its size"),
        (b"", b"\0", 80, "byte 0 (0x00)"),
        (HEADER.encode(), b"a", 40, "over 8,388,608 characters"),
        (HEADER.encode() + b'"Who?","', b"a\n", 40, "is a quote never closed?"),
        (b'{"instruction": "', b"a", 40, "over 16,777,216 characters"),
        (b"[", b"[", 40, "nested too deeply"),
        (b'[{"instruction": "', b"a", 40, "over 16,777,216 characters"),
        (b"instruction,response", b",", 12, "columns: it is no table"),
    ],
    ids=[
        "line ends", "zeros", "one cell", "an open quote", "one line of JSON",
        "brackets", "one element", "columns",
    ],
)  # fmt: skip
def test_a_bomb_is_refused_in_bounded_memory(
    tmp_path: Path, start: bytes, piece: bytes, mebibytes: int, part: str
) -> None:
    found = read_in_child(zipped(tmp_path / "bomb.csv.gz", start, piece, mebibytes))
    assert part in found["message"]
    assert found["records"] == 0
    assert found["mebibytes"] < 200
    assert found["seconds"] < 60


@pytest.mark.parametrize("compression", ["bz2", "xz", "zstd", "zip"])
def test_a_bomb_of_another_kind_is_refused_in_bounded_memory(
    tmp_path: Path, compression: str
) -> None:
    file, text = tmp_path / f"bomb.{compression}", HEADER.encode() + 70 * (b"a" * (1 << 20) + b"\n")
    match compression:
        case "bz2":
            file.write_bytes(bz2.compress(text))
        case "xz":
            file.write_bytes(lzma.compress(text, preset=0))
        case "zstd":
            with pa.output_stream(file, compression="zstd") as out:
                out.write(text)
        case _:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                archive.writestr("train.csv", text)
    found = read_in_child(file)
    assert "more than 200 times its size" in found["message"]
    assert found["records"] == 0
    assert found["mebibytes"] < 64


def test_xz_that_takes_much_memory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "wide.xz"
    data = bytearray(lzma.compress(HEADER.encode() * 1000))
    block = slice(12, 12 + 4 * data[12])  # the block's header, without its checksum
    data[16] = 36  # the dictionary's size: 1 GiB
    data[block.stop : block.stop + 4] = zlib.crc32(data[block]).to_bytes(4, "little")
    file.write_bytes(data)
    found = read_in_child(file)
    assert "Memory usage limit exceeded" in found["message"]
    assert found["mebibytes"] < 64


def write_repeated(file: Path, rows: int, *, dictionary: bool) -> None:
    """The same text of 1 MB in each row: a dictionary holds it once, compression shrinks it."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows), ["word " * 200_000])
    texts = column if dictionary else column.cast(pa.string())
    table = pa.table({"prompt": ["Who?"] * rows, "completion": texts})
    pq.write_table(table, file, compression="zstd", use_dictionary=dictionary)


def test_long_texts_in_parquet_are_not_all_in_memory_at_once(tmp_path: Path) -> None:
    write_repeated(tmp_path / "long.parquet", 2000, dictionary=True)
    found = read_in_child(tmp_path / "long.parquet")
    assert found["records"] == 2000
    assert found["mebibytes"] < 300


def test_a_bomb_of_parquet_is_refused(tmp_path: Path) -> None:
    write_repeated(tmp_path / "bomb.parquet", 100, dictionary=False)
    found = read_in_child(tmp_path / "bomb.parquet")
    assert "expands to more than 200 times its size" in found["message"]
    assert found["mebibytes"] < 50


def test_a_cell_as_long_as_any_context_is_read(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    text = "wörd, " * 1_000_000
    file.write_text(f'{HEADER}Who?,"{text}"\nWhen?,Now\n', encoding="utf-8")
    records = list(read_records(file, Dataset(source=URI), URI, Problems()))
    assert [record.messages[1]["content"] for record in records] == [text, "Now"]


def test_a_cell_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_text(f'{HEADER}Who?,Me\n"Two\nlines?",{"word " * 2_000_000}\n', encoding="utf-8")
    problems = Problems()
    with pytest.raises(StageError, match="none can be skipped") as caught:
        list(open_source(file, Dataset(source=URI), URI).records(problems))
    assert caught.value.reason is Reason.INVALID_ROWS
    (bad,) = problems
    assert bad.row == 3
    assert bad.cause == "a cell has over 8,388,608 characters (is a quote never closed?)"
