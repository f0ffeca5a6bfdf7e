"""A tokenizer.json that anybody may have written, read by the `tokenizers` library within bounds."""

from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer

from cluster.console.errors import UserError

MAX_FILE_BYTES = 256 << 20
"""The largest public ones, of some 260,000 entries, have 35 MB."""
MAX_IDS = 1 << 22
"""Memory is laid out by the greatest id: for one of 2^32 the library takes 16 GiB, an embedding terabytes. The largest
public vocabularies have about a million entries."""
_PROBE = "Two words, 3.14 今天\n"


class TokenizerError(UserError, ValueError):
    """A tokenizer cannot be read, trained, or used for pretraining."""


def parse_tokenizer(serialised: str | bytes, origin: str) -> Tokenizer:
    """The tokenizer, that neither cuts nor pads a text by itself.

    Args:
        serialised: Content of tokenizer.json.
        origin: Where it came from, for messages.

    Raises:
        TokenizerError: it is not a tokenizer that the installed `tokenizers` reads, or has ids out of all proportion.
    """
    if len(serialised) > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{origin} has {len(serialised):,} bytes; a tokenizer.json has {MAX_FILE_BYTES:,} at most"
        )
    with _refused_by_name(origin):
        content = serialised.encode() if isinstance(serialised, str) else serialised
        tokenizer = Tokenizer.from_buffer(content)
        # Before anything else is asked of it: what serialises a vocabulary goes through all numbers up to the greatest.
        greatest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= greatest < MAX_IDS:
            raise ValueError(f"its greatest id is {greatest:,}; it must be 0 to {MAX_IDS - 1:,}")
        tokenizer.no_truncation()
        tokenizer.no_padding()
    with _refused_by_name(origin, panics_alone=True):  # some broken parts are only found when they are used
        tokenizer.decode(tokenizer.encode(_PROBE, _PROBE).ids)
    return tokenizer


@contextmanager
def _refused_by_name(origin: str, *, panics_alone: bool = False) -> Iterator[None]:
    """Turn the library's errors into ours. With `panics_alone` its common ones pass: an unknown word is one."""
    try:
        yield
    except Exception as broken:  # the library raises bare Exception on any content that it cannot read
        if not panics_alone:
            raise TokenizerError(f"{origin} is not a readable tokenizer.json: {broken}") from None
    except BaseException as panic:  # a panic of its Rust code, which is no Exception
        if type(panic).__module__ != "pyo3_runtime":
            raise
        raise TokenizerError(f"{origin} is not a readable tokenizer.json: {panic}") from None
