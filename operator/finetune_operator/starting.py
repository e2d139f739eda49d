"""What comes before the Job of a stage, and what goes after the last one.

A stage's pod needs a ServiceAccount, Role and RoleBinding for the live progress, and a ConfigMap
with run.json. They are made side by side, are known once they stand, and are deleted when the
FineTuneJob is settled. Whether another pod or Job may be in the way is asked of the API server only
where this process can't know it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from finetune_operator.api import (
    FINETUNEJOB_LABEL,
    FINETUNEJOB_NAME_ANNOTATION,
    KIND,
    POD_SETTINGS_ANNOTATION,
    STAGE_LABEL,
    JsonObject,
)
from finetune_operator.cluster import (
    SUPPORTS,
    AlreadyExistsError,
    Cluster,
    ConflictError,
    DeniedError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
)
from finetune_operator.manifests import StageObjects
from finetune_operator.observe import ObservedFineTuneJob, controller_uid, is_controlled_by
from finetune_operator.pods import observe_pod
from finetune_trainer.contract import Stage

logger = logging.getLogger(__name__)

_Key = TypeVar("_Key")

# A support that somebody deletes by hand is missed until then, at the start of the next stage.
TRUSTED_SECONDS = 600.0
# A Job like one that was admitted so lately needs no rehearsal; after a denial, each needs one.
ADMITTED_SECONDS = 60.0
DENIED_SECONDS = 600.0
# For so long after its end a FineTuneJob's name is remembered. The watches are never that late.
REMEMBERED_SECONDS = 600.0

T = TypeVar("T")


@dataclass(frozen=True)
class _Support:
    """An object that stages of a FineTuneJob need."""

    kind: str
    name: str


@dataclass
class _Supports:
    """Those of one FineTuneJob: the uid of each, and when it was last known to stand."""

    owner_uid: str
    known: dict[_Support, tuple[str, float]]


class Starts:
    """Makes ready for the Jobs of stages, and tidies up after them."""

    def __init__(self, cluster: Cluster, may_act: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._may_act = may_act
        self._supports: dict[str, _Supports] = {}
        self._begun: dict[str, set[str]] = {}
        """The stages that this process has started, by the FineTuneJob's namespace/name."""

        self._gone: dict[str, float] = {}
        self._earlier: set[str] | None = None
        """The FineTuneJobs for which others have made Jobs or pods; None: not known yet."""

        self._term = 0
        self._admitted: dict[tuple[str, ...], float] = {}
        self._denied: dict[str, float] = {}

    async def make_ready(
        self, finetunejob: ObservedFineTuneJob, objects: StageObjects, *, doubtful: bool
    ) -> None:
        """Create what the Job of a stage needs, once it is clear that the Job may be created.

        Where it is `doubtful` that the API server admits the Job, that comes first. Raises
        ConflictError where something is in the way.
        """
        checks = [self._make_sure_that_none_is_at_work(finetunejob, objects.job)]
        if doubtful or not self._was_admitted(objects.job):
            checks.append(self._rehearse(finetunejob, objects.job))
        bodies = (*objects.access, objects.config_map)
        if doubtful:
            await side_by_side(*checks)
            checks = []
        await side_by_side(*checks, self._ensure_supports(finetunejob, bodies))

    async def create_job(self, finetunejob: ObservedFineTuneJob, job: JsonObject) -> JsonObject:
        """Create the Job of a stage, or return the one that there is."""
        stage = job["metadata"]["labels"][STAGE_LABEL]
        self._begun.setdefault(_key(finetunejob), set()).add(stage)
        self._gone.pop(_key(finetunejob), None)
        try:
            made = await ensure(self._cluster, finetunejob, job)
        except (DeniedError, InvalidError):
            _remember(self._denied, finetunejob.namespace, DENIED_SECONDS)
            raise
        _remember(self._admitted, _likeness(job), ADMITTED_SECONDS)
        return made

    def has_supports(self, finetunejob: ObservedFineTuneJob) -> bool:
        """Whether something is there that a settled FineTuneJob needs no more."""
        return _key(finetunejob) in self._supports

    async def tidy(self, finetunejob: ObservedFineTuneJob) -> None:
        """Delete what the stages needed. An edit makes it anew."""
        there = self._supports.get(_key(finetunejob))
        if there is None:  # this operator doesn't lead any more
            return
        try:
            await side_by_side(*(self._delete(finetunejob, each, there) for each in [*there.known]))
        except DeniedError as error:
            logger.info("Not tidied up: %s", error, extra={"finetunejob": _key(finetunejob)})
        self._supports.pop(_key(finetunejob), None)

    async def _delete(
        self, finetunejob: ObservedFineTuneJob, support: _Support, there: _Supports
    ) -> None:
        if not self._may_act():
            raise ConflictError("another operator leads by now")
        uid, _ = there.known[support]
        there.known[support] = (uid, -math.inf)  # even if there is no answer, it may be gone
        await self._cluster.delete(support.kind, finetunejob.namespace, support.name, uid)
        there.known.pop(support, None)

    def forget(self, key: str) -> None:
        """Forget a FineTuneJob that is gone, and soon also that there was one of this name."""
        self._supports.pop(key, None)
        now = time.monotonic()
        self._gone[key] = now
        while self._gone and now - next(iter(self._gone.values())) > REMEMBERED_SECONDS:
            name = next(iter(self._gone))
            del self._gone[name]
            self._begun.pop(name, None)

    async def take_over(self, namespaces: tuple[str, ...]) -> set[str]:
        """Learn what other operators have made, this one in a former life among them.

        From now on, only this one makes Jobs. Returns the FineTuneJobs, as namespace/name, that
        have supports.
        """
        term, earlier = self._term, set()
        for kind in ("Job", "Pod"):
            async for item in self._cluster.in_brief(kind, namespaces):
                if name := (item["metadata"].get("annotations") or {}).get(
                    FINETUNEJOB_NAME_ANNOTATION
                ):
                    earlier.add(f"{item['metadata']['namespace']}/{name}")
        found = [
            (kind, item)
            for kind in SUPPORTS
            async for item in self._cluster.in_brief(kind, namespaces)
        ]
        if term != self._term:
            return set()
        self._earlier = earlier
        return {key for kind, item in found if (key := self._note(kind, item))}

    def step_down(self) -> None:
        """From now on another operator may make and delete what is known here."""
        self._term += 1
        self._earlier = None
        self._supports.clear()

    def _note(self, kind: str, item: JsonObject) -> str | None:
        meta = item["metadata"]
        uid = controller_uid(item, KIND)
        owners = meta.get("ownerReferences") or []
        owner: JsonObject = next((each for each in owners if each["uid"] == uid), {})
        if not owner:
            return None
        key = f"{meta['namespace']}/{owner['name']}"
        self._remember(key, uid, _Support(kind, meta["name"]), meta["uid"])
        return key

    def _remember(self, key: str, owner_uid: str, support: _Support, uid: str) -> None:
        there = self._supports.get(key)
        if there is None or there.owner_uid != owner_uid:
            there = self._supports[key] = _Supports(owner_uid, {})
        there.known[support] = (uid, time.monotonic())

    async def _ensure_supports(
        self, finetunejob: ObservedFineTuneJob, bodies: tuple[JsonObject, ...]
    ) -> None:
        missing = [body for body in bodies if not self._stands(finetunejob, body)]
        # The API server lets nobody bind a Role that isn't there.
        access = [body for body in missing if body["kind"] in {"Role", "RoleBinding"}]
        others = [[body] for body in missing if body not in access]
        await side_by_side(*(self._ensure_in_turn(finetunejob, each) for each in [*others, access]))

    async def _ensure_in_turn(
        self, finetunejob: ObservedFineTuneJob, bodies: list[JsonObject]
    ) -> None:
        for body in bodies:
            await self._ensure_support(finetunejob, body)

    async def _ensure_support(self, finetunejob: ObservedFineTuneJob, body: JsonObject) -> None:
        made = await ensure(self._cluster, finetunejob, body)
        support, uid = _support(body), str(made["metadata"].get("uid", ""))
        self._remember(_key(finetunejob), finetunejob.uid, support, uid)

    def _stands(self, finetunejob: ObservedFineTuneJob, body: JsonObject) -> bool:
        there = self._supports.get(_key(finetunejob))
        if there is None or there.owner_uid != finetunejob.uid:
            return False
        _, when = there.known.get(_support(body), ("", -TRUSTED_SECONDS))
        return time.monotonic() - when < TRUSTED_SECONDS

    def _was_admitted(self, job: JsonObject) -> bool:
        """Whether the API server has lately created a Job that differs in names alone, and denied
        none in this namespace."""
        now, namespace = time.monotonic(), job["metadata"]["namespace"]
        if now - self._denied.get(namespace, -DENIED_SECONDS) < DENIED_SECONDS:
            return False
        return now - self._admitted.get(_likeness(job), -ADMITTED_SECONDS) < ADMITTED_SECONDS

    async def _rehearse(self, finetunejob: ObservedFineTuneJob, job: JsonObject) -> None:
        """Ask the API server whether it would admit the Job."""
        try:
            await ensure(self._cluster, finetunejob, job, dry_run=True)
        except (DeniedError, InvalidError):
            _remember(self._denied, finetunejob.namespace, DENIED_SECONDS)
            raise

    async def _make_sure_that_none_is_at_work(
        self, finetunejob: ObservedFineTuneJob, job: JsonObject
    ) -> None:
        """Raise ConflictError if the API server has a pod at work that the watch doesn't show yet,
        or a Job of an earlier FineTuneJob of this name, which is deleted then.

        Jobs and pods are watched separately: a Job may be seen to be gone before its pod is seen to
        be there. And a FineTuneJob may be deleted just before its Job is created. `job` is the one
        to start. Such a list takes the API server longer the more pods the namespace has.
        """
        if self._is_the_first(finetunejob, job):
            return
        namespace = finetunejob.namespace
        labels = {
            each: job["metadata"]["labels"][each] for each in (FINETUNEJOB_LABEL, STAGE_LABEL)
        }
        for other in await self._cluster.children("Job", namespace, labels):
            meta, owner = other["metadata"], controller_uid(other, KIND)
            if _named(other, finetunejob) and owner and owner != finetunejob.uid:
                await self._cluster.delete_job(namespace, meta["name"], meta["uid"])
                raise ConflictError(f"the Job {meta['name']} of an earlier FineTuneJob is there")
        for pod in await self._cluster.children("Pod", namespace, labels):
            if _named(pod, finetunejob) and observe_pod(pod).may_work:
                raise ConflictError(f"the pod {pod['metadata']['name']} is at work")

    def _is_the_first(self, finetunejob: ObservedFineTuneJob, job: JsonObject) -> bool:
        """Whether nobody has started this stage of a FineTuneJob of this name.

        Only the operator that leads does. This one knows what it has started itself, and what there
        was when it began to lead.
        """
        key, stage = _key(finetunejob), Stage(job["metadata"]["labels"][STAGE_LABEL])
        if self._earlier is None or key in self._earlier:
            return False
        return stage not in self._begun.get(key, set())


async def side_by_side(*work: Awaitable[T]) -> list[T]:
    """Await all at the same time. Of several errors, that of the first in order is raised, when all
    have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return [each for each in results if not isinstance(each, BaseException)]


async def ensure(
    cluster: Cluster, finetunejob: ObservedFineTuneJob, body: JsonObject, *, dry_run: bool = False
) -> JsonObject:
    """Create an object, or return the existing one if this FineTuneJob owns it."""
    try:
        return await cluster.create(body, dry_run=dry_run)
    except AlreadyExistsError:
        meta = body["metadata"]
        try:
            found = await cluster.get(body["kind"], meta["namespace"], meta["name"])
        except NotFoundError as error:
            raise ConflictError(f"{body['kind']} {meta['name']} has just been deleted") from error
        if not is_controlled_by(found, finetunejob):
            message = f"{body['kind']} {meta['name']} exists and belongs to someone else"
            raise ForbiddenError(message) from None
        return found


def _key(finetunejob: ObservedFineTuneJob) -> str:
    return f"{finetunejob.namespace}/{finetunejob.name}"


def _support(body: JsonObject) -> _Support:
    return _Support(body["kind"], body["metadata"]["name"])


def _remember(times: dict[_Key, float], key: _Key, seconds: float) -> None:
    """Note the time of `key`, and forget what is older than so many seconds."""
    now = time.monotonic()
    times.pop(key, None)  # what is noted last stands last
    times[key] = now
    while now - times[oldest := next(iter(times))] >= seconds:
        del times[oldest]


def _likeness(job: JsonObject) -> tuple[str, ...]:
    """What makes two Jobs alike to those who admit them."""
    meta, deadline = job["metadata"], job["spec"].get("activeDeadlineSeconds")
    stage, settings = meta["labels"][STAGE_LABEL], meta["annotations"][POD_SETTINGS_ANNOTATION]
    return meta["namespace"], stage, settings, str(deadline)


def _named(child: JsonObject, finetunejob: ObservedFineTuneJob) -> bool:
    """Whether a child's FineTuneJob has this one's name; its label may be shortened."""
    notes = child["metadata"].get("annotations") or {}
    return notes.get(FINETUNEJOB_NAME_ANNOTATION) == finetunejob.name
