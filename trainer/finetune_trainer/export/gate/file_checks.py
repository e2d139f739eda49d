"""What a GGUF file shows by itself: its header, and how it reads text.

The header must have the sizes, types and metadata of its kind. Text must come out as the training
read it: the same tokens, the same template, the same end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Quantization
from finetune_trainer.export.gate.rows import MeasuredRows
from finetune_trainer.export.gguf.header import Header, Tensor
from finetune_trainer.export.llama import Reading
from finetune_trainer.model.tokenizer import (
    begins_with_bos,
    end_of_turn_ids,
    model_probes,
    other_tokens,
)

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
    Quantization.IQ3_M: LlamaFileType.MOSTLY_IQ3_M,
    Quantization.IQ3_S: LlamaFileType.MOSTLY_IQ3_S,
    Quantization.IQ3_XS: LlamaFileType.MOSTLY_IQ3_XS,
    Quantization.IQ3_XXS: LlamaFileType.MOSTLY_IQ3_XXS,
    Quantization.IQ2_M: LlamaFileType.MOSTLY_IQ2_M,
    Quantization.IQ2_S: LlamaFileType.MOSTLY_IQ2_S,
    Quantization.IQ2_XS: LlamaFileType.MOSTLY_IQ2_XS,
    Quantization.IQ2_XXS: LlamaFileType.MOSTLY_IQ2_XXS,
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
    Quantization.IQ3_M: GGMLQuantizationType.IQ3_S,
    Quantization.IQ3_S: GGMLQuantizationType.IQ3_S,
    Quantization.IQ3_XS: GGMLQuantizationType.IQ3_S,
    Quantization.IQ3_XXS: GGMLQuantizationType.IQ3_XXS,
    Quantization.IQ2_M: GGMLQuantizationType.IQ2_S,
    Quantization.IQ2_S: GGMLQuantizationType.IQ2_XS,
    Quantization.IQ2_XS: GGMLQuantizationType.IQ2_XS,
    Quantization.IQ2_XXS: GGMLQuantizationType.IQ2_XXS,
}
"""The type of most layers of each kind. The others of the mixture are larger, but LEAST_TYPES."""

LEAST_TYPES = {
    **MAIN_TYPES,
    Quantization.IQ3_XS: GGMLQuantizationType.IQ3_XXS,
    Quantization.IQ3_XXS: GGMLQuantizationType.IQ2_S,
}
"""The smallest type of each kind: some layers of these two have fewer bits than most."""

NARROW_TYPES = {
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.IQ4_XS: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q3_K: GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.IQ3_S: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ3_XXS: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ2_S: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ2_XS: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ2_XXS: GGMLQuantizationType.IQ4_NL,
}
"""What llama.cpp takes where rows are no multiple of 256 (src/llama-quant.cpp,
tensor_type_fallback); where they are none of 32 either, it takes F16."""

_CHANGED = ("general.file_type", "general.quantization_version")
_CHANGED_PREFIXES = ("quantize.", "split.")
_NORMAL = 1  # tokenizer.ggml.token_type of an ordinary token


def cut_problem(header: Header) -> str:
    """That the file ends before its tensors do; empty where it doesn't."""
    if header.size >= header.end:
        return ""
    return f"the file was cut: it has {header.size:,} bytes, and its tensors need {header.end:,}"


def header_problems(header: Header, kind: Quantization) -> Iterator[str]:
    """What is wrong with a file by itself."""
    if cut := cut_problem(header):
        yield cut
        return
    # Up to the next multiple of the alignment there may be padding.
    if header.size > header.end + 4096:
        yield f"{header.size - header.end:,} bytes follow its last tensor"
    yield from _overlaps(header)
    said, wanted = header.value("general.file_type"), FILE_TYPES[kind]
    if said != wanted:
        yield f"its metadata says that it is {_name(said)}, and not {kind}"
    yield from _types(header, kind)


def differences_from_source(header: Header, source: Header) -> Iterator[str]:
    """Forbidden differences between a file and the one that it was made of."""
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


def context_problems(header: Header, context: int | None) -> Iterator[str]:
    """A context length other than the model's. No short row would show it."""
    key = f"{header.value('general.architecture')}.context_length"
    found = header.value(key)
    if context is not None and found != context:
        yield f"its metadata {key} is {found}, and the model's is {context}"


def parameter_count(header: Header) -> int:
    """How many numbers the model has."""
    return sum(tensor.values for tensor in header.tensors.values())


def _may_change(key: str) -> bool:
    return key in _CHANGED or key.startswith(_CHANGED_PREFIXES)


def _same(one: Header, other: Header, key: str) -> bool:
    if key not in one.fields or key not in other.fields:
        return False
    return one.fields[key].type == other.fields[key].type and one.raw(key) == other.raw(key)


def _changed_copies(header: Header, source: Header) -> Iterator[str]:
    """A norm or bias that the quantization changed; they are copied."""
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
    main, least = MAIN_TYPES[kind], LEAST_TYPES[kind]
    weights = {n: t for n, t in header.tensors.items() if len(t.shape) > 1}
    smaller = sorted(n for n, t in weights.items() if _bits(t.type) < _bits(_least(t, least)))
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


@dataclass(frozen=True)
class TrainedText:
    """Texts as the training read them, and what marks their ends."""

    probes: tuple[str, ...]
    """The model's own (`model_probes`): llama.cpp has to split them alike."""

    probe_ids: tuple[tuple[int, ...], ...]
    rows: tuple[str, ...]
    """Whole conversations."""

    row_ids: tuple[tuple[int, ...], ...]
    template: str
    ends: tuple[int, ...]
    """The special tokens that the template puts behind an answer."""

    eos: tuple[int, ...]
    """What the metadata may name as the end of a sequence."""

    begins_with_bos: bool

    @property
    def texts(self) -> tuple[str, ...]:
        return self.probes + self.rows

    def rows_alike(self, reading: Reading) -> tuple[bool, ...]:
        """Whether llama.cpp splits each row as the training did."""
        theirs = reading.tokens[len(self.probes) :]
        return tuple(mine == other for mine, other in zip(self.row_ids, theirs, strict=True))


def trained_text(tokenizer: PreTrainedTokenizerBase, rows: MeasuredRows) -> TrainedText:
    """The model's probes and the rows' conversations, by the tokenizer of the training."""
    probes = model_probes(tokenizer)
    ends = tuple(sorted(end_of_turn_ids(tokenizer)))
    return TrainedText(
        probes=probes,
        probe_ids=tokens_of(tokenizer, probes),
        rows=rows.texts,
        row_ids=rows.full_ids,
        template=str(tokenizer.get_chat_template()).strip(),
        ends=ends,
        eos=(*ends, int(tokenizer.eos_token_id)),
        begins_with_bos=begins_with_bos(tokenizer),
    )


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """The tokens of texts in which special tokens are written out."""
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return tuple(tuple(ids) for ids in found)


def reading_problems(reading: Reading, header: Header, trained: TrainedText) -> Iterator[str]:
    """Where llama.cpp, or the metadata that other programs use, differs from the training."""
    theirs = reading.tokens[: len(trained.probes)]
    if different := other_tokens(trained.probes, trained.probe_ids, theirs):
        yield different
    template = header.value("tokenizer.chat_template")
    if str(template or "").strip() != trained.template:
        yield "its chat template is not the one that the training used"
    if not reading.stops_at:
        yield f"llama.cpp would not stop at the token that ends an answer ({list(trained.ends)})"
    eos = header.value("tokenizer.ggml.eos_token_id")
    if eos not in trained.eos:
        yield f"its metadata names {eos} as the end of a text, and not one of {trained.eos}"
    if reading.adds_bos and not trained.begins_with_bos:
        yield "servers would put a token before each prompt that the training did not (add_bos)"
    if reading.adds_eos:
        yield "servers would put an end token behind each prompt (add_eos)"


def vocabulary_problems(header: Header, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Ordinary tokens and merges other than the tokenizer's, also those that no row uses."""
    texts = header.strings("tokenizer.ggml.tokens") or []
    types = header.numbers("tokenizer.ggml.token_type") or []
    normal = [index for index, kind in enumerate(types[: len(texts)]) if kind == _NORMAL]
    known = tokenizer.convert_ids_to_tokens(normal)
    other = [i for i, token in zip(normal, known, strict=True) if texts[i] != token]
    if other:
        yield f"{len(other)} entries of its vocabulary are not the tokenizer's, such as {other[0]}"
    merges = header.strings("tokenizer.ggml.merges")
    trained = _merges(tokenizer)
    if merges and trained and merges != trained:
        yield "its merges of the vocabulary are not the tokenizer's"


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The merges of byte-pair encoding in their order, as GGUF writes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend else {}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
    # A space within a token would look like the one between the two (gguf-py's SpecialVocab).
    return [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]
