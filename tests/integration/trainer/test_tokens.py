"""Tokens that `prepare` leaves: the training reads them, and they are what it would make itself."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Objective, RunConfig
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.token_rows import read_about, tokens_of
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.prepare.dataset_files import DataFile, DatasetRows
from finetune_trainer.prepare.examples import write_examples
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import EXAMPLES, HELD_OUT, TOKENS
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe import data
from finetune_trainer.train.recipe.data import TokenizedRows, tokenize
from tests.integration.trainer.chats import CHAT, WEATHER, assistant, use, user
from tests.integration.trainer.conftest import ROWS
from tests.integration.trainer.preferences import make_labelled, make_pairs
from tests.integration.trainer.recipe import build_from, make_work

LIMIT = 48
ANSWERS = [{"messages": [user(question), assistant(answer)]} for question, answer in ROWS]
TURNS = [{"messages": [*a["messages"], *b["messages"]]} for a, b in pairwise(ANSWERS)]
TOOLS = [{"messages": CHAT, "tools": [WEATHER]}, *TURNS]
TEXTS = [{"text": "the kettle hums and then it is hot " * count} for count in (2, 9, 40, 1)]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["rejected"]}
    for row in make_pairs(12)
]
CASES: dict[str, tuple[Objective, list[Any]]] = {
    "answers": ("sft", ANSWERS),
    "conversations that are cut": ("sft", TURNS * 2),
    "tools": ("sft", TOOLS),
    "plain text that is split": ("sft", TEXTS),
    "pairs": ("dpo", PAIRS),
    "pairs with a loss of their own": ("orpo", PAIRS),
    "pairs as labels": ("kto", PAIRS),
    "labels": ("kto", list(make_labelled(12))),
}


@dataclass(frozen=True)
class PreparedFiles:
    """What `prepare` left in a folder."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    limit: int

    def read(self, name: str = EXAMPLES, *, tokens: bool, length: int = 0) -> TokenizedRows:
        """The rows as the training reads them, with the tokens that are there or without."""
        return tokenize(
            self.folder / name,
            self.tokenizer,
            length or self.limit,
            self.folder / "cache",
            self.objective,
            split_at=self.limit,
            prepared=self.folder / TOKENS[name] if tokens else None,
        )


def prepare(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Any],
    objective: Objective = "sft",
    *,
    limit: int = 512,
) -> PreparedFiles:
    """Both passes of `prepare` over a file of rows, every third of which is held out."""
    local = folder / "rows.jsonl"
    local.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.model_validate(
        {
            "model": {"source": "/model"},
            "dataset": {"source": str(local), "maxTruncatedRows": "100%"},
            "output": {"uri": "/out"},
        }
    )
    store = LocalFolder(folder)
    info = store.stat(local.name)
    assert info
    found = DatasetRows(DataFile(str(local), store, [info]), local)
    found.load(config.dataset, config.training.seed, objective)
    held = np.arange(len(found.numbers)) % 3 == 2
    out = folder / "prepared"
    write_examples(found, held, tokenizer, tokens_of(tokenizer, objective, limit), out)
    return PreparedFiles(out, tokenizer, objective, limit)


def never(*_: Any) -> Any:
    raise AssertionError("the file is tokenized again")


def same(ours: TokenizedRows, theirs: TokenizedRows) -> None:
    assert len(ours) == len(theirs) > 0
    assert list(ours.rows) == list(theirs.rows)
    for name in ("lengths", "targets", "longest"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype
        assert np.array_equal(mine, other), name
    assert ours.learns_end == theirs.learns_end


@pytest.mark.parametrize("case", CASES)
def test_the_training_reads_what_it_would_make(
    case: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, rows = CASES[case]
    if case == "tools":
        use(tokenizer, "qwen3")
    limit = LIMIT if case.endswith(("cut", "split")) else 512
    prepared = prepare(tmp_path, tokenizer, rows, objective, limit=limit)
    for name in (EXAMPLES, HELD_OUT):
        own = prepared.read(name, tokens=False)
        with monkeypatch.context() as patched:
            patched.setattr(data, "encode_sides", never)
            same(prepared.read(name, tokens=True), own)
    longest = int(prepared.read(tokens=True).longest.max())
    assert longest == LIMIT if limit == LIMIT else longest < limit


def test_other_tokens_are_not_taken(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another template, of a length that memory has cut, of another objective; damaged ones."""
    caplog.set_level(logging.INFO, "finetune_trainer")
    prepared = prepare(tmp_path, tokenizer, ANSWERS)

    def read(said: str, **changes: Any) -> TokenizedRows:
        caplog.clear()
        found = PreparedFiles(**{**vars(prepared), **changes}).read(tokens=True)
        assert said in caplog.text
        return found

    usual = read("the tokens that prepare left are used")
    short = prepared.read(tokens=True, length=16)
    assert "differ in max_length" in caplog.text
    assert list(short.longest) == [min(length, 16) for length in usual.longest]
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template.replace("<|im_start|>", "<|im_start|> ")
    other = read("differ in tokenizer")
    assert list(other.rows) != list(usual.rows)
    tokenizer.chat_template = template
    read("the tokens that prepare left are used")
    read("differ in objective", objective="kto")
    file = prepared.folder / TOKENS[EXAMPLES]
    begun = file.read_bytes()[:100]
    file.unlink()  # it is mapped into memory
    file.write_bytes(begun)
    assert read_about(file) is None
    same(read("can't be read"), usual)


def test_each_batch_is_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows of two epochs' steps, from the tokens in the store and from the examples."""
    tokenizer = load_tokenizer(ModelFolder(tiny_model))
    prepared = prepare(tmp_path, tokenizer, ANSWERS * 4, limit=2048)

    def work(name: str) -> TrainingWork:
        (workdir := tmp_path / name).mkdir()
        made = make_work(tiny_model, workdir, [], batchSize=2, epochs=1)
        files = {
            "examples": shutil.copy(prepared.folder / EXAMPLES, workdir),
            "held_out": shutil.copy(prepared.folder / HELD_OUT, workdir),
        }
        return made.model_copy(update={key: Path(file) for key, file in files.items()})

    def batches(work: TrainingWork) -> list[dict[str, Any]]:
        trainer = build_from(work)
        steps = [*trainer.get_train_dataloader(), [*trainer.get_eval_dataloader()]]
        return [batch for passes in steps for batch in passes]

    own = batches(work("own"))
    monkeypatch.setattr(data, "encode_sides", never)
    files = {
        "tokens": prepared.folder / TOKENS[EXAMPLES],
        "held_out_tokens": prepared.folder / TOKENS[HELD_OUT],
    }
    theirs = batches(work("stored").model_copy(update=files))
    assert len(own) == len(theirs) > 3
    for mine, other in zip(own, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key]), key
            else:
                assert value == other[key], key
