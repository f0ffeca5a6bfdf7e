"""What each token id stands for in running text, so that rows of ids can be read without the tokenizer.

Legend: T tokens of a row, V vocabulary.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.tokens.tokenizer import special_ids
from data.tokens.tokenizer_file import TokenizerError, parse_tokenizer

# What a special token is in running text: no word and no sentence goes across it.
_BREAK = b"\n\n"
_UNKNOWN = "□".encode()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_INVALID = re.compile("[\udc80-\udcff]")
# Blocks whose characters BERT's tokenizer takes for words of their own (Devlin et al. 2018, multilingual
# notes): Han with its extensions and compatibility forms. Kana and Hangul are left to the class of letters.
_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))


@dataclass(frozen=True)
class Vocabulary:
    """Bytes and kind of every token id."""

    texts: Sequence[bytes]
    """By id: what it adds to the text; a blank before it included, where it begins a word after one."""
    special: np.ndarray
    """bool [V]: stands for no text, as [MASK] or the boundary of documents, or for any, as [UNK]. Old folders list such
    tokens in the vocabulary alone."""
    inner: np.ndarray
    """bool [V]: marked as the inside of a word, as `##ing`."""
    marks_inner: bool
    """The tokenizer marks what is inside a word (WordPiece), not where a word begins."""

    @classmethod
    def from_tokenizer(cls, tokenizer_json: bytes) -> "Vocabulary":
        """Read a tokenizer.json of WordPiece, byte-level BPE, or SentencePiece's kinds (`▁` for a blank)."""
        tokenizer = parse_tokenizer(tokenizer_json, "tokenizer.json")
        fields = json.loads(tokenizer.to_str())  # an old one lacks fields that the library fills in
        ids = tokenizer.get_vocab(with_added_tokens=True)
        added = {token["content"]: token["special"] for token in fields["added_tokens"]}
        framing = {*asdict(special_ids(tokenizer_json)).values()}
        prefix = fields["model"].get("continuing_subword_prefix") or "##"
        marks_inner = fields["model"]["type"] == "WordPiece"
        bytes_of = _byte_level if _has_byte_level(fields) else _spelled
        unknown = fields["model"].get("unk_token")
        size = max(ids.values()) + 1
        texts = [b""] * size
        special, inner = np.zeros(size, bool), np.zeros(size, bool)
        for token, number in ids.items():
            if token == unknown:
                special[number], texts[number] = True, _UNKNOWN
            elif number in framing:
                special[number], texts[number] = True, _BREAK
            elif token in added:
                special[number] = added[token]
                texts[number] = _BREAK if added[token] else token.encode()
            elif marks_inner:
                inner[number] = token.startswith(prefix)
                texts[number] = _word_piece(token, prefix)
            else:
                texts[number] = bytes_of(token)
        return cls(texts, special, inner, marks_inner)

    def read(self, tokens: np.ndarray) -> tuple[str, np.ndarray]:
        """Read a row [T]: its text, and the byte of its UTF-8 at which each token begins, int64 [T + 1].

        A byte that belongs to no whole character (rows are cut between tokens, not characters) is read as
        NUL, which is one byte too.
        """
        texts = [self.texts[token] for token in tokens.tolist()]
        begins = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=begins[1:])
        return _INVALID.sub("\0", b"".join(texts).decode("utf-8", "surrogateescape")), begins


def character_begins(text: str) -> np.ndarray:
    """Return the byte of the text's UTF-8 at which each character begins, and the number of bytes; int64."""
    encoded = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.flatnonzero(encoded & 0xC0 != 0x80), len(encoded))


def is_han(character: str) -> bool:
    """Whether it is a Chinese character."""
    return any(first <= ord(character) <= last for first, last in _HAN)


def _has_byte_level(fields: dict[str, Any]) -> bool:
    parts = [fields.get("pre_tokenizer") or {}, fields.get("decoder") or {}]
    parts += [part for whole in parts for key in ("pretokenizers", "decoders") for part in whole.get(key, ())]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_characters() -> dict[str, int]:
    """The byte behind each character of a byte-level token (GPT-2, Radford et al. 2019): printable Latin-1
    characters are themselves, the others follow from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_characters()


def _byte_level(token: str) -> bytes:
    if unknown := sorted(set(token) - _BYTE_OF.keys()):
        raise TokenizerError(
            f"tokenizer.json: {token!r} is no token of bytes: {unknown[0]!r} stands for none"
        )
    return bytes(_BYTE_OF[character] for character in token)


def _spelled(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()


def _word_piece(token: str, prefix: str) -> bytes:
    """WordPiece has dropped the blanks: one stands before each word, none before Chinese and punctuation.

    None before digits either, or the point of 3.14 would end a sentence.
    """
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    if not token:
        return b""
    joined = is_han(token[0]) or token[0].isdigit() or unicodedata.category(token[0]).startswith("P")
    return token.encode() if joined else b" " + token.encode()
