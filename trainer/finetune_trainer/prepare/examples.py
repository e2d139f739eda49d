"""The second pass: rows become examples, and what is too long is found by its tokens."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    Dataset,
    Example,
    Reason,
    StageError,
    allowed,
    is_document,
)
from finetune_trainer.model.rendering import NotRenderedError
from finetune_trainer.model.token_rows import TokensOf, TokensWriter
from finetune_trainer.model.tokenizer import IGNORED, Encoded, encode_sides, pieces
from finetune_trainer.prepare.dataset_files import DatasetRows, Mask
from finetune_trainer.prepare.findings import TokenCounts, length_that_fits, percentile
from finetune_trainer.store.marker import EXAMPLES, HELD_OUT, TOKENS

BATCH = 256  # rows that are tokenized together
SHOWN = 10  # rows that a message names
NOTHING = Encoded([], [], only_last=False)

Sides = tuple[Encoded, ...]
"""What is learnt from a row: one conversation, or two of a pair."""


@dataclass(frozen=True)
class EncodedRows:
    """What the rows of one file are in tokens, row by row."""

    rows: DatasetRows
    held: Mask
    """Rows that are held out."""

    lengths: TokenCounts
    """Tokens of the whole row, before it is cut; 0 of one that the template refused. Of a pair, of
    the longer conversation."""

    answers: TokenCounts
    """Tokens that loss is computed on, of what is left after cutting; of a pair, of the answer
    that has fewer."""

    whole: TokenCounts
    """Tokens of all that is learnt from the row, after cutting."""

    limit: int
    """training.maxSequenceLength."""

    conversations: int
    """Rows with several answers."""

    only_last: int
    """Those of them of which only the last answer is learnt."""

    some_left: int
    """Those with tools or reasoning of which some earlier answers are not learnt."""

    reasoning_left_out: int
    """Those of which the template leaves out the reasoning of earlier answers."""

    documents: bool = False
    """Whether they are plain text, which is split at the limit, and not cut."""

    @property
    def too_long(self) -> Mask:
        """Rows that are cut, or left out."""
        return np.asarray(self.lengths > self.limit)

    @property
    def split_into(self) -> int:
        """Rows that plain text beyond the limit makes."""
        long = self.lengths[self.too_long].tolist() if self.documents else []
        return sum(len(pieces(length, self.limit)) for length in long)

    @property
    def left_out(self) -> Mask:
        """Rows whose answers would be cut off entirely: they would teach nothing."""
        return np.asarray((self.answers == 0) & (self.lengths > 0))

    @property
    def used(self) -> Mask:
        """Rows that became examples."""
        return np.asarray(self.answers > 0)

    @property
    def trained(self) -> TokenCounts:
        """TokenCounts of the examples that are trained on."""
        return self.lengths[~self.held & self.used]

    @property
    def trained_tokens(self) -> int:
        """Tokens of one pass over the examples that are trained on."""
        return int(self.whole[~self.held & self.used].sum(dtype=np.uint64))

    @property
    def held_out(self) -> int:
        """How many examples are held out."""
        return int(np.count_nonzero(self.held & self.used))


def write_examples(
    rows: DatasetRows, held: Mask, tokenizer: PreTrainedTokenizerBase, of: TokensOf, folder: Path
) -> EncodedRows:
    """Append the rows to examples.jsonl, and those that are held out to eval.jsonl.

    One Example a line, and beside each file its rows in tokens for the training. A row whose
    answers all begin after `of.max_length` tokens is left out; one that the chat template refuses
    is a bad row, and raises StageError(InvalidRows) where those may not be skipped. Of plain text
    nothing is cut.
    """
    limit = of.max_length
    folder.mkdir(parents=True, exist_ok=True)
    lengths, answers, whole = array("I"), array("I"), array("I")
    conversations = only_last = some_left = reasoning_left_out = 0
    documents = False
    refused: dict[int, str] = {}
    numbers = rows.numbers
    with (
        (folder / EXAMPLES).open("a", encoding="utf-8") as train,
        (folder / HELD_OUT).open("a", encoding="utf-8") as evaluation,
        TokensWriter(folder / TOKENS[EXAMPLES], tokenizer, of) as train_tokens,
        TokensWriter(folder / TOKENS[HELD_OUT], tokenizer, of) as evaluation_tokens,
    ):
        for index, (example, result) in enumerate(_encoded(rows, tokenizer)):
            if isinstance(result, str):
                refused[int(numbers[index])] = result
            sides = (NOTHING,) if isinstance(result, str) else result
            encoded = sides[0]
            documents = is_document(example)
            cut = len(encoded.ids) if documents else limit
            learnt = min(_learnt(side, cut) for side in sides)
            lengths.append(max(len(side.ids) for side in sides))
            answers.append(learnt)
            whole.append(_tokens(encoded, limit) if documents else _cut_tokens(sides, limit))
            conversations += any(m["role"] == "assistant" for m in example["prompt"])
            only_last += encoded.only_last
            some_left += encoded.some_left
            reasoning_left_out += encoded.leaves_reasoning_out
            if learnt:
                out, tokens = (
                    (evaluation, evaluation_tokens) if held[index] else (train, train_tokens)
                )
                out.write(json.dumps(example, ensure_ascii=False) + "\n")
                tokens.add(example, sides)
    for name in (EXAMPLES, HELD_OUT):
        if not (folder / name).stat().st_size:
            (folder / name).unlink()
    rows.refuse(refused)
    return EncodedRows(
        rows,
        held,
        np.array(lengths, dtype=np.uint32),
        np.array(answers, dtype=np.uint32),
        np.array(whole, dtype=np.uint32),
        limit,
        conversations,
        only_last,
        some_left,
        reasoning_left_out,
        documents,
    )


def check_lengths(examples: EncodedRows, dataset: Dataset) -> None:
    """Refuse a file of which too many rows are too long, or none is left to train on."""
    if examples.documents:
        return
    rows, long = examples.rows, examples.too_long
    may = allowed(dataset.max_truncated_rows, rows.total)
    count = int(np.count_nonzero(long))
    if count <= may and not examples.left_out.all():
        return
    gone = int(np.count_nonzero(examples.left_out))
    first = ", ".join(
        f"{rows.name_of(number)} ({length})"
        for number, length in zip(
            rows.numbers[long][:SHOWN].tolist(),
            examples.lengths[long][:SHOWN].tolist(),
            strict=True,
        )
    )
    lengths = examples.lengths
    raise StageError(
        Reason.EXAMPLES_TOO_LONG,
        f"{count} of the {rows.total} rows of {rows.file.uri} are longer than "
        f"spec.training.maxSequenceLength ({examples.limit} tokens)"
        f"{f', {gone} of them so that no answer would be left' if gone else ''}; "
        f"spec.dataset.maxTruncatedRows ({dataset.max_truncated_rows}) allows {may}. Rows "
        f"(tokens): {first}{' …' if count > SHOWN else ''}. Set maxSequenceLength to "
        f"{length_that_fits(lengths, may)}, to {percentile(lengths, 99)} for 99% of the rows, or "
        f"to {int(lengths.max())} for all (longer takes more memory); or shorten the rows.",
    )


def _cut_tokens(sides: Sides, limit: int) -> int:
    return sum(min(len(side.ids), limit) for side in sides)


def _tokens(document: Encoded, limit: int) -> int:
    """Of all rows that plain text makes."""
    return sum(part.stop - part.start for part in pieces(len(document.ids), limit))


def _learnt(side: Encoded, limit: int) -> int:
    cut = side.labels[:limit]
    return len(cut) - cut.count(IGNORED)


def _encoded(
    rows: DatasetRows, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, Sides | str]]:
    """The rows in tokens, or why the chat template refuses them."""
    records = rows.examples()
    while batch := list(islice(records, BATCH)):
        try:
            encoded: list[Sides | str] = [*encode_sides(tokenizer, batch)]
        except StageError:
            raise
        except Exception:  # the model's own template runs: anything can come out
            encoded = [_encoded_alone(tokenizer, example) for example in batch]
        yield from zip(batch, map(_checked, encoded), strict=True)


def _encoded_alone(tokenizer: PreTrainedTokenizerBase, example: Example) -> Sides | str:
    try:
        (encoded,) = encode_sides(tokenizer, [example])
    except StageError:
        raise
    except NotRenderedError as error:
        return str(error)
    except Exception as error:  # as above
        return f"the model's chat template refuses it: {error}"
    return encoded


def _checked(sides: Sides | str) -> Sides | str:
    if not isinstance(sides, str) and any(
        side.some_left and not any(label != IGNORED for label in side.labels) for side in sides
    ):
        return (
            "the last answer has weight 0, and the model's chat template writes the earlier ones "
            "in another way once the conversation goes on: end the row with an answer to learn"
        )
    return sides
