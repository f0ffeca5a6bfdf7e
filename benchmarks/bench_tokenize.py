"""Tokenizing: the second half of the work on a corpus, and both halves, against the bare tokenizer, on one core.

    python benchmarks/bench_tokenize.py [--raw FOLDER] [--vocab-size 4096] [--megabytes 3] [--repeats 9]

Ours reads compressed JSONL, checks and normalises it, encodes it, and writes token shards to the disk. The first
half, the survey, reads and normalises all of it too, and writes hashes.
The bare rate is `encode_batch_fast` of the same texts, in memory already, in batches of the same size. Both
take one thread and turns of a second or two; seconds are the process's CPU time, and the ratio is the median
over the turns, so that other work on the machine does not decide. Without --raw the text is Python's own
reference documentation, several times over, each time with other numbers.
"""

import argparse
import gzip
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Tokenizer

from cluster.storage.uris import open_store
from data.curation.exact_duplicates import HashFile
from data.preparing.pieces import (
    BATCH_CHARACTERS,
    HashRange,
    Piece,
    TokenWork,
    deduplicate,
    hashes_path,
    record_path,
    survey,
    tokenize,
)
from data.reading.documents import Document, read_documents
from data.reading.raw_shards import CorpusConfig, list_raw_shards
from data.tokens.tokenizer import TokenizerConfig, train_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", help="folder or URI of raw shards, as data/sample.py writes")
    parser.add_argument("--vocab-size", type=int, default=4_096)
    parser.add_argument("--megabytes", type=int, default=3, help="of text, at most: turns of a second")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = options.megabytes * 10**6
        texts = read_texts(options.raw) if options.raw else documentation(num_bytes)
        measure(texts, Path(folder), options.vocab_size, num_bytes, options.repeats)


def measure(texts: list[str], folder: Path, vocab_size: int, num_bytes: int, repeats: int) -> None:
    """Print the rates in MB of text per CPU second, and their ratios."""
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=vocab_size))
    sizes = itertools.accumulate(len(text.encode()) for text in texts)
    texts = [text for text, size in zip(texts, sizes, strict=True) if size <= num_bytes]
    lines = "".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts))
    open_store(f"{folder}/raw").put("a.jsonl.gz", gzip.compress(lines.encode()))
    given = folder / "tokenizer.json"
    given.write_text(tokenizer.json)
    config = CorpusConfig(
        uri=f"{folder}/raw", prepared=f"{folder}/prepared", tokenizer=TokenizerConfig(path=str(given))
    )
    prepared = open_store(config.prepared)
    prepared.put(tokenizer.path, tokenizer.json.encode())
    piece = Piece(tuple(list_raw_shards(config)))
    survey(piece, config)
    name = piece.survey_digest(config)
    hashes = HashRange("bench", (HashFile(hashes_path(name), 0),), 0, 1)
    deduplicate(hashes, config)
    pinned = json.loads(prepared.read(record_path("survey", name)))["pinned"]
    work = TokenWork("bench", piece, 0, (hashes.path,), pinned, tokenizer.fingerprint, 65_536)
    bare = Tokenizer.from_str(tokenizer.json)
    batches = in_batches(texts)
    rates: dict[str, list[float]] = {"bare": [], "tokenize": [], "survey and tokenize": []}
    for _ in range(repeats):
        elapsed = {"bare": seconds(lambda: encode(bare, batches))}
        elapsed["tokenize"] = seconds(lambda: tokenize(work, config))
        elapsed["survey and tokenize"] = elapsed["tokenize"] + seconds(lambda: survey(piece, config))
        for side, taken in elapsed.items():
            rates[side].append(total_bytes(texts) / taken / 1e6)
    plain = max(rates["bare"])
    for side in ("tokenize", "survey and tokenize"):
        ratio = median(ours / bare for ours, bare in zip(rates[side], rates["bare"], strict=True))
        print(
            f"{side}: ours {max(rates[side]):.2f}, bare {plain:.2f} MB per CPU second at best; "
            f"median ratio {ratio:.3f}"
        )


def documentation(num_bytes: int) -> list[str]:
    """At least so much text, no two alike: duplicates would be left out."""
    once = [text for _, text in sorted(topics.items())]
    return [f"{number}\n{text}" for number in range(num_bytes // total_bytes(once) + 1) for text in once]


def read_texts(raw: str) -> list[str]:
    config = CorpusConfig(uri=raw)
    store = open_store(raw)
    records = [each for shard in list_raw_shards(config) for each in read_documents(store, shard, config)]
    return [record.text for record in records if isinstance(record, Document)]


def total_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def in_batches(texts: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    characters = 0
    for text in texts:
        if characters >= BATCH_CHARACTERS:
            batches.append([])
            characters = 0
        batches[-1].append(text)
        characters += len(text)
    return batches


def encode(tokenizer: Tokenizer, batches: Sequence[list[str]]) -> None:
    for batch in batches:
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)


def seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


if __name__ == "__main__":
    main()
