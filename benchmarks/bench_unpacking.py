"""How far honest text packs: the ratios that the bounds of data/reading/unpacking.py are chosen by.

python benchmarks/bench_unpacking.py
"""

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.reading.unpacking import RATIO

LINES = 400_000
"""Some 40 MB of each kind: a longer file packs no better, for the windows of both are shorter."""
PATHS = ["/", "/index.html", "/health", "/api/v1/items", "/static/app.js", "/login"]


def time_of(number: int) -> str:
    return f"{number // 3_600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}"


def web_server(number: int) -> str:
    """Addresses, paths and sizes differ."""
    address = f"10.0.{random.randrange(4)}.{random.randrange(200)}"
    asked = f'"GET {random.choice(PATHS)} HTTP/1.1" 200 {random.randrange(200, 9_000)}'
    return (
        f'{address} - - [12/Nov/2026:{time_of(number)} +0000] {asked} "-" "Mozilla/5.0 (X11; Linux x86_64)"'
    )


def probe(number: int) -> str:
    """The time alone differs."""
    return f"2026-11-12T{time_of(number)}Z INFO kubelet probe ok pod=web-7d9f path=/healthz status=200"


def templates(number: int) -> str:
    """One of 50 lines, at random."""
    return f"line {random.randrange(50)} of a template that is printed again and again"


def one_line(number: int) -> str:
    return "the quick brown fox jumps over the lazy dog, again and again and again"


KINDS: list[Callable[[int], str]] = [web_server, templates, probe, one_line]


def main() -> None:
    random.seed(2)
    for kind in KINDS:
        text = "".join(json.dumps({"text": kind(number)}) + "\n" for number in range(LINES)).encode()
        packed = {"gzip 9": len(gzip.compress(text, 9))}
        for level in (3, 19):
            codec = pa.Codec("zstd", compression_level=level)
            packed[f"zstd {level}"] = len(codec.compress(text, asbytes=True))
        ratios = ", ".join(f"{name} {len(text) / size:,.0f}" for name, size in packed.items())
        print(f"{kind.__name__}: {len(text) / 1e6:.0f} MB, packed by {ratios}", flush=True)
    print(f"the bound is {RATIO:,}")


if __name__ == "__main__":
    main()
