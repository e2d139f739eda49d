"""A training depends on the examples and on nothing that led to them, and reads them whole."""

from __future__ import annotations

import csv
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    Artifact,
    PreparedRunConfig,
    Reason,
    Stage,
    StageError,
    StageResult,
)
from finetune_trainer.contract import fingerprint as formula
from finetune_trainer.export import inputs
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import (
    EXAMPLES,
    HELD_OUT,
    TOKENS,
    open_stage,
    save_stage,
    stage_folder,
)
from finetune_trainer.train import train_stage
from tests.integration.trainer import first_release

Prepare = Callable[..., StageResult]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """24 rows, with a column for further input that is empty."""
    file = tmp_path / "rows.csv"
    with first_release.ROWS_FILE.open(newline="") as rows, file.open("w", newline="") as out:
        header, *others = csv.reader(rows)
        csv.writer(out).writerows([[*header, "input"], *([*row, ""] for row in others)])
    return file


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


@pytest.fixture
def config(dataset: Path, output: LocalFolder) -> dict[str, Any]:
    return {
        "model": {"source": str(first_release.MODEL)},
        "dataset": {"source": str(dataset), "evalFraction": 0.1},
        "training": {"maxSequenceLength": 128},
        "export": {"merged": False, "gguf": []},
        "output": {"uri": output.uri},
    }


@pytest.fixture
def prepare(config: dict[str, Any], tmp_path: Path) -> Prepare:
    """`prepare` of the run with changes in spec.dataset and elsewhere."""
    count = iter(range(100))

    def run(dataset: dict[str, Any] | None = None, **changes: Any) -> StageResult:
        changed = {**config, **changes, "dataset": {**config["dataset"], **(dataset or {})}}
        return first_release.prepare(changed, tmp_path / f"workspace-{next(count)}")

    return run


def prints(result: StageResult) -> dict[str, str]:
    assert result.reason is Reason.SUCCEEDED, result.message
    assert result.resolved is not None
    found: dict[str, str] = result.resolved.fingerprints.model_dump()
    return found


def changed(before: StageResult, after: StageResult) -> set[str]:
    return {stage for stage, value in prints(before).items() if prints(after)[stage] != value}


def elsewhere(dataset: Path) -> dict[str, Any]:
    copy = dataset.with_name("elsewhere.csv")
    shutil.copy(dataset, copy)
    return {"source": str(copy)}


def zipped(dataset: Path) -> dict[str, Any]:
    copy = dataset.with_name("rows.csv.gz")
    copy.write_bytes(gzip.compress(dataset.read_bytes()))
    return {"source": str(copy)}


def otherwise_quoted(dataset: Path) -> dict[str, Any]:
    copy = dataset.with_name("quoted.csv")
    with dataset.open(newline="") as rows, copy.open("w", newline="") as out:
        csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(csv.reader(rows))
    return {"source": str(copy)}


@pytest.mark.parametrize(
    "change",
    [
        elsewhere,
        zipped,
        otherwise_quoted,
        {"format": "csv"},
        {"maxInvalidRows": "20%"},
        {"maxTruncatedRows": "20%"},
        {"onInvalidRow": "skip"},
        {"columns": {"input": "input"}},
        {"evalFraction": 0.09},
    ],
    ids=lambda change: getattr(change, "__name__", str(change)),
)
def test_the_same_examples_asked_for_otherwise_train_nothing_anew(
    prepare: Prepare, dataset: Path, change: dict[str, Any] | Callable[[Path], dict[str, Any]]
) -> None:
    first = prepare()
    second = prepare(change(dataset) if callable(change) else change)
    assert changed(first, second) == {"prepare"}
    assert second.complete == ()
    assert examples(first) == examples(second)


def test_a_better_reader_trains_nothing_anew(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare()
    monkeypatch.setitem(formula.RECIPE, Stage.PREPARE, formula.RECIPE[Stage.PREPARE] + 1)
    assert changed(first, prepare()) == {"prepare"}


def test_a_fraction_beside_held_out_rows_of_their_own_trains_nothing_anew(
    prepare: Prepare, dataset: Path
) -> None:
    given = elsewhere(dataset)["source"]
    first = prepare({"evalSource": given})
    assert changed(first, prepare({"evalSource": given, "evalFraction": 0.3})) == {"prepare"}


def test_a_length_that_cuts_no_row_trains_nothing_anew(prepare: Prepare) -> None:
    first = prepare()
    assert changed(first, prepare(training={"maxSequenceLength": 256})) == {"prepare", "export"}
    cutting = prepare({"maxTruncatedRows": "100%"}, training={"maxSequenceLength": 25})
    less = prepare({"maxTruncatedRows": "100%"}, training={"maxSequenceLength": 24})
    assert cutting.dataset is not None
    assert cutting.dataset.truncated > 0
    assert "train" in changed(cutting, less)


def examples(result: StageResult) -> str:
    """What tells whether the examples are others."""
    assert result.resolved is not None
    assert result.resolved.examples is not None
    return result.resolved.examples


@pytest.mark.parametrize(
    "change",
    [
        {"systemPrompt": "Count."},
        {"columns": {"instruction": "response", "response": "instruction"}},
        {"evalFraction": 0.5},
        {"evalFraction": 0},
    ],
    ids=str,
)
def test_other_examples_are_trained_on(prepare: Prepare, change: dict[str, Any]) -> None:
    first, second = prepare(), prepare(change)
    assert changed(first, second) == {"prepare", "train", "export"}
    assert examples(first) != examples(second)


def test_a_training_that_is_there_is_found_by_its_examples(
    prepare: Prepare, output: LocalFolder, tmp_path: Path
) -> None:
    """`prepare` has to read the rows of another request before it knows."""
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "metrics.json").write_text("{}")
    save_stage(output, Stage.TRAIN, prints(prepare())["train"], trained)
    second = prepare({"format": "csv"})
    assert second.complete == (Stage.TRAIN,)
    assert second.resolved is not None
    assert second.resolved.plan is None
    assert prepare({"format": "csv"}).complete == (Stage.PREPARE, Stage.TRAIN)


# --- What is reused is compared with its marker ---------------------------------------------------


@pytest.fixture
def prepared(prepare: Prepare, config: dict[str, Any]) -> PreparedRunConfig:
    """run.json of the stages after `prepare`."""
    result = prepare()
    assert result.resolved is not None
    resolved = result.resolved.model_dump(mode="json")
    return PreparedRunConfig.model_validate({**config, "resolved": resolved})


@pytest.fixture
def adapter(prepared: PreparedRunConfig, output: LocalFolder, tmp_path: Path) -> str:
    """The stored adapter's folder, with what the export reads of it."""
    fingerprint = prepared.resolved.fingerprints.train
    former = first_release.ROOT / "output" / "stages" / "train"
    (source,) = former.iterdir()
    trained = tmp_path / "trained"
    shutil.copytree(source, trained, ignore=shutil.ignore_patterns("complete.json"))
    save_stage(output, Stage.TRAIN, fingerprint, trained)
    return stage_folder(Stage.TRAIN, fingerprint)


def flip(output: LocalFolder, path: str) -> None:
    """Change one bit, as a disk would: neither size nor name tells."""
    data = bytearray((output.root / path).read_bytes())
    data[len(data) // 2] ^= 1
    (output.root / path).write_bytes(data)


def refused(work: Callable[[], object], *parts: str) -> None:
    with pytest.raises(StageError) as caught:
        work()
    assert caught.value.reason is Reason.STORED_FILE_CHANGED
    assert not caught.value.reason.retryable
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize("name", [EXAMPLES, HELD_OUT])
def test_a_training_refuses_examples_that_are_not_those_of_prepare(
    prepared: PreparedRunConfig, output: LocalFolder, tmp_path: Path, name: str
) -> None:
    fingerprint = prepared.resolved.fingerprints.prepare
    folder = stage_folder(Stage.PREPARE, fingerprint)

    def fetch() -> object:
        stored = open_stage(output, Stage.PREPARE, fingerprint)
        workspace = tmp_path / "training"
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir()
        return train_stage.fetch_work(prepared, stored, workspace, Reporter())

    assert fetch()
    flip(output, f"{folder}/{name}")
    marker = f"{output.uri}/{folder}/complete.json"
    refused(fetch, f"{output.uri}/{folder}/{name}", f"that {marker} lists", "Delete that marker")
    (output.root / folder / name).unlink()
    refused(fetch, f"{output.uri}/{folder}/{name}")
    (output.root / folder / "complete.json").unlink()
    refused(fetch, f"{marker}, which says that prepare is complete, is gone")


def test_a_training_does_without_tokens_that_are_damaged_or_were_never_left(
    prepared: PreparedRunConfig, output: LocalFolder, tmp_path: Path
) -> None:
    fingerprint = prepared.resolved.fingerprints.prepare
    folder = stage_folder(Stage.PREPARE, fingerprint)
    files = {EXAMPLES: b"{}\n", HELD_OUT: b"{}\n", TOKENS[EXAMPLES]: b"tokens"}
    made = tmp_path / "made"
    made.mkdir()
    for name, content in files.items():
        (made / name).write_bytes(content)
    save_stage(output, Stage.PREPARE, fingerprint, made)

    def fetch(name: str) -> Path | None:
        stored = open_stage(output, Stage.PREPARE, fingerprint)
        return train_stage.fetch_tokens(stored, name, tmp_path)

    assert fetch(EXAMPLES) == tmp_path / TOKENS[EXAMPLES]
    assert fetch(HELD_OUT) is None
    flip(output, f"{folder}/{TOKENS[EXAMPLES]}")
    assert fetch(EXAMPLES) is None
    assert not (tmp_path / TOKENS[EXAMPLES]).exists()


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "metrics.json"])
def test_an_export_refuses_an_adapter_that_is_not_the_trained_one(
    prepared: PreparedRunConfig, output: LocalFolder, adapter: str, tmp_path: Path, name: str
) -> None:
    fetched = inputs.fetch_inputs(prepared, output, tmp_path / "one")
    assert (fetched.adapter / "adapter_model.safetensors").is_file()
    assert fetched.examples.held_out is not None
    flip(output, f"{adapter}/{name}")
    refused(
        lambda: inputs.fetch_inputs(prepared, output, tmp_path / "two"),
        f"{output.uri}/{adapter}/{name}",
        f"{output.uri}/{adapter}/complete.json",
    )


def test_a_marker_that_lists_files_elsewhere_is_refused(
    prepared: PreparedRunConfig, output: LocalFolder, adapter: str, tmp_path: Path
) -> None:
    stored = open_stage(output, Stage.TRAIN, prepared.resolved.fingerprints.train)
    outside = Artifact(path="adapter/../../../outside", bytes=0, sha256="")
    files = (*stored.marker.files, outside)
    wrong = stored.marker.model_copy(update={"files": files})
    output.write(f"{adapter}/complete.json", wrong.model_dump_json().encode())
    refused(
        lambda: inputs.fetch_inputs(prepared, output, tmp_path / "workspace"),
        "is not the file that",
    )
    elsewhere = stored.marker.model_copy(update={"folder": "../other"})
    output.write(f"{adapter}/complete.json", elsewhere.model_dump_json().encode())
    refused(lambda: inputs.fetch_inputs(prepared, output, tmp_path / "workspace"), "is no marker")
