"""Numbers as people read them, the same in plan, progress, tables and report."""

from collections.abc import Mapping, Sequence
from typing import Any


def count(number: float) -> str:
    """1234567 as "1.23 M"; whole numbers below 10,000 in full."""
    if abs(number) < 10_000 and float(number).is_integer():
        return f"{number:,.0f}"
    return _scaled(number, 1000, ("", "k", "M", "B", "T"))


def size(num_bytes: float) -> str:
    """Bytes as "1.50 GiB"."""
    return _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def flop(number: float) -> str:
    """Floating-point operations as "87.2 MFLOP"."""
    return _scaled(number, 1000, ("FLOP", *(f"{prefix}FLOP" for prefix in "kMGTPEZY")))


def duration(seconds: float) -> str:
    """Seconds as "0.25 s", "12 s", "3 min 20 s", "2 h 05 min" or "4 d 03 h"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def energy(kwh: float) -> str:
    """Energy as "0.42 Wh", "3.10 kWh" or "1.20 MWh"."""
    return _scaled(kwh * 1000, 1000, ("Wh", "kWh", "MWh", "GWh"))


def mass(grams: float) -> str:
    """Mass as "0.19 g", "1.40 kg" or "2.30 t"."""
    return _scaled(grams, 1000, ("g", "kg", "t", "kt"))


def _scaled(number: float, factor: int, units: Sequence[str]) -> str:
    """The number in the largest unit that leaves at least 1 of it, with three digits."""
    position = 0
    while abs(number) >= factor - 0.5 and position + 1 < len(units):
        number, position = number / factor, position + 1
    decimals = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:,.{decimals}f} {units[position]}".rstrip()


def n_gram(floor: Mapping[str, Any] | None) -> str:
    """The name of the model that a `floor.json` tells of, as "7-gram"."""
    return f"{floor['order']}-gram" if floor else "n-gram"
