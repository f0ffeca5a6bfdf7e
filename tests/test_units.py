import pytest

from trainers.reporting.units import count, duration, energy, flop, mass, size


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (count, 0, "0"),
        (count, 512, "512"),
        (count, 9_999, "9,999"),
        (count, 10_000, "10.0 k"),
        (count, 6_919.6, "6.92 k"),
        (count, 999_999, "1.00 M"),
        (count, 1_234_567, "1.23 M"),
        (count, -2_500_000, "-2.50 M"),
        (count, 3.2e15, "3,200 T"),
        (size, 512, "512 B"),
        (size, 1023, "1,023 B"),
        (size, 1024, "1.00 KiB"),
        (size, 1.5 * 2**30, "1.50 GiB"),
        (flop, 87.2e6, "87.2 MFLOP"),
        (flop, 3.15e23, "315 ZFLOP"),
        (duration, 0.25, "0.25 s"),
        (duration, 9.96, "10 s"),
        (duration, 59.7, "1 min 00 s"),
        (duration, 200, "3 min 20 s"),
        (duration, 3_599.6, "1 h 00 min"),
        (duration, 7_500, "2 h 05 min"),
        (duration, 4 * 86_400 + 3 * 3_600, "4 d 03 h"),
        (energy, 0.00042, "0.42 Wh"),
        (energy, 3.1, "3.10 kWh"),
        (mass, 1_400, "1.40 kg"),
    ],
)
def test_a_number_is_written_in_its_unit(function, value, text):
    assert function(value) == text
