"""The manifests against what KubeRay's v1 API and Kubernetes' know of the fields used here, and against what Ray needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.infra.versions import image, load, pinned, ray_start_options

_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
_AUTOSCALER = {"upscalingMode", "idleTimeoutSeconds", "resources", "env", "envFrom", "volumeMounts", "securityContext"}
_HEAD = {"serviceType", "rayStartParams", "template"}
_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
_JOB = {
    *("entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
    *("rayClusterSpec", "runtimeEnvYAML", "activeDeadlineSeconds"),
}
_POD = {"securityContext", "containers", "volumes", "tolerations", "nodeSelector", "terminationGracePeriodSeconds"}
_CONTAINER = {
    *("name", "image", "env", "envFrom", "ports", "resources", "securityContext", "volumeMounts", "readinessProbe"),
    "command",
}
_QUANTITY = re.compile(r"\d+(m|Ki|Mi|Gi|Ti)?")


def clusters() -> Iterator[Any]:
    yield pytest.param(load("kuberay/raycluster.yaml")[0]["spec"], id="raycluster")
    yield pytest.param(load("kuberay/rayjob.yaml")[0]["spec"]["rayClusterSpec"], id="rayjob")


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def check_pod(pod: dict[str, Any]) -> None:
    assert pod.keys() <= _POD, pod.keys() - _POD
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        assert container.keys() <= _CONTAINER, container.keys() - _CONTAINER
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
        resources = container["resources"]
        assert resources.keys() <= {"requests", "limits"} and "memory" in resources["limits"]
        for amount in (value for part in resources.values() for value in part.values()):
            assert _QUANTITY.fullmatch(str(amount)), amount
        for variable in container.get("env", []):
            assert variable.keys() in ({"name", "value"}, {"name", "valueFrom"}) and isinstance(
                variable.get("value", ""), str
            )
            assert "TOKEN" not in variable["name"] or "secretKeyRef" in variable["valueFrom"], "a secret in a manifest"


@pytest.mark.parametrize("spec", clusters())
def test_a_cluster_is_what_the_api_allows(spec: dict[str, Any]) -> None:
    assert spec.keys() <= _CLUSTER and spec["rayVersion"] == pinned("ray")
    assert spec["autoscalerOptions"].keys() <= _AUTOSCALER
    assert spec["autoscalerOptions"].get("upscalingMode", "Default") in ("Default", "Aggressive", "Conservative")
    assert spec["headGroupSpec"].keys() <= _HEAD
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= _GROUP
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for pod in pods(spec):
        check_pod(pod)
        assert pod["containers"][0]["image"] == image()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
            "Kubernetes takes strings only"
        )


@pytest.mark.parametrize("spec", clusters())
def test_options_of_ray_start_exist(spec: dict[str, Any]) -> None:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= ray_start_options()


def test_the_cluster_scales_cpus_and_gpus_on_preemptible_nodes() -> None:
    spec = load("kuberay/raycluster.yaml")[0]["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head would work, and its loss ends all jobs"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    for name, group in groups.items():
        pod = group["template"]["spec"]
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        assert {"key": "preemptible", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (name == "gpu")


def test_the_job_runs_a_command_that_parses() -> None:
    import shlex

    from jobs.cli import parse_job

    manifest = load("kuberay/rayjob.yaml")[0]
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert spec.keys() <= _JOB and spec["submissionMode"] in ("K8sJobMode", "HTTPMode")
    words = shlex.split(spec["entrypoint"])
    assert words[0] == "tokenreel"
    _, config = parse_job(words[1:])
    assert "://" in config.out, "the job's own pod goes when it ends"


def test_mlflow_is_reached_under_the_name_that_jobs_have() -> None:
    deployment, service = load("mlflow/mlflow.yaml")
    pod = deployment["spec"]["template"]["spec"]
    check_pod(pod)
    assert pod["containers"][0]["image"] == f"tokenreel-mlflow:{pinned('mlflow')}"
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    where = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    for cluster in ("raycluster", "rayjob"):
        spec = load(f"kuberay/{cluster}.yaml")[0]["spec"]
        for pod in pods(spec.get("rayClusterSpec", spec)):
            assert {"name": "MLFLOW_TRACKING_URI", "value": where} in pod["containers"][0]["env"]
