"""How many texts are found in a corpus that does not hold them, and how many in one that does, rewritten.

python data/sample_tasks.py --output corpora/task-texts movies topics poems
python data/sample.py --output corpora/shakespeare
python benchmarks/overlap_rates.py --texts corpora/task-texts --corpus corpora/shakespeare
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.curation.folding import folded
from data.curation.overlap import RUN, Runs
from data.reading.documents import raw_texts

_WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
REWRITTEN: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "upper case": str.upper,
    "full width": lambda text: text.translate(_WIDE),
    "soft hyphens": "\u00ad".join,
    "zero-width blanks": "\u200b".join,
    "variation selectors": "\ufe0f".join,
    "dashes for blanks": lambda text: text.replace(" ", "—"),
    "commas after words": lambda text: text.replace(" ", ", "),
    "without punctuation": lambda text: "".join(c for c in text if c.isalnum() or c.isspace()),
    "other line ends": lambda text: "\r\n".join(text.split()),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", required=True, metavar="URI", help="folder of texts as raw shards")
    parser.add_argument(
        "--corpus", required=True, metavar="URI", help="folder of text that holds none of them"
    )
    parser.add_argument("--number", type=int, default=6_000, help="texts that are drawn")
    options = parser.parse_args(argv)
    texts = list(raw_texts(options.texts))
    random.Random(0).shuffle(texts)
    texts = texts[: options.number]
    long = {index for index, text in enumerate(texts) if len(folded(text)) >= RUN}
    runs, found, characters = Runs(texts), set[int](), 0
    start = time.process_time()
    for document in raw_texts(options.corpus):
        characters += len(document)
        found |= runs.found_in(document)
    seconds = time.process_time() - start
    print(f"{len(texts):,} texts, {len(long):,} of {RUN} characters or more, in {characters:,} characters:")
    print(
        f"{len(found & long):,} of the long and {len(found - long):,} others are found, {seconds:.0f} s of CPU"
    )
    print("the longest:", sorted((texts[index] for index in found), key=len)[-8:])
    for name, rewrite in REWRITTEN.items():
        again = sum(index in runs.found_in(f"It says: {rewrite(texts[index])} And so on.") for index in long)
        print(f"{name}: {again:,} of the {len(long):,} long texts are found again")


if __name__ == "__main__":
    main()
