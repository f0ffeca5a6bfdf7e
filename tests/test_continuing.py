"""A finished model trains on with newer text: it starts where it was, learns the new and keeps the old."""

import json
from pydoc_data.topics import topics

import pytest

from cluster.storage.uris import open_store
from tests.small_run import SmallRun, steps_by_number
from trainers import compare

# Text of another kind, that a model of the topics does not know.
NEW = {
    f"verse/{number}": f"{number} bottles of beer on the wall, {number} bottles of beer! " * 12
    for number in range(300)
}


def put(store, documents: dict[str, str]) -> None:
    lines = [json.dumps({"id": name, "text": text}) for name, text in sorted(documents.items())]
    store.put("part-0.jsonl", "\n".join(lines).encode())


@pytest.mark.cluster
def test_training_on_starts_from_the_folder_and_learns_new_text(tmp_path, capsys):
    root = str(tmp_path / "root")
    put(open_store(f"{root}/old"), dict(topics))
    put(open_store(f"{root}/new"), NEW)
    first = SmallRun(root, tmp_path / "first.log")
    old = {"corpus__uri": f"{root}/old", "run__steps": 60}
    assert first.finish(first.start(run__name="first", **old)) == 0, first.output()
    export = f"{root}/runs/first/export"

    second = SmallRun(root, tmp_path / "second.log")
    both = {
        "run__name": "second",
        "run__steps": 40,
        "run__init_from": export,
        "corpus__uri": "",
        "corpus__sources__old": f"{root}/old",
        "corpus__sources__new": f"{root}/new",
        "order__weights__old": 1,
        "order__weights__new": 1,
    }
    assert second.finish(second.start(**both)) == 0, second.output()

    before, after = (steps_by_number(open_store(f"{root}/runs/{name}")) for name in ("first", "second"))
    assert after[1]["lr"] < after[4]["lr"], "the schedule warms up again"
    assert before[1]["loss"] > 6, "random weights: about ln 512"
    assert after[1]["loss"] < before[1]["loss"] - 0.5, "not random weights"
    compare.main(
        ["--model", f"before={export}", "--model", f"after={root}/runs/second/export"]
        + ["--corpus", f"{root}/prepared"]
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if " new " in line or " old " in line]
    changes = {line.split()[1]: float(line.split("(")[1].split(")")[0]) for line in rows}
    assert changes["new"] < -1 and changes["old"] < 0.5
