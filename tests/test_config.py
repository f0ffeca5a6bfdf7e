import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.configuration.config import from_dict, load_config, run_entry, to_dict, to_yaml
from cluster.configuration.keys import nearest
from cluster.console.errors import ConfigError
from cluster.limits.bounds import LARGEST_INTEGER, LARGEST_NUMBER


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A section."""

    hidden_size: int = 384
    """Width of the residual stream."""
    num_heads: int = 6
    """Attention heads."""
    precision: Literal["bf16", "fp32", "on"] = "bf16"
    """Of the matrix products."""

    def problems(self, at: str) -> Iterator[str]:
        if self.hidden_size % self.num_heads:
            yield f"{at}.num_heads={self.num_heads} does not divide {at}.hidden_size={self.hidden_size}"


@dataclass(frozen=True, kw_only=True)
class Rate:
    peak: float = 0.001
    """Learning rate
    per step."""
    floor: float | None = None
    """Or none."""
    milestones: tuple[int, ...] = (10, 20)
    """Steps."""


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str = "sample"
    """Of the run."""
    steps: int = 10
    """Optimiser steps."""
    is_quick: bool = False
    """Leave things out."""
    sources: dict[str, str] = field(default_factory=dict)
    """URI of each source."""
    limits: dict[str, float] = field(default_factory=lambda: {"start": 1.0, "save": 2.0})
    """Seconds of each phase."""
    engine: dict[str, int | float | str | bool | dict] = field(default_factory=dict)
    """Passed through."""
    shape: Shape = Shape(hidden_size=96)
    """The model's."""
    rate: Rate = Rate()
    """The optimiser's."""
    teacher: Shape | None = None
    """Another model's."""

    def problems(self, at: str) -> Iterator[str]:
        if self.steps < self.rate.milestones[0]:
            yield f"steps={self.steps} is below rate.milestones={self.rate.milestones}"


def load(*argv: str) -> Job:
    return load_config(Job, argv, description="A job.").config


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def test_defaults_stand_where_nothing_is_given() -> None:
    assert load() == Job()


def test_one_value_stands_for_a_list_of_one() -> None:
    assert load("--rate.milestones", "5").rate.milestones == (5,)


def test_a_key_at_the_end_without_its_value_is_told_so() -> None:
    assert problems_of("--name", "x", "--steps") == ["--steps needs a value"]


def test_the_command_line_wins_over_a_later_file_over_an_earlier_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 20\nname: a\nshape: {num_heads: 3}\n")
    (tmp_path / "b.yaml").write_text("name: b\nshape: {num_heads: 4, hidden_size: 100}\nrate:\n")
    config = load("--config", f"{tmp_path}/a.yaml", "--shape.num_heads", "5", f"--config={tmp_path}/b.yaml")
    assert config == Job(steps=20, name="b", shape=Shape(num_heads=5, hidden_size=100))


@pytest.mark.parametrize("how", ["file", "two files", "command line", "mapping on the command line"])
def test_entries_of_a_mapping_are_laid_over_those_before_them_wherever_they_stand(
    how: str, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("limits: {save: 3}\nsources: {a: x, b: y}\nengine: {zero: {stage: 1}}\n")
    (tmp_path / "b.yaml").write_text("limits: {load: 4}\nsources: {b: z}\nengine: {zero: {fast: true}}\n")
    first, second = ["--config", f"{tmp_path}/a.yaml"], ["--config", f"{tmp_path}/b.yaml"]
    assert load(*first).limits == {"start": 1.0, "save": 3.0}
    if how == "command line":
        second = ["--limits.load", "4", "--sources.b", "z", "--engine.zero", "{fast: true}"]
    elif how == "mapping on the command line":
        second = ["--limits", "{load: 4}", "--sources", "{b: z}", "--engine", "{zero: {fast: true}}"]
    config = load(*first, *second) if how != "file" else load(*second)
    if how == "file":
        assert config.limits == {"start": 1.0, "save": 2.0, "load": 4.0} and config.sources == {"b": "z"}
        return
    assert config.limits == {"start": 1.0, "save": 3.0, "load": 4.0}
    assert config.sources == {"a": "x", "b": "z"}
    assert config.engine == {"zero": {"fast": True}}, "an entry is whole"


def test_null_takes_an_entry_of_a_mapping_away_and_is_a_mistake_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("limits: {save: null}\nsources: {a: x, b: y}\n")
    config = load("--config", f"{tmp_path}/a.yaml", "--sources.a", "null")
    assert (config.limits, config.sources) == ({"start": 1.0}, {"b": "y"})
    (line,) = problems_of("--sources", "{a: null}")
    assert "sources=" in line


def test_hyphens_and_underscores_are_equal_in_keys_and_kept_in_names() -> None:
    assert load("--shape.num-heads=3").shape.num_heads == 3
    assert load("--sources.king-james", "s3://b/k").sources == {"king-james": "s3://b/k"}


def test_values_have_the_type_of_their_field() -> None:
    config = load(
        *(
            "--rate.peak",
            "1e-3",
            "--rate.floor",
            "1",
            "--rate.milestones",
            "[1, 2]",
            "--is_quick",
            "--name",
            "007",
        ),
        *("--shape.precision", "on", "--engine.zero.stage", "2", "--engine.zero.fast=true"),
    )
    assert config.rate == Rate(peak=0.001, floor=1.0, milestones=(1, 2))
    assert (config.is_quick, config.name, config.shape.precision) == (True, "007", "on")
    assert config.engine == {"zero": {"stage": 2, "fast": True}}
    assert load("--rate.floor", "null").rate.floor is None
    assert load("--teacher.num_heads", "3").teacher == Shape(num_heads=3)


def test_flags_are_told_apart_from_values() -> None:
    argv = ["--dry-run", "--steps", "11"]
    loaded = load_config(Job, argv, description="", extra_flags={"dry-run": "Start nothing."})
    assert loaded.flags == {"dry-run"} and loaded.config.steps == 11
    assert load_config(Job, [], description="").flags == frozenset()


def test_three_mistakes_of_three_kinds_are_three_lines() -> None:
    unknown, mistyped, indivisible = problems_of(
        "--step", "3", "--rate.peak", "fast", "--shape.num_heads", "7"
    )
    assert "step " in unknown and "nearest: steps" in unknown
    assert "rate.peak" in mistyped and '"fast"' in mistyped and "float" in mistyped
    assert "shape.num_heads=7" in indivisible and "shape.hidden_size=96" in indivisible


def test_checks_across_sections_are_heard_beside_other_mistakes() -> None:
    lines = problems_of("--steps", "3", "--rate.paek", "1")
    assert any("steps=3" in line for line in lines) and any("rate.peak" in line for line in lines)


def test_no_line_speaks_of_a_default_in_place_of_a_wrong_value() -> None:
    assert len(problems_of("--rate.milestones", "soon", "--steps", "3")) == 1
    assert len(problems_of("--shape.num_head", "5", "--shape.hidden_size", "95")) == 1


@pytest.mark.parametrize(
    ("argv", "key", "remedy"),
    [
        (["--steps", "1.5"], "steps=1.5", "int"),
        (["--steps", "true"], "steps=true", "int"),
        (["--steps"], "--steps", "needs a value"),
        (["--is_quick", "1"], "is_quick=1", "bool"),
        (["--shape.precision", "fp23"], "shape.precision", "nearest: fp32"),
        (["--rate.milestones", "[1, x]"], "rate.milestones", "tuple[int, ...]"),
        (["--rate.milestones", "x"], "rate.milestones", "tuple[int, ...]"),
        (["--shape", "3"], "shape", "section"),
        (["--name.first", "x"], "name.first", "--help"),
        (["--peak", "3"], "peak", "nearest: rate.peak"),
        (["--shape.num_headz.x", "3"], "shape.num_headz.x", "nearest: shape.num_heads"),
        (["stray"], "stray", "--section.key value"),
        (["--config"], "--config", "YAML"),
        (["--config", "no/such.yaml"], "no/such.yaml", "No such file"),
    ],
)
def test_a_mistake_names_key_and_remedy(argv: list[str], key: str, remedy: str) -> None:
    [line] = problems_of(*argv)
    assert key in line and remedy in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps: 1\nsteps: 20\n", "steps"),
        ("steps: [1\n", "not YAML"),
        ("- steps\n", "list"),
        ("shape: {num_head: 2}\n", "nearest: shape.num_heads"),
        ("shape: 5\n", "section"),
        ("name: 5\n", "quotes"),
        ("sources: {a: 5}\n", "sources"),
    ],
)
def test_a_mistake_in_a_file_is_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    [line] = problems_of("--config", f"{tmp_path}/x.yaml")
    assert named in line


def test_a_missing_file_names_the_nearest_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sample.yaml").write_text("")
    assert "sample.yaml" in problems_of("--config", f"{tmp_path}/smaple.yaml")[0]


def test_a_key_without_a_default_must_be_given() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Strict:
        steps: int
        """Steps."""

    with pytest.raises(ConfigError, match="steps must be given: int"):
        from_dict(Strict, {})
    assert from_dict(Strict, {"steps": 3}) == Strict(steps=3)


floats = st.floats(-LARGEST_NUMBER, LARGEST_NUMBER)
integers = st.integers(-LARGEST_INTEGER, LARGEST_INTEGER)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]))
jobs = st.builds(
    Job,
    name=texts
    | st.sampled_from(["1e-3", "on", "null", "2024-01-01", "007", "1_000", "0x1F", "~", "=", "<<"]),
    steps=st.integers(10**6, 10**18),
    is_quick=st.booleans(),
    sources=st.dictionaries(texts, texts),
    limits=st.dictionaries(st.sampled_from(["start", "save", "load"]), floats),
    engine=st.dictionaries(texts, integers | floats | texts | st.booleans(), max_size=3),
    rate=st.builds(Rate, peak=floats, floor=st.none() | floats, milestones=st.tuples(st.integers(-5, 5))),
    teacher=st.none() | st.just(Shape(num_heads=4)),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=jobs)
def test_yaml_that_is_printed_is_read_back_equal(config: Job, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(to_yaml(config), newline="")
    assert load("--config", f"{tmp_path}/x.yaml") == config
    assert from_dict(Job, to_dict(config)) == config


def test_print_config_prints_the_merged_configuration_and_exits_0(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        load("--shape.num_heads", "3", "--print-config")
    (tmp_path / "x.yaml").write_text(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert load("--config", f"{tmp_path}/x.yaml") == replace(Job(), shape=Shape(num_heads=3, hidden_size=96))


def test_help_names_every_key_with_type_default_and_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_config(Job, ["--help"], description="A job.", extra_flags={"dry-run": "Start nothing."})
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    for expected in (
        "--steps int (default 10) Optimiser steps.",
        "--shape.hidden_size int (default 96) Width of the residual stream.",
        "--shape.precision bf16|fp32|on",
        "--rate.peak float (default 0.001) Learning rate per step.",
        "--rate.floor float | null",
        "--teacher.num_heads int (default 6)",
        "--dry-run Start nothing.",
        "--config FILE",
    ):
        assert expected in text


def test_the_nearest_word_is_one_typing_mistake_away() -> None:
    candidates = ["batch.seq_len", "batch.rows_per_step", "order.lanes"]
    assert nearest("order.lane", candidates) == "order.lanes"
    assert nearest("seq_length", candidates) == "batch.seq_len"
    assert nearest("zzz", candidates) is None


def test_a_user_sees_the_lines_without_a_traceback_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_entry(lambda: load("--step", "3", "--nmae", "x"))
    assert exit_.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and "nearest: steps" in shown[0] and "nearest: name" in shown[1]


def test_a_configuration_error_can_be_pickled() -> None:
    with pytest.raises(ConfigError) as caught:
        load("--step", "3")
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems
