"""Everything that the main job needs, brought up on this machine: cluster, images, store, operator.

The demo takes the chart's own store, inside the cluster. The end-to-end tests have one beside it,
which is there in seconds; all else they share. Each step finds out what is there already; a second
run costs seconds.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm

from examples.base_model import smollm2
from hack import REPOSITORY, object_store, state_dir
from hack.cluster import provider, versions
from hack.images.build import DEMO_STORE, Images, build_image, build_images
from hack.progress import step

NAMESPACE = "finetune-demo"
OPERATOR_NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"
EXAMPLE = REPOSITORY / "examples" / "finetunejob.yaml"
DATASETS = [
    REPOSITORY / "examples" / "data" / name for name in ("lumora-nest.csv", "lumora-nest-eval.csv")
]
BUCKETS = ("datasets", "models", "artifacts")
SECRET = "object-store"
STORE_PORT = 30833
"""Port of the node by which pods and this machine reach the chart's store: there may be no DNS."""

NODE_ADDRESS = """{.items[0].status.addresses[?(@.type=="InternalIP")].address}"""
STORE_SECONDS = 180


@dataclass(frozen=True)
class Environment:
    """A cluster with the operator on it, and an object store that its pods reach."""

    name: str
    cluster: provider.Cluster
    store: object_store.Credentials

    @property
    def downloads(self) -> Path:
        """Where files from the store are put."""
        return state_dir(self.name) / "downloads"

    def kubectl(self, *args: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess
        """Run kubectl in the demo's namespace."""
        return self.cluster.kubectl("--namespace", NAMESPACE, *args, input=input)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """Read one object of the demo's namespace."""
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found

    def items(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        """List the objects of one kind in the demo's namespace."""
        text = self.kubectl("get", kind, "--selector", selector, "-o", "json")
        found: list[dict[str, Any]] = json.loads(text)["items"]
        return found

    def reader(self, name: str) -> Callable[[], dict[str, Any]]:
        """A function that reads the FineTuneJob anew at each call."""
        return lambda: self.get("finetunejob", name)


def bring_up(name: str) -> Environment:
    """Bring up what is not there yet; returns when a FineTuneJob can be applied."""
    cluster, images = _cluster_with_images(name)
    store = _store(name, cluster)
    credentials = store.start()
    fill(store)
    environment = Environment(name, cluster, credentials)
    install_operator(cluster, image_settings(images))
    create_namespace(cluster)
    create_secret(environment)
    return environment


def bring_up_demo(name: str) -> Environment:
    """The same as a user of the chart has it: its demoStore is the object store."""
    cluster, images = _cluster_with_images(name)
    image = build_image(DEMO_STORE)
    cluster.load_image(image.archive, image.reference)
    create_namespace(cluster)
    address = cluster.kubectl("get", "nodes", f"--output=jsonpath={NODE_ADDRESS}")
    endpoint = f"http://{address}:{STORE_PORT}"
    store = {
        "enabled": True,
        "image": image_values(image.reference),
        "secretNamespaces": [NAMESPACE],
        "service": {"type": "NodePort", "nodePort": STORE_PORT},
        "endpoint": endpoint,
    }
    install_operator(cluster, {**image_settings(images), "demoStore": store})
    with step("Object store (demoStore): the sample CSV and the base model"):
        what = ("rollout", "status", f"deployment/{RELEASE}-demo-store")
        cluster.kubectl(*what, "-n", OPERATOR_NAMESPACE, f"--timeout={STORE_SECONDS}s")
    return Environment(name, cluster, _credentials(cluster, endpoint))


def _cluster_with_images(name: str) -> tuple[provider.Cluster, Images]:
    cluster = provider.choose(name)
    cluster.up()
    images = build_images()
    for image in (images.operator, images.trainer):
        cluster.load_image(image.archive, image.reference)
    return cluster, images


def _credentials(cluster: provider.Cluster, endpoint: str) -> object_store.Credentials:
    """The keys that the chart has generated."""
    found = cluster.kubectl("get", "secret", SECRET, "-n", NAMESPACE, "-o", "json")
    keys = {
        name: base64.b64decode(text).decode() for name, text in json.loads(found)["data"].items()
    }
    return object_store.Credentials(
        endpoint, keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"]
    )


def take_down(name: str) -> None:
    """Remove everything that bring_up started."""
    cluster = provider.choose(name)
    _store(name, cluster).remove()
    cluster.down()
    shutil.rmtree(state_dir(name), ignore_errors=True)


def _store(name: str, cluster: provider.Cluster) -> object_store.ObjectStore:
    return object_store.ObjectStore(state_dir(name) / "object-store", cluster.node_address)


def fill(store: object_store.ObjectStore) -> None:
    """Put the sample's files and the base model into their buckets."""
    with step("Buckets: the sample CSV and the base model"):
        for bucket in BUCKETS:
            store.create_bucket(bucket)
        s3 = store.client()
        for file in DATASETS:
            s3.upload_file(str(file), "datasets", file.name)
        model = smollm2()
        for file in sorted(model.iterdir()):
            put_once(s3, file, "models", f"{model.name}/{file.name}")


def put_once(s3: Any, file: Path, bucket: str, key: str) -> None:
    """Upload a file unless one of its size is there: a new upload may get a new ETag."""
    held = s3.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", [])
    if not any(o["Key"] == key and o["Size"] == file.stat().st_size for o in held):
        s3.upload_file(str(file), bucket, key)


def image_settings(images: Images) -> dict[str, Any]:
    """The chart's values of the images that were just built."""
    return {
        "image": image_values(images.operator.reference),
        "trainer": {"image": image_values(images.trainer.reference)},
    }


def install_operator(cluster: provider.Cluster, values: dict[str, Any]) -> None:
    """Install or upgrade the chart."""
    chart = REPOSITORY / "charts" / "finetune-operator"
    server = json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]
    if int(server["minor"].rstrip("+")) not in versions.MINORS:
        apply_chart(cluster, chart, values)
        return
    with (
        step("Operator (helm install)"),
        helm.Config(kubeconfig_path=cluster.kubeconfig, namespace=OPERATOR_NAMESPACE) as config,
    ):
        if any(release["name"] == RELEASE for release in config.list()):
            config.upgrade(chart, RELEASE, values, wait="watcher", timeout=180)
        else:
            config.install(
                chart, RELEASE, values, wait="watcher", timeout=180, create_namespace=True
            )


def apply_chart(cluster: provider.Cluster, chart: Path, values: dict[str, Any]) -> None:
    """Apply the chart's objects to the last resort, Kubernetes 1.20, which the chart refuses."""
    with step("Operator (kubectl apply: this Kubernetes isn't supported)"):
        with (
            helm.Chart.load(chart) as loaded,
            helm.Config(kubeconfig_path=cluster.kubeconfig, namespace=OPERATOR_NAMESPACE) as config,
        ):
            known = values | {"admission": {"protectStatus": False}}  # 1.20 has no such policies
            rendered = config.render(loaded, known, name=RELEASE, namespace=OPERATOR_NAMESPACE)
        texts = [
            text
            for name, text in rendered.items()
            if name.endswith(".yaml") and "/tests/" not in name
        ]
        namespace = {"apiVersion": "v1", "kind": "Namespace"}
        namespace_text = json.dumps({**namespace, "metadata": {"name": OPERATOR_NAMESPACE}})
        objects = "\n---\n".join([namespace_text, *texts])
        unchecked = "--validate=false"  # it knows no rules in a definition
        cluster.kubectl("apply", unchecked, "-n", OPERATOR_NAMESPACE, "-f", "-", input=objects)
        rollout = ("rollout", "status", f"deployment/{RELEASE}", "--timeout=180s")
        cluster.kubectl(*rollout, "-n", OPERATOR_NAMESPACE)


def image_values(reference: str) -> dict[str, str]:
    """The chart's values of an image that is on the node already."""
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag, "pullPolicy": "Never"}


def create_namespace(cluster: provider.Cluster) -> None:
    """A namespace under the restricted Pod Security profile."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": NAMESPACE, "labels": labels}
    _apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})


def create_secret(environment: Environment) -> None:
    """The Secret with the store's credentials, in that namespace."""
    store = environment.store
    keys = {
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "AWS_ENDPOINT_URL_S3": store.endpoint,
    }
    metadata = {"name": SECRET, "namespace": NAMESPACE}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys}
    _apply(environment.cluster, secret)


def _apply(cluster: provider.Cluster, document: dict[str, Any]) -> None:
    cluster.kubectl("apply", "-f", "-", input=json.dumps(document))
