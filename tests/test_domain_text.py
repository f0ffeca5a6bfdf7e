import json
from pathlib import Path

import pytest
from task_files import put_lines, put_task, sentences

from cluster.storage import open_store
from data.overlap import texts_within
from trainers.task import load_task
from trainers.task_data import prepare_task
from tune import domain_text


def test_the_corpus_holds_training_texts_and_nothing_that_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        r | {"text": f"{r['text']} number {i} " + r["text"][::-1]} for i, r in enumerate(sentences(200))
    ]
    uri = put_lines(tmp_path / "records.jsonl", records)
    task_file = put_task(tmp_path / "t.yaml", name="t", kind="classification", data={"uri": uri})
    options = [
        "--task",
        task_file,
        "--output",
        str(tmp_path / "text"),
        "--prepared",
        str(tmp_path / "prepared"),
    ]
    domain_text.main(options)
    prepared = prepare_task(load_task(task_file), open_store(str(tmp_path / "prepared")))
    judging = [e.content for e in [*prepared.read_test(), *prepared.read("validation")]]
    assert texts_within(judging, str(tmp_path / "text")) == set()
    written = "\n".join(
        json.loads(line)["text"] for line in (tmp_path / "text" / "t.jsonl").read_text().splitlines()
    )
    found = [e for e in prepared.read("train") if e.content in written]
    assert f"put {len(found):,} training texts" in capsys.readouterr().out and len(found) > 100
