"""Faults that the tests of the gate plant into GGUF files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune_trainer.export.gguf.header import Header


def overwrite(file: Path, place: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(data)


def set_value(file: Path, key: str, form: str, value: Any) -> None:
    """Change a number in the metadata."""
    with Header(file) as header:
        place = header.fields[key].start
    overwrite(file, place, struct.pack(f"<{form}", value))


def set_text(file: Path, key: str, old: bytes, new: bytes) -> None:
    """Change a part of a text, or of a list of texts, to another of the same length."""
    with Header(file) as header:
        raw, start = header.raw(key), header.fields[key].start
    assert len(old) == len(new)
    overwrite(file, start + raw.index(old), new)


def rename(file: Path, key: str, name: str) -> None:
    """Give an entry of the metadata another name of the same length."""
    with Header(file) as header:
        place = header.fields[key].start - 4 - len(key)
    assert len(key) == len(name)
    overwrite(file, place, name.encode())


def flip(file: Path, place: int, bit: int) -> None:
    data = file.read_bytes()[place]
    overwrite(file, place, bytes([data ^ 1 << bit]))


def tensor_place(file: Path, name: str) -> int:
    with Header(file) as header:
        return header.tensors[name].offset


def weights(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.float()


def set_weights(file: Path, name: str, value: torch.Tensor) -> None:
    """Write another float16 matrix into a file."""
    overwrite(file, tensor_place(file, name), value.half().numpy().tobytes())
