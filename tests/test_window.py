import pickle

import numpy as np
import pytest

from cluster.storage.uris import open_store
from data.order.order import Order, OrderConfig
from data.rows.framing import NO_LABEL, FramingConfig, framing_of
from data.rows.window import FILLER_LANE, filler, plan_read, unpack
from data.shards.shards import ShardError, read_fragment
from tests.test_framing import PROSE, tokenizer
from tests.token_corpus import put_text_corpus, put_token_corpus

SEQ_LEN = 16


@pytest.fixture(params=["uint16", "uint32"])
def corpus(request, tmp_path):
    store = open_store(str(tmp_path))
    sizes = {("train", "web"): 30, ("validation", "web"): 3, ("train", "books"): 20}
    return store, put_token_corpus(store, sizes, fragment_tokens=100, token_dtype=request.param)


def order_of(manifest):
    config = OrderConfig(lanes=4, window_steps=5, weights={"web": 2.0, "books": 1.0})
    return Order(manifest, config, seq_len=SEQ_LEN, rows_per_step=12)


def test_a_block_holds_the_tokens_that_the_order_names(corpus):
    store, manifest = corpus
    order = order_of(manifest)
    for lane in range(order.lanes):
        [window] = order.windows([2], [lane], start=11, stop=14)
        read = pickle.loads(pickle.dumps(plan_read(order, manifest, store.uri, window)))
        block = unpack(read.read(), SEQ_LEN + 1, manifest.token_dtype)
        assert block.lane == lane
        assert block.steps.tolist() == [11] * 3 + [12] * 3 + [13] * 3
        for step in (11, 12, 13):
            here = np.flatnonzero(block.steps == step)
            expected = order.step_rows(step, [lane])
            for place, number in enumerate(here):
                whole = read_fragment(store, manifest, int(expected.fragment[place]))
                start = int(expected.start[place])
                assert np.array_equal(block.tokens[number], whole[start : start + SEQ_LEN + 1])
                assert [column[number] for column in block.rows.columns()] == [
                    column[place] for column in expected.columns()
                ]


def test_a_slice_of_a_block_is_taken_apart_as_well(corpus):
    store, manifest = corpus
    order = order_of(manifest)
    table = plan_read(order, manifest, store.uri, order.windows([0], [1])[0]).read()
    whole = unpack(table, SEQ_LEN + 1, manifest.token_dtype)
    part = unpack(table.slice(4, 3), SEQ_LEN + 1, manifest.token_dtype)
    assert np.array_equal(part.tokens, whole.tokens[4:7])


def test_a_task_is_sent_no_more_of_the_manifest_than_it_reads(corpus):
    store, manifest = corpus
    order = order_of(manifest)
    read = plan_read(order, manifest, store.uri, order.windows([0], [0])[0])
    assert set(read.fragments) == set(order.windows([0], [0])[0].rows().fragment)
    assert len(read.part.fragments) == len(read.fragments)
    assert read.part.digest == manifest.digest
    assert len(pickle.dumps(read)) < 16_384


def test_a_flipped_byte_in_a_token_shard_is_refused_by_shard_and_fragment(corpus):
    store, manifest = corpus
    order = order_of(manifest)
    path = manifest.shards[0].path
    content = bytearray(store.read(path))
    content[200] ^= 1
    store.put(path, bytes(content))
    # The first epoch of the source reads the damaged fragment in one of its windows.
    reads = [
        plan_read(order, manifest, store.uri, window)
        for lane in range(order.lanes)
        for window in order.windows(range(12), [lane] * 12)
    ]
    with pytest.raises(ShardError) as refused:
        for read in reads:
            read.read()
    assert (
        path in str(refused.value)
        and "fragment 0" in str(refused.value)
        and manifest.digest in str(refused.value)
    )


def test_a_filler_has_the_same_columns_and_no_tokens(corpus):
    store, manifest = corpus
    order = order_of(manifest)
    table = filler(3, 5, order.rows_per_lane)
    assert table.schema == plan_read(order, manifest, store.uri, order.windows([0], [0])[0]).read().schema
    block = unpack(table, SEQ_LEN + 1, manifest.token_dtype)
    assert block.lane == FILLER_LANE and block.steps.tolist() == [3] * 3 + [4] * 3
    assert block.tokens.shape == (6, SEQ_LEN + 1) and not block.tokens.any()
    assert table.get_total_buffer_size() < 1_000


@pytest.mark.parametrize("kind", ["single", "next_sentence", "sentence_order"])
def test_framed_rows_are_those_of_the_order_wherever_a_run_goes_on(kind, tmp_path):
    """Laws L1 and L3: pairs follow from manifest, seed, epoch and row, not from who reads which part of a window."""
    store = open_store(str(tmp_path))
    manifest = put_text_corpus(store, {"train": PROSE}, tokenizer(), fragment_tokens=2_000)
    order = Order(manifest, OrderConfig(lanes=4, window_steps=5), seq_len=SEQ_LEN, rows_per_step=12)
    framing = FramingConfig(kind, seed=3)
    maker = framing_of(framing, store.uri, manifest, SEQ_LEN)
    labels = set()
    for lane, window in ((0, 0), (3, 2)):
        [whole], [rest] = (
            order.windows([window], [lane], start=start) for start in (5 * window, 5 * window + 3)
        )
        blocks = [
            unpack(
                pickle.loads(pickle.dumps(plan_read(order, manifest, store.uri, each, framing))).read(),
                SEQ_LEN,
                manifest.token_dtype,
            )
            for each in (whole, rest)
        ]
        assert np.array_equal(blocks[0].tokens[9:], blocks[1].tokens)
        assert np.array_equal(blocks[0].labels[9:], blocks[1].labels)
        for number in range(15):
            row = blocks[0].rows[np.array([number])]
            tokens = read_fragment(store, manifest, int(row.fragment[0]))
            expected, label = maker.frame(tokens, row)
            assert (
                np.array_equal(blocks[0].tokens[number], expected[0]) and blocks[0].labels[number] == label[0]
            )
        labels |= set(blocks[0].labels.tolist())
    assert (labels == {NO_LABEL}) == (kind == "single")
