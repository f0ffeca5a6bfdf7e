"""The rows of a run, step after step, on every training worker: read and verified by Ray Data, in the order
of data/order/order.py.

Legend: n workers, U lanes, k rows per lane and step, R = ceil(U / n) * k rows of a worker and step, T tokens
with a loss per row.

A read task for each (window, lane), window by window, makes one block. `streaming_split(n, equal=True)` with
`preserve_order` hands block i to worker i mod n, hence lane j to worker j mod n. A block says which lane and
steps it is for, and a worker that gets another one than it expects stops. Where n does not divide U, fillers
make up for the missing lanes.

A run is cut into bursts of whole windows. Each is a Ray Data pipeline of its own, which reads as fast as it
can and ends; the next one starts when the training of this one begins. One pipeline for all, held back by its
slow consumers, costs a core: the executor's loop does not sleep while output is held back (ray 2.60: 95 % of
a core in `SplitCoordinator`, measured; benchmarks/bench_stream.py prints what is left).
"""

import functools
import hashlib
import pickle
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from cluster.console.errors import UserError
from data.order.epochs import Rows
from data.order.order import Order
from data.rows.framing import FramingConfig
from data.rows.window import FILLER_LANE, READ_CPUS, SCHEMA, Block, filler, plan_read, row_width, unpack
from data.shards.manifest import Manifest

# Tokens of a worker's burst; two bursts are held at once. A pipeline takes up to 10 s to start on a busy
# machine, in which a worker that trains 500,000 tokens/s needs 10 MB; the rest makes bursts rare.
BURST_BYTES = 64 * 2**20
# Tasks go into the object store before the first one runs, at some thousands a second.
BURST_TASKS = 4_096
# One reader delivers 30 M tokens/s from a disk: far more than four workers train.
WORKERS_PER_READER = 4


class StreamError(UserError, RuntimeError):
    """The stream broke: a read failed for good, or what came is not what the order says."""


@dataclass(frozen=True)
class StepRows:
    """One worker's rows of one step."""

    step: int
    tokens: NDArray[np.unsignedinteger]
    """[R, T + 1], or [R, T] where framed; uint16 or uint32."""
    labels: NDArray[np.int8]
    """[R]: of sentence pairs; -1: none."""
    weights: NDArray[np.float32]
    """[R]: 1, or 0 for rows of a filler."""
    rows: Rows
    """[R]: which rows they are; -1 for rows of a filler."""
    wait_seconds: float = 0.0
    """Time that the worker spent on getting them."""

    @functools.cached_property
    def digest(self) -> int:
        """Sum modulo 2**64 of a hash of each row's step, identity and tokens; the workers' sums add up to the
        step's.
        """
        identity = np.stack([np.full(len(self.rows), self.step), *self.rows.columns()], axis=1)
        hashes = (
            hashlib.blake2b(identity[i].tobytes() + self.tokens[i].tobytes(), digest_size=8).digest()
            for i in np.flatnonzero(self.weights)
        )
        return sum(int.from_bytes(each, "little") for each in hashes) % 2**64


class TokenStream:
    """Iterates over the steps from `start_step` up to `stop_step`; a context manager.

    All workers make one at the same time, which starts the reading, and take the same steps.

    Args:
        prepared: URI of the prepared corpus.
        rank: This worker's number, from 0.
        world_size: n, at most U.
        broadcast: Hands a value of worker 0 to all. All workers call it at the same steps.
        framing: How rows are framed; None: they are plain consecutive tokens.
        burst_bytes: Tokens of a burst in bytes, per worker; a burst has one window at least.

    Raises:
        StreamError: while iterating.
    """

    def __init__(
        self,
        order: Order,
        manifest: Manifest,
        prepared: str,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int,
        broadcast: Callable[[Any], Any],
        framing: FramingConfig | None = None,
        burst_bytes: int = BURST_BYTES,
    ) -> None:
        if not 0 <= rank < world_size <= order.lanes:
            raise ValueError(f"worker {rank} of {world_size}: order.lanes={order.lanes} is the most workers")
        self._order, self._manifest, self._prepared = order, manifest, prepared
        self._rank, self._world_size, self._broadcast = rank, world_size, broadcast
        self._start, self._stop, self._framing = start_step, stop_step, framing
        self._rounds = -(-order.lanes // world_size)
        by_bytes = burst_bytes // (self._rounds * order.window_bytes)
        self._burst_windows = max(1, min(by_bytes, BURST_TASKS // (self._rounds * world_size)))
        self._receivers: list[_Receiver] = []
        # Worker 0 owns the pipelines: they end with these.
        self._pipelines: list[list[ray.data.DataIterator]] = []
        self._bursts = self._cut_into_bursts()
        if self._bursts:
            self._start_burst(self._bursts[0])
        self._steps = self._all_steps()

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepRows]:
        return self

    def __next__(self) -> StepRows:
        began = time.perf_counter()
        rows = next(self._steps)
        return replace(rows, wait_seconds=time.perf_counter() - began)

    def close(self) -> None:
        """Stop reading. The pipelines end when worker 0 closes its stream."""
        self._steps.close()
        for receiver in self._receivers:
            receiver.stop()
        self._receivers.clear()
        self._pipelines.clear()

    def _all_steps(self) -> Generator[StepRows, None, None]:
        for number, burst in enumerate(self._bursts):
            receiver = self._receivers[-1]
            for window in burst:
                blocks = [self._checked(receiver.next(), window, turn) for turn in range(self._rounds)]
                if window == burst[0] and number + 1 < len(self._bursts):
                    self._start_burst(self._bursts[number + 1])
                yield from self._window_steps(blocks)

    def _cut_into_bursts(self) -> list[range]:
        """The windows of each burst."""
        first, after = (
            self._order.slots.window_of(self._start),
            self._order.slots.window_of(self._stop - 1) + 1,
        )
        starts = range(first, after, self._burst_windows) if self._start < self._stop else ()
        return [range(window, min(window + self._burst_windows, after)) for window in starts]

    def _start_burst(self, windows: range) -> None:
        """Let a pipeline read these windows, and receive this worker's blocks of it."""
        pickled = None
        if self._rank == 0:
            parts = _pipeline(self._tasks(windows), self._world_size)
            self._pipelines.append(parts)
            # Not by Ray's cloudpickle: it would keep the pipeline's actor alive as long as this process.
            pickled = [pickle.dumps(part) for part in parts]
        part = pickle.loads(self._broadcast(pickled)[self._rank])
        self._receivers = [*self._receivers[-1:], _Receiver(part)]
        # All workers take this burst's part, so they have trained the one before the last.
        self._pipelines = self._pipelines[-2:]

    def _tasks(self, windows: range) -> list[Callable[[], pa.Table]]:
        """The reads of a burst in the order of handing out: block i goes to worker i mod n."""
        lanes = np.arange(self._rounds * self._world_size)
        real = lanes[lanes < self._order.lanes]
        pairs = [(window, lane) for window in windows for lane in real]
        planned = iter(self._order.windows(*zip(*pairs, strict=True), start=self._start, stop=self._stop))
        tasks: list[Callable[[], pa.Table]] = []
        for window in windows:
            start, stop = self._bounds(window)
            for lane in lanes:
                if lane < self._order.lanes:
                    planned_read = plan_read(
                        self._order, self._manifest, self._prepared, next(planned), self._framing
                    )
                    tasks.append(planned_read.read)
                else:
                    tasks.append(functools.partial(filler, start, stop, self._order.rows_per_lane))
        return tasks

    def _bounds(self, window: int) -> tuple[int, int]:
        """The steps of a window that are to be trained."""
        begin, after = self._order.slots.bounds(window)
        return max(begin, self._start), min(after, self._stop)

    def _checked(self, table: pa.Table, window: int, turn: int) -> Block:
        """The block that this worker gets as its `turn`-th of a window, unless it is another one."""
        width = row_width(self._order.seq_len, self._framing)
        block = unpack(table, width, self._manifest.token_dtype)
        lane = turn * self._world_size + self._rank
        expected = lane if lane < self._order.lanes else FILLER_LANE
        steps = np.repeat(np.arange(*self._bounds(window)), self._order.rows_per_lane)
        if block.lane != expected or not np.array_equal(block.steps, steps):
            came = f"lane {block.lane}, steps {block.steps[0]:,} to {block.steps[-1]:,}"
            wanted = f"lane {expected}, steps {steps[0]:,} to {steps[-1]:,}"
            raise StreamError(
                f"worker {self._rank} of {self._world_size} got {came}, instead of {wanted}: Ray Data did not "
                "keep the order of its blocks; restart from the last checkpoint"
            )
        return block

    def _window_steps(self, blocks: list[Block]) -> Iterator[StepRows]:
        k = self._order.rows_per_lane
        weights = np.repeat(np.array([block.lane != FILLER_LANE for block in blocks], np.float32), k)
        for begin in range(0, len(blocks[0].steps), k):
            here = slice(begin, begin + k)
            yield StepRows(
                step=int(blocks[0].steps[begin]),
                tokens=np.concatenate([block.tokens[here] for block in blocks]),
                labels=np.concatenate([block.labels[here] for block in blocks]),
                weights=weights,
                rows=Rows.join([block.rows[here] for block in blocks]),
            )


class _Receiver:
    """Takes a worker's part of a pipeline as it comes, in a thread: consumers that lag hold the pipeline
    back.
    """

    def __init__(self, part: ray.data.DataIterator) -> None:
        self._part, self._stopped = part, False
        self._received: queue.SimpleQueue[pa.Table | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True, name="token-stream").start()

    def next(self) -> pa.Table:
        """The next block, waited for. Raises `StreamError` where the pipeline broke or has ended."""
        block = self._received.get()
        if isinstance(block, BaseException):
            raise StreamError(f"reading the token shards failed: {_first_line(block)}") from block
        return block

    def stop(self) -> None:
        self._stopped = True

    def _receive(self) -> None:
        try:
            # batch_size None, a whole block, is documented but not in the signature.
            blocks = self._part.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)  # type: ignore[arg-type]
            for block in blocks:
                if self._stopped:
                    return
                self._received.put(block)
            self._received.put(EOFError("the pipeline ended before its last block"))
        except (
            BaseException
        ) as error:  # whatever it is, SystemExit by Ray's shutdown too: who trains has to raise it
            self._received.put(error)


class _Reads(Datasource):
    """A Ray Data source of one block per read."""

    def __init__(self, reads: list[Callable[[], pa.Table]]) -> None:
        super().__init__()
        self._reads = reads

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        nothing_known = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_one_block(read), nothing_known, schema=SCHEMA) for read in self._reads]


def _one_block(read: Callable[[], pa.Table]) -> Callable[[], list[pa.Table]]:
    return lambda: [read()]


def _pipeline(reads: list[Callable[[], pa.Table]], world_size: int) -> list[ray.data.DataIterator]:
    """Run the reads, and deal their blocks out to the workers in turn."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # a read stays one block, whatever its size
    context.execution_no_progress_timeout_s = -1  # a worker that compiles or saves for long is no hang
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    readers = -(-world_size // WORKERS_PER_READER)
    with ray.data.DataContext.current(context):
        # The number of readers, not the CPUs that seem free, says how many run: Ray Data counts the training
        # workers' as its own.
        dataset = ray.data.read_datasource(
            _Reads(reads), override_num_blocks=len(reads), num_cpus=READ_CPUS, concurrency=readers
        )
        return dataset.streaming_split(world_size, equal=True)


def _first_line(error: BaseException) -> str:
    """What went wrong, without Ray's account of where."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
