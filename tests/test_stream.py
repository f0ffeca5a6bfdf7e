"""Laws of the stream in a real Ray session: at any number of workers, each step has the rows of the order."""

import contextlib
import functools
import os
import signal
import time
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cluster.storage.uris import open_store
from data.order.order import Order
from data.rows.stream import StreamError, TokenStream
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment
from tests.stream_workers import CONFIG, LANES, ROWS_PER_STEP, SEQ_LEN, Board, Group, Worker
from tests.token_corpus import put_token_corpus

SIZES = {("train", "web"): 60, ("train", "books"): 40}

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def start_group():
    """Starts workers over a prepared corpus, from one step to another; they end with the test."""
    groups = []

    def start(prepared: str, world_size: int, start: int, stop: int, burst_bytes: int = 2**20) -> Group:
        board = ray.remote(num_cpus=0)(Board).remote(world_size)
        actor = ray.remote(num_cpus=0)(Worker)
        group = Group([actor.remote(prepared, rank, world_size, board) for rank in range(world_size)])
        groups.append((group, board))
        group.call("open", start, stop, burst_bytes)
        return group

    yield start
    for group, board in groups:
        for actor in (*group.workers, board):
            ray.kill(actor)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[str, Manifest]:
    store = open_store(str(tmp_path_factory.mktemp("corpus")))
    return store.uri, put_token_corpus(store, SIZES, fragment_tokens=120)


def order_of(manifest: Manifest) -> Order:
    return Order(manifest, CONFIG, seq_len=SEQ_LEN, rows_per_step=ROWS_PER_STEP)


def digests(shares: list[list[dict[str, Any]]]) -> list[int]:
    """The digest of each step, of all workers together."""
    return [sum(rows["digest"] for rows in step) % 2**64 for step in zip(*shares, strict=True)]


def identities(rows: Any) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in rows.columns()), strict=True))


def test_every_steps_rows_are_the_orders_at_any_number_of_workers(corpus, start_group):
    prepared, manifest = corpus
    store, order = open_store(prepared), order_of(manifest)
    # 3 does not divide the lanes; bursts of one window and of several.
    found = {}
    for world_size, burst_bytes in ((1, 2**20), (2, 1), (3, 2**20), (4, 2_000)):
        shares = start_group(prepared, world_size, 0, 13, burst_bytes).call("take")
        found[world_size] = digests(shares)
        for step, parts in enumerate(zip(*shares, strict=True)):
            assert {part["step"] for part in parts} == {step}
            assert sum(float(part["weights"].sum()) for part in parts) == ROWS_PER_STEP
            rows = sorted(row for part in parts for row in identities(part["rows"]))
            assert rows == sorted(identities(order.step_rows(step)))
            for part in parts:
                for row, tokens in zip(identities(part["rows"]), part["tokens"], strict=True):
                    _, _, fragment, _, start = row
                    whole = read_fragment(store, manifest, fragment)
                    assert np.array_equal(tokens, whole[start : start + SEQ_LEN + 1])
    assert found[1] == found[2] == found[3] == found[4]
    assert len(set(found[1])) == 13


def test_resuming_with_other_workers_yields_exactly_the_steps_not_yet_taken(corpus, start_group):
    prepared, _ = corpus
    unbroken = digests(start_group(prepared, 1, 0, 12).call("take"))
    before = digests(start_group(prepared, 4, 0, 12).call("take", 7))
    after = digests(start_group(prepared, 2, 7, 12).call("take"))
    assert before + after == unbroken


def test_over_two_epochs_on_s3_and_restarts_with_1_4_2_3_workers_no_row_is_lost_or_repeated(
    s3_uri, start_group
):
    store = open_store(s3_uri)
    # As many rows of each source as its weight, so that both end their epochs together.
    manifest = put_token_corpus(store, {("train", "web"): 30, ("train", "books"): 15}, fragment_tokens=120)
    read = functools.cache(lambda fragment: read_fragment(store, manifest, fragment))
    order, stops = order_of(manifest), (0, 8, 23, 31, 45)
    assert min(order.epochs_before(stops[-1]).values()) > 2
    trained = []
    for world_size, (start, stop) in zip((1, 4, 2, 3), pairwise(stops), strict=True):
        shares = start_group(s3_uri, world_size, start, stop).call("take")
        for step, parts in enumerate(zip(*shares, strict=True), start):
            assert {part["step"] for part in parts} == {step}
            for part in parts:
                for row, tokens in zip(identities(part["rows"]), part["tokens"], strict=True):
                    _, _, fragment, _, at = row
                    assert np.array_equal(tokens, read(fragment)[at : at + SEQ_LEN + 1])
                    trained.append(row)
    assert len(set(trained)) == len(trained) == stops[-1] * ROWS_PER_STEP
    num_rows = (manifest.fragments.num_tokens - 1) // SEQ_LEN
    for source, name in enumerate(manifest.sources):
        whole = {(part, row) for part in manifest.select("train", name) for row in range(num_rows[part])}
        for epoch in (0, 1):
            found = [row[2:4] for row in trained if row[:2] == (source, epoch)]
            assert set(found) <= whole and len(set(found)) == len(found)
            assert len(whole) - len(found) == order.remainder()[name]["rows"] < LANES


def live_pipelines() -> set[int]:
    """Processes of the actors that this session's pipelines run in."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("ray::SplitCoordinator" in part for part in process.cmdline()):
                found.add(process.pid)
    return found


def until(condition) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_worker_leaves_no_pipeline_behind(corpus, start_group):
    prepared, _ = corpus
    before = live_pipelines()
    group = start_group(prepared, 2, 0, 10_000, 1)
    group.call("take", 3)
    assert live_pipelines() - before
    os.kill(group.call("pid")[0], signal.SIGKILL)
    until(lambda: not live_pipelines() - before)


def test_a_closed_stream_leaves_no_pipeline_behind(corpus, start_group):
    prepared, _ = corpus
    before = live_pipelines()
    group = start_group(prepared, 2, 0, 10_000, 1)
    group.call("take", 3)
    group.call("close")
    until(lambda: not live_pipelines() - before)


def test_a_flipped_byte_stops_the_stream_and_names_shard_and_fragment(tmp_path, start_group):
    store = open_store(str(tmp_path))
    manifest = put_token_corpus(store, SIZES, fragment_tokens=120)
    path = manifest.shards[0].path
    content = bytearray(store.read(path))
    content[300] ^= 1
    store.put(path, bytes(content))
    with pytest.raises(Exception) as stopped:
        start_group(store.uri, 2, 0, 100).call("take")
    assert "StreamError" in str(stopped.value)
    assert f"{path}, fragment 0" in str(stopped.value)


def test_the_stream_waits_for_an_object_store_that_is_away(s3, s3_uri, start_group):
    store = open_store(s3_uri)
    manifest = put_token_corpus(store, SIZES, fragment_tokens=120)
    group = start_group(store.uri, 2, 0, 15, 1)
    before = group.call("take", 3)
    s3.kill()
    try:
        rest = [worker.take.remote() for worker in group.workers]
        done, _ = ray.wait(rest, num_returns=2, timeout=8)
        assert not done  # it takes some seconds to read what lay ready, and then it waits
    finally:
        s3.start()
    after = ray.get(rest, timeout=300)
    order = order_of(manifest)
    for share, more in zip(before, after, strict=True):
        share.extend(more)
    for step, parts in enumerate(zip(*before, strict=True)):
        rows = sorted(row for part in parts for row in identities(part["rows"]))
        assert rows == sorted(identities(order.step_rows(step)))
    assert len(before[0]) == 15


def test_a_worker_that_gets_anothers_blocks_stops(corpus):
    prepared, manifest = corpus
    handed = []

    def swapped(parts):
        handed[:] = parts[::-1] if parts else handed
        return handed

    options = {"world_size": 2, "start_step": 0, "stop_step": 9, "broadcast": swapped}
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(TokenStream(order_of(manifest), manifest, prepared, rank=rank, **options))
            for rank in (0, 1)
        ]
        for rank, stream in enumerate(streams):
            with pytest.raises(
                StreamError, match=f"got lane {1 - rank}, steps 0 to 4, instead of lane {rank}"
            ):
                next(stream)


def test_opening_takes_as_long_at_the_end_of_an_epoch_as_at_its_beginning(corpus, start_group):
    prepared, manifest = corpus
    epoch_steps = 1 / max(order_of(manifest).epochs_before(1).values())
    # The last in an epoch so late that whoever reads, or counts, from the beginning does not arrive.
    starts = [int(epochs * epoch_steps) for epochs in (0.01, 0.99, 100_000.99)]
    seconds = {start: [] for start in starts}
    for start in 2 * starts:
        began = time.monotonic()
        group = start_group(prepared, 1, start, start + 5)
        [[first]] = group.call("take", 1)
        seconds[start].append(time.monotonic() - began)
        assert first["step"] == start
        group.call("close")
    fastest = [min(each) for each in seconds.values()]
    assert max(fastest) < 3 * min(fastest)


def test_a_step_says_how_long_it_was_waited_for(corpus, start_group):
    prepared, _ = corpus
    [steps] = start_group(prepared, 1, 0, 5).call("take")
    # The first step of a window waits for the window to be read, the others for nothing.
    assert steps[0]["wait_seconds"] > 10 * max(step["wait_seconds"] for step in steps[1:])
