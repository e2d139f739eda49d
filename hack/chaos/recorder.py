"""Sees every change of Jobs, pods and FineTuneJobs in a namespace, past operator and proxy.

Changes are ordered by resourceVersion, of which the API server has one sequence for all of them.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import httpx

from hack.chaos.api import Api, Raw
from hack.cluster.control_plane import ControlPlane

RESOURCES = ("finetunejobs", "jobs", "pods")
PAUSE_SECONDS = 0.05
GONE = 410


@dataclass(frozen=True)
class Change:
    """One state of an object, or its end."""

    version: int
    """The resourceVersion by which it became so."""

    resource: str
    raw: Raw
    deleted: bool = False
    seen: datetime = field(default_factory=lambda: datetime.now(UTC))
    missed: bool = False
    """Whether changes before it may have been missed, since the watch began anew."""

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"]["uid"])

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])


class Recorder:
    """Watches as long as its block lasts."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._apis = {resource: Api(plane, namespace) for resource in RESOURCES}
        self._lock = threading.Lock()
        self._changes: list[Change] = []
        self._present: dict[str, dict[str, Raw]] = {resource: {} for resource in RESOURCES}
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, args=(each,), name=each, daemon=True)
            for each in RESOURCES
        ]
        self.gaps = 0
        """Times that a watch couldn't be resumed where it had ended."""

        self.failure: Exception | None = None

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        for api in self._apis.values():
            api.http.close()
        for thread in self._threads:
            thread.join(5)

    def changes(self) -> list[Change]:
        """All changes so far, in the API server's order."""
        if self.failure is not None:
            raise self.failure
        with self._lock:
            return sorted(self._changes, key=lambda change: change.version)

    def present(self, resource: str) -> list[Raw]:
        """The objects that there are."""
        with self._lock:
            return list(self._present[resource].values())

    def _follow(self, resource: str) -> None:
        version, known = "", False
        while not self._closing.is_set():
            try:
                if not version:
                    version = self._list(resource, missed=known)
                    known = True
                version = self._watch(resource, version)
            except (httpx.HTTPError, httpx.StreamError, ValueError):
                self._closing.wait(PAUSE_SECONDS)
            except Exception as error:  # told by `changes`
                if not self._closing.is_set():
                    self.failure = error
                return

    def _list(self, resource: str, *, missed: bool) -> str:
        api = self._apis[resource]
        answer = api.http.get(api.path(resource))
        if not answer.is_success:
            raise ValueError(answer.text)
        found = answer.json()
        version = str(found["metadata"]["resourceVersion"])
        self.gaps += missed
        with self._lock:
            known = self._present[resource]
            now = {item["metadata"]["uid"]: item for item in found["items"]}
            for uid, raw in known.items():
                if uid not in now:
                    gone = Change(int(version), resource, raw, deleted=True, missed=True)
                    self._changes.append(gone)
            for uid, raw in now.items():
                before = known.get(uid, {"metadata": {}})["metadata"].get("resourceVersion")
                if before != raw["metadata"]["resourceVersion"]:
                    own = int(raw["metadata"]["resourceVersion"])
                    self._changes.append(Change(own, resource, _slim(raw), missed=missed))
            self._present[resource] = {uid: _slim(raw) for uid, raw in now.items()}
        return version

    def _watch(self, resource: str, version: str) -> str:
        """Follow a watch to its end; the version to resume it at, or nothing to begin anew."""
        api = self._apis[resource]
        query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true"}
        try:
            with api.http.stream(
                "GET", api.path(resource), params=query, timeout=httpx.Timeout(10, read=90)
            ) as answer:
                if answer.status_code == GONE:
                    return ""
                answer.raise_for_status()
                for line in answer.iter_lines():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return "" if event["object"].get("code") == GONE else version
                    version = str(event["object"]["metadata"]["resourceVersion"])
                    if event["type"] != "BOOKMARK":
                        self._keep(resource, event["type"] == "DELETED", event["object"])
        except (httpx.HTTPError, httpx.StreamError, ValueError):
            time.sleep(PAUSE_SECONDS)
        return version

    def _keep(self, resource: str, deleted: bool, raw: Raw) -> None:
        change = Change(int(raw["metadata"]["resourceVersion"]), resource, _slim(raw), deleted)
        with self._lock:
            self._changes.append(change)
            if deleted:
                self._present[resource].pop(change.uid, None)
            else:
                self._present[resource][change.uid] = change.raw


def _slim(raw: Raw) -> Raw:
    """Without what nobody asks about: many thousand of them are kept."""
    meta: dict[str, Any] = {k: v for k, v in raw["metadata"].items() if k != "managedFields"}
    return {"metadata": meta, "status": raw.get("status") or {}}
