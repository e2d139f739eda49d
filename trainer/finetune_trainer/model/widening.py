"""A quantized base model's values, computed in 16 bits (prequantized plans it).

This module is the program: a WideningRequest comes as JSON on standard input.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from finetune_trainer.contract import StageError
from finetune_trainer.model.converter import (
    Header,
    end_with,
    local_header,
    weight_files,
    write_stand_in,
)
from finetune_trainer.model.prequantized import (
    CONFIG,
    NarrowTensor,
    WideningRequest,
    unreadable,
    widen,
    write_small,
)
from finetune_trainer.runtime import child

BLOCK_VALUES = 1 << 23
"""Values that are in float32 at a time: 32 MiB."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What four bits stand for (OCP Microscaling Formats 1.0, E2M1)."""
BIAS = 127
"""Of the exponents in a byte (E8M0)."""

_TYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E8M0": torch.uint8,  # exponents, which `scale` reads as numbers
    "U8": torch.uint8,
}


def widen_here(request: WideningRequest) -> None:
    """Write the folder in 16 bits."""
    config = json.loads((request.source / CONFIG).read_bytes())
    files = {file: local_header(request.source / file) for file in weight_files(request.source)}
    wide = widen(config, {file: header for file, (_, header) in files.items()})
    if wide is None:
        raise unreadable("nothing")
    partial = request.target.with_name(f"{request.target.name}.part")
    for former in (partial, request.target):
        shutil.rmtree(former, ignore_errors=True)
    write_small(request.source, wide, partial)
    read = _Narrow(request.source, files)
    done = 0
    for name, header in wide.headers.items():
        begin = write_stand_in(header, partial / name)
        with (partial / name).open("r+b") as stream:
            for tensor, info in header.items():
                stream.seek(begin + info.data_offsets[0])
                for block in read.blocks(tensor, wide.sources.get(tensor), info.dtype):
                    done += stream.write(block)
                    child.say_progress(done, wide.nbytes)
    partial.rename(request.target)


class _Narrow:
    """The tensors of the files, mapped into memory."""

    def __init__(self, folder: Path, files: Mapping[str, tuple[int, Header]]) -> None:
        self._places = {n: (file, at) for file, (at, header) in files.items() for n in header}
        self._headers = {n: info for _, header in files.values() for n, info in header.items()}
        self._bytes = {
            file: torch.from_file(
                str(folder / file), size=(folder / file).stat().st_size, dtype=torch.uint8
            )
            for file in files
        }

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor."""
        (file, at), info = self._places[name], self._headers[name]
        return self._bytes[file][at + info.data_offsets[0] : at + info.data_offsets[1]]

    def tensor(self, name: str) -> torch.Tensor:
        """As the file has it; exponents alone (E8M0) as numbers."""
        raw, info = self.raw(name), self._headers[name]
        kind = _TYPES[info.dtype]
        if raw.storage_offset() % kind.itemsize:
            raw = raw.clone()  # files of other writers may not be aligned
        return raw.view(kind).view(info.shape)

    def scale(self, name: str) -> torch.Tensor:
        """In float32."""
        found = self.tensor(name)
        if found.dtype is torch.uint8:
            return (found.float() - BIAS).exp2()
        return found.float()

    def blocks(self, name: str, source: NarrowTensor | None, kind: str) -> Iterator[memoryview]:
        """The bytes of a tensor of the model in 16 bits, in order."""
        wide = torch.bfloat16 if kind == "BF16" else torch.float16
        if source is None:
            raw = self.raw(name)
            for start in range(0, len(raw), BLOCK_VALUES):
                yield raw[start : start + BLOCK_VALUES].numpy().data
            return
        values = self._mx(source) if source.mx else self._rows(source)
        for block in values:
            yield block.to(wide).contiguous().view(-1).view(torch.uint8).numpy().data

    def _mx(self, source: NarrowTensor) -> Iterator[torch.Tensor]:
        """Expert by expert: (in, out)."""
        table = torch.tensor(FP4)
        blocks, scales = self.tensor(source.values), self.tensor(source.scale)
        for packed, exponents in zip(blocks, scales, strict=True):
            digits = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)  # (out, blocks, 32)
            power = exponents.int().sub_(BIAS).unsqueeze(-1)
            yield torch.ldexp(table[digits.int()], power).flatten(1).T

    def _rows(self, source: NarrowTensor) -> Iterator[torch.Tensor]:
        """Some rows of a matrix, or of a stack of them, at a time."""
        values = self.tensor(source.values)
        shape = values.shape
        matrices = values.view(-1, *shape[-2:])
        if source.bits:
            self._check_width(source)
        scale = self.scale(source.scale)
        # Of a matrix: (rows of scales, columns of scales).
        scales = scale.view(len(matrices), *_grid(scale.shape, shape))
        self._check_grid(source, matrices, scales)
        zero = self._zero(source, scales.shape[-2:])
        for number, matrix in enumerate(matrices):
            rows = max(1, BLOCK_VALUES // (matrix.shape[1] * (32 // (source.bits or 32))))
            for start in range(0, len(matrix), rows):
                block = matrix[start : start + rows]
                exact = _unpacked(block, source.bits) if source.bits else block.float()
                at = torch.arange(start, start + len(block))
                if zero is not None:
                    exact = exact - self._spread(zero, at, exact, source, len(matrix))
                yield exact * self._spread(scales[number], at, exact, source, len(matrix))

    def _check_width(self, source: NarrowTensor) -> None:
        """Packed rows may be filled up, which the headers don't tell."""
        shape = f"{source.values.removesuffix('_packed')}_shape"
        columns = self._headers[source.values].shape[1] * 32 // source.bits
        if shape in self._headers and self.tensor(shape)[1] != columns:
            raise unreadable(f"compressed-tensors, whose {shape} is no multiple of a word")

    def _check_grid(
        self, source: NarrowTensor, matrices: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Raise StageError if the scales are not those of the blocks that config.json names."""
        grid = tuple(scales.shape[-2:])
        if source.block is None or grid == (1, 1):
            return
        (high, wide), columns = source.block, matrices.shape[2] * (32 // (source.bits or 32))
        wanted = (-(-matrices.shape[1] // high), -(-columns // wide))
        if grid != wanted:
            raise unreadable(f"{source.scale} has {grid} scales where blocks make {wanted}")

    def _spread(
        self,
        grid: torch.Tensor,
        rows: torch.Tensor,
        like: torch.Tensor,
        source: NarrowTensor,
        of_all: int,
    ) -> torch.Tensor:
        """A value of `grid` for each element of the rows."""
        columns = like.shape[1]
        high, wide = source.block or (-(-of_all // grid.shape[0]), -(-columns // grid.shape[1]))
        high = max(high, of_all) if grid.shape[0] == 1 else high
        some = grid[rows // high]
        if source.group is not None and (group := self.tensor(source.group).long()).min() >= 0:
            return some[:, group]  # else the columns are in order, and the groups are unused
        if grid.shape[1] == 1:
            return some
        return some.unsqueeze(2).expand(-1, -1, wide).flatten(1)[:, :columns]

    def _zero(self, source: NarrowTensor, grid: tuple[int, ...]) -> torch.Tensor | None:
        """What stands for zero, (rows, columns) as the scales; packed along the rows."""
        if source.zero is None:
            return None
        found = self.tensor(source.zero)
        if source.bits and found.dtype is torch.int32:
            return _unpacked(found.T.contiguous(), source.bits).T[: grid[0]]
        return found.float().view(*grid)


def _grid(scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows and columns of the scales that a matrix has."""
    per_matrix = math.prod(scale) // max(1, math.prod(shape[:-2]))
    if per_matrix == 1:
        return 1, 1
    if per_matrix == shape[-2] and (len(scale) == len(shape) - 1 or scale[-1] == 1):
        return shape[-2], 1
    return scale[-2], scale[-1]


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, m) words of 32 bits as (n, 32 / bits · m) signed numbers, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    digits = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return digits.flatten(-2).float() - (1 << (bits - 1))


def main() -> None:
    try:
        widen_here(WideningRequest.model_validate_json(sys.stdin.read()))
    except StageError as error:
        end_with(error)


if __name__ == "__main__":
    main()
