"""Planning: how long an order over many fragments takes to make, its memory, and a step's rows for one worker.

    python benchmarks/bench_order.py [--fragments 10000000] [--workers 64]

The manifest lies in memory already; `plan` is from there to the first step's rows, a whole epoch put into its order. A
step's rows are timed in both ways that they are asked for: any step on its own, and by windows, as the readers do.
Medians; the growth of the process's peak memory. Then the tokens that readers fetch for each one that is trained, with
the automatic window: it takes whole fragments of each source.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from data.order.order import Order, OrderConfig
from data.shards.manifest import Manifest
from data.shards.manifest_table import HASH_BYTES, HASH_DTYPE, Fragments, Shard

SEQ_LEN, ROWS_PER_STEP, LANES = 2_048, 512, 64
FRAGMENTS_PER_SHARD = 128
MIXED_FRAGMENTS, SOURCES = 200_000, (1, 5, 22, 50)
"""Of the corpora whose reads are counted: fragments, and numbers of sources."""


def manifest_of(num_fragments: int, num_sources: int = 1) -> Manifest:
    """Fragments of about a million tokens, as a corpus of trillions has them; shards of the sources in turn."""
    num_shards = -(-num_fragments // FRAGMENTS_PER_SHARD)
    index = np.arange(num_fragments)
    fragments = Fragments(
        shard=(index // FRAGMENTS_PER_SHARD).astype(np.int32),
        row_group=(index % FRAGMENTS_PER_SHARD).astype(np.int32),
        num_tokens=np.random.default_rng(0).integers(1_000_000, 1_048_576, num_fragments),
        num_bytes=index,
        num_documents=index,
        checksum=index.astype(np.uint32),
        blake2b=np.frombuffer(np.random.default_rng(1).bytes(HASH_BYTES * num_fragments), HASH_DTYPE),
    )
    sources = tuple(f"web{number or ''}" for number in range(num_sources))
    shards = tuple(
        Shard(f"shards/{i:016x}.parquet", "train", sources[i % num_sources], 1, "", 1, "0")
        for i in range(num_shards)
    )
    return Manifest("0" * 16, 50_257, 50_256, "uint16", sources, shards, fragments, {}, {})


def fetched_over_trained(order: Order, manifest: Manifest, num_windows: int = 2) -> float:
    """Tokens of all fragments that the first windows of all lanes read, over those that they train."""
    pairs = [(number, lane) for number in range(num_windows) for lane in range(order.lanes)]
    windows = order.windows(*zip(*pairs, strict=True))
    fetched = sum(
        int(manifest.fragments.num_tokens[np.unique(window.runs.fragment)].sum()) for window in windows
    )
    return fetched / (sum(int(window.num_rows.sum()) for window in windows) * order.seq_len)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fragments", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args(argv)
    manifest = manifest_of(arguments.fragments)
    digest_seconds = seconds(lambda: manifest.digest)
    before, started = peak_bytes(), time.perf_counter()
    order = Order(manifest, OrderConfig(lanes=LANES), seq_len=SEQ_LEN, rows_per_step=ROWS_PER_STEP)
    order.step_rows(0)
    plan_seconds, plan_bytes = time.perf_counter() - started, peak_bytes() - before

    lanes = range(0, LANES, arguments.workers)
    steps = np.random.default_rng(1).integers(0, order.epochs[0].lane_rows // order.rows_per_lane, 200)
    any_step = median(seconds(lambda step=int(step): order.step_rows(step, lanes)) for step in steps)
    windows = list(range(20))
    by_window = median(
        seconds(lambda window=window: [w.rows() for w in order.windows([window] * len(lanes), lanes)])
        for window in windows
    )
    print(f"plan {arguments.fragments:,} fragments   {plan_seconds:.2f} s, {plan_bytes / 1e6:,.0f} MB")
    print(f"(the manifest's digest, once          {digest_seconds:.2f} s)")
    print(f"one worker of {arguments.workers}, {len(lanes) * order.rows_per_lane} rows a step:")
    print(f"  any step                            {any_step * 1e3:.2f} ms")
    steps = order.slots.window_steps
    print(f"  by windows of {steps} steps             {by_window / steps * 1e3:.3f} ms a step")
    print("fetched over trained, with the automatic window, by number of sources:")
    for num_sources in SOURCES:
        mixed = manifest_of(MIXED_FRAGMENTS, num_sources)
        order = Order(mixed, OrderConfig(lanes=LANES), seq_len=SEQ_LEN, rows_per_step=ROWS_PER_STEP)
        size = order.window_bytes / 2**20
        print(f"  {num_sources:<3}   {fetched_over_trained(order, mixed):.2f} ({size:.0f} MiB a lane)")


if __name__ == "__main__":
    main()
