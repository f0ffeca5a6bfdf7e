import numpy as np
import pytest

from cluster.storage.uris import open_store
from data.rows.evaluation_rows import evaluation_batches
from data.rows.framing import FramingConfig, framing_of
from data.shards.shards import read_fragment
from tests.test_framing import PROSE, tokenizer
from tests.token_corpus import put_text_corpus, put_token_corpus

SEQ_LEN = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("corpus")))
    sizes = {("train", "web"): 5, ("validation", "web"): 6, ("validation", "books"): 3}
    return store, put_token_corpus(store, sizes, fragment_tokens=100)


def batches(corpus, *, rank=0, world_size=1, rows_per_batch=4, max_rows=0):
    store, manifest = corpus
    return list(
        evaluation_batches(
            manifest,
            store,
            "validation",
            seq_len=SEQ_LEN,
            rows_per_batch=rows_per_batch,
            rank=rank,
            world_size=world_size,
            max_rows=max_rows,
        )
    )


def pairs(found):
    """Every (token, target) that counts, in order."""
    taken = [
        (batch.tokens[:, :-1][batch.weights > 0], batch.tokens[:, 1:][batch.weights > 0]) for batch in found
    ]
    return [pair for before, after in taken for pair in zip(before.tolist(), after.tolist(), strict=True)]


def test_every_target_of_the_split_counts_exactly_once(corpus):
    store, manifest = corpus
    expected = []
    for fragment in manifest.select("validation"):
        tokens = read_fragment(store, manifest, int(fragment)).tolist()
        expected += zip(tokens[:-1], tokens[1:], strict=True)
    assert sorted(pairs(batches(corpus))) == sorted(expected)


def test_the_bytes_of_a_whole_split_are_the_manifests(corpus):
    _, manifest = corpus
    counted = sum(batch.num_bytes for batch in batches(corpus))
    assert counted == pytest.approx(int(manifest.fragments.num_bytes[manifest.select("validation")].sum()))


@pytest.mark.parametrize("max_rows", [0, 10, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_workers_share_the_same_set_in_equally_many_batches(corpus, world_size, max_rows):
    whole = batches(corpus, rows_per_batch=1, max_rows=max_rows)
    shares = [
        batches(corpus, rank=rank, world_size=world_size, max_rows=max_rows) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert [pair for share in shares for pair in pairs(share)] == pairs(whole)
    total = sum(batch.num_bytes for share in shares for batch in share)
    assert total == pytest.approx(sum(batch.num_bytes for batch in whole))


def test_a_limit_takes_the_first_rows_of_a_set_that_stays_the_same(corpus):
    some, all_rows = batches(corpus, max_rows=10, rows_per_batch=1), batches(corpus, rows_per_batch=1)
    assert len(some) == 10
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(some, all_rows[:10], strict=True))


def test_an_empty_split_is_refused_by_name(corpus):
    store, manifest = corpus
    with pytest.raises(ValueError, match="test split"):
        next(evaluation_batches(manifest, store, "test", seq_len=8, rows_per_batch=1, rank=0, world_size=1))


def test_framed_rows_are_the_same_set_however_many_workers_share_it(tmp_path):
    store = open_store(str(tmp_path))
    manifest = put_text_corpus(store, {"validation": PROSE[:80]}, tokenizer(), fragment_tokens=2_000)
    framing = framing_of(FramingConfig("next_sentence", 0), store.uri, manifest, 32)

    def rows(world_size):
        found = set()
        for rank in range(world_size):
            for batch in evaluation_batches(
                manifest, store, "validation", seq_len=32, rows_per_batch=4, rank=rank, world_size=world_size,
                framing=framing,
            ):  # fmt: skip
                assert batch.tokens.shape == (4, 32) and set(np.unique(batch.weights)) <= {0, 1}
                real = batch.weights.max(axis=1) > 0
                assert (batch.rows.fragment[real] >= 0).all() and (batch.rows.fragment[~real] == -1).all()
                identity = np.stack(batch.rows.columns(), axis=1)[real].tolist()
                triples = zip(identity, batch.labels[real].tolist(), batch.tokens[real].tolist(), strict=True)
                found |= {(tuple(row), label, tuple(tokens)) for row, label, tokens in triples}
        return found

    alone = rows(1)
    assert alone == rows(3) and {0, 1} <= {label for _, label, _ in alone}
