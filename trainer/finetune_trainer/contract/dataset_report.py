"""What `prepare` found in the dataset: in status, and as dataset-report.json."""

from __future__ import annotations

from pydantic import ConfigDict

from finetune_trainer.contract.base import Base


class BadRow(Base):
    """A row of the dataset that can't be used."""

    file: str | None = None
    """The file it is in, where the dataset is several."""

    row: int
    """Number of the row or line, as a spreadsheet or editor counts: the header is 1."""

    cause: str
    """What is wrong with it."""


class DatasetSummary(Base):
    """What `prepare` found in the dataset; dataset-report.json in the output has all of it."""

    rows: int = 0
    """Rows in the file."""

    examples: int = 0
    """Rows that are trained on."""

    eval_examples: int = 0
    """Rows that are held out."""

    invalid: int = 0
    """Rows that can't be used."""

    duplicates: int = 0
    """Rows that say the same as an earlier one; where a bad row makes it fail, those before it."""

    truncated: int = 0
    """Examples longer than training.maxSequenceLength."""

    tokens: int = 0
    """Tokens of one pass over the examples."""

    first_invalid: tuple[BadRow, ...] = ()
    """The first ten rows that can't be used."""


class ListedRows(Base):
    """Rows that have something in common, by their numbers in the file."""

    count: int
    rows: list[int] | None = None
    """Left out where the dataset is several files."""

    files: dict[str, list[int]] | None = None
    """Where the dataset is several files: the rows of each that has any."""


class LengthSpread(Base):
    """Lengths of examples in tokens."""

    min: int
    median: float
    mean: float
    p95: int
    p99: int
    max: int
    total: int


class DetectedFile(Base):
    """What a file was found to be. What has no meaning for its format is absent."""

    format: str
    compression: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    quote: str | None = None
    """The quote character; empty where quotes have no meaning."""

    escape: str | None = None
    """How a quote stands inside quotes: `doubled`, or behind this character."""

    layout: str
    """instruction, prompt-completion, messages, preference or text."""

    columns: dict[str, str]
    """Which column (or key) is used as what."""

    loosely_matched: tuple[str, ...] = ()
    """Those of them whose names differ from the ones that were looked for in case, or in white
    space and invisible characters around them."""

    unused_columns: tuple[str, ...] = ()
    """Columns that nothing is taken from."""

    unused_message_keys: tuple[str, ...] | None = None
    """Keys of messages that nothing is taken from; absent where there are none."""


class ChatTemplate(Base):
    """The model's chat template."""

    sha256: str
    fallback: bool
    """Whether the model has none, so that a plain one stands in."""


class Conversations(Base):
    """Examples with more than one answer."""

    with_several_answers: int
    only_last_answer_learnt: int

    some_answers_not_learnt: int | None = None
    """Conversations with tools or reasoning in which the chat template writes some earlier answers
    in another way once the conversation goes on, so that those are not learnt."""

    earlier_reasoning_left_out: int | None = None
    """Conversations whose chat template leaves out the reasoning of earlier answers."""


class Split(Base):
    """How rows were held out: by `evalFraction` or by `evalSource`."""

    by: str
    eval_fraction: float | str | int | None = None
    seed: int | None = None
    held_out: ListedRows | None = None
    eval_source: str | None = None
    also_trained_on: ListedRows | None = None


class LengthReport(Base):
    """How long the examples of a file are."""

    model_config = ConfigDict(extra="ignore")

    max_sequence_length: int | None = None
    truncated: ListedRows | None = None
    left_out: ListedRows | None = None
    """Rows without an answer within the maximum length."""

    tokens: LengthSpread | None = None
    answer_tokens: LengthSpread | None = None
    tokens_after_cutting: int | None = None
    histogram: tuple[tuple[int, int], ...] = ()
    """The longest length that counts in a bin, and its rows; bins have one width."""

    conversations: Conversations | None = None


class ShardReport(Base):
    """One of several files that are read as one dataset."""

    uri: str
    """With the commit where it lies on the Hub."""

    etag: str
    """Changes with the content: the object's ETag, `sha256:…` of a file on disk, or the Hub's id of
    the content."""

    rows: int | None = None


class FileReport(LengthReport):
    """One file of examples, or several that are read as one."""

    source: str | None = None
    etag: str | None = None
    """Of several files, a digest over the ETags of all."""

    shards: tuple[ShardReport, ...] | None = None
    """The files, where they are several or lie on the Hub."""

    detected: DetectedFile | None = None
    """Of several files, the first."""

    rows: int | None = None
    invalid: int | None = None
    blank_rows: int | None = None
    """Rows of a table with nothing but white space and delimiters; they count as blank lines."""

    short_rows: int | None = None
    """Rows that lack cells at the end which are not needed."""

    long_rows: int | None = None
    """Rows with empty cells behind the last column."""


class DatasetReport(FileReport):
    """dataset-report.json but for the rows that can't be used, which may be very many.

    A field is absent where `prepare` did not get so far. An export may read the report of another
    version.
    """

    examples: int | None = None
    eval_examples: int | None = None
    duplicates: ListedRows | None = None
    split: Split | None = None
    chat_template: ChatTemplate | None = None
    eval_source: FileReport | None = None
