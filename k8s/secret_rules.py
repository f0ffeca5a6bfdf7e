"""Rules for what manifests name and do not hold: accounts, priorities, ConfigMaps, and the Secrets beside them.

A rule is a pure function from a render to a line per fault. Its docstring says what happens where it is broken.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from k8s.manifests import Render, name_of, pod_specs, walk

SECRETS_BESIDE = {"s3-keys", "redis"}
"""Created by hand, by the commands in the overlays and components that name them."""
NAMED_BY = {
    "configMap": "ConfigMap",
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "secret": "Secret",
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
}
"""Field -> the kind that it names, in containers, volumes and KubeRay's own options."""
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|(?i:password|auth_token|api_key|secret\w*key)[ \t]*[:=][ \t]*\S{8}"
)
ASSIGNED = re.compile(r"(?<![\w.-])([A-Z][A-Z0-9_]*)=[^\s$]")
"""A variable that a command sets, unless from another one."""


def references(render: Render) -> Iterator[str]:
    """kustomize changes names; inside a RayJob it follows only what base/nameref.yaml lists. A pod that names what is
    not there is never started."""
    there = {(thing["kind"], name_of(thing)) for thing in render.objects}
    there |= {("Secret", name) for name in SECRETS_BESIDE}
    wanted = [
        (at, kind, pod.get(field))
        for at, pod in pod_specs(render.objects)
        for field, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass"))
    ]
    for thing in render.objects:
        for at, value in walk(thing):
            kind = NAMED_BY.get(at.rpartition(".")[2])
            if kind and isinstance(value, dict) and not value.get("optional"):
                where = f"{thing['kind']} {name_of(thing)}: {at}"
                wanted.append((where, kind, value.get("secretName") or value.get("name")))
    for at, kind, name in wanted:
        if name and (kind, name) not in there:
            beside = f" nor one of SECRETS_BESIDE ({', '.join(sorted(SECRETS_BESIDE))})"
            yield f"{at} names {kind} {name}, which is not rendered{beside if kind == 'Secret' else ''}"


def secrets(render: Render) -> Iterator[str]:
    """What stands in a manifest stands in a repository: keys come from Secrets that no manifest holds."""
    for thing in render.objects:
        of = f"{thing['kind']} {name_of(thing)}"
        if thing["kind"] == "Secret":
            yield f"{of} must not be rendered; create it beside the manifests"
            continue
        for at, value in walk(thing):
            for name in given_secrets(at.rpartition(".")[2], value):
                yield f"{of}: {at}: {name} holds a value; take it from a Secret"
            if isinstance(value, str) and SECRET_VALUE.search(value):
                yield f"{of}: {at} looks as if it held a secret"


def given_secrets(field: str, value: Any) -> Iterator[str]:
    """Names of secrets for which a value, that of `field`, gives one: variables of containers, jobs and commands."""
    named: dict[str, Any] = {}
    if field == "runtimeEnvYAML":
        named = (yaml.safe_load(value) or {}).get("env_vars") or {}
    elif isinstance(value, str):
        named = {name: "given" for name in ASSIGNED.findall(value)}
    elif isinstance(value, dict) and value.get("value"):
        named = {str(value.get("name", field)): value["value"]}
    yield from (name for name, each in named.items() if each and SECRET_NAME.search(name))


RULES = (references, secrets)
