"""Training workers that only take their rows: actors with a stream each, and a stand-in for a collective."""

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import ray

from cluster.storage import open_store
from data.manifest import read_manifest
from data.order import Order, OrderConfig
from data.stream import TokenStream

SEQ_LEN, ROWS_PER_STEP, LANES, WINDOW_STEPS = 16, 16, 8, 5
CONFIG = OrderConfig(lanes=LANES, window_steps=WINDOW_STEPS, weights={"web": 2.0, "books": 1.0})


class Board:
    """Hands values of worker 0 to all, as a collective would."""

    def __init__(self) -> None:
        self._values: dict[int, asyncio.Future[Any]] = {}

    async def put(self, number: int, value: Any) -> None:
        self._at(number).set_result(value)

    async def get(self, number: int) -> Any:
        return await asyncio.shield(self._at(number))

    def _at(self, number: int) -> "asyncio.Future[Any]":
        return self._values.setdefault(number, asyncio.get_running_loop().create_future())


class Worker:
    """A training worker that does nothing with its rows."""

    def __init__(self, prepared: str, rank: int, world_size: int, board: Any) -> None:
        self._prepared, self._rank, self._world_size, self._board = prepared, rank, world_size, board
        self._broadcasts = 0

    def open(self, start: int, stop: int, burst_bytes: int) -> None:
        manifest = read_manifest(open_store(self._prepared))
        order = Order(manifest, CONFIG, seq_len=SEQ_LEN, rows_per_step=ROWS_PER_STEP)
        self._stream = TokenStream(
            order,
            manifest,
            self._prepared,
            rank=self._rank,
            world_size=self._world_size,
            start_step=start,
            stop_step=stop,
            broadcast=self._broadcast,
            burst_bytes=burst_bytes,
        )

    def take(self, steps: int | None = None) -> list[dict[str, Any]]:
        """Digest, rows and more of the next steps, or of all that are left."""
        taken = []
        for rows in self._stream:
            real = rows.weights > 0
            taken.append(
                {
                    "step": rows.step,
                    "digest": rows.digest,
                    "rows": rows.rows[real],
                    "tokens": rows.tokens[real],
                    "weights": rows.weights,
                    "wait_seconds": rows.wait_seconds,
                }
            )
            if len(taken) == steps:
                break
        return taken

    def close(self) -> None:
        self._stream.close()

    def pid(self) -> int:
        return os.getpid()

    def _broadcast(self, value: Any) -> Any:
        self._broadcasts += 1
        if self._rank == 0:
            ray.get(self._board.put.remote(self._broadcasts, value))
        return ray.get(self._board.get.remote(self._broadcasts))


@dataclass
class Group:
    """Workers that share a stream."""

    workers: list[Any]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        calls = [getattr(worker, method).remote(*arguments) for worker in self.workers]
        return ray.get(calls, timeout=120)
