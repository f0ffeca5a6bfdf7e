"""The manifests: all render and break no rule, Ray reads them as meant, and their entrypoint runs."""

import contextlib
import functools
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cluster.storage.uris import open_store
from k8s.check import (
    ALPHA,
    JOB_OVERLAYS,
    JOBS,
    K8S,
    OVERLAYS,
    PROJECT,
    all_renders,
    dockerfile_problems,
    main,
    problems_of,
)
from k8s.job_rules import mounted_config
from k8s.manifests import groups, load, of_kind
from tests.ray_nodes import free_ports
from tests.small_run import SETTINGS, put_corpus, steps_by_number


@functools.cache
def renders() -> dict[str, str]:
    return dict(all_renders())


def objects_of(name: str) -> list[dict[str, Any]]:
    return load(renders()[name])


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return of_kind(objects, kind)[0]


@pytest.mark.slow
def test_every_overlay_component_and_job_renders_and_breaks_no_rule() -> None:
    assert {f"overlays/{folder.name}" for folder in OVERLAYS} <= renders().keys()
    faults = [line for name, text in renders().items() for line in problems_of(text, name)]
    assert not faults, "\n".join(faults)


def test_hadolint_finds_nothing_in_the_dockerfile_and_something_in_a_bad_one(tmp_path: Path) -> None:
    assert dockerfile_problems() == []
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo apt-get install curl\n")
    assert dockerfile_problems(tmp_path / "Dockerfile")


def scaling_of(name: str) -> dict[str, Any]:
    """What Ray's own reader of the custom resource makes of a render."""
    spec = one(objects_of(name), "RayJob")["spec"]["rayClusterSpec"]
    metadata = {"name": "pretrain-x", "namespace": "pretraining"}
    found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", *(f"overlays/{folder.name}" for folder in OVERLAYS)])
def test_ray_reads_from_each_cluster_what_the_run_asks_for(name: str) -> None:
    objects = objects_of(name)
    job = one(objects, "RayJob")
    config = mounted_config(job, objects, PROJECT).cluster
    types = scaling_of(name)["available_node_types"]
    train, data = types["train"], types["data"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert train["min_workers"] == train["max_workers"]
    gpus = train["max_workers"] * train["resources"].get("GPU", 0)
    assert gpus == config.num_workers * config.gpus_per_worker
    assert train["max_workers"] * train["resources"]["CPU"] >= config.num_workers * config.cpus_per_worker
    assert data["max_workers"] * data["resources"]["CPU"] >= 1
    if name != "overlays/dev":
        sizes = (train["resources"]["CPU"], train["resources"]["GPU"], train["resources"]["memory"])
        assert sizes == (88, 8, 1000 * 2**30)
        assert (train["max_workers"], data["max_workers"], data["resources"]["CPU"]) == (2, 4, 30)


def test_ray_reads_that_the_readers_come_and_go_and_the_gpus_stay() -> None:
    scaling = scaling_of("components/autoscale-data")
    types = scaling["available_node_types"]
    sizes = {name: (types[name]["min_workers"], types[name]["max_workers"]) for name in ("train", "data")}
    assert sizes == {"train": (2, 2), "data": (0, 8)}
    assert scaling["idle_timeout_minutes"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("job", [folder.name for folder in JOBS])
@pytest.mark.parametrize("overlay", [folder.name for folder in JOB_OVERLAYS])
def test_ray_reads_from_each_job_the_gpus_that_it_asks_for_and_no_room_on_the_head(
    job: str, overlay: str
) -> None:
    name = f"jobs/{job} on {overlay}"
    types = scaling_of(name)["available_node_types"]
    train, rayjob = types["train"], one(objects_of(name), "RayJob")
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert train["min_workers"] == train["max_workers"]
    config = mounted_config(rayjob, objects_of(name), PROJECT)
    cluster = getattr(config, "base", config).cluster if config else None
    runs = config.sweep.max_concurrent if job == "sweep" else 1
    asked = rayjob["spec"].get("entrypointNumGpus", 0)
    asked += runs * cluster.num_workers * cluster.gpus_per_worker if cluster else 0
    if job == "evaluate":  # one GPU of one node
        assert asked == 1 and train["max_workers"] == 1
    else:
        assert asked == train["max_workers"] * train["resources"]["GPU"]


@pytest.mark.parametrize("component", sorted(ALPHA))
def test_an_overlay_of_ones_own_with_an_alpha_component_passes_where_the_gates_are_on(
    component: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / "base", tmp_path.resolve())],
        "components": [os.path.relpath(K8S / component, tmp_path.resolve())],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    for options, expected in (["--alpha"], "no fault\n"), ([], "--alpha"):
        with pytest.raises(SystemExit):
            main([*options, str(tmp_path)])
        assert expected in capsys.readouterr().out


def test_pods_on_google_reach_cloud_dns_at_the_metadata_servers_address() -> None:
    open_ports = {
        (port["protocol"], port["port"])
        for policy in of_kind(objects_of("overlays/gke"), "NetworkPolicy")
        for egress in policy["spec"]["egress"]
        for peer in egress["to"]
        if peer.get("ipBlock", {}).get("cidr") == "169.254.169.254/32"
        for port in egress["ports"]
    }
    assert {("UDP", 53), ("TCP", 53)} <= open_ports


def test_a_ca_of_ones_own_may_be_absent_and_then_no_variable_names_a_file() -> None:
    for group in groups(objects_of("overlays/onprem")):
        source = group.environment["AWS_CA_BUNDLE"]["valueFrom"]["configMapKeyRef"]
        (volume,) = [v["configMap"] for v in group.pod["volumes"] if v["name"] == "s3-ca"]
        assert volume == {"name": source["name"], "optional": True} and source["optional"]
        assert {"name": "s3-ca", "mountPath": "/opt/s3-ca", "readOnly": True} in group.ray["volumeMounts"]


@pytest.mark.parametrize("workers", [32, 64, 128, 256])
def test_the_run_can_grow_without_another_order_as_far_as_the_readme_says(workers: int) -> None:
    objects = load(renders()["base"])
    settings = of_kind(objects, "ConfigMap")[0]["data"]
    before = mounted_config(one(objects, "RayJob"), objects, PROJECT)
    settings["train.yaml"] = settings["train.yaml"].replace("num_workers: 16", f"num_workers: {workers}")
    grown = mounted_config(one(objects, "RayJob"), objects, PROJECT)
    assert (grown.cluster.num_workers, grown.order) == (workers, before.order)


# --- the entrypoint, as the operator submits it ---

IN_A_POD = """
set -e
mount -t tmpfs tmpfs /opt
mkdir -p /opt/pretraining /opt/run
mount --bind "$PROJECT" /opt/pretraining
cp "$FILES"/* /opt/run
cd "$FILES"
ray start --head --block --num-cpus 0 --port "$GCS" --dashboard-port "$DASHBOARD" --temp-dir "$SESSION" \\
  --dashboard-agent-listen-port "$AGENT_1" --disable-usage-stats &
ray start --block --num-cpus 3 --address 127.0.0.1:"$GCS" --dashboard-agent-listen-port "$AGENT_2" &
wait
"""


def can_have_own_mounts() -> bool:
    probe = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/opt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True).returncode == 0


def call(url: str, token: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The jobs API of the dashboard, as the operator calls it in HTTPMode."""
    data = json.dumps(body).encode() if body else None
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as answer:
        return json.loads(answer.read())


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's first true value."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        time.sleep(0.5)
    raise AssertionError(f"{what} within {seconds} s")


@pytest.mark.cluster
@pytest.mark.skipif(not can_have_own_mounts(), reason="needs root for a mount namespace, as the pod has one")
def test_the_entrypoint_runs_literally_on_a_cluster_that_asks_for_a_token(tmp_path: Path) -> None:
    job = one(objects_of("base"), "RayJob")
    files, store = tmp_path / "configmap", open_store(f"{tmp_path}/bucket")
    files.mkdir()
    uris = {"corpus.uri": "raw", "corpus.prepared": "prepared", "run.storage": "runs"}
    settings = (
        SETTINGS | {"run.steps": 4, "run.name": "pretrain"} | {k: f"{store.uri}/{v}" for k, v in uris.items()}
    )
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        functools.reduce(lambda at, name: at.setdefault(name, {}), sections, nested)[last] = value
    nested["run"]["prompts"] = ["The "]
    where = {"run": {"storage": nested["run"].pop("storage")}}
    (files / "train.yaml").write_text(yaml.safe_dump(nested))
    (files / "site.yaml").write_text(yaml.safe_dump(where))
    put_corpus(store.child("raw"))

    token, (gcs, dashboard, *agents) = secrets.token_hex(16), map(str, free_ports(4))
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    environment = os.environ | {each["name"]: each["value"] for each in head["env"]}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",  # set by KubeRay in every container
        "PYTHONPATH": "/opt/pretraining",  # the image has the project installed there
        "PROJECT": str(PROJECT),
        "FILES": str(files),
        "SESSION": f"/tmp/ray-k8s-{gcs}",
        "GCS": gcs,
        "DASHBOARD": dashboard,
        "AGENT_1": agents[0],
        "AGENT_2": agents[1],
    }
    url, log = f"http://127.0.0.1:{dashboard}/api/jobs/", tmp_path / "log.txt"
    namespace = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "bash",
        "-c",
        IN_A_POD,
    ]
    with open(log, "wb") as output:
        pods = subprocess.Popen(namespace, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        # The worker may come later than the job: its driver waits for it.
        until(lambda: call(url, token) is not None, 90, "no dashboard")
        with pytest.raises(urllib.error.HTTPError, match="401|403"):
            call(url, "not the token")
        runtime_env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
        made = call(url, token, {"entrypoint": job["spec"]["entrypoint"], "runtime_env": runtime_env})
        at = f"{url}{made['submission_id']}"
        ended = until(
            lambda: (found := call(at, token))["status"] in ("SUCCEEDED", "FAILED", "STOPPED") and found,
            300,
            f"the job did not end: {log.read_text(errors='replace')[-2000:]}",
        )
        assert ended["status"] == "SUCCEEDED", call(f"{at}/logs", token)["logs"][-6000:]
    finally:
        pods.kill()
        pods.wait()
        shutil.rmtree(environment["SESSION"], ignore_errors=True)
    run = store.child("runs").child("pretrain")
    assert sorted(steps_by_number(run)) == [1, 2, 3, 4]
    assert run.exists("test.json")
