"""Faults that are one value at one place of the manifests: a rule must find it for each name and place it speaks of."""

from collections.abc import Callable, Iterator
from typing import Any

from k8s.ray_rules import ALPHA_FIELDS, OWNED_BY_OPERATOR
from tests.k8s_faults import Fault, group, head, one, pod, put, ray

Objects = list[dict[str, Any]]
QUEUED = "overlays/eks"
WHOLE_RESOURCES = {
    "vpc.amazonaws.com/efa": ("overlays/eks", "16"),
    "hugepages-2Mi": ("overlays/eks", "2Gi"),
    "rdma/hca": ("overlays/onprem", "0"),
    "amd.com/gpu": ("base", "8"),
}
LONGEST = {"RayCluster": 53, "RayCronJob": 36}


def job(*path: Any) -> Callable[[Objects], object]:
    """Sets a value of the RayJob's spec."""
    return lambda objects: put(one(objects, "RayJob"), "spec", *path)


def beside(kind: str, name: str) -> Callable[[Objects], object]:
    """Adds an object of Ray's with a cluster like the job's."""

    def add(objects: Objects) -> None:
        spec = one(objects, "RayJob")["spec"]["rayClusterSpec"]
        metadata = {"name": name, "namespace": "pretraining"}
        objects.append({"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec})

    return add


def variable(name: str, **value: Any) -> Callable[[Objects], object]:
    return lambda objects: ray(objects)["env"].append({"name": name, **value})


def init_container(**fields: Any) -> Callable[[Objects], object]:
    return lambda objects: pod(objects).update(initContainers=[{"name": "init", "image": "x", **fields}])


def many_groups(objects: Objects) -> None:
    groups = one(objects, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    groups += [{**groups[1], "groupName": f"data-{number}"} for number in range(16)]


def value_faults() -> Iterator[tuple[str, Fault]]:
    for kind, most in LONGEST.items():
        yield f"name-of-a-{kind}-too-long", ("names", "base", beside(kind, "p" * (most + 1)))
        yield f"name-of-a-{kind}-with-a-dot", ("names", "base", beside(kind, "pre.train"))
    for resource, (render, less) in WHOLE_RESOURCES.items():
        deed = lambda o, r=resource, n=less: put(ray(o), "resources", "requests", r, n)  # noqa: E731
        yield f"less-{resource}-than-its-limit", ("requests_and_limits", render, deed)
    for name in sorted(OWNED_BY_OPERATOR):
        yield f"own-{name}", ("owned_variables", "base", variable(name, value="1"))
    for field in ALPHA_FIELDS:
        yield f"{field}-without-its-gate", ("feature_gates", "base", job("rayClusterSpec", field, {}))


VALUE_FAULTS: dict[str, Fault] = dict(value_faults()) | {
    "rocksdb-without-its-gate": (
        "feature_gates",
        "base",
        job("rayClusterSpec", "gcsFaultToleranceOptions", {"backend": "rocksdb"}),
    ),
    "no-request-for-memory": (
        "requests_and_limits",
        "base",
        lambda o: ray(o)["resources"]["requests"].pop("memory"),
    ),
    "tries-on-a-cluster-that-is-there": ("submission", "base", job("clusterSelector", {"a": "b"})),
    "queued-for-a-cluster-that-is-there": ("kueue", QUEUED, job("clusterSelector", {"a": "b"})),
    "more-groups-than-kueue-takes": ("kueue", QUEUED, many_groups),
    "flavor-in-another-order": (
        "kueue_flavors",
        QUEUED,
        lambda o: one(o, "ClusterQueue")["spec"]["resourceGroups"][0]["coveredResources"].reverse(),
    ),
    "host-network": ("pod_security", "base", lambda o: pod(o).update(hostNetwork=True)),
    "autoscaler-variable-without-an-autoscaler": (
        "autoscaler",
        "base",
        variable("RAY_enable_autoscaler_v2", value="1"),
    ),
    "priority-without-v2": ("autoscaler", "base", lambda o: group(o).update(priority=1)),
    "text-instead-of-fields": ("ray_fields", "base", job("rayClusterSpec", "upgradeStrategy", "None")),
    "secret-that-nobody-is-told-to-make": (
        "references",
        "base",
        lambda o: ray(o).update(envFrom=[{"secretRef": {"name": "keys"}}]),
    ),
    "secret-of-one-variable": (
        "references",
        "base",
        variable("HF_TOKEN", valueFrom={"secretKeyRef": {"name": "hf", "key": "token"}}),
    ),
    "configmap-of-one-variable": (
        "references",
        "base",
        variable("AWS_CA_BUNDLE", valueFrom={"configMapKeyRef": {"name": "s3-ca", "key": "path"}}),
    ),
    "secret-of-redis": (
        "references",
        "components/gcs-ft-redis",
        lambda o: put(
            one(o, "RayJob")["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"],
            "redisPassword",
            {"valueFrom": {"secretKeyRef": {"name": "cache", "key": "password"}}},
        ),
    ),
    "secret-as-a-volume": (
        "references",
        "base",
        lambda o: pod(o)["volumes"].append({"name": "k", "secret": {"secretName": "k"}}),
    ),
    "key-for-the-job": ("secrets", "base", job("runtimeEnvYAML", "env_vars: {HF_TOKEN: hf_abc}")),
    "key-before-the-entrypoint": ("secrets", "base", job("entrypoint", "HF_TOKEN=hf_abc python train.py")),
    "key-in-the-entrypoint": ("secrets", "base", job("entrypoint", "python train.py --api_key=0123456789")),
    "key-in-an-argument": ("secrets", "base", lambda o: ray(o).update(args=["--password=0123456789"])),
    "key-in-a-command": ("secrets", "base", lambda o: ray(o).update(command=["sh", "-c", "A_SECRET=x run"])),
    "key-of-an-init-container": (
        "secrets",
        "base",
        init_container(env=[{"name": "RAY_AUTH_TOKEN", "value": "x"}]),
    ),
    "key-of-the-autoscaler": (
        "secrets",
        "base",
        job("rayClusterSpec", "autoscalerOptions", {"env": [{"name": "A_TOKEN", "value": "x"}]}),
    ),
    "password-of-redis": (
        "secrets",
        "base",
        job("rayClusterSpec", "gcsFaultToleranceOptions", {"redisPassword": {"value": "x"}}),
    ),
    "key-in-an-annotation": (
        "secrets",
        "base",
        lambda o: put(head(o)["template"], "metadata", "annotations", {"note": "AKIA" + "A" * 16}),
    ),
}
