"""What a text is once it is read: normalised, so that equal texts are equal bytes, and hashed."""

import hashlib
import unicodedata
from typing import Literal

Normalization = Literal["none", "NFC", "NFKC"]

HASH_BYTES = 16
"""128 bits: with 10**12 documents the chance that any two differ and collide is 1.5e-15 (birthday bound)."""


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
    return unicodedata.normalize(form, text.lstrip("\ufeff")).lstrip("\n").rstrip()


def content_hash(encoded: bytes) -> bytes:
    """Name a normalised text, in UTF-8, by its content: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(encoded, digest_size=HASH_BYTES).digest()
