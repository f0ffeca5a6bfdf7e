"""A run's time, the same whichever host tells it: by the clock of the store that all of them reach.

The preflight refuses a host whose clock is wrong, but not one that comes hours into a run, nor a clock that is set
while a process lives. What hosts write down is compared nevertheless: by the accounts of a run's time, by alerts.
"""

import time

from cluster.storage.uris import Store

TOLERANCE_SECONDS = 2.0
"""A smaller difference is not corrected: S3 tells whole seconds. Also what the preflight lets pass."""
# Unlike CLOCK_MONOTONIC it goes on while a laptop sleeps; macOS has no such clock.
UPTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class RunClock:
    """Asks the store once; from then on time goes on by this host's uptime, which nobody sets."""

    def __init__(self, run: Store) -> None:
        before = time.clock_gettime(UPTIME)
        there = run.clock()
        after = time.clock_gettime(UPTIME)
        here = time.time() - (time.clock_gettime(UPTIME) - (before + after) / 2)
        is_right = abs(there - here) - (after - before) / 2 <= TOLERANCE_SECONDS
        self._booted = (here if is_right else there) - (before + after) / 2
        self.started = self._booted + before
        """When the store was asked, which it answers late where it is away."""

    def now(self) -> float:
        """Unix time."""
        return self._booted + time.clock_gettime(UPTIME)
