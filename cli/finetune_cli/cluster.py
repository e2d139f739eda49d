"""The API server, with the user's own rights: kubeconfig, context and namespace as kubectl has
them. Objects are plain dicts; the client's exceptions become CliErrors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlencode

from finetune_cli.exits import CliError, ExitCode

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

JsonObject = dict[str, Any]

FIELD_MANAGER = "kubectl-finetune"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
CONNECT_SECONDS, ANSWER_SECONDS = 10, 60
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

_CODES = {
    400: ExitCode.USAGE,
    401: ExitCode.REFUSED,
    403: ExitCode.REFUSED,
    404: ExitCode.NOT_FOUND,
    409: ExitCode.REFUSED,
    422: ExitCode.USAGE,
}


@dataclass(frozen=True)
class Cluster:
    """A connection to the API server, and the namespace that is meant where none is named."""

    api: ApiClient = field(repr=False)
    namespace: str
    context: str
    named: bool = False
    """Whether the user named the namespace."""

    @classmethod
    def connect(
        cls, kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None
    ) -> Cluster:
        """Connect as the kubeconfig says, or as the pod's ServiceAccount; nothing is sent yet."""
        from kubernetes import client, config

        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of each retry
        settings = client.Configuration()
        kubeconfig = kubeconfig or os.environ.get("KUBECONFIG")
        try:
            if _in_pod() and not (kubeconfig or context):
                config.load_incluster_config(client_configuration=settings)
                found, default = "in-cluster", SERVICE_ACCOUNT.read_text().strip()
            else:
                config.load_kube_config(kubeconfig, context, client_configuration=settings)
                found, default = _context(kubeconfig, context)
        except (config.ConfigException, OSError, TypeError, KeyError) as error:
            raise CliError(
                ExitCode.UNREACHABLE,
                f"no cluster to speak to: {_one_line(str(error))} Name one with --kubeconfig, "
                "--context or the variable KUBECONFIG.",
            ) from error
        settings.retries = 1
        api = client.ApiClient(settings)
        api.user_agent = FIELD_MANAGER
        return cls(api, namespace or default or "default", found, bool(namespace))

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self.api.configuration.host)

    # FineTuneJobs

    def jobs(self, *, everywhere: bool = False, selector: str | None = None) -> list[JsonObject]:
        """The FineTuneJobs of the namespace, or of all."""
        path = self.jobs_path(None if everywhere else self.namespace)
        found = self.request("GET", path, query={"labelSelector": selector or ""})
        return list(found["items"] or ())

    def job(self, name: str) -> JsonObject:
        """One FineTuneJob; raises CliError where there is none."""
        return self.request("GET", f"{self.jobs_path(self.namespace)}/{name}")

    def patch_job(self, name: str, patch: JsonObject) -> JsonObject:
        """Change fields of a FineTuneJob by a merge patch."""
        path = f"{self.jobs_path(self.namespace)}/{name}"
        query = {"fieldManager": FIELD_MANAGER}
        return self.request("PATCH", path, body=patch, content_type=MERGE_PATCH, query=query)

    def apply_job(
        self, document: JsonObject, *, dry_run: bool = False, force: bool = False
    ) -> JsonObject:
        """Create or change a FineTuneJob by server-side apply; unknown fields are refused."""
        meta = document["metadata"]
        path = f"{self.jobs_path(meta.get('namespace') or self.namespace)}/{meta['name']}"
        query = {
            "fieldManager": FIELD_MANAGER,
            "fieldValidation": "Strict",
            "force": "true" if force else "",
            "dryRun": "All" if dry_run else "",
        }
        return self.request("PATCH", path, body=document, content_type=APPLY_PATCH, query=query)

    def jobs_path(self, namespace: str | None) -> str:
        """The API's path of the FineTuneJobs of a namespace, or of all."""
        from finetune_trainer.contract import GROUP, PLURAL, VERSION

        where = f"/namespaces/{namespace}" if namespace else ""
        return f"/apis/{GROUP}/{VERSION}{where}/{PLURAL}"

    # What belongs to one

    def events(self, uid: str) -> list[JsonObject]:
        """The Events about an object, the oldest first."""
        query = {"fieldSelector": f"involvedObject.uid={uid}"}
        path = f"/api/v1/namespaces/{self.namespace}/events"
        found = self.request("GET", path, query=query)["items"] or []
        return sorted(found, key=lambda each: str(each.get("lastTimestamp") or ""))

    def pods(self, uid: str, stage: str | None = None) -> list[JsonObject]:
        """The pods of a FineTuneJob's stages, the oldest first."""
        from finetune_operator.api import FINETUNEJOB_UID_LABEL, STAGE_LABEL

        wanted = f"{FINETUNEJOB_UID_LABEL}={uid}" + (f",{STAGE_LABEL}={stage}" if stage else "")
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        found = self.request("GET", path, query={"labelSelector": wanted})["items"] or []
        return sorted(found, key=lambda each: str(each["metadata"]["creationTimestamp"]))

    def log(
        self,
        pod: str,
        *,
        follow: bool = False,
        tail: int | None = None,
        since_seconds: int | None = None,
    ) -> Iterator[bytes]:
        """The log of a stage's pod, in pieces as they come; raises CliError also midway."""
        from finetune_operator.api import TRAINER_CONTAINER

        query = {
            "container": TRAINER_CONTAINER,
            "follow": "true" if follow else "",
            "tailLines": "" if tail is None else str(tail),
            "sinceSeconds": "" if since_seconds is None else str(since_seconds),
        }
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        with self._errors():
            answer = self._call("GET", path, query=query, patient=follow)
            yield from answer.stream(8192, decode_content=True)

    def may(self, verb: str, resource: str, group: str = "", namespace: str | None = None) -> bool:
        """Whether the user has a right (SelfSubjectAccessReview)."""
        resource, _, subresource = resource.partition("/")
        wanted = {
            "verb": verb,
            "group": group,
            "resource": resource,
            "subresource": subresource,
            "namespace": self.namespace if namespace is None else namespace,
        }
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": wanted},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return bool(self.request("POST", path, body=body)["status"].get("allowed"))

    # Requests

    def request(
        self,
        method: str,
        path: str,
        *,
        body: JsonObject | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> JsonObject:
        """Send a request, and return the object that is the answer."""
        with self._errors():
            answer = self._call(method, path, body=body, query=query, content_type=content_type)
            return cast(JsonObject, json.loads(answer.data))

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: JsonObject | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        patient: bool = False,
    ) -> Any:
        given = urlencode({key: value for key, value in (query or {}).items() if value})
        return self.api.call_api(
            f"{path}?{given}" if given else path,
            method,
            header_params={"Accept": "application/json, */*", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _preload_content=False,
            _request_timeout=(CONNECT_SECONDS, None if patient else ANSWER_SECONDS),
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Around a request and the reading of its answer."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise _refused(error, self) from error
        except (HTTPError, OSError, json.JSONDecodeError) as error:
            raise CliError(
                ExitCode.UNREACHABLE,
                f"the API server {self.server} can't be reached (context {self.context}): "
                f"{_one_line(str(error))} Check the network, HTTPS_PROXY and NO_PROXY.",
            ) from error


def _in_pod() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and SERVICE_ACCOUNT.is_file()


def _context(kubeconfig: str | None, name: str | None) -> tuple[str, str]:
    """Name and namespace of the context that is meant, or of the current one."""
    from kubernetes.config import kube_config

    files = kube_config.KubeConfigMerger(kubeconfig or kube_config.KUBE_CONFIG_DEFAULT_LOCATION)
    meant = kube_config.KubeConfigLoader(files.config, active_context=name).current_context
    return str(meant["name"]), str(meant["context"].get("namespace") or "")


def _refused(error: Any, cluster: Cluster) -> CliError:
    """What the API server says, in one line, with a remedy where there is a usual one."""
    try:
        said = str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
        said = str(text or error.reason or "")
    if not error.status:  # no answer at all, e.g. a certificate that isn't trusted
        words = f"the API server {cluster.server} can't be spoken to: {_one_line(said)}"
        return CliError(ExitCode.UNREACHABLE, words)
    away = error.status == 429 or error.status >= 500  # it may answer again soon
    code = ExitCode.UNREACHABLE if away else _CODES.get(error.status, ExitCode.FAILED)
    return CliError(code, f"{_one_line(said)}{_remedy(error.status, said, cluster)}")


def _remedy(status: int, said: str, cluster: Cluster) -> str:
    if status == 401:
        return f" Log in again: the credentials of context {cluster.context} are not accepted."
    if status == 403:
        return " Ask for the right, or see with `finetune doctor` which ones you have."
    if status == 404 and "could not find the requested resource" in said:
        return " FineTuneJobs are not installed in this cluster: `finetune doctor` says what is."
    if status == 404:
        return f" (namespace {cluster.namespace}; -n names another, `finetune list -A` all)"
    if status == 409 and "conflict" in said:
        return " Another tool owns these fields; --force-conflicts takes them over."
    return ""


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if line.endswith((".", "!", "?")) or not line else f"{line}."
