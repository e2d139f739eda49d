"""What the header of a GGUF file must say: sizes, types of tensors, and metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from finetune_trainer.contract import Quantization
from finetune_trainer.export.gguf.header import Header, Tensor

FILE_TYPES = {
    Quantization.F32: LlamaFileType.ALL_F32,
    Quantization.F16: LlamaFileType.MOSTLY_F16,
    Quantization.BF16: LlamaFileType.MOSTLY_BF16,
    Quantization.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Quantization.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    Quantization.Q5_K_M: LlamaFileType.MOSTLY_Q5_K_M,
    Quantization.Q4_K_M: LlamaFileType.MOSTLY_Q4_K_M,
    Quantization.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
    Quantization.Q3_K_M: LlamaFileType.MOSTLY_Q3_K_M,
}
"""general.file_type of each kind of file."""

MAIN_TYPES = {
    Quantization.F32: GGMLQuantizationType.F32,
    Quantization.F16: GGMLQuantizationType.F16,
    Quantization.BF16: GGMLQuantizationType.BF16,
    Quantization.Q8_0: GGMLQuantizationType.Q8_0,
    Quantization.Q6_K: GGMLQuantizationType.Q6_K,
    Quantization.Q5_K_M: GGMLQuantizationType.Q5_K,
    Quantization.Q4_K_M: GGMLQuantizationType.Q4_K,
    Quantization.IQ4_XS: GGMLQuantizationType.IQ4_XS,
    Quantization.Q3_K_M: GGMLQuantizationType.Q3_K,
}
"""What most layers of each kind are stored in; others of the mixture are larger."""

NARROW_TYPES = {
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.IQ4_XS: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q3_K: GGMLQuantizationType.Q4_0,
}
"""What llama.cpp takes where rows are no multiple of 256 (src/llama-quant.cpp,
tensor_type_fallback); where they are none of 32 either, it takes F16."""

_CHANGED = ("general.file_type", "general.quantization_version")
_CHANGED_PREFIXES = ("quantize.", "split.")


def problems_of(header: Header, kind: Quantization) -> Iterator[str]:
    """What is wrong with a file by itself."""
    if header.size < header.end:
        yield (
            f"the file was cut: it has {header.size:,} bytes, and its tensors need {header.end:,}"
        )
        return
    # Up to the next multiple of the alignment there may be padding.
    if header.size > header.end + 4096:
        yield f"{header.size - header.end:,} bytes follow its last tensor"
    yield from _overlaps(header)
    said, wanted = header.value("general.file_type"), FILE_TYPES[kind]
    if said != wanted:
        yield f"its metadata says that it is {_name(said)}, and not {kind}"
    yield from _types(header, kind)


def unlike(header: Header, source: Header) -> Iterator[str]:
    """How a file differs from the one that it was made of, where it may not."""
    ours = {name: tensor.shape for name, tensor in header.tensors.items()}
    theirs = {name: tensor.shape for name, tensor in source.tensors.items()}
    if ours.keys() != theirs.keys():
        missing, more = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        yield f"it lacks the tensors {missing[:3]} and has {more[:3]} instead"
    elif ours != theirs:
        other = sorted(name for name in ours if ours[name] != theirs[name])
        yield f"the tensors {other[:3]} have another shape than before the quantization"
    keys = {key for key in header.fields.keys() | source.fields.keys() if not _may_change(key)}
    changed = sorted(key for key in keys if not _same(header, source, key))
    if changed:
        yield f"its metadata {', '.join(changed[:5])} changed in the quantization"
    yield from _changed_copies(header, source)


def unlike_config(header: Header, context: int | None) -> Iterator[str]:
    """Whether the metadata contradicts the configuration where no computation of ours shows it."""
    key = f"{header.value('general.architecture')}.context_length"
    found = header.value(key)
    if context is not None and found != context:
        yield f"its metadata {key} is {found}, and the model's is {context}"


def parameters(header: Header) -> int:
    """How many numbers the model has."""
    return sum(tensor.values for tensor in header.tensors.values())


def _may_change(key: str) -> bool:
    return key in _CHANGED or key.startswith(_CHANGED_PREFIXES)


def _same(one: Header, other: Header, key: str) -> bool:
    if key not in one.fields or key not in other.fields:
        return False
    return one.fields[key].type == other.fields[key].type and one.raw(key) == other.raw(key)


def _changed_copies(header: Header, source: Header) -> Iterator[str]:
    """Norms and biases are copied as they are."""
    for name, tensor in header.tensors.items():
        before = source.tensors.get(name)
        if before is None or len(tensor.shape) > 1 or before.type is not tensor.type:
            continue
        if header.contents(name) != source.contents(name):
            yield f"the tensor {name} is not the one that was copied"
            return


def _overlaps(header: Header) -> Iterator[str]:
    place = 0
    for tensor in sorted(header.tensors.values(), key=lambda item: item.offset):
        if tensor.offset < place:
            yield "its tensors overlap"
            return
        place = tensor.offset + tensor.bytes


def _types(header: Header, kind: Quantization) -> Iterator[str]:
    main = MAIN_TYPES[kind]
    weights = {n: t for n, t in header.tensors.items() if len(t.shape) > 1}
    smaller = sorted(n for n, t in weights.items() if _bits(t.type) < _bits(_least(t, main)))
    if smaller:
        found = header.tensors[smaller[0]].type.name
        yield f"the tensor {smaller[0]} is stored as {found}, which {kind} files don't use"
        return
    sizes: Counter[GGMLQuantizationType] = Counter()
    wanted: Counter[GGMLQuantizationType] = Counter()
    for name, tensor in weights.items():
        if name.startswith("blk."):
            sizes[tensor.type] += tensor.values
            wanted[_least(tensor, main)] += tensor.values
    if wanted and sizes[wanted.most_common(1)[0][0]] * 4 < wanted.total():
        most = sizes.most_common(1)[0][0].name
        yield f"most of its layers are stored as {most}, and not as {kind} files are"


def _least(tensor: Tensor, main: GGMLQuantizationType) -> GGMLQuantizationType:
    block = GGML_QUANT_SIZES[main][0]
    if tensor.shape[0] % block == 0:
        return main
    narrow = NARROW_TYPES.get(main, GGMLQuantizationType.F16)
    if tensor.shape[0] % GGML_QUANT_SIZES[narrow][0] == 0:
        return narrow
    return GGMLQuantizationType.F16


def _bits(kind: GGMLQuantizationType) -> float:
    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


def _name(file_type: Any) -> str:
    try:
        return LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return f"of the unknown type {file_type}"
