"""Rendered manifests as the rules see them: objects, and the pods that a RayJob or RayCluster asks for."""

import functools
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

RAY_CONTAINER = 0
"""KubeRay starts Ray in the first container of a pod."""
SUFFIXES = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGT", start=1)
}


@dataclass(frozen=True)
class Group:
    """The head, or a group of workers."""

    cluster: str
    """Name of the RayJob or RayCluster."""
    name: str
    is_head: bool
    spec: Object
    """As in the custom resource: replicas, rayStartParams, template."""

    @property
    def at(self) -> str:
        return f"{self.cluster}: group {self.name}"

    @property
    def pod(self) -> Object:
        return self.spec["template"]["spec"]

    @property
    def containers(self) -> list[Object]:
        return self.pod["containers"]

    @property
    def ray(self) -> Object:
        """Ray's own container."""
        return self.containers[RAY_CONTAINER]

    @property
    def labels(self) -> dict[str, str]:
        """Those of its pods: KubeRay's and the template's."""
        own = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head" if self.is_head else "worker"}
        return own | self.spec["template"].get("metadata", {}).get("labels", {})

    @property
    def replicas(self) -> int:
        """Pods: the head is one."""
        return 1 if self.is_head else self.spec.get("replicas", 0)

    @property
    def environment(self) -> dict[str, Object]:
        return {variable["name"]: variable for variable in self.ray.get("env", [])}

    def asked(self, resource: str) -> float:
        """What Ray's container of one pod asks for."""
        return quantity(self.ray.get("resources", {}).get("requests", {}).get(resource, 0))

    @property
    def demand(self) -> Counter[str]:
        """What all of its pods ask for, by resource."""
        total: Counter[str] = Counter()
        for container in self.containers:
            for resource, asked in container.get("resources", {}).get("requests", {}).items():
                total[resource] += self.replicas * quantity(asked)
        return total


@dataclass(frozen=True)
class Render:
    """One overlay, and what it is held against."""

    objects: list[Object]
    ray_version: str
    """That pyproject.toml pins."""
    gates: frozenset[str]
    """The operator's feature gates that are on."""
    project: Path

    @property
    def groups(self) -> list[Group]:
        return groups(self.objects)


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity ("1000Gi", "500m", 2) as a number."""
    number = str(text).rstrip("kmKMGTi")
    return float(number) * SUFFIXES[str(text)[len(number) :]]


def walk(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(where, value) of all that stands inside a value, itself included."""
    yield at, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from walk(each, f"{at}[{key}]" if isinstance(value, list) else f"{at}.{key}".lstrip("."))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def name_of(thing: Object) -> str:
    return thing["metadata"]["name"]


def namespace_of(thing: Object) -> str:
    """`default` is where kubectl puts what names none."""
    return thing["metadata"].get("namespace", "default")


def ray_clusters(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """(RayJob or RayCluster, spec of its cluster) of each that brings a cluster of its own."""
    for thing in of_kind(objects, "RayJob", "RayCluster"):
        spec = thing["spec"].get("rayClusterSpec") if thing["kind"] == "RayJob" else thing["spec"]
        if spec:
            yield thing, spec


def groups(objects: list[Object]) -> list[Group]:
    """Every group of every cluster, the head first."""
    found = []
    for thing, spec in ray_clusters(objects):
        found.append(Group(name_of(thing), "head", True, spec["headGroupSpec"]))
        found += [
            Group(name_of(thing), group["groupName"], False, group)
            for group in spec.get("workerGroupSpecs", [])
        ]
    return found


def pod_specs(objects: list[Object]) -> list[tuple[str, Object]]:
    """(where, pod spec) of the Ray groups and of every other workload."""
    found = [(group.at, group.pod) for group in groups(objects)]
    for thing in of_kind(objects, "Deployment", "StatefulSet", "DaemonSet", "Job"):
        found.append((f"{thing['kind']} {name_of(thing)}", thing["spec"]["template"]["spec"]))
    return found


@functools.cache
def rendered(folder: Path, kubectl: str = "kubectl") -> str:
    """What `kubectl kustomize` makes of a folder. Raises `ValueError` with its message."""
    result = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{folder} does not render: {result.stderr.strip()}")
    return result.stdout


def load(text: str) -> list[Object]:
    return [thing for thing in yaml.safe_load_all(text) if thing]
