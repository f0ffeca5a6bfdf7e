"""Configuration: frozen dataclasses filled from defaults < YAML < command line, every mistake named at once.

A section is a frozen dataclass beside the code that it configures, with a docstring under each field. It may
have `problems(at)`, which yields a line for each value that cannot be right; `at` is its dotted name.
"""

import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import pydantic
import yaml

from cluster.configuration.given import flatten, read_arguments
from cluster.configuration.keys import (
    choices,
    declared,
    help_text,
    keys_of,
    members,
    nearest,
    section_class,
    sections_of,
    shown,
    type_name,
)
from cluster.console.errors import ConfigError, UserError
from cluster.console.printable import printable, printable_output, printable_traceback
from cluster.limits.bounds import out_of_bounds
from cluster.limits.strict_yaml import ConfigDumper

__all__ = [
    "ConfigError",
    "Loaded",
    "UserError",
    "from_dict",
    "load_config",
    "run_entry",
    "to_dict",
    "to_yaml",
]

C = TypeVar("C")


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A configuration, and the flags that were given."""

    config: C
    flags: frozenset[str]


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
        _show(help_text(cls, description, help_of))
    problems: list[str] = []
    flags, values = read_arguments(cls, argv, help_of, problems)
    config = _fill(cls, values, problems)
    if "print-config" in flags:
        _show(to_yaml(config).removesuffix("\n"))
    return Loaded(config, frozenset(flags))


def _show(text: str) -> NoReturn:
    """Print what was asked for, and end. Who reads only its beginning, as `head` does, has read enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
    raise SystemExit(0)


def from_dict(cls: type[C], mapping: Mapping[str, Any]) -> C:
    """The configuration with the values of nested `mapping` over its defaults. Raises `ConfigError`."""
    return _fill(cls, dict(flatten(mapping, sections_of(cls))), [])


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
    return yaml.dump(content, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)


INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a shell's command that Ctrl-C ended."""


def run_entry(main: Callable[[], object], *expected: type[Exception]) -> None:
    """Call an entry's `main`. What its user can mend is told without a traceback; what it prints is `printable`.

    To be mended are a `UserError`, what a store or a file system refuses (`OSError`), and what the entry `expected`
    beside them. The exit status is 2 for a bad configuration, 130 after Ctrl-C, else 1.
    """
    command = Path(sys.argv[0]).stem
    to_mend: tuple[type[Exception], ...] = (UserError, OSError, *expected)
    sys.excepthook = printable_traceback
    with printable_output():
        try:
            main()
            return
        except ConfigError as error:
            status, told = 2, str(error)
        except to_mend as error:
            status, told = 1, printable(f"{command}: {error}", lines=True)
        except KeyboardInterrupt:
            status, told = INTERRUPTED, f"{command}: interrupted"
        except SystemExit as end:
            if not isinstance(end.code, str):
                raise
            status, told = 1, end.code
        print(told, file=sys.stderr)
        raise SystemExit(status)


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
            checked = _adapter(hint).validate_json(json.dumps(value, default=str), strict=True)
        except pydantic.ValidationError:
            remedy = ""
            if alike := nearest(str(value), list(choices(hint))):
                remedy = f"; nearest: {alike}"
            elif str in members(hint):
                remedy = "; put it in quotes"
            self.problems.append(f"{name}={shown(value)} is not {type_name(hint)}{remedy}")
        else:
            if not (beyond := out_of_bounds(name, value)):
                return checked
            self.problems.append(f"{name}={shown(value)} {beyond}")
        self.unheard.add(name)
        return default


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(hint)
