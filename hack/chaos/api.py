"""The API server with the administrator's eyes, past the proxy."""

from __future__ import annotations

import ssl
from typing import Any

import httpx

from hack.cluster.control_plane import ControlPlane

Raw = dict[str, Any]
PATHS = {
    "finetunejobs": "/apis/finetune.dev/v1alpha1",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
}
MERGE_PATCH = {"Content-Type": "application/merge-patch+json"}


class Away(Exception):  # noqa: N818 - a state of the server, not a mistake
    """The API server is not there at the moment."""


class Api:
    """Requests to one namespace; each raises Away while the API server is."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.namespace = namespace
        self.http = httpx.Client(
            base_url=plane.server,
            verify=ssl.create_default_context(cafile=str(plane.ca)),
            headers={"Authorization": f"Bearer {plane.admin_token}"},
            trust_env=False,
            timeout=httpx.Timeout(10, read=20),
        )

    def path(self, resource: str, name: str = "") -> str:
        """The path of a collection, or of one object."""
        base = f"{PATHS[resource]}/namespaces/{self.namespace}/{resource}"
        return f"{base}/{name}" if name else base

    def get(self, resource: str, name: str) -> Raw | None:
        """An object, or None where there is none."""
        answer = self._request("GET", self.path(resource, name))
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return _checked(answer)

    def create(self, resource: str, body: Raw) -> None:
        """Create an object, unless an earlier try whose answer was lost has."""
        answer = self._request("POST", self.path(resource), json=body)
        if answer.status_code != httpx.codes.CONFLICT:
            _checked(answer)

    def patch(self, resource: str, name: str, patch: Raw, part: str = "") -> bool:
        """Merge a patch; whether the object was there."""
        path = self.path(resource, name) + part
        answer = self._request("PATCH", path, json=patch, headers=MERGE_PATCH)
        return answer.is_success

    def delete(self, resource: str, name: str, **options: Any) -> bool:
        """Delete an object as kubectl does; whether it was there."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", **options}
        answer = self._request("DELETE", self.path(resource, name), json=body)
        return answer.is_success

    def evict(self, pod: str) -> bool:
        """Ask for a pod's eviction, as a drain does; whether it was granted."""
        meta = {"name": pod, "namespace": self.namespace}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
        return self._request("POST", self.path("pods", pod) + "/eviction", json=body).is_success

    def _request(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            answer = self.http.request(method, path, **more)
        except httpx.TransportError as error:
            raise Away(str(error)) from error
        if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise Away(answer.text[:200])
        return answer


def _checked(answer: httpx.Response) -> Raw:
    if not answer.is_success:
        raise ValueError(f"{answer.request.url}: {answer.text[:500]}")
    found: Raw = answer.json()
    return found
