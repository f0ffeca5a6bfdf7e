"""What a text is once it is read: normalised, so that equal texts are equal bytes, and hashed."""

import hashlib
import unicodedata
from typing import Literal

import regex

Normalization = Literal["none", "NFC", "NFKC"]

HASH_BYTES = 16
"""128 bits: with 10**12 documents the chance that any two differ and collide is 1.5e-15 (birthday bound)."""

STRIDE = 64
_RUN = regex.compile(r"[\p{M}\uff9e\uff9f]{32,}")
"""Combining marks; the halfwidth Katakana ones become such in NFKC."""
_RUN_IN_STRIDES = regex.compile(r"[\p{M}\uff9e\uff9f]{7}")


def normalise(text: str, form: Normalization = "NFC") -> str:
    """Bring a text into one Unicode form, with line feeds only and no blank space around it.

    `none` keeps code points, line ends and blank space as they are. NFC joins combining marks; NFKC also
    replaces compatibility characters (ligatures, full-width letters), which loses information (Unicode Annex
    15).
    """
    if form == "none":
        return text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Leading blanks of the first line stay: they are indentation in code and verse.
    return unicodedata.normalize(form, with_ordered_marks(text.lstrip("\ufeff"), form)).lstrip("\n").rstrip()


def with_ordered_marks(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """The same text, with the marks of runs of 512 or more in canonical order.

    `unicodedata.normalize` orders by insertion, in time n squared: 1 MB of alternating marks takes more than an hour.
    Of marks that are in order already it takes n. A run so long has marks at 8 multiples of 64 one after another, so
    that other texts cost a look at each 64th character.
    """
    if not _RUN_IN_STRIDES.search(text[::STRIDE]):
        return text
    decomposition: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"

    def in_order(run: regex.Match[str]) -> str:
        ordered: list[str] = []
        marks: list[str] = []
        for mark in "".join(unicodedata.normalize(decomposition, mark) for mark in run[0]):
            if unicodedata.combining(mark):
                marks.append(mark)
            else:  # it is a letter of its own: nothing moves over it
                ordered += [*sorted(marks, key=unicodedata.combining), mark]
                marks = []
        return "".join([*ordered, *sorted(marks, key=unicodedata.combining)])

    return _RUN.sub(in_order, text)


def content_hash(encoded: bytes) -> bytes:
    """Name a normalised text, in UTF-8, by its content: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(encoded, digest_size=HASH_BYTES).digest()
