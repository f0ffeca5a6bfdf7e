"""What stores behind a network share: requests tried again while a fault may pass, and files read by ranges."""

import io
import logging
import os
import random
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

from cluster.console.printable import printable, without_keys
from cluster.storage.store import READ_AHEAD_BYTES, Store

T = TypeVar("T")
logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.1  # doubled after each failure up to
LONGEST_BACKOFF_SECONDS = 5.0  # and cut by up to a half at random, so that many readers do not return at once


@dataclass(frozen=True)
class Failure:
    """What a request's error means."""

    cause: str
    remedy: str
    is_passing: bool = False
    """Whether trying again may help."""
    is_absent: bool = False
    """Whether the store answered that the object is not there."""


class RemoteStore(Store):
    """A store that is spoken to by requests, which may fail and pass."""

    @staticmethod
    @abstractmethod
    def _failure(error: Exception) -> Failure | None:
        """What an error of a request means; None: it is not the store's."""

    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Remote(self, path, self.size(path)), READ_AHEAD_BYTES))

    def _retried(self, operation: str, path: str, send: Callable[[], T]) -> T:
        """The result of `send`, tried again until the policy gives up."""
        first_failure, backoff, patience = None, FIRST_BACKOFF_SECONDS, self.policy.give_up_seconds
        while True:
            try:
                return send()
            except Exception as error:
                failure = self._failure(error)
                if failure is None:
                    raise
                if failure.is_absent:
                    raise self._absent(path) from None
                if failure.is_passing and first_failure is None and patience:
                    told = printable(f"cannot {operation} {self.uri}/{path} yet ({failure.cause})")
                    logger.warning("%s; trying for %g s", told, patience)
                first_failure = first_failure or time.monotonic()
                if not failure.is_passing or time.monotonic() >= first_failure + patience:
                    failed = self._error(operation, path, failure.cause, failure.remedy)
                    raise failed from (None if _shows_keys(error) else error)
            time.sleep(backoff * random.uniform(0.5, 1))
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)


def _shows_keys(error: Exception) -> bool:
    """Whether a traceback that goes on to `error` would show what its message hides: an endpoint with a password."""
    told = "".join(traceback.format_exception(error))
    return without_keys(told) != told


class _Remote(io.RawIOBase):
    """A seekable file over ranged reads."""

    def __init__(self, store: Store, path: str, num_bytes: int) -> None:
        self._store, self._path, self._num_bytes, self._position = store, path, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._num_bytes - self._position))
        buffer[:length] = self._store.read_range(self._path, self._position, length)
        self._position += length
        return length
