"""Rows of CSV, where every value is the text that stands there: a label `04` or an answer `1.50` is no number."""

import csv
import io
from collections.abc import Iterator
from typing import IO

LONGEST_FIELD = 1 << 30
"""Characters; Python's own limit is 131,072, and a book is longer."""


def csv_rows(file: IO[bytes]) -> Iterator[dict[str, str] | str]:
    """The rows below the header by its names, each empty field an empty text; a row that cannot be read is its
    error's text."""
    csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"not CSV: {error}"
            continue
        columns = len(reader.fieldnames or ())
        if None in row:
            yield f"more fields than the header's {columns} columns"
        elif None in row.values():
            yield f"fewer fields than the header's {columns} columns"
        elif not _is_unicode("".join([*row, *row.values()])):
            yield "not UTF-8"
        else:
            yield row


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # what `surrogateescape` made of bytes that were no UTF-8
        return False
    return True
