"""Rules for what the project itself makes of a RayJob: its entrypoint, and the files that this reads.

A rule is a pure function from a render to a line per fault. Its docstring says what happens where it is broken.
"""

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.configuration.config import load_config
from cluster.console.errors import ConfigError
from cluster.nodes.fitness import PreflightConfig
from cluster.sessions.workers import ClusterConfig
from k8s.manifests import Object, Render, groups, name_of, of_kind
from trainers import evaluate
from trainers.finetuning.config import FinetuneConfig
from trainers.pretraining.config import PretrainConfig
from trainers.tasks.task import load_task
from tune.search.config import SweepConfig
from tune.search.space import parse_space

IMAGE_ROOT = "/opt/pretraining/"
"""Where the Dockerfile puts the project."""
CONFIGS: Mapping[str, type[Any]] = {
    "trainers/pretrain.py": PretrainConfig,
    "trainers/finetune.py": FinetuneConfig,
    "tune/sweep.py": SweepConfig,
    "cluster/preflight.py": PreflightConfig,
}
BUCKET = re.compile(r"\b(?:s3|gs)://[\w.-]+")


def entrypoint(render: Render) -> Iterator[str]:
    """The scripts are in the project, the files that --config names where the head mounts the ConfigMap."""
    for job in of_kind(render.objects, "RayJob"):
        mounted = set(mounted_files(job, render.objects))
        words = shlex.split(job["spec"].get("entrypoint", ""))
        for script in (word for word in words if word.endswith(".py")):
            inside = script.removeprefix(IMAGE_ROOT)
            if inside == script or not (render.project / inside).is_file():
                yield f"{name_of(job)}: the entrypoint runs {script}, which is not in the project at /opt/pretraining"
        for option, path in zip(words, words[1:], strict=False):
            if (
                option == "--config"
                and path not in mounted
                and not (render.project / path.removeprefix(IMAGE_ROOT)).is_file()
            ):
                yield f"{name_of(job)}: --config {path} is not mounted on the head"


def entrypoint_resources(render: Render) -> Iterator[str]:
    """An entrypoint that asks for more than a pod has is never started; without asking it runs on the head."""
    for job in of_kind(render.objects, "RayJob"):
        wanted = job["spec"].get("entrypointNumGpus", 0)
        largest = max((group.asked("nvidia.com/gpu") for group in groups([job])), default=0)
        if wanted > largest:
            yield f"{name_of(job)}: entrypointNumGpus={wanted:g}, but no pod has more than {largest:g} GPUs"


def job_configuration(render: Render) -> Iterator[str]:
    """Each job's configuration as the job itself would read it, and the task that it names."""
    for job in of_kind(render.objects, "RayJob"):
        if "trainers/evaluate.py" in job["spec"].get("entrypoint", ""):
            yield from unknown_flags(job)
            continue
        try:
            config = mounted_config(job, render.objects, render.project)
            if isinstance(config, SweepConfig):
                parse_space(config.space, config.base)
            if isinstance(config, FinetuneConfig | SweepConfig):
                yield from task_problems(job, render, config)
        except ConfigError as error:
            yield f"{name_of(job)}: {error}"


def task_problems(job: Object, render: Render, config: FinetuneConfig | SweepConfig) -> Iterator[str]:
    """A task's records are no part of the image: its file must name them where every node finds them."""
    path = (config.base if isinstance(config, SweepConfig) else config).run.task
    with on_disk(job, render.objects, render.project) as place:
        if not Path(place(path)).is_file():
            yield f"{name_of(job)}: run.task={path} is neither mounted on the head nor in the image"
            return
        files = asdict(load_task(place(path)).data)
    for key, uri in files.items():
        if isinstance(uri, str) and uri and not BUCKET.match(uri):
            yield f"{name_of(job)}: {path}: data.{key}={uri} is not in the image; give it as s3://… or gs://…"


def unknown_flags(job: Object) -> Iterator[str]:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        evaluate.main(["--help"])
    known = set(re.findall(r"--[\w-]+", shown.getvalue()))
    for word in shlex.split(job["spec"]["entrypoint"]):
        if word.startswith("--") and word not in known:
            yield f"{name_of(job)}: {word} is no option of trainers/evaluate.py"


def run_configuration(render: Render) -> Iterator[str]:
    """The run asks for the workers, GPUs and CPUs that the groups have, or it waits for ever, or GPUs idle."""
    for job in of_kind(render.objects, "RayJob"):
        config = readable_config(job, render)
        if config is None:
            continue
        is_sweep = isinstance(config, SweepConfig)
        cluster: ClusterConfig = (config.base if is_sweep else config).cluster
        most = config.sweep.max_concurrent if is_sweep else 1  # runs at a time; 0: as many as fit
        workers = [group for group in groups([job]) if not group.is_head]
        gpus = sum(group.replicas * group.asked("nvidia.com/gpu") for group in workers)
        cpus = sum(group.replicas * group.asked("cpu") for group in workers)
        on_gpu_nodes = sum(g.replicas * g.asked("cpu") for g in workers if g.asked("nvidia.com/gpu"))
        driver = job["spec"].get("entrypointNumGpus", 0)
        num_workers = (most or 1) * cluster.num_workers
        wanted, wanted_cpus = (
            num_workers * cluster.gpus_per_worker + driver,
            num_workers * cluster.cpus_per_worker,
        )
        if wanted > gpus or (most and wanted < gpus):
            runs = f"sweep.max_concurrent={most}, each of " if is_sweep else ""
            yield f"{name_of(job)}: {runs}cluster.num_workers={cluster.num_workers} takes {wanted:g} GPUs of {gpus:g}"
        if wanted_cpus >= cpus or (gpus and wanted_cpus > on_gpu_nodes):
            yield f"{name_of(job)}: {wanted_cpus:g} CPUs for workers leave none of the groups' {on_gpu_nodes or cpus:g}"


def one_site(render: Render) -> Iterator[str]:
    """An overlay says in site.yaml where its buckets are; a job that names others reads or writes elsewhere."""
    for job in of_kind(render.objects, "RayJob"):
        files = mounted_files(job, render.objects)
        site = next((text for path, text in files.items() if path.endswith("/site.yaml")), None)
        if site is None:
            continue
        theirs = set(BUCKET.findall(site))
        for at, text in {"entrypoint": job["spec"].get("entrypoint", ""), **files}.items():
            read = at == "entrypoint" or at in files_read(job, render.objects)
            for bucket in sorted(set(BUCKET.findall(text)) - theirs if read else ()):
                yield f"{name_of(job)}: {at} names {bucket}, site.yaml {', '.join(sorted(theirs))}"


def mounted_files(job: Object, objects: list[Object]) -> dict[str, str]:
    """Path on the head -> content, of the ConfigMaps that a RayJob's head mounts."""
    maps = {name_of(each): each.get("data", {}) for each in of_kind(objects, "ConfigMap")}
    head = next(group for group in groups([job]) if group.is_head)
    sources = {
        v["name"]: maps.get(v["configMap"]["name"], {})
        for v in head.pod.get("volumes", [])
        if "configMap" in v
    }
    return {
        f"{mount['mountPath']}/{key}": text
        for mount in head.ray.get("volumeMounts", [])
        for key, text in sources.get(mount["name"], {}).items()
    }


def files_read(job: Object, objects: list[Object]) -> set[str]:
    """Mounted files that the entrypoint names, or that such a file names."""
    files = mounted_files(job, objects)
    first = {path for path in files if path in job["spec"].get("entrypoint", "")}
    return first | {path for path in files if any(path in files[each] for each in first)}


@contextlib.contextmanager
def on_disk(job: Object, objects: list[Object], project: Path) -> Iterator[Callable[[str], str]]:
    """For the length of a with-block: from a path on the head to one on this machine with the same content."""
    with tempfile.TemporaryDirectory() as folder:
        here = {}
        for path, text in mounted_files(job, objects).items():
            here[path] = str(Path(folder) / Path(path).name)
            Path(here[path]).write_text(text)
        yield lambda path: here.get(path, path.replace(IMAGE_ROOT, f"{project}/"))


def mounted_config(job: Object, objects: list[Object], project: Path) -> Any:
    """The configuration that a RayJob's entrypoint reads from its mounted files and its own words.

    Raises:
        ConfigError: a wrong key or value, as the job itself would raise it.
    """
    for command in job["spec"].get("entrypoint", "").split("&&"):
        words = shlex.split(command)
        script = next((word.removeprefix(IMAGE_ROOT) for word in words if word.endswith(".py")), "")
        if script in CONFIGS:
            with on_disk(job, objects, project) as place:
                arguments = [place(word) for word in words[2:]]
                return load_config(CONFIGS[script], arguments, description="").config
    return None


def readable_config(job: Object, render: Render) -> Any:
    """The same, or None where `job_configuration` says what is wrong with it."""
    try:
        return mounted_config(job, render.objects, render.project)
    except ConfigError:
        return None


RULES = (
    entrypoint,
    entrypoint_resources,
    job_configuration,
    run_configuration,
    one_site,
)
