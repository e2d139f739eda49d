"""The merged model's weights, computed as they are read: base shards plus what a training changed.

MergedWeights, below, reads rows of the merged model by blocks.

checkpoint    the base's safetensors, memory-mapped; names of weights; the type to store them in
deltas        what the adapter adds to each weight, or what a full training put in its place
model_folder  the merged model as a folder: shards, configuration, tokenizer; the same in FP8

Nothing here loads a model. Whatever its size, only some blocks of rows are in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.merge.checkpoint import (
    FLOAT16_SAFE,
    OUTPUT_LAYERS,
    BaseTensor,
    TensorInfo,
    expert_parameters,
    other_model_error,
    read_checkpoint,
    read_config,
    shortened,
    sixteen_bit_type,
    stays_whole,
    weight_names,
)
from finetune_trainer.export.merge.deltas import (
    ALIGNED,
    ReadAdapter,
    Replacement,
    WeightChange,
    is_whole_model,
    read_adapter,
    read_whole_model,
)
from finetune_trainer.model.adapter import EXPERT_DIMENSIONS, INNER

__all__ = ["UNREACHED", "MergedWeights", "TensorInfo", "is_finite"]

SPAN_BYTES = 1 << 20  # of float32 sums that a thread computes at a time: they stay in its cache

UNREACHED = re.compile(r"(^|\.)(vision|visual|image|audio)\w*\.")
"""Parts of a model that text doesn't reach. Training on text doesn't change them."""

EXPERTS = re.compile(r"\.experts\.")

_S = TypeVar("_S")
_T = TypeVar("_T")


class MergedWeights:
    """Base model and adapter, merged as they are read. Reading is safe from several threads.

    In place of the adapter there may be the whole model that a full training left.
    """

    def __init__(
        self,
        stored: Mapping[str, BaseTensor],
        deltas: Mapping[str, WeightChange],
        dtype: torch.dtype,
    ) -> None:
        self._stored = stored
        self._deltas = deltas
        self.dtype = dtype
        """The 16-bit type of floating weights after the merge."""

        whole = stays_whole(item.tensor for item in stored.values())

        def stays(name: str, tensor: torch.Tensor) -> bool:
            return not tensor.is_floating_point() or (whole(tensor) and name not in deltas)

        self.infos = {
            name: TensorInfo(
                name,
                item.tensor.dtype if stays(name, item.tensor) else dtype,
                tuple(item.tensor.shape),
                item.shard,
            )
            for name, item in stored.items()
        }
        """The merged model's tensors by name, in the order of the base's files. What a base in 16
        bits keeps in float32 (a router's bias) stays so."""

        self.targets = frozenset(deltas)
        """Names of the weights that the training changes."""

    @classmethod
    def open(cls, base: Path, adapter: Path | None, dtype: torch.dtype | None = None) -> Self:
        """Map the files of both folders; raises StageError when they don't belong together.

        `dtype` is an earlier result of `.dtype`. It saves reading all of a model in 32 bits.
        """
        config = read_config(base)
        stored = _without_tied_copy(read_checkpoint(base), config)
        known = sixteen_bit_type(config, (item.tensor for item in stored.values()))
        deltas = {} if adapter is None else _what_changes(base, adapter, stored)
        dtype = known or dtype or cls(stored, deltas, torch.float32)._narrowest()
        return cls(stored, deltas, dtype)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a merged tensor in the type that `infos` names.

        Where nothing changes it is a view of the base's file: don't write to it. Raises
        StageError(QualityGateFailed) when a value is not finite any more.
        """
        stored, dtype = self._stored[name].tensor, self.infos[name].dtype
        if not stored.ndim:
            return stored.to(dtype)
        if name not in self._deltas and stored.dtype is dtype:
            return stored[start:stop]
        stop = stored.shape[0] if stop is None else min(stop, stored.shape[0])
        out = torch.empty((max(0, stop - start), *stored.shape[1:]), dtype=dtype)

        def fill(span: tuple[int, int]) -> None:
            low, high = span
            part = out[low - start : high - start]
            part.copy_(self._exact(name, low, high))
            if not is_finite(part):
                raise self._not_finite(name, low, high)

        _in_threads(fill, _spans(start, stop, stored))
        return out

    def check_changes(self) -> None:
        """Raise StageError(QualityGateFailed) when a target stays as it is, or isn't finite.

        Of a full training some may, such as norms, whose small steps 16 bits don't show.
        """
        for name, delta in self._deltas.items():
            if not all(is_finite(part) for part in delta.parts):
                raise _broken(name)
        if all(isinstance(delta, Replacement) for delta in self._deltas.values()):
            if not any(map(self._changes, self._deltas)):
                raise _unchanged(list(self._deltas), len(self._deltas))
            return
        changed = _in_threads(self._changes, self._deltas)
        same = [n for n, c in zip(self._deltas, changed, strict=True) if not c]
        if any(c for n, c in zip(self._deltas, changed, strict=True) if EXPERTS.search(n)):
            same = [name for name in same if not EXPERTS.search(name)]  # no token came to some
        if same := [name for name in same if not UNREACHED.search(name)]:
            raise _unchanged(same, len(self._deltas))

    def _exact(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Merged rows before rounding to the storage type."""
        stored = self._stored[name].tensor[start:stop]
        delta = self._deltas.get(name)
        return stored if delta is None else delta.merge(stored, start)

    def _changes(self, name: str) -> bool:
        stored = self._stored[name].tensor
        return any(
            not torch.equal(self.rows(name, low, high), stored[low:high].to(self.dtype))
            for low, high in _spans(0, stored.shape[0], stored)
        )

    def _narrowest(self) -> torch.dtype:
        """The 16-bit type for 32-bit weights: float16 has more digits, bfloat16 larger values."""

        def is_safe(name: str, span: tuple[int, int]) -> bool:
            return bool(self._exact(name, *span).abs().max() < FLOAT16_SAFE)

        for name, item in self._stored.items():
            tensor = item.tensor if item.tensor.ndim else item.tensor.unsqueeze(0)
            if tensor.is_floating_point() and tensor.numel():
                spans = _spans(0, tensor.shape[0], tensor)
                if not all(_in_threads(partial(is_safe, name), spans)):
                    return torch.bfloat16
        return torch.float16

    def _not_finite(self, name: str, start: int, stop: int) -> StageError:
        if not is_finite(self._exact(name, start, stop)):
            return _broken(name)
        limit = torch.finfo(self.dtype).max
        return StageError(
            Reason.QUALITY_GATE_FAILED,
            f"The merged {name} has values beyond {limit:,.0f}, where {self.dtype} ends: lower "
            "spec.training.learningRate and train again, or take a base model in bfloat16.",
        )


def _without_tied_copy(
    stored: dict[str, BaseTensor], config: dict[str, Any]
) -> dict[str, BaseTensor]:
    """Leave out an output layer that is a copy of the input embedding, as transformers does."""
    parts = (config, config.get("text_config") or {})
    output = next((name for name in stored if name.endswith("lm_head.weight")), None)
    inputs = next((name for name in stored if name.endswith("embed_tokens.weight")), None)
    if not (output and inputs and any(part.get("tie_word_embeddings") for part in parts)):
        return stored
    if not torch.equal(stored[output].tensor, stored[inputs].tensor):
        return stored
    return {name: item for name, item in stored.items() if name != output}


def _what_changes(
    base: Path, trained: Path, stored: Mapping[str, BaseTensor]
) -> dict[str, WeightChange]:
    """What the training changed, by the names of the weights in the base model's files."""
    found: Mapping[str, WeightChange]
    experts: dict[str, WeightChange] = {}
    if is_whole_model(trained):
        found = read_whole_model(trained)
        if unknown := sorted(found.keys() - stored.keys()):
            raise other_model_error(f"it has no {shortened(unknown)}")
        names = dict(zip(found, found, strict=True))
    else:
        adapter = read_adapter(trained)
        found = _without_tied_output(adapter.changes, stored)
        names = weight_names(base, found, stored.keys())
        experts = _expert_changes(base, adapter, stored) if adapter.experts else {}
    changes = {names[module]: change for module, change in found.items()} | experts
    for name, change in changes.items():
        shape = tuple(stored[name].tensor.shape)
        if shape != change.shape:
            raise other_model_error(f"its {name} has shape {shape} instead of {change.shape}")
    return changes


def _expert_changes(
    base: Path, adapter: ReadAdapter, stored: Mapping[str, BaseTensor]
) -> dict[str, WeightChange]:
    """What an adapter of experts changes, by the names in the base model's files.

    PEFT wraps a module once for each of its parameters, in their order: the last one is outermost.
    """
    found: dict[str, WeightChange] = {}
    parameters = expert_parameters(base, adapter.target_parameters, stored)
    for wrapped, factors in adapter.experts.items():
        module = wrapped.replace(INNER, "")
        own = parameters.get(module, [])
        place = len(own) - 1 - wrapped.count(INNER)
        if place < 0:
            raise other_model_error(f"it has no parameters with experts in {module}")
        parameter = own[place]
        if parameter.stored is not None:
            found[parameter.stored] = factors.stacked(transposed=parameter.transposed)
        elif {part.expert for part in parameter.parts} != set(range(factors.experts)):
            raise other_model_error(f"it has not {factors.experts} experts in {module}")
        for part in parameter.parts:
            found[part.name] = factors.of(part.expert, part.rows)
    return found


def _without_tied_output(
    modules: dict[str, WeightChange], stored: Collection[str]
) -> dict[str, WeightChange]:
    """Leave out an output layer that is the input embedding, which PEFT saves under both names."""
    whole = {m: c.weight for m, c in modules.items() if isinstance(c, Replacement)}
    outputs = [
        m for m in whole if m.rpartition(".")[2] in OUTPUT_LAYERS and f"{m}.weight" not in stored
    ]
    inputs = [m for m in whole if m not in outputs]
    if len(outputs) != 1 or len(inputs) != 1:
        return modules
    if not torch.equal(whole[outputs[0]], whole[inputs[0]]):
        return modules
    return {m: change for m, change in modules.items() if m != outputs[0]}


def _spans(start: int, stop: int, tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Blocks of rows whose sums take about SPAN_BYTES."""
    row_bytes = 4 * max(1, tensor.numel() // max(1, tensor.shape[0]))
    aligned = ALIGNED if tensor.ndim < EXPERT_DIMENSIONS else 1  # else a row is an expert
    size = max(aligned, SPAN_BYTES // row_bytes // aligned * aligned)
    for low in range(start, stop, size):
        yield low, min(low + size, stop)


def _in_threads(work: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
    """The results of `work` on each item, from as many threads as torch may use.

    Each thread computes one item at a time. torch's own threads wait for each other many times in
    each item, which takes several times as long beside other busy processes.
    """
    items = list(items)
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    return list(_pool(threads).map(work, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "merge", initializer=torch.set_num_threads, initargs=(1,))


def is_finite(tensor: torch.Tensor) -> bool:
    """As torch.isfinite, 20 times as fast on a CPU. A NaN is both the minimum and the maximum."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _broken(name: str) -> StageError:
    return StageError(
        Reason.QUALITY_GATE_FAILED,
        f"The training left values that are not finite (for {name}): lower "
        "spec.training.learningRate and train again.",
    )


def _unchanged(names: list[str], targets: int) -> StageError:
    modules = shortened(name.removesuffix(".weight") for name in names)
    return StageError(
        Reason.QUALITY_GATE_FAILED,
        f"The training changed nothing in {len(names)} of {targets} targets ({modules}): "
        "raise spec.training.learningRate or epochs.",
    )
