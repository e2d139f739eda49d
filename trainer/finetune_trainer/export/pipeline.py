"""The models of an export: merged, as GGUF, and each GGUF file through the gate.

A file is handed on as soon as it is finished and checked, so that it can be uploaded while the next
one is computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    REJECTED,
    FileVerdict,
    GateReport,
    Quality,
    Quantization,
    RunConfig,
    StageError,
)
from finetune_trainer.export.gate.gate import Gate
from finetune_trainer.export.gguf.convert import Model, write_adapter
from finetune_trainer.export.gguf.files import PROFITING, adapter_file_name, write_files
from finetune_trainer.export.gguf.importance import write_importance
from finetune_trainer.export.inputs import Examples, read_lines
from finetune_trainer.export.merge import MergedWeights, write_merged
from finetune_trainer.export.merge.model_folder import assemble, generation_settings
from finetune_trainer.export.ollama.modelfile import write_modelfile
from finetune_trainer.model import source
from finetune_trainer.model.loading import use_available_cpus
from finetune_trainer.model.tokenizer import begins_with_bos, load_tokenizer
from finetune_trainer.runtime.progress import Reporter

MERGED, GGUF = "merged", "gguf"

log = logging.getLogger(__name__)


class Add(Protocol):
    """Takes a finished file, which stays as it is from then on."""

    def __call__(self, file: Path, path: str, quality: Quality | None = None) -> object:
        """`path` is its name in the output folder."""


@dataclass(frozen=True)
class Tuned:
    """Base model and adapter put together."""

    model: Model
    weights: MergedWeights
    """Opened once: of a float32 base that reads all of them."""

    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Making:
    """What all steps need."""

    config: RunConfig
    tuned: Tuned
    examples: Examples
    result: Path
    """Folder for the files of the output."""

    workspace: Path
    add: Add
    reporter: Reporter

    @property
    def model(self) -> Model:
        """What GGUF files are made of."""
        return self.tuned.model

    @property
    def trusted(self) -> bool:
        """Whether Python code that comes with the model may run."""
        return self.config.model.trust_remote_code


def put_together(config: RunConfig, base: Path, adapter: Path | None, folder: Path) -> Tuned:
    """Put base and adapter together, or take `base` alone; raises StageError.

    `folder` gets the configuration and the tokenizer of the finished model, unless it is `base`
    itself, which has them.
    """
    trusted = config.model.trust_remote_code
    use_available_cpus()
    weights = MergedWeights.open(base, adapter)
    if adapter:
        weights.check_changes()
        assemble(base, adapter, folder, trust_remote_code=trusted, dtype=weights.dtype)
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    model = Model(
        base=base,
        adapter=adapter,
        folder=folder,
        name=source.display_name(config.model.source),
        own=Quantization.BF16 if weights.dtype is torch.bfloat16 else Quantization.F16,
        begins_with_bos=begins_with_bos(tokenizer),
        trust_remote_code=trusted,
    )
    return Tuned(model, weights, tokenizer)


def add_folder(add: Add, folder: Path) -> None:
    """Hand on all files of a folder, which has its name in the output folder too."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        add(file, file.relative_to(folder.parent).as_posix())


def make_merged(making: Making) -> None:
    """Write the merged model's weights beside its configuration, and hand on the folder."""
    tensors = making.tuned.weights.infos.values()
    total = sum(math.prod(info.shape) * info.dtype.itemsize for info in tensors)
    moved = making.reporter.transfer("Merging the adapter into the base model", total)
    write_merged(making.tuned.weights, making.model.folder, moved)
    add_folder(making.add, making.model.folder)


def make_gguf(making: Making) -> GateReport:
    """Write GGUF files and Modelfile below the result, and check each; raises StageError."""
    gate = open_gate(making)
    importance = importance_file(making)
    files = checked_files(making, gate, importance)
    with ThreadPoolExecutor(1, "adapter") as beside:  # each imports for seconds on one CPU
        adapter_made = beside.submit(make_adapter, making)
        first = next(files)  # the one that the others are made of
        adapter = adapter_made.result()
    if adapter:
        check_adapter(making, gate, adapter)
    if first.check.passed:
        making.reporter.message("Asking the tuned model and its base the same questions")
        gate.samples(first.file, adapter)
    if importance:
        rows = read_lines(making.examples.trained)
        write_importance(making.model, first.file, rows, importance, making.reporter)
    usable = [each for each in (first, *files) if each.usable]
    # With `verify: warn` some may have fallen short: those only where there is nothing better.
    good = [each for each in usable if each.check.passed] or usable
    if good:
        make_modelfile(making, {each.kind: each.file for each in good})
    return gate.report()


def open_gate(making: Making) -> Gate:
    """Run the tuned model over the rows, before any conversion."""
    making.reporter.message("Asking the tuned model, for what its files are held against")
    return Gate.open(
        making.model.base,
        making.model.adapter,
        making.examples.measured(),
        making.workspace / "gate",
        making.config.export,
        held_out=making.examples.held_out is not None,
        trust_remote_code=making.trusted,
    )


def importance_file(making: Making) -> Path | None:
    """Where the importance matrix is to lie, if it is asked for and a type profits from it."""
    export = making.config.export
    if not export.importance_matrix or not set(export.gguf) & set(PROFITING):
        return None
    return making.workspace / "importance.gguf"


def make_adapter(making: Making) -> Path | None:
    """The adapter alone as GGUF; None where llama.cpp can't apply it, and nobody insists."""
    model, insists = making.model, making.config.export.adapter_gguf
    if model.adapter is None:
        return None
    target = making.result / GGUF / adapter_file_name(model.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_adapter(model.folder, model.adapter, target, trust_remote_code=making.trusted)
    except StageError as error:
        if insists:
            raise
        log.warning("There is no GGUF file of the adapter alone: %s", error.message)
        return None
    return target


def check_adapter(making: Making, gate: Gate, adapter: Path) -> None:
    """Check the adapter's file against the base model, and hand it on if it is asked for."""
    check = gate.check_adapter(adapter)
    if making.config.export.adapter_gguf is not False:
        hand_on(making, gate, adapter, check)


class Checked(NamedTuple):
    """A file that was written and checked."""

    kind: Quantization
    file: Path
    check: FileVerdict
    usable: bool
    """Whether it is asked for and lies with the good ones."""


def checked_files(making: Making, gate: Gate, importance: Path | None) -> Iterator[Checked]:
    """Write the files one after the other; each is checked and handed on before the next."""
    kinds = making.config.export.gguf
    files = write_files(
        making.model, making.result / GGUF, kinds, importance=importance, reporter=making.reporter
    )
    for kind, file in files:
        making.reporter.message(f"Checking {file.name}")
        check = gate.check(file, kind)
        if kind in kinds:
            hand_on(making, gate, file, check)
        yield Checked(kind, file, check, kind in kinds and not gate.rejects(check))


def hand_on(making: Making, gate: Gate, file: Path, check: FileVerdict) -> None:
    """Give a checked file its place: among the good ones, or apart."""
    folder = REJECTED if gate.rejects(check) else GGUF
    making.add(file, f"{folder}/{file.name}", check.quality)


def make_modelfile(making: Making, good: dict[Quantization, Path]) -> None:
    """Write the Modelfile for the files that may be used."""
    file = write_modelfile(
        making.result,
        good,
        making.tuned.tokenizer,
        making.config,
        parameters=sum(math.prod(info.shape) for info in making.tuned.weights.infos.values()),
        generation=generation_settings(making.model.folder, trust_remote_code=making.trusted),
    )
    making.add(file, file.name)
