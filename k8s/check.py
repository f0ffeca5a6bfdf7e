"""Hold the manifests against schemas, rules and hadolint: `python k8s/check.py [--alpha] [OVERLAY …]`.

Without arguments every overlay, and each component and job upon a base that it fits. Nothing is contacted.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import kubernetes_validate
import yaml

from k8s import job_rules, pod_rules, ray_fields, ray_rules, secret_rules
from k8s.manifests import Object, Render, groups, load, name_of, namespace_of, rendered

PROJECT = Path(__file__).resolve().parents[1]
K8S = PROJECT / "k8s"
OVERLAYS = sorted(folder for folder in (K8S / "overlays").iterdir() if folder.is_dir())
RULES = pod_rules.RULES + secret_rules.RULES + ray_rules.RULES + ray_fields.RULES + job_rules.RULES
COMPONENTS = sorted(folder for folder in (K8S / "components").iterdir() if folder.is_dir())
JOBS = sorted(folder for folder in (K8S / "jobs").iterdir() if folder.is_dir())
ALPHA = {"components/gcs-ft-rocksdb", "components/historyserver", "components/mtls"}
"""Renders that need the gates of operator/alpha.yaml."""
JOB_OVERLAYS = (K8S / "base", K8S / "overlays" / "eks", K8S / "overlays" / "onprem")
"""Whose buckets the jobs' own files name."""


def main(argv: Sequence[str] | None = None) -> None:
    """Check what the command line names, print the faults, exit 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overlays", nargs="*", type=Path, metavar="OVERLAY")
    parser.add_argument(
        "--alpha", action="store_true", help="the operator has the gates of operator/alpha.yaml on"
    )
    arguments = parser.parse_args(argv)
    values = "alpha" if arguments.alpha else "values"
    faults = [line for folder in arguments.overlays for line in problems(folder, values)]
    if not arguments.overlays:
        faults = [line for name, text in all_renders() for line in problems_of(text, name)]
        faults += job_collisions()
        faults += dockerfile_problems()
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{len(faults)} faults" if faults else "no fault")
    raise SystemExit(bool(faults))


def problems(folder: Path, values: str = "values") -> list[str]:
    """What is wrong with a folder: its manifests, or why it has none."""
    try:
        return problems_of(rendered(folder, tool("kubectl")), str(folder), values)
    except ValueError as not_rendered:
        return [str(not_rendered)]


def problems_of(text: str, name: str, values: str = "values") -> list[str]:
    """What is wrong with rendered manifests, each line with their name; with the operator's `values`."""
    render = render_of(load(text), "alpha" if name in ALPHA else values)
    return [f"{name}: {line}" for line in [*schema_problems(render.objects), *broken(render)]]


def broken(render: Render) -> list[str]:
    """All lines of all rules, each with the name of its rule."""
    return [f"{rule.__name__}: {line}" for rule in RULES for line in rule(render)]


def render_of(objects: list[Object], values: str = "values") -> Render:
    """Manifests beside what this project and its operator's values say."""
    pins = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    ray = next(found[1] for pin in pins if (found := re.match(r"ray\[.*\]==([\d.]+)$", pin)))
    gates = yaml.safe_load((K8S / "operator" / f"{values}.yaml").read_text())["featureGates"]
    return Render(objects, ray, frozenset(gate["name"] for gate in gates if gate["enabled"]), PROJECT)


def all_renders() -> Iterator[tuple[str, str]]:
    """(name, text) of each overlay, of each component upon the base, and of each job upon both."""
    for overlay in [K8S / "base", *OVERLAYS]:
        yield f"{overlay.relative_to(K8S)}", rendered(overlay, tool("kubectl"))
    for component in COMPONENTS:
        yield f"components/{component.name}", composed(K8S / "base", component)
    for job in JOBS:
        for overlay in JOB_OVERLAYS:
            yield f"jobs/{job.name} on {overlay.name}", composed(overlay, job)


def job_collisions() -> list[str]:
    found = []
    for job in JOBS:
        for overlay in JOB_OVERLAYS:
            run = load(rendered(overlay, tool("kubectl")))
            lines = collisions(load(composed(overlay, job)), run)
            found += [f"jobs/{job.name} on {overlay.name}: {line}" for line in lines]
    return found


def collisions(job: list[Object], run: list[Object]) -> Iterator[str]:
    """What of a live run a job applied beside it would change: all that they share must be equal."""
    theirs = {identity(thing): thing for thing in run}
    for thing in job:
        if theirs.get(identity(thing), thing) != thing:
            yield f"{thing['kind']} {name_of(thing)} differs from the run's; give it a name of its own"


def identity(thing: Object) -> tuple[str, str, str]:
    return thing["kind"], namespace_of(thing), name_of(thing)


def composed(base: Path, *components: Path) -> str:
    """A base with components upon it, as a user's own overlay of these lines would render."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder).resolve()
        paths = [os.path.relpath(path, here) for path in (base, *components)]
        content = {"kind": "Kustomization", "resources": paths[:1], "components": paths[1:]}
        (here / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return rendered.__wrapped__(here, tool("kubectl"))


def schema_problems(objects: list[Object], version: str = "1.33") -> Iterator[str]:
    """Core kinds, and the pods inside Ray's, against Kubernetes' own schemas; unknown fields are faults."""
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group.at}, "spec": group.pod}
        for group in groups(objects)
    ]
    for thing in [*objects, *pods]:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            continue  # a custom resource: its pods are checked here, Ray's own fields by k8s/ray_fields.py
        except kubernetes_validate.ValidationError as error:
            yield f"{thing['kind']} {name_of(thing)}: {'.'.join(map(str, error.path))}: {error.message}"


def dockerfile_problems(dockerfile: Path = K8S / "Dockerfile") -> list[str]:
    """hadolint's findings."""
    result = subprocess.run([tool("hadolint"), str(dockerfile)], capture_output=True, text=True)
    return (result.stdout + result.stderr).splitlines()


def tool(name: str) -> str:
    """A binary of the development dependencies, wherever this Python's environment is."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


if __name__ == "__main__":
    main()
