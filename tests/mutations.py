"""Damage that files come to: flipped bits, cuts, other encodings, JSON with values of other types and sizes."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

DEPTH = 100_000
"""Of nested brackets: Python's own parser gives up at some 1,000."""
ODD_VALUES = (
    None, True, False, 0, -1, 1.5, 10**30, -(10**30), 1e308, 2**63, "", "x", "\x1b[31m", "../x", "é" * 9, [], {}, [[]],
    [None], ["x"], [1, 2, 3], {"x": 1}, {"": None}, "9" * 5_000, "NaN", "1",
)  # fmt: skip
RAW_VALUES = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5_000, b"1" + b"0" * 400, b'"\\ud800"', b'"\\u0000"', b"01",
    b"[" * 400 + b"]" * 400, b'{"a":' * 400 + b"1" + b"}" * 400, b"'x'", b"undefined", b"1_000", b"0x10", b'"\xff"',
)  # fmt: skip
"""Texts in a value's place that JSON has not, or that are no value of ours."""
PLACE = "a value stands here"


def damaged(content: bytes, number: int, seed: str) -> Iterator[tuple[str, bytes]]:
    """That many cases, each with what was done; the same for the same seed. Beside bytes that are damaged anywhere,
    half of the cases of JSON are well-formed JSON with another content."""
    generator = random.Random(seed)
    whole = list(WHOLE)
    values = changed_values if is_json(content) else changed_lines if is_json_lines(content) else None
    for index in range(number):
        if index < len(whole):
            change: Callable[[bytes, random.Random], bytes] = whole[index]
        elif values and index % 2:
            change = values
        else:
            change = generator.choice(BYTES)
        yield f"{seed}:{index}:{change.__name__}", change(content, generator)


def is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict | list)
    except ValueError:
        return False


def is_json_lines(content: bytes) -> bool:
    lines = content.splitlines()
    return bool(lines) and all(map(is_json, lines))


# --- bytes ---


def flipped_bit(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def changed_byte(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    changed[generator.randrange(len(changed))] = generator.choice(b'\0\n"{}[],:0-9eE\xff' + bytes(range(256)))
    return bytes(changed)


def cut_off(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content) + 1)]


def without_beginning(content: bytes, generator: random.Random) -> bytes:
    return content[generator.randrange(len(content) + 1) :]


def without_middle(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(content) + 1)
    return content[:start] + content[start + generator.randrange(1, 64) :]


def zeroed_block(content: bytes, generator: random.Random) -> bytes:
    """As file systems leave behind after a power cut."""
    start = generator.randrange(len(content) + 1)
    length = min(generator.randrange(1, 4_096), len(content) - start)
    return content[:start] + b"\0" * length + content[start + length :]


def repeated_part(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(content) + 1)
    part = content[start : start + generator.randrange(1, 256)]
    return content[:start] + part + content[start:]


BYTES = (
    flipped_bit, changed_byte, cut_off, without_beginning, without_middle, zeroed_block, repeated_part,
)  # fmt: skip


# --- the whole file ---


def emptied(content: bytes, generator: random.Random) -> bytes:
    return b""


def doubled(content: bytes, generator: random.Random) -> bytes:
    return content + content


def with_a_line_more(content: bytes, generator: random.Random) -> bytes:
    return content + b"\n\xff\xfe half a line"


def all_zeros(content: bytes, generator: random.Random) -> bytes:
    return b"\0" * len(content)


def noise(content: bytes, generator: random.Random) -> bytes:
    return generator.randbytes(len(content))


def other_encoding(content: bytes, generator: random.Random) -> bytes:
    return content.decode("latin-1").encode("utf-16")


def byte_order_mark(content: bytes, generator: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + content


def deep_list(content: bytes, generator: random.Random) -> bytes:
    return b"[" * DEPTH + b"]" * DEPTH


def deep_object(content: bytes, generator: random.Random) -> bytes:
    return b'{"a":' * DEPTH + b"1" + b"}" * DEPTH


def other_kind(content: bytes, generator: random.Random) -> bytes:
    return b"[]" if content.lstrip()[:1] == b"{" else b"{}"


def null(content: bytes, generator: random.Random) -> bytes:
    return b"null"


def a_number(content: bytes, generator: random.Random) -> bytes:
    return b"7"


def a_text(content: bytes, generator: random.Random) -> bytes:
    return b'"text"'


WHOLE = (
    emptied, doubled, with_a_line_more, all_zeros, noise, other_encoding, byte_order_mark, deep_list, deep_object,
    other_kind, null, a_number, a_text,
)  # fmt: skip
"""Each kind of file sees each of these once."""


# --- what stands in JSON ---


def changed_values(content: bytes, generator: random.Random) -> bytes:
    """JSON in which a value or a key is another one."""
    tree = json.loads(content)
    at, key = generator.choice(list(places(tree)) or [([tree], 0)])
    change = generator.randrange(7)
    if change == 0 and isinstance(at, dict):
        del at[key]
    elif change == 1 and isinstance(at, dict):
        at[generator.choice(["x", "", "step", "\x1b", key.upper()])] = copy.deepcopy(at[key])
    elif change == 2 and isinstance(at, dict):
        at[f"{key}x"] = at.pop(key)
    elif change == 3:
        at[key] = [at[key]]
    elif change == 4:
        at[key] = str(at[key])
    elif change == 5:
        at[key] = PLACE
        return json.dumps(tree).encode().replace(json.dumps(PLACE).encode(), generator.choice(RAW_VALUES))
    else:
        at[key] = copy.deepcopy(generator.choice(ODD_VALUES))
    text = json.dumps(tree)
    if isinstance(at, dict) and generator.random() < 0.1:  # a key that stands twice
        text = text.replace("{", f'{{"{key}": {json.dumps(at.get(key))}, ', 1)
    return text.encode()


def changed_lines(content: bytes, generator: random.Random) -> bytes:
    """Lines of JSON of which one is another one, stands twice, elsewhere, or is missing."""
    lines = content.splitlines()
    index = generator.randrange(len(lines))
    change = generator.randrange(8)
    if change == 0:
        del lines[index]
    elif change == 1:
        lines.insert(generator.randrange(len(lines) + 1), lines[index])
    elif change == 2:
        lines.insert(index, generator.choice([b"", b"{}", b"[]", b"null", b"7", b"\xff"]))
    else:
        lines[index] = changed_values(lines[index], generator)
    return b"".join(line + b"\n" for line in lines)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from places(value)
