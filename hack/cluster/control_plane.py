"""A real control plane on this machine: etcd, kube-apiserver and kube-controller-manager.

There is no node, so nothing runs: a test plays the kubelet by writing the status of pods. What is
real is all that the operator relies on: validation, RBAC, watches, Job and garbage collection.

    with ControlPlane(tmp_path) as plane:
        plane.kubectl("get", "namespaces")

Used as a context manager it can't outlive the process that started it. `start(detached=True)`
leaves it running for later processes, which find it again by its state folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import ssl
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from hack.cluster import binaries, components
from hack.cluster.components import LOOPBACK, USERS, Settings
from hack.cluster.pki import Authority, write_kubeconfig
from hack.cluster.versions import MINORS
from hack.process import ClusterError, Daemon, output, wait_until
from hack.progress import step

READY_SECONDS = 120
STOP_SECONDS = 3
"""The API server would wait for its watchers to leave; etcd has its data, so no need to."""


class ControlPlane:
    """etcd, kube-apiserver and kube-controller-manager with RBAC on, in one state folder."""

    def __init__(self, folder: Path, *, address: str = LOOPBACK) -> None:
        self.folder = folder
        self.address = address
        self.etcd = Daemon("etcd", folder)
        self.apiserver = Daemon("kube-apiserver", folder)
        self.manager = Daemon("kube-controller-manager", folder)
        self._settings_file = folder / "control-plane.json"
        self._pki = folder / "pki"

    # What its users need to know

    @property
    def settings(self) -> Settings:
        """Ports and tokens of this cluster, as its first start chose them."""
        try:
            return Settings.load(self._settings_file)
        except OSError as error:
            raise ClusterError(f"no control plane was started in {self.folder}") from error

    @property
    def layout(self) -> components.Layout:
        """Where its parts find their files and listen."""
        return components.Layout(self.folder, self.address, self.settings)

    @property
    def server(self) -> str:
        """The API server's URL."""
        return f"https://{self.address}:{self.settings.port}"

    @property
    def ca(self) -> Path:
        """The certificate that the API server's own certificate is checked with."""
        return self._pki / "ca.crt"

    @property
    def admin_token(self) -> str:
        """A bearer token of the group system:masters."""
        return self.settings.tokens["admin"]

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.user_kubeconfig("admin")

    @property
    def version(self) -> str:
        """The API server's version, such as v1.37.2."""
        return str(self._request("GET", "/version").json()["gitVersion"])

    @property
    def minor_version(self) -> int:
        """The 37 of v1.37.2."""
        return int(self.version.split(".")[1])

    def user_kubeconfig(self, user: str) -> Path:
        """The kubeconfig of one of USERS."""
        return self.folder / f"{user}.kubeconfig"

    def kubeconfig_for_service_account(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a fresh token of a service account, valid for a day."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        spec = {"expirationSeconds": 24 * 3600}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        token = str(self._request("POST", path, body).json()["status"]["token"])
        target = self.folder / "service-accounts" / f"{namespace}.{name}.kubeconfig"
        return write_kubeconfig(
            target, server=self.server, ca=self.ca, token=token, namespace=namespace
        )

    def kubectl(self, *args: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess
        """Run kubectl as the administrator and return what it printed."""
        command = [str(binaries.kubectl()), "--kubeconfig", str(self.kubeconfig), *args]
        return output(command, input=input)

    def apply_definitions(
        self,
        file: str,
        *how: str,
        input: str | None = None,  # noqa: A002 - as subprocess
    ) -> None:
        """Apply a file with custom resource definitions, and wait until they are served.

        The server checks each field; 1.20 can't.
        """
        validate = f"--validate={'strict' if self.minor_version in MINORS else 'false'}"
        self.kubectl("apply", validate, *how, "-f", file, input=input)
        wait_until(self._serves_definitions, what="the custom resources", seconds=READY_SECONDS)

    def _serves_definitions(self) -> bool:
        """Whether each is established; `kubectl wait` fails on one that has no conditions yet."""
        found = json.loads(self.kubectl("get", "crd", "-o", "json"))["items"]
        return all(
            any(
                condition["type"] == "Established" and condition["status"] == "True"
                for condition in definition.get("status", {}).get("conditions") or ()
            )
            for definition in found
        )

    # Its life

    def __enter__(self) -> Self:
        """Bring it up."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it; its data stays."""
        self.stop()

    def healthy(self) -> bool:
        """Whether all three processes live and the API server says that it is ready."""
        if not all(daemon.alive() for daemon in (self.etcd, self.apiserver, self.manager)):
            return False
        return self._responds("/readyz")

    def start(self, *, detached: bool = False, programs: dict[str, Path] | None = None) -> None:
        """Bring it up, or what of it is not running; returns when it is ready."""
        programs = programs or binaries.ensure(binaries.CONTROL_PLANE)
        if self.healthy():
            return
        self.stop()
        self._prepare()
        with step("Starting the Kubernetes control plane"):
            try:
                self._start_parts(programs, detached)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End its processes; its data stays, and `start` goes on from there."""
        for daemon in (self.manager, self.apiserver, self.etcd):
            daemon.stop(seconds=STOP_SECONDS)

    def remove(self) -> None:
        """End it and forget its data."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # How each part is started

    def _prepare(self) -> None:
        """Choose ports and tokens, or keep the earlier ones; write certificates and users."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self._choose_settings()
        settings.save(self._settings_file)
        authority = Authority(self._pki)
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        hosts = [*dict.fromkeys([LOOPBACK, self.address, components.SERVICE_ADDRESS, *names])]
        authority.issue("apiserver", "kube-apiserver", hosts)
        authority.issue("apiserver-kubelet-client", "kube-apiserver", organization="system:masters")
        authority.signing_key("service-account")
        for user in USERS:
            path = self.user_kubeconfig(user)
            write_kubeconfig(path, server=self.server, ca=self.ca, token=settings.tokens[user])
        users = self._pki / "tokens.csv"
        users.touch(mode=0o600)
        users.write_text(settings.token_file())

    def _choose_settings(self) -> Settings:
        try:
            earlier = Settings.load(self._settings_file)
        except OSError:
            return Settings.new(self.address)
        if earlier.usable(self.address):
            return earlier
        return Settings.new(self.address, earlier.tokens)

    def _start_parts(self, programs: dict[str, Path], detached: bool) -> None:
        layout = self.layout
        arm = {"ETCD_UNSUPPORTED_ARCH": "arm64"} if platform.machine() == "aarch64" else {}
        etcd = components.etcd(programs["etcd"], layout)
        self.etcd.start(etcd, detached=detached, env={**os.environ, **arm})
        apiserver = components.apiserver(programs["kube-apiserver"], layout)
        self.apiserver.start(apiserver, detached=detached)
        self._wait(self.apiserver, "/readyz")
        program = programs["kube-controller-manager"]
        self.manager.start(components.controller_manager(program, layout), detached=detached)
        self._wait(self.manager, "/api/v1/namespaces/default/serviceaccounts/default")

    def _wait(self, daemon: Daemon, path: str) -> None:
        """Wait until a path answers; fail at once, with the log's end, if a process dies."""

        def ready() -> bool:
            for part in (self.etcd, daemon):
                if not part.alive():
                    raise ClusterError(f"{part.name} ended; the end of {part.log}:\n{part.tail()}")
            return self._responds(path)

        wait_until(ready, what=f"{daemon.name} (log: {daemon.log})", seconds=READY_SECONDS)

    def _request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        context = ssl.create_default_context(cafile=str(self.ca))
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        with httpx.Client(verify=context, trust_env=False, headers=headers) as client:
            answer = client.request(method, f"{self.server}{path}", json=body, timeout=10)
        if answer.is_error:
            raise ClusterError(f"{method} {path}: {answer.status_code} {answer.text[:500]}")
        return answer

    def _responds(self, path: str) -> bool:
        try:
            self._request("GET", path)
        except (ClusterError, OSError, httpx.HTTPError):
            return False
        return True
