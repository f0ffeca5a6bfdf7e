"""Configuration: frozen dataclasses filled from defaults < YAML < command line, every mistake named at once.

A section is a frozen dataclass beside the code that it configures, with a docstring under each field. It may
have `problems(at)`, which yields a line for each value that cannot be right; `at` is its dotted name.
"""

import copy
import difflib
import functools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pydantic
import yaml

from cluster.keys import (
    Key,
    choices,
    declared,
    help_text,
    keys_of,
    members,
    section_class,
    sections_of,
    shown,
    type_name,
)

C = TypeVar("C")


class ConfigError(ValueError):
    """The configuration cannot be used; its message has one line for each problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(list(problems))

    @property
    def problems(self) -> list[str]:
        return self.args[0]

    def __str__(self) -> str:
        return "\n".join(self.problems)


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A configuration, and the flags that were given."""

    config: C
    flags: frozenset[str]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the parser would take the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for twice in {name for name in names if names.count(name) > 1 and name != "<<"}:
            raise yaml.MarkedYAMLError(problem=f"key {twice} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same value."""


for _yaml_class in (_Loader, _Dumper):  # YAML 1.1, which PyYAML speaks, takes 1e-3 for text: it wants 1.0e-3.
    _yaml_class.add_implicit_resolver(  # type: ignore[attr-defined]
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def load_config(
    cls: type[C], argv: Sequence[str], *, description: str, extra_flags: Mapping[str, str] | None = None
) -> Loaded[C]:
    """Fill `cls` from `argv`: `--config FILE` (repeatable, the later wins), `--section.key value`, `--flag`.

    `extra_flags` maps a flag to its line of help. Prints and exits 0 for `--help` and `--print-config`.
    Raises `ConfigError` with every problem: keys, types, and what `problems` of `cls` and its sections say.
    """
    help_of = {
        "config FILE": "values from a YAML file; repeatable, the later wins, and the command line over all; a "
        "mapping is merged entry by entry into what was there before, and null takes an entry away",
        "help": "print this and exit",
        "print-config": "print the merged configuration as YAML and exit",
        **(extra_flags or {}),
    }
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, description, help_of))
        raise SystemExit(0)
    problems: list[str] = []
    flags, values = _read_arguments(cls, argv, help_of, problems)
    config = _fill(cls, values, problems)
    if "print-config" in flags:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return Loaded(config, frozenset(flags))


def from_dict(cls: type[C], mapping: Mapping[str, Any]) -> C:
    """The configuration with the values of nested `mapping` over its defaults. Raises `ConfigError`."""
    return _fill(cls, dict(_flatten(mapping, sections_of(cls))), [])


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values: what `from_dict` reads."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: Any) -> str:
    """YAML that `--config` reads back as an equal configuration, if its texts hold no control characters."""
    content = to_dict(config)
    for key in keys_of(type(config)).values():
        *sections, last = key.name.split(".")
        section = functools.reduce(lambda at, name: at and at[name], sections, content)
        if isinstance(key.default, dict) and section:
            section[last] |= dict.fromkeys(
                key.default.keys() - section[last].keys()
            )  # null: not even by default
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate spelled most like `word`, a dotted one also by its last part; None if none is like it."""
    if found := difflib.get_close_matches(word, candidates, n=1):
        return found[0]
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(candidates)}
    found = difflib.get_close_matches(word.rpartition(".")[2], list(by_last_part), n=1)
    return by_last_part[found[0]] if found else None


def run_entry(main: Callable[[], object]) -> None:
    """Call an entry's `main`; a bad configuration is shown as its lines, without a traceback, and exits 2."""
    try:
        main()
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # who read what is printed has read enough, as `head` does
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python's own flush fails at its end
        raise SystemExit(1) from None


# --- from the command line and YAML to values by dotted name ---


def _read_arguments(
    cls: type, argv: Sequence[str], help_of: Mapping[str, str], problems: list[str]
) -> tuple[set[str], dict[str, Any]]:
    """The flags given, and the values, merged in their order of precedence."""
    values: dict[str, Any] = {}
    assigned: list[tuple[str, str]] = []
    flags: set[str] = set()
    known = keys_of(cls)
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            problems.append(f"{argument} is not expected: values are given as --section.key value")
        elif not has_value and name.replace("_", "-") in help_of:
            flags.add(name.replace("_", "-"))
        elif name == "config" and not has_value and not rest:
            problems.append("--config needs the path of a YAML file")
        elif not has_value and (not rest or rest[0].startswith("--")):
            assigned.append((name, "true"))  # as in --checkpoint.verify; any type but bool refuses it
        else:
            value = value if has_value else rest.pop(0)
            if name == "config":
                for key, content in _read_yaml(cls, Path(value), problems).items():
                    _lay_over(values, known, key, content)
            else:
                assigned.append((name, value))
    for name, text in assigned:
        _assign(values, known, name, text)
    return flags, values


def _read_yaml(cls: type, path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        alike = nearest(path.name, [other.name for other in path.parent.glob("*.yaml")])
        remedy = f"; nearest: {path.parent / alike}" if alike else ""
        problems.append(f"--config {path}: {error.strerror}{remedy}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"--config {path}: not YAML: {' '.join(str(error).split())}")
    else:
        if isinstance(content, dict):
            return dict(_flatten(content, sections_of(cls)))
        if content is not None:
            problems.append(f"--config {path}: holds a {type(content).__name__}, not sections with keys")
    return {}


def _flatten(mapping: Mapping[Any, Any], sections: set[str], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        name = at + str(key).replace("-", "_")
        if name in sections and isinstance(value, Mapping):
            yield from _flatten(value, sections, f"{name}.")
        elif name not in sections or value is not None:  # a section with nothing under it keeps its defaults
            yield name, value


def _lay_over(values: dict[str, Any], known: Mapping[str, Key], name: str, value: Any) -> None:
    """Set one value of a later layer; of a mapping its entries, the others stay, and null takes one away."""
    key = known.get(name)
    if key and typing.get_origin(key.hint) is dict and isinstance(value, dict):
        before = values.get(name, key.default)
        before = before if isinstance(before, dict) else {}
        value = {
            each: content
            for each, content in {**before, **value}.items()
            if content is not None or each not in before
        }
    values[name] = value


def _assign(values: dict[str, Any], known: Mapping[str, Key], name: str, text: str) -> None:
    """Set one value of the command line; what follows the name of a dict leads into it."""
    parts = name.split(".")
    candidates = (".".join(parts[:count]).replace("-", "_") for count in range(1, len(parts) + 1))
    key = next((known[candidate] for candidate in candidates if candidate in known), None)
    inside = parts[key.name.count(".") + 1 :] if key else []
    if key is None or (inside and typing.get_origin(key.hint) is not dict):
        values[name.replace("-", "_")] = text  # an unknown key, named with all the others
    elif not inside:
        _lay_over(values, known, key.name, _parse(text, key.hint))
    elif len(inside) == 1:
        _lay_over(values, known, key.name, {inside[0]: _parse(text, typing.get_args(key.hint)[1])})
    else:
        current = values.get(key.name, key.default)
        values[key.name] = content = copy.deepcopy(current) if isinstance(current, dict) else {}
        for part in inside[:-1]:
            if not isinstance(content.get(part), dict):
                content[part] = {}
            content = content[part]
        content[inside[-1]] = _parse(text, typing.get_args(key.hint)[1])


def _parse(text: str, hint: Any) -> Any:
    """YAML, except where the field takes text as it stands."""
    if text in (listed := choices(hint)):
        return listed[text]
    if set(members(hint)) <= {str, types.NoneType} and text != "null":
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text  # no type but text takes it, so the type's error names it


# --- from values to a configuration, and its problems ---


def _fill(cls: type[C], values: Mapping[str, Any], problems: list[str]) -> C:
    """An instance of `cls`, or a `ConfigError` with `problems` and all those found here."""
    known, sections = keys_of(cls), sections_of(cls)
    builder = _Builder(values, problems)
    for name, value in values.items():
        if name in sections:
            problems.append(f"{name}={shown(value)} is not possible: {name} is a section; set {name}.KEY")
        elif name not in known:
            alike = nearest(name, list(known))
            problems.append(f"{name} is not a known key; " + (f"nearest: {alike}" if alike else "see --help"))
            builder.unheard |= {alike} if alike else set()
    config = builder.build(cls)
    # What was misspelt or mistyped has its default here: a check that names it speaks of a value nobody gave.
    unheard = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in builder.unheard) or "(?!)")
    problems += [line for line in builder.failed_checks if not unheard.search(line)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


class _Builder:
    """Makes sections from the inside out; where a value is wrong it goes on with the default, to find all."""

    def __init__(self, values: Mapping[str, Any], problems: list[str]) -> None:
        self.values, self.problems = values, problems
        self.unheard: set[str] = set()
        self.failed_checks: list[str] = []

    def build(self, cls: type, at: str = "", base: Any = MISSING) -> Any:
        """An instance of `cls`; MISSING if a key that has no default was not given."""
        given: dict[str, Any] = {}
        for field, hint, default in declared(cls, base):
            name, section = at + field, section_class(hint)
            if section is None:
                given[field] = self.value(name, hint, default)
            elif default is None and not any(key.startswith(f"{name}.") for key in self.values):
                given[field] = None
            else:
                given[field] = self.build(section, f"{name}.", MISSING if default is None else default)
        if any(value is MISSING for value in given.values()):
            return MISSING
        config = cls(**given)
        if hasattr(config, "problems"):
            self.failed_checks += config.problems(at.removesuffix("."))
        return config

    def value(self, name: str, hint: Any, default: Any) -> Any:
        if name not in self.values:
            if default is MISSING:
                self.problems.append(f"{name} must be given: {type_name(hint)}")
            return default
        value = self.values[name]
        try:  # strict, but by way of JSON: there a list may stand for a tuple
            return _adapter(hint).validate_json(json.dumps(value, default=str), strict=True)
        except pydantic.ValidationError:
            remedy = ""
            if alike := nearest(str(value), list(choices(hint))):
                remedy = f"; nearest: {alike}"
            elif str in members(hint):
                remedy = "; put it in quotes"
            self.problems.append(f"{name}={shown(value)} is not {type_name(hint)}{remedy}")
            self.unheard.add(name)
            return default


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(hint)
