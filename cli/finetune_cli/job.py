"""A FineTuneJob as the API server has it. Fields that are absent read as nothing, so that a job of
another version of the operator can be shown as well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_cli.exits import CliError, ExitCode

JsonObject = dict[str, Any]

SUCCEEDED, FAILED, SUSPENDED = "Succeeded", "Failed", "Suspended"
STAGES = ("prepare", "train", "export")
GITOPS = {"argocd": "Argo CD", "kustomize-controller": "Flux", "helm-controller": "Flux"}


@dataclass(frozen=True)
class Job:
    """One FineTuneJob."""

    raw: JsonObject

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.raw["metadata"].get("namespace") or "")

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"]["uid"])

    @property
    def created(self) -> str | None:
        found: str | None = self.raw["metadata"].get("creationTimestamp")
        return found

    @property
    def spec(self) -> JsonObject:
        return self.raw.get("spec") or {}

    @property
    def status(self) -> JsonObject:
        return self.raw.get("status") or {}

    @property
    def progress(self) -> JsonObject:
        return self.status.get("progress") or {}

    @property
    def phase(self) -> str:
        return str(self.status.get("phase") or "Pending")

    @property
    def stages(self) -> dict[str, JsonObject]:
        """What status says of each stage."""
        return {str(each.get("name")): each for each in self.status.get("stages") or ()}

    @property
    def versions(self) -> list[JsonObject]:
        return list(self.status.get("versions") or ())

    @property
    def artifacts(self) -> list[JsonObject]:
        return list(self.status.get("artifacts") or ())

    @property
    def seen(self) -> bool:
        """Whether an operator has looked at the present spec."""
        generation = self.raw["metadata"].get("generation")
        return bool(self.status.get("observedGeneration") == generation)

    @property
    def settled(self) -> bool:
        """Whether nothing more happens by itself: it succeeded, failed or is suspended, by the
        present spec and the last request to try again."""
        from finetune_operator.api import RETRY_ANNOTATION

        asked = (self.raw["metadata"].get("annotations") or {}).get(RETRY_ANNOTATION)
        if self.phase == SUSPENDED:
            return self.seen
        waits = bool(asked) and self.status.get("lastHandledRetryAt") != asked
        return self.seen and not waits and self.phase in (SUCCEEDED, FAILED)

    @property
    def exit_code(self) -> ExitCode:
        """How a command that waited for it ends."""
        if self.phase == SUSPENDED:
            return ExitCode.SUSPENDED
        return ExitCode.OK if self.phase == SUCCEEDED else ExitCode.FAILED

    def condition(self, kind: str) -> JsonObject:
        """A condition, or nothing."""
        found = (each for each in self.status.get("conditions") or () if each.get("type") == kind)
        return next(found, {})

    @property
    def message(self) -> str:
        """What a person should read first: what is wrong, else what goes on."""
        if self.condition("Degraded").get("status") == "True":
            return str(self.condition("Degraded").get("message") or "")
        kind = "Progressing" if self.condition("Progressing").get("status") == "True" else "Ready"
        return str(self.condition(kind).get("message") or "")

    @property
    def gitops(self) -> str | None:
        """The tool that keeps its spec as it is in Git, where one does."""
        for entry in self.raw["metadata"].get("managedFields") or ():
            for manager, tool in GITOPS.items():
                if str(entry.get("manager", "")).startswith(manager) and _has_spec(entry):
                    return tool
        return None

    @property
    def tidy(self) -> JsonObject:
        """The object without the bookkeeping of server-side apply."""
        meta = {key: each for key, each in self.raw["metadata"].items() if key != "managedFields"}
        return {**self.raw, "metadata": meta}

    def version(self, name: str) -> JsonObject:
        """A version of its history; raises CliError where it has none of that name."""
        for each in self.versions:
            if each.get("version") == name:
                return each
        raise CliError(
            ExitCode.NOT_FOUND,
            f"{self.name} has no version {name}: it has {listed(self.versions)}.",
        )


def _has_spec(entry: JsonObject) -> bool:
    return "f:spec" in (entry.get("fieldsV1") or {})


def listed(versions: Iterable[JsonObject]) -> str:
    """Versions in words, with their states."""
    return ", ".join(f"{each['version']} ({each.get('state')})" for each in versions) or "none yet"
