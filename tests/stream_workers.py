"""Training workers that only take their rows: actors with a stream each, and a stand-in for a collective."""

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import ray

from cluster.storage.uris import open_store
from data.order.order import Order, OrderConfig
from data.rows.stream import TokenStream
from data.shards.manifest import read_manifest

SEQ_LEN, ROWS_PER_STEP, LANES, WINDOW_STEPS = 16, 16, 8, 5
CONFIG = OrderConfig(lanes=LANES, window_steps=WINDOW_STEPS, weights={"web": 2.0, "books": 1.0})


class Board:
    """Hands values of worker 0 to all once all have come for them, as a collective does."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._values: dict[int, Any] = {}
        self._came: dict[int, int] = {}
        self._change = asyncio.Condition()

    async def broadcast(self, number: int, rank: int, value: Any) -> Any:
        async with self._change:
            self._came[number] = self._came.get(number, 0) + 1
            if rank == 0:
                self._values[number] = value
            self._change.notify_all()
            await self._change.wait_for(lambda: self._came[number] == self._world_size)
        return self._values[number]


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
        return ray.get(self._board.broadcast.remote(self._broadcasts, self._rank, value))


@dataclass
class Group:
    """Workers that share a stream."""

    workers: list[Any]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        calls = [getattr(worker, method).remote(*arguments) for worker in self.workers]
        return ray.get(calls, timeout=300)
