"""What can be set in the chart, what Helm refuses, and that the operator gets all of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from finetune_operator.api import ModelCache
from finetune_operator.settings import PREFIX, Settings
from hack import chart
from hack.cluster import versions
from tests.chart import CHART, environment, loaded, named, operators_pod, render, render_all

CACHE = {"image": {"reference": "r/m:1"}}
REPORTS = "https://minio.example/{bucket}/{key}"
DIGEST = "sha256:" + "0a" * 32
# A value of the chart for each of the operator's settings, other than the default.
SETTINGS: dict[str, tuple[dict[str, Any], object]] = {
    "trainer_image": ({"trainer": {"image": {"repository": "r/t", "tag": "1"}}}, "r/t:1"),
    "stages": ({"stages": {"train": {"runtimeClassName": "nvidia"}}}, None),
    "model_cache": ({"modelCache": CACHE}, ModelCache.model_validate(CACHE)),
    "image_pull_policy": ({"trainer": {"image": {"pullPolicy": "Always"}}}, "Always"),
    "image_pull_secrets": ({"imagePullSecrets": ["a", {"name": "b"}]}, ("a", "b")),
    "trainer_log_format": ({"trainer": {"logFormat": "json"}}, "json"),
    "namespaces": ({"watchNamespaces": ["a", "b"]}, ("a", "b")),
    "workers": ({"workers": 3}, 3),
    "health_port": ({"healthPort": 9090}, 9090),
    "web_port": ({"web": {"enabled": True, "port": 9091}}, 9091),
    "web_address": ({"web": {"enabled": True, "service": {"enabled": True}}}, "*"),
    "web_namespaces": ({"web": {"enabled": True, "namespaces": ["a"]}}, ("a",)),
    "web_report_url": ({"web": {"enabled": True, "reportUrl": REPORTS}}, REPORTS),
    "lease": ({}, "finetune-system/finetune-operator"),
    "lease_seconds": ({"leaderElection": {"leaseSeconds": 2.5}}, 2.5),
    "resync_seconds": ({"resyncSeconds": 60}, 60),
    "secret_grace_seconds": ({"secretGraceSeconds": 0}, 0),
    "disruption_limit": ({"disruptionLimit": 2}, 2),
    "request_timeout_seconds": ({"requestTimeoutSeconds": 0.5}, 0.5),
    "log_format": ({"logFormat": "human"}, "human"),
    "log_level": ({"logLevel": "DEBUG"}, "DEBUG"),
}
OF_THE_INSTALLATION = {"trainer_image", "lease", "identity"}


def test_every_setting_of_the_operator_is_a_value() -> None:
    assert set(SETTINGS) | {"identity"} == set(Settings.model_fields)
    assert environment()[PREFIX + "IDENTITY"] == "metadata.name"


@pytest.mark.parametrize("field", SETTINGS)
def test_a_value_reaches_the_operator(field: str) -> None:
    values, expected = SETTINGS[field]
    found = getattr(Settings.from_environment(environment(**values)), field)
    assert found == (values["stages"] if expected is None else expected)


def test_the_charts_defaults_are_the_operators() -> None:
    found = Settings.from_environment(environment())
    for name, field in Settings.model_fields.items():
        if name not in OF_THE_INSTALLATION:
            assert getattr(found, name) == field.default, name


def test_a_port_of_ones_own_is_the_probes_too() -> None:
    pod = operators_pod(healthPort=9090, extraArgs=["--help"])
    [container] = pod["containers"]
    assert container["ports"] == [{"name": "health", "containerPort": 9090}]
    assert container["readinessProbe"]["httpGet"]["port"] == "health"
    assert container["args"] == ["--help"]


PROXY = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "proxy"}}}]


def test_the_page_is_reached_by_a_port_forward_alone_unless_it_has_a_service() -> None:
    objects = render(web={"enabled": True}, networkPolicy={"enabled": True})
    [container] = named(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {"name": "web", "containerPort": 8081} in container["ports"]
    assert "FINETUNE_WEB_ADDRESS" not in environment(web={"enabled": True})
    assert Settings.from_environment(environment(web={"enabled": True})).web_address == "127.0.0.1"
    assert "Service" not in {each["kind"] for each in objects}
    assert len(named(objects, "NetworkPolicy")["spec"]["ingress"]) == 1
    # Without the switch, the rest of its settings changes nothing.
    assert render(web={"service": {"enabled": True}, "port": 9091}) == render()


def test_the_pages_service_leads_to_it_and_can_be_kept_for_a_proxy() -> None:
    page = {"enabled": True, "service": {"enabled": True, "annotations": {"a": "b"}}}
    objects = render(web=page | {"allowFrom": PROXY}, networkPolicy={"enabled": True})
    service = named(objects, "Service", "finetune-operator-web")
    pod = named(objects, "Deployment")["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] in {
        each["name"] for each in pod["spec"]["containers"][0]["ports"]
    }
    assert service["metadata"]["annotations"] == {"a": "b"}
    _, rule = named(objects, "NetworkPolicy")["spec"]["ingress"]
    assert rule == {"ports": [{"port": "web", "protocol": "TCP"}], "from": PROXY}
    for each in objects:
        kubernetes_validate.validate(each, "1.37", strict=True)


def test_names_of_objects_stay_within_63_letters() -> None:
    """Also of a long release, whose operator keeps the name that it had."""
    long = "a" * 60
    objects = render(
        fullnameOverride=long,
        demoStore={"enabled": True},
        web={"enabled": True, "service": {"enabled": True}},
        metrics={"service": {"enabled": True}},
    )
    services = {each["metadata"]["name"] for each in objects if each["kind"] == "Service"}
    assert services == {
        f"{'a' * (63 - len(end))}{end}" for end in ("-demo-store", "-web", "-metrics")
    }
    assert named(objects, "Deployment", long)


def test_a_setting_of_the_operator_is_set_by_its_value_alone() -> None:
    """Twice in a list of variables, the last one would win without a word."""
    with pytest.raises(Exception, match="FINETUNE_WORKERS is a setting of the operator"):
        render(extraEnv=[{"name": "FINETUNE_WORKERS", "value": "3"}])


def test_images_are_pinned_by_their_digests() -> None:
    pinned = {"repository": "r.example.com/o", "tag": "1", "digest": DIGEST}
    values = {"image": pinned, "trainer": {"image": pinned}}
    assert operators_pod(**values)["containers"][0]["image"] == f"r.example.com/o:1@{DIGEST}"
    assert environment(**values)["FINETUNE_TRAINER_IMAGE"] == f"r.example.com/o:1@{DIGEST}"


def test_secrets_for_pulling_are_objects_or_names() -> None:
    secrets = ["a", {"name": "b"}]
    objects = render_all(imagePullSecrets=secrets)
    expected = [{"name": "a"}, {"name": "b"}]
    deployment = named(objects, "Deployment")
    assert deployment["spec"]["template"]["spec"]["imagePullSecrets"] == expected
    assert named(objects, "Pod", "finetune-operator-test")["spec"]["imagePullSecrets"] == expected


def test_openshift_gives_the_user_itself() -> None:
    nobody = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"))
    found = operators_pod(podSecurityContext=nobody)["securityContext"]
    assert found == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_an_account_of_ones_own_is_taken() -> None:
    objects = render(serviceAccount={"create": False, "name": "mine"})
    assert "ServiceAccount" not in [each["kind"] for each in objects]
    deployment = named(objects, "Deployment")
    assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == "mine"


def test_the_definition_goes_with_the_chart_only_where_that_is_asked_for() -> None:
    kind, name = "CustomResourceDefinition", "finetunejobs.finetune.dev"
    assert named(render(), kind, name)["metadata"]["annotations"]
    assert not named(render(crds={"keep": False}), kind, name)["metadata"]["annotations"]


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"trainer": {"image": {"repo": "r"}}}, "/trainer/image"),
        ({"replicas": 2}, "replicas"),
        ({"workers": "many"}, "/workers"),
        ({"workers": 0}, "/workers"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"imagePullSecrets": [{"secret": "a"}]}, "/imagePullSecrets/0"),
        ({"watchNamespaces": "team-a"}, "/watchNamespaces"),
        ({"stages": {"trian": {}}}, "/stages"),
        ({"stages": {"train": {"resources": {"limit": {}}}}}, "/stages/train/resources"),
        ({"stages": {"train": {"tolerations": {"key": "gpu"}}}}, "/stages/train/tolerations"),
        ({"admission": {"policies": [{"name": "a", "image": []}]}}, "/admission/policies/0"),
        ({"podLabels": {"team": 7}}, "/podLabels/team"),
        ({"extraEnv": [{"value": "x"}]}, "/extraEnv/0"),
        ({"web": {"reportUrl": "javascript:alert({key})"}}, "/web/reportUrl"),
        ({"metrics": {"rules": {"enabled": "yes"}}}, "/metrics/rules/enabled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_helm_refuses_a_wrong_value_with_its_path(values: dict[str, Any], path: str) -> None:
    with pytest.raises(helm.HelmValuesError) as refused:
        loaded().validate_schema(values)
    assert path in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        *(values for values, _ in SETTINGS.values()),
        {"podSecurityContext": {"runAsUser": None}},
        {"stages": {"train": {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "32Gi"}}}}},
        {"resources": {"limits": {"cpu": 2}}},
        {"affinity": {"nodeAffinity": {}}, "nodeSelector": {"a": "b"}},
        {"global": {"imageRegistry": "r"}},
        {"admission": {"policies": [{"name": "a", "queues": ["b"], "namespaces": ["c"]}]}},
        {
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
            ]
        },
    ],
)
def test_helm_takes_what_is_right(values: dict[str, Any]) -> None:
    loaded().validate_schema(values)


def test_each_examples_commented_lines_are_values_too() -> None:
    """What values.yaml shows as an example is right when its `#` is taken away."""
    text = (CHART / "values.yaml").read_text()
    stages = "stages:\n" + _uncommented(text, "stages: {}")
    policies = "admission:\n  policies:\n" + _uncommented(text, "  policies: []")
    for example in (stages, policies):
        assert yaml.safe_load(example)
        loaded().validate_schema(yaml.safe_load(example))


def _uncommented(text: str, after: str) -> str:
    lines = text.partition(after + "\n")[2].splitlines()
    block = lines[: next(n for n, line in enumerate(lines) if not line.strip().startswith("#"))]
    assert block
    return "\n".join(line.replace("# ", "  ", 1) for line in block)


def test_schema_and_readme_are_fresh(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / chart.CHART)
    chart.generate(tmp_path)
    for name in ("values.schema.json", "README.md"):
        assert (tmp_path / chart.CHART / name).read_text() == (CHART / name).read_text(), (
            "run `make generate`"
        )


def test_a_key_without_a_comment_is_refused() -> None:
    with pytest.raises(ValueError, match="line 3: no comment above b"):
        chart.read_values("# Words.\na: 1\nb: 2\n")


def test_lint_finds_what_is_wrong(tmp_path: Path) -> None:
    broken = tmp_path / "finetune-operator"
    shutil.copytree(CHART, broken)
    (broken / "templates" / "broken.yaml").write_text("a: {{ .Values.nothing.there }}\n")
    assert any("nothing" in found for found in chart.lint(broken))


def test_the_readme_says_which_kubernetes_it_needs() -> None:
    text = (CHART / "README.md").read_text()
    assert f"Kubernetes 1.{versions.MINORS[0]} or newer" in text
