"""Bounds of all numbers and names that are given: by configuration, command line or environment."""

import argparse
import math
import os
import unicodedata
from collections.abc import Iterator
from typing import Any, TypeVar

from cluster.console.errors import ConfigError

T = TypeVar("T", int, float)

LARGEST_INTEGER = 2**63 - 1
"""Of 64 bits, which arrays of positions and counts have."""
LARGEST_NUMBER = 1e30
"""A sum of such, or one times another's share, stays finite in float32, which ends at 3.4e38."""
LONGEST_SECONDS = 1e9
"""31 years. Python's waits refuse 9.3e9 s as an overflow."""
LONGEST_NAME_BYTES = 255
"""Of a file or folder on every common file system (NAME_MAX)."""
LONGEST_KEY_BYTES = 1_024
"""Of an object's key in S3 and Google Cloud Storage, UTF-8."""
LONGEST_PATH_BYTES = 4_095
"""Of a path on Linux (PATH_MAX)."""
BELOW_BYTES = 256
"""For what lies in a run's folder: checkpoints, a seed's or a trial's folder, Ray's own."""
_FORBIDDEN = ("Cc", "Cs", "Zl", "Zp")  # control, half of a surrogate pair, ends of lines and paragraphs


def out_of_bounds(name: str, value: Any) -> str | None:
    """Why a value of the key `name`, or a number in it, cannot be taken, if so.

    A key whose name ends in `_seconds`, or is in such a mapping, holds times.
    """
    is_time = any(part.endswith("_seconds") for part in name.split("."))
    most = LONGEST_SECONDS if is_time else LARGEST_NUMBER
    for number in _numbers_in(value):
        if isinstance(number, float) and not math.isfinite(number):
            return "is not finite"
        if isinstance(number, int) and abs(number) > LARGEST_INTEGER:
            return f"is beyond {LARGEST_INTEGER:,}, the largest integer"
        if abs(number) > most:
            return f"is beyond {most:g}" + (" seconds" if is_time else ", the largest number")
    return None


def _numbers_in(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers_in(key)
            yield from _numbers_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def finite_number(text: str) -> float:
    """The number that an argument is, as argparse's `type`."""
    return _argument(text, float)


def whole_number(text: str) -> int:
    """The whole number that an argument is, as argparse's `type`."""
    return _argument(text, int)


def _argument(text: str, kind: type[T]) -> T:
    try:
        number = kind(text)  # type: ignore[call-arg]
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text[:40]!r}") from None
    if why := out_of_bounds("", number):
        raise argparse.ArgumentTypeError(f"{text[:40]} {why}")
    return number


def seconds_given(variable: str, default: float) -> float:
    """The seconds that a variable of the environment holds. Raises `ConfigError` where it holds something else."""
    text = os.environ.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_SECONDS:
        raise ConfigError(
            [f"{variable}={text} is no number of seconds: set it to {default:g}, say, or not at all"]
        )
    return seconds


def name_problems(key: str, name: str, suffix: str = "") -> Iterator[str]:
    """Why `name` cannot be that of one folder or file; `suffix` ends the longest name that is made of it."""
    if not name or "/" in name or name in (".", ".."):
        yield f"{key}={name!r} must be the name of one folder"
    elif forbidden := [each for each in name if unicodedata.category(each) in _FORBIDDEN]:
        yield f"{key}={name!r} holds {forbidden[0]!r}, a control character or half of one: remove it"
    elif (num_bytes := len((name + suffix).encode())) > LONGEST_NAME_BYTES:
        made = f" with the {suffix!r} that is put behind it" if suffix else ""
        yield (
            f"{key}={name[:20]!r}… has {num_bytes:,} bytes{made}; names of files have {LONGEST_NAME_BYTES} at most: "
            "shorten it"
        )


def location_problem(scheme: str, place: str) -> str | None:
    """Why nothing can lie at `place`, the part of a URI behind its scheme, if so."""
    is_key = scheme in ("s3", "gs")
    if forbidden := [each for each in place if unicodedata.category(each) in _FORBIDDEN]:
        return f"holds {forbidden[0]!r}, a control character or half of one: remove it"
    for part in () if is_key else place.split("/"):
        if (num_bytes := len(part.encode())) > LONGEST_NAME_BYTES:
            return f"has a name of {num_bytes:,} bytes; names of files have {LONGEST_NAME_BYTES} at most: shorten it"
    most = LONGEST_KEY_BYTES if is_key else LONGEST_PATH_BYTES
    if (num_bytes := len(place.partition("/")[2].encode() if is_key else place.encode())) > most:
        return f"has {num_bytes:,} bytes, {most:,} at most: shorten it"
    return None


def folder_problems(key: str, name: str, storage: str, suffix: str = "") -> Iterator[str]:
    """As `name_problems`, and why no folder of that name can lie under the URI `storage`, where a run's files and
    Ray's go into it. A name may lead through several folders."""
    for part in name.split("/"):
        yield from name_problems(key, part, suffix)
    scheme, separator, place = storage.partition("://")
    is_key = bool(separator) and scheme != "file"
    inside = place.partition("/")[2] if is_key else os.path.abspath(place or storage)
    most = (LONGEST_KEY_BYTES if is_key else LONGEST_PATH_BYTES) - BELOW_BYTES
    num_bytes = len(f"{inside}/{name}".encode(errors="replace"))
    if num_bytes > most:
        yield (
            f"{key}={name[:20]!r}… lies in a folder of {num_bytes:,} bytes; with what lies in it, {most:,} at most: "
            "choose a shorter one"
        )
