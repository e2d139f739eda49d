"""The first rows of a dataset, as the model will learn them: which words are the question and which
the answer. The chat template, other formats and the checks of each row are the trainer's."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli.bucket import Bucket
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job

if TYPE_CHECKING:
    from finetune_operator.api.finetunejob import FineTuneJobSpec

CHARACTERS_PER_TOKEN = 4  # of English, by the usual rule of thumb
START_BYTES = 1 << 20
ROWS = 3
SHOWN = 200  # characters of a cell
WILD = "*?["
NEEDS_TRAINER = "finetune run (or prepare, in the cluster) reads it"


def _bucket(uri: str, storage: dict[str, Any], endpoint: str | None) -> Bucket:
    spec = {"output": {"uri": uri}, "storage": storage}
    return Bucket.of(Job({"metadata": {"name": ""}, "spec": spec}), endpoint)


def read_uri(
    uri: str, storage: dict[str, Any], endpoint: str | None, count: int | None = None
) -> bytes:
    """A file in a bucket or on this machine, or its first bytes; raises CliError."""
    found, size = [], 0
    for piece in _bucket(uri, _known(storage), endpoint).pieces(uri):
        found.append(piece)
        size += len(piece)
        if count is not None and size >= count:
            break
    return b"".join(found)[:count]


def dataset_bytes(source: str, storage: dict[str, Any], endpoint: str | None) -> int:
    """Size of a dataset that is one file; raises CliError."""
    if any(mark in source for mark in WILD) or not source.startswith(("s3://", "/")):
        said = "the size of the dataset can't be told here: it is no single file"
        raise CliError(ExitCode.FAILED, said)
    return _bucket(source, _known(storage), endpoint).size(source)


def _known(storage: dict[str, Any]) -> dict[str, Any]:
    """What is set of a store's address."""
    return {key: value for key, value in storage.items() if value is not None}


def first_rows(spec: FineTuneJobSpec, endpoint: str | None) -> list[str]:
    """The first rows in words, or why they can't be shown."""
    source = spec.dataset.source
    if any(mark in source for mark in WILD) or not source.startswith(("s3://", "/")):
        return [f"rows: not shown, {source} is no single file; {NEEDS_TRAINER}"]
    kind = Path(source).suffix
    if kind not in (".csv", ".tsv", ".jsonl", ".json"):
        return [f"rows: not shown, of a {kind or 'file without suffix'}; {NEEDS_TRAINER}"]
    storage = (spec.dataset.storage or spec.storage).model_dump(mode="json", by_alias=True)
    try:
        start = read_uri(source, storage, endpoint, START_BYTES)
    except CliError as error:
        return [f"rows: not shown: {error.message}"]
    columns = spec.dataset.columns.model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        text = start.decode(spec.dataset.encoding or "utf-8-sig", errors="replace")
        shown = list(_described(_records(text, kind, spec), columns))
    except (csv.Error, LookupError) as error:  # a cell without an end, an unknown encoding
        return [f"rows: not shown: {error}; {NEEDS_TRAINER}"]
    return shown or [f"rows: none with the columns {', '.join(columns.values())}; {NEEDS_TRAINER}"]


def _records(text: str, kind: str, spec: FineTuneJobSpec) -> Iterator[dict[str, Any]]:
    if kind in (".csv", ".tsv"):
        given = spec.dataset.csv
        csv.field_size_limit(START_BYTES)  # a cell may be as long as what was read
        yield from csv.DictReader(
            io.StringIO(text),
            delimiter=given.delimiter or ("\t" if kind == ".tsv" else _delimiter(text)),
            quotechar=given.quote or None,
            quoting=csv.QUOTE_MINIMAL if given.quote else csv.QUOTE_NONE,
            escapechar=given.escape,
        )
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            return  # one document over several lines, or the end of what was read
        if isinstance(found, dict):
            yield found


def _delimiter(text: str) -> str:
    """The one that stands most often in the first line."""
    first = text.partition("\n")[0]
    return max(",;\t|", key=first.count)


def _described(records: Iterator[dict[str, Any]], columns: dict[str, str]) -> Iterator[str]:
    """`row 1, instruction: …` for each part that is learnt from or learnt."""
    for number, record in enumerate(records, 1):
        parts = {part: record[name] for part, name in columns.items() if record.get(name)}
        if not parts:
            return
        for part, value in parts.items():
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"row {number}, {part}: {' '.join(words.split())[:SHOWN]}"
        if number == ROWS:
            return
