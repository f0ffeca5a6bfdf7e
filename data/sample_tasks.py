"""Labelled sample tasks as JSONL: sentiment of movie sentences, topics of WordNet glosses, forms of Chinese verse.

Beside each task `TASK-unlabelled/` holds text of its kind without labels, to pretrain on (tune/domain_text.py).
They come out of packages pinned by version and hash, which are read as archives and never imported:
vaderSentiment 2.5 (source archive from PyPI, MIT; sentences of movie reviews with a mean human valence),
wordnet-base 1:3.0-37 (Debian), chinese-poetry 2.0.1 (npm, MIT, 85 MB).

    python data/sample_tasks.py --output corpora/tasks movies topics poems
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
from data.samples.tasks import TASKS, as_lines, checked


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", required=True, metavar="URI", help="folder or s3://bucket/prefix for the files"
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: movies)")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.tasks) - set(TASKS)):
        parser.error(f"{unknown[0]} is none of {', '.join(TASKS)}")
    store = open_store(options.output)
    for name in options.tasks or ["movies"]:
        records_path, text_path = f"{name}.jsonl", f"{name}-unlabelled/{name}.jsonl"
        if store.exists(records_path) and store.exists(text_path):
            print(f"{name}: is in {store.uri}")
            continue
        fetch, digest, read = TASKS[name]
        with scratch_folder() as folder:
            archive = checked(fetch(folder), digest)
            task = read(archive)
        store.put(text_path, as_lines(task.unlabelled))
        store.put(records_path, as_lines(task.labelled))
        print(
            f"{name}: put {len(task.labelled):,} records and {len(task.unlabelled):,} texts without labels into "
            f"{store.uri}"
        )


# --- fetching ---


# --- reading ---


if __name__ == "__main__":
    run_entry(main, ValueError, subprocess.CalledProcessError)  # other packages than the pinned ones
