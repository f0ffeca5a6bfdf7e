"""Text as people may see it: keys hidden, control characters written out. All that a process prints goes through here.

What a message quotes comes from outside: the URI that a user gave, a record, the name of a file, an answer of a server.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Any, TextIO, cast

HIDDEN = "***"

# A bucket has no colon: where one stands, a key was meant, also if the @ after it was cut off.
_BUCKET_URI = re.compile(r"(?<![a-z])((?:s3[an]?|gs):/*)([^\s'\"]+)", re.IGNORECASE)
_URI = re.compile(r"(?<![a-z])([a-z][a-z0-9+.-]+://)([^\s'\"/][^\s'\"]*)", re.IGNORECASE)
_URI_AS_PATH = re.compile(
    r"\b([a-z][a-z0-9+.-]+:/)[^\s'\"/@]*@", re.IGNORECASE
)  # which joins its two slashes
_SIGNATURE = re.compile(
    r"([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid|googleaccessid"
    r"|(?:access_?|auth_?)?token|api_?key|key|secret|password)=)[^&;\s'\"]+",
    re.IGNORECASE,
)
# Those of a terminal (its bell, its colours, what moves its cursor), the ones that turn the direction of text, line
# separators, and halves of surrogate pairs, which no stream can encode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_KEPT_IN_LINES = "\t\n"
# Of a stream also: a bar that is drawn again over itself, and the colours in which Ray forwards its workers' lines.
_COLOUR = r"\x1b\[(?:[012]|22|3[0-79]|9[0-7])?m"
_CONTROL_OF_STREAM = re.compile(rf"(?!{_COLOUR}|\r){_CONTROL.pattern}")


def printable(text: str, *, lines: bool = False) -> str:
    """`text` in one line (or in `lines`, as it stands) without keys or anything that acts on a terminal or a log."""
    return _CONTROL.sub(lambda found: _written(found[0], _KEPT_IN_LINES if lines else ""), without_keys(text))


def without_keys(text: str) -> str:
    """`text` with the user and password of every URI hidden, and the signatures and tokens in its query."""
    text = _BUCKET_URI.sub(lambda found: found[1] + _without_user(found[2], bucket=True), text)
    text = _URI.sub(lambda found: found[1] + _without_user(found[2], bucket=False), text)
    text = _URI_AS_PATH.sub(rf"\g<1>{HIDDEN}@", text)
    return _SIGNATURE.sub(rf"\g<1>{HIDDEN}", text)


def _without_user(rest: str, bucket: bool) -> str:
    """What follows a scheme, without a user: `user@`, `user:password@`, and a key with a "/" in it."""
    authority = rest.partition("/")[0].rstrip(":;,.)")  # what ends a message's mention of it
    port = re.sub(r"^\[[^\]]*\]", "", authority.rpartition("@")[2]).partition(":")[2]  # [::1] is a host
    if "@" in authority and not bucket:
        return f"{HIDDEN}@{authority.rpartition('@')[2]}{rest[len(authority) :]}"
    if "@" in authority or (
        ":" in authority and (bucket or ("@" in rest and not re.fullmatch(r"\d*", port)))
    ):
        return f"{HIDDEN}@{rest.rpartition('@')[2]}" if "@" in rest else HIDDEN
    return rest


def _written(character: str, kept: str) -> str:
    """A character as JSON writes it, so that JSON stays JSON; what stands for a byte of a name as that, as \\xff."""
    if character in kept:
        return character
    return (
        f"\\x{ord(character) - 0xDC00:02x}"
        if "\udc80" <= character <= "\udcff"
        else f"\\u{ord(character):04x}"
    )


class PrintableStream:
    """A text stream that hides keys and writes control characters out, whoever prints to it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        shown = _CONTROL_OF_STREAM.sub(lambda found: _written(found[0], _KEPT_IN_LINES), without_keys(text))
        self.stream.write(shown)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def printable_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`: the traceback of an error that nobody expected."""
    with printable_output():
        sys.__excepthook__(kind, error, trace)


def print_only_printable() -> None:
    """From here on, what this process prints is printable: for Ray's, which write logs and have no entry."""
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), PrintableStream):
            setattr(sys, name, PrintableStream(stream))


@contextmanager
def printable_output() -> Iterator[None]:
    """Standard output and standard error show printable text alone for the length of a with-block."""
    with ExitStack() as streams:
        streams.enter_context(redirect_stdout(cast(TextIO, PrintableStream(sys.stdout))))
        streams.enter_context(redirect_stderr(cast(TextIO, PrintableStream(sys.stderr))))
        yield
