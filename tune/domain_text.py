"""The training texts of a task, and others like them, as a raw corpus for pretraining on the domain.

What validates and tests stays out, and that of other tasks for which the same backbone is meant.

    python tune/domain_text.py --task trainers/tasks/topics.yaml --unlabelled corpora/tasks/topics-unlabelled \
      --keep-out trainers/tasks/movies.yaml --output corpora/topics-text
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.configuration.config import run_entry
from cluster.storage.uris import open_store
from data.curation.overlap import Runs
from data.reading.documents import raw_texts
from trainers.tasks.records import Example
from trainers.tasks.splits import PreparedTask, prepare_task
from trainers.tasks.task import load_task

TEXTS_PER_DOCUMENT = 32
"""Short texts fill a row together; a boundary between each two would be a tenth of the tokens."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus of a task from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, metavar="FILE", help="task file")
    parser.add_argument(
        "--keep-out", action="append", default=[], metavar="FILE",
        help="task file whose validation and test texts stay out too; may be given several times",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the raw corpus")
    parser.add_argument(
        "--prepared", default="corpora/tasks/prepared", metavar="URI", help="folder of split tasks"
    )
    parser.add_argument(
        "--unlabelled", action="append", default=[], metavar="URI",
        help="raw corpus (JSONL, Parquet, text) to be taken in too; may be given several times",
    )  # fmt: skip
    options = parser.parse_args(argv)
    prepared, *others = [
        prepare_task(load_task(file), open_store(options.prepared))
        for file in (options.task, *options.keep_out)
    ]
    unlabelled = [text for uri in options.unlabelled for text in raw_texts(uri)]
    texts = [example.content for example in prepared.read("train")] + unlabelled
    random.Random(0).shuffle(texts)
    judging = [
        example.content
        for task in (prepared, *others)
        for split in ("validation", "test")
        for example in read_split(task, split)
    ]
    # Texts that are no near-duplicates may still share a long quotation, and two in a row may make one.
    runs = Runs(judging)
    kept = [text for text in texts if not runs.found_in(text)]
    joined = ["\n".join(kept[i : i + TEXTS_PER_DOCUMENT]) for i in range(0, len(kept), TEXTS_PER_DOCUMENT)]
    documents = [document for document in joined if not runs.found_in(document)]
    name = prepared.task.name
    lines = [
        json.dumps({"id": f"{name}/{n}", "text": text}, ensure_ascii=False, allow_nan=False)
        for n, text in enumerate(documents)
    ]
    open_store(options.output).put(f"{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    print(
        f"put {len(documents):,} documents of {TEXTS_PER_DOCUMENT} texts into {options.output}; left out "
        f"{len(texts) - len(kept):,} of {len(texts) - len(unlabelled):,} training texts and {len(unlabelled):,} "
        f"others, which share a run of characters with a validation or test text, and "
        f"{len(joined) - len(documents):,} documents in which two texts together do"
    )


def read_split(prepared: PreparedTask, split: str) -> list[Example]:
    """Validation or test; of the test split the texts are compared, its labels are not looked at."""
    return prepared.read_test() if split == "test" else prepared.read(split)


if __name__ == "__main__":
    run_entry(main)
