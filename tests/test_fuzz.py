"""Whatever a stored file has come to, its reader gives the content, one line that names the file, or does it anew."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import damaged
from stored_kinds import FOLDERS, KINDS, Kind

from cluster.console.errors import UserError
from cluster.storage.uris import StorageError
from trainers.reporting.charts import draw_charts

CASES = int(os.environ.get("FUZZ_CASES", "80"))
"""Of each kind, times its weight; some thousands in all."""
QUICK_CASES = 2
SECONDS, MEMORY_BYTES = 5.0, 600 << 20
"""Of all cores that one reading may take at most, and all readings of a kind may add to the process."""
NAMED = (UserError, StorageError)


class Damaged:
    """Folders made once, in which one file at a time is damaged, and everything is put back after each reading."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._contents: dict[str, dict[Path, bytes]] = {}

    def folder(self, name: str) -> Path:
        folder = self._root / name
        if name not in self._contents:
            folder.mkdir()
            FOLDERS[name](folder)
            self._contents[name] = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return folder

    def restore(self, name: str) -> None:
        contents = self._contents[name]
        there = {path for path in (self._root / name).rglob("*") if path.is_file()}
        for path in there - contents.keys():
            path.unlink()
        for path, content in contents.items():
            if path not in there or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.reading.raw_shards.PIECE_BYTES", 1)
        patch.setattr("cluster.storage.local._sync", lambda path: None)  # no power cut is waited for here
        patch.setattr("trainers.reporting.page.draw_charts", drawn_once())
        yield Damaged(tmp_path_factory.mktemp("stored"))


def drawn_once() -> Callable[..., Any]:
    """The charts of a page, which take 0.2 s, from memory where the same were drawn before."""
    drawn: dict[str, Any] = {}

    def draw(*data: Any) -> Any:
        if (key := repr(data)) not in drawn:
            drawn.clear()
            drawn[key] = draw_charts(*data)
        return drawn[key]

    return draw


def outcome(read: Callable[[Path], object], folder: Path, path: Path) -> str | None:
    """What is wrong with how a reader took a damaged file; None if nothing is."""
    started = time.process_time()
    try:
        read(folder)
    except NAMED as error:
        lines = getattr(error, "problems", None) or [str(error)]
        if any("\n" in line for line in lines):
            return f"more than a line: {error}"
        if not any(name in str(error) for name in (path.name, path.parent.name)):
            return f"names no file: {type(error).__name__}: {error}"
    except Exception as error:
        # Readers of exported models have no error of their own: what they say begins with the folder.
        if type(error) not in (ValueError, FileNotFoundError) or str(path.parent) not in str(error):
            return f"{type(error).__name__}: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    return f"it took {seconds:.1f} s" if seconds > SECONDS else None


def faults(folders: Damaged, kind: Kind, number: float) -> list[str]:
    folder = folders.folder(kind.folder)
    path = sorted(folder.glob(kind.path))[0]
    content, found = path.read_bytes(), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case, changed in damaged(content, max(1, round(number * kind.weight)), kind.name):
        path.write_bytes(changed)
        try:
            if fault := outcome(kind.read, folder, path):
                found.append(f"{case}: {' '.join(fault.split())[:300]}")
        finally:
            folders.restore(kind.folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return [*found, f"the process grew by {grown >> 20} MiB"] if grown > MEMORY_BYTES else found


def test_no_kind_of_file_ends_a_reader_otherwise(folders):
    """A few cases of each, where nobody waits for more."""
    found = [fault for kind in KINDS for fault in faults(folders, kind, QUICK_CASES / kind.weight)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
def test_a_damaged_file_is_read_refused_in_one_line_or_made_anew(folders, kind):
    folder = folders.folder(kind.folder)
    kind.read(folder)  # as it was written
    folders.restore(kind.folder)
    found = faults(folders, kind, CASES)
    assert not found, f"{len(found)} of {CASES}:\n" + "\n".join(found[:20])
