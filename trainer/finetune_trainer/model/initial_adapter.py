"""The adapter that a training goes on from (spec.training.initFrom): finding, checking, fetching.

It is checked without its weights: the header of adapter_model.safetensors has their names and
shapes. Pickled weights are never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.contract import (
    Lora,
    Manifest,
    PreparedRunConfig,
    Reason,
    RunConfig,
    StageError,
    digest,
    display_name,
)
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INNER,
    AdapterOutline,
    adapted_modules,
    other_kind,
    outline_adapter,
)
from finetune_trainer.model.base_model import (
    INITIAL_ADAPTER,
    download_from_hub,
    is_hub,
    list_repository,
    read_hub_header,
)
from finetune_trainer.model.converter import Header, as_header, read_header
from finetune_trainer.store import Folder, open_folder, split

FIELD = "spec.training.initFrom"
LORA = "spec.training.lora"
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
PATTERNS = ("rank_pattern", "alpha_pattern")  # single layers that differ, which the spec can't say
IN_A_VERSION = "adapter"  # the adapter's folder in that of a version
MANIFEST = "manifest.json"  # in that of a version


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter's files at one revision."""

    source: str
    """The folder that they are in: a URI, or a Hub repository."""

    revision: str
    """A digest over what is in them."""

    folder: Folder | None = None
    """None on the Hub."""

    commit: str = ""
    """Of a Hub repository."""

    def config(self) -> dict[str, Any]:
        """adapter_config.json; StageError(ModelUnsupported) where it is none."""
        if self.folder is None:
            place = download_from_hub(INITIAL_ADAPTER, self.source, self.commit, [ADAPTER_CONFIG])
            data = (place / ADAPTER_CONFIG).read_bytes()
        else:
            data = self.folder.read(ADAPTER_CONFIG) or b""
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError) as error:
            raise self.unusable(f"its {ADAPTER_CONFIG} is no JSON object") from error

    def header(self) -> Header:
        """Names and shapes of its weights; StageError(ModelUnsupported) where there are none."""
        try:
            if self.folder is None:
                return as_header(read_hub_header(self.source, self.commit, ADAPTER_WEIGHTS))
            return as_header(read_header(self.folder, ADAPTER_WEIGHTS))
        except ValueError as error:
            raise self.unusable(f"its {ADAPTER_WEIGHTS} is no safetensors file") from error

    def fetch(self, target: Path) -> Path:
        """Bring both files to the folder `target`; returns the folder that they are in."""
        if self.folder is None:
            return download_from_hub(INITIAL_ADAPTER, self.source, self.commit, list(FILES))
        for name in FILES:
            self.folder.download(name, target / name)
        return target

    def unusable(self, cause: str) -> StageError:
        return StageError(
            Reason.MODEL_UNSUPPORTED,
            f"{FIELD}: no training can go on from the adapter in {self.source}: {cause}. Name one "
            "that this project or PEFT saved as plain LoRA, rsLoRA or DoRA.",
        )


def find(config: RunConfig) -> InitialAdapter | None:
    """The adapter that the spec names, if it names one; reads no weights.

    Raises StageError: ModelNotFound, ModelUnsupported (no safetensors), or the store's reasons.
    """
    wanted = config.training.init_from
    if wanted is None:
        return None
    if is_hub(wanted.source):
        listing = list_repository(INITIAL_ADAPTER, wanted.source, wanted.revision)
        marks = {name: listing.mark(name) for name in FILES if name in listing.sizes}
        _check_files(wanted.source, marks, listing.sizes)
        return InitialAdapter(wanted.source, _revision(marks), commit=listing.commit or "")
    source = wanted.source.rstrip("/")
    for place in (source, f"{source}/{IN_A_VERSION}"):
        folder = open_folder(place, config.storage)
        if folder.stat(ADAPTER_CONFIG) is None:
            continue
        found = {name: folder.stat(name) for name in FILES}
        marks = {name: info.etag for name, info in found.items() if info}
        _check_files(place, marks, [info.path for info in folder.list("adapter")])
        return InitialAdapter(place, _revision(marks), folder)
    raise _nothing_in(source)


def fetch_resolved(config: PreparedRunConfig, target: Path) -> Path | None:
    """Bring the adapter to disk that `prepare` saw, if the spec names one."""
    found, wanted = find(config), config.resolved.init_revision
    if found is None:
        return None
    if wanted not in (None, found.revision):
        raise StageError(
            Reason.MODEL_NOT_FOUND,
            f"{FIELD}: the adapter in {found.source} is not the one that `prepare` checked: "
            "somebody replaced it meanwhile. To start from the new one, ask for another look "
            "(finetune.dev/retry-requested-at).",
        )
    target.mkdir()
    return found.fetch(target)


def check(config: RunConfig, base: ModelFolder, model_revision: str) -> None:
    """Raise StageError where the training can't go on from the adapter that the spec names.

    ModelUnsupported: another kind than LoRA. InvalidConfig: it is of another base model, or other
    than what spec.training.lora asks for. `base` has the base model's configuration.
    """
    found = find(config)
    if found is None:
        return
    saved = found.config()
    patterns = ", ".join(name for name in PATTERNS if saved.get(name))
    if kind := other_kind(saved) or patterns:
        raise found.unusable(f"its {ADAPTER_CONFIG} sets {kind}")
    _check_base(config, found, saved, model_revision)
    _check_lora(config.training.lora, found, saved)
    _check_layers(found, found.header(), outline_adapter(base, config.training.lora))


def _check_lora(lora: Lora, found: InitialAdapter, saved: dict[str, Any]) -> None:
    expected = {
        "r": (saved.get("r"), lora.r),
        "alpha": (saved.get("lora_alpha"), lora.alpha),
        "useRslora": (bool(saved.get("use_rslora")), lora.use_rslora),
        "useDora": (bool(saved.get("use_dora")), lora.use_dora),
        "targetParameters": (
            sorted(saved.get("target_parameters") or ()),
            sorted(lora.target_parameters),
        ),
    }
    others = {name: pair for name, pair in expected.items() if pair[0] != pair[1]}
    if not others:
        return
    have = ", ".join(f"{name} {json.dumps(there)}" for name, (there, _) in others.items())
    want = ", ".join(f"{name} {json.dumps(here)}" for name, (_, here) in others.items())
    raise StageError(
        Reason.INVALID_CONFIG,
        f"{LORA}: the adapter in {found.source} ({FIELD}) has {have}, and the spec {want}. A "
        f"training goes on with the adapter's own: set {LORA} to them.",
    )


def _check_layers(found: InitialAdapter, header: Header, outline: AdapterOutline) -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in header.items()}
    ours = outline.tensors
    if theirs == ours:
        return
    whole = [sorted(name for name in each if ".lora_" not in name) for each in (theirs, ours)]
    if whole[0] != whole[1]:
        said = [", ".join(names) or "no module" for names in whole]
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{LORA}.modulesToSave: the adapter in {found.source} ({FIELD}) has {said[0]} as a "
            f"whole, and the spec's {said[1]}: name the same modules.",
        )
    there, here = (_kinds(adapted_modules(tensors)) for tensors in (theirs, ours))
    if there != here:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{LORA}.targetModules: the adapter in {found.source} ({FIELD}) adapts "
            f"{', '.join(there)}, and the spec {', '.join(here)}: set targetModules to "
            f"{json.dumps(there)}.",
        )
    name = min(each for each in {*theirs, *ours} if theirs.get(each) != ours.get(each))
    raise _other_base(found, f"its {name} has shape {theirs.get(name)} instead of {ours.get(name)}")


def _check_base(
    config: RunConfig, found: InitialAdapter, saved: dict[str, Any], model_revision: str
) -> None:
    """Take the version's own word for its base model's content, else compare names."""
    manifest = _manifest_of(found, config)
    if manifest and manifest.lineage.model_revision == model_revision:
        return
    named = manifest.lineage.model if manifest else saved.get("base_model_name_or_path")
    if isinstance(named, str) and _plain(named) == _plain(config.model.source):
        return
    raise _other_base(found, f"it was trained on {named}, and spec.model.source is another")


def _manifest_of(found: InitialAdapter, config: RunConfig) -> Manifest | None:
    """That of the version that the adapter is part of, where it is one of this project's."""
    parent, name = split(found.source)
    if found.folder is None or name != IN_A_VERSION:
        return None
    data = open_folder(parent, config.storage).read(MANIFEST)
    try:
        return Manifest.model_validate_json(data) if data else None
    except ValueError:
        return None


def _plain(source: str) -> str:
    return display_name(source).lower()


def _kinds(modules: Iterable[str]) -> list[str]:
    return sorted({name.replace(INNER, "").rpartition(".")[2] for name in modules})


def _revision(marks: dict[str, str]) -> str:
    return f"sha256:{digest(sorted(marks.items()))}"


def _check_files(source: str, marks: dict[str, str], names: Iterable[str]) -> None:
    if ADAPTER_CONFIG not in marks:
        raise _nothing_in(source)
    if ADAPTER_WEIGHTS not in marks:
        other = next((name for name in names if name.endswith((".bin", ".pt", ".pth"))), "none")
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"{FIELD}: {source} holds no {ADAPTER_WEIGHTS} (weights: {other}; pickled ones could "
            "run code and are not loaded): save the adapter again with PEFT's save_pretrained.",
        )


def _nothing_in(source: str) -> StageError:
    return StageError(
        Reason.MODEL_NOT_FOUND,
        f"{FIELD}.source: there is no {ADAPTER_CONFIG} in {source}. Name the folder of an adapter, "
        "or of a version (…/versions/<version>).",
    )


def _other_base(found: InitialAdapter, cause: str) -> StageError:
    return StageError(
        Reason.INVALID_CONFIG,
        f"{FIELD}: the adapter in {found.source} is of another base model: {cause}. Set "
        "spec.model.source to its base, or name an adapter of this one. If it is the same model "
        f"under another name, correct base_model_name_or_path in the adapter's {ADAPTER_CONFIG}.",
    )
