"""spec.dataset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_trainer.contract.base import Base, Location, cel
from finetune_trainer.contract.output import DatasetStorage

HUB_DATASETS = "hf://datasets/"

DATASET_RULE = cel(
    "self.startsWith('s3://') || self.startsWith('hf://datasets/') || self.startsWith('/')",
    "must be an s3://bucket/key URI, hf://datasets/org/name or the absolute path of a mounted file",
)

ColumnName = Annotated[str, Field(min_length=1, max_length=256)]
Character = Annotated[str, Field(min_length=1, max_length=1, pattern=r"^[^\r\n]$")]
EncodingName = Annotated[str, Field(max_length=40, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]

COUNT_OR_SHARE: dict[str, Any] = {
    "x-kubernetes-int-or-string": True,
    **cel(
        "type(self) == int ? self >= 0 : self.matches('^(100|[0-9]{1,2})%$')",
        "must be a whole number from 0, or a percentage such as 10%",
    ),
}
"""Schema of a count or a percentage, as Kubernetes writes maxUnavailable."""


def _check_count_or_share(value: int | str) -> int | str:
    if value >= 0 if isinstance(value, int) else re.fullmatch(r"(100|[0-9]{1,2})%", value):
        return value
    raise ValueError("must be a whole number from 0, or a percentage such as 10%")


CountOrShare = Annotated[
    int | str, AfterValidator(_check_count_or_share), Field(json_schema_extra=COUNT_OR_SHARE)
]


def allowed(limit: int | str, total: int) -> int:
    """How many of `total` a CountOrShare allows; a share is rounded down."""
    return limit if isinstance(limit, int) else total * int(limit[:-1]) // 100


class FunctionCall(TypedDict):
    """What a model asks a tool to do."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call in an assistant's message."""

    type: Literal["function"]
    function: FunctionCall
    id: NotRequired[str]
    """What the tool's answer refers to."""


Tool = dict[str, Any]
"""A tool's definition: `type` (function) and `function`, with a name and a JSON schema of its
parameters."""


class Message(TypedDict):
    """A turn of a conversation."""

    role: str
    """system, user, assistant or tool; of plain text, document."""

    content: str
    """Empty only beside tool calls, or where a tool answers nothing."""

    reasoning_content: NotRequired[str]
    """What an assistant thinks before it answers."""

    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    """In a tool's message: the call that it answers."""

    name: NotRequired[str]
    """Of the tool that answers, or of one participant among several."""

    weight: NotRequired[Literal[0]]
    """0 in an assistant's message that nothing is learnt from; otherwise absent."""


class Example(TypedDict):
    """A conversation as TRL's conversational prompt-completion: a line of examples.jsonl."""

    prompt: list[Message]
    """All turns but the last."""

    completion: list[Message]
    """The last answer; of a pair, the chosen one."""

    rejected: NotRequired[list[Message]]
    """Of a pair of answers, the other one."""

    label: NotRequired[bool]
    """Whether the answer is a good one (kto)."""

    tools: NotRequired[list[Tool]]
    """The tools that the model may call; absent where there are none."""


DOCUMENT = "document"
"""Role of the one message that plain text makes."""


def is_document(example: Example) -> bool:
    """Whether it is plain text, which is learnt as a whole, and no conversation."""
    return example["completion"][-1]["role"] == DOCUMENT


def as_example(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Example:
    """The example that a conversation makes."""
    example: Example = {"prompt": list(messages[:-1]), "completion": [messages[-1]]}
    if tools:
        example["tools"] = list(tools)
    return example


class DataFormat(StrEnum):
    """File formats of a dataset; each may be compressed."""

    AUTO = "auto"
    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


_BESIDE_TEXT = ("input", "system", "messages", "chosen", "rejected", "label", "tools")
_TEXT_ALONE = (
    "!has(self.text) || (self.instruction == 'instruction' && self.response == 'response' && "
    + " && ".join(f"!has(self.{name})" for name in _BESIDE_TEXT)
    + ")"
)
_TEXT_ALONE_SAID = "must name no other column beside text, which is learnt as it is"


class Columns(Base):
    """Which columns (or JSON keys) of the dataset hold what. Without it, the usual ones are found:
    instruction and response (or output), messages, conversations, prompt and completion (or
    response), question and answer, text alone; for preferences, chosen and rejected, or a label.
    Case, and white space around a name, don't matter where only one column fits."""

    model_config = ConfigDict(json_schema_extra=cel(_TEXT_ALONE, _TEXT_ALONE_SAID))

    instruction: ColumnName = "instruction"
    """Column with what the user says."""

    response: ColumnName = "response"
    """Column with what the model should answer. Loss is computed on this only."""

    input: ColumnName | None = None
    """Column with further input that belongs to the instruction; it follows it after a blank line
    and may be empty. Left out, a column named `input` is used if there is one."""

    system: ColumnName | None = None
    """Column with a system prompt per row; an empty cell means spec.dataset.systemPrompt."""

    messages: ColumnName | None = None
    """Column with whole conversations: a list of `{role, content}`, or of `{from, value}`, ending
    with the assistant's answer. It takes the place of the other columns."""

    chosen: ColumnName | None = None
    """For dpo, orpo and kto: column with the better of two answers; `instruction` names the column
    with the question. Left out, a column named `chosen` (or `preferred_output`) is used."""

    rejected: ColumnName | None = None
    """For dpo, orpo and kto: column with the worse of two answers. Left out, a column named
    `rejected` (or `non_preferred_output`) is used."""

    label: ColumnName | None = None
    """For kto: column that says whether the answer is a good one, true or false. Left out, a column
    named `label` is used."""

    tools: ColumnName | None = None
    """Column with the tools that a conversation may call: a list of definitions as OpenAI's API
    takes them, or the same as JSON text. It stands beside messages, or prompt and completion. Left
    out, a column named `tools` is used if there is one."""

    text: ColumnName | None = None
    """Column with plain text, for continued pretraining: every token of it is learnt, without a
    chat template, with the end token behind each row. Left out, a column named `text` is used where
    the file has nothing else to learn from."""

    @model_validator(mode="after")
    def _text_alone(self) -> Self:
        others = self.model_dump(exclude={"text"}, exclude_defaults=True)
        if self.text is not None and others:
            raise ValueError(_TEXT_ALONE_SAID)
        return self


_QUOTE = "(has(self.quote) ? self.quote : '\"')"
_DIFFERENT = (
    f"(!has(self.delimiter) || self.delimiter != {_QUOTE}) && "
    f"(!has(self.escape) || self.escape != {_QUOTE}) && "
    "(!has(self.delimiter) || !has(self.escape) || self.delimiter != self.escape)"
)
_DIFFERENT_SAID = "must have three different characters for delimiter, quote and escape"


class Csv(Base):
    """How a CSV file separates and quotes its cells, where that is not the usual way."""

    model_config = ConfigDict(json_schema_extra=cel(_DIFFERENT, _DIFFERENT_SAID))

    delimiter: Character | None = None
    """The character between cells; a tab is `"\\t"`, in double quotes. Left out, it is a comma,
    semicolon, tab or bar: the one that makes the best header, or what the first line names
    (`sep=;`)."""

    quote: Annotated[str, Field(max_length=1, pattern=r"^[^\r\n]?$")] = '"'
    """The character around a text that has delimiters, quotes or line breaks in it; twice inside
    one, it stands for itself. Empty (`""`) where quotes are characters like any other."""

    escape: Character | None = None
    """The character that makes text of a quote, delimiter, line end or itself behind it, usually a
    backslash. Left out, there is none."""

    @model_validator(mode="after")
    def _check_characters(self) -> Self:
        given = [mark for mark in (self.delimiter, self.quote, self.escape) if mark]
        if len(set(given)) != len(given):
            raise ValueError(_DIFFERENT_SAID)
        return self


class Dataset(Base):
    """The examples to learn from."""

    source: Annotated[Location, Field(json_schema_extra=DATASET_RULE)]
    """A table with a header: `s3://bucket/key.csv`, the absolute path of a mounted file, or
    `hf://datasets/org/name`, with `@revision` and `/path` if wanted. CSV, JSON lines or Parquet,
    compressed or not. A folder with a slash at its end, or a pattern such as
    `s3://bucket/data/*.parquet`, is read in the order of the names as one dataset. Cells are text:
    `NA`, `null` and `0012` stay what they are."""

    format: DataFormat = DataFormat.AUTO
    """`auto` looks at the content, or name it: csv, jsonl or parquet."""

    encoding: EncodingName | None = None
    """The encoding of a text file by its IANA name, e.g. windows-1252. Left out, it is UTF-8, or
    UTF-16 or UTF-32 with a byte order mark; a file that is neither is refused."""

    csv: Csv = Csv()
    """How a CSV file separates and quotes its cells; needed only where that is unusual."""

    columns: Columns = Columns()
    """Maps the columns of the file; needed only where their names are not the usual ones."""

    system_prompt: Annotated[str, Field(max_length=16384)] | None = None
    """System prompt of every example. Left out, there is none, except what the model's chat
    template adds by itself."""

    on_invalid_row: Literal["fail", "skip"] = "fail"
    """What a blank, ragged or unreadable row does: `fail` ends the job before anything is trained
    and names the rows; `skip` leaves them out, up to maxInvalidRows."""

    max_invalid_rows: CountOrShare = "10%"
    """With onInvalidRow `skip`: how many rows may be left out, as a number or as a percentage of
    all rows; more end the job."""

    max_truncated_rows: CountOrShare = "10%"
    """How many rows may be longer than training.maxSequenceLength, as a number or as a percentage
    of all rows. They are cut at the end and counted in dataset-report.json; more end the job."""

    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the rows that are held out to measure the loss before and after the training, from
    0 to 0.5; none below 20 rows, and never more than 1,000. Up to twice the share, at most 10%, is
    held out where that gives 20 rows at most. The choice depends on the rows and training.seed
    only."""

    eval_source: Annotated[Location, Field(json_schema_extra=DATASET_RULE)] | None = None
    """Held-out rows of their own, in the same format and with the same columns, wherever `source`
    may lie. evalFraction then has no effect."""

    storage: DatasetStorage | None = None
    """How to reach the object store of source and evalSource, where it is another than the one of
    spec.storage. Nothing of spec.storage holds for it then."""

    @property
    def splits(self) -> bool:
        """Whether held-out rows are taken from the dataset itself."""
        return self.eval_source is None and self.eval_fraction > 0
