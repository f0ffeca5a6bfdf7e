"""What this project wrote is read back as it was written, or refused in one line: place, what is wrong, what helps."""

import json
import math
import pickle
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.configuration import stored_file
from cluster.configuration.stored_file import (
    MAX_DEPTH,
    DamagedFileError,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
)
from cluster.console.errors import ConfigError, UserError
from cluster.storage.uris import open_store
from trainers.finetuning.loop import Choice

REFUSED = {
    "nothing": (b"", "Expecting value"),
    "half": (b'{"a": 1, "b"', "Expecting"),
    "more": (b'{"a": 1}{"a": 1}', "Extra data"),
    "twice": (b'{"a": 1, "a": 2}', 'the key "a" stands twice'),
    "twice within": (b'{"a": 1, "b": [{"c": 1, "c": 1}]}', 'the key "c" stands twice'),
    "NaN": (b'{"a": NaN}', "NaN stands for a number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity stands for a number"),
    "too large": (b'{"a": 1e999}', "1e999 is too large"),
    "many digits": (b'{"a": ' + b"9" * 10_000 + b"}", "more than 64 bits"),
    "deep": (b'{"a": 1, "b": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", "nests deeper"),
    "very deep": (b"[" * 10**6, "nests deeper"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "Expecting value"),
    "half a character": (b'{"a": 1, "b": "\\ud800"}', "surrogate"),
    "other kind": (b"[]", "an object, not []"),
    "other type": (b'{"a": "1"}', 'a: Input should be a valid integer, not "1"'),
    "truth": (b'{"a": true}', "a: Input should be a valid integer, not true"),
    "control characters": (b'{"\\u001b[2J\\n": "\\u009b"}', "valid integer"),
}


@pytest.mark.parametrize(("content", "why"), REFUSED.values(), ids=REFUSED)
def test_json_that_is_none_of_ours_is_one_line_with_place_and_remedy(
    content: bytes, why: str, tmp_path
) -> None:
    store = open_store(str(tmp_path))
    store.put("a/x.json", content)
    started = time.process_time()
    with pytest.raises(DamagedFileError) as refused:
        read_json(store, "a/x.json", dict[str, int], "make it anew")
    assert time.process_time() - started < 1
    line = str(refused.value)
    assert line.startswith(f"file://{tmp_path}/a/x.json is damaged: ") and line.endswith("; make it anew")
    assert why in line and line.isprintable() and len(line) < 300 + len(str(tmp_path))


TEXTS = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)


@given(VALUES)
def test_what_json_writes_is_read_back_equal(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), Any, "x", "y") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), Any, "x", "y") == value


def test_a_metric_that_is_no_number_is_read_where_the_reader_says_so(tmp_path) -> None:
    store = open_store(str(tmp_path))
    store.put("x.json", b'{"a": NaN, "b": -Infinity, "c": 1}')
    found = read_json(store, "x.json", dict[str, float], "z", not_finite=True)
    assert math.isnan(found["a"]) and found["b"] == -math.inf and found["c"] == 1
    with pytest.raises(DamagedFileError, match="NaN"):
        read_json(store, "x.json", dict[str, float], "z")


def test_a_shape_is_filled_and_checked(tmp_path) -> None:
    store = open_store(str(tmp_path))
    choice = {"best_step": 3, "best_score": 1, "without_improvement": 0, "metrics": {"f1": 0.5}}
    store.put("x.json", json.dumps(choice).encode())
    assert read_json(store, "x.json", Choice, "z") == Choice(3, 1.0, 0, {"f1": 0.5})
    store.put("x.json", json.dumps(choice | {"metrics": {"f1": "0.5"}}).encode())
    with pytest.raises(DamagedFileError, match=r"metrics\.f1: Input should be a valid number, not \"0\.5\""):
        read_json(store, "x.json", Choice, "z")


def test_lines_are_named_by_number_and_a_line_without_end_is_refused(tmp_path) -> None:
    store = open_store(str(tmp_path))
    store.put("x.jsonl", '"a\u2028b"\n"c"\n'.encode())
    assert read_json_lines(store, "x.jsonl", str, "z") == ["a\u2028b", "c"]
    store.put("x.jsonl", b'"a"\n7\n')
    with pytest.raises(DamagedFileError, match=r"x\.jsonl:2 is damaged: "):
        read_json_lines(store, "x.jsonl", str, "z")
    store.put("x.jsonl", b'"a"\n"b"')
    with pytest.raises(DamagedFileError, match="line 2 has no end"):
        read_json_lines(store, "x.jsonl", str, "z")


def test_a_file_beyond_the_bound_is_not_read(tmp_path, monkeypatch) -> None:
    store = open_store(str(tmp_path))
    store.put("x.json", b" " * 1_000)
    monkeypatch.setattr(stored_file, "MAX_BYTES", 999)
    monkeypatch.setattr(type(store), "read", lambda self, path: pytest.fail("it was read"))
    for read in (read_json, read_json_lines):
        with pytest.raises(DamagedFileError, match="it has 1,000 bytes, more than 999"):
            read(store, "x.json", Any, "z")
    with pytest.raises(DamagedFileError, match="more than 999"):
        read_text(store, "x.json", "z")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a: &b [1]\nc: *b\n", "alias"),
        (b"a: !!bool x\n", "not YAML"),
        (b"a: !!timestamp x\n", "not YAML"),
        (b"\xff", "utf-8"),
        (b"- a\n", "valid dictionary"),
        (b"a: x\n", "a: Input should be a valid integer"),
    ],
)
def test_yaml_is_read_alike(content: bytes, why: str, tmp_path) -> None:
    store = open_store(str(tmp_path))
    store.put("config.yaml", b"a: 1\n")
    assert read_yaml(store, "config.yaml", dict[str, int], "z") == {"a": 1}
    store.put("config.yaml", content)
    with pytest.raises(DamagedFileError, match=r"config\.yaml is damaged: ") as refused:
        read_yaml(store, "config.yaml", dict[str, int], "z")
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_the_error_is_a_users_to_mend_no_configuration_and_travels() -> None:
    error = DamagedFileError("file:///x", "half", "delete it")
    assert isinstance(error, UserError) and not isinstance(error, ConfigError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "file:///x is damaged: half; delete it"


def test_what_is_absent_is_absent(tmp_path) -> None:
    for read in (read_json, read_json_lines, read_yaml):
        with pytest.raises(FileNotFoundError):
            read(open_store(str(tmp_path)), "x", Any, "z")
