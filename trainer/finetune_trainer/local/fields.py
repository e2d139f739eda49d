"""`--set path=value`: which fields there are, how the contract's types read a value; and messages
in words of flags.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

_OF_A_CLUSTER = (
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
        r"name a Secret with (?:AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) in [\w.]+, or use "
        r"workload identity \(spec\.serviceAccountName\)",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (r"the keys in the Secret of [\w.]+", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    (r"set (spec\.)?stages\.\w+\.resources\.limits\.memory to at least (\w+)", r"free \2 at least"),
    (r"[Rr]aise the (memory limit of the stage's pod|pod's memory limit)", "close other programs"),
)
"""What messages say of a cluster, and what it is on one machine."""

_FIELD = re.compile(r"(?<![\w./-])(?:spec\.)?([a-z]\w*(?:\.[a-z]\w*)+)")


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

    def parse(self, text: str) -> Any:
        """The first reading of `text` that the field's type takes; StageError if it takes none."""
        problems: list[str] = []
        for value in self._readings(text):
            problems = self._problems(value)
            if not problems:
                return value
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{self.path}: {' or: '.join(problems)} (got {text[:60]}). {self.description}",
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
    """Put each `path=value` into `fields`, which has the shape of run.json; raises StageError."""
    known = settable_fields(parts)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"--set {setting}: write path=value, e.g. training.packing=false. {LISTING}",
            )
        keys = [to_camel(key) for key in path.split(".")]
        field = known.get(".".join(keys))
        if field is None:
            (nearest,) = difflib.get_close_matches(path, known, n=1, cutoff=0)
            raise StageError(
                Reason.INVALID_CONFIG,
                f"--set {setting}: there is no field {path} to set here; the nearest is {nearest}. "
                f"{LISTING}",
            )
        place = fields
        for key in keys[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[keys[-1]] = field.parse(text)
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


def in_local_words(message: str) -> str:
    """A message of a stage as somebody without a cluster reads it: flags in place of fields of a
    FineTuneJob, environment variables in place of Secrets."""
    for pattern, words in _OF_A_CLUSTER:
        message = re.sub(pattern, words, message)
    others = list[str]()

    def local(match: re.Match[str]) -> str:
        path = match[1]
        if flag := FLAGS.get(path):
            return flag
        if path in settable_fields() and match[0].startswith("spec."):
            others.append(path)
        return path

    message = _FIELD.sub(local, message)
    if others and "--set" not in message:
        message += f" (--set {others[0]}=… sets that field)"
    return message
