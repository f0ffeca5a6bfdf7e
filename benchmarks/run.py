"""Run every benchmark, one after the other, each in a process of its own: what `make bench` prints.

    python benchmarks/run.py [--only order stream]

Timings mean something on a machine that does nothing else; the first lines say what it is.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.hardware.machine import peak_of, this_host

FOLDER = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> None:
    names = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="benchmarks to run")
    chosen = parser.parse_args(argv).only
    host = this_host()
    rate = peak_of("cpu", host.device_name, "bf16", 1).flops_per_second / 1e9
    print(f"{host.cores} cores, {host.memory_bytes / 2**30:.0f} GiB, {rate:,.0f} GFLOP/s in bf16 on one core")
    failed = []
    for name in chosen:
        print(f"\n## {name}\n", flush=True)
        if subprocess.run([sys.executable, str(FOLDER / f"bench_{name}.py")]).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
