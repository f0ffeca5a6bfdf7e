import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ARROWS = ["cluster", "data", "trainers", "tune"]  # a package imports itself and those before it
MAY_IMPORT = {
    "ray": {
        "cluster.nodes.nodes",
        "cluster.nodes.fitness",
        "cluster.sessions.session",
        "data.rows.stream",
        "data.preparing.corpus",
        "trainers.reporting.live_metrics",
        "trainers.prediction.job",
        "trainers.recovery.rendezvous",
        "trainers.pretraining.driver",
        "tune.trials.trials",
    },
    "deepspeed": {"trainers.engine.engine"},
    "boto3": {"cluster.storage.uris"},
    "botocore": {"cluster.storage.uris"},
    "google.auth": {"cluster.storage.google_cloud"},
    "pyarrow.fs": set(),
}
FILES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts): path
    for package in ARROWS
    for path in sorted((PROJECT / package).rglob("*.py"))
    if path.name != "__init__.py"
}


def imports_of(path: Path) -> set[str]:
    """Full names of all that a file imports, at its top or later."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: siblings are imported by their full names"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {module: imports_of(path) for module, path in FILES.items()}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_point_one_way() -> None:
    against = {
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in names
        for later in [*ARROWS[ARROWS.index(module.partition(".")[0]) + 1 :], "tests", "benchmarks"]
        if is_within(name, later)
    }
    assert not against


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {other for other in FILES if any(is_within(name, other) for name in names)}
        for module, names in IMPORTS.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_no_folder_imports_itself_by_way_of_others() -> None:
    folder_of = {module: module.rpartition(".")[0] if module.count(".") > 1 else module for module in FILES}
    graph: dict[str, set[str]] = {}
    for module, names in IMPORTS.items():
        used = {folder_of[other] for other in FILES if any(is_within(name, other) for name in names)}
        graph.setdefault(folder_of[module], set()).update(used - {folder_of[module]})
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_spoken_to_in_its_named_files_only(library: str) -> None:
    users = {module for module, names in IMPORTS.items() if any(is_within(name, library) for name in names)}
    assert users == MAY_IMPORT[library]


def test_no_file_hides_a_module_of_python_or_of_a_package() -> None:
    # A script's folder leads sys.path: trainers/data.py would be what `import data` finds.
    taken = sys.stdlib_module_names | packages_distributions().keys() | set(ARROWS)
    assert not {module for module in FILES if module.rpartition(".")[2] in taken}


def test_a_page_has_a_line_for_each_command_and_folder_and_none_for_one_that_is_gone() -> None:
    page = (PROJECT / "docs" / "pages" / "map.md").read_text()
    named = re.findall(
        r"^\| `((?:cluster|data|trainers|tune|k8s|benchmarks)/\w+(?:\.py|/))` \|", page, re.MULTILINE
    )
    presets = {"trainers/configs/", "tune/configs/"}
    assert sorted(set(named) - presets) == sorted([*COMMANDS, *FOLDERS])


def test_the_readme_names_each_command_and_folder() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert {path for path in COMMANDS if path.startswith(tuple(ARROWS))} <= set(
        re.findall(r"[\w/]+\.py", readme)
    )
    words = set(re.findall(r"\w+", readme))
    assert {folder.split("/")[1] for folder in FOLDERS} <= words


def test_only_commands_stand_beside_the_folders_of_a_package() -> None:
    beside = {path for module, path in FILES.items() if module.count(".") == 1}
    assert beside == {path for path in beside if 'if __name__ == "__main__":' in path.read_text()}


COMMANDS = [
    str(path.relative_to(PROJECT))
    for folder in [*ARROWS, "k8s", "benchmarks"]
    for path in (PROJECT / folder).glob("*.py")
    if path.name != "__init__.py"
]
FOLDERS = {module.rpartition(".")[0].replace(".", "/") + "/" for module in FILES} - {
    f"{top}/" for top in ARROWS
}


ENTRIES = [
    path
    for folder in [*ARROWS, "benchmarks", "k8s"]
    for path in sorted((PROJECT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_finds_the_project_where_it_is_not_installed(path: Path) -> None:
    """A Ray job's nodes may have the packages alone: the script says where the project lies before it imports it."""
    told = False
    for node in ast.parse(path.read_text()).body:
        told |= isinstance(node, ast.If) and "sys.path" in ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module:
            ours = node.module.partition(".")[0] in [*ARROWS, "benchmarks", "tests"]
            assert told or not ours, f"line {node.lineno} imports {node.module} before sys.path is set"
    assert told


@pytest.mark.parametrize("path", ["trainers/pretrain.py", "trainers/finetune.py", "tune/sweep.py"])
def test_an_entry_without_the_packages_says_in_one_line_what_to_do(path: str) -> None:
    bare = subprocess.run([sys.executable, "-S", path], cwd=PROJECT, capture_output=True, text=True)
    assert bare.returncode == 1 and bare.stdout == ""
    assert re.fullmatch(r"\w+ is not installed: run `make setup`, then .venv/bin/python\n", bare.stderr)


IMPORT_ALL = """
import importlib, sys, threading
import psutil
for module in sys.argv[1].split(","):
    importlib.import_module(module)
process = psutil.Process()
assert threading.active_count() == 1, threading.enumerate()
assert not process.children(), process.children()
assert not process.net_connections(), process.net_connections()
print(*(name for name in ("ray", "torch", "deepspeed", "torch._inductor") if name in sys.modules))
"""


def loaded_by(modules: list[str]) -> set[str]:
    """Which heavy packages are loaded once these modules are; fails if their import started anything."""
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(modules)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.slow
def test_importing_any_module_starts_nothing() -> None:
    # Each costs every process of a run 2 s.
    assert not {"deepspeed", "torch._inductor"} & loaded_by(list(FILES))


def test_cluster_and_data_load_neither_ray_nor_torch() -> None:
    light = [
        module
        for module in FILES
        if module.startswith(("cluster.", "data.")) and module != "data.rows.stream"
    ]
    assert loaded_by(light) == set()
