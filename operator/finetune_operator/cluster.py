"""The only module that talks to the API server, except for Kopf's watches.

Objects are plain dicts. The client's exceptions are converted to ClusterErrors, so that `reconcile`
decides by type whether to wait, to look again or to tell the user.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import client, config

from finetune_operator.api import (
    API_VERSION,
    CHILDREN_SELECTOR,
    KIND,
    OPERATOR,
    WOKEN_ANNOTATION,
    JsonObject,
)
from finetune_operator.pods import moment
from finetune_trainer.contract import GROUP, PLURAL, VERSION


class OperatorError(Exception):
    """An error whose message is enough, without a stack trace."""


class ClusterError(OperatorError):
    """The API server refused a request, or couldn't be reached."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail or message
        """The API server's message, without the request."""


class NotFoundError(ClusterError):
    """The object doesn't exist."""


class AlreadyExistsError(ClusterError):
    """An object of that name exists already."""


class ConflictError(ClusterError):
    """The object changed since it was read."""


class InvalidError(ClusterError):
    """The API server calls a field of the object invalid, so a retry can't help."""


class DeniedError(ClusterError):
    """A webhook or an admission policy refused the request, or can't be asked; it may be mended."""


class ForbiddenError(DeniedError):
    """RBAC, a quota or an admission plugin refused the request; it may be mended."""


class UnavailableError(ClusterError):
    """The API server can't be reached, is overloaded or failed."""


# What the operator reads and writes, by kind.
PATHS = {
    KIND: f"/apis/{GROUP}/{VERSION}/namespaces/{{namespace}}/{PLURAL}",
    "Job": "/apis/batch/v1/namespaces/{namespace}/jobs",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "Event": "/api/v1/namespaces/{namespace}/events",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
    "Node": "/api/v1/nodes",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings",
}
# Of Kueue, newest first; there are clusters without it.
WORKLOADS = tuple(
    f"/apis/kueue.x-k8s.io/{version}/namespaces/{{namespace}}/workloads"
    for version in ("v1beta2", "v1beta1")
)
WORKLOAD_OF_JOB = "kueue.x-k8s.io/job-uid"
WATCHED = {KIND: "", "Job": CHILDREN_SELECTOR, "Pod": CHILDREN_SELECTOR}
SUPPORTS = ("ServiceAccount", "Role", "RoleBinding", "ConfigMap")  # what a stage's pod needs
MERGE_PATCH = "application/merge-patch+json"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
PAGE = 500
NODES_SECONDS = 60.0  # node labels are cached for this long
STILL_TRUE = timedelta(minutes=10)
"""For so long an Event tells what goes on: its recorder drops all but one in five minutes."""

ERROR_BY_STATUS: dict[int, type[ClusterError]] = {
    400: DeniedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    422: DeniedError,
}
# How the API server says that a value can't be decoded, e.g. "cpu: lots".
UNDECODABLE = "cannot be handled as a"
WEBHOOK_AWAY = "failed calling webhook"  # one that must answer, and doesn't


@dataclass(frozen=True)
class Credentials:
    """How Kopf reaches the API server."""

    server: str
    ca_file: str | None
    token: str | None
    certificate_file: str | None
    key_file: str | None
    insecure: bool


CountRequest = Callable[[str, str, float], None]
"""Is told verb, status code (200 for any success) and seconds of a request."""


class Cluster:
    """A connection to the API server, with the rights of the operator's ServiceAccount."""

    def __init__(
        self,
        configuration: client.Configuration,
        request_seconds: float,
        count: CountRequest,
    ) -> None:
        self._configuration = configuration
        self._client = client.ApiClient(configuration)
        # The client's own way through its session costs more time than the rest of a request.
        self._http = aiohttp.ClientSession(
            connector=self._client.rest_client.pool_manager.connector,
            connector_owner=False,
            headers={"User-Agent": OPERATOR},
            proxy=configuration.proxy or _proxy_of_environment(configuration.host),
            timeout=aiohttp.ClientTimeout(total=request_seconds),
        )
        self._count = count
        self._nodes: dict[str, tuple[float, tuple[Mapping[str, str], ...]]] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, request_seconds: float, count: CountRequest) -> AsyncIterator[Self]:
        """Connect as the pod's ServiceAccount, or as the kubeconfig says."""
        cluster = cls(await _configuration(), request_seconds, count)
        try:
            yield cluster
        finally:
            await cluster.close()

    async def close(self) -> None:
        """End all connections."""
        await self._http.close()
        await self._client.close()

    async def credentials(self) -> Credentials:
        """The credentials as they are now; a ServiceAccount's token is renewed every hour."""
        header = await self._configuration.get_api_key_with_prefix("BearerToken")
        return Credentials(
            server=self._configuration.host,
            ca_file=self._configuration.ssl_ca_cert,
            token=header.split(" ", 1)[-1].strip() if header else None,
            certificate_file=self._configuration.cert_file,
            key_file=self._configuration.key_file,
            insecure=not self._configuration.verify_ssl,
        )

    async def create(self, body: JsonObject, *, dry_run: bool = False) -> JsonObject:
        """Create an object; raises AlreadyExistsError if one of its name exists.

        With `dry_run` the API server only says whether it would.
        """
        path = _path(body["kind"], body["metadata"])
        query = {"dryRun": "All"} if dry_run else None
        return await self._request("POST", path, body=body, query=query)

    async def get(self, kind: str, namespace: str, name: str) -> JsonObject:
        """Read an object; raises NotFoundError."""
        return await self._request("GET", f"{_path(kind, {'namespace': namespace})}/{name}")

    async def replace(self, body: JsonObject) -> JsonObject:
        """Replace an object; raises ConflictError if it changed since it was read."""
        path = f"{_path(body['kind'], body['metadata'])}/{body['metadata']['name']}"
        return await self._request("PUT", path, body=body)

    async def children(
        self, kind: Literal["Job", "Pod"], namespace: str, labels: Mapping[str, str]
    ) -> list[JsonObject]:
        """The Jobs or pods of stages with these labels, as the API server has them now."""
        wanted = ",".join([CHILDREN_SELECTOR, *(f"{key}={value}" for key, value in labels.items())])
        query = {"labelSelector": wanted}
        found = await self._request("GET", _collection(kind, namespace), query=query)
        return list(found["items"] or ())

    async def workload(self, namespace: str, job_uid: str) -> JsonObject | None:
        """Kueue's Workload of a Job, once it has made one; raises NotFoundError without Kueue."""
        query = {"labelSelector": f"{WORKLOAD_OF_JOB}={job_uid}"}
        newer, older = (each.format(namespace=namespace) for each in WORKLOADS)
        try:
            found = await self._request("GET", newer, query=query)
        except NotFoundError:
            found = await self._request("GET", older, query=query)
        return next(iter(found["items"] or ()), None)

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """Delete the Job with this uid, after its pods; no error if it is gone."""
        await self.delete("Job", namespace, name, uid, propagationPolicy="Foreground")

    async def delete(self, kind: str, namespace: str, name: str, uid: str, **how: str) -> None:
        """Delete the object with this uid; no error if it is gone."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            **how,
        }
        path = f"{_path(kind, {'namespace': namespace})}/{name}"
        try:
            await self._request("DELETE", path, body=body)
        except (NotFoundError, ConflictError):
            return  # it is gone, or its name belongs to another one by now

    async def wake_job(self, namespace: str, name: str, at: str) -> None:
        """Touch a Job, so that its controller looks at it; no error if it is gone."""
        body = {"metadata": {"annotations": {WOKEN_ANNOTATION: at}}}
        path = f"{_path('Job', {'namespace': namespace})}/{name}"
        with suppress(NotFoundError):
            await self._request("PATCH", path, body=body, content_type=MERGE_PATCH)

    async def patch_status(
        self, namespace: str, name: str, resource_version: str, patch: Mapping[str, Any]
    ) -> JsonObject:
        """Change a FineTuneJob's status; raises ConflictError if it changed since it was read."""
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"resourceVersion": resource_version},
            "status": patch,
        }
        path = f"{_path(KIND, {'namespace': namespace})}/{name}/status"
        return await self._request("PATCH", path, body=body, content_type=MERGE_PATCH)

    async def record_event(
        self,
        about: Mapping[str, Any],
        kind: Literal["Normal", "Warning"],
        reason: str,
        message: str,
        scope: str = "",
    ) -> None:
        """Record an Event about a FineTuneJob; the same Event again only renews its time.

        The same words with another `scope` are another Event.
        """
        event = _event(about, kind, reason, message, scope)
        try:
            await self.create(event)
        except AlreadyExistsError:
            meta = event["metadata"]
            again = {"lastTimestamp": event["lastTimestamp"]}
            path = f"{_path('Event', meta)}/{meta['name']}"
            await self._request("PATCH", path, body=again, content_type=MERGE_PATCH)

    async def failed_create(self, namespace: str, uid: str) -> str | None:
        """Why the controller of this object couldn't create a pod when it last tried."""
        event = await self._last_event(namespace, uid, "FailedCreate")
        return str(event["message"]) if event else None

    async def failed_mount(self, namespace: str, uid: str) -> str | None:
        """Why the kubelet can't mount a volume of this pod, if it has lately said so."""
        event = await self._last_event(namespace, uid, "FailedMount")
        told = moment(event.get("lastTimestamp")) if event else None
        if event is None or told is None or datetime.now(UTC) - told > STILL_TRUE:
            return None
        return str(event["message"])

    async def _last_event(self, namespace: str, uid: str, reason: str) -> JsonObject | None:
        query = {"fieldSelector": f"involvedObject.uid={uid},reason={reason}"}
        found = await self._request("GET", _collection("Event", namespace), query=query)
        events = sorted(found["items"] or (), key=lambda each: each.get("lastTimestamp") or "")
        return events[-1] if events else None

    async def node_labels(self, label: str) -> tuple[Mapping[str, str], ...]:
        """Labels of the nodes that have this one, up to a minute old; raises ForbiddenError."""
        when, known = self._nodes.get(label, (0.0, ()))
        if label not in self._nodes or time.monotonic() - when > NODES_SECONDS:
            found = [node["metadata"]["labels"] async for node in self._list("Node", "", label)]
            known = tuple(found)
            self._nodes[label] = (time.monotonic(), known)
        return known

    async def watched_versions(self, namespaces: tuple[str, ...]) -> dict[str, str]:
        """The resourceVersion by uid of all objects that the operator watches, read from the API
        server."""
        versions: dict[str, str] = {}
        for kind in WATCHED:
            async for item in self.in_brief(kind, namespaces):
                versions[item["metadata"]["uid"]] = item["metadata"]["resourceVersion"]
        return versions

    async def in_brief(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[JsonObject]:
        """The metadata of all objects of a kind that are the operator's, read from the API
        server."""
        selector = WATCHED.get(kind, CHILDREN_SELECTOR)
        for namespace in namespaces or ("",):
            async for item in self._list(kind, namespace, selector):
                yield item

    async def any_finetunejob(self, namespaces: tuple[str, ...]) -> bool:
        """Whether there is a FineTuneJob; raises where the API server doesn't serve the Kind."""
        for namespace in namespaces or ("",):
            page = await self._request("GET", _collection(KIND, namespace), query={"limit": "1"})
            if page.get("items"):
                return True
        return False

    async def _list(self, kind: str, namespace: str, selector: str) -> AsyncIterator[JsonObject]:
        query = {"limit": str(PAGE), "labelSelector": selector}
        while True:
            page = await self._request(
                "GET", _collection(kind, namespace), query=query, accept=METADATA_ONLY
            )
            for item in page["items"] or ():  # null where there is none
                yield item
            query["continue"] = page["metadata"].get("continue") or ""
            if not query["continue"]:
                return

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: JsonObject | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> JsonObject:
        began, code = time.monotonic(), "200"
        headers = {"Accept": accept, "Content-Type": content_type}
        token = await self._configuration.get_api_key_with_prefix("BearerToken")
        if token:
            headers["Authorization"] = token
        try:
            async with self._http.request(
                method,
                self._configuration.host + path,
                params={key: value for key, value in (query or {}).items() if value},
                headers=headers,
                data=json.dumps(body).encode() if body is not None else None,
                proxy_headers=self._configuration.proxy_headers,
                server_hostname=self._configuration.tls_server_name,
            ) as response:
                answer = await response.read()
                if not response.ok:
                    code = str(response.status)
                    raise _refusal(response.status, response.reason, answer, f"{method} {path}")
                return cast(JsonObject, json.loads(answer))
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:  # or no JSON
            code = "timeout" if isinstance(error, TimeoutError) else "error"
            message = f"{method} {path}: {error or type(error).__name__}"
            raise UnavailableError(message) from error
        finally:
            self._count(method, code, time.monotonic() - began)


def _proxy_of_environment(server: str) -> str | None:
    """The proxy that HTTPS_PROXY names, unless NO_PROXY names the API server."""
    url = urlsplit(server)
    if url.hostname is None or proxy_bypass(url.hostname) or proxy_bypass(url.netloc):
        return None
    return getproxies().get(url.scheme)


async def _configuration() -> client.Configuration:
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(
                config_file=os.environ.get("KUBECONFIG"),
                client_configuration=configuration,
                persist_config=False,
            )
    except config.ConfigException as error:
        raise UnavailableError(f"No way to reach a cluster: {error}") from error
    return configuration


def _path(kind: str, meta: Mapping[str, Any]) -> str:
    return PATHS[kind].format(namespace=meta["namespace"])


def _collection(kind: str, namespace: str) -> str:
    """Path of all objects of a kind, in one namespace or (empty) in all."""
    part = f"/namespaces/{namespace}" if namespace else ""
    return PATHS[kind].replace("/namespaces/{namespace}", part)


def _refusal(code: int, words: str | None, body: bytes, what: str) -> ClusterError:
    status = _status(body)
    detail = str(status.get("message") or words)
    kind = ERROR_BY_STATUS.get(code, UnavailableError)
    if code == 409 and status.get("reason") == "AlreadyExists":
        kind = AlreadyExistsError
    if code in {400, 422} and _names_a_field(status, detail):
        kind = InvalidError
    if code == 500 and WEBHOOK_AWAY in detail:
        kind = DeniedError
    return kind(f"{what}: {detail}", detail)


def _names_a_field(status: Mapping[str, Any], detail: str) -> bool:
    """Whether the API server itself finds fault with a field.

    Policies and webhooks deny with the same codes (422 and 400), but name no field: they are set up
    by somebody else than who wrote the spec.
    """
    if detail.startswith("admission webhook"):
        return False
    causes = (status.get("details") or {}).get("causes") or []
    return UNDECODABLE in detail or any(cause.get("field") for cause in causes)


def _status(body: bytes) -> Mapping[str, Any]:
    """The meta/v1 Status in the body of a refusal."""
    try:
        status = json.loads(body or "{}")
    except ValueError:
        return {}
    return status if isinstance(status, dict) else {}


def _event(
    about: Mapping[str, Any], kind: str, reason: str, message: str, scope: str = ""
) -> JsonObject:
    # The name is a function of the words, so that the same words twice are one Event.
    words = "/".join((about["uid"], *([scope] if scope else []), reason, message))
    said = hashlib.sha256(words.encode()).hexdigest()[:16]
    name = f"{about['name'][:200].rstrip('-.')}.{said}"
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": about["namespace"]},
        "involvedObject": {"apiVersion": API_VERSION, "kind": KIND, **about},
        "type": kind,
        "reason": reason,
        "message": message,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": OPERATOR},
        "reportingComponent": OPERATOR,
        "reportingInstance": socket.gethostname(),
    }
