"""The page of a run, whatever its answers hold."""

import html
import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from task_files import put_lines, small_tokenizer
from tokenizers import Tokenizer

from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers.finetuning.report import MOST_LABELS, is_right, task_tables, write_task_report
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.metrics import measure
from trainers.tasks.records import Example, to_lines
from trainers.tasks.splits import PreparedTask, prepare_task
from trainers.tasks.task import TaskConfig, TaskFiles, TaskPrompt


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
    over = {split: cells[-1] for split, *cells in rows_of(task_tables(prepared, encoder)[0])}
    for split in ("train", "validation"):
        with pytest.raises(ConfigError, match=f"^{over[split]} of "):
            encoder.encode(prepared.read(split))


def rows_of(table):
    """What a table's rows say, cell by cell."""
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(table)
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.mark.parametrize(
    ("kind", "train", "validation", "rows"),
    [
        ("classification", "aaab", "bb", [["a", "3 (75.0%)", "0 (0.0%)"], ["b", "1 (25.0%)", "2 (100.0%)"]]),
        # Of tags those of all words count.
        (
            "token_classification",
            [["a", "b"], ["a", "a"]],
            [["b", "b"]],
            [["a", "3 (75.0%)", "0 (0.0%)"], ["b", "1 (25.0%)", "2 (100.0%)"]],
        ),
    ],
)
def test_the_table_of_balance_counts_each_label_of_train_and_validation(
    tmp_path, kind, train, validation, rows
):
    prepared = prepared_with(tmp_path, "ab", kind)
    for split, targets in (("train", train), ("validation", validation)):
        examples = [Example(f"{split}{n}", "w x", "", ["w", "x"], target) for n, target in enumerate(targets)]
        prepared.store.put(f"{split}.jsonl", to_lines(examples))
    prepared = replace(
        prepared, counts={**prepared.counts, "train": len(train), "validation": len(validation)}
    )
    tokenizer, pad = framed(Tokenizer.from_str(small_tokenizer().json), 0, causal=True)
    _, balance = task_tables(prepared, Encoder(prepared.task, tokenizer, pad, 48, False, True))
    assert rows_of(balance) == rows


def prepared_with(folder, labels, kind="classification"):
    """A task with these labels, before it has records."""
    task = TaskConfig(name="t", kind=kind, labels=tuple(labels))
    counts = {"train": 40, "validation": 6, "test": 8}
    return PreparedTask(task, open_store(str(folder / "p")), "digest", counts, {})


def put_run(run, answers, metric="accuracy"):
    """The files of a finished run that gave these answers."""
    run.put("answers.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers).encode())
    test = {"step": 1, "metrics": {metric: 0.5}, "records": len(answers), "truncated": 0}
    result = {"seed": 0, "best_step": 1, "steps": 2, "validation": {metric: 0.25}, "test": test}
    run.put("result.json", json.dumps(result | {"train_records": 40, "validation_records": 6}).encode())
    run.put("config.yaml", b"run: {}")


def tables_of(page):
    """The page's tables under the heading that each stands below: rows of cells, as text."""
    tables = {}
    for part in page.split("<h2>")[1:]:
        heading, _, rest = part.partition("</h2>")
        rows = re.findall(r"<tr>(.*?)</tr>", rest, re.DOTALL)
        cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
        tables[heading] = [[html.unescape(cell) for cell in row] for row in cells]
    return tables


def answered(target, answer, confidence=0.5, text="a text"):
    one = {"id": "1", "text": text, "pair": "", "target": target, "answer": answer}
    return one | {"confidence": confidence}


def test_the_page_counts_each_confusion_and_lists_each_wrong_answer_the_surest_first(tmp_path):
    run = open_store(str(tmp_path / "run"))
    answers = [answered("a", "a")] * 3 + [answered("b", "b")] * 2
    answers += [answered("a", "b", 0.6, "less sure <of> it"), answered("b", "a", 0.9, "surely wrong")]
    answers += [answered("a", "b", 0.7, "in between")]
    put_run(run, answers)
    write_task_report(run, prepared_with(tmp_path, ["a", "b", "c"]))
    tables = tables_of(run.read("report.html").decode())
    header, *rows = tables["Confusion"]
    assert header[1:] == ["a", "b", "c"]
    assert rows == [["a", "3", "2", "0"], ["b", "1", "2", "0"], ["c", "0", "0", "0"]]
    assert tables["Errors"][1:] == [
        ["surely wrong", "b", "a", "0.90"],
        ["in between", "a", "b", "0.70"],
        ["less sure <of> it", "a", "b", "0.60"],
    ]
    assert tables["Results"][1:] == [["accuracy", "0.2500", "0.5000"]]
    assert "Commonest confusions" not in tables


def test_of_tags_each_word_is_counted(tmp_path):
    run = open_store(str(tmp_path / "run"))
    put_run(run, [answered(["a", "b", "a"], ["a", "a", "b"]), answered(["a"], ["a"])], "entity_f1")
    write_task_report(run, prepared_with(tmp_path, ["a", "b"], "token_classification"))
    tables = tables_of(run.read("report.html").decode())
    assert tables["Confusion"][1:] == [["a", "2", "1"], ["b", "1", "0"]]
    assert tables["Errors"][1:] == [["a text", "a, b, a", "a, a, b", "0.50"]]


def test_of_more_labels_than_a_matrix_shows_the_page_has_the_commonest_confusions(tmp_path):
    labels = [f"label {n:02d}" for n in range(MOST_LABELS + 1)]
    run = open_store(str(tmp_path / "run"))
    answers = [answered(label, label) for label in labels] + [answered(labels[3], labels[7])] * 2
    answers += [answered(labels[7], labels[3])] * 5 + [answered(labels[0], labels[30])]
    put_run(run, answers)
    write_task_report(run, prepared_with(tmp_path, labels))
    tables = tables_of(run.read("report.html").decode())
    assert tables["Commonest confusions"][1:] == [
        ["label 07", "label 03", "5"],
        ["label 03", "label 07", "2"],
        ["label 00", "label 30", "1"],
    ]
    assert "Confusion" not in tables


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
    put_run(run, answers)
    test = {"step": 1, "metrics": {"loss": 1.5, "chrf": 0.25}, "records": 1, "truncated": 0}
    result = json.loads(run.read("result.json")) | {"validation": {"loss": 1.25}, "test": test}
    run.put("result.json", json.dumps(result).encode())
    write_task_report(run, written)
    page = run.read("report.html").decode()
    assert "0.2500" in page and "1.2500" in page and "x\\u0085y" in page
