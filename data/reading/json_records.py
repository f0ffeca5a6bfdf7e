"""Records of JSON lines: an object each, or the reason why a line is none."""

import json
from collections.abc import Collection
from typing import Any


class _Object(dict[str, Any]):
    """An object with some keys twice, of which a dictionary holds the last value."""

    repeated: frozenset[str] = frozenset()


def _with_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    found, seen = _Object(plain), set[str]()
    found.repeated = frozenset(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_with_repeated)


def parse_record(line: bytes, columns: Collection[str], is_first: bool) -> dict[str, Any] | str:
    """The object that a line holds, or why it holds none; an object with one of `columns` twice is none.

    Args:
        is_first: Of its file; it may begin with a byte order mark.
    """
    try:
        record = _DECODER.decode(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as invalid:
        return f"invalid UTF-8 at byte {invalid.start}"
    except (ValueError, RecursionError) as invalid:
        return f"not JSON: {invalid}"
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, not an object"
    if isinstance(record, _Object) and (twice := sorted(record.repeated & set(columns))):
        return f"has the column {twice[0]!r} twice"
    return record
