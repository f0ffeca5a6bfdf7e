import pickle
import time
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import bench_order
from data.order.epochs import Rows
from data.order.order import Order, OrderConfig, OrderError, WeightChange, largest_divisor
from data.shards.manifest import Fragments, Manifest, Shard

SEQ_LEN = 8


def manifest_of(tokens_by_source):
    """A manifest with a training shard per source, each followed by a validation shard."""
    shards, columns = [], {"shard": [], "row_group": [], "num_tokens": []}
    for source, tokens in tokens_by_source.items():
        for split, sizes in (("train", tokens), ("validation", [50])):
            columns["shard"] += [len(shards)] * len(sizes)
            columns["row_group"] += range(len(sizes))
            columns["num_tokens"] += sizes
            shards.append(Shard(f"shards/{source}-{split}.parquet", split, source, 1, "0" * 64))
    columns |= {name: [0] * len(columns["shard"]) for name in ("num_bytes", "num_documents", "checksum")}
    return Manifest(
        tokenizer="0" * 16,
        vocab_size=100,
        boundary_id=0,
        token_dtype="uint16",
        sources=tuple(tokens_by_source),
        shards=tuple(shards),
        fragments=Fragments.from_columns(columns),
        duplicates={},
        set_aside={},
    )


@dataclass
class Case:
    """What an order is made of."""

    manifest: Manifest
    config: OrderConfig
    rows_per_step: int

    def order(self) -> Order:
        return Order(self.manifest, self.config, seq_len=SEQ_LEN, rows_per_step=self.rows_per_step)


@st.composite
def cases(draw, max_sources=3):
    lanes = draw(st.integers(1, 7))
    names = ["web", "books", "code"][: draw(st.integers(1, max_sources))]
    sizes = st.lists(st.integers(0, 60), max_size=25)
    # The last fragment has a row for each lane, so that every source may be drawn from.
    tokens = {name: [*draw(sizes), lanes * SEQ_LEN + 1] for name in names}
    weights = draw(
        st.just({}) | st.fixed_dictionaries({name: st.sampled_from([0.3, 1.0, 2.0]) for name in names})
    )
    schedule: tuple[WeightChange, ...] = ()
    if weights and draw(st.booleans()):
        schedule = (WeightChange(step=draw(st.integers(1, 20)), weights=dict.fromkeys(names, 1.0)),)
    config = OrderConfig(
        seed=draw(st.integers(0, 9)),
        lanes=lanes,
        window_steps=draw(st.sampled_from([0, 1, 3, 10])),
        weights=weights,
        schedule=schedule,
    )
    return Case(manifest_of(tokens), config, rows_per_step=lanes * draw(st.integers(1, 4)))


def identities(rows: Rows) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in rows.columns()), strict=True))


def rows_between(order: Order, start: int, stop: int) -> list[tuple[int, ...]]:
    return [row for step in range(start, stop) for row in identities(order.step_rows(step))]


def sample_order(**changes):
    config = replace(OrderConfig(lanes=4, seed=3), **changes)
    manifest = manifest_of({"web": [41] * 40, "books": [25] * 20})
    return Order(manifest, config, seq_len=SEQ_LEN, rows_per_step=8)


@settings(deadline=None)
@given(cases(), st.integers(0, 10**6), st.data())
def test_the_workers_rows_join_to_the_steps_rows_at_any_number_of_workers(case, step, data):
    order = case.order()
    workers = data.draw(st.integers(1, order.lanes))
    whole = sorted(identities(order.step_rows(step)))
    parts = [identities(order.step_rows(step, range(rank, order.lanes, workers))) for rank in range(workers)]
    assert sorted(row for part in parts for row in part) == whole
    assert len(whole) == case.rows_per_step


@settings(deadline=None)
@given(cases(), st.integers(0, 10**6), st.data())
@pytest.mark.slow
def test_a_window_read_on_its_own_has_the_rows_of_its_steps(case, step, data):
    order = case.order()
    window = step // order.slots.window_steps
    begin, end = order.slots.bounds(window)
    start = data.draw(st.integers(begin, end - 1))
    stop = data.draw(st.integers(start + 1, end + order.slots.window_steps))
    pairs = [(number, lane) for number in (window, window + 1) for lane in range(order.lanes)]
    for pair, read in zip(
        pairs, order.windows(*zip(*pairs, strict=True), start=start, stop=stop), strict=True
    ):
        read = pickle.loads(pickle.dumps(read))
        steps = [step for step in range(start, stop) if step // order.slots.window_steps == pair[0]]
        expected = [row for step in steps for row in identities(order.step_rows(step, [pair[1]]))]
        assert list(range(read.start, read.stop)) == steps
        if steps:
            assert identities(read.rows()) == expected


@settings(max_examples=25, deadline=None)
@given(cases(max_sources=2))
@pytest.mark.slow
def test_an_epoch_trains_every_row_once_except_the_counted_remainder(case):
    order = case.order()
    window = order.slots.window_steps
    steps = window * -(-max(150, window) // window)
    trained = rows_between(order, 0, steps)
    assert len(set(trained)) == len(trained)
    taken = order.slots.mixture.counts_before(steps, np.arange(order.lanes))
    for source, epochs in enumerate(order.epochs):
        left = order.remainder()[order.source_names[source]]["rows"]
        assert 0 <= left < order.lanes
        finished_by_all_lanes = int(taken[:, source].min()) // epochs.lane_rows
        for epoch in range(finished_by_all_lanes):
            assert sum(row[:2] == (source, epoch) for row in trained) == epochs.rows - left


def rows_of_workers(case: Case, workers: int, start: int, stop: int) -> list[tuple[int, ...]]:
    """What so many workers train from one step to another, by windows as they read them, with an order made anew."""
    order = case.order()
    last = order.slots.window_of(stop - 1) if stop > start else -1
    numbers = range(order.slots.window_of(start), last + 1)
    trained = []
    for worker in range(workers):
        pairs = [(number, lane) for number in numbers for lane in range(worker, order.lanes, workers)]
        windows = order.windows(*zip(*pairs, strict=True), start=start, stop=stop) if pairs else []
        trained += [row for window in windows for row in identities(window.rows())]
    return trained


@settings(max_examples=25, deadline=None)
@given(cases(max_sources=2), st.data())
def test_over_two_epochs_three_restarts_and_changing_workers_every_row_is_trained_exactly_once(case, data):
    case.config = replace(
        case.config, weights={}, schedule=()
    )  # so that all sources end their epochs together
    order, lanes = case.order(), case.config.lanes
    steps = 0
    while (order.slots.mixture.counts_before(steps, np.arange(lanes)) < two_epochs(order)).any():
        steps += order.slots.window_steps
    stops = sorted(data.draw(st.lists(st.integers(0, steps), min_size=3, max_size=3)))
    trained = []
    for start, stop in pairwise([0, *stops, steps]):
        trained += rows_of_workers(case, data.draw(st.integers(1, lanes)), start, stop)
    assert len(trained) == steps * case.rows_per_step
    assert len(set(trained)) == len(trained)
    num_rows = (np.maximum(case.manifest.fragments.num_tokens - 1, 0) // SEQ_LEN).tolist()
    for source, name in enumerate(order.source_names):
        whole = {(part, row) for part in case.manifest.select("train", name) for row in range(num_rows[part])}
        for epoch in (0, 1):
            found = [row[2:4] for row in trained if row[:2] == (source, epoch)]
            assert set(found) <= whole and len(set(found)) == len(found)
            assert len(whole) - len(found) == order.remainder()[name]["rows"] < lanes


def two_epochs(order: Order) -> list[int]:
    """Rows of each source that a lane takes in two epochs."""
    return [2 * epochs.lane_rows for epochs in order.epochs]


def test_epochs_without_a_remainder_train_the_same_rows():
    order = sample_order(weights={"web": 1.0, "books": 0.0}, window_steps=5)
    assert order.remainder()["web"]["rows"] == 0
    epoch_steps = 40 * 5 // 8
    first, second = (
        {row[2:4] for row in rows_between(order, epoch * epoch_steps, (epoch + 1) * epoch_steps)}
        for epoch in (0, 1)
    )
    assert first == second == {(fragment, row) for fragment in range(40) for row in range(5)}


@settings(deadline=None)
@given(cases(), st.integers(0, 300), st.integers(1, 20))
@pytest.mark.slow
def test_resuming_yields_exactly_the_rows_not_yet_seen(case, stopped_at, more):
    unbroken, resumed = case.order(), case.order()
    rows_between(unbroken, 0, min(stopped_at, 5))
    expected = rows_between(unbroken, stopped_at, stopped_at + more)
    assert rows_between(resumed, stopped_at, stopped_at + more) == expected
    assert resumed.digest == unbroken.digest


@settings(deadline=None)
@given(cases())
@pytest.mark.slow
def test_rows_lie_inside_their_fragments_and_share_one_cut_in_an_epoch(case):
    order = case.order()
    rows = Rows.join([order.step_rows(step) for step in range(20)])
    num_tokens = case.manifest.fragments.num_tokens[rows.fragment]
    assert np.all(rows.start >= 0) and np.all(rows.start + SEQ_LEN + 1 <= num_tokens)
    assert {case.manifest.shards[shard].split for shard in case.manifest.fragments.shard[rows.fragment]} == {
        "train"
    }
    cuts = {}
    for row in identities(rows):
        _, epoch, fragment, index, start = row
        assert cuts.setdefault((epoch, fragment), start - index * SEQ_LEN) == start - index * SEQ_LEN


@settings(deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_each_step_has_each_sources_share_to_within_one_row(case, step):
    order = case.order()
    named = case.config.weights or {
        name: float(epochs.rows) for name, epochs in zip(order.source_names, order.epochs, strict=True)
    }
    weights = [change.weights for change in case.config.schedule if change.step <= step][-1:] or [named]
    shares = np.array([weights[0][name] for name in order.source_names]) / sum(weights[0].values())
    taken = np.bincount(order.step_rows(step).source, minlength=len(shares))
    assert np.all(np.abs(taken - shares * case.rows_per_step) < 1 + 1e-6)


def test_time_to_plan_does_not_depend_on_the_step():
    order = sample_order()

    def seconds_at(step):
        order.step_rows(step)  # makes the epoch's index
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            order.step_rows(step)
            times.append(time.perf_counter() - begin)
        return min(times)

    # Counting up to it would take ten million times as long.
    assert seconds_at(10**8) < 10 * seconds_at(10)


def test_every_epoch_and_seed_has_an_order_of_its_own():
    first, later, other = sample_order(), sample_order(), sample_order(seed=4)
    assert identities(first.step_rows(0)) == identities(later.step_rows(0))
    assert identities(first.step_rows(0)) != identities(other.step_rows(0))
    assert first.digest != other.digest
    epoch_steps = int(1 / first.epochs_before(1)["web"])
    fragments = [first.step_rows(epoch * epoch_steps).fragment.tolist() for epoch in range(3)]
    assert len({tuple(each) for each in fragments}) == 3


def test_the_cut_moves_from_epoch_to_epoch_so_that_every_token_is_trained():
    # 15 tokens: one row of 8 and 6 spare tokens, so 7 cuts.
    order = Order(manifest_of({"web": [15] * 4}), OrderConfig(lanes=4), seq_len=SEQ_LEN, rows_per_step=4)
    starts = {(row[2], row[4]) for row in rows_between(order, 0, 100)}
    assert starts == {(fragment, cut) for fragment in range(4) for cut in range(7)}


def test_what_an_epoch_leaves_out_is_counted():
    # 9 rows and 3 spare targets, a fragment shorter than a row, 2 rows without spare: 11 rows for 4 lanes.
    order = Order(manifest_of({"web": [76, 8, 17]}), OrderConfig(lanes=4), seq_len=SEQ_LEN, rows_per_step=4)
    assert order.remainder() == {"web": {"rows": 3, "tokens": 3 * SEQ_LEN + 3 + 7, "fragments": 1}}


def test_the_bits_of_the_order_never_change():
    # A change here changes every run that was ever started.
    order = sample_order(weights={"web": 2.0, "books": 1.0}, window_steps=5)
    assert order.digest == GOLDEN_DIGEST
    assert identities(order.step_rows(123)) == GOLDEN_ROWS


def test_the_automatic_window_of_one_source_never_changes():
    order = Order(manifest_of({"web": [1_000_000] * 2_000}), OrderConfig(), seq_len=2_048, rows_per_step=512)
    assert (order.slots.window_steps, order.digest) == (128, "fe4c609171899bac")


@pytest.mark.parametrize(("num_sources", "most"), [(1, 1.55), (4, 1.55), (5, 1.65), (22, 3.75)])
def test_the_automatic_window_grows_with_the_sources_up_to_16_mib_a_lane(num_sources, most):
    manifest = bench_order.manifest_of(20_000, num_sources)
    order = Order(manifest, OrderConfig(), seq_len=2_048, rows_per_step=512)
    assert order.lanes == 64 and order.window_bytes <= 1.001 * 16 * 2**20
    assert bench_order.fetched_over_trained(order, manifest) < most


def test_sources_that_never_have_a_weight_do_not_change_the_automatic_window():
    manifest = bench_order.manifest_of(20_000, 3)

    def window_bytes(later):
        weights = {"web": 1.0, "web1": 0.0, "web2": 0.0}
        config = OrderConfig(weights=weights, schedule=(WeightChange(step=9, weights=weights | later),))
        return Order(manifest, config, seq_len=2_048, rows_per_step=512).window_bytes

    assert window_bytes({"web1": 1.0}) == pytest.approx(2 * window_bytes({}), rel=0.01)


def test_lanes_are_chosen_to_divide_the_batch_and_the_window_to_fit_an_epoch():
    order = Order(manifest_of({"web": [81] * 64}), OrderConfig(), seq_len=SEQ_LEN, rows_per_step=16)
    assert order.lanes == 16
    assert order.slots.window_steps == 64 * 10 // 16
    assert [largest_divisor(rows, 64) for rows in (1, 16, 96, 1_024, 97)] == [1, 16, 48, 64, 1]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (OrderConfig(lanes=3), ["order.lanes=3", "nearest: 9"]),
        (
            OrderConfig(lanes=4, weights={"web": 1, "bocks": 1}),
            ["order.weights.bocks", "nearest: books", "source books"],
        ),
        (OrderConfig(lanes=4, weights={"web": 1, "books": -1}), ["order.weights", "not negative"]),
        (
            OrderConfig(lanes=8, weights={"web": 1, "books": 1}),
            ["source books has 7 rows", "8 lanes", "lower order.lanes"],
        ),
        (
            OrderConfig(lanes=4, schedule=(WeightChange(step=0, weights={"web": 1}),)),
            ["order.schedule", "ascend"],
        ),
    ],
)
def test_an_order_that_cannot_be_made_names_key_value_and_remedy(config, named):
    manifest = manifest_of({"web": [41] * 40, "books": [57]})
    with pytest.raises(OrderError) as refused:
        Order(manifest, config, seq_len=SEQ_LEN, rows_per_step=8)
    for part in named:
        assert part in str(refused.value)


def test_more_workers_than_lanes_are_refused_before_the_start():
    lines = list(OrderConfig(lanes=4).batch_problems("order", rows_per_step=8, workers=5))
    assert len(lines) == 1 and "5 workers cannot share order.lanes=4" in lines[0]


GOLDEN_DIGEST = "18af0742aa74ebe0"
GOLDEN_ROWS = [
    (0, 3, 36, 1, 8),
    (0, 3, 36, 2, 16),
    (0, 3, 12, 0, 0),
    (1, 5, 57, 1, 8),
    (0, 3, 35, 1, 8),
    (1, 5, 52, 1, 8),
    (0, 3, 16, 0, 0),
    (0, 3, 39, 1, 8),
]
