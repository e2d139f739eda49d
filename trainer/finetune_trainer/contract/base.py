"""What all types have in common, and how one that another version wrote is read.

Operator, CRD and trainer image are upgraded at different moments. So whoever reads leaves out what
it can't understand, and says so; whoever writes stays strict, since the types themselves are.

Credentials are blacked out in whatever leaves a process: its log, its result, its progress.
"""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

GROUP, VERSION, PLURAL = "finetune.dev", "v1alpha1", "finetunejobs"  # the API's address


class Base(BaseModel):
    """A frozen value with camelCase keys that refuses what it does not know."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def cel(rule: str, message: str, *more: tuple[str, str]) -> dict[str, Any]:
    """Rules that the API server evaluates (CEL), each with the message that a person reads."""
    rules = [{"rule": rule, "message": text} for rule, text in ((rule, message), *more)]
    return {"x-kubernetes-validations": rules}


_DURATION = re.compile(r"(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,5})s)?")


def parse_duration(text: str) -> timedelta:
    """A duration as Go and Kubernetes write it, e.g. 6h, 1h30m or 90s. Raises ValueError."""
    found = _DURATION.fullmatch(text) if text else None
    if found is None:
        raise ValueError(f"{text!r} is no duration such as 6h, 1h30m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


LOCATION_RULE = cel(
    "self.startsWith('s3://') || self.startsWith('/')",
    "must be an s3://bucket/key URI or the absolute path of a mounted folder",
)
Location = Annotated[str, Field(min_length=2, max_length=1024)]


class Stage(StrEnum):
    """The three steps of a run, in order; each is a subcommand of ``finetune-trainer``."""

    PREPARE = "prepare"
    TRAIN = "train"
    EXPORT = "export"


def describe(error: ValidationError, prefix: str = "") -> str:
    """Say per field what is wrong, e.g. ``spec.training.epochs: must be …``, in one line."""
    lines = []
    for item in error.errors(include_url=False):
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] == "missing" else f" (got {redact(repr(item['input'])):.60})"
        lines.append(f"{prefix}{_words(item['loc'])}: {message}{given}")
    return "; ".join(dict.fromkeys(lines))


UNKNOWN_FIELD = "extra_forbidden"  # pydantic's type of that error
Path = tuple[str | int, ...]
T = TypeVar("T", bound=Base)


@dataclass(frozen=True)
class Tolerated(Generic[T]):
    """What could be read, and what was left out of it."""

    value: T
    unknown: tuple[str, ...] = ()
    """Paths of the fields that this version doesn't know, e.g. training.newField."""

    unreadable: tuple[str, ...] = ()
    """Paths of values that this version can't understand, e.g. a phase that came later."""


def read_known(kind: type[T], data: Any) -> Tolerated[T]:
    """Read the fields that are known. Raises ValidationError where the value of one is wrong."""
    return _read(kind, data, {UNKNOWN_FIELD})


def read_readable(kind: type[T], data: Any) -> Tolerated[T] | None:
    """Read what can be understood; None where something is missing without which it is nothing.

    Of a list, the items that can't be understood are left out.
    """
    try:
        return _read(kind, data, None)
    except ValidationError:
        return None


def _read(kind: type[T], data: Any, tolerated: set[str] | None) -> Tolerated[T]:
    """Read without the parts at fault; `tolerated` are the types of error, None for all."""
    unknown: dict[str, None] = {}
    unreadable: dict[str, None] = {}
    rest = data
    while True:
        try:
            value = kind.model_validate(rest)
        except ValidationError as error:
            faults = {
                _existing(rest, item["loc"]): item["type"]
                for item in error.errors(include_url=False, include_context=False)
                if tolerated is None or item["type"] in tolerated
            }
            if not faults or () in faults:
                raise
            for path, fault in faults.items():
                (unknown if fault == UNKNOWN_FIELD else unreadable)[_words(path)] = None
            rest = _without(rest, faults)
        else:
            return Tolerated(value, tuple(unknown), tuple(unreadable))


def _existing(data: Any, location: Path) -> Path:
    """The part of an error's location that is there: not a missing field, nor a union's member."""
    found: list[str | int] = []
    for part in location:
        inside = isinstance(data, dict) and part in data
        if inside or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            found.append(part)
            data = data[part]
    return tuple(found)


def _without(data: Any, paths: dict[Path, str]) -> Any:
    rest = copy.deepcopy(data)
    # The last items of a list first, since the others move up. A path below one that goes as well
    # comes before it.
    for path in sorted(paths, reverse=True):
        parent = rest
        for part in path[:-1]:
            parent = parent[part]
        del parent[path[-1]]
    return rest


def _words(path: Path) -> str:
    return ".".join(to_camel(part) if isinstance(part, str) else str(part) for part in path)


BLACK = "***"
_SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIALS?$|TOKEN$|_KEY$", re.IGNORECASE
)
_SECRET_LENGTH = 8  # characters; anything shorter would black out ordinary words
_USER_IN_URL = re.compile(r"""(?<=://)[^\s/"'?#]+(?=@)""")


def redact(text: str) -> str:
    """Black out the values of credentials in the environment, and of users in URLs."""
    for value in sorted(_secrets(), key=len, reverse=True):
        # As it is, and as JSON writes it.
        text = text.replace(value, BLACK).replace(json.dumps(value)[1:-1], BLACK)
    return _USER_IN_URL.sub(BLACK, text)


def names_secret(variable: str) -> bool:
    """Whether an environment variable holds a credential, by its name."""
    return _SECRET_NAME.search(variable) is not None


def names_user(url: str) -> bool:
    """Whether there is a user or password in a URL."""
    return _USER_IN_URL.search(url) is not None


def _secrets() -> set[str]:
    """Values of the environment that may not be shown; of a PEM file each line as well."""
    values = [value for name, value in os.environ.items() if names_secret(name)]
    lines = [line.strip() for value in values for line in value.splitlines()]
    return {each for each in (*values, *lines) if len(each) >= _SECRET_LENGTH}
