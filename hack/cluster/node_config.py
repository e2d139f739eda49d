"""What the native node's daemons read: their configuration files, as values, and the pause image.

The pause image is that of the container that holds a pod's namespaces: one static program that
sleeps.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hack.cluster.components import NODE_NAME
from hack.cluster.node_network import NodeNetwork

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
PAUSE_IMAGE = "localhost/pause:1"
CNI_PLUGINS = Path("/usr/lib/cni")
UNUSED_PLUGINS = ("io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart")


@dataclass(frozen=True)
class Containerd:
    """Where the node's containerd keeps its data, and how it unpacks images."""

    root: Path
    cni: Path
    registries: Path
    """How to speak to a registry that has no TLS: `HOST/hosts.toml`, read at every pull."""

    snapshotter: str

    def config(self, major: int) -> str:
        """The configuration that this major version of containerd reads."""
        settings = self._version_3() if major >= 2 else self._version_2()
        return self._head(3 if major >= 2 else 2) + textwrap.dedent(settings)

    def _head(self, version: int) -> str:
        """All of its data in the state folder, its sockets in the node's own /run."""
        return textwrap.dedent(f"""\
            version = {version}
            root = {json.dumps(str(self.root))}
            state = "/run/containerd"
            disabled_plugins = [{", ".join(f'"{each}"' for each in UNUSED_PLUGINS)}]
            [grpc]
              address = "{CONTAINERD_SOCKET}"
            """)

    # The AppArmor profile would stay loaded in the machine's kernel, and without CAP_SYS_RESOURCE
    # a container can't be shielded from the OOM killer: both are left out.

    def _version_2(self) -> str:
        return f"""\
            [plugins."io.containerd.grpc.v1.cri"]
              sandbox_image = "{PAUSE_IMAGE}"
              restrict_oom_score_adj = true
              disable_apparmor = true
            [plugins."io.containerd.grpc.v1.cri".cni]
              bin_dir = "{CNI_PLUGINS}"
              conf_dir = {json.dumps(str(self.cni))}
            [plugins."io.containerd.grpc.v1.cri".registry]
              config_path = {json.dumps(str(self.registries))}
            [plugins."io.containerd.grpc.v1.cri".containerd]
              snapshotter = "{self.snapshotter}"
              default_runtime_name = "runc"
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
              runtime_type = "io.containerd.runc.v2"
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
              SystemdCgroup = false
            """

    def _version_3(self) -> str:
        return f"""\
            [plugins."io.containerd.cri.v1.images"]
              snapshotter = "{self.snapshotter}"
            [plugins."io.containerd.cri.v1.images".registry]
              config_path = {json.dumps(str(self.registries))}
            [plugins."io.containerd.cri.v1.images".pinned_images]
              sandbox = "{PAUSE_IMAGE}"
            [plugins."io.containerd.cri.v1.runtime"]
              restrict_oom_score_adj = true
              disable_apparmor = true
            [plugins."io.containerd.cri.v1.runtime".cni]
              bin_dirs = ["{CNI_PLUGINS}"]
              conf_dir = {json.dumps(str(self.cni))}
            [plugins."io.containerd.cri.v1.runtime".containerd]
              default_runtime_name = "runc"
            [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
              runtime_type = "io.containerd.runc.v2"
            [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
              SystemdCgroup = false
            """


def cni(network: NodeNetwork) -> dict[str, Any]:
    """The pods' network: a bridge in the node, with addresses handed out by the node itself."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": network.pod_range}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "0.4.0", "name": "finetune", "plugins": [bridge, portmap]}


def kubelet(network: NodeNetwork, ca: Path, cgroup: str, minor: int) -> dict[str, Any]:
    """The kubelet: pods in a cgroup of the cluster's own, access only by the API server.

    There is no cluster DNS; naming the node as the server makes a look-up fail at once instead
    of after seconds, and keeps a warning from every pod. A kubelet from 1.35 on starts on a machine
    with cgroup version 1 only when it is told to; 1.20's refuses the field.
    """
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(ca)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "clusterDNS": [network.node_address],
        "clusterDomain": "cluster.local",
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "1%", "nodefs.available": "1%"},
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "2s",
        "oomScoreAdj": 1,
        "readOnlyPort": 0,
        "resolvConf": "",
        **({"failCgroupV1": False} if minor >= 31 else {}),
    }


def kube_proxy(network: NodeNetwork, kubeconfig: Path) -> dict[str, Any]:
    """kube-proxy: everything is masqueraded, so that pods reach pods on their own bridge too.

    The connection tracking limits belong to the whole machine and are left as they are.
    """
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "mode": "iptables",
        "hostnameOverride": NODE_NAME,
        "clusterCIDR": network.pod_range,
        "iptables": {"masqueradeAll": True},
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = mode
    archive.addfile(entry, io.BytesIO(content))


def _layer(busybox: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        _add(layer, "busybox", busybox.read_bytes(), 0o755)
    return buffer.getvalue()


def write_pause_image(archive: Path, busybox: Path, architecture: str) -> Path:
    """Write the image as a docker-archive that containerd can import."""
    layer = _layer(busybox)
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": ["/busybox", "sleep", "2147483647"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    encoded = json.dumps(config).encode()
    name = f"{hashlib.sha256(encoded).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as image:
        _add(image, name, encoded)
        _add(image, "layer.tar", layer)
        _add(image, "manifest.json", json.dumps(manifest).encode())
    return archive
