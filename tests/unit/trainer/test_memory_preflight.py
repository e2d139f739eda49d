"""Memory, and room on the disk, are looked at before an export takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_trainer.contract import PreparedRunConfig, Reason, StageError
from finetune_trainer.export import pipeline
from finetune_trainer.export.pipeline import check_memory, check_space
from finetune_trainer.runtime import GIB
from tests.unit.trainer.test_memory_shape import config


def run(tmp_path: Path, **changes: int) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({**config("smollm2-135m"), **changes}))
    settings = PreparedRunConfig.model_validate(
        {
            "model": {"source": str(base)},
            "dataset": {"source": "/data.csv"},
            "output": {"uri": "/out"},
            "resolved": {
                "fingerprints": {"prepare": "a", "train": "b", "export": "c"},
                "datasetETag": "etag",
                "datasetRows": 1,
                "modelRevision": "1",
            },
        }
    )
    check_space(settings, base, tmp_path)


def test_a_small_model_has_room(tmp_path: Path) -> None:
    run(tmp_path)


def test_a_model_that_no_disk_holds(tmp_path: Path) -> None:
    with pytest.raises(StageError) as raised:
        run(tmp_path, num_hidden_layers=300_000, hidden_size=16_384, intermediate_size=65_536)
    assert raised.value.reason is Reason.OUT_OF_DISK
    assert "stages.export.resources.limits.ephemeral-storage" in raised.value.message


def test_a_model_whose_widths_are_not_known_is_left_to_try(tmp_path: Path) -> None:
    run(tmp_path, num_experts=8)


def test_a_pod_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "free_memory", lambda: GIB)
    with pytest.raises(StageError) as raised:
        check_memory()
    assert raised.value.reason is Reason.OUT_OF_MEMORY
    assert raised.value.message == (
        "The export needs 1.5 GiB of memory, and there are 1.0 GiB: set "
        "spec.stages.export.resources.limits.memory to at least 2Gi."
    )


def test_a_pod_with_what_the_message_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "free_memory", lambda: 2 * GIB)
    check_memory()
