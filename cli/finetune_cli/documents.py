"""FineTuneJobs in YAML files: read, and checked by the same types as the API, with line numbers."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli.exits import CliError, ExitCode

if TYPE_CHECKING:
    from finetune_operator.api.finetunejob import FineTuneJobSpec

JsonObject = dict[str, Any]
Lines = dict[tuple[str | int, ...], int]

STDIN = "-"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
# Words by which pydantic names a member of a union, which is no part of a field's path.
_SHOWN = 60


@dataclass(frozen=True)
class Document:
    """One object of a file."""

    source: str
    body: Any
    lines: Lines
    """Line of each field, by its path."""

    @property
    def is_job(self) -> bool:
        from finetune_operator.api import KIND

        return isinstance(self.body, dict) and self.body.get("kind") == KIND

    @property
    def name(self) -> str:
        meta = self.body.get("metadata") if isinstance(self.body, dict) else None
        return str(meta.get("name") or "") if isinstance(meta, dict) else ""

    def place(self, path: Sequence[str | int] = ()) -> str:
        """File and line of a field, or of what of it is there."""
        known = tuple(path)
        while known and known not in self.lines:
            known = known[:-1]
        return f"{self.source}:{self.lines.get(known, 1)}"

    def problems(self) -> list[str]:
        """What is wrong with it, each with file, line, field and what was given."""
        from pydantic import ValidationError

        found = self._problems_of_head()
        spec = self.body.get("spec")
        if not isinstance(spec, dict):
            return [*found, f"{self.place()}: spec: is missing: say what model, data and output."]
        try:
            self.spec()
        except ValidationError as error:
            found += self._described(error)
        return found

    def spec(self) -> FineTuneJobSpec:
        """Its spec as the API's type; raises pydantic's ValidationError."""
        from finetune_operator.api.finetunejob import FineTuneJobSpec

        return FineTuneJobSpec.model_validate(self.body.get("spec"))

    def _problems_of_head(self) -> list[str]:
        from finetune_operator.api import API_VERSION

        found = []
        if self.body.get("apiVersion") != API_VERSION:
            found.append(f"{self.place(['apiVersion'])}: apiVersion: must be {API_VERSION}")
        if not _NAME.fullmatch(self.name):
            told = f" (got {self.name!r})" if self.name else ""
            where = self.place(["metadata", "name"])
            found.append(
                f"{where}: metadata.name: must be lower-case letters, digits, '-' and '.'{told}"
            )
        known = {"apiVersion", "kind", "metadata", "spec", "status"}
        for key in self.body.keys() - known:
            found.append(f"{self.place([key])}: {key}: there is no such field")
        return found

    def _described(self, error: Any) -> Iterator[str]:
        from finetune_trainer.contract.base import redact

        told: dict[str, None] = {}
        for item in error.errors(include_url=False):
            path = self._existing(item["loc"])
            field = ".".join(str(part) for part in path)
            message = item["msg"].removeprefix("Value error, ")
            given = f" (got {redact(repr(item['input'])):.{_SHOWN}})"
            if item["type"] == "missing":
                field, message, given = f"{field}.{item['loc'][-1]}", "is missing", ""
            elif item["type"] == "extra_forbidden":
                message, given = self._unknown(item["loc"]), ""
            told[f"{self.place(path)}: {field}: {message}{given}"] = None
        return iter(told)

    def _existing(self, location: Sequence[str | int]) -> tuple[str | int, ...]:
        """The part of an error's location that is in the document, spec included."""
        found: list[str | int] = ["spec"]
        data = self.body["spec"]
        for part in location:
            inside = isinstance(data, dict) and part in data
            if inside or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
                found.append(part)
                data = data[part]
        return tuple(found)

    def _unknown(self, location: Sequence[str | int]) -> str:
        """Name the field that was probably meant."""
        import difflib

        from finetune_operator.api.finetunejob import FineTuneJobSpec

        known = _fields_at(FineTuneJobSpec, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"there is no such field{f'; did you mean {near[0]}?' if near else ''}"


def _fields_at(kind: Any, path: Sequence[str | int]) -> list[str]:
    """The fields of the type at a path below another one."""
    from typing import get_args

    for part in path:
        info = next((i for n, i in kind.model_fields.items() if part in (n, i.alias)), None)
        if info is None:
            continue  # an index, or the name of a union's member
        kinds = [info.annotation, *get_args(info.annotation)]
        kind = next((each for each in kinds if hasattr(each, "model_fields")), kind)
    return [info.alias or name for name, info in kind.model_fields.items()]


def read_jobs(files: Sequence[Path]) -> list[Document]:
    """The FineTuneJobs of all files; raises CliError where there is none, or no YAML."""
    documents = [each for file in files for each in _read(file)]
    jobs = [each for each in documents if each.is_job]
    if not jobs:
        kinds = [str(each.body.get("kind")) for each in documents if isinstance(each.body, dict)]
        told = f" (found {', '.join(kinds)})" if kinds else ""
        names = ", ".join(map(str, files))
        raise CliError(ExitCode.USAGE, f"no FineTuneJob in {names}{told}.")
    return jobs


def check_namespaces(jobs: Sequence[Document], named: str | None) -> None:
    """Raise CliError where a job names another namespace than the command."""
    for each in jobs:
        meta = each.body.get("metadata")
        own = meta.get("namespace") if isinstance(meta, dict) else None
        if named and own and own != named:
            raise CliError(
                ExitCode.USAGE,
                f"{each.place(['metadata', 'namespace'])}: metadata.namespace is {own}, and -n "
                f"names {named}: leave one of them out.",
            )


def _read(file: Path) -> list[Document]:
    import yaml

    source = "standard input" if str(file) == STDIN else str(file)
    try:
        text = sys.stdin.read() if str(file) == STDIN else file.read_text(encoding="utf-8")
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        bodies = list(yaml.safe_load_all(text))
    except FileNotFoundError as error:
        raise CliError(ExitCode.NOT_FOUND, f"there is no file {file}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(ExitCode.USAGE, f"{source} can't be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise CliError(ExitCode.USAGE, f"{source}{line}: this is no YAML: {problem}.") from error
    found = []
    for node, body in zip(nodes, bodies, strict=True):
        if node is not None:
            found.append(Document(source, body, dict(_lines(node, ()))))
    return found


def _lines(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """The line of each field, counted from 1."""
    import yaml

    if not path:
        yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            yield below, key.start_mark.line + 1
            yield from _lines(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*path, index)
            yield below, value.start_mark.line + 1
            yield from _lines(value, below)
