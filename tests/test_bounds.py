"""Laws of numbers and names that are given: finite and bounded, whatever key they stand under, or refused by it."""

import argparse
import ast
import math
import time
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from task_files import put_lines, put_task
from test_help import CONFIGS

from cluster.configuration.config import from_dict, load_config
from cluster.configuration.keys import declared, keys_of
from cluster.console.errors import ConfigError
from cluster.limits.bounds import (
    BELOW_BYTES,
    LARGEST_INTEGER,
    LARGEST_NUMBER,
    LONGEST_KEY_BYTES,
    LONGEST_NAME_BYTES,
    LONGEST_SECONDS,
    finite_number,
    folder_problems,
    out_of_bounds,
    seconds_given,
    whole_number,
)
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from data.order.mixture import Mixture
from trainers import generate, predict
from trainers.finetuning.config import FinetuneConfig
from trainers.planning.checks import plan_of, problems_before_start
from trainers.prediction.rows import pieces_of
from trainers.pretraining.config import PretrainConfig
from trainers.reporting.watching import SCRAPE_SECONDS_VARIABLE
from trainers.tasks.task import load_task
from tune.search.config import SweepConfig
from tune.search.space import parse_space

KEYS = [(config, name) for config in CONFIGS for name in keys_of(config)]
GIVEN: dict[str, Any] = {"corpus": {"uri": "raw", "prepared": "prepared"}}


def holding(hint: Any, number: Any) -> Any:
    """A value of the form that a type has, with the number in each place that could hold one."""
    if is_dataclass(hint):
        return {name: holding(each, number) for name, each, _ in declared(typing.cast(type, hint))}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return {"name": holding(arguments[1], number)}
    if origin is tuple:
        return [holding(each, number) for each in arguments if each is not ...]
    if hint is Any:
        return {"within": [number]}
    return (
        holding(arguments[0], number)
        if origin is not None and origin is not Literal and arguments
        else number
    )


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e308, -1e31, 10**40, -(2**63)], ids=repr)
def test_no_key_of_any_configuration_takes_a_number_that_is_none_or_beyond_all_use(
    config: type, number: float
) -> None:
    values: dict[str, Any] = {}
    for name, key in keys_of(config).items():
        at = values
        *sections, last = name.split(".")
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = holding(key.hint, number)
    with pytest.raises(ConfigError) as refused:
        from_dict(config, values)
    for name in keys_of(config):
        [line] = [line for line in refused.value.problems if line.startswith(f"{name}=")]
        assert len(line) < 250


def test_every_configuration_that_a_command_loads_is_among_those_walked_over() -> None:
    loaded = {
        ast.unparse(node.args[0])
        for folder in ("cluster", "data", "trainers", "tune")
        for path in (PROJECT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_config"
    }
    assert loaded == {config.__name__ for config in CONFIGS}


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [int, float])
def test_the_largest_numbers_are_taken_or_refused_by_a_line_without_a_traceback_or_a_wait(
    kind: type, sign: int
) -> None:
    for config, name in KEYS:
        most = LARGEST_INTEGER if kind is int else LONGEST_SECONDS if "_seconds" in name else LARGEST_NUMBER
        value = holding(keys_of(config)[name].hint, sign * kind(most))
        started = time.process_time()
        try:
            made = from_dict(config, GIVEN | nested(name, value))
            if isinstance(made, PretrainConfig):
                plan_of(made, None)
        except ConfigError as refused:
            assert refused.problems
        assert time.process_time() - started < 5, (config, name)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (PretrainConfig, "cluster.cpus_per_worker", "1e-320"),  # the workers that fit: an infinite number
        (PretrainConfig, "corpus.cpus_per_piece", "1e-320"),
        (PretrainConfig, "corpus.cpus_per_piece", "5000"),  # waits for such a node without end
        (FinetuneConfig, "run.seeds", "[0, -1]"),
    ],
)
def test_what_no_machine_or_generator_can_count_is_refused_by_its_key(
    config: type, key: str, value: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(config, [f"--{key}", value], description="")
    assert any(line.startswith(f"{key}=") for line in refused.value.problems)


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e400", "1e308"])
@pytest.mark.parametrize(
    "key", ["guard.max_norm_ratio", "order.weights.a", "optimizer.betas", "engine.deepspeed.a"]
)
def test_so_are_those_of_the_command_line_and_of_a_file(text: str, key: str, tmp_path: Path) -> None:
    value = f"[0.5, {text}]" if key == "optimizer.betas" else text
    (tmp_path / "x.yaml").write_text(
        "\n".join(f"{'  ' * n}{p}:" for n, p in enumerate(key.split("."))) + f" {value}\n"
    )
    for argv in ([f"--{key}", value], ["--config", str(tmp_path / "x.yaml")]):
        with pytest.raises(ConfigError) as refused:
            load_config(PretrainConfig, argv, description="")
        named = key.rpartition(".")[0] if key[-2:] == ".a" else key
        [line] = [line for line in refused.value.problems if line.startswith(f"{named}=")]
        assert "is not finite" in line or "is beyond 1e+30" in line


def test_so_are_those_of_a_task_of_a_space_and_of_its_points(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split.validation=NaN is not finite"):
        load_task(put_task(tmp_path / "t.yaml", name="t", kind="regression", split={"validation": math.nan}))
    with pytest.raises(ConfigError, match=r"space=.* is not finite"):
        from_dict(SweepConfig, {"space": {"optimizer.learning_rate": {"uniform": [0.1, math.inf]}}})
    base = from_dict(FinetuneConfig, {"run": {"task": "t"}, "backbone": {"uri": "b"}})
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate=Infinity is not finite"):
        parse_space({"optimizer.learning_rate": {"choice": [0.1, math.inf]}}, base)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e308", "ten"])
def test_so_are_those_of_a_plain_command_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        finite_number(text)
    for main, argv in (
        (predict.main, ["--model", "m", "--input", "i", "--output", "o", f"--cpus-per-worker={text}"]),
        (generate.main, ["--model", "m", "--prompt", "p", f"--temperature={text}"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2 and text in capsys.readouterr().err


def test_no_command_reads_a_number_without_its_bounds() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="largest integer"):
        whole_number("9" * 30)
    for text in ("9" * 5_000, "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"invalid int value: '{text[:40]}'"):
            whole_number(text)
    bare = [
        path.name
        for folder in ("cluster", "data", "trainers", "tune")
        for path in (PROJECT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword)
        and node.arg == "type"
        and ast.unparse(node.value) in ("int", "float")
    ]
    assert bare == []


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e300", "soon", ""])
def test_so_are_seconds_of_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PATIENCE_SECONDS", text)
    with pytest.raises(ConfigError, match="STORE_PATIENCE_SECONDS"):
        open_store("runs")
    monkeypatch.setenv("STORE_PATIENCE_SECONDS", "2.5")
    assert seconds_given("STORE_PATIENCE_SECONDS", 1) == 2.5 and seconds_given("NOT_GIVEN", 7) == 7


def test_what_the_driver_reads_of_the_environment_at_its_end_is_checked_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.setenv(SCRAPE_SECONDS_VARIABLE, "inf")
    places = {
        "corpus": {"uri": str(tmp_path), "prepared": f"{tmp_path}-p"},
        "run": {"storage": f"{tmp_path}-r"},
    }
    [line] = problems_before_start(from_dict(PretrainConfig, places))
    assert SCRAPE_SECONDS_VARIABLE in line


def test_time_has_a_bound_that_waits_can_take() -> None:
    assert out_of_bounds("join_seconds", 2e9) and out_of_bounds("phase_timeout_seconds.save", [2e9])
    assert out_of_bounds("floor_bytes", 2_000_000_000) is None


@pytest.mark.parametrize("largest", [1e308, 1e-308, 3.0])
def test_shares_of_the_largest_weights_are_those_of_small_ones(largest: float) -> None:
    def counts(weights: list[float]) -> list[int]:
        mixture = Mixture(rows_per_step=16, lanes=4, schedule=[(0, weights)], seed=0)
        return mixture.counts_before(1_000, range(4)).tolist()

    assert counts([largest, largest / 2, largest]) == counts([1.0, 0.5, 1.0])


# --- names ---

STORAGE = ("runs", "s3://bucket/runs", "gs://bucket/runs", "file:///data/runs")


@pytest.mark.parametrize(
    "name", ["a" * 256, "a" * 300, "字" * 86, "", ".", "..", "a/..", "a\nb", "a\x00b", "\udcff"]
)
@pytest.mark.parametrize("storage", STORAGE)
def test_a_name_that_no_folder_can_have_is_refused(name: str, storage: str) -> None:
    [line] = folder_problems("run.name", name, storage)
    assert line.startswith("run.name=") and "\n" not in line and len(line) < 200


@pytest.mark.parametrize(
    "name", ["a" * 255, "字" * 85, "a b", "🚀 50%", "naïve", "it's", "a?b", "team/first"]
)
@pytest.mark.parametrize("storage", STORAGE)
def test_any_other_name_is_taken(name: str, storage: str) -> None:
    assert not list(folder_problems("run.name", name, storage))


def test_a_name_counts_with_what_is_made_of_it_and_with_the_folder_that_it_lies_in() -> None:
    assert list(folder_problems("sweep.name", "a" * 251, "sweeps", "-best"))
    most = LONGEST_KEY_BYTES - BELOW_BYTES - len("/run")
    assert not list(folder_problems("run.name", "run", f"s3://bucket/{'a' * most}"))
    [line] = folder_problems("run.name", "run", f"s3://bucket/{'a' * (most + 1)}")
    assert f"{LONGEST_KEY_BYTES - BELOW_BYTES}" in line
    assert not list(folder_problems("run.name", "run", f"file:///{'a' * most}"))


@pytest.mark.parametrize(
    ("config", "key"),
    [(PretrainConfig, "run.name"), (FinetuneConfig, "run.name")]
    + [
        (config, key)
        for config in CONFIGS
        for key in ("sweep.name", "curve.name", "name")
        if key in keys_of(config)
    ],
)
def test_every_name_of_a_folder_is_checked_before_anything_starts(config: type, key: str) -> None:
    for name in ("a" * 256, "a\nb"):
        values = nested(key, name) | ({"kind": "regression"} if key == "name" else {})
        with pytest.raises(ConfigError) as refused:
            from_dict(config, values)
        assert [line for line in refused.value.problems if line.startswith(f"{key}=")]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("runs/" + "a" * 256, "256 bytes"),
        ("file:///data/" + "字" * 86 + "/runs", "258 bytes"),
        ("s3://bucket/" + "a/" * 513, "1,026 bytes"),
        ("/a" * 2_048, "4,096 bytes"),
        ("gs://bucket/a\nb", "control character"),
        ("runs\x00", "control character"),
        ("runs/\udcff", "control character"),
    ],
)
def test_a_location_that_no_store_can_have_is_refused_where_it_is_opened(uri: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        open_store(uri)
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


def test_answers_to_a_file_of_the_longest_name_have_names_that_files_can_have(tmp_path: Path) -> None:
    path = tmp_path / ("字" * 83 + ".jsonl")
    [piece] = pieces_of(put_lines(path, [{"text": "a"}]))
    assert len(f"{piece.name}-00000.jsonl".encode()) <= LONGEST_NAME_BYTES
    open_store(str(tmp_path)).put(f"{piece.name}-00000.jsonl", b"{}")
