"""torch.compile, with a cache of compiled code that is this user's own, and a clock of what it takes.

By default torch loads code from a folder in the shared /tmp that bears the user's name, whoever made it.
"""

import functools
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cluster.storage.user_cache import process_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where it is set, its user has decided."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled when it is first called."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = str(_own_folder())
    compile_clock()
    return torch.compile(function)


class CompileClock:
    """Adds up what this process compiles, told by torch: nested and parallel compilation counts once."""

    def __init__(self) -> None:
        from torch._dynamo import on_compile_end, on_compile_start  # here: it loads the compiler

        self.seconds, self._started = 0.0, 0.0
        on_compile_start(self._start)
        on_compile_end(self._end)

    def _start(self, _: object) -> None:
        self._started = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._started


compile_clock = functools.cache(CompileClock)
"""This process's, from the first `compiled` on."""


def seconds_compiled() -> float:
    """How long this process has compiled so far. Where it has not, asking does not load the compiler."""
    return compile_clock().seconds if compile_clock.cache_info().currsize else 0.0


def _own_folder() -> Path:
    """torch's default folder, if it is this user's; else one of this process."""
    from torch._inductor.runtime.cache_dir_utils import (
        default_cache_dir,  # here: it loads the compiler's parts
    )

    folder = Path(default_cache_dir())
    with suppress(FileExistsError):  # a file or a link
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & stat.S_IWOTH:
        return folder
    return process_folder(f"{folder}, of which torch.compile would load code, may be somebody else's")
