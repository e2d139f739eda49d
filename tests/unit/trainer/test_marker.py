"""Markers: what counts as complete, and what a marker hands on."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.contract import Artifact, Quality, Stage, Storage
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import MANIFEST, Marker, find_complete

GOOD = Quality(kl_divergence=0.03, same_top_token=0.92, perplexity=5.5, max_kl_divergence=0.08)
BAD = GOOD.model_copy(update={"kl_divergence": 0.4, "passed": False})


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    return open_folder(str(tmp_path / "store"), Storage())


def publish(output: Folder, path: str, quality: Quality | None) -> None:
    output.write(path, b"GGUF")
    file = Artifact(path=path, bytes=4, sha256="aa", quality=quality)
    marker = Marker(stage=Stage.EXPORT, fingerprint="fp", files=(file,))
    output.write(MANIFEST, marker.model_dump_json().encode())


@pytest.mark.parametrize("quality", [None, GOOD, BAD])
def test_a_complete_export_hands_on_the_quality_of_its_files(
    output: Folder, quality: Quality | None
) -> None:
    """Also of one over its limit, which `verify: warn` has let pass."""
    publish(output, "gguf/model-Q4_K_M.gguf", quality)
    marker = find_complete(output, Stage.EXPORT, "fp")
    assert marker is not None
    assert [file.quality for file in marker.files] == [quality]


def test_an_export_with_a_rejected_file_is_not_complete(output: Folder) -> None:
    publish(output, "rejected/model-Q4_K_M.gguf", BAD)
    assert find_complete(output, Stage.EXPORT, "fp") is None
