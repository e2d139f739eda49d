"""The GGUF files of an export: their names, which is made of which, and how each is written."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from finetune_trainer.contract import Quantization, Reason, StageError
from finetune_trainer.contract.output import IMPORTANCE_TYPES
from finetune_trainer.export.gguf import QuantizeRequest
from finetune_trainer.export.gguf.header import Header
from finetune_trainer.memory.forecast import SOURCE
from finetune_trainer.model import ModelFolder, converter
from finetune_trainer.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune_trainer.model.loading import available_cpus
from finetune_trainer.runtime import child
from finetune_trainer.runtime.child import as_transfer
from finetune_trainer.runtime.reporter import Reporter, part_of
from finetune_trainer.store import replacing

QUANTIZE_WORKER = "finetune_trainer.export.gguf.quantize_worker"
LORA_SCRIPT = "convert_lora_to_gguf.py"

_NOT_IN_GGUF = (
    *("use_dora", "modules_to_save", "target_parameters"),
    *("alpha_pattern", "rank_pattern", "lora_bias"),
)
"""Fields of PEFT's LoraConfig that llama.cpp's adapters have no place for."""

BUFFER_BYTES = 64 << 20
"""For the rows that llama.cpp has in work at a time: as they are read (from a mapped file), in
float32 and quantized. A row of a matrix is always done as a whole."""

BLOCK_VALUES = 1 << 22  # that are looked at at a time
INFINITE = 0x7C00  # the exponent of float16's infinities and NaNs

AT_A_TIME = 2
"""Quantizations. One computes while the other reads, writes, or is checked by the caller."""

log = logging.getLogger(__name__)

SMALL = 2_000_000_000  # parameters; below, four bits cost much quality
_LARGE_FIRST = (Quantization.Q4_K_M, Quantization.Q5_K_M, Quantization.Q6_K, Quantization.Q8_0)
_SMALL_FIRST = (Quantization.Q8_0, Quantization.Q6_K, Quantization.F16, Quantization.BF16)


def file_name(model: str, quantization: Quantization) -> str:
    """The name that people know from the Hub, e.g. Llama-3.2-1B-Q4_K_M.gguf."""
    return f"{model}-{quantization}.gguf"


def adapter_file_name(model: str) -> str:
    """The name of the adapter's own file, e.g. Llama-3.2-1B-LoRA-F32.gguf."""
    return f"{model}-LoRA-{Quantization.F32}.gguf"


def preferred(kinds: Iterable[Quantization], parameters: float) -> Quantization:
    """The type that most people would serve. Small models lose much with four bits."""
    order = _SMALL_FIRST if parameters < SMALL else _LARGE_FIRST
    return min(kinds, key=lambda kind: order.index(kind) if kind in order else len(order))


@dataclass(frozen=True)
class GgufSource:
    """The files that GGUF files are made of, and what has to be known of them."""

    base: ModelFolder
    """With the base model's weights, or with merged ones."""

    adapter: Path | None
    """Folder with the adapter that is merged into them."""

    folder: ModelFolder
    """The finished model, with weights in `own_type`."""

    name: str
    """What the files call it."""

    own_type: Quantization
    """The 16-bit type that its weights have: F16 or BF16."""

    begins_with_bos: bool = True
    """Whether servers put that token before a prompt. Some tokenizers do although their chat
    template doesn't: the training never saw it."""


def write_files(
    model: GgufSource,
    target: Path,
    kinds: Iterable[Quantization],
    *,
    source: Path | None = None,
    importance: Path | None = None,
    reporter: Reporter | None = None,
    converted: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Quantization, Path]]:
    """Write one file for each type to the folder `target`, and yield each when it is complete.

    The first has the model's own 16-bit type, and the quantizations are made of it. It lies in a
    folder beside `target` where nobody asked for it, and only for as long as the others are made.
    F16 of a bfloat16 model follows, which the converter makes as well; then the others, the largest
    first. What comes after the first is begun when the caller asks for it, and `importance` has to
    be there by then. `source` is the first, where it is there already. `converted` is called when
    the model's folder isn't needed any more.
    """
    kinds = set(kinds)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=target.parent) as temporary:
        if source is None:
            place = target if model.own_type in kinds else Path(temporary)
            source = place / file_name(model.name, model.own_type)
            write_unquantized(model, source, model.own_type, reporter=reporter)
        yield model.own_type, source
        order = derived_order(kinds - {model.own_type})
        if Quantization.F16 in order:  # of the merged model, for it may not hold all values
            narrow = target / file_name(model.name, Quantization.F16)
            write_unquantized(model, narrow, Quantization.F16, reporter=reporter)
            yield Quantization.F16, narrow
        converted()
        others = [kind for kind in order if kind is not Quantization.F16]
        files: dict[Quantization, Path] = {
            kind: target / file_name(model.name, kind) for kind in others
        }
        yield from quantize_all(source, files, importance, reporter)


def derived_order(kinds: Iterable[Quantization]) -> list[Quantization]:
    """The order in which files are made after the first: F16, then the largest first."""
    order = list(Quantization)
    return sorted(kinds, key=lambda kind: (kind is not Quantization.F16, order.index(kind)))


def quantize_all(
    source: Path,
    targets: dict[Quantization, Path],
    importance: Path | None = None,
    reporter: Reporter | None = None,
) -> Iterator[tuple[Quantization, Path]]:
    """Write `source` as each of the types, and yield the files in their order."""
    with ThreadPoolExecutor(AT_A_TIME, "quantize") as pool:
        jobs = []
        for kind, file in targets.items():
            matrix = importance if kind in IMPORTANCE_TYPES else None
            work = partial(quantize, source, file, kind, matrix, reporter=reporter)
            jobs.append(pool.submit(work))
        try:
            for job, (kind, file) in zip(jobs, targets.items(), strict=True):
                job.result()
                yield kind, file
        except BaseException:  # also when the caller wants no more
            pool.shutdown(wait=False, cancel_futures=True)
            child.kill_running()
            raise


def write_unquantized(
    model: GgufSource, target: Path, kind: Quantization, *, reporter: Reporter | None = None
) -> None:
    """Write the merged model as F16, BF16 or F32 to the file `target`, by llama.cpp's converter.

    Values that F16 can't hold are infinite in it: see `beyond_float16`. Raises
    StageError(ModelUnsupported) where llama.cpp does not know the model.
    """
    part = SOURCE if kind is model.own_type else kind
    with (
        part_of(reporter, f"write {part}"),
        converter.view_of(model.folder, model.name) as view,
        replacing(target) as partial_file,
    ):
        name = converter.gguf_name(model.name, model.folder.path)
        command = [sys.executable, str(converter.llama_folder() / converter.SCRIPT), str(view)]
        command += ["--outfile", str(partial_file), "--outtype", kind.lower(), "--model-name", name]
        converter.run(
            command,
            model=model.folder,
            on_progress=as_transfer(reporter, f"Writing {target.name}"),
            shows=converter.shown_bytes,
        )
        if not model.begins_with_bos:
            _dont_add_bos(partial_file)


def _dont_add_bos(file: Path) -> None:
    """Let the file say that no token is put before a prompt; one that says nothing stays so."""
    with Header(file) as header:
        field = header.fields.get(gguf.Keys.Tokenizer.ADD_BOS)
    if field is not None:
        with file.open("r+b") as stream:
            stream.seek(field.start)
            stream.write(b"\0")  # false


def beyond_float16(file: Path) -> str | None:
    """The first tensor of an F16 file whose values F16 couldn't hold: they are infinite there."""
    with Header(file) as header:
        for name, tensor in header.tensors.items():
            if tensor.type is not gguf.GGMLQuantizationType.F16:
                continue
            bits = np.frombuffer(header.data, "<u2", tensor.values, tensor.offset)
            bad = any(
                (bits[start : start + BLOCK_VALUES] & INFINITE == INFINITE).any()
                for start in range(0, tensor.values, BLOCK_VALUES)
            )
            del bits  # else the file can't be unmapped
            if bad:
                return name
    return None


def quantize(
    source: Path,
    target: Path,
    kind: Quantization,
    importance: Path | None = None,
    *,
    reporter: Reporter | None = None,
) -> None:
    """Write `source`, an unquantized GGUF file, as another type to the file `target`.

    `importance` is an importance matrix of llama.cpp as a GGUF file. Raises
    StageError(ModelUnsupported) where llama.cpp can't do it.
    """
    with part_of(reporter, f"write {kind}"), replacing(target) as partial_file:
        request = QuantizeRequest(
            source=source,
            target=partial_file,
            kind=kind,
            threads=available_cpus(),
            buffer_bytes=BUFFER_BYTES,
            importance=importance,
        )
        done = child.run(
            [sys.executable, "-m", QUANTIZE_WORKER],
            request.model_dump_json(),
            on_progress=as_transfer(reporter, f"Writing {target.name}"),
        )
        if done.status != 0:
            log.error("llama.cpp's quantizer failed:\n%s", done.errors[-4000:])
            raise _failure(done, source, target, kind)


def _failure(done: child.Finished, source: Path, target: Path, kind: Quantization) -> Exception:
    # llama.cpp does not say why it could not write.
    if shutil.disk_usage(target.parent).free < source.stat().st_size // 100:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"llama.cpp can't quantize this model to {kind}: {done.last_line().rstrip('.'):.300}. "
        "Leave it out of spec.export.gguf.",
    )


def write_parts(file: Path, part_bytes: int) -> list[Path]:
    """Write a GGUF file once more in parts with so many bytes of tensors, beside itself.

    Names and metadata are those of llama.cpp's gguf-split: its programs load the first part, and
    find the others. The parts hold the same bytes; a tensor is never cut.
    """
    reader = gguf.GGUFReader(file)
    architecture = str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    writer = gguf.GGUFWriter(file, architecture, split_max_size=part_bytes)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # which the writer writes itself
        inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    total = len(writer.tensors)
    return [file.with_stem(f"{file.stem}-{n:05d}-of-{total:05d}") for n in range(1, total + 1)]


def write_adapter(base: ModelFolder, adapter: Path, target: Path) -> None:
    """Write a LoRA adapter of PEFT as GGUF in F32 to the file `target`.

    `folder` has the base model's configuration; its weights are not needed. Raises
    StageError(ModelUnsupported) where llama.cpp can't apply such an adapter, as with DoRA.
    """
    config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
    _refuse_unknown(config)
    with (
        converter.view_of(base, "model") as base_view,
        tempfile.TemporaryDirectory(prefix="adapter-") as temporary,
        replacing(target) as partial_file,
    ):
        view = Path(temporary, target.stem)  # the file's general.name is made of it
        view.mkdir()
        (view / ADAPTER_CONFIG).write_text(json.dumps(_as_llama_reads_it(config)))
        (view / ADAPTER_WEIGHTS).symlink_to((adapter / ADAPTER_WEIGHTS).resolve())
        command = [sys.executable, str(converter.llama_folder() / LORA_SCRIPT), str(view)]
        command += ["--base", str(base_view), "--outtype", "f32", "--outfile", str(partial_file)]
        if base.trust_remote_code:
            command.append("--trust-remote-code")
        converter.run(command, model=base)


def _refuse_unknown(config: dict[str, Any]) -> None:
    """Raise StageError for what llama.cpp would leave out silently."""
    found = [name for name in _NOT_IN_GGUF if config.get(name)]
    if config.get("bias") not in (None, "none"):
        found.append("bias")
    if found:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"llama.cpp can't apply this adapter alone, since its {ADAPTER_CONFIG} sets "
            f"{', '.join(found)}: set spec.export.adapterGguf to false; the GGUF files of the "
            "merged model are not concerned.",
        )


def _as_llama_reads_it(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration for llama.cpp, which always scales by alpha / r.

    rsLoRA scales by alpha / sqrt(r), that is (alpha sqrt(r)) / r.
    """
    if not config.get("use_rslora"):
        return config
    return {**config, "lora_alpha": config["lora_alpha"] * math.sqrt(config["r"])}
