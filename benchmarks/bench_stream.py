"""Rows delivered to one worker: tokens per second from the local disk and from a local S3 server, and what
waiting costs.

    python benchmarks/bench_stream.py [--fragments 160] [--store disk s3]
    python benchmarks/bench_stream.py --hashes          # what verifying costs, alone

`hashes` reads every fragment in turn by a manifest without hashes, whose fragments have CRC-32 alone, and by one with
BLAKE2b, in one process and in changing order, so that whatever else runs on the machine slows both; CPU time, medians.
The rest has one reading process. `read` calls the read function by itself; `Ray Data` is the whole way to the worker's
step rows, in one burst that holds all, from the first step to the last, so without the start of the pipeline,
which is printed beside it. `waiting` is the CPU time of all of Ray's processes while a worker trains slowly
and the next burst lies ready, less what an idle Ray takes.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from cluster.local_s3 import BUCKETS, LocalS3
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import open_store
from data.order.order import Order, OrderConfig
from data.rows.window import plan_read, unpack
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment
from tests.token_corpus import put_token_corpus

SEQ_LEN, ROWS_PER_STEP, LANES = 1_024, 64, 16
WAITING_SECONDS = 20.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fragments", type=int, default=160, help="of a million tokens, 2 MB each")
    parser.add_argument("--store", nargs="+", choices=("disk", "s3"), default=("disk", "s3"))
    parser.add_argument(
        "--hashes", action="store_true", help="only what verifying costs, from the local disk"
    )
    arguments = parser.parse_args(argv)
    if arguments.hashes:
        return print_cost_of_hashes(min(arguments.fragments, 40))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        uris = {"disk": f"{folder}/corpus"}
        if "s3" in arguments.store:
            stack.enter_context(LocalS3(Path(folder, "s3")))
            uris["s3"] = f"s3://{BUCKETS[0]}/bench"
        orders = {name: make_order(uris[name], arguments.fragments) for name in arguments.store}
        for name, (order, manifest) in orders.items():
            print(
                f"{name}: read          {rate(read_alone(order, manifest, uris[name])):6.1f} M tokens/s",
                flush=True,
            )
        stack.enter_context(ray_session(ClusterConfig(address="local", object_store_bytes=2 << 30)))
        for name, (order, manifest) in orders.items():
            begin, moments = time.perf_counter(), stream(order, manifest, uris[name], burst_bytes=1 << 30)
            first = next(moments)
            start = f"after {first[0] - begin:.1f} s to the first step"
            print(f"{name}: Ray Data      {rate(moments):6.1f} M tokens/s {start}", flush=True)
        print_waiting(*orders["disk"], uris["disk"])


def print_cost_of_hashes(num_fragments: int, rounds: int = 30) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        hashed = put_token_corpus(store, {("train", "web"): num_fragments}, fragment_tokens=1_000_000)
        shards = [replace(shard, footer_bytes=0, footer_blake2b="") for shard in hashed.shards]
        manifests = {"CRC-32": replace(hashed, shards=tuple(shards)), "CRC-32 and BLAKE2b": hashed}
        seconds = {name: list[float]() for name in manifests}
        for number in range(rounds * num_fragments):
            for name in sorted(manifests, reverse=bool(number % 2)):
                begin = time.process_time()
                read_fragment(store, manifests[name], number % num_fragments)
                seconds[name].append(time.process_time() - begin)
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(
            f"hashes: {name:19} {1e3 * middle:.2f} ms a million tokens, {1 / middle:,.0f} M tokens a CPU second"
        )


def make_order(uri: str, num_fragments: int) -> tuple[Order, Manifest]:
    """Put a corpus of random tokens, and order it."""
    manifest = put_token_corpus(open_store(uri), {("train", "web"): num_fragments}, fragment_tokens=1_000_000)
    return Order(manifest, OrderConfig(lanes=LANES), seq_len=SEQ_LEN, rows_per_step=ROWS_PER_STEP), manifest


def rate(moments: Iterator[tuple[float, int]]) -> float:
    """Million tokens per second between the first moment and the last; each is (time, tokens since the one
    before).
    """
    times, tokens = zip(*moments, strict=True)
    return sum(tokens[1:]) / (times[-1] - times[0]) / 1e6


def read_alone(order: Order, manifest: Manifest, uri: str) -> Iterator[tuple[float, int]]:
    for window in order.windows([0] * LANES, range(LANES)):
        block = unpack(plan_read(order, manifest, uri, window).read(), SEQ_LEN + 1, manifest.token_dtype)
        yield time.perf_counter(), len(block.tokens) * SEQ_LEN


def stream(order: Order, manifest: Manifest, uri: str, burst_bytes: int) -> Iterator[tuple[float, int]]:
    from data.rows.stream import TokenStream  # it imports Ray, which reads its settings then

    epoch_steps = order.epochs[0].lane_rows // order.rows_per_lane
    with TokenStream(
        order,
        manifest,
        uri,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=epoch_steps,
        broadcast=lambda value: value,
        burst_bytes=burst_bytes,
    ) as steps:
        for rows in steps:
            yield time.perf_counter(), rows.tokens.shape[0] * SEQ_LEN


def print_waiting(order: Order, manifest: Manifest, uri: str) -> None:
    """Take a step a second, with as many bursts ahead as there can be."""
    time.sleep(10)  # what the last stream started has ended
    idle = cpu_share()
    moments = stream(order, manifest, uri, burst_bytes=1)
    next(moments)
    time.sleep(20)  # the next burst has been read
    print(f"waiting: {100 * (cpu_share() - idle):.2f} % of a core (an idle Ray takes {100 * idle:.2f} %)")
    moments.close()


def cpu_share() -> float:
    """CPU time of all processes of this session but this one, as a share of one core."""
    before, began = cpu_seconds(), time.perf_counter()
    time.sleep(WAITING_SECONDS)
    after = cpu_seconds()
    return sum(after[pid] - before.get(pid, 0) for pid in after) / (time.perf_counter() - began)


def cpu_seconds() -> dict[int, float]:
    seconds = {}
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    return seconds


if __name__ == "__main__":
    main()
