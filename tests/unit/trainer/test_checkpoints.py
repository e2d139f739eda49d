"""Checkpoints in a store: whole or not at all, of one training only, the last two kept."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from finetune_trainer.contract import Reason, StageError, TrainingPlan
from finetune_trainer.store import FileInfo, LocalFolder, OnBytes
from finetune_trainer.train.supervisor.checkpoints import (
    CheckpointMarker,
    CheckpointStore,
    LocalCheckpoint,
    files_to_resume,
)

PLAN = TrainingPlan(batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=False)
BASE = "stages/train/abc/checkpoints"
FILES = {
    "adapter_config.json": "{}",
    "adapter_model.safetensors": "weights",
    "optimizer.pt": "moments",
    "rng_state.pth": "dice",
    "trainer_state.json": "{}",
}
NOT_NEEDED = {"training_args.bin": "pickle", "tokenizer.json": "{}", "README.md": "#"}


class Recording(LocalFolder):
    """A folder that notes what is done to it, and fails on demand."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[tuple[str, str]] = []
        self.error: StageError | None = None

    def list(self, prefix: str = "") -> list[FileInfo]:
        self._fail()
        return super().list(prefix)

    def upload(
        self,
        source: Path,
        path: str,
        on_bytes: OnBytes | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        self._fail()
        self.calls.append(("put", path))
        super().upload(source, path, on_bytes, sha256=sha256)

    def write(self, path: str, data: bytes) -> None:
        self._fail()
        self.calls.append(("put", path))
        super().write(path, data)

    def delete(self, paths: Iterable[str]) -> None:
        self._fail()
        for path in paths:
            self.calls.append(("delete", path))
            super().delete([path])

    def _fail(self) -> None:
        if self.error:
            raise self.error


@pytest.fixture
def folder(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "store")


@pytest.fixture
def store(folder: Recording) -> CheckpointStore:
    return CheckpointStore(folder, "abc")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", {**FILES, **NOT_NEEDED})


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def save(store: CheckpointStore, written: Path, *steps: int) -> None:
    for step in steps:
        store.save(LocalCheckpoint(step, written, PLAN, 512))


def read(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_was_saved_is_what_is_fetched(
    store: CheckpointStore, written: Path, tmp_path: Path
) -> None:
    save(store, written, 20)
    found = store.fetch_newest(tmp_path / "fetched")
    assert found is not None
    assert (found.step, found.plan, found.max_sequence_length) == (20, PLAN, 512)
    assert read(tmp_path / "fetched") == FILES


def test_the_marker_comes_last_and_lists_all_files(
    store: CheckpointStore, folder: Recording, written: Path
) -> None:
    save(store, written, 20)
    puts = [path for call, path in folder.calls if call == "put"]
    assert puts[-1] == f"{BASE}/20/complete.json"
    marker = json.loads((folder.root / puts[-1]).read_bytes())
    assert {item["path"] for item in marker["files"]} == set(FILES)
    assert marker["fingerprint"] == "abc"


def test_a_marker_goes_before_the_files_under_it_are_replaced_or_deleted(
    store: CheckpointStore, folder: Recording, written: Path
) -> None:
    save(store, written, 20, 20)
    second = folder.calls[len(folder.calls) // 2 :]
    assert second[0] == ("delete", f"{BASE}/20/complete.json")
    folder.calls.clear()
    store.clear()
    assert folder.calls[0] == ("delete", f"{BASE}/20/complete.json")
    assert folder.list() == []


def test_nothing_pickled_but_tensors_is_uploaded(written: Path) -> None:
    assert {file.relative_to(written).as_posix() for file in files_to_resume(written)} == set(FILES)


def test_the_last_two_are_kept_and_what_was_cut_off_goes(
    store: CheckpointStore, folder: Recording, written: Path
) -> None:
    save(store, written, 10, 20, 30)
    (folder.root / BASE / "25").mkdir()
    (folder.root / BASE / "25" / "optimizer.pt").write_text("cut off")
    (folder.root / BASE / "40").mkdir()
    (folder.root / BASE / "40" / "complete.json").write_text("passed over as damaged")
    store.prune(30)
    assert {info.path.split("/")[4] for info in folder.list(f"{BASE}/")} == {"20", "30"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("optimizer.pt", "momentS", "optimizer.pt is not what was written"),
        ("optimizer.pt", "mom", "optimizer.pt is not what was written"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("complete.json", "{", "complete.json is no marker of this version"),
        ("complete.json", "{}", "complete.json is no marker of this version"),
    ],
    ids=["changed", "shorter", "missing", "broken marker", "empty marker"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(  # noqa: PLR0917
    tmp_path: Path,
    written: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    content: str | None,
    said: str,
) -> None:
    folder = LocalFolder(tmp_path / "store")
    store = CheckpointStore(folder, "abc")
    save(store, written, 10, 20)
    file = folder.root / BASE / "20" / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    found = store.fetch_newest(tmp_path / "fetched")
    assert found is not None
    assert found.step == 10
    assert read(tmp_path / "fetched") == FILES
    assert f"{BASE}/20 is passed over: {said}" in caplog.text


def test_one_without_a_marker_does_not_count(
    store: CheckpointStore, folder: Recording, written: Path, tmp_path: Path
) -> None:
    save(store, written, 10, 20)
    (folder.root / BASE / "20" / "complete.json").unlink()
    found = store.fetch_newest(tmp_path / "fetched")
    assert found is not None
    assert found.step == 10


def test_one_of_another_training_is_never_used(
    store: CheckpointStore, folder: Recording, written: Path, tmp_path: Path
) -> None:
    save(CheckpointStore(folder, "other"), written, 20)
    assert store.fetch_newest(tmp_path / "fetched") is None
    # Somebody copied it to where ours would be.
    (folder.root / BASE).parent.mkdir()
    (folder.root / "stages/train/other/checkpoints").rename(folder.root / BASE)
    assert store.fetch_newest(tmp_path / "fetched") is None
    assert not (tmp_path / "fetched").exists()


def test_a_marker_cannot_name_files_outside_its_folder(
    store: CheckpointStore, folder: Recording, written: Path, tmp_path: Path
) -> None:
    save(store, written, 20)
    marker = folder.root / BASE / "20" / "complete.json"
    marker.write_text(marker.read_text().replace("rng_state.pth", "../rng_state.pth"))
    assert store.fetch_newest(tmp_path / "fetched") is None


def test_a_store_that_does_not_answer_has_no_checkpoint_but_a_denied_one_is_an_error(
    store: CheckpointStore, folder: Recording, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.error = StageError(Reason.STORAGE_UNAVAILABLE, "The store answered 503.")
    assert store.fetch_newest(tmp_path / "fetched") is None
    assert "the training starts anew: The store answered 503." in caplog.text
    folder.error = StageError(Reason.STORAGE_ACCESS_DENIED, "The store refuses access.")
    with pytest.raises(StageError, match="refuses"):
        store.fetch_newest(tmp_path / "fetched")


def test_a_checkpoint_that_is_refused_says_why(
    store: CheckpointStore, written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, written, 10)

    def refuse(found: CheckpointMarker) -> str | None:
        return f"step {found.step} is for other devices"

    assert store.fetch_newest(tmp_path / "fetched", refuse) is None
    assert "passed over: step 10 is for other devices" in caplog.text
