"""What a configuration class declares: its keys with dotted name, type, default and docstring, and help."""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

from cluster.console.printable import printable

T = TypeVar("T")
Change = Literal["never", "until judged", "until finished", "always"]
"""When a key may have another value in a run that has begun: never, if it has a say in a number of the run."""
MAY_CHANGE = "may_change"


@dataclass(frozen=True)
class Key:
    """A value that can be set, or a section of such; `default` is MISSING where it must be given."""

    name: str
    hint: Any
    default: Any
    doc: str
    may_change: Change = "never"


def may_change(default: T, when: Change = "always") -> T:
    """A field whose value may change in a run that has begun; any other field's may not."""
    return dataclasses.field(default=default, metadata={MAY_CHANGE: when})  # type: ignore[return-value]


def keys_of(cls: type) -> dict[str, Key]:
    """Every value of `cls` and its sections by dotted name, in the order of declaration."""
    return {key.name: key for key in _walk(cls) if not is_dataclass(key.hint)}


def sections_of(cls: type) -> set[str]:
    """Dotted names of the sections of `cls` and of the sections within."""
    return {key.name for key in _walk(cls) if is_dataclass(key.hint)}


def purposes(cls: type) -> dict[str, str]:
    """What each section of `cls` is for, by its dotted name."""
    return {key.name: key.doc for key in _walk(cls) if is_dataclass(key.hint)}


def declared(cls: type, base: Any = MISSING) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of each field of one class; `base`, if given, holds the defaults."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        yield field.name, hints[field.name], default if base is MISSING else getattr(base, field.name)


def section_class(hint: Any) -> type | None:
    """The dataclass in `Section` or `Section | None`."""
    return next((member for member in members(hint) if is_dataclass(member)), None)  # type: ignore[return-value]


def members(hint: Any) -> tuple[Any, ...]:
    """The types in a union, or the one type."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def choices(hint: Any) -> dict[str, Any]:
    """What a type lists, by its text: the values of its `Literal`s."""
    literals = (member for member in members(hint) if typing.get_origin(member) is Literal)
    return {str(value): value for literal in literals for value in typing.get_args(literal)}


def type_name(hint: Any) -> str:
    """As in `int`, `bf16|fp32`, `tuple[float, ...] | null`."""

    def name(member: Any) -> str:
        if member is types.NoneType:
            return "null"
        return "|".join(choices(member)) or (
            str(member).replace("typing.", "") if typing.get_args(member) else member.__name__
        )

    return " | ".join(name(member) for member in members(hint))


def shown(value: Any) -> str:
    """A value in a message: JSON, cut to 60 characters."""
    text = printable(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate spelled most like `word`, a dotted one also by its last part; None if none is like it."""
    if found := difflib.get_close_matches(word, candidates, n=1):
        return found[0]
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(candidates)}
    found = difflib.get_close_matches(word.rpartition(".")[2], list(by_last_part), n=1)
    return by_last_part[found[0]] if found else None


def help_text(cls: type, description: str, flags: Mapping[str, str]) -> str:
    """`description`, `flags` and their help, then every key with type, default and docstring, by section."""
    indent, width = " " * 6, min(110, shutil.get_terminal_size().columns)

    def entry(name: str, text: str) -> str:
        return f"  --{name}\n" + textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)

    lines = [description, ""] + [entry(name, text) for name, text in flags.items()]
    for key in _walk(cls):
        if is_dataclass(key.hint):
            lines += ["", textwrap.fill(f"{key.name}: {key.doc}", width)]
        else:
            default = "must be given" if key.default is MISSING else f"default {shown(key.default)}"
            lines.append(entry(f"{key.name} {type_name(key.hint)}", f"({default})  {key.doc}"))
    return "\n".join(lines)


def _walk(cls: type, at: str = "", base: Any = MISSING) -> Iterator[Key]:
    """The keys of `cls`, then each section followed by what is in it."""
    docs = _docstrings(cls)
    changes = {each.name: each.metadata.get(MAY_CHANGE, "never") for each in fields(cls)}
    below: list[Key] = []
    for field, hint, default in declared(cls, base):
        section = section_class(hint)
        doc = docs.get(field) or (_purpose(section) if section else "")
        key = Key(at + field, section or hint, default, doc, changes[field])
        if section:
            below += [key, *_walk(section, f"{key.name}.", MISSING if default is None else default)]
        else:
            yield key
    yield from below


def _purpose(cls: type) -> str:
    """The first paragraph of a section's docstring; a dataclass that has none says its signature there."""
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.partition("\n\n")[0].split())


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    """The string under each field, of base classes too: read from the source, since Python drops it."""
    found: dict[str, str] = {}
    for owner in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for field, under in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(under, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(under.value).split())  # type: ignore[union-attr]
    return found
