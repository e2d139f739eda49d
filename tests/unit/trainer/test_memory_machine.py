"""The machine at hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
import torch

from finetune_trainer.memory.machine import this_machine


def test_the_machine_tells_its_hardware(tmp_path: Path) -> None:
    found = this_machine(tmp_path / "not" / "yet" / "made")
    assert found.gpus == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert found.memory_bytes is not None
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total
    disk = shutil.disk_usage(tmp_path).free
    assert found.ephemeral_storage_bytes == pytest.approx(disk, rel=0.05)
