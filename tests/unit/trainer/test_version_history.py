"""What a stage tells of the versions in the store, within the kubelet's 4,096 bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    Artifact,
    Reason,
    Stage,
    StageError,
    StageResult,
    VersionSummary,
    digest,
)
from finetune_trainer.contract.outcome import TERMINATION_MESSAGE_LIMIT
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import MANIFEST
from finetune_trainer.store.versions import (
    find_rollback,
    list_versions,
    make_current,
    summarize_versions,
    version_name,
)

LINEAGE: dict[str, Any] = {
    "dataset": "s3://data/faq.csv",
    "datasetETag": "etag",
    "datasetRows": 120,
    "columns": {},
    "model": "org/base",
    "modelRevision": "abc",
    "hyperparameters": {},
    "fingerprints": {"prepare": "p", "train": "t", "export": "e"},
    "versions": {},
}


def write_version(output: LocalFolder, number: int, **fields: Any) -> str:
    """A version without files, made on that day of a year; returns its name."""
    fingerprint = digest(number)
    name = version_name(fingerprint)
    created = f"2026-{number // 28 + 1:02}-{number % 28 + 1:02}T00:00:00Z"
    manifest = {
        "stage": "export",
        "fingerprint": fingerprint,
        "version": name,
        "files": [],
        "created": created,
        "lineage": LINEAGE,
        "metrics": {"evalLoss": number / 10},
        "gate": {},
        **fields,
    }
    path = f"versions/{name}/{MANIFEST}"
    output.write(path, json.dumps(manifest).encode())
    os.utime(output.root / path, (number, number))
    return name


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path)


def test_the_newest_twenty_and_the_current_one_are_told(
    output: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [write_version(output, number) for number in range(30)]
    oldest = list_versions(output)[-1]
    make_current(output, oldest)
    read = LocalFolder.read
    paths: list[str] = []

    def counted(self: LocalFolder, path: str) -> bytes | None:
        paths.append(path)
        return read(self, path)

    monkeypatch.setattr(LocalFolder, "read", counted)
    told = summarize_versions(output)
    assert [each.version for each in told] == [*reversed(names[10:]), oldest.name]
    assert [each.current for each in told] == [*[False] * 20, True]
    assert len(paths) == 21, "a bucket with years of versions costs no more"
    assert told[0] == VersionSummary(
        version=names[-1],
        created="2026-02-02T00:00:00Z",
        dataset_etag="etag",
        dataset_rows=120,
        model_revision="abc",
        eval_loss=2.9,
    )


def test_a_manifest_of_another_release_is_told_by_its_name(output: LocalFolder) -> None:
    name = write_version(output, 1, lineage={"fingerprints": LINEAGE["fingerprints"]})
    (told,) = summarize_versions(output)
    assert told == VersionSummary(version=name, created="2026-01-02T00:00:00Z")


def test_a_version_with_rejected_files_is_told_and_not_gone_back_to(output: LocalFolder) -> None:
    good = write_version(output, 1)
    bad = version_name(digest(2))
    output.write(f"versions/{bad}/rejected/model.gguf", b"x")
    file = {"path": "rejected/model.gguf", "bytes": 1, "sha256": "aa"}
    assert write_version(output, 2, files=[file]) == bad
    assert [each.rejected for each in summarize_versions(output)] == [True, False]
    with pytest.raises(StageError, match="the quality gate refused") as caught:
        find_rollback(output, bad)
    assert f"holds {good}." in caught.value.message


def test_what_is_known_of_the_oldest_versions_goes_first_from_a_message() -> None:
    versions = tuple(
        VersionSummary(
            version=f"{number:012x}",
            current=number == 0,
            created="2026-11-01T00:00:00Z",
            dataset_etag="e" * 32,
            dataset_rows=120,
            model_revision="f" * 64,
            eval_loss=1.25,
        )
        for number in range(21)
    )
    artifacts = tuple(
        Artifact(path=f"merged/part-{number}.safetensors", bytes=1, sha256="a" * 64)
        for number in range(8)
    )
    result = StageResult(
        stage=Stage.PREPARE,
        reason=Reason.SUCCEEDED,
        message="done",
        artifacts=artifacts,
        versions=versions,
    )
    message = result.to_message()
    assert len(message) <= TERMINATION_MESSAGE_LIMIT
    read = StageResult.from_message(message.decode())
    assert read is not None
    assert read.artifacts == artifacts
    told = read.versions or ()
    assert [each.version for each in told] == [each.version for each in versions]
    assert told[0] == versions[0]
    assert told[-1] == versions[-1].name_alone
    kept = [each.created is not None for each in told]
    assert kept == sorted(kept, reverse=True), "the newest keep theirs"
