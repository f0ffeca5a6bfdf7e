"""Each rule of the manifests finds a fault that is planted for it, and nothing where there is none."""

import ast
import copy
import re
import sys
from pathlib import Path

import pytest
import yaml

from k8s.check import JOB_OVERLAYS, JOBS, K8S, RULES, collisions, composed, problems_of, render_of
from k8s.manifests import of_kind
from tests.k8s_faults import FAULTS, group, one, pod
from tests.k8s_value_faults import VALUE_FAULTS
from tests.test_k8s import objects_of

EVERY_FAULT = FAULTS | VALUE_FAULTS
MODULES = {str(sys.modules[rule.__module__].__file__) for rule in RULES}


@pytest.mark.parametrize("what", EVERY_FAULT)
@pytest.mark.slow
def test_a_planted_fault_is_found_by_its_rule(what: str) -> None:
    rule, name, deed = EVERY_FAULT[what]
    objects = copy.deepcopy(objects_of(name))
    deed(objects)
    found = {each.__name__: list(each(render_of(objects))) for each in RULES}
    assert found[rule], f"{what}: {rule} found nothing"


def messages() -> set[tuple[str, int]]:
    """(module, line) of every `yield` of the rules, and of what a generator in a `yield from` gives."""
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(Path(module).read_text())):
            if isinstance(node, ast.Yield):
                found.add((module, node.lineno))
            elif isinstance(node, ast.YieldFrom) and isinstance(node.value, ast.GeneratorExp):
                found.add((module, node.value.elt.lineno))
    return found


@pytest.mark.slow
def test_no_message_of_a_rule_is_without_a_planted_fault() -> None:
    rules, reached = {rule.__name__: rule for rule in RULES}, set()

    def note(frame, event, _):
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return note if frame.f_code.co_filename in MODULES else None

    before = sys.gettrace()
    for rule, name, deed in EVERY_FAULT.values():
        objects = copy.deepcopy(objects_of(name))
        deed(objects)
        sys.settrace(note)
        try:
            list(rules[rule](render_of(objects)))
        finally:
            sys.settrace(before)
    assert not sorted(messages() - reached)


@pytest.mark.slow
def test_schemas_find_a_misspelt_field_inside_a_ray_pod_and_in_a_core_kind() -> None:
    objects = objects_of("base")
    pod(objects)["terminationGracePeriodSecond"] = 30
    one(objects, "ServiceAccount")["automountToken"] = False
    faults = problems_of(yaml.safe_dump_all(objects), "planted")
    assert any("terminationGracePeriodSecond" in line for line in faults)
    assert any("automountToken" in line for line in faults)


@pytest.mark.parametrize("job", [folder.name for folder in JOBS])
@pytest.mark.parametrize("overlay", [folder.name for folder in JOB_OVERLAYS])
def test_a_job_applied_beside_a_live_run_changes_nothing_of_it(job: str, overlay: str) -> None:
    run = objects_of("base" if overlay == "base" else f"overlays/{overlay}")
    objects = copy.deepcopy(objects_of(f"jobs/{job} on {overlay}"))
    assert list(collisions(objects, run)) == []
    budget = of_kind(objects, "PodDisruptionBudget")[1]
    budget["metadata"]["name"] = "pretraining-train"
    assert [line.split()[1] for line in collisions(objects, run)] == ["pretraining-train"]


@pytest.mark.parametrize("job", [folder.name for folder in JOBS])
def test_a_job_on_another_cloud_is_told_which_of_its_buckets_are_not_the_sites(job: str) -> None:
    text = composed(K8S / "overlays" / "gke", K8S / "jobs" / job)
    faults = [line for line in problems_of(text, "mine") if "one_site" in line]
    assert any("s3://example-runs, site.yaml gs://example-corpus, gs://example-runs" in f for f in faults)


def test_a_misspelt_field_of_a_ray_resource_is_named_with_the_nearest() -> None:
    objects = copy.deepcopy(objects_of("base"))
    group(objects)["minReplica"] = 2
    one(objects, "RayJob")["spec"]["ttlSecondAfterFinished"] = 600
    faults = "\n".join(problems_of(yaml.safe_dump_all(objects), "planted"))
    assert re.search(r"workerGroupSpecs\[0\]\.minReplica .*minReplicas", faults)
    assert re.search(r"spec\.ttlSecondAfterFinished .*ttlSecondsAfterFinished", faults)
