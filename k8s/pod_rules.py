"""Rules for what Kubernetes makes of the manifests: pods, volumes, names, budgets, quota, network.

A rule is a pure function from a render to a line per fault. Its docstring says what happens where it is broken.
"""

import re
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

from k8s.manifests import Render, groups, name_of, namespace_of, of_kind, pod_specs, quantity, ray_clusters

NAME_LENGTHS = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
WHOLE = ("nvidia.com/gpu", "amd.com/gpu", "vpc.amazonaws.com/efa", "rdma/", "hugepages-", "memory")
"""Request equal to limit: devices cannot be shared, and a pod above its requested memory is killed first."""
WITHOUT_NAMESPACE = {
    "Namespace",
    "PriorityClass",
    "ResourceFlavor",
    "Topology",
    "ClusterQueue",
    "WorkloadPriorityClass",
    "Queue",
}
"""Kinds that belong to the cluster: Kubernetes' own, Kueue's, Volcano's."""
METADATA = ip_address("169.254.169.254")
ADDRESS = re.compile(r"(?P<scheme>https?|rediss?)://[^/:]+(:(?P<port>\d+))?(/.*)?")
PORTS = {"http": 80, "https": 443, "redis": 6379, "rediss": 6379}
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def names(render: Render) -> Iterator[str]:
    """KubeRay builds names of services and pods from them; longer ones end as ValidationFailed."""
    for thing in of_kind(render.objects, *NAME_LENGTHS):
        name, longest = name_of(thing), NAME_LENGTHS[thing["kind"]]
        if len(name) > longest or not DNS_1035.fullmatch(name):
            yield f"{thing['kind']} {name} must be a DNS-1035 label of at most {longest} characters"


def namespaces(render: Render) -> Iterator[str]:
    """A component's object that names no namespace lands in `default`, where the run does not see it."""
    of_runs = {namespace_of(thing) for thing in of_kind(render.objects, "RayJob", "RayCluster")}
    for thing in render.objects:
        at = f"{thing['kind']} {name_of(thing)}"
        if thing["kind"] in WITHOUT_NAMESPACE:
            if "namespace" in thing["metadata"]:
                yield f"{at} has no namespace, so metadata.namespace must not be set"
        elif {namespace_of(thing)} != of_runs:
            yield f"{at} is in namespace {namespace_of(thing)}, the run in {', '.join(sorted(of_runs))}"


def replicas(render: Render) -> Iterator[str]:
    """GPU groups have one size: a half-grown one holds GPUs that nobody uses."""
    for group in render.groups:
        if group.is_head:
            continue
        low, now, high = (group.spec.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        if None in (low, now, high) or not low <= now <= high:
            yield f"{group.at}: minReplicas={low} <= replicas={now} <= maxReplicas={high} does not hold"
        elif group.asked("nvidia.com/gpu") and not low == now == high:
            yield f"{group.at} has GPUs: minReplicas, replicas and maxReplicas must be equal, not {low}, {now}, {high}"


def requests_and_limits(render: Render) -> Iterator[str]:
    for at, pod in pod_specs(render.objects):
        for container in pod["containers"]:
            resources = container.get("resources", {})
            asked, limits = resources.get("requests", {}), resources.get("limits", {})
            where = f"{at}: container {container['name']}"
            for missing in {"cpu", "memory"} - asked.keys():
                yield f"{where} requests no {missing}, which the namespace's quota refuses"
            for key in asked.keys() | limits.keys():
                request, limit = quantity(asked.get(key, 0)), quantity(limits.get(key, "1000000Ti"))
                if key.startswith(WHOLE) and (key not in asked or key not in limits or request != limit):
                    yield f"{where}: {key} must have a request equal to its limit"
                elif request > limit:
                    yield f"{where}: requests more {key} than its limit"


def volume_mounts(render: Render) -> Iterator[str]:
    for at, pod in pod_specs(render.objects):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{at}: container {container['name']} mounts {mount['name']}, which is no volume of its pod"


def disruption_budgets(render: Render) -> Iterator[str]:
    """A percentage or maxUnavailable needs a scale subresource, which RayCluster lacks: it would protect nothing."""
    for budget in of_kind(render.objects, "PodDisruptionBudget"):
        spec, at = budget["spec"], f"PodDisruptionBudget {name_of(budget)}"
        wanted = spec.get("selector", {}).get("matchLabels", {})
        chosen = [group for group in render.groups if wanted.items() <= group.labels.items()]
        if not chosen:
            yield f"{at} selects no pod"
        if "maxUnavailable" in spec or type(spec.get("minAvailable")) is not int:
            yield f"{at} must have an integer minAvailable and no maxUnavailable"
        elif chosen and spec["minAvailable"] != sum(group.replicas for group in chosen):
            yield f"{at}: minAvailable={spec['minAvailable']}, but it selects {sum(g.replicas for g in chosen)} pods"


def empty_dirs(render: Render) -> Iterator[str]:
    """Without a limit of its own a volume fills the node's disk, and the pod is evicted without a word in Ray's log."""
    for at, pod in pod_specs(render.objects):
        for volume in pod.get("volumes", []):
            if "emptyDir" not in volume:
                continue
            medium = volume["emptyDir"].get("medium", "")
            if medium not in ("", "Memory") and not medium.startswith("HugePages"):
                yield f'{at}: volume {volume["name"]}: emptyDir.medium={medium} must be "", Memory or HugePages…'
            if not volume["emptyDir"].get("sizeLimit"):
                yield f"{at}: volume {volume['name']} has no sizeLimit"


def disk(render: Render) -> Iterator[str]:
    """What the volumes may take is requested, or the scheduler does not know of it and the pod is evicted."""
    for group in render.groups:
        volumes = {volume["name"]: volume for volume in group.pod.get("volumes", [])}
        paths = {
            mount["mountPath"]: volumes.get(mount["name"], {}) for mount in group.ray.get("volumeMounts", [])
        }
        if "emptyDir" not in paths.get("/tmp/ray", {}):
            yield f"{group.at} has no emptyDir at /tmp/ray"
        spill = group.environment.get("RAY_object_spilling_directory", {}).get("value")
        if not group.is_head and spill not in paths:
            yield f"{group.at} has no volume for spilled objects at RAY_object_spilling_directory={spill}"
        on_disk = sum(
            quantity(volume["emptyDir"].get("sizeLimit", 0))
            for volume in volumes.values()
            if "emptyDir" in volume and volume["emptyDir"].get("medium", "") == ""
        )
        if group.asked("ephemeral-storage") < on_disk:
            yield f"{group.at} requests less ephemeral-storage than its volumes may take ({on_disk / 2**30:,.0f} GiB)"


def shared_memory(render: Render) -> Iterator[str]:
    """Ray's object store lies in /dev/shm, which counts against the memory limit."""
    for group in render.groups:
        volumes = {volume["name"]: volume for volume in group.pod.get("volumes", [])}
        shm = [
            volumes.get(m["name"], {})
            for m in group.ray.get("volumeMounts", [])
            if m["mountPath"] == "/dev/shm"
        ]
        room = sum(quantity(volume.get("emptyDir", {}).get("sizeLimit", 0)) for volume in shm)
        store = quantity(group.spec.get("rayStartParams", {}).get("object-store-memory", 0))
        if not 0 < store <= room:
            yield f"{group.at}: object-store-memory={store:,.0f} must be set and fit into /dev/shm of {room:,.0f} bytes"
        if room > 0.5 * group.asked("memory"):
            yield f"{group.at}: /dev/shm of {room:,.0f} bytes may take more than half of the memory"


def drain(render: Render) -> Iterator[str]:
    """Ray needs the drain time and some seconds more to leave; SIGKILL before that loses the last checkpoint."""
    for group in render.groups:
        grace = group.pod.get("terminationGracePeriodSeconds", 30)
        seconds = float(group.environment.get(DRAIN, {}).get("value", 30))
        if grace < seconds + 15:
            yield f"{group.at}: terminationGracePeriodSeconds={grace} must be at least {DRAIN}={seconds:g} + 15"


def pod_security(render: Render) -> Iterator[str]:
    """What the admission controller would refuse, found before a pod is missing."""
    levels = [n["metadata"].get("labels", {}) for n in of_kind(render.objects, "Namespace")]
    if any(labels.get("pod-security.kubernetes.io/enforce") == "privileged" for labels in levels):
        return
    for at, pod in pod_specs(render.objects):
        if pod.get("hostNetwork") or any("hostPath" in volume for volume in pod.get("volumes", [])):
            yield f"{at}: hostNetwork and hostPath need a namespace with enforce: privileged"
        for container in pod["containers"]:
            context = container.get("securityContext", {})
            if context.get("capabilities", {}).get("add") or context.get("privileged"):
                yield f"{at}: added capabilities need a namespace with enforce: privileged"
            if context.get("allowPrivilegeEscalation") is not False or not pod.get("securityContext", {}).get(
                "runAsNonRoot"
            ):
                yield f"{at}: container {container['name']} must run as non-root without privilege escalation"


def quota(render: Render) -> Iterator[str]:
    """A pod beyond the quota is never made, and the run waits for it without a word."""
    for limit in of_kind(render.objects, "ResourceQuota"):
        for key, hard in limit["spec"]["hard"].items():
            resource = key.removeprefix("requests.")
            largest = [(group, group.spec.get("maxReplicas", 1)) for group in render.groups]
            asked = sum(count * (1 if key == "pods" else group.asked(resource)) for group, count in largest)
            if asked > quantity(hard):
                yield f"ResourceQuota {name_of(limit)}: {key}={hard} is less than the {asked:,.0f} of the groups"


def network(render: Render) -> Iterator[str]:
    """Every Ray pod has its traffic limited in both directions."""
    for group in render.groups:
        directions = {
            direction
            for policy in of_kind(render.objects, "NetworkPolicy")
            if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= group.labels.items()
            for direction in policy["spec"]["policyTypes"]
        }
        if directions != {"Ingress", "Egress"}:
            yield f"{group.at}: no NetworkPolicy limits its {' and '.join(sorted({'Ingress', 'Egress'} - directions))}"


def metadata_service(render: Render) -> Iterator[str]:
    """There a cloud hands out the node's own credentials; with Workload Identity, GKE's server instead the run's."""
    accounts = of_kind(render.objects, "ServiceAccount")
    if any("iam.gke.io/gcp-service-account" in each["metadata"].get("annotations", {}) for each in accounts):
        return
    for policy in of_kind(render.objects, "NetworkPolicy"):
        for egress in policy["spec"].get("egress", []):
            for block in (peer["ipBlock"] for peer in egress.get("to", []) if "ipBlock" in peer):
                left_out = [ip_network(each) for each in block.get("except", [])]
                if METADATA in ip_network(block["cidr"]) and not any(METADATA in each for each in left_out):
                    yield f"NetworkPolicy {name_of(policy)} lets the pods out to {METADATA}; add it to `except`"


def reachable(render: Render) -> Iterator[str]:
    """A server that a manifest names, on a port that no NetworkPolicy lets out, is waited for until the job fails."""
    allowed = {
        port.get("port")
        for policy in of_kind(render.objects, "NetworkPolicy")
        for egress in policy["spec"].get("egress", [])
        for port in egress.get("ports", [])
    }
    for thing, spec in ray_clusters(render.objects):
        named = {"gcsFaultToleranceOptions": spec.get("gcsFaultToleranceOptions", {}).get("redisAddress", "")}
        for group in groups([thing]):
            named |= {name: variable.get("value", "") for name, variable in group.environment.items()}
        for at, address in named.items():
            found = ADDRESS.fullmatch(address)
            if found and int(found["port"] or PORTS[found["scheme"]]) not in allowed:
                yield f"{name_of(thing)}: {at}={address}, but no NetworkPolicy lets the Ray pods out to its port"


RULES = (
    names,
    namespaces,
    replicas,
    requests_and_limits,
    volume_mounts,
    disruption_budgets,
    empty_dirs,
    disk,
    shared_memory,
    drain,
    pod_security,
    quota,
    network,
    metadata_service,
    reachable,
)
