"""A thread beside the work of a with-block: what watches, shows and asks while training goes on is one of these."""

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Background(ABC):
    """A context manager; `_run` works in the thread until `_ended` is set, which it waits on between two looks."""

    def __init__(self, name: str, join_seconds: float | None = None) -> None:
        """Takes the thread's name, and how long the end of the block waits for it; None: until it has ended."""
        self._ended, self._join_seconds = threading.Event(), join_seconds
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def _run(self) -> None:
        """What the thread does."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(self._join_seconds)
