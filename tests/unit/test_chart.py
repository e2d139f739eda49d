"""The chart renders, validates for the newest Kubernetes, and grants exactly what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from finetune_operator.api import ModelCache
from finetune_operator.api.observed import FineTuneJobStatus
from finetune_operator.settings import Settings
from hack.chart import lint
from hack.cluster import versions
from tests.chart import CHART, environment, named, render, render_all

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "crds"


def test_lints_without_warnings() -> None:
    assert lint(CHART) == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"watchNamespaces": ["team-a", "team-b"]},
        {
            "imagePullSecrets": ["pull", {"name": "another"}],
            "podLabels": {"team": "ml"},
            "podAnnotations": {"note": "x"},
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"operator": "Exists"}],
            "priorityClassName": "high",
        },
        {"crds": {"enabled": False}},
        {"replicaCount": 2, "leaderElection": {"leaseSeconds": 20}},
    ],
    ids=["defaults", "two namespaces", "every pod setting", "without the CRD", "two operators"],
)
def test_renders_valid_objects(values: dict[str, Any]) -> None:
    objects = render(**values)
    for document in objects:
        kubernetes_validate.validate(document, "1.37", strict=True)
    kinds = [o["kind"] for o in objects]
    assert ("CustomResourceDefinition" in kinds) is values.get("crds", {}).get("enabled", True)


def granted(role: Any) -> dict[tuple[str, str], list[str]]:
    return {
        (group, resource): sorted(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_the_operator_may_do_exactly_this() -> None:
    everywhere = granted(named(render(), "ClusterRole"))
    assert everywhere.pop(("", "nodes")) == ["list"]
    assert everywhere == granted(named(render(watchNamespaces=["team-a"]), "Role"))
    assert everywhere == {
        ("finetune.dev", "finetunejobs"): ["get", "list", "watch"],
        ("finetune.dev", "finetunejobs/status"): ["patch"],
        ("finetune.dev", "finetunejobs/finalizers"): ["update"],
        ("batch", "jobs"): ["create", "delete", "get", "list", "patch", "watch"],
        ("", "pods"): ["list", "watch"],
        ("", "configmaps"): ["create", "delete", "get", "list"],
        ("", "serviceaccounts"): ["create", "delete", "get", "list"],
        ("rbac.authorization.k8s.io", "roles"): ["create", "delete", "get", "list"],
        ("rbac.authorization.k8s.io", "rolebindings"): ["create", "delete", "get", "list"],
        ("", "events"): ["create", "list", "patch"],
        ("kueue.x-k8s.io", "workloads"): ["list"],
    }


def test_several_operators_need_one_that_leads() -> None:
    with pytest.raises(helm.HelmError, match="one has to lead"):
        render(replicaCount=2, leaderElection={"enabled": False})
    assert named(render(replicaCount=2), "Deployment")["spec"]["replicas"] == 2


def test_the_right_to_list_nodes_can_be_kept_back() -> None:
    role = named(render(rbac={"readNodes": False}), "ClusterRole")
    assert ("", "nodes") not in granted(role)


def test_the_stages_log_as_the_chart_says() -> None:
    assert environment()["FINETUNE_TRAINER_LOG_FORMAT"] == "human"
    told = environment(trainer={"logFormat": "json"})
    assert told["FINETUNE_TRAINER_LOG_FORMAT"] == "json"
    assert Settings.from_environment(told).trainer_log_format == "json"


def test_several_operators_are_spread_and_drained_one_by_one() -> None:
    spread = [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]
    objects = render(
        replicaCount=2,
        topologySpreadConstraints=spread,
        podDisruptionBudget={"enabled": True},
        extraEnv=[{"name": "HTTPS_PROXY", "value": "http://proxy"}],
        extraVolumes=[{"name": "ca", "configMap": {"name": "ca"}}],
        extraVolumeMounts=[{"name": "ca", "mountPath": "/etc/ca"}],
        extraObjects=[{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mine"}}],
    )
    pod = named(objects, "Deployment")["spec"]["template"]["spec"]
    [constraint] = pod["topologySpreadConstraints"]
    assert constraint["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "operator"
    assert constraint["topologyKey"] == "zone"
    assert named(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert pod["volumes"][-1]["name"] == pod["containers"][0]["volumeMounts"][-1]["name"] == "ca"
    assert pod["containers"][0]["env"][-1]["name"] == "HTTPS_PROXY"
    assert named(objects, "ConfigMap", "mine")
    for document in objects:
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_a_trainer_may_write_no_field_of_status_but_progress() -> None:
    policy = named(render(), "ValidatingAdmissionPolicy", "finetune-operator-status")
    guarded = {
        each["expression"].split("?")[2].split()[0] for each in policy["spec"]["validations"]
    }
    fields = {each.alias for each in FineTuneJobStatus.model_fields.values()}
    assert guarded == fields - {"progress"}
    assert not any("Admission" in o["kind"] for o in render(admission={"protectStatus": False}))


def test_the_status_of_another_operators_namespaces_is_left_to_it() -> None:
    kind, name = "ValidatingAdmissionPolicyBinding", "finetune-operator-status"
    assert "matchResources" not in named(render(), kind, name)["spec"]
    spec = named(render(watchNamespaces=["team-a"]), kind, name)["spec"]
    [where] = spec["matchResources"]["namespaceSelector"]["matchExpressions"]
    assert where["values"] == ["team-a"]


def test_a_network_policy_lets_in_the_probes_and_prometheus_alone() -> None:
    policy = named(render(networkPolicy={"enabled": True}), "NetworkPolicy")
    assert policy["spec"]["ingress"] == [{"ports": [{"port": "health", "protocol": "TCP"}]}]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert "NetworkPolicy" not in [o["kind"] for o in render()]


def test_the_operator_may_write_its_own_lease_alone() -> None:
    objects = render(watchNamespaces=["team-a"])
    role = named(objects, "Role", "finetune-operator-leader-election")
    assert role["metadata"]["namespace"] == "finetune-system"
    assert [(rule["verbs"], rule.get("resourceNames")) for rule in role["rules"]] == [
        (["create"], None),
        (["get", "update"], ["finetune-operator"]),
    ]
    assert environment()["FINETUNE_LEASE"] == "finetune-system/finetune-operator"


def test_without_the_election_one_operator_ends_before_the_next_one_starts() -> None:
    objects = render(leaderElection={"enabled": False})
    assert named(objects, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert [o["kind"] for o in objects].count("Role") == 0
    strategy = named(render(replicaCount=2), "Deployment")["spec"]["strategy"]
    assert strategy["type"] == "RollingUpdate"
    assert strategy["rollingUpdate"], "left to the server, a rollback to Recreate is refused"


def test_the_stages_settings_reach_the_operator() -> None:
    stages = {"train": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}
    found = Settings.from_environment(environment(stages=stages))
    assert found.stages == stages
    assert "FINETUNE_STAGES" not in environment()


@pytest.mark.parametrize(
    "place",
    [
        {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        {"image": {"reference": "registry.example.com/models:1"}},
    ],
    ids=["claim", "image"],
)
def test_the_cache_of_models_is_declared_once(place: dict[str, Any]) -> None:
    found = Settings.from_environment(environment(modelCache=place))
    assert found.model_cache == ModelCache.model_validate(place)
    assert "FINETUNE_MODEL_CACHE" not in environment()
    assert Settings.from_environment(environment()).model_cache is None


def test_watching_namespaces_needs_no_cluster_wide_rights() -> None:
    objects = render(watchNamespaces=["team-a"])
    assert named(objects, "Role")["metadata"]["namespace"] == "team-a"
    assert not [o for o in objects if o["kind"] == "ClusterRoleBinding"]


def test_the_operators_pod_is_restricted() -> None:
    pod = named(render(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_uninstalling_keeps_the_definition_and_so_every_job() -> None:
    definition = named(render(), "CustomResourceDefinition", "finetunejobs.finetune.dev")
    assert definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_chart_holds_the_rules_of_the_definition() -> None:
    ours = named(render(), "CustomResourceDefinition", "finetunejobs.finetune.dev")
    del ours["metadata"]["annotations"]
    assert ours == yaml.safe_load((CRDS / "finetune.dev_finetunejobs.yaml").read_text())
    assert "x-kubernetes-validations" in str(ours)


def test_a_cluster_older_than_the_supported_ones_is_refused() -> None:
    asked = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    assert asked == f">=1.{versions.MINORS[0]}.0-0"


@pytest.mark.parametrize("minor", versions.MINORS)
def test_every_supported_kubernetes_knows_each_field(minor: int) -> None:
    for document in render_all():
        kubernetes_validate.validate(document, f"1.{minor}", strict=True)
