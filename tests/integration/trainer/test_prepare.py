"""Rows become examples: what is learnt, what is cut, what is left out, and what is said of it."""

from __future__ import annotations

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Message, Reason, RunConfig, StageError, as_example
from finetune_trainer.model.token_rows import tokens_of
from finetune_trainer.model.tokenizer import (
    encode,
    encode_batch,
)
from finetune_trainer.prepare.checks import check_template, describe_template
from finetune_trainer.prepare.dataset_files import DataFile, DatasetRows, hold_out
from finetune_trainer.prepare.examples import check_lengths, write_examples
from finetune_trainer.prepare.findings import Findings
from finetune_trainer.store import LocalFolder
from hack.object_store import Credentials
from tests.integration.trainer import chats
from tests.integration.trainer.conftest import ROWS, Trainer

SYSTEM: Message = {"role": "system", "content": "Be a kettle."}
CHAT: list[Message] = [
    SYSTEM,
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A kettle."},
    {"role": "user", "content": "Are you hot?"},
    {"role": "assistant", "content": "Boiling."},
]
REASONING = (  # like Qwen3's: of earlier answers, what stands before </think> is removed
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learnt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    return chats.learnt(tokenizer, chats.encode(tokenizer, as_example(messages)))


def test_every_answer_of_a_conversation_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    assert learnt(tokenizer, CHAT) == ["A kettle.<|im_end|>\n", "Boiling.<|im_end|>\n"]
    ids, _ = encode(tokenizer, as_example(CHAT))
    whole = tokenizer.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in CHAT],
        tokenize=True,
        return_dict=False,
    )
    assert ids == whole


def test_answers_that_the_template_changes_later_are_not_learnt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = REASONING
    thinking = copy.deepcopy(CHAT)
    thinking[2]["content"] = "Hm.</think>A kettle."
    assert learnt(tokenizer, thinking) == ["Boiling.<|im_end|>\n"]
    assert learnt(tokenizer, CHAT) == ["A kettle.<|im_end|>\n", "Boiling.<|im_end|>\n"]
    encoded = encode_batch(tokenizer, [as_example(thinking), as_example(CHAT)])
    assert [e.only_last for e in encoded] == [True, False]


def test_a_batch_is_the_same_as_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [as_example(CHAT), as_example(CHAT[1:3]), as_example(CHAT[1:])]
    together = [(e.ids, e.labels) for e in encode_batch(tokenizer, examples)]
    assert together == [encode(tokenizer, example) for example in examples]
    assert encode_batch(tokenizer, []) == []


def load(folder: Path, rows: list[Any] | None, **dataset: Any) -> Findings:
    """Rows as JSON lines of messages, read; None: those that are there."""
    local = folder / "rows.jsonl"
    if rows is not None:
        local.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = RunConfig.model_validate(
        {
            "model": {"source": "/model"},
            "dataset": {"source": str(local), "maxTruncatedRows": "100%", **dataset},
            "output": {"uri": "/out"},
        }
    )
    store = LocalFolder(folder)
    info = store.stat(local.name)
    assert info
    findings = Findings(config, DatasetRows(DataFile(str(local), store, [info]), local))
    findings.rows.load(config.dataset, config.training.seed)
    return findings


def pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(findings: Findings, tokenizer: PreTrainedTokenizerBase, out: Path, limit: int) -> Any:
    held = hold_out(findings.rows.hashes, findings.config.dataset.eval_fraction)
    of = tokens_of(tokenizer, findings.config.training.objective, limit)
    findings.examples = write_examples(findings.rows, held, tokenizer, of, out)
    findings.template = describe_template(tokenizer)
    findings.write(out)
    return json.loads((out / "dataset-report.json").read_text())


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_report_counts_tokens_and_what_is_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    short = pair("What is 2+2?", "It is 4.")
    rows = [short, pair("Say a lot.", "word " * 100), pair("question " * 100, "No."), short, CHAT]
    findings = load(tmp_path, rows)
    out = tmp_path / "out"
    report = write(findings, tokenizer, out, limit=80)
    assert lines(out / "examples.jsonl") == [as_example(rows[i]) for i in (0, 1, 3, 4)]
    assert not (out / "eval.jsonl").exists()
    assert (report["rows"], report["examples"], report["evalExamples"]) == (5, 4, 0)
    assert report["truncated"] == {"count": 1, "rows": [2]}
    assert report["leftOut"] == {"count": 1, "rows": [3]}
    assert report["duplicates"] == {"count": 1, "rows": [4]}
    assert report["tokens"]["max"] > 80 > report["tokens"]["median"]
    assert report["answerTokens"]["max"] < 80
    assert report["tokensAfterCutting"] < report["tokens"]["total"]
    assert sum(count for _, count in report["histogram"]) == 4
    assert report["conversations"] == {"withSeveralAnswers": 1, "onlyLastAnswerLearnt": 0}
    assert report["chatTemplate"]["fallback"] is False
    assert len(report["chatTemplate"]["sha256"]) == 64
    assert report["detected"]["format"] == "jsonl"
    assert report["invalidRows"] == []
    summary = findings.summary()
    assert (summary.rows, summary.examples, summary.truncated) == (5, 4, 2)
    assert summary.tokens == report["tokensAfterCutting"]


def test_held_out_rows_go_to_a_file_of_their_own(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [pair(f"What is {n}+1?", f"It is {n + 1}.") for n in range(40)]
    findings = load(tmp_path, rows)
    out = tmp_path / "out"
    report = write(findings, tokenizer, out, limit=80)
    kept, held = lines(out / "examples.jsonl"), lines(out / "eval.jsonl")
    numbers = report["split"]["heldOut"]["rows"]
    assert held == [as_example(rows[number - 1]) for number in numbers]
    assert (len(kept), len(held), report["evalExamples"]) == (36, 4, 4)
    assert report["split"]["by"] == "evalFraction"
    assert all(example in [as_example(row) for row in rows] for example in kept)


def test_a_row_that_the_template_refuses_is_a_bad_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('Not this!') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    rows = [pair("yes", "a"), pair("no", "b"), pair("well", "c")]
    findings = load(tmp_path, rows, onInvalidRow="skip", maxInvalidRows=1)
    report = write(findings, tokenizer, tmp_path / "out", limit=80)
    assert report["invalidRows"] == [
        {"row": 2, "cause": "the model's chat template refuses it: Not this!"}
    ]
    assert (report["rows"], report["invalid"], report["examples"]) == (3, 1, 2)
    assert report["leftOut"]["count"] == 0
    assert [e["completion"][0]["content"] for e in lines(tmp_path / "out" / "examples.jsonl")] == [
        "a",
        "c",
    ]
    with pytest.raises(StageError) as caught:
        write(load(tmp_path, rows), tokenizer, tmp_path / "other", limit=80)
    assert caught.value.reason is Reason.INVALID_ROWS


def test_rows_of_which_no_answer_is_left_are_refused_whatever_is_allowed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    findings = load(tmp_path, [pair("What is 2+2?", "It is 4.")])
    write(findings, tokenizer, tmp_path / "out", limit=16)
    assert findings.examples
    with pytest.raises(StageError) as caught:
        check_lengths(findings.examples, findings.config.dataset)
    assert caught.value.reason is Reason.EXAMPLES_TOO_LONG
    assert "spec.training.maxSequenceLength (16 tokens)" in caught.value.message
    longest = int(findings.examples.lengths.max())
    assert f"Set maxSequenceLength to {longest}" in caught.value.message


def test_memory_hardly_grows_with_the_rows(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Thrice as many rows of 1 kB: both passes keep a few dozen bytes of each."""
    peaks = []
    for count in (600, 1_800):
        rows = [pair(f"{n} " + "question " * 60, "answer " * 60) for n in range(count)]
        (folder := tmp_path / str(count)).mkdir()
        load(folder, rows)
        del rows
        tracemalloc.start()
        findings = load(folder, None)
        held = hold_out(findings.rows.hashes, 0.05)
        write_examples(
            findings.rows, held, tokenizer, tokens_of(tokenizer, "sft", 2048), folder / "out"
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1_200 * 100


@pytest.mark.parametrize("system", [False, True])
def test_the_templates_of_the_base_models_pass(
    tokenizer: PreTrainedTokenizerBase, system: bool
) -> None:
    check_template(tokenizer, system=system)


def test_held_out_rows_of_a_file_of_their_own(
    trainer: Trainer, run_config: dict[str, Any], moto: Credentials, bucket: str
) -> None:
    """JSON lines beside a CSV file; a row of both is told of, and a new version prepares anew."""
    client = moto.client()
    messages: list[Message] = [
        SYSTEM,
        {"role": "user", "content": "Is it hot?"},
        *pair("", "Boiling.")[1:],
    ]
    both = pair(*ROWS[0])
    rows = "".join(json.dumps({"messages": row}) + "\n" for row in (messages, both))
    client.put_object(Bucket=bucket, Key="data/eval.jsonl", Body=rows.encode())
    run_config["dataset"]["evalSource"] = f"s3://{bucket}/data/eval.jsonl"
    run_config["export"] = {"gguf": []}
    first = trainer("prepare", run_config).result
    assert first is not None
    assert first.reason is Reason.SUCCEEDED, first.message
    assert "2 held out; 1 of them are trained on as well" in first.message
    assert first.resolved is not None
    assert (first.resolved.dataset_rows, first.resolved.eval_rows) == (len(ROWS), 2)

    out, _, prefix = run_config["output"]["uri"].removeprefix("s3://").partition("/")
    folder = f"{prefix}/stages/prepare/{first.resolved.fingerprints.prepare}"
    held = client.get_object(Bucket=out, Key=f"{folder}/eval.jsonl")["Body"].read().decode()
    assert [json.loads(line) for line in held.splitlines()] == [
        as_example(messages),
        as_example(both),
    ]
    report = client.get_object(Bucket=out, Key=f"{folder}/dataset-report.json")["Body"].read()
    found = json.loads(report)
    assert found["split"]["alsoTrainedOn"] == {"count": 1, "rows": [2]}
    assert found["evalSource"]["detected"]["format"] == "jsonl"
    assert found["evalSource"]["tokens"]["max"] > 0

    client.put_object(Bucket=bucket, Key="data/eval.jsonl", Body=rows.encode() * 2)
    second = trainer("prepare", run_config).result
    assert second is not None
    assert second.resolved is not None
    assert second.complete == ()
    assert second.resolved.eval_rows == 4
