"""Publishing to a bucket: killed in between, the former version stays whole and current, and the
next attempt leaves what an unbroken one would have left."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.contract import Storage
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import MANIFEST
from hack.object_store import Credentials
from tests.dying_folder import DyingFolder, KilledError, contents
from tests.integration.trainer.conftest import use_keys
from tests.publishing import folder as version
from tests.publishing import publish

OLD = {"gguf/a": b"old", "gguf/gone": b"old only", "README.md": b"card"}
NEW = {"gguf/a": b"new", "gguf/b": b"new only", "README.md": b"card"}


def test_a_death_at_any_moment_is_cleaned_up_by_the_next_attempt(
    moto: Credentials, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)

    def folder(name: str) -> Folder:
        return open_folder(f"s3://{bucket}/publish/{name}", Storage(endpoint=moto.endpoint))

    clean = folder("clean")
    publish(clean, tmp_path, "old", OLD)
    old = contents(clean)
    publish(clean, tmp_path, "new", NEW)
    assert {MANIFEST, *(f"{version('new')}/{path}" for path in NEW)} <= contents(clean).keys()
    for moments in range(0, 100, 3):  # on disk all of them are tried
        output = folder(f"dying-{moments}")
        publish(output, tmp_path, "old", OLD)
        try:
            publish(DyingFolder(output, moments), tmp_path, "new", NEW)
        except KilledError:
            found = contents(output)
            assert {path: found[path] for path in old if path != MANIFEST} == {
                path: data for path, data in old.items() if path != MANIFEST
            }
            assert found[MANIFEST] in (old[MANIFEST], found.get(f"{version('new')}/{MANIFEST}"))
            publish(DyingFolder(output), tmp_path, "new", NEW)
            assert contents(output) == contents(clean), f"after {moments} changes"
        else:
            break
    assert moments >= 12
