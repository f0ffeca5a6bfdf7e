"""Ctrl-C while foreign code computes."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def interruptible(function: Callable[[], T]) -> T:
    """What the function returns, called in a thread: Ctrl-C ends the waiting for it at once.

    Python handles a signal between two steps of the main thread: one that trains a tokenizer takes none for minutes.
    """
    answer: Future[T] = Future()

    def call() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:  # raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=call, name="interruptible", daemon=True).start()
    return answer.result()
