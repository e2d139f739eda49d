"""Which stages each field of the spec reruns: measured on the fingerprints, written as a table.

`python -m hack.stage_table FOLDER` writes it into docs/architecture.md below that folder.
Each field gets another value, everything else staying as it is, in several cases.
"""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_trainer.contract import (
    ExampleContents,
    JobReference,
    Stage,
    later_fingerprints,
    prepare_fingerprint,
)

BEGIN, END = "<!-- written by `make generate` -->", "<!-- until here -->"
YES, NO = "yes", "no"
NOTHING = "These rerun nothing, nor does what is below them:"
POD_SETTINGS = "stages"
"""Its many fields are one row: they are about pods alone."""
REFERENCE = ("ecretRef", "onfigMapRef", "aBundle")
"""How fields that name a Secret or a ConfigMap end. Each of them is one row as well."""

Spec = dict[str, Any]
LEAST: Spec = {
    "model": {"source": "org/name"},
    "dataset": {"source": "s3://data/rows.csv"},
    "output": {"uri": "s3://models/name"},
}


@dataclass(frozen=True)
class Case:
    """Circumstances in which a field may count although it usually doesn't, or the other way."""

    spec: Spec
    cut: bool = False
    longest: int = 0


USUAL = Case({})
CASES = {
    "where rows are cut": Case({}, cut=True),
    "where examples are longer": Case({}, longest=1 << 30),
    "with `earlyStopping`": Case({"training": {"earlyStopping": {}}}),
    "with `minSequenceLength`": Case({"training": {"minSequenceLength": 16}}, longest=1 << 30),
    "with `objective` dpo": Case({"training": {"objective": "dpo"}}),
    "with `objective` kto": Case({"training": {"objective": "kto"}}),
    "with `evalSource`": Case({"dataset": {"evalSource": "s3://data/held-out.csv"}}),
}
INDIRECT = {
    "model": "where its files differ",
    "dataset": "where the examples differ",
}
"""What a field brings about without being part of a later stage's fingerprint itself."""

VALUES: tuple[Any, ...] = (
    *(True, False, 1, 3, 17, 64, 1024, 0.25, 0.01, "20%", "100%"),
    *("other", "s3://other/place", "/other/place", "org/other", "https://other", "24Gi", "6h"),
    "0123456789ab",
    *(";", "latin-1", "0.5", {"name": "other"}, {"name": "other", "key": "other"}),
    {"secretRef": {"name": "other"}},
    ["other"],
    ["merged"],
    [{"quantization": "Q8_0", "maxKLDivergence": 1}],
    {"train": {"nodeSelector": {"disk": "fast"}}},
)
"""Those that a field's type takes are tried, and the members of enumerations."""

BESIDE: dict[str, Spec] = {"targetParameters": {"dropout": 0}}
"""What has to stand beside a field."""


@dataclass(frozen=True)
class SpecField:
    """A field of spec, e.g. training.lora.r."""

    path: str
    owner: type[BaseModel]
    info: FieldInfo

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    def values(self) -> list[Any]:
        """Values that its type takes."""
        least = map(least_of, _models(self.info.annotation))
        tried = (*_members(self.info.annotation), *VALUES, *least)
        return [value for value in tried if self._takes(value)]

    def _takes(self, value: Any) -> bool:
        try:
            self.owner.model_validate({self.key: value, **BESIDE.get(self.key, {})})
        except ValidationError as error:
            return not any(
                item["loc"][:1] == (self.key,) or not item["loc"]
                for item in error.errors(include_url=False)
            )
        return True


def spec_fields(model: type[BaseModel] = FineTuneJobSpec, prefix: str = "") -> Iterator[SpecField]:
    """All fields that have no fields below them, and parts that may be left out as a whole."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        whole = path == POD_SETTINGS or path.endswith(REFERENCE)
        below = [] if whole else _models(info.annotation)
        if not below or type(None) in get_args(info.annotation):
            yield SpecField(path, model, info)
        for kind in below:
            yield from spec_fields(kind, f"{path}.")


def least_of(model: type[BaseModel]) -> Spec:
    """What a part that is left out by default needs, so that a field below it can be changed."""
    needed = {}
    for name, info in model.model_fields.items():
        if info.is_required():
            key = info.alias or name
            needed[key] = SpecField(key, model, info).values()[-1]
    return needed


def reruns(field: SpecField, value: Any, case: Case) -> set[Stage] | None:
    """The stages that run again when the field gets this value; None where it had it, or where the
    spec is refused."""
    before = _merged(LEAST, case.spec)
    _make_room(before, field.path)
    after = deepcopy(before)
    _put(after, field.path, value)
    try:
        old, new = FineTuneJobSpec.model_validate(before), FineTuneJobSpec.model_validate(after)
    except ValidationError:
        return None
    if old == new:
        return None
    was, now = _fingerprints(old, case), _fingerprints(new, case)
    return {stage for stage in Stage if was[stage] != now[stage]}


def measure(field: SpecField, case: Case) -> list[set[Stage]]:
    """The stages that run again, for each other value that the field takes."""
    found = [reruns(field, value, case) for value in field.values()]
    return [stages for stages in found if stages is not None]


def row(field: SpecField) -> dict[Stage, str]:
    """What a change of the field does to each stage, in words."""
    if not (usual := measure(field, USUAL)):
        raise ValueError(f"spec.{field.path}: add a value that it takes to VALUES")
    cases = {words: found for words, case in CASES.items() if (found := measure(field, case))}
    unions = {words: set().union(*found) for words, found in cases.items()}
    return {stage: _words(field, stage, set().union(*usual), unions) for stage in Stage}


def table() -> str:
    """Rows of Markdown for all fields; those that rerun nothing are named below."""
    lines = ["| field of `spec` | `prepare` | `train` | `export` |", "| --- | --- | --- | --- |"]
    rows = {field.path: row(field) for field in spec_fields()}
    counting = [path for path, cells in rows.items() if set(cells.values()) != {NO}]
    for path in counting:
        lines.append(f"| `{path}` | {' | '.join(rows[path][stage] for stage in Stage)} |")
    others = {_shortest(path, counting): None for path in rows if path not in counting}
    named = textwrap.fill(", ".join(f"`{path}`" for path in others), 100, break_on_hyphens=False)
    return "\n".join([*lines, "", f"{NOTHING}", "", f"{named}."])


def write_into(page: Path, text: str | None = None) -> None:
    """Put the table, or another text, where the page has room for it."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text or table()}\n\n{END}{after}", encoding="utf-8")


def _shortest(path: str, counting: list[str]) -> str:
    """The first part of a path below which nothing counts."""
    for part in itertools.accumulate(path.split("."), "{}.{}".format):
        if not any(f"{each}.".startswith(f"{part}.") for each in counting):
            return part
    return path


def _words(field: SpecField, stage: Stage, usual: set[Stage], cases: dict[str, set[Stage]]) -> str:
    if stage in usual:
        never = [words for words, stages in cases.items() if stage not in stages]
        return f"yes, but not {never[0]}" if never else YES
    if some := [words for words, stages in cases.items() if stage in stages]:
        return some[0]
    if field.path.startswith("training.initFrom.") and stage is not Stage.PREPARE:
        return INDIRECT["model"]
    part = field.path.partition(".")[0]
    resolved = field.path == "model.revision"  # a branch stands for the files that it leads to
    if part in INDIRECT and (resolved or Stage.PREPARE in usual):
        return INDIRECT[part]
    return NO


def _fingerprints(spec: FineTuneJobSpec, case: Case) -> dict[Stage, str]:
    config = spec.run_config(JobReference(name="a", namespace="b"), None)
    contents = ExampleContents("examples", "held out", cut=case.cut, longest=case.longest)
    prepare = prepare_fingerprint(config, "etag", "revision", "etag")
    initial = "revision" if config.training.init_from else None
    prints = later_fingerprints(config, prepare, contents, "revision", initial)
    return {stage: getattr(prints, stage) for stage in Stage}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models of an annotation that is one, or a union with one; not those in a list."""
    kinds = get_args(annotation) if get_origin(annotation) not in (None, tuple) else (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _members(annotation: Any) -> list[Any]:
    """Members of the enumerations in an annotation, one by one in lists as well."""
    if isinstance(annotation, type):
        if issubclass(annotation, StrEnum):
            return [member.value for member in annotation]
        return [{}] if issubclass(annotation, BaseModel) else []
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    found = list(itertools.chain.from_iterable(map(_members, get_args(annotation))))
    return [*found, *([member] for member in found)]


def _merged(spec: Spec, other: Spec) -> Spec:
    found = deepcopy(spec)
    for part, fields in other.items():
        found[part] = {**found.get(part, {}), **deepcopy(fields)}
    return found


def _make_room(spec: Spec, path: str) -> None:
    """Fill in the parts that a field is below."""
    model: type[BaseModel] = FineTuneJobSpec
    for key in path.split(".")[:-1]:
        fields = {info.alias or name: info for name, info in model.model_fields.items()}
        (model,) = _models(fields[key].annotation)
        spec = spec.setdefault(key, least_of(model))
    spec.update(BESIDE.get(path.rpartition(".")[2], {}))


def _put(spec: Spec, path: str, value: Any) -> None:
    *parents, key = path.split(".")
    for parent in parents:
        spec = spec[parent]
    spec[key] = value


if __name__ == "__main__":
    write_into(Path(sys.argv[1]) / "docs" / "architecture.md")
