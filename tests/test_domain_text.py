import json
from pathlib import Path

import pytest
from task_files import put_lines, put_task, sentences

from cluster.storage.uris import open_store
from data.curation.overlap import texts_within
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task
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
    told = f"left out {len(training) - len(found) + 5:,} of {len(training):,} training texts and 45 others"
    assert told in capsys.readouterr().out


def test_what_judges_another_task_stays_out_too(tmp_path: Path) -> None:
    texts = [f"{r['text']} number {i} " + r["text"][::-1] for i, r in enumerate(sentences(200))]
    files = []
    for name, start in (("own", 0), ("other", 100)):
        lines = [{"text": text, "label": str(i % 2)} for i, text in enumerate(texts[start : start + 100])]
        uri = put_lines(tmp_path / f"{name}.jsonl", lines)
        files.append(put_task(tmp_path / f"{name}.yaml", name=name, kind="classification", data={"uri": uri}))
    (tmp_path / "others").mkdir()
    put_lines(tmp_path / "others" / "o.jsonl", [{"text": text} for text in texts])
    options = [
        "--task",
        files[0],
        "--output",
        str(tmp_path / "text"),
        "--prepared",
        str(tmp_path / "prepared"),
    ]
    domain_text.main([*options, "--unlabelled", str(tmp_path / "others"), "--keep-out", files[1]])
    other = prepare_task(load_task(files[1]), open_store(str(tmp_path / "prepared")))
    assert texts_within([e.content for e in other.read_test()], str(tmp_path / "text")) == set()
