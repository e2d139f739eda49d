"""Which file people's samples come from, and which rows llama.cpp computes in one call."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune_trainer.contract import Artifact, FileVerdict, Quantization, Sample
from finetune_trainer.export.gate.kept import KeptFile
from finetune_trainer.export.inputs import CheckedFile, ExportContext, gguf_path, some_file
from finetune_trainer.export.llama.llama_worker import (
    DECODE_ROWS,
    DECODE_TOKENS,
    LOGITS_BYTES,
    decodes_of,
)
from finetune_trainer.export.pipeline import take_samples
from finetune_trainer.export.reference import MeasuredRow
from finetune_trainer.runtime.reporter import Reporter

Q = Quantization
SAID = (Sample(prompt="Who?", expected="Odalys.", base=None, tuned="Odalys.", stopped=True),)


class Store:
    """What an earlier attempt has uploaded."""

    def __init__(self, artifacts: dict[str, Artifact]) -> None:
        self.artifacts = artifacts

    def find(self, path: str) -> Artifact | None:
        return self.artifacts.get(path)

    def take(self, artifact: Artifact) -> None:
        raise AssertionError(artifact)

    def fetch(self, artifact: Artifact, target: Path) -> Path:
        target.write_bytes(b"x" * artifact.bytes)
        return target


class Asked:
    """A gate that notes which file is asked."""

    def __init__(self) -> None:
        self.files: list[tuple[str, Path | None]] = []

    def samples(self, file: Path, adapter: Path | None) -> tuple[Sample, ...]:
        self.files.append((file.name, adapter))
        return SAID


def context_in(folder: Path, uploaded: dict[Quantization, int] | None = None) -> ExportContext:
    nothing = cast("Any", None)
    context = ExportContext(
        config=nothing,
        model=cast("Any", SimpleNamespace(files=SimpleNamespace(name="model"))),
        examples=nothing,
        result=folder,
        workspace=folder,
        add_file=nothing,
        reporter=Reporter(),
    )
    artifacts = {}
    for kind, size in (uploaded or {}).items():
        path = gguf_path(context, kind)
        artifacts[path] = Artifact(path=path, bytes=size, sha256=kind)
        context.kept.add_file(path, KeptFile(artifact=artifacts[path]))
    object.__setattr__(context, "uploads", Store(artifacts))
    return context


def checked(folder: Path, sizes: dict[Quantization, int | None], *bad: Quantization) -> Any:
    """Files of so many bytes; None: it isn't here."""
    found = []
    for kind, size in sizes.items():
        file = folder / "gguf" / f"model-{kind}.gguf"
        file.parent.mkdir(exist_ok=True)
        if size is not None:
            file.write_bytes(b"x" * size)
        problems = ("it rambles",) if kind in bad else ()
        verdict = FileVerdict(file=file.name, quantization=kind, problems=problems)
        found.append(CheckedFile(kind, file, verdict))
    return found


def test_samples_are_those_of_the_smallest_file_that_passed(tmp_path: Path) -> None:
    files = checked(tmp_path, {Q.F16: 30, Q.Q8_0: 20, Q.Q4_K_M: 10}, Q.Q4_K_M)
    context, gate, adapter = context_in(tmp_path), Asked(), tmp_path / "LoRA.gguf"
    assert take_samples(context, cast("Any", gate), files, adapter) == SAID
    assert gate.files == [("model-Q8_0.gguf", adapter)]
    assert take_samples(context, cast("Any", gate), files, adapter) == SAID
    assert len(gate.files) == 1, "they are kept for the next attempt"


def test_where_no_file_passed_none_is_asked(tmp_path: Path) -> None:
    files, gate = checked(tmp_path, {Q.F16: 30}, Q.F16), Asked()
    assert take_samples(context_in(tmp_path), cast("Any", gate), files, None) == ()
    assert gate.files == []


def test_a_file_that_is_here_comes_before_a_smaller_one_that_was_uploaded(tmp_path: Path) -> None:
    files = checked(tmp_path, {Q.F16: 30, Q.Q8_0: None})
    assert some_file(context_in(tmp_path, {Q.Q8_0: 20}), files).name == "model-F16.gguf"


def test_where_none_is_here_the_smallest_is_fetched(tmp_path: Path) -> None:
    files = checked(tmp_path, {Q.F16: None, Q.Q4_K_M: None, Q.Q8_0: None})
    file = some_file(context_in(tmp_path, {Q.F16: 30, Q.Q4_K_M: 10, Q.Q8_0: 20}), files)
    assert (file.name, file.stat().st_size) == ("model-Q4_K_M.gguf", 10)


def row(tokens: int, answers: int) -> MeasuredRow:
    return MeasuredRow(tuple(range(tokens)), tuple(range(tokens - answers, tokens)))


@pytest.mark.parametrize(
    ("rows", "vocabulary", "expected"),
    [
        ([row(10, 2)] * (DECODE_ROWS + 1), 1000, [DECODE_ROWS, 1]),
        ([row(DECODE_TOKENS // 2, 2)] * 3, 1000, [2, 1]),
        ([row(100, 60)] * 3, LOGITS_BYTES // 4 // 120, [2, 1]),
        ([row(100, 60)] * 2, LOGITS_BYTES // 4 // 10, [1, 1]),  # beyond the bound even alone
        ([], 1000, []),
    ],
)
def test_a_call_of_llama_cpp_is_bounded(
    rows: list[MeasuredRow], vocabulary: int, expected: list[int]
) -> None:
    """By rows, by tokens, and by the logits that it keeps; no row is left out."""
    groups = list(decodes_of(rows, vocabulary))
    assert [len(group) for group in groups] == expected
    assert [row for group in groups for row in group] == rows
