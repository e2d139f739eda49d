"""The part that uses Kopf: index what is watched, and queue a key for each event.

Nothing is decided here. All handlers are `on.event` ones, since only they write nothing to the
user's object: no finalizer that blocks its deletion, and no annotation that a GitOps tool takes for
drift. The indexes are our own: for each object that Kopf indexes at the start it wakes all others
that wait for their turn, which for some thousands of them takes minutes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from typing import Any, cast

import kopf

from finetune_operator.api import (
    CHILDREN_SELECTOR,
    FINETUNEJOB_NAME_ANNOTATION,
    FINETUNEJOB_UID_LABEL,
    KIND,
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

RESTART_SECONDS = 5.0  # before watches that have failed begin anew
FIRST_LISTS_SECONDS = 0.1  # between two looks whether the watches have shown all
IDLE_SECONDS = 0.5  # for so long Kopf keeps a task for each object that an event was about
LIST_AGAIN_SECONDS = 5.0  # what was deleted just before the watches began is never shown

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


class Index:
    """Objects of one kind, each under some keys."""

    def __init__(self) -> None:
        self.objects: dict[str, JsonObject] = {}
        """By uid."""

        self._keys: dict[str, tuple[str, ...]] = {}
        self._uids: dict[str, dict[str, None]] = {}

    def put(self, raw: JsonObject, *keys: str) -> None:
        """Show an object under these keys and no others."""
        uid = raw["metadata"]["uid"]
        if self._keys.get(uid) != keys:
            self.drop(uid)
        self.objects[uid], self._keys[uid] = raw, keys
        for key in keys:
            self._uids.setdefault(key, {})[uid] = None

    def drop(self, uid: str) -> tuple[str, ...]:
        """Show an object no more; the keys that it was under."""
        self.objects.pop(uid, None)
        keys = self._keys.pop(uid, ())
        for key in keys:
            del self._uids[key][uid]
            if not self._uids[key]:
                del self._uids[key]
        return keys

    def under(self, key: str) -> list[JsonObject]:
        """All objects under a key."""
        return [self.objects[uid] for uid in self._uids.get(key, ())]

    def keys(self) -> list[str]:
        """All keys that have objects."""
        return list(self._uids)


class Watches:
    """Registers handlers with Kopf, and keeps what they are told."""

    def __init__(
        self,
        cluster: Cluster,
        add: Callable[[str], None],
        shown: Callable[[JsonObject], None] = lambda _: None,
        namespaces: tuple[str, ...] = (),
    ) -> None:
        """`add` is told the key that an event is about, `shown` the FineTuneJob of an event."""
        self.registry = kopf.OperatorRegistry()
        self.synced = False
        """Whether the watches have shown all that there was when they began."""

        self.stop = asyncio.Event()
        """Set when the process is told to stop."""

        self._cluster = cluster
        self._queue_key = add
        self._shown_to = shown
        self._namespaces = namespaces
        self._told: set[str] = set()  # uids that an event was about, until all have been shown
        self._gone: set[str] = set()
        self._behind: dict[str, str | None] = {}
        self._dead = ""
        self._last_event = time.monotonic()
        self._finetunejobs = Index()
        self._jobs = Index()
        self._pods = Index()
        self._register()

    def snapshot(self, key: str) -> Snapshot | None:
        """What the watches show of one FineTuneJob and its children; None if it is gone.

        Raises WatchesError while they begin: half of the children would look like none.
        """
        if not self.synced:
            raise WatchesError("the watches begin anew")
        found = self._finetunejobs.under(key)
        if not found:
            return None
        newest = _newest(found)
        uid = newest["metadata"]["uid"]
        mine = by_uid(newest["metadata"]["namespace"], uid)
        return Snapshot(
            finetunejob=newest,
            jobs=tuple(self._jobs.under(mine)),
            pods=tuple(self._pods.under(mine)),
            earlier_pods=tuple(pod for pod in self._pods.under(key) if _owner_uid(pod) != uid),
        )

    def finetunejobs(self) -> list[JsonObject]:
        """Every FineTuneJob that the watches show. Raises WatchesError while they begin."""
        if not self.synced:
            raise WatchesError("the watches begin anew")
        index = self._finetunejobs
        return [_newest(index.under(key)) for key in index.keys()]  # noqa: SIM118 - no mapping

    def queue_all(self) -> None:
        """Have a pass made over every FineTuneJob."""
        for key in self._finetunejobs.keys():  # noqa: SIM118 - it is no mapping
            self._add(key)

    async def problem(self) -> str:
        """Why the watches can't be relied on; empty if they can."""
        try:
            await self._cluster.any_finetunejob(self._namespaces)
        except ClusterError as error:
            return str(error)
        if not self.synced:
            return "the first lists of the watches are not in yet"
        return ""

    async def resync(self) -> None:
        """Forget indexed objects that no longer exist, and queue every FineTuneJob.

        If a watch was broken for long, Kopf lists everything again, but says nothing of objects
        that were deleted in the meantime.
        """
        before = self._shown()
        live = await self._cluster.watched_versions(self._namespaces)
        self._drop(before.keys() - live.keys())
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
            uid: raw["metadata"].get("resourceVersion", "")
            for index in (self._finetunejobs, self._jobs, self._pods)
            for uid, raw in index.objects.items()
        }

    def _drop(self, uids: Set[str]) -> None:
        """Forget objects that are known to exist no more; a late event doesn't bring them back."""
        self._gone = set(uids)
        for uid in uids:
            for index in (self._jobs, self._pods):
                index.drop(uid)
            for key in self._finetunejobs.drop(uid):  # a pass forgets it everywhere
                self._add(key)

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
        """Run Kopf until the process is told to stop; whenever it fails, begin anew."""
        while not self.stop.is_set():
            # Kopf cancels all tasks that start after it, so this one starts before.
            first_lists = asyncio.create_task(self._await_first_lists())
            try:
                await watch()
            except Exception as error:  # whatever it is, a new start is the remedy
                if self.stop.is_set():  # what Kopf has cancelled may fail
                    return
                logger.exception("The watches have failed, and begin anew: %s", error)  # noqa: TRY401
            else:
                return
            finally:
                first_lists.cancel()
            failed()
            self.synced = False
            self._told.clear()
            self._take_signals()  # Kopf may have failed before it asked
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), RESTART_SECONDS)

    def _take_signals(self) -> None:
        """Heed SIGTERM and SIGINT, in place of Kopf, whose handlers end with each run of it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)

    async def _await_first_lists(self) -> None:
        """Wait until the watches have shown all that there is, and look at every FineTuneJob."""
        while not self.synced:
            try:
                live = await self._cluster.watched_versions(self._namespaces)
            except ClusterError as error:
                logger.warning("Waiting for the first lists: %s", error)
                await asyncio.sleep(RESTART_SECONDS)
                continue
            again = time.monotonic() + LIST_AGAIN_SECONDS
            while missing := live.keys() - self._told:
                if time.monotonic() > again:
                    break
                await asyncio.sleep(FIRST_LISTS_SECONDS)
            self.synced = not missing
        self._drop(self._shown().keys() - self._told)  # of watches before these
        self._told.clear()
        self.queue_all()

    def _register(self) -> None:
        kopf.on.login(registry=self.registry)(self._login)
        for resource, handler in (
            (FINETUNEJOBS, self._finetunejob_event),
            (JOBS, self._job_event),
            (PODS, self._pod_event),
        ):
            kopf.on.event(*resource, id=resource[-1], registry=self.registry)(handler)

    def _add(self, key: str) -> None:
        if self.synced:  # else a look at all follows
            self._queue_key(key)

    def _is_there(self, event: kopf.RawEvent) -> bool:
        """Whether the object that an event is about is there, and not just about to be dropped."""
        self._last_event = time.monotonic()
        uid = event["object"]["metadata"]["uid"]
        if not self.synced:
            self._told.add(uid)
        return event["type"] != "DELETED" and uid not in self._gone

    async def _login(self, **_: Any) -> kopf.ConnectionInfo:
        self._take_signals()  # Kopf has set up its own before it asks
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

    async def _finetunejob_event(self, event: kopf.RawEvent, **_: Any) -> None:
        raw = cast(JsonObject, event["object"])
        meta = raw["metadata"]
        key = f"{meta['namespace']}/{meta['name']}"
        if self._is_there(event):
            self._finetunejobs.put(finetunejob_in_brief(raw), key)
        else:
            self._finetunejobs.drop(meta["uid"])
        self._shown_to(raw)
        self._add(key)

    async def _job_event(self, event: kopf.RawEvent, **_: Any) -> None:
        raw = cast(JsonObject, event["object"])
        if self._is_there(event):
            key = by_uid(raw["metadata"]["namespace"], controller_uid(raw, KIND))
            self._jobs.put(job_in_brief(raw), key)
        else:
            self._jobs.drop(raw["metadata"]["uid"])
        self._child_event(raw)

    async def _pod_event(self, event: kopf.RawEvent, **_: Any) -> None:
        raw = cast(JsonObject, event["object"])
        if self._is_there(event):
            self._pods.put(pod_in_brief(raw), *pod_keys(raw))
        else:
            self._pods.drop(raw["metadata"]["uid"])
        self._child_event(raw)

    def _child_event(self, raw: JsonObject) -> None:
        if key := _key_of_child(raw):
            self._add(key)


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
    settings.queueing.idle_timeout = IDLE_SECONDS
    settings.watching.inactivity_timeout = WATCH_SILENCE_SECONDS
    settings.watching.label_selectors[JOBS] = CHILDREN_SELECTOR
    settings.watching.label_selectors[PODS] = CHILDREN_SELECTOR


def _newest(found: Iterable[JsonObject]) -> JsonObject:
    """While an object of the same name is being replaced, the index may hold both."""
    return max(found, key=lambda raw: str(raw["metadata"]["creationTimestamp"]))


def by_uid(namespace: str | None, uid: str) -> str:
    """The key of the children of a FineTuneJob. Only those in its own namespace are its children:
    in another one, somebody else may write the same uid."""
    return f"uid/{namespace}/{uid}"


def pod_keys(raw: JsonObject) -> tuple[str, ...]:
    """The uid of the pod's FineTuneJob, and its name, which a later one may have too."""
    mine = by_uid(raw["metadata"]["namespace"], _owner_uid(raw))
    name = _key_of_child(raw)
    return (mine, name) if name else (mine,)


def _key_of_child(raw: JsonObject) -> str | None:
    """namespace/name of the FineTuneJob that a Job or pod is of."""
    meta = raw["metadata"]
    name = (meta.get("annotations") or {}).get(FINETUNEJOB_NAME_ANNOTATION)
    return f"{meta['namespace']}/{name}" if name else None


def _owner_uid(pod: JsonObject) -> str:
    return str((pod["metadata"].get("labels") or {}).get(FINETUNEJOB_UID_LABEL, ""))
