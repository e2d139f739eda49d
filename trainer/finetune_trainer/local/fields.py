"""`--set path=value`: which fields there are, how the contract's types read a value; and messages
in words of flags.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from finetune_trainer.contract import Reason, RunConfig, StageError

# `local` itself fills in the other parts of run.json.
PARTS = ("model", "dataset", "training", "export", "storage", "hardware")
LISTING = "`finetune-trainer local fields` lists all fields."

FLAGS = {
    "dataset.source": "--dataset",
    "dataset.evalSource": "--eval-dataset",
    "model.source": "--base-model",
    "training.method": "--method",
    "training.objective": "--objective",
    "training.epochs": "--epochs",
    "training.learningRate": "--learning-rate",
    "training.batchSize": "--batch-size",
    "training.maxSequenceLength": "--max-sequence-length",
    "export.gguf": "--gguf",
}
"""Fields that have a flag of their own."""

_FIELDS = {flag: path for path, flag in FLAGS.items()}

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_OF_A_CLUSTER = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for pattern, words in (
        (
            r"name a Secret with that account's token in spec\.model\.tokenSecretRef",
            "set HF_TOKEN to a token of that account",
        ),
        (
            r"name a Secret with a token that may read it in spec\.model\.tokenSecretRef",
            "set HF_TOKEN to a token that may read it",
        ),
        (r"the token in the Secret of spec\.model\.tokenSecretRef", "HF_TOKEN"),
        (
            rf"name a Secret with {_KEYS} in [\w.]+, or use workload identity "
            r"\(spec\.serviceAccountName\)",
            f"set {_KEYS}",
        ),
        (r"the keys in the Secret of [\w.]+\w", _KEYS),
        (r"the Secret of [\w.]+ has", "the environment has"),
        (
            r"the ServiceAccount of spec\.serviceAccountName, .* or name a Secret with keys in "
            r"[\w.]+\w",
            f"your AWS profile, or set {_KEYS}",
        ),
        (r"spec\.serviceAccountName's identity \(.*?\)", "the account of your AWS profile"),
        (r"check that the ConfigMap or Secret exists and has the key", "check the file's name"),
        (
            r"set (?:spec\.)?stages\.\w+\.resources\.limits\.memory to (?:at least )?(\w+)",
            r"free \1 at least",
        ),
        (
            r"set stages\.\S+\.resources\.limits\.ephemeral-storage(?: \(or the volume\))? to",
            "free",
        ),
        (r"give the \w+'s pod more ephemeral storage", "free some disk"),
        (
            r"raise the (?:memory limit of the stage's pod|pod's memory limit)",
            "close other programs",
        ),
        (r"a memory limit of (\w+)", r"\1 of free memory"),
        (r"give the export's pod more memory", "close other programs"),
        (
            r"set spec\.stages\.train\.runtimeClassName to the node's class for NVIDIA GPUs "
            r"\(usually nvidia\)(?:, or make that the node's default runtime)?",
            "start the container with its GPUs (docker run --gpus all)",
        ),
        (r"leave it out of spec\.stages\.train\.env", "unset it"),
        (r"(?: from a Secret)? in stages\.\w+\.env", ""),
        (r"look at the node's device plugin, or ask", "ask"),
        (r"use an intact trainer image", "install torch anew"),
        (r"use an? (?:trainer )?image (?:built )?with", "install"),
        (r"or an image with", "or install"),
        (r"build the trainer's image with", "install llama-cpp-python with"),
        (r"this (?:trainer )?image", "this installation"),
        (r"or a node with", "or take a machine with"),
        (r"(?:the \w+'s|this|the) pod\b|the node\b", "this machine"),
        (r"( (?:in|at) /\S+): upload", r"\1: put"),  # a folder, and not a bucket
    )
)
"""What messages say of a cluster, and what it is on one machine."""

# Not of `--set training.epochs`, which somebody wrote so.
_FIELD = re.compile(
    r"(?<![\w./-])(?<!--set )(?:spec\.)?([a-z]\w*(?:\.[a-z]\w*)+)|\bspec\.(?=[a-z])"
)


@dataclass(frozen=True)
class SettableField:
    """A field of run.json, e.g. training.lora.r."""

    path: str
    owner: type[BaseModel]
    info: FieldInfo

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def description(self) -> str:
        return " ".join((self.info.description or "").split())

    @property
    def default(self) -> str:
        """As `--set` takes it; empty where there is none."""
        value = self.info.get_default()
        if value is None or self.info.is_required() or isinstance(value, BaseModel):
            return ""
        if isinstance(value, bool):
            return json.dumps(value)
        return ",".join(value) if isinstance(value, tuple) else str(value)

    def parse(self, text: str, given_as: str) -> Any:
        """The first reading of `text` that the field's type takes; StageError if it takes none,
        which names the field as it was given."""
        problems: list[str] = []
        for value in self._readings(text):
            problems = self._problems(value)
            if not problems:
                return value
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{given_as}: {' or: '.join(problems)} (got {text[:60]}). {self.description}",
        )

    def _readings(self, text: str) -> list[Any]:
        """JSON, else plain text; for a list, values between commas."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            if any(get_origin(kind) is tuple for kind in _alternatives(self.info)):
                return [[part for part in text.split(",") if part]]
            return [text]
        # A name or revision may look like a number.
        return [value] if isinstance(value, dict | list) else [value, text]

    def _problems(self, value: Any) -> list[str]:
        try:
            self.owner.model_validate({self.key: value})
        except ValidationError as error:
            # Other fields of the owner may be missing here.
            own = [e for e in error.errors(include_url=False) if e["loc"][:1] == (self.key,)]
            return list(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in own))
        return []


def settable_fields(parts: Sequence[str] = PARTS) -> dict[str, SettableField]:
    """All fields of these parts of run.json, by path."""
    return {
        field.path: field
        for part in parts
        for kind in _alternatives(RunConfig.model_fields[part])
        if issubclass(kind, BaseModel)
        for field in _fields_of(kind, f"{part}.")
    }


def apply_settings(
    fields: dict[str, Any], settings: Sequence[str], parts: Sequence[str] = PARTS
) -> dict[str, Any]:
    """Put each `path=value`, or `--flag=value`, into `fields`, which has the shape of run.json;
    raises StageError."""
    known = settable_fields(parts)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"--set {setting}: write path=value, e.g. training.packing=false. {LISTING}",
            )
        given_as = path if path in _FIELDS else f"--set {path}"
        path = _FIELDS.get(path, path)
        keys = [to_camel(key) for key in path.split(".")]
        field = known.get(".".join(keys))
        if field is None:
            (nearest,) = difflib.get_close_matches(path, known, n=1, cutoff=0)
            raise StageError(
                Reason.INVALID_CONFIG,
                f"--set {setting}: there is no such field to set here; the nearest is "
                f"--set {nearest}. {LISTING}",
            )
        place = fields
        for key in keys[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[keys[-1]] = field.parse(text, given_as)
    return fields


def _fields_of(model: type[BaseModel], prefix: str) -> Iterator[SettableField]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        yield SettableField(path, model, info)
        for kind in _alternatives(info):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields_of(kind, f"{path}.")


def _alternatives(info: FieldInfo) -> tuple[Any, ...]:
    """The types of a union; else the one type that there is."""
    annotation = info.annotation
    return (annotation,) if get_origin(annotation) in (None, tuple) else get_args(annotation)


def without_cluster(message: str) -> str:
    """A message of a stage with this machine, its programs and environment variables in place of
    pods, images and Secrets."""
    for pattern, words in _OF_A_CLUSTER:
        message = pattern.sub(partial(_in_place, words), message)
    return message


def _in_place(words: str, match: re.Match[str]) -> str:
    """`words`, with a capital where one was."""
    found = match.expand(words)
    return found[:1].upper() + found[1:] if match[0][0].isupper() else found


def in_local_words(message: str) -> str:
    """The same with flags in place of fields of a FineTuneJob."""
    message = without_cluster(message)
    others = list[str]()

    def local(match: re.Match[str]) -> str:
        path = match[1].removeprefix("spec.")
        if flag := FLAGS.get(path):
            return flag
        if path in settable_fields() and match[0].startswith("spec."):
            others.append(path)
        return path

    message = _FIELD.sub(local, message)
    if others and "--set" not in message:
        message += f" (--set {others[0]}=… sets that field)"
    return message
