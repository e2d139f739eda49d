"""Everything that the main job needs, brought up on this machine: cluster, images, store, operator.

The demo and the end-to-end tests share it, so what the tests prove is what the demo shows. Each
step finds out what is there already; a second run costs seconds.
"""

from __future__ import annotations

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
from hack.images.build import Images, build_images
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


@dataclass(frozen=True)
class Environment:
    """A cluster with the operator on it, and an object store that its pods reach."""

    name: str
    cluster: provider.Cluster
    store: object_store.ObjectStore

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
    cluster = provider.choose(name)
    cluster.up()
    images = build_images()
    for image in (images.operator, images.trainer):
        cluster.load_image(image.archive, image.reference)
    store = _store(name, cluster)
    store.start()
    fill(store)
    environment = Environment(name, cluster, store)
    install_operator(cluster, images)
    create_namespace(environment)
    return environment


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


def install_operator(cluster: provider.Cluster, images: Images) -> None:
    """Install or upgrade the chart, with the images that were just built."""
    values = {
        "image": image_values(images.operator.reference),
        "trainer": {"image": image_values(images.trainer.reference)},
    }
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
        with helm.Chart.load(chart) as loaded:
            known = values | {"admission": {"protectStatus": False}}  # 1.20 has no such policies
            rendered = loaded.render(known, name=RELEASE, namespace=OPERATOR_NAMESPACE)
        texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
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


def create_namespace(environment: Environment) -> None:
    """A namespace under the restricted Pod Security profile, with the store's credentials."""
    store = environment.store
    objects = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": NAMESPACE,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": NAMESPACE},
            "stringData": {
                "AWS_ACCESS_KEY_ID": store.access_key,
                "AWS_SECRET_ACCESS_KEY": store.secret_key,
                "AWS_ENDPOINT_URL_S3": store.endpoint,
            },
        },
    ]
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    environment.cluster.kubectl("apply", "-f", "-", input=manifest)
