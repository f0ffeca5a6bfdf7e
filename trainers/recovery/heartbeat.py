"""A watchdog against hangs: a worker that shows no progress writes down where it stands, and ends itself.

A collective that waits for a lost or stuck worker never returns, and Ray Train notices only processes that
end. All workers of a hung group stop beating within a step of each other; each leaves its stacks, the one
that is to blame too, and lingers so that the others can before Ray kills the group and starts it anew from
the last commit.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from cluster.configuration.keys import MAY_CHANGE, may_change
from cluster.storage.uris import Store
from trainers.recovery.background import Background

EXIT_HUNG = 75
"""Exit status of a worker that its watchdog ended: EX_TEMPFAIL of sysexits.h, "try again later"."""
FOLDER = "stacks"
# The backstop for a hang that holds the GIL, in which no Python thread runs, this one included.
GIL_GRACE_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeartbeatConfig:
    """When a worker without progress is taken for hung, and ended."""

    timeout_seconds: float = may_change(600.0)
    """Longest time without a beat before a worker is taken for hung."""
    phase_timeout_seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("start", "restore", "compile", "validate", "save", "export"), 1_800.0
        ),
        metadata={MAY_CHANGE: "always"},
    )
    """Longer limits in seconds, for the phases that take minutes; `start` lasts until the first beat."""
    linger_seconds: float = may_change(10.0)
    """Time between the stacks and the end of the process, for the other workers to leave theirs."""

    @property
    def longest_seconds(self) -> float:
        """After it every hung worker has ended, whatever it was doing."""
        return max([self.timeout_seconds, *self.phase_timeout_seconds.values()]) + self.linger_seconds

    def problems(self, at: str) -> Iterator[str]:
        if self.timeout_seconds <= 0:
            yield f"{at}.timeout_seconds={self.timeout_seconds} must be positive"
        for phase, seconds in self.phase_timeout_seconds.items():
            if seconds < self.timeout_seconds:
                yield (
                    f"{at}.phase_timeout_seconds.{phase}={seconds} is below {at}.timeout_seconds="
                    f"{self.timeout_seconds}; at least: {self.timeout_seconds}"
                )
        if self.linger_seconds < 0:
            yield f"{at}.linger_seconds={self.linger_seconds} is negative; 0 ends the process at once"


class Heartbeat(Background):
    """The watchdog of one worker, running from `__enter__` to `__exit__`.

    Args:
        store: of the run; stacks go to `stacks/STEP-a<attempt>-worker<rank>.txt`.
    """

    def __init__(self, config: HeartbeatConfig, store: Store, *, rank: int, attempt: int) -> None:
        super().__init__("heartbeat")
        self._config = config
        self._store = store
        self._rank = rank
        self._attempt = attempt
        self._last = (time.monotonic(), 0, "start")

    def beat(self, step: int, phase: str = "step") -> None:
        """Say that `phase` of `step` begins now. The limit is the phase's, or else `timeout_seconds`."""
        # One assignment: the watching thread never sees a mixture of two beats.
        self._last = (time.monotonic(), step, phase)

    def __enter__(self) -> Self:
        self._last = (time.monotonic(), *self._last[1:])
        return super().__enter__()

    def _run(self) -> None:
        remaining = self._remaining()
        while remaining > 0:
            backstop_seconds = remaining + self._config.linger_seconds + GIL_GRACE_SECONDS
            faulthandler.dump_traceback_later(backstop_seconds, exit=True, file=sys.__stderr__ or 2)
            # No limit is shorter than timeout_seconds, so a beat in the meantime cannot be overdue at the
            # next look.
            if self._ended.wait(min(remaining, self._config.timeout_seconds)):
                faulthandler.cancel_dump_traceback_later()
                return
            remaining = self._remaining()
        self._end_process()

    def _remaining(self) -> float:
        since, _, phase = self._last
        return since + self._limit(phase) - time.monotonic()

    def _limit(self, phase: str) -> float:
        return self._config.phase_timeout_seconds.get(phase, self._config.timeout_seconds)

    def _end_process(self) -> None:
        since, step, phase = self._last
        text = (
            f"worker {self._rank}, attempt {self._attempt}, pid {os.getpid()}: "
            f"no beat for {time.monotonic() - since:.0f} s (limit {self._limit(phase):g} s) "
            f"in phase {phase!r} of step {step}; "
            f"the process ends with status {EXIT_HUNG}\n\n{stacks()}"
        )
        logger.critical("%s", text)
        path = f"{FOLDER}/{step:08d}-a{self._attempt}-worker{self._rank:05d}.txt"
        # The store may be what hangs, so the put has a thread of its own and no claim on the end of the
        # process.
        put = threading.Thread(target=self._store.put, args=(path, text.encode()), daemon=True)
        put.start()
        ends = time.monotonic() + self._config.linger_seconds
        put.join(max(self._config.linger_seconds, 1.0))
        time.sleep(max(0.0, ends - time.monotonic()))
        sys.stderr.flush()
        os._exit(EXIT_HUNG)  # sys.exit would only end this thread, and finalisers may wait for the stuck one


def stacks() -> str:
    """The Python stack of every thread of this process, by name, innermost frame last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, 'not started by Python')} ({ident}):\n"
        + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )
