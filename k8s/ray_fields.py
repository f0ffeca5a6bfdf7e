"""The fields of KubeRay's custom resources, of 1.7 (ray-operator/apis/ray/v1), which hold all those of 1.6.

The API server drops a field that it does not know, without a word: a run would start without it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.configuration.keys import nearest
from k8s.manifests import Render, name_of, of_kind

ANY: Mapping[str, Any] = {}
"""Not looked into: a map of the user's own keys, or a Kubernetes type, which its own schema holds."""
Fields = Mapping[str, Any]
"""Name of a field -> its own fields, or those of each of its list, or what type of value it holds."""

GROUP: Fields = {
    "template": ANY,
    "rayStartParams": ANY,
    "resources": ANY,
    "labels": ANY,
}
RULES_OF_A_GROUP: Fields = {"ingressRules": ANY, "egressRules": ANY}
CREDENTIAL: Fields = {"value": str, "valueFrom": ANY}
RAY_CLUSTER: Fields = {
    "rayVersion": str,
    "suspend": bool,
    "managedBy": str,
    "upgradeStrategy": {"type": str},
    "authOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
    "headServiceAnnotations": ANY,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": str,
        "resources": ANY,
        "image": str,
        "imagePullPolicy": str,
        "securityContext": ANY,
        "idleTimeoutSeconds": int,
        "upscalingMode": str,
        "env": ANY,
        "envFrom": ANY,
        "volumeMounts": ANY,
        "command": ANY,
        "args": ANY,
    },
    "gcsFaultToleranceOptions": {
        "backend": str,
        "redisAddress": str,
        "redisUsername": CREDENTIAL,
        "redisPassword": CREDENTIAL,
        "externalStorageNamespace": str,
        "storage": {
            "claimName": str,
            "size": str,
            "storageClassName": str,
            "accessModes": ANY,
            "subPath": str,
            "deletionPolicy": str,
        },
    },
    "historyServerOptions": {
        "collectorOptions": {"image": str, "imagePullPolicy": str, "resources": ANY, "env": ANY}
    },
    "networkPolicy": {
        "mode": str,
        "head": RULES_OF_A_GROUP,
        "worker": RULES_OF_A_GROUP,
        "workerGroups": {"groupName": str, **RULES_OF_A_GROUP},
    },
    "tlsOptions": {"enabled": bool},
    "headGroupSpec": {
        **GROUP,
        "headService": ANY,
        "enableIngress": bool,
        "ingressOptions": {"host": str, "path": str, "pathType": str, "tls": ANY},
        "serviceType": str,
    },
    "workerGroupSpecs": {
        **GROUP,
        "groupName": str,
        "suspend": bool,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "idleTimeoutSeconds": int,
        "priority": int,
        "numOfHosts": int,
        "scaleStrategy": {"workersToDelete": ANY},
    },
}
CONDITION: Fields = {"jobStatus": str, "jobDeploymentStatus": str, "ttlSeconds": int}
RAY_JOB: Fields = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "submissionMode": str,
    "jobId": str,
    "metadata": ANY,
    "entrypointResources": str,
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "activeDeadlineSeconds": int,
    "preRunningDeadlineSeconds": int,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "suspend": bool,
    "managedBy": str,
    "clusterSelector": ANY,
    "submitterPodTemplate": ANY,
    "submitterConfig": {"backoffLimit": int},
    "deletionStrategy": {
        "onSuccess": {"policy": str},
        "onFailure": {"policy": str},
        "deletionRules": {"policy": str, "condition": CONDITION},
    },
    "rayClusterSpec": RAY_CLUSTER,
}
SPECS: Mapping[str, Fields] = {"RayJob": RAY_JOB, "RayCluster": RAY_CLUSTER}


def ray_fields(render: Render) -> Iterator[str]:
    """Pods inside are held against Kubernetes' schemas; these fields have no other schema here."""
    for thing in of_kind(render.objects, *SPECS):
        unknown = sorted(thing.keys() - {"apiVersion", "kind", "metadata", "spec"})
        yield from (f"{name_of(thing)}: {field} is no field of a {thing['kind']}" for field in unknown)
        for line in faults(thing["spec"], SPECS[thing["kind"]], "spec"):
            yield f"{name_of(thing)}: {line}"


def faults(value: Any, known: Any, at: str) -> Iterator[str]:
    """Unknown fields with the nearest right one, and values of another type."""
    if isinstance(known, type):
        wanted = (int, float) if known is float else known
        if not isinstance(value, wanted) or (isinstance(value, bool) and known is not bool):
            yield f"{at}={value!r} must be of type {known.__name__}"
    elif known and isinstance(value, list):
        for index, each in enumerate(value):
            yield from faults(each, known, f"{at}[{index}]")
    elif known and not isinstance(value, dict):
        yield f"{at}={value!r} must have fields: {', '.join(known)}"
    elif known:
        for field, each in value.items():
            if field in known:
                yield from faults(each, known[field], f"{at}.{field}")
            else:
                meant = nearest(field, list(known))
                yield f"{at}.{field} is no field of KubeRay's; nearest: {meant or ', '.join(known)}"


RULES = (ray_fields,)
