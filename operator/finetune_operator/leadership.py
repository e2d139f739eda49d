"""Which of several operators acts: the one that holds a Lease.

The algorithm is that of leader election in controllers in Go. No clock is compared with another
machine's: a holder has lost the Lease when it has not changed for its duration, by the clock of who
looks. Who holds it gives up earlier than that, so that at no time two of them act.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_operator.api import JsonObject
from finetune_operator.cluster import (
    AlreadyExistsError,
    Cluster,
    ClusterError,
    ConflictError,
    NotFoundError,
)

logger = logging.getLogger(__name__)

RENEW_SHARE = 0.7  # of the duration, after which the holder gives up
RETRY_SHARE = 0.2  # of the duration, between two tries
LONGEST_RETRY_SECONDS = 2.0  # until it is noticed that another one has given the Lease back
KIND = "Lease"


@dataclass
class _Seen:
    """The Lease as it was when it last changed, and when that was seen."""

    version: str
    at: float


class Leadership:
    """One operator's part in the election; `lease` is namespace/name."""

    def __init__(
        self,
        cluster: Cluster,
        lease: str,
        identity: str,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._namespace, self._name = lease.split("/")
        self._identity = identity
        self._seconds = seconds
        self._clock = clock
        self._retry = min(RETRY_SHARE * seconds, LONGEST_RETRY_SECONDS)
        self._seen: _Seen | None = None
        self._renewed: float | None = None

    @property
    def leads(self) -> bool:
        """Whether this operator may act at this moment, also after it was stopped and woken."""
        limit = RENEW_SHARE * self._seconds
        return self._renewed is not None and self._clock() - self._renewed < limit

    async def acquire(self) -> None:
        """Wait until this operator holds the Lease."""
        logger.info("Waiting to lead, as %s.", self._identity)
        while True:
            if await self._try():
                break
            await asyncio.sleep(self._retry)
        logger.info("Leading, as %s.", self._identity)

    async def hold(self) -> None:
        """Renew the Lease; return when it is lost."""
        while self.leads:
            await asyncio.sleep(self._retry)
            # A try that takes longer than the Lease may not keep it.
            left = (self._renewed or 0.0) + RENEW_SHARE * self._seconds - self._clock()
            try:
                async with asyncio.timeout(max(left, 0.0)):
                    await self._try()
            except TimeoutError:
                break
        self._renewed = None
        logger.warning("Another operator may lead by now; waiting to lead again.")

    async def release(self) -> None:
        """Give the Lease back, so that another operator leads at once."""
        if self._renewed is None:
            return
        self._renewed = None
        try:
            lease = await self._cluster.get(KIND, self._namespace, self._name)
            if _holder(lease) == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._cluster.replace(lease)
        except ClusterError as error:
            logger.warning("The Lease could not be given back: %s", error)

    async def _try(self) -> bool:
        """Take or renew the Lease, unless somebody else holds it; False too where that fails."""
        began = self._clock()
        try:
            await self._take(began)
        except ConflictError:
            return False  # another one was faster
        except ClusterError as error:
            logger.warning("The Lease can't be had: %s", error)
            return False
        return self.leads

    async def _take(self, began: float) -> None:
        try:
            lease = await self._cluster.get(KIND, self._namespace, self._name)
        except NotFoundError:
            try:
                await self._cluster.create(self._lease({}))
            except AlreadyExistsError as error:
                raise ConflictError("another operator made the Lease") from error
            self._renewed = began
            return
        if not self._may_take(lease):
            self._renewed = None
            return
        await self._cluster.replace(self._lease(lease))
        self._renewed = began

    def _may_take(self, lease: JsonObject) -> bool:
        version, now = lease["metadata"]["resourceVersion"], self._clock()
        if self._seen is None or self._seen.version != version:
            self._seen = _Seen(version, now)
        if _holder(lease) in {"", self._identity}:
            return True
        seconds = lease["spec"].get("leaseDurationSeconds") or self._seconds
        return now - self._seen.at >= float(seconds)

    def _lease(self, before: JsonObject) -> JsonObject:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = before.get("spec") or {}
        mine = _holder(before) == self._identity
        transitions = int(spec.get("leaseTransitions") or 0)
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": KIND,
            "metadata": before.get("metadata")
            or {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(round(self._seconds), 1),
                "acquireTime": (mine and spec.get("acquireTime")) or now,
                "renewTime": now,
                "leaseTransitions": transitions + (1 if before and not mine else 0),
            },
        }


def _holder(lease: JsonObject) -> str:
    return str((lease.get("spec") or {}).get("holderIdentity") or "")
