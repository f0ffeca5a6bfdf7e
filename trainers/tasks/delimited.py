"""Rows of CSV, where every value is the text that stands there: a label `04` or an answer `1.50` is no number."""

import csv
import io
from collections.abc import Callable, Collection, Iterator
from typing import IO

from data.reading.parquet_rows import RepeatedColumnError


class LongRecordError(ValueError):
    """A record without end, or with one too far away: an opening quote takes in all that follows."""


def csv_rows(
    file: IO[bytes], columns: Collection[str], max_bytes: int, skip_line: Callable[[], None] = lambda: None
) -> Iterator[dict[str, str] | str]:
    """The rows below the header by its names, each empty field an empty text; a row that cannot be read is its
    error's text. `skip_line` is called at each blank line.

    Raises:
        RepeatedColumnError: the header names one of `columns` twice.
        LongRecordError: a record of more than `max_bytes`, behind which no other can be found.
    """
    csv.field_size_limit(max_bytes)
    lines = _Lines(
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""), max_bytes
    )
    reader = csv.reader(lines, strict=True)
    names: list[str] | None = None
    while True:
        lines.left = max_bytes
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"not CSV: {error}"
            continue
        if not fields:
            skip_line()
            continue
        if names is None:
            names = fields
            if twice := [name for name in columns if names.count(name) > 1]:
                raise RepeatedColumnError(f"has the column {twice[0]!r} twice in its header; name each once")
        elif len(fields) > len(names):
            yield f"more fields than the header's {len(names)} columns"
        elif len(fields) < len(names):
            yield f"fewer fields than the header's {len(names)} columns"
        elif not _is_unicode("".join([*names, *fields])):
            yield "not UTF-8"
        else:
            yield dict(zip(names, fields, strict=True))


class _Lines:
    """Lines of text, of which a record may take `left` characters more."""

    def __init__(self, text: io.TextIOWrapper, max_characters: int) -> None:
        self._text, self._max, self.left = text, max_characters, max_characters

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise LongRecordError(
                f"a record is longer than {self._max:,} bytes; is a quote left open before it?"
            )
        if not line:
            raise StopIteration
        return line


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # what `surrogateescape` made of bytes that were no UTF-8
        return False
    return True
