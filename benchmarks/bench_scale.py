"""Scale without a cluster: the order and the reads of a petabyte of text by 1,024 workers, planned on this machine.

    python benchmarks/bench_scale.py [--petabytes 1] [--workers 1024] [--fragment-tokens 8388608]

Prints a table in Markdown, within seconds. Real are manifest, order and the plans of the reads; nothing is read.
Balance is the largest share of a window's rows over the smallest. Fetched over trained counts tokens, for a window
takes whole fragments. Rates hold at `--tokens-per-second` of all workers. A task's bytes are what Ray carries.
"""

import argparse
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.bench_order import manifest_of, peak_bytes
from data.order.order import Order, OrderConfig
from data.rows.window import WindowRead, plan_read
from data.shards.manifest import Manifest

BYTES_PER_TOKEN = 4.2
"""Of English text under a tokenizer of 50,000 entries."""
SEQ_LEN, ROWS_PER_WORKER = 4_096, 4
WINDOWS_LOOKED_AT = 4


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--petabytes", type=float, default=1.0, help="of raw text")
    parser.add_argument("--workers", type=int, default=1_024)
    parser.add_argument("--fragment-tokens", type=int, default=8_388_608)
    parser.add_argument("--window-steps", type=int, default=512)
    parser.add_argument("--tokens-per-second", type=float, default=10e6, help="of all workers")
    options = parser.parse_args(argv)
    num_fragments = int(options.petabytes * 1e15 / BYTES_PER_TOKEN / options.fragment_tokens)

    manifest = larger_fragments(manifest_of(num_fragments), options.fragment_tokens)
    before, started = peak_bytes(), time.perf_counter()
    order = Order(
        manifest,
        OrderConfig(lanes=options.workers, window_steps=options.window_steps),
        seq_len=SEQ_LEN,
        rows_per_step=options.workers * ROWS_PER_WORKER,
    )
    order.step_rows(0)
    plan_seconds, plan_bytes = time.perf_counter() - started, peak_bytes() - before
    tokens = int(manifest.fragments.num_tokens.sum())
    columns = sum(column.nbytes for column in vars(manifest.fragments).values())
    print("| what | result |\n|---|---|")
    for what, result in [
        (
            "corpus",
            f"{tokens / 1e12:.0f} T tokens in {num_fragments:,} fragments, {len(manifest.shards):,} shards",
        ),
        ("manifest in memory", f"{columns / 1e9:.2f} GB"),
        ("order planned", f"{plan_seconds:.1f} s, {plan_bytes / 1e9:.2f} GB more"),
        *reads_of(order, manifest, options),
    ]:
        print(f"| {what} | {result} |")


def larger_fragments(manifest: Manifest, tokens: int) -> Manifest:
    """The same manifest with fragments of about `tokens` tokens instead of a million."""
    scaled = manifest.fragments.num_tokens * (tokens / 1_048_576)
    return replace(manifest, fragments=replace(manifest.fragments, num_tokens=scaled.astype(np.int64)))


def reads_of(order: Order, manifest: Manifest, options: argparse.Namespace) -> list[tuple[str, str]]:
    """What the readers of the first windows would do, in words."""
    lanes = list(range(order.lanes))
    started = time.perf_counter()
    reads: list[WindowRead] = []
    for number in range(WINDOWS_LOOKED_AT):
        windows = order.windows([number] * len(lanes), lanes)
        reads += [plan_read(order, manifest, "s3://bucket/prepared", window) for window in windows]
    seconds = (time.perf_counter() - started) / WINDOWS_LOOKED_AT
    rows = np.array([read.window.num_rows.sum() for read in reads])
    touched = np.array([len(read.fragments) for read in reads])
    fetched = sum(int(manifest.fragments.num_tokens[read.fragments].sum()) for read in reads)
    used = int(rows.sum()) * order.seq_len
    window_seconds = used / WINDOWS_LOOKED_AT / options.tokens_per_second
    fragments = np.concatenate([read.fragments for read in reads])
    shards = manifest.fragments.shard[fragments]
    busiest = np.bincount(shards).max()
    token_bytes = np.dtype(manifest.token_dtype).itemsize
    rate = fetched / used * options.tokens_per_second * token_bytes / 1e6
    task_bytes = np.mean([len(pickle.dumps(read)) for read in reads[:64]])
    return [
        ("one window of all workers", f"planned in {seconds:.2f} s, trained on in {window_seconds:,.0f} s"),
        ("balance of the workers' rows", f"{rows.max() / rows.min():.3f}"),
        ("fragments in a read", f"{touched.mean():.2f} (at most {touched.max()})"),
        ("fetched over trained", f"{fetched / used:.2f}"),
        ("requests", f"{len(fragments) / WINDOWS_LOOKED_AT / window_seconds:,.1f} fragments/s"),
        ("fetched", f"{rate:,.0f} MB/s, uncompressed"),
        ("reads of one object", f"at most {busiest} of {len(fragments):,}"),
        ("a task", f"{task_bytes / 1e3:,.1f} kB"),
    ]


if __name__ == "__main__":
    main()
