"""Kueue's real controller beside a control plane of this machine.

kueue = Kueue(plane, folder)
kueue.start()
kueue.add_queue("team-a", namespace, gpus=1)
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hack.cluster.components import LOOPBACK
from hack.cluster.control_plane import STOP_SECONDS, ControlPlane
from hack.cluster.pki import Authority
from hack.process import CommandFailed, Daemon, Unavailable, free_ports, is_free, wait_until

VARIABLE = "KUEUE"
DEFINITIONS = "kueue.yaml"
API_VERSION = "kueue.x-k8s.io/v1beta2"
FLAVOR = "default"
NAMESPACE = "kueue-system"
INSTALLED = {
    "Namespace",
    "CustomResourceDefinition",
    "MutatingWebhookConfiguration",
    "ValidatingWebhookConfiguration",
}
WEBHOOKS = ("kueue-mutating-webhook-configuration", "kueue-validating-webhook-configuration")
START_SECONDS = 120


def program() -> Path:
    """kueue, as the variable KUEUE or PATH names it; raises Unavailable where there is none."""
    named = os.environ.get(VARIABLE) or "kueue"
    found = shutil.which(named)
    if not found or not Path(found).with_name(DEFINITIONS).exists():
        raise Unavailable(
            f"there is no {named} with a {DEFINITIONS} beside it: run `go install "
            "sigs.k8s.io/kueue/cmd/kueue@v0.17.0`, put manifests.yaml of Kueue's release there by "
            f"that name, and name the program with {VARIABLE}"
        )
    return Path(found)


class Kueue:
    """Its controller and webhooks as a process; Jobs are all that it manages."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self._plane = plane
        self._folder = folder
        self._daemon = Daemon("kueue", folder)

    def start(self) -> None:
        """Install its definitions and start it; raises Unavailable where it is missing."""
        kueue = program()
        authority = Authority(self._folder / "pki")
        certificate, key = authority.issue("kueue", "kueue", [LOOPBACK])
        [port] = free_ports(LOOPBACK, 1)
        self._apply_definitions(kueue.with_name(DEFINITIONS), port, authority)
        certificates = _certificate_folder(self._folder / "certificates", certificate, key)
        config = self._folder / "kueue-config.yaml"
        config.write_text(yaml.safe_dump(_configuration(port, certificates)))
        command = [
            str(kueue),
            f"--config={config}",
            "--feature-gates=VisibilityOnDemand=false",
        ]
        environment = {**os.environ, "KUBECONFIG": str(self._plane.kubeconfig)}
        wrapped = _with_certificates_in_etc(command, self._folder, certificates)
        self._daemon.start(wrapped, detached=False, env=environment)
        wait_until(
            lambda: not is_free(LOOPBACK, port), what="Kueue's webhooks", seconds=START_SECONDS
        )
        flavor = _object("ResourceFlavor", FLAVOR, {})
        wait_until(lambda: self._accepts(flavor), what="Kueue", seconds=START_SECONDS)

    def stop(self) -> None:
        """End it, with its webhooks, without which no Job could be created."""
        webhooks = "mutatingwebhookconfigurations,validatingwebhookconfigurations"
        self._plane.kubectl("delete", webhooks, *WEBHOOKS, "--ignore-not-found")
        self._daemon.stop(seconds=STOP_SECONDS)

    def add_queue(
        self, name: str, namespace: str, *, gpus: int = 0, cpus: int | None = None
    ) -> None:
        """A LocalQueue with a ClusterQueue of its own, whose quota counts GPUs or CPUs alone.

        A more urgent Job preempts a less urgent one. A queue that is there gets this quota.
        """
        resource = "nvidia.com/gpu" if cpus is None else "cpu"
        quota = [{"name": resource, "nominalQuota": gpus if cpus is None else cpus}]
        group = {
            "coveredResources": [resource],
            "flavors": [{"name": FLAVOR, "resources": quota}],
        }
        cluster_queue = {
            "namespaceSelector": {},
            "resourceGroups": [group],
            "preemption": {"withinClusterQueue": "LowerPriority"},
        }
        self._apply(_object("ClusterQueue", _shared(name, namespace), cluster_queue))
        self.share_queue(name, of=namespace, namespace=namespace)

    def share_queue(self, name: str, *, of: str, namespace: str, alias: str = "") -> None:
        """A LocalQueue in another namespace or of another name, with the same quota."""
        local = _object("LocalQueue", alias or name, {"clusterQueue": _shared(name, of)})
        local["metadata"]["namespace"] = namespace
        self._apply(local)

    def hold(self, name: str, namespace: str, *, held: bool) -> None:
        """Let a LocalQueue admit nothing more, or admit again."""
        patch = json.dumps({"spec": {"stopPolicy": "Hold" if held else "None"}})
        self._plane.kubectl(
            "patch", "localqueue", name, "-n", namespace, "--type=merge", "-p", patch
        )

    def delete_queue(self, name: str, namespace: str) -> None:
        """Delete the LocalQueue."""
        self._plane.kubectl("delete", "localqueue", name, "-n", namespace, "--wait=false")

    def _accepts(self, body: Mapping[str, Any]) -> bool:
        try:
            self._apply(body)
        except CommandFailed:  # its webhooks don't answer yet
            return False
        return True

    def _apply(self, body: Mapping[str, Any]) -> None:
        self._plane.kubectl("apply", "-f", "-", input=json.dumps(body))

    def _apply_definitions(self, file: Path, port: int, authority: Authority) -> None:
        bundle = base64.b64encode(authority.certificate.read_bytes()).decode()
        url = f"https://{LOOPBACK}:{port}"
        text = file.read_text().replace("WEBHOOK_URL", url).replace("CA_BUNDLE", bundle)
        objects = [
            reached_by(each, url, bundle)
            for each in yaml.load_all(text, Loader=yaml.CSafeLoader)
            if each and each["kind"] in INSTALLED
        ]
        target = self._folder / DEFINITIONS
        target.write_text(yaml.dump_all(objects, Dumper=yaml.CSafeDumper))
        self._plane.apply_definitions(str(target), "--server-side")


def reached_by(value: Any, url: str, bundle: str) -> Any:
    """The same object with each webhook at this address, where it was a Service of the cluster."""
    if isinstance(value, list):
        return [reached_by(each, url, bundle) for each in value]
    if not isinstance(value, dict):
        return value
    if "service" in value.get("clientConfig", {}):
        path = value["clientConfig"]["service"].get("path", "/")
        value = {**value, "clientConfig": {"url": url + path, "caBundle": bundle}}
    return {key: reached_by(each, url, bundle) for key, each in value.items()}


def _shared(name: str, namespace: str) -> str:
    return f"{namespace}-{name}"


def _object(kind: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _configuration(port: int, certificates: Path) -> Mapping[str, Any]:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": NAMESPACE,
        "webhook": {"host": LOOPBACK, "port": port, "certDir": str(certificates)},
        "internalCertManagement": {"enable": False},
        "leaderElection": {"leaderElect": False},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": f"{LOOPBACK}:0"},
        "integrations": {"frameworks": ["batch/job"]},
    }


def _certificate_folder(folder: Path, certificate: Path, key: Path) -> Path:
    """The names that controllers in Go expect."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(certificate, folder / "tls.crt")
    shutil.copy(key, folder / "tls.key")
    return folder


def _with_certificates_in_etc(command: list[str], folder: Path, certificates: Path) -> list[str]:
    """Kueue reads /etc/kueue/metrics/certs, whatever its configuration says. It sees an /etc of its
    own with them; the machine's stays as it is."""
    upper, work = folder / "etc", folder / "etc-work"
    target = upper / "kueue/metrics"
    target.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    shutil.copytree(certificates, target / "certs", dirs_exist_ok=True)
    options = f"lowerdir=/etc,upperdir={upper},workdir={work}"
    script = f'mount -t overlay overlay -o "{options}" /etc && exec "$@"'
    own = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *own, "--mount", "sh", "-c", script, "kueue", *command]
