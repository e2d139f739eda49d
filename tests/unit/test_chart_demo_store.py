"""The chart's own object store, to try it with."""

from __future__ import annotations

import base64
from typing import Any

import kubernetes_validate
import pytest
import yaml

from finetune_operator.api.finetunejob import FineTuneJobSpec
from hack import REPOSITORY
from hack.images.build import DEMO_STORE, INPUTS
from tests.chart import named, render

STORE = "finetune-operator-demo-store"
QUICKSTART = REPOSITORY / "examples" / "quickstart.yaml"


def demo(**values: Any) -> list[dict[str, Any]]:
    return render(demoStore={"enabled": True, **values})


def text_of(secret: dict[str, Any], key: str) -> str:
    return base64.b64decode(secret["data"][key]).decode()


def test_it_is_there_only_where_it_is_asked_for() -> None:
    assert not [each for each in render() if "demo-store" in each["metadata"]["name"]]


@pytest.mark.parametrize("size", ["", "20Gi"])
def test_every_object_is_valid(size: str) -> None:
    objects = demo(volumeSize=size)
    for document in objects:
        kubernetes_validate.validate(document, "1.37", strict=True)
    claims = [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
    assert bool(claims) is bool(size)
    volumes = named(objects, "Deployment", STORE)["spec"]["template"]["spec"]["volumes"]
    assert ("persistentVolumeClaim" in volumes[0]) is bool(size)


def test_each_namespace_gets_the_keys_that_the_store_has() -> None:
    objects = demo(secretNamespaces=["a", "b"], secretName="s3")
    own = named(objects, "Secret", STORE)
    given = [o for o in objects if o["kind"] == "Secret" and o["metadata"]["name"] == "s3"]
    assert [each["metadata"]["namespace"] for each in given] == ["a", "b"]
    for each in given:
        for key in own["data"]:
            assert text_of(each, key) == text_of(own, key)
        endpoint = text_of(each, "AWS_ENDPOINT_URL_S3")
        assert endpoint == f"http://{STORE}.finetune-system.svc:8333"
    assert len(text_of(own, "AWS_SECRET_ACCESS_KEY")) == 40
    assert own["data"] != named(demo(), "Secret", STORE)["data"], "each installation has its own"


def test_its_pod_is_restricted_and_reached_at_its_s3_port_alone() -> None:
    objects = demo()
    pod = named(objects, "Deployment", STORE)["spec"]["template"]
    operator = named(objects, "Deployment")["spec"]
    ours = operator["template"]["spec"]
    assert pod["spec"]["securityContext"] == ours["securityContext"]
    [container] = pod["spec"]["containers"]
    assert container["securityContext"] == ours["containers"][0]["securityContext"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    policy = named(objects, "NetworkPolicy", STORE)["spec"]
    assert policy["ingress"] == [{"ports": [{"port": "s3", "protocol": "TCP"}]}]
    for selector in (
        policy["podSelector"]["matchLabels"],
        named(objects, "Service", STORE)["spec"]["selector"],
    ):
        assert selector.items() <= pod["metadata"]["labels"].items()
    assert not operator["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_quick_start_is_ten_lines_that_run_on_it() -> None:
    text = QUICKSTART.read_text()
    assert len(text.splitlines()) == 10
    spec = FineTuneJobSpec.model_validate(yaml.safe_load(text)["spec"])
    [secret] = [o for o in demo() if o["metadata"]["name"] == "object-store"]
    assert spec.storage.secret_ref is not None
    assert spec.storage.secret_ref.name == secret["metadata"]["name"]
    assert spec.model.token_secret_ref is None
    assert "nvidia" not in text
    files = {f"s3://datasets/{each.name}" for each in (REPOSITORY / "examples/data").glob("*.csv")}
    assert {spec.dataset.source, spec.dataset.eval_source} <= files


def test_the_image_has_what_the_quick_start_reads() -> None:
    assert "examples/data/*.csv" in INPUTS[DEMO_STORE]
    dockerfile = (REPOSITORY / "images" / DEMO_STORE / "Dockerfile").read_text()
    assert "/seed/datasets/" in dockerfile
    assert "/seed/models/smollm2-135m-instruct/" in dockerfile


def test_its_packages_are_the_pinned_ones() -> None:
    pinned = (REPOSITORY / "constraints" / "dev.txt").read_text().splitlines()
    own = (REPOSITORY / "images" / DEMO_STORE / "requirements.txt").read_text().splitlines()
    assert own
    assert set(own) <= set(pinned)
