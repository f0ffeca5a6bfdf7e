"""Faults planted in the manifests, each with the rule that finds it."""

from collections.abc import Callable
from typing import Any

from k8s.check import PROJECT
from k8s.manifests import of_kind


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return of_kind(objects, kind)[0]


def head(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return one(objects, "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]


def group(objects: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    return one(objects, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][index]


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return group(objects)["template"]["spec"]


def ray(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return pod(objects)["containers"][0]


def run_map(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return next(m for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"].startswith("run"))


def put(thing: Any, *path: Any) -> None:
    """Sets the value at a path of keys and indices; its last part is the value."""
    *keys, last, value = path
    for key in keys:
        thing = thing[key]
    thing[last] = value


def flavor(objects: list[dict[str, Any]], index: int) -> dict[str, Any]:
    return one(objects, "ClusterQueue")["spec"]["resourceGroups"][0]["flavors"][index]


def edit(config_map: dict[str, Any], file: str, old: str, new: str) -> None:
    text = config_map["data"][file]
    assert old in text
    config_map["data"][file] = text.replace(old, new)


Fault = tuple[str, str, Callable[[list[dict[str, Any]]], object]]
FAULTS: dict[str, Fault] = {  # what was done wrong -> the rule that finds it, the render, the deed
    "name-too-long": ("names", "base", lambda o: put(one(o, "RayJob"), "metadata", "name", "p" * 48)),
    "name-with-a-dot": ("names", "base", lambda o: put(one(o, "RayJob"), "metadata", "name", "pre.train")),
    "queue-in-default": (
        "namespaces",
        "overlays/eks",
        lambda o: one(o, "LocalQueue")["metadata"].pop("namespace"),
    ),
    "namespaced-flavor": (
        "namespaces",
        "overlays/eks",
        lambda o: put(one(o, "ResourceFlavor"), "metadata", "namespace", "pretraining"),
    ),
    "half-grown-gpu-group": ("replicas", "base", lambda o: put(group(o), "minReplicas", 1)),
    "more-than-max": ("replicas", "base", lambda o: put(group(o, 1), "replicas", 9)),
    "gpu-request-below-limit": (
        "requests_and_limits",
        "base",
        lambda o: put(ray(o), "resources", "requests", "nvidia.com/gpu", "4"),
    ),
    "no-memory-limit": ("requests_and_limits", "base", lambda o: ray(o)["resources"]["limits"].pop("memory")),
    "cpu-above-limit": (
        "requests_and_limits",
        "base",
        lambda o: put(ray(o), "resources", "requests", "cpu", "89"),
    ),
    "mount-without-volume": ("volume_mounts", "base", lambda o: pod(o)["volumes"].pop()),
    "unknown-service-account": ("references", "base", lambda o: put(pod(o), "serviceAccountName", "other")),
    "unknown-priority": ("references", "base", lambda o: put(pod(o), "priorityClassName", "high")),
    "unfollowed-configmap": (
        "references",
        "base",
        lambda o: put(pod(o), "volumes", 0, "configMap", "name", "run"),
    ),
    "percentage": (
        "disruption_budgets",
        "base",
        lambda o: put(one(o, "PodDisruptionBudget"), "spec", "minAvailable", "50%"),
    ),
    "max-unavailable": (
        "disruption_budgets",
        "base",
        lambda o: put(one(o, "PodDisruptionBudget"), "spec", "maxUnavailable", 0),
    ),
    "budget-of-another-size": (
        "disruption_budgets",
        "base",
        lambda o: put(of_kind(o, "PodDisruptionBudget")[1], "spec", "minAvailable", 1),
    ),
    "budget-of-nothing": (
        "disruption_budgets",
        "base",
        lambda o: put(one(o, "PodDisruptionBudget"), "spec", "selector", "matchLabels", {"a": "b"}),
    ),
    "unknown-mode": ("submission", "base", lambda o: put(one(o, "RayJob"), "spec", "submissionMode", "HTTP")),
    "ttl-alone": (
        "submission",
        "base",
        lambda o: put(one(o, "RayJob"), "spec", "shutdownAfterJobFinishes", False),
    ),
    "medium-ram": (
        "empty_dirs",
        "base",
        lambda o: put(pod(o), "volumes", 1, "emptyDir", "medium", "RAM"),
    ),
    "endless-volume": ("empty_dirs", "base", lambda o: put(pod(o), "volumes", 2, "emptyDir", {})),
    "logs-on-the-root-disk": ("disk", "base", lambda o: ray(o)["volumeMounts"].pop(2)),
    "spill-as-the-head": ("disk", "base", lambda o: ray(o)["env"].pop(2)),
    "more-disk-than-asked": (
        "disk",
        "base",
        lambda o: put(pod(o), "volumes", 3, "emptyDir", "sizeLimit", "2Ti"),
    ),
    "store-beyond-shm": (
        "shared_memory",
        "base",
        lambda o: put(group(o), "rayStartParams", "object-store-memory", "400000000000"),
    ),
    "shm-beyond-memory": (
        "shared_memory",
        "base",
        lambda o: put(pod(o), "volumes", 1, "emptyDir", "sizeLimit", "900Gi"),
    ),
    "killed-while-draining": ("drain", "base", lambda o: put(pod(o), "terminationGracePeriodSeconds", 30)),
    "another-ray": (
        "versions",
        "base",
        lambda o: put(one(o, "RayJob"), "spec", "rayClusterSpec", "rayVersion", "2.60"),
    ),
    "another-image": ("versions", "base", lambda o: put(ray(o), "image", "x/y:2.60.0-0.2.0")),
    "untagged-image": ("versions", "base", lambda o: put(ray(o), "image", "x/y:latest")),
    "queue-that-keeps-the-cluster": (
        "kueue",
        "overlays/eks",
        lambda o: put(one(o, "RayJob"), "spec", "shutdownAfterJobFinishes", False),
    ),
    "queued-autoscaler": (
        "kueue",
        "overlays/eks",
        lambda o: put(one(o, "RayJob"), "spec", "rayClusterSpec", "enableInTreeAutoscaling", True),
    ),
    "group-named-head": ("kueue", "overlays/eks", lambda o: put(group(o), "groupName", "head")),
    "uncovered-resource": (
        "kueue",
        "overlays/eks",
        lambda o: one(o, "ClusterQueue")["spec"]["resourceGroups"][0]["coveredResources"].remove(
            "vpc.amazonaws.com/efa"
        ),
    ),
    "unknown-queue": (
        "kueue",
        "overlays/eks",
        lambda o: put(one(o, "RayJob"), "metadata", "labels", "kueue.x-k8s.io/queue-name", "x"),
    ),
    "queue-of-another-namespace": (
        "kueue",
        "overlays/eks",
        lambda o: put(one(o, "LocalQueue"), "metadata", "namespace", "default"),
    ),
    "kueue-quota-of-fewer-gpus": (
        "kueue_quota",
        "overlays/eks",
        lambda o: put(flavor(o, 1)["resources"][3], "nominalQuota", 8),
    ),
    "kueue-quota-of-another-pool": (  # enough in all, but the GPU nodes' CPUs are not for readers
        "kueue_quota",
        "overlays/gke",
        lambda o: [
            put(flavor(o, 0)["resources"][0], "nominalQuota", 100),
            put(flavor(o, 1)["resources"][0], "nominalQuota", 400),
        ],
    ),
    "kueue-quota-of-one-more-node": (
        "kueue_quota",
        "components/kueue",
        lambda o: put(group(o), "replicas", 3),
    ),
    "volcano-queue-of-fewer-gpus": (
        "volcano_queue",
        "components/volcano",
        lambda o: put(one(o, "Queue"), "spec", "capability", "nvidia.com/gpu", "8"),
    ),
    "unknown-flavor": ("kueue_flavors", "overlays/eks", lambda o: o.remove(one(o, "ResourceFlavor"))),
    "restarted-under-v2": (
        "autoscaler",
        "components/autoscale-data",
        lambda o: put(pod(o), "restartPolicy", "Always"),
    ),
    "idle-timeout-without-v2": ("autoscaler", "base", lambda o: put(group(o), "idleTimeoutSeconds", 60)),
    "autoscaler-without-token": (
        "autoscaler",
        "components/autoscale-data",
        lambda o: put(head(o), "template", "spec", "automountServiceAccountToken", False),
    ),
    "autoscaler-twice": (
        "autoscaler",
        "components/autoscale-data",
        lambda o: head(o)["template"]["spec"]["containers"][0]["env"].append(
            {"name": "RAY_enable_autoscaler_v2", "value": "1"}
        ),
    ),
    "work-on-the-head": ("start_parameters", "base", lambda o: head(o)["rayStartParams"].pop("num-cpus")),
    "resources-twice": ("start_parameters", "base", lambda o: put(head(o), "resources", {"CPU": "0"})),
    "own-redis-address": (
        "owned_variables",
        "base",
        lambda o: ray(o)["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
    ),
    "key-in-the-open": (
        "secrets",
        "base",
        lambda o: ray(o)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}),
    ),
    "key-in-the-configuration": (
        "secrets",
        "base",
        lambda o: put(one(o, "ConfigMap"), "data", "site.yaml", "x:\n  key: AKIA" + "A" * 16),
    ),
    "rendered-secret": (
        "secrets",
        "base",
        lambda o: o.append({"kind": "Secret", "metadata": {"name": "s3-keys"}}),
    ),
    "open-head": (
        "authentication",
        "base",
        lambda o: one(o, "RayJob")["spec"]["rayClusterSpec"].pop("authOptions"),
    ),
    "locked-memory-under-baseline": (
        "pod_security",
        "overlays/eks",
        lambda o: put(
            one(o, "Namespace"), "metadata", "labels", "pod-security.kubernetes.io/enforce", "baseline"
        ),
    ),
    "host-path": ("pod_security", "base", lambda o: pod(o)["volumes"].append({"name": "h", "hostPath": {}})),
    "root": ("pod_security", "base", lambda o: pod(o)["securityContext"].pop("runAsNonRoot")),
    "alpha-field": (
        "feature_gates",
        "base",
        lambda o: put(one(o, "RayJob"), "spec", "rayClusterSpec", "tlsOptions", {"enabled": True}),
    ),
    "small-quota": (
        "quota",
        "base",
        lambda o: put(one(o, "ResourceQuota"), "spec", "hard", "requests.nvidia.com/gpu", "8"),
    ),
    "open-network": ("network", "base", lambda o: o.remove(one(o, "NetworkPolicy"))),
    "entrypoint-elsewhere": (
        "entrypoint",
        "base",
        lambda o: put(one(o, "RayJob"), "spec", "entrypoint", "python /opt/pretraining/train.py"),
    ),
    "configuration-elsewhere": (
        "entrypoint",
        "base",
        lambda o: put(
            one(o, "RayJob"),
            "spec",
            "entrypoint",
            "python /opt/pretraining/trainers/pretrain.py --config /opt/run/other.yaml",
        ),
    ),
    "gpus-for-the-entrypoint-that-no-pod-has": (
        "entrypoint_resources",
        "overlays/dev",
        lambda o: put(one(o, "RayJob"), "spec", "entrypointNumGpus", 1),
    ),
    "another-world-size": (
        "run_configuration",
        "base",
        lambda o: put(ray(o), "resources", "requests", "nvidia.com/gpu", "4"),
    ),
    "finetuning-of-another-size": (
        "run_configuration",
        "jobs/finetune on base",
        lambda o: edit(run_map(o), "finetune.yaml", "num_workers: 16", "num_workers: 8"),
    ),
    "more-trials-than-gpus": (
        "run_configuration",
        "jobs/sweep on eks",
        lambda o: edit(run_map(o), "sweep.yaml", "max_concurrent: 15", "max_concurrent: 16"),
    ),
    "preflight-of-a-part": (
        "run_configuration",
        "jobs/preflight on base",
        lambda o: edit(run_map(o), "preflight.yaml", "num_workers: 16", "num_workers: 8"),
    ),
    "no-cpu-to-read": (
        "run_configuration",
        "overlays/dev",
        lambda o: [
            put(group(o, i)["template"]["spec"]["containers"][0], "resources", "requests", "cpu", "0.5")
            for i in (0, 1)
        ],
    ),
    "metadata-in-reach": (
        "metadata_service",
        "base",
        lambda o: one(o, "NetworkPolicy")["spec"]["egress"][2]["to"][0]["ipBlock"].pop("except"),
    ),
    "metadata-without-workload-identity": (
        "metadata_service",
        "overlays/gke",
        lambda o: one(o, "ServiceAccount")["metadata"].pop("annotations"),
    ),
    "redis-behind-the-policy": (
        "reachable",
        "components/gcs-ft-redis",
        lambda o: one(o, "NetworkPolicy")["spec"]["egress"].pop(),
    ),
    "store-behind-the-policy": (
        "reachable",
        "overlays/onprem",
        lambda o: o.remove(next(p for p in of_kind(o, "NetworkPolicy") if p["metadata"]["name"] == "s3")),
    ),
    "misspelt-field": (
        "ray_fields",
        "base",
        lambda o: put(one(o, "RayJob"), "spec", "backofLimit", 3),
    ),
    "number-as-text": ("ray_fields", "base", lambda o: put(one(o, "RayJob"), "spec", "backoffLimit", "3")),
    "wrong-key-of-a-job": (
        "job_configuration",
        "jobs/sweep on eks",
        lambda o: put(run_map(o), "data", "sweep.yaml", run_map(o)["data"]["sweep.yaml"] + "swep: {}\n"),
    ),
    "task-elsewhere": (
        "job_configuration",
        "jobs/finetune on base",
        lambda o: run_map(o)["data"].pop("task.yaml"),
    ),
    "records-that-no-image-holds": (
        "job_configuration",
        "jobs/sweep on base",
        lambda o: put(run_map(o), "data", "task.yaml", (PROJECT / "trainers/tasks/movies.yaml").read_text()),
    ),
    "unknown-option": (
        "job_configuration",
        "jobs/evaluate on base",
        lambda o: put(
            one(o, "RayJob"), "spec", "entrypoint", one(o, "RayJob")["spec"]["entrypoint"] + " --corpse x"
        ),
    ),
    "jobs-bucket-elsewhere": (
        "one_site",
        "jobs/preflight on base",
        lambda o: put(run_map(o), "data", "site.yaml", "run: {storage: gs://mine/runs}\n"),
    ),
    "wrong-key": (
        "job_configuration",
        "base",
        lambda o: put(one(o, "ConfigMap"), "data", "site.yaml", "run:\n  storag: s3://b/runs\n"),
    ),
}
