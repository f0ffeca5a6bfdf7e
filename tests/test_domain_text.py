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
    prepared = prepare_task(load_task(task_file), open_store(str(tmp_path / "prepared")))
    judging = [e.content for e in [*prepared.read_test(), *prepared.read("validation")]]
    others = [f"Another text of the same kind, number {i}, which nobody has labelled." for i in range(40)]
    (tmp_path / "others").mkdir()
    put_lines(tmp_path / "others" / "o.jsonl", [{"text": text} for text in [*others, *judging[:5]]])
    options = [
        "--task",
        task_file,
        "--output",
        str(tmp_path / "text"),
        "--prepared",
        str(tmp_path / "prepared"),
    ]
    domain_text.main([*options, "--unlabelled", str(tmp_path / "others")])
    assert texts_within(judging, str(tmp_path / "text")) == set()
    written = "\n".join(
        json.loads(line)["text"] for line in (tmp_path / "text" / "t.jsonl").read_text().splitlines()
    )
    training = [e.content for e in prepared.read("train")]
    found = [text for text in training if text in written]
    assert all(text in written for text in others) and len(found) > 100
    told = capsys.readouterr().out
    assert f"put {len(found) + 40:,} texts" in told
    assert (
        f"left out {len(training) - len(found) + 5:,} of {len(training):,} training texts and 45 others"
        in told
    )
