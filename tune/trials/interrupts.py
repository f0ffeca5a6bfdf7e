"""Ctrl-C, SIGTERM and `ray job stop` end a sweep where it is: what runs stays unfinished, nothing is judged."""

import functools
import signal
from collections.abc import Callable
from types import FrameType

from cluster.configuration.config import INTERRUPTED


def stopped_gently(main: Callable[[], object]) -> Callable[[], None]:
    """`main`, ended by both signals with one line instead of a traceback; the second one ends it at once."""

    @functools.wraps(main)
    def run() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        try:
            main()
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on where it was", flush=True)
            raise SystemExit(INTERRUPTED) from None

    return run


def interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt
