"""Files that this project wrote, read back: bounded, decoded, held against their shape, or refused in one line.

Storage may have torn or flipped what lies there, and others may write into it. What is read is UTF-8 without keys that
stand twice, numbers beyond 64 bits, not finite ones (where the reader does not say that they may stand there) or deep
nesting, and has the shape that its reader names: a type, checked by pydantic as strictly as JSON allows.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import pydantic

from cluster.configuration.config import from_dict
from cluster.configuration.keys import shown
from cluster.console.errors import ConfigError, UserError
from cluster.console.printable import printable
from cluster.limits import strict_yaml
from cluster.storage.store import Store

C = TypeVar("C")

MAX_BYTES = 64 << 20
"""The largest are records of pieces: some 100 bytes a fragment."""
MAX_DEPTH = 64
"""Configurations nest five deep; Python's recursion ends at some 1,000."""
LARGEST_INTEGER = 2**64

WITH_OTHER_KEYS = pydantic.ConfigDict(extra="allow")
"""For the shape of a mapping that has more keys than its reader looks at: `@pydantic.with_config(WITH_OTHER_KEYS)`."""


class DamagedFileError(UserError, ValueError):
    """A stored file does not hold what this project writes there."""

    def __init__(self, where: str, wrong: str, remedy: str) -> None:
        super().__init__(where, wrong, remedy)

    def __str__(self) -> str:
        where, wrong, remedy = self.args
        return printable(f"{where} is damaged: {wrong}; {remedy}")


def read_json(store: Store, path: str, shape: Any, remedy: str, *, not_finite: bool = False) -> Any:
    """The content of a JSON file as `shape`, a type.

    Args:
        remedy: What helps where the file is damaged.
        not_finite: Numbers may be NaN or infinite, as a metric may.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it holds no such content.
    """
    where = place_of(store, path)
    return parse_json(_bounded(store, path, MAX_BYTES, remedy), shape, where, remedy, not_finite=not_finite)


def read_json_lines(
    store: Store, path: str, shape: Any, remedy: str, *, not_finite: bool = False, checksum: str = ""
) -> list[Any]:
    """The content of a file that has a JSON value of `shape` in each line, and that `checksum` if one is given; raises
    as `read_json`."""
    where, content = place_of(store, path), _bounded(store, path, MAX_BYTES, remedy)
    if checksum and checksum_of(content) != checksum:
        raise DamagedFileError(where, "it was changed after it was written", remedy)
    # Not splitlines, which ends a line at other bytes too.
    *lines, rest = content.split(b"\n")
    if rest:
        raise DamagedFileError(where, f"line {len(lines) + 1:,} has no end", remedy)
    return [
        parse_json(line, shape, f"{where}:{number}", remedy, not_finite=not_finite)
        for number, line in enumerate(lines, 1)
    ]


def read_yaml(store: Store, path: str, shape: Any, remedy: str) -> Any:
    """The content of a YAML file as `shape`; raises as `read_json`."""
    return parse_yaml(
        _bounded(store, path, strict_yaml.LARGEST_BYTES, remedy), shape, place_of(store, path), remedy
    )


def read_text(store: Store, path: str, remedy: str) -> str:
    """The content of a text file; raises as `read_json`."""
    try:
        return _bounded(store, path, MAX_BYTES, remedy).decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(place_of(store, path), _what(error), remedy) from None


def parse_json(data: bytes, shape: Any, where: str, remedy: str, *, not_finite: bool = False) -> Any:
    """As `read_json`, of what was read from `where`."""
    try:
        decode_json(data, not_finite=not_finite)
        # Its own parser takes a list for a tuple, which it does not of what is parsed already.
        return _adapter(shape).validate_json(data, strict=True)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(where, _what(error), remedy) from None


def parse_yaml(data: bytes, shape: Any, where: str, remedy: str) -> Any:
    """As `read_yaml`, of what was read from `where`."""
    try:
        return _adapter(shape).validate_python(strict_yaml.parse_yaml(data, where), strict=True)
    except ConfigError as error:
        raise DamagedFileError(where, str(error).removeprefix(f"{where}: "), remedy) from None
    except pydantic.ValidationError as error:
        raise DamagedFileError(where, _what(error), remedy) from None


def decode_json(data: bytes, *, not_finite: bool = False) -> Any:
    """What a JSON text says. Raises ValueError or RecursionError for what this project does not write."""
    text = data.decode()
    content = (_WITH_NOT_FINITE if not_finite else _DECODER).decode(text)
    _refuse_deep(content)
    if "\\ud" in text or "\\uD" in text:  # halves of surrogate pairs, which no text that is written holds
        json.dumps(content, ensure_ascii=False).encode()
    return content


def as_config(cls: type[C], mapping: Mapping[str, Any], where: str, remedy: str) -> C:
    """A configuration that a stored file holds; raises DamagedFileError."""
    try:
        return from_dict(cls, mapping)
    except ConfigError as error:
        raise DamagedFileError(where, "; ".join(error.problems), remedy) from None


def matches(value: Any, shape: Any) -> str | None:
    """What is wrong with a value that was decoded, in one line; None if it has this shape."""
    try:
        _adapter(shape).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        return _what(error)
    return None


def checksum_of(content: bytes) -> str:
    """32 hexadecimal digits of BLAKE2b, for a record beside the file that says what the file holds."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def place_of(store: Store, path: str) -> str:
    """How a message names a file."""
    return f"{store.uri.rstrip('/')}/{path}"


def _bounded(store: Store, path: str, most: int, remedy: str) -> bytes:
    if (found := store.size(path)) > most:
        raise DamagedFileError(place_of(store, path), f"it has {found:,} bytes, more than {most:,}", remedy)
    return store.read(path)


@functools.cache
def _adapter(shape: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(shape)


def _what(error: Exception) -> str:
    """What is wrong, in one line; no more of the content than a value."""
    if isinstance(error, RecursionError):
        return f"it nests deeper than {MAX_DEPTH}"
    if isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False)[0]
        at = ".".join(shown(part).strip('"') for part in first["loc"])
        found = "" if first["type"] == "missing" else f", not {shown(first['input'])}"
        return f"{at}: {first['msg']}{found}" if at else f"{first['msg']}{found}"
    return " ".join(str(error).split())


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} stands for a number")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


def _integer(text: str) -> int:
    if len(text) > 21 or abs(number := int(text)) >= LARGEST_INTEGER:
        raise ValueError(f"{text[:20]}… has more than 64 bits")
    return number


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice")
    return content


_WITH_NOT_FINITE = json.JSONDecoder(parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique)
_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique
)


def _refuse_deep(content: Any, left: int = MAX_DEPTH) -> None:
    if not isinstance(content, dict | list):
        return
    if not left:
        raise RecursionError
    for value in content.values() if isinstance(content, dict) else content:
        if isinstance(value, dict | list):
            _refuse_deep(value, left - 1)
