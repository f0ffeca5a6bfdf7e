"""What is given over the defaults: YAML files and the command line, as values by dotted name."""

import copy
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.configuration.keys import Key, choices, keys_of, members, nearest, sections_of
from cluster.console.errors import ConfigError
from cluster.limits.strict_yaml import LARGEST_BYTES, parse_yaml
from cluster.storage.local import open_regular


def read_arguments(
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
            asked = known.get(name.replace("-", "_"))
            if asked and bool not in members(asked.hint):
                problems.append(f"--{name} needs a value")
            else:
                assigned.append((name, "true"))  # as in --checkpoint.verify
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
        with open(os.path.realpath(path), "rb", opener=open_regular) as file:
            content = parse_yaml(file.read(LARGEST_BYTES + 1), f"--config {path}")
    except OSError as error:
        alike = nearest(path.name, [other.name for other in path.parent.glob("*.yaml") if other != path])
        remedy = f"; nearest: {path.parent / alike}" if alike else ""
        problems.append(f"--config {path}: {error.strerror}{remedy}")
    except ConfigError as error:
        problems += error.problems
    else:
        if isinstance(content, dict):
            return dict(flatten(content, sections_of(cls)))
        if content is not None:
            problems.append(f"--config {path}: holds a {type(content).__name__}, not sections with keys")
    return {}


def flatten(mapping: Mapping[Any, Any], sections: set[str], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        name = at + str(key).replace("-", "_")
        if name in sections and isinstance(value, Mapping):
            yield from flatten(value, sections, f"{name}.")
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
        value = parse_yaml(text, "")
    except ConfigError:
        return text  # no type but text takes it, so the type's error names it
    one_of_many = typing.get_origin(hint) is tuple and value is not None and not isinstance(value, list)
    return [value] if one_of_many else value
