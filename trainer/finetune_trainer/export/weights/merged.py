"""The merged model, one block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import torch

from finetune_trainer.export.weights.adapter import read_adapter
from finetune_trainer.export.weights.checkpoint import Stored, TensorInfo, read_checkpoint, some
from finetune_trainer.export.weights.delta import ALIGNED, Delta
from finetune_trainer.outcome import Reason, StageError

SUM_BYTES = 16 << 20  # of float32 sums at a time


class MergedWeights:
    """Base model and adapter, merged as they are read. Reading is safe from several threads."""

    def __init__(
        self, stored: Mapping[str, Stored], deltas: Mapping[str, Delta], dtype: torch.dtype
    ) -> None:
        self._stored = stored
        self._deltas = deltas
        self.dtype = dtype
        """The 16-bit type of all floating weights after the merge."""

        self.infos = {
            name: TensorInfo(
                name,
                dtype if item.tensor.is_floating_point() else item.tensor.dtype,
                tuple(item.tensor.shape),
                item.shard,
            )
            for name, item in stored.items()
        }
        """The merged model's tensors by name, in the order of the base's files."""

        self.targets = frozenset(deltas)
        """Names of the weights that the adapter changes."""

    @classmethod
    def open(cls, base: Path, adapter: Path | None) -> Self:
        """Map the files of both folders; raises StageError when they don't belong together."""
        stored = read_checkpoint(base)
        deltas = {} if adapter is None else _deltas(read_adapter(adapter), stored)
        return cls(stored, deltas, next(iter(stored.values())).tensor.dtype)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a merged tensor in the type that `infos` names.

        A view of the base's file where nothing changes: don't write to it. Raises
        StageError(QualityGateFailed) when a value is not finite any more.
        """
        stored = self._stored[name].tensor
        if name not in self._deltas and stored.dtype is self.infos[name].dtype:
            return stored[start:stop] if stored.ndim else stored
        stop = stored.shape[0] if stop is None else min(stop, stored.shape[0])
        out = torch.empty((max(0, stop - start), *stored.shape[1:]), dtype=self.dtype)
        for low, high in _spans(start, stop, stored):
            out[low - start : high - start] = self._exact(name, low, high)
        if not torch.isfinite(out).all():
            raise _not_finite(name)
        return out

    def _exact(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Merged rows before they are rounded to the storage type."""
        stored = self._stored[name].tensor[start:stop]
        delta = self._deltas.get(name)
        return stored if delta is None else delta.merge(stored, start)

    def check_changes(self) -> None:
        """Raise StageError(QualityGateFailed) when a target stays as it is, or isn't finite."""
        for name, delta in self._deltas.items():
            if not all(bool(torch.isfinite(part).all()) for part in delta.parts):
                raise _not_finite(name)
        if same := [name for name in self._deltas if not self._changes(name)]:
            raise _unchanged(same, len(self._deltas))

    def _changes(self, name: str) -> bool:
        stored = self._stored[name].tensor
        return any(
            not torch.equal(self.rows(name, low, high), stored[low:high].to(self.dtype))
            for low, high in _spans(0, stored.shape[0], stored)
        )


def _deltas(modules: dict[str, Delta], stored: Mapping[str, Stored]) -> dict[str, Delta]:
    """Deltas by the names of the weights that they change."""
    named = {f"{module}.weight": delta for module, delta in modules.items()}
    if missing := [name for name in named if name not in stored]:
        raise _other_model(f"it has no {some(missing)}")
    for name, delta in named.items():
        if tuple(stored[name].tensor.shape) != delta.shape:
            shape = tuple(stored[name].tensor.shape)
            raise _other_model(f"its {name} has shape {shape} instead of {delta.shape}")
    return named


def _spans(start: int, stop: int, tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks whose sums take about SUM_BYTES."""
    row_bytes = max(1, tensor[0].numel() * 4) if tensor.shape[0] else 1
    size = max(ALIGNED, SUM_BYTES // row_bytes // ALIGNED * ALIGNED)
    for low in range(start, stop, size):
        yield low, min(low + size, stop)


def _other_model(cause: str) -> StageError:
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The adapter does not belong to this base model: {cause}. Name the model that it was "
        "trained on, or train again.",
    )


def _not_finite(name: str) -> StageError:
    return StageError(
        Reason.QUALITY_GATE_FAILED,
        f"The adapter holds values that are not finite ({name}): lower "
        "spec.training.learningRate and train again.",
    )


def _unchanged(names: list[str], targets: int) -> StageError:
    modules = some(name.removesuffix(".weight") for name in names)
    return StageError(
        Reason.QUALITY_GATE_FAILED,
        f"The training changed nothing in {len(names)} of {targets} target modules ({modules}): "
        "raise spec.training.learningRate or epochs.",
    )
