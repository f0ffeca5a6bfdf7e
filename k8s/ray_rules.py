"""Rules for what KubeRay, Kueue and Volcano make of the manifests, their queues' quotas included.

The limits are KubeRay's (controllers/ray/utils/validation.go of 1.7), those of Kueue's webhooks, or ours. A rule is a
pure function from a render to a line per fault. Its docstring says what happens where it is broken.
"""

from collections import Counter
from collections.abc import Iterator

from k8s.manifests import (
    Group,
    Object,
    Render,
    groups,
    name_of,
    namespace_of,
    of_kind,
    quantity,
    ray_clusters,
)

SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}
OWNED_BY_OPERATOR = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_USE_TLS", "RAY_AUTH_TOKEN"}
ALPHA_FIELDS = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
MAX_KUEUE_PODSETS = 18  # the head and 17 groups


def submission(render: Render) -> Iterator[str]:
    for job in of_kind(render.objects, "RayJob"):
        spec, mode = job["spec"], job["spec"].get("submissionMode", "K8sJobMode")
        if mode not in SUBMISSION_MODES:
            yield f"{name_of(job)}: submissionMode={mode} is none of {', '.join(sorted(SUBMISSION_MODES))}"
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            yield f"{name_of(job)}: ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        if spec.get("backoffLimit") and spec.get("clusterSelector"):
            yield f"{name_of(job)}: backoffLimit makes new clusters, which clusterSelector excludes"


def versions(render: Render) -> Iterator[str]:
    """KubeRay chooses the probes by rayVersion; another Ray in the image fails them, or answers another protocol."""
    for thing, spec in ray_clusters(render.objects):
        images = {group.ray["image"] for group in groups([thing])}
        if len(images) > 1:
            yield f"{name_of(thing)} has more than one image: {', '.join(sorted(images))}"
        if spec.get("rayVersion") != render.ray_version:
            yield f"{name_of(thing)}: rayVersion={spec.get('rayVersion')}, but pyproject.toml pins {render.ray_version}"
        for image in images:
            tag = image.partition("@")[0].rpartition(":")[2]
            if tag.split("-")[0] != render.ray_version:
                yield f"{name_of(thing)}: the tag of {image} must begin with Ray's version, {render.ray_version}"


def kueue(render: Render) -> Iterator[str]:
    """Kueue's webhook refuses the first four; what a queue does not cover waits for ever."""
    queues = {
        (namespace_of(q), name_of(q)): q["spec"]["clusterQueue"]
        for q in of_kind(render.objects, "LocalQueue")
    }
    covered = {
        name_of(queue): {r for group in queue["spec"]["resourceGroups"] for r in group["coveredResources"]}
        for queue in of_kind(render.objects, "ClusterQueue")
    }
    for thing in of_kind(render.objects, "RayJob", "RayCluster"):
        queue = thing["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        if queue is None:
            continue
        at, spec = f"{name_of(thing)} in queue {queue}", thing["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        if thing["kind"] == "RayJob" and not spec.get("shutdownAfterJobFinishes"):
            yield f"{at} needs shutdownAfterJobFinishes"
        if spec.get("clusterSelector"):
            yield f"{at} must not have a clusterSelector"
        if cluster.get("enableInTreeAutoscaling"):
            yield f"{at} must not have enableInTreeAutoscaling"
        workers = [group.name for group in groups([thing]) if not group.is_head]
        if "head" in workers or len(workers) + 1 > MAX_KUEUE_PODSETS:
            yield f"{at}: at most {MAX_KUEUE_PODSETS - 1} groups, none of them named head"
        asked = {r for g in groups([thing]) for r in g.ray.get("resources", {}).get("requests", {})}
        if missing := asked - covered.get(queues.get((namespace_of(thing), queue), ""), set()):
            yield f"{at}: no ClusterQueue behind it covers {', '.join(sorted(missing))}"


def kueue_flavors(render: Render) -> Iterator[str]:
    flavors = {name_of(flavor) for flavor in of_kind(render.objects, "ResourceFlavor")}
    for queue in of_kind(render.objects, "ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                if flavor["name"] not in flavors:
                    yield f"ClusterQueue {name_of(queue)} names ResourceFlavor {flavor['name']}, which is not rendered"
                if [each["name"] for each in flavor["resources"]] != group["coveredResources"]:
                    yield f"ClusterQueue {name_of(queue)}: {flavor['name']} must list coveredResources in their order"


def kueue_quota(render: Render) -> Iterator[str]:
    """Kueue admits a run whole: where one group fits into no flavor beside the others, the run waits for ever."""
    labels = {name_of(f): f["spec"].get("nodeLabels", {}) for f in of_kind(render.objects, "ResourceFlavor")}
    behind = {
        (namespace_of(q), name_of(q)): q["spec"]["clusterQueue"]
        for q in of_kind(render.objects, "LocalQueue")
    }
    queues = {name_of(queue): queue["spec"] for queue in of_kind(render.objects, "ClusterQueue")}
    for thing in of_kind(render.objects, "RayJob", "RayCluster"):
        label = thing["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        name = behind.get((namespace_of(thing), label))
        if name not in queues or "cohortName" in queues[name]:  # others of a cohort may lend what it lacks
            continue
        for resources in queues[name]["resourceGroups"]:
            for line in left_out(groups([thing]), resources, labels):
                yield f"{line} of ClusterQueue {name}"


def left_out(wanting: list[Group], resources: Object, labels: dict[str, dict[str, str]]) -> Iterator[str]:
    """The groups for which no flavor has room, as Kueue looks: each takes the first that fits, on nodes it may use."""
    room = {
        flavor["name"]: {each["name"]: quantity(each["nominalQuota"]) for each in flavor["resources"]}
        for flavor in resources["flavors"]
    }
    for group in wanting:
        asked = {r: n for r, n in group.demand.items() if r in resources["coveredResources"]}
        chosen = group.pod.get("nodeSelector", {})
        short = {
            flavor: [
                f"{r} {asked[r]:,.0f} of {left.get(r, 0):,.0f} left"
                for r in asked
                if asked[r] > left.get(r, 0)
            ]
            for flavor, left in room.items()
            if all(chosen.get(key, value) == value for key, value in labels.get(flavor, {}).items())
        }
        if fitting := next((flavor for flavor, lacks in short.items() if not lacks), None):
            room[fitting] = {r: left - asked.get(r, 0) for r, left in room[fitting].items()}
        else:
            why = "; ".join(f"{flavor}: {', '.join(lacks)}" for flavor, lacks in short.items())
            yield f"{group.at} fits into no flavor ({why or 'none is for its nodes'})"


def volcano_queue(render: Render) -> Iterator[str]:
    """Volcano starts a run's pods together: above the queue's capability they stay Pending."""
    capability = {
        name_of(q): q["spec"].get("capability", {})
        for q in of_kind(render.objects, "Queue")
        if q["apiVersion"].startswith("scheduling.volcano.sh/")
    }
    for thing in of_kind(render.objects, "RayJob", "RayCluster"):
        queue = thing["metadata"].get("labels", {}).get("volcano.sh/queue-name")
        asked = sum((group.demand for group in groups([thing])), Counter())
        for resource, most in capability.get(queue, {}).items():
            if asked[resource] > quantity(most):
                yield (
                    f"{name_of(thing)}: capability.{resource}={most} of Queue {queue} is less than the "
                    f"{asked[resource]:,.0f} of the groups"
                )


def autoscaler(render: Render) -> Iterator[str]:
    for thing, spec in ray_clusters(render.objects):
        options, is_on = spec.get("autoscalerOptions", {}), bool(spec.get("enableInTreeAutoscaling"))
        is_v2 = is_on and options.get("version") == "v2"
        for group in groups([thing]):
            if is_v2 and group.pod.get("restartPolicy", "Never") != "Never":
                yield f"{group.at}: autoscaler v2 needs restartPolicy Never or none"
            if "RAY_enable_autoscaler_v2" in group.environment and ("version" in options or not is_on):
                yield f"{group.at}: RAY_enable_autoscaler_v2 beside autoscalerOptions.version, or without an autoscaler"
            if not is_v2 and ("idleTimeoutSeconds" in group.spec or group.spec.get("priority")):
                yield f"{group.at}: idleTimeoutSeconds and priority of a group need autoscaler v2"
            if is_on and group.is_head and group.pod.get("automountServiceAccountToken") is not True:
                yield f"{group.at}: the autoscaler in the head's pod needs automountServiceAccountToken: true"


def start_parameters(render: Render) -> Iterator[str]:
    for group in render.groups:
        given = {"num-cpus", "num-gpus", "memory", "resources"} & group.spec.get("rayStartParams", {}).keys()
        if given and group.spec.get("resources"):
            yield f"{group.at}: resources stand both in rayStartParams ({', '.join(sorted(given))}) and in the group"
        if group.is_head and group.spec.get("rayStartParams", {}).get("num-cpus") != "0":
            yield f'{group.at}: rayStartParams.num-cpus must be "0", so that no work is placed on the head'


def owned_variables(render: Render) -> Iterator[str]:
    for group in render.groups:
        for name in OWNED_BY_OPERATOR & group.environment.keys():
            yield f"{group.at}: {name} is the operator's to set"


def authentication(render: Render) -> Iterator[str]:
    for thing, spec in ray_clusters(render.objects):
        if spec.get("authOptions", {}).get("mode") != "token":
            yield f"{name_of(thing)}: authOptions.mode must be token: who reaches the head runs code"


def feature_gates(render: Render) -> Iterator[str]:
    for thing, spec in ray_clusters(render.objects):
        wanted = [gate for field, gate in ALPHA_FIELDS.items() if field in spec]
        if spec.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
            wanted.append("GCSFaultToleranceEmbeddedStorage")
        for gate in set(wanted) - render.gates:
            yield f"{name_of(thing)} needs the operator's feature gate {gate}: operator/alpha.yaml, and --alpha here"


RULES = (
    submission,
    versions,
    kueue,
    kueue_flavors,
    kueue_quota,
    volcano_queue,
    autoscaler,
    start_parameters,
    owned_variables,
    authentication,
    feature_gates,
)
