import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order.permutation import below, combine, key_of, mix64, permute

keys = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 3_000), key=keys)
def test_every_place_is_taken_once(size, key):
    places = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(places), np.arange(size))


@given(size=st.integers(1, 2**62), key=keys, data=st.data())
def test_places_of_huge_permutations_lie_in_range_and_differ(size, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    places = permute(index, size, key)
    assert places.min() >= 0 and places.max() < size
    assert len(np.unique(places)) == len(index)


@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=20), data=st.data())
def test_many_permutations_at_once_equal_each_alone(sizes, data):
    index = [data.draw(st.integers(0, size - 1)) for size in sizes]
    each_key = [data.draw(keys) for _ in sizes]
    together = permute(index, sizes, np.array(each_key, np.uint64))
    alone = [int(permute(i, size, key)) for i, size, key in zip(index, sizes, each_key, strict=True)]
    assert together.tolist() == alone


def test_the_bits_never_change():
    # A change here changes the order of every run that was ever started.
    assert permute(np.arange(10), 10, 0).tolist() == GOLDEN_SMALL
    assert permute([0, 1, 10**6, 10**12 - 1], 10**12, 2**64 - 1).tolist() == GOLDEN_LARGE
    assert [hex(hashed) for hashed in mix64([0, 1, 2**64 - 1])] == GOLDEN_MIX
    assert hex(key_of("order", 1, "web")) == GOLDEN_KEY
    assert combine(7, [0, 1], 3).tolist() == GOLDEN_COMBINED
    assert below(mix64(np.arange(5)), 100).tolist() == GOLDEN_BELOW


def test_keys_tell_names_from_numbers_and_order():
    assert len({key_of("a", 1), key_of("a", "1"), key_of(1, "a"), key_of("a1"), key_of("a", 1, "")}) == 5


@pytest.mark.parametrize("size", [7, 100, 1_024, 4_097])
def test_each_place_is_equally_likely(size):
    # Chi-square over the place of one element under many keys: mean size - 1, deviation sqrt(2 (size - 1)).
    num_keys = 50 * size
    places = permute(3, size, combine(5, np.arange(num_keys)))
    expected = num_keys / size
    chi_square = ((np.bincount(places, minlength=size) - expected) ** 2 / expected).sum()
    assert abs(chi_square - (size - 1)) < 5 * np.sqrt(2 * (size - 1))


def test_neighbours_do_not_stay_together():
    size = 1_000
    places = permute(np.arange(size), size, combine(9, np.arange(200))[:, None])
    still_adjacent = (np.abs(np.diff(places, axis=1)) == 1).mean()
    assert still_adjacent == pytest.approx(2 / size, rel=0.2)


# As the docstring of data/order/permutation.py states it.
SUCCESSORS_MORE_OFTEN = {10: 0.050, 30: 0.078, 100: 0.079, 300: 0.041, 1_000: 0.028, 10_000: 0.005}


@pytest.mark.parametrize(("size", "stated"), SUCCESSORS_MORE_OFTEN.items())
def test_successors_stay_together_as_much_more_often_than_by_chance_as_is_stated(size, stated):
    num_keys = 4_000_000 // size
    rounds = np.array_split(combine(23, np.arange(num_keys)), 10)
    together = np.concatenate(
        [(np.diff(permute(np.arange(size), size, keys[:, None]), axis=1) == 1).sum(axis=1) for keys in rounds]
    )
    by_chance = (size - 1) / size
    error = together.std() / np.sqrt(num_keys) / by_chance
    assert abs(together.mean() / by_chance - 1 - stated) < 4 * error


def test_a_chi_square_test_tells_small_permutations_from_those_of_numpy():
    # How many permutations of 100 elements keep 0, 1, 2, 3, or more successors together.
    size, num_keys = 100, 10_000
    keyed = permute(np.arange(size), size, combine(29, np.arange(num_keys))[:, None])
    drawn = np.random.default_rng(3).permuted(np.tile(np.arange(size), (2 * num_keys, 1)), axis=1)

    def chi_square(*samples):
        kept = [np.minimum((np.diff(places, axis=1) == 1).sum(axis=1), 4) for places in samples]
        table = np.array([np.bincount(each, minlength=5) for each in kept])
        return ((table - table.mean(axis=0)) ** 2 / table.mean(axis=0)).sum()

    quantile = 18.47  # 0.999 of 4 degrees of freedom
    assert chi_square(drawn[:num_keys], drawn[num_keys:]) < quantile < chi_square(keyed, drawn[:num_keys])


def test_an_index_outside_is_refused():
    with pytest.raises(ValueError, match=r"outside 0\.\.size-1"):
        permute([0, 5], 5, 1)


GOLDEN_SMALL = [3, 0, 6, 2, 4, 7, 1, 5, 9, 8]
GOLDEN_LARGE = [920645988203, 684258472311, 560222852567, 793980642649]
GOLDEN_MIX = ["0xe220a8397b1dcdaf", "0x910a2dec89025cc1", "0xe4d971771b652c20"]
GOLDEN_KEY = "0xac8e6669696b2762"
GOLDEN_COMBINED = [12598606738523040523, 13844045289347622896]
GOLDEN_BELOW = [65, 36, 39, 73, 62]
