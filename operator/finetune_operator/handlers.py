"""The part that uses Kopf: index what is watched, and queue a key for each event.

Nothing is decided here. All handlers are `on.event` ones, since only they write nothing to the
user's object: no finalizer that blocks its deletion, and no annotation that a GitOps tool takes for
drift.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

import kopf

from finetune_operator.api import (
    CHILDREN_SELECTOR,
    FINETUNEJOB_NAME_ANNOTATION,
    FINETUNEJOB_UID_LABEL,
    KIND,
    MANAGED_BY_LABEL,
    OPERATOR,
    JsonObject,
)
from finetune_operator.cluster import Cluster, ClusterError, OperatorError
from finetune_operator.observe import controller_uid, finetunejob_in_brief, job_in_brief
from finetune_operator.pods import pod_in_brief
from finetune_operator.reconcile import WATCH_SILENCE_SECONDS, Snapshot
from finetune_trainer.contract import GROUP, PLURAL, VERSION

FINETUNEJOBS = (GROUP, VERSION, PLURAL)
JOBS = ("batch", "v1", "jobs")
PODS = ("", "v1", "pods")
OURS = {MANAGED_BY_LABEL: OPERATOR}

Index = Mapping[str, Iterable[JsonObject]]

RESTART_SECONDS = 5.0  # before watches that have failed begin anew

logger = logging.getLogger(__name__)


class WatchesError(OperatorError):
    """The watches begin anew, and don't show yet what is there."""


class Endlessly(Iterable[float]):
    """Pauses between tries, without an end: no outage of the API server ends the process."""

    def __init__(self, *pauses: float) -> None:
        self._pauses = pauses

    def __iter__(self) -> Iterator[float]:
        yield from self._pauses
        while True:
            yield self._pauses[-1]


class KeepsNothing(kopf.DiffBaseStorage, kopf.ProgressStorage):
    """For Kopf, which would copy each object twice to compare it with its last state: no handler
    here asks for that, and it costs a fifth of the operator's time."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass


class Watches:
    """Registers handlers and indexes with Kopf, and reads the indexes."""

    def __init__(
        self,
        cluster: Cluster,
        add: Callable[[str], None],
        shown: Callable[[JsonObject], None] = lambda _: None,
    ) -> None:
        """`add` is told the key that an event is about, `shown` the FineTuneJob of an event."""
        self.registry = kopf.OperatorRegistry()
        self.synced = False
        """Whether Kopf has called a handler, which it does after all indexes are filled."""

        self._cluster = cluster
        self._add = add
        self._shown_to = shown
        self._gone: set[str] = set()
        self._behind: dict[str, str | None] = {}
        self._dead = ""
        self._last_event = time.monotonic()
        self._begins_anew = False
        self._finetunejobs: Index = {}
        self._jobs: Index = {}
        self._pods: Index = {}
        self._register()

    def snapshot(self, key: str) -> Snapshot | None:
        """What the watches show of one FineTuneJob and its children; None if it is gone.

        Raises WatchesError while they begin anew: half of the children would look like none.
        """
        if self._begins_anew:
            raise WatchesError("the watches begin anew")
        found = self._present(self._finetunejobs, key)
        if not found:
            return None
        newest = _newest(found)
        uid = newest["metadata"]["uid"]
        mine = by_uid(newest["metadata"]["namespace"], uid)
        return Snapshot(
            finetunejob=newest,
            jobs=tuple(self._present(self._jobs, mine)),
            pods=tuple(self._present(self._pods, mine)),
            earlier_pods=tuple(
                pod for pod in self._present(self._pods, key) if _owner_uid(pod) != uid
            ),
        )

    def finetunejobs(self) -> list[JsonObject]:
        """Every FineTuneJob that the watches show. Raises WatchesError while they begin anew."""
        if self._begins_anew:
            raise WatchesError("the watches begin anew")
        found = (self._present(self._finetunejobs, key) for key in list(self._finetunejobs))
        return [_newest(each) for each in found if each]

    def queue_all(self) -> None:
        """Have a pass made over every FineTuneJob."""
        for key in list(self._finetunejobs):
            self._add(key)

    async def problem(self, namespaces: tuple[str, ...]) -> str:
        """Why the watches can't be relied on; empty if they can."""
        try:
            some = await self._cluster.any_finetunejob(namespaces)
        except ClusterError as error:
            return str(error)
        if some and not self.synced:
            return "the first lists of the watches are not in yet"
        return ""

    async def resync(self, namespaces: tuple[str, ...]) -> None:
        """Ignore indexed objects that no longer exist, and queue every FineTuneJob.

        If a watch was broken for long, Kopf lists everything again, but its indexes keep objects
        that were deleted in the meantime.
        """
        before = self._shown()
        live = await self._cluster.watched_versions(namespaces)
        self._gone = before.keys() - live.keys()
        self._look_for_dead_watches(live)
        self.queue_all()

    @property
    def silence(self) -> float:
        """Seconds since the watches last showed anything."""
        return time.monotonic() - self._last_event

    @property
    def outdated(self) -> int:
        """Objects that had changed at the last resync without the watches showing it."""
        return len(self._behind)

    @property
    def dead(self) -> str:
        """Why only a new process can help; empty if none is needed."""
        return self._dead

    def _shown(self) -> dict[str, str]:
        """The resourceVersion of each object in the indexes, by uid."""
        return {
            raw["metadata"]["uid"]: raw["metadata"].get("resourceVersion", "")
            for index in (self._finetunejobs, self._jobs, self._pods)
            for key in list(index)
            for raw in index[key]
        }

    def _look_for_dead_watches(self, live: Mapping[str, str]) -> None:
        """A watch is dead if it shows an object as it was though it had changed long before: at
        the last look, which is one resync ago."""
        shown = self._shown()
        behind = {uid: shown.get(uid) for uid in live if shown.get(uid) != live[uid]}
        dead = [uid for uid in behind if uid in self._behind and self._behind[uid] == behind[uid]]
        self._behind = behind
        self._dead = ""
        if dead:
            self._dead = f"the watches don't show changes of {len(dead)} objects since long"
            logger.error("Not alive: %s", self._dead)

    async def keep_watching(
        self, watch: Callable[[], Awaitable[None]], failed: Callable[[], None]
    ) -> None:
        """Run Kopf until it is told to stop; whenever it fails, begin anew."""
        stop = asyncio.Event()
        while not stop.is_set():
            try:
                await watch()
            except Exception as error:  # whatever it is, a new start is the remedy
                logger.exception("The watches have failed, and begin anew: %s", error)  # noqa: TRY401
            else:
                return
            failed()
            self._begins_anew = True
            self.synced = False
            # Kopf's own handlers are of the run that failed.
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            try:
                await asyncio.wait_for(stop.wait(), RESTART_SECONDS)
            except TimeoutError:
                continue

    def _present(self, index: Index, key: str) -> list[JsonObject]:
        found = index.get(key, ())
        return [raw for raw in found if raw["metadata"]["uid"] not in self._gone]

    def _register(self) -> None:
        kopf.on.startup(registry=self.registry)(self._startup)
        kopf.on.login(registry=self.registry)(self._login)
        for resource, name, index in (
            (FINETUNEJOBS, "finetunejobs", _index_finetunejob),
            (JOBS, "jobs", _index_job),
            (PODS, "pods", _index_pod),
        ):
            ours = None if resource is FINETUNEJOBS else OURS
            event = self._finetunejob_event if resource is FINETUNEJOBS else self._child_event
            kopf.index(*resource, id=name, labels=ours, registry=self.registry)(index)
            kopf.on.event(*resource, id=f"{name}-event", labels=ours, registry=self.registry)(event)

    async def _startup(self, **known: Any) -> None:
        # Kopf passes each index under its name.
        self._finetunejobs = known["finetunejobs"]
        self._jobs = known["jobs"]
        self._pods = known["pods"]

    def _is_synced(self) -> None:
        # Kopf calls no handler before all indexes are filled.
        self._last_event = time.monotonic()
        self.synced = True
        self._begins_anew = False

    async def _login(self, **_: Any) -> kopf.ConnectionInfo:
        credentials = await self._cluster.credentials()
        return kopf.ConnectionInfo(
            server=credentials.server,
            ca_path=credentials.ca_file,
            insecure=credentials.insecure,
            scheme="Bearer" if credentials.token else None,
            token=credentials.token,
            certificate_path=credentials.certificate_file,
            private_key_path=credentials.key_file,
        )

    async def _finetunejob_event(
        self, namespace: str | None, name: str, body: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        self._is_synced()
        self._shown_to(dict(body or {}))
        self._add(f"{namespace}/{name}")

    async def _child_event(
        self, namespace: str | None, annotations: Mapping[str, str], **_: Any
    ) -> None:
        self._is_synced()
        if FINETUNEJOB_NAME_ANNOTATION in annotations:
            self._add(f"{namespace}/{annotations[FINETUNEJOB_NAME_ANNOTATION]}")


def kopf_settings(settings: kopf.OperatorSettings, request_seconds: float) -> None:
    """Limit Kopf to watching: it posts no events, and doesn't scan, which needs more rights."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.networking.request_timeout = request_seconds
    settings.networking.connect_timeout = min(10.0, request_seconds)
    # Short pauses, so that watching resumes soon after an outage of the API server.
    settings.networking.error_backoffs = Endlessly(1, 1, 2, 3, 5)
    # A run that fails is followed by another one in this process.
    settings.process.ultimate_exiting_timeout = None
    settings.persistence.diffbase_storage = KeepsNothing()
    settings.persistence.progress_storage = KeepsNothing()
    settings.watching.inactivity_timeout = WATCH_SILENCE_SECONDS
    settings.watching.label_selectors[JOBS] = CHILDREN_SELECTOR
    settings.watching.label_selectors[PODS] = CHILDREN_SELECTOR


def _newest(found: Iterable[JsonObject]) -> JsonObject:
    """While an object of the same name is being replaced, the index may hold both."""
    return max(found, key=lambda raw: str(raw["metadata"]["creationTimestamp"]))


async def _index_finetunejob(
    namespace: str | None, name: str, body: kopf.Body, **_: Any
) -> dict[str, JsonObject]:
    return {f"{namespace}/{name}": finetunejob_in_brief(dict(body))}


def by_uid(namespace: str | None, uid: str) -> str:
    """The key of the children of a FineTuneJob. Only those in its own namespace are its children:
    in another one, somebody else may write the same uid."""
    return f"uid/{namespace}/{uid}"


async def _index_job(namespace: str | None, body: kopf.Body, **_: Any) -> dict[str, JsonObject]:
    return {by_uid(namespace, controller_uid(body, KIND)): job_in_brief(dict(body))}


async def _index_pod(namespace: str | None, body: kopf.Body, **_: Any) -> dict[str, JsonObject]:
    """Index by the uid of the FineTuneJob, and by its name, which a later one may have too."""
    raw = pod_in_brief(dict(body))
    name = (body["metadata"].get("annotations") or {}).get(FINETUNEJOB_NAME_ANNOTATION)
    by_name = {f"{namespace}/{name}": raw} if name else {}
    return {by_uid(namespace, _owner_uid(raw)): raw, **by_name}


def _owner_uid(pod: JsonObject) -> str:
    return str(pod["metadata"]["labels"].get(FINETUNEJOB_UID_LABEL, ""))
