"""The page of a run, whatever its answers hold."""

import io
import json

import pytest
from rich.console import Console
from task_files import put_lines, small_tokenizer
from tokenizers import Tokenizer

from cluster.config import ConfigError
from cluster.storage import open_store
from trainers.task import TaskConfig, TaskFiles, TaskPrompt
from trainers.task_data import prepare_task
from trainers.task_encoding import Encoder, framed
from trainers.task_metrics import measure
from trainers.task_records import Example
from trainers.task_report import is_right, task_tables, write_task_report


@pytest.mark.parametrize(
    ("kind", "exact", "target", "answers"),
    [
        ("classification", "accuracy", ["a", "b"], {("b", "a"): True, ("a", "b"): True, ("a",): False}),
        (
            "question_answering",
            "exact_match",
            {"text": "the Eiffel Tower", "start": 0},
            {"Eiffel tower.": True, "Eiffel": False},
        ),
        ("generation", "exact_match", "yes ", {" yes": True, "Yes": False}),
    ],
)
def test_an_answer_is_right_on_the_page_where_the_exact_metric_says_so(kind, exact, target, answers):
    several = kind == "classification"
    task = TaskConfig(name="t", kind=kind, multi_label=several, labels=("b", "a") if several else ())
    for found, right in answers.items():
        answer = list(found) if several else found
        assert is_right(task, {"target": target, "answer": answer}) == right
        example = Example("e", "text", "", [], target)
        assert measure(task, [example], [answer])[exact] == right


def test_the_table_counts_as_too_long_what_is_refused_as_too_long(tmp_path):
    records = [{"text": f"word {n}", "label": f"answer {n} " * (9 if n % 2 else 1)} for n in range(60)]
    data = TaskFiles(uri=put_lines(tmp_path / "r.jsonl", records))
    prompt = TaskPrompt(template="a question of many words: {text}")
    task = TaskConfig(name="t", kind="generation", data=data, prompt=prompt)
    prepared = prepare_task(task, open_store(str(tmp_path / "p")))
    tokenizer, pad = framed(Tokenizer.from_str(small_tokenizer().json), 0, causal=True)
    encoder = Encoder(prepared.task, tokenizer, pad, 48, False, True)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(task_tables(prepared, encoder)[0])
    over = {
        line.split("│")[1].strip(): line.split("│")[-2].strip()
        for line in console.export_text().splitlines()
        if line.startswith("│")
    }
    for split in ("train", "validation"):
        with pytest.raises(ConfigError, match=f"^{over[split]} of "):
            encoder.encode(prepared.read(split))


@pytest.fixture
def written(tmp_path):
    records = [{"text": f"word {n}", "label": f"answer {n}"} for n in range(60)]
    data = TaskFiles(uri=put_lines(tmp_path / "r.jsonl", records))
    task = TaskConfig(name="t", kind="generation", metric="loss", data=data)
    return prepare_task(task, open_store(str(tmp_path / "p")))


def test_a_page_is_written_for_texts_with_any_separator_and_metrics_that_validation_did_not_measure(
    written, tmp_path
):
    run = open_store(str(tmp_path / "run"))
    answers = [
        {"id": "1", "text": "a\u2028b", "pair": "", "target": "x\u0085y", "answer": "z", "confidence": None}
    ]
    run.put("answers.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers).encode())
    test = {"metrics": {"loss": 1.5, "chrf": 0.25}, "records": 1, "truncated": 0}
    result = {"best_step": 1, "steps": 2, "validation": {"loss": 1.25}, "test": test}
    run.put("result.json", json.dumps(result | {"train_records": 40, "validation_records": 6}).encode())
    run.put("config.yaml", b"run: {}")
    write_task_report(run, written)
    page = run.read("report.html").decode()
    assert "0.2500" in page and "1.2500" in page and "x\u0085y" in page
