"""Laws of YAML from outside: it is bounded before it is expanded, and refused where a parser would guess."""

import ast
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.configuration.config import load_config
from cluster.configuration.stored_file import read_yaml
from cluster.console.errors import ConfigError, UserError
from cluster.limits.strict_yaml import DEEPEST, LARGEST_BYTES, parse_yaml
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from trainers import export
from trainers.pretraining.config import PretrainConfig
from trainers.pretraining.run_folder import check_unchanged
from trainers.reporting.results import read_run
from trainers.tasks.task import load_task
from tune.curves.pretraining_text import stored_config
from tune.search.config import SweepRunConfig
from tune.sweeps.folder import changes
from tune.sweeps.judgement import refuse_after_judgement

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
"""A billion laughs: 3.5 billion values in half a KiB."""
REFUSED = {
    "an alias": (LAUGHS, "alias"),
    "an alias to itself": ("a: &a [*a]\n", "alias"),
    "a merged alias": ("a: &a {b: 1}\nc: {<<: *a}\n", "alias"),
    "lists within lists": ("a: " + "[" * 100_000, f"{DEEPEST} levels"),
    "mappings within mappings": ("{a: " * 50_000, f"{DEEPEST} levels"),
    "a key twice": ("a: 1\na: 2\n", "key a stands twice"),
    "a key twice within": ("a: {b: 1, b: 2}\n", "key b stands twice"),
    "too many bytes": ("a: " + "x" * LARGEST_BYTES, "bytes of YAML"),
    "a number too long to print": ("a: " + "9" * 5_000, "a number of 5,000 characters"),
    "a number in base 60 without end": ("a: " + "1:" * 200_000 + "1", "characters"),
    "a number in base 60 out of range": ("a: " + "1:" * 190 + "1.5", "not YAML"),
    "a date that is none": ("a: 2024-99-99\n", "not YAML"),
    "a date as a key": ("a: {2024-01-01: 1}\n", "put it in quotes"),
    "a list as a key": ("? [a]\n: b\n", "not YAML"),
    "a tag": ("a: !!python/object/apply:os.system [ls]\n", "not YAML"),
    "a number without digits": ('a: !!int ""\n', "not YAML"),
    "a mapping tagged as a date": ("a: !!timestamp {=: x}\n", "not YAML"),
    "no UTF-8": (b"a: \xff\n", "not YAML"),
    "an unfinished list": ("a: [1\n", "not YAML"),
}


@pytest.mark.parametrize(("content", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_has_one_line_and_takes_no_time(content: str | bytes, why: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError) as refused:
        parse_yaml(content, "run/config.yaml")
    [line] = refused.value.problems
    assert line.startswith("run/config.yaml: ") and why in line and len(line) < 200 and "\n" not in line
    assert time.process_time() - started < 1


def test_many_keys_are_compared_in_linear_time() -> None:
    started = time.process_time()
    assert len(parse_yaml("".join(f"k{n}: 1\n" for n in range(10_000)), "x")) == 10_000
    assert time.process_time() - started < 10


def test_ordinary_yaml_is_taken() -> None:
    text = "a: {b: [1, 2.5, 1e-3, yes, null, x]}\n1: y\n# no more\n"
    assert parse_yaml(text, "x") == {"a": {"b": [1, 2.5, 0.001, True, None, "x"]}, 1: "y"}
    assert parse_yaml("[" * DEEPEST + "]" * DEEPEST, "x") is not None


READERS: dict[str, Callable[[Path], object]] = {
    "an overlay": lambda folder: load_config(
        PretrainConfig, ["--config", f"{folder}/config.yaml"], description=""
    ),
    "a task": lambda folder: load_task(f"{folder}/config.yaml"),
    "a run that goes on": lambda folder: check_unchanged(open_store(str(folder)), PretrainConfig()),
    "a report": lambda folder: read_run(open_store(str(folder))),
    "an export": lambda folder: export.main(["--run", str(folder), "--output", f"{folder}/out"]),
    "a sweep": lambda folder: list(changes(open_store(str(folder)), PretrainConfig(), {})),
    "a judged sweep": lambda folder: refuse_after_judgement(open_store(str(folder)), SweepRunConfig()),
    "a backbone's corpus": lambda folder: stored_config(open_store(str(folder))),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "content", [LAUGHS, "[" * 2_000, "a: " + "x" * LARGEST_BYTES], ids=["laughs", "deep", "large"]
)
def test_every_reader_refuses_what_would_be_expanded(
    read: Callable[[Path], object], content: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "origin.json").write_text("{}")
    (tmp_path / "judged.json").write_text('{"point": {}}')
    with pytest.raises(UserError) as refused:
        read(tmp_path)
    assert "config.yaml" in str(refused.value).splitlines()[0]


@pytest.mark.parametrize("content", ["", "- a\n", "text"])
def test_a_stored_configuration_that_is_no_mapping_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_yaml(open_store(str(tmp_path)), "config.yaml", dict[str, Any], "put it back")


def test_a_configuration_of_a_gigabyte_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # sparse
    tracemalloc.start()
    with pytest.raises(ConfigError, match="bytes of YAML"):
        load_config(PretrainConfig, ["--config", str(path)], description="")
    assert tracemalloc.get_traced_memory()[1] < 10 * LARGEST_BYTES
    tracemalloc.stop()


def test_no_module_reads_yaml_by_itself() -> None:
    reading = [
        path.relative_to(PROJECT).as_posix()
        for folder in ("cluster", "data", "trainers", "tune")
        for path in (PROJECT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("yaml.") and "load" in node.attr
    ]
    assert reading == ["cluster/limits/strict_yaml.py"]
