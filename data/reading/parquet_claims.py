"""How much a Parquet file claims to hold, told without decoding it.

A footer's sizes are no bound: each page has its own in its header, by which Arrow sets memory aside, and a run of one
value takes a few bytes however long it is.
"""

import io
from collections.abc import Iterator
from typing import Any

from data.reading.parquet_footer import Footer, FooterError, read_footer, read_struct

# Ids of fields: PageHeader's, and the number of values in the header of each kind of page.
UNPACKED_BYTES, PACKED_BYTES, DATA_PAGE, DATA_PAGE_V2 = 2, 3, 5, 8
PAGE_VALUES = 1


def claims(content: bytes) -> tuple[Footer, int, int]:
    """The footer, the bytes of all pages once unpacked, and the values of the longest column; FooterError if untold."""
    footer = read_footer(io.BytesIO(content))
    num_bytes, longest, room = 0, dict[int, int](), footer.start
    for group in footer.row_groups:
        for index, chunk in enumerate(group):
            if chunk.num_values <= 0:  # Arrow reads no page of it
                continue
            room -= chunk.packed_bytes
            if not 0 < chunk.start <= chunk.stop <= footer.start or room < 0:
                raise FooterError(
                    f"it has a column at bytes {chunk.start:,} to {chunk.stop:,}, of {footer.start:,}"
                )
            for unpacked, values in _pages(content, chunk.start, chunk.stop):
                num_bytes += unpacked
                longest[index] = longest.get(index, 0) + values
    return footer, num_bytes, max(footer.num_rows, *longest.values(), 0)


def _pages(content: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Unpacked bytes and values of each page between two places."""
    while start < stop:
        header, data_start = read_struct(content, start, stop)
        pages = [header[kind] for kind in (DATA_PAGE, DATA_PAGE_V2) if kind in header]
        numbers: list[Any] = [header.get(UNPACKED_BYTES), header.get(PACKED_BYTES)]
        numbers += [page.get(PAGE_VALUES) if isinstance(page, dict) else None for page in pages]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise FooterError(f"the page at byte {start:,} has no sizes")
        unpacked, packed, *values = numbers
        yield unpacked, sum(values)
        start = data_start + packed
    if start != stop:
        raise FooterError(f"a page ends at byte {start:,}, its column at {stop:,}")
