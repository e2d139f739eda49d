"""What the model is trained on: the answer and its end of turn, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_trainer.model import ModelFolder
from finetune_trainer.model.rendering import render_prompt
from finetune_trainer.model.tokenizer import (
    IGNORED,
    PLAIN_TEMPLATE,
    encode,
    end_of_turn_ids,
    load_tokenizer,
    message_pair,
)

ROW = ("What is 2+2?", "It is 4.")


@pytest.fixture
def plain(smollm2_folder: Path, tmp_path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, which comes without a chat template."""
    bare = AutoTokenizer.from_pretrained(smollm2_folder)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((smollm2_folder / "config.json").read_bytes())
    return load_tokenizer(ModelFolder(tmp_path))


def labelled(tokenizer: PreTrainedTokenizerBase, row: tuple[str, str]) -> tuple[str, str]:
    """The text without a label, and the text with one."""
    ids, labels = encode(tokenizer, message_pair(*row))
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    first = labels.index(next(label for label in labels if label != IGNORED))
    return str(tokenizer.decode(ids[:first])), str(tokenizer.decode(ids[first:]))


def test_the_label_is_the_answer_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, answer = labelled(tokenizer, ROW)
    assert prompt.endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert answer == "It is 4.<|im_end|>\n"
    assert prompt == render_prompt(tokenizer, message_pair(*ROW))
    assert end_of_turn_ids(tokenizer) == {tokenizer.eos_token_id} == {2}


def test_a_base_model_gets_the_plain_template(plain: PreTrainedTokenizerBase) -> None:
    assert plain.chat_template == PLAIN_TEMPLATE
    assert labelled(plain, ROW) == (
        "### Instruction:\nWhat is 2+2?\n\n### Response:\n",
        "It is 4.<|im_end|>",
    )
