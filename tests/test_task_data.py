"""Tasks from files: what is wrong is said before training; splits never share a question."""

import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from task_files import put_lines, put_task, sentences

from cluster.configuration.config import from_dict
from cluster.configuration.stored_file import DamagedFileError
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers.tasks.records import example_of, read_examples
from trainers.tasks.splits import (
    RECORD,
    PreparedTask,
    digest_of,
    prepare_task,
    read_given,
    without_contradictions,
)
from trainers.tasks.task import SPLITS, TaskColumns, TaskConfig, TaskFiles, TaskPrompt, TaskSplit, load_task


def prepared(tmp_path, records, **content) -> PreparedTask:
    uri = put_lines(tmp_path / "records.jsonl", records)
    described = {"name": "t", "kind": "classification", "data": {"uri": uri}} | content
    return prepare_task(
        load_task(put_task(tmp_path / "task.yaml", **described)), open_store(str(tmp_path / "p"))
    )


def everything(task: PreparedTask) -> dict[str, list]:
    return {name: task.read_test() if name == "test" else task.read(name) for name in SPLITS}


def test_every_record_is_in_exactly_one_split_and_its_near_duplicates_with_it(tmp_path):
    # Long enough that one more word leaves nine tenths of the shingles.
    plain = [
        r | {"text": f"{r['text']} {i} " + " ".join(f"w{i}x{j}" for j in range(20))}
        for i, r in enumerate(sentences(200))
    ]
    altered = [r | {"id": f"copy-{r['id']}", "text": f"well {r['text']}"} for r in plain]
    splits = everything(prepared(tmp_path, plain + altered))
    where = {example.id: name for name, examples in splits.items() for example in examples}
    assert len(where) == 400 == sum(map(len, splits.values()))
    assert all(where[r["id"]] == where[f"copy-{r['id']}"] for r in plain)
    assert 10 <= len(splits["validation"]) // 2 <= 35 and 20 <= len(splits["test"]) // 2 <= 60


def test_the_split_does_not_depend_on_the_order_of_the_records(tmp_path):
    records = sentences(120)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, other = prepared(tmp_path / "a", records), prepared(tmp_path / "b", records[::-1])
    for name, examples in everything(one).items():
        assert {e.text for e in examples} == {e.text for e in everything(other)[name]}


def test_contradictions_are_left_out_and_kept_readable_and_repetitions_trained_once(tmp_path):
    records = sentences(120)
    first = records[0]
    contrary = first | {"id": "contrary", "label": "bad" if first["label"] == "good" else "good"}
    task = prepared(tmp_path, [*records, contrary, records[1] | {"id": "again"}])
    texts = [e.text for examples in everything(task).values() for e in examples]
    assert first["text"] not in texts and texts.count(records[1]["text"]) == 1
    assert task.left_out["contradiction"] >= 2
    kept = [json.loads(line) for line in task.store.read("contradictions.jsonl").decode().splitlines()]
    assert {"contrary", first["id"]} <= {record["id"] for record in kept}


def test_given_splits_lose_what_a_more_important_split_has(tmp_path):
    records = sentences(150)
    files = {
        "train": put_lines(tmp_path / "train.jsonl", records[:100] + records[140:]),
        "validation": put_lines(tmp_path / "v.jsonl", records[100:125] + records[140:145]),
        "test": put_lines(tmp_path / "test.jsonl", records[125:]),
    }
    config = TaskConfig(
        name="t", kind="classification", data=TaskFiles(**files), split=TaskSplit(similarity=1.0)
    )
    splits = everything(prepare_task(config, open_store(str(tmp_path / "p"))))
    contents = [{e.text for e in splits[name]} for name in SPLITS]
    assert not contents[0] & contents[1] | contents[0] & contents[2] | contents[1] & contents[2]
    assert {r["text"] for r in records[125:]} == contents[2]


def given(tmp_path, similarity=0.7, kind="classification", **splits) -> PreparedTask:
    files = {name: put_lines(tmp_path / f"{name}.jsonl", records) for name, records in splits.items()}
    config = TaskConfig(name="t", kind=kind, data=TaskFiles(**files), split=TaskSplit(similarity=similarity))
    return prepare_task(config, open_store(str(tmp_path / "p")))


def other(label: str) -> str:
    return "bad" if label == "good" else "good"


@pytest.mark.parametrize("similarity", [0.7, 1.0])
@pytest.mark.parametrize(
    ("one", "another"), [("train", "test"), ("train", "validation"), ("validation", "test")]
)
def test_a_text_with_another_label_in_another_given_split_is_left_out_of_both_and_listed(
    tmp_path, similarity, one, another
):
    records = sentences(150)
    splits = {"train": records[:100], "validation": records[100:125], "test": records[125:]}
    first = splits[one][0]
    contrary = first | {"id": "contrary", "label": other(first["label"]), "text": first["text"].upper()}
    splits[another] = [*splits[another], contrary]
    task = given(tmp_path, similarity, **splits)
    left = {e.id for examples in everything(task).values() for e in examples}
    assert not left & {first["id"], "contrary"}
    listed = [json.loads(line) for line in task.store.read("contradictions.jsonl").decode().splitlines()]
    assert {record["id"] for record in listed} == {first["id"], "contrary"}
    assert task.left_out["contradiction"] == 2


def test_a_text_with_the_same_label_in_another_given_split_contradicts_nothing(tmp_path):
    records = sentences(150)
    splits = {"train": records[:101], "validation": records[101:126], "test": [records[0], *records[126:]]}
    task = given(tmp_path, 1.0, **splits)
    assert task.left_out == {
        "contradiction": 0, "repeated": 0, "near-duplicate across splits, in train": 1,
    }  # fmt: skip
    assert records[0]["id"] in {e.id for e in task.read_test()}


def test_other_answers_to_a_question_in_another_given_split_contradict_nothing(tmp_path):
    records = [{"id": str(n), "text": f"{n} {n * 77}?", "label": f"answer {n}"} for n in range(60)]
    test = [*records[50:], records[0] | {"id": "also", "label": "another answer"}]
    task = given(tmp_path, 1.0, "generation", train=records[:40], validation=records[40:50], test=test)
    assert task.left_out["contradiction"] == 0 and "also" in {e.id for e in task.read_test()}


def test_given_splits_that_contradict_each_other_have_another_name_than_those_that_do_not(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    records = sentences(150)
    splits = {"train": records[:100], "validation": records[100:125], "test": records[125:]}
    contrary = records[0] | {"id": "contrary", "label": other(records[0]["label"])}
    tasks = [
        given(tmp_path / "a", **splits),
        given(tmp_path / "b", **splits | {"test": [*splits["test"], contrary]}),
    ]
    assert tasks[0].digest != tasks[1].digest


def test_formats_and_compressions_give_the_same_examples(tmp_path):
    records = sentences(240)
    folder = tmp_path / "files"
    folder.mkdir()
    table = pa.Table.from_pylist(records)
    pq.write_table(table.slice(0, 80), folder / "a.parquet")
    pa.csv.write_csv(table.slice(80, 80), folder / "b.csv")
    lines = "".join(json.dumps(record) + "\n" for record in records[160:])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    config = TaskConfig(name="t", kind="classification", data=TaskFiles(uri=str(folder)))
    splits = everything(prepare_task(config, open_store(str(tmp_path / "p"))))
    found = {(e.id, e.text, e.target) for examples in splits.values() for e in examples}
    assert found == {(r["id"], r["text"], r["label"]) for r in records}


@pytest.mark.parametrize(
    ("change", "content", "message"),
    [
        ({"label": None}, {}, "record 4: label=None is not a label"),
        ({"text": " "}, {}, "record 4: text=' ' is not a text"),
        ({}, {"columns": {"label": "lable"}}, "no column 'lable' .columns.label.; nearest: label"),
        ({"label": "ugly"}, {"labels": ["good", "bad"]}, "has?.* the label 'ugly'"),
        ({}, {"labels": ["good", "bad", "fair"]}, "no record of train has the label 'fair'"),
        ({}, {"split": {"validation": 0.0}}, "the validation split of t is empty"),
        ({}, {"metric": "f1"}, "metric=f1 is not a metric of kind=classification; "),
        ({}, {"kind": "regression"}, "record 1: label='.*' is not a number"),
        ({}, {"kind": "pairs"}, "kind=pairs needs columns.pair"),
        ({}, {"data": {}}, "give exactly one of them"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_training(tmp_path, change, content, message):
    records = sentences(80)
    records[3] |= change
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, records, **content)


def test_a_chat_ends_with_the_answer_to_all_that_was_said_before():
    task = TaskConfig(
        name="chat",
        kind="generation",
        columns=TaskColumns(messages="turns"),
        prompt=TaskPrompt(template="{text}\nassistant:"),
    )
    said = [("user", "你好"), ("assistant", "你好！"), ("user", "{braces} stay"), ("assistant", "They do.")]
    turns = [{"role": role, "content": content} for role, content in said]
    example = example_of(task, {"turns": turns}, "chats.jsonl:1")
    assert (
        example.text == "user: 你好\nassistant: 你好！\nuser: {braces} stay" and example.target == "They do."
    )
    open_question = example_of(task, {"turns": turns[:3]}, "chats.jsonl:2", labelled=False)
    assert open_question.text == example.text and open_question.target is None
    with pytest.raises(ValueError, match="turns does not end with what the assistant says"):
        example_of(task, {"turns": turns[:3]}, "chats.jsonl:3")
    with pytest.raises(ValueError, match="is not a list of"):
        example_of(task, {"turns": ["hello"]}, "chats.jsonl:4")
    (wrong,) = TaskPrompt(turn="{who}: {content}").problems("prompt")
    assert wrong == "prompt.turn names {who}; it can name {content} and {role}"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{content:{role}}", "formats content"),  # a role of "900000000" is the width that content gets
        ("{role}: {content:>900000000}", "formats content"),
        ("{role!r}: {content}", "formats role"),
        ("{content} {role.__class__}", r"names \{role\.__class__\}"),
        ("{content} {role[0]}", r"names \{role\[0\]\}"),
        ("{content} {}", r"names \{\}"),
        ("{content} {0}", r"names \{0\}"),
        ("{content}" * 17, "fills in 17 texts"),
        ("{role}", r"has no \{content\}"),
        ("{content", r"expected '\}'"),
    ],
)
def test_a_template_is_names_in_braces_and_nothing_more(template, named):
    with pytest.raises(ConfigError, match=named):
        from_dict(TaskConfig, {"name": "t", "kind": "generation", "prompt": {"turn": template}})
    swapped = template.replace("content", "text").replace("role", "pair")
    with pytest.raises(ConfigError, match=named.replace("content", "text").replace("role", "pair")):
        from_dict(TaskConfig, {"name": "t", "kind": "generation", "prompt": {"template": swapped}})


def test_a_label_that_only_validation_lacks_is_refused(tmp_path):
    records = sentences(80)
    files = TaskFiles(
        train=put_lines(tmp_path / "train.jsonl", records[:60]),
        validation=put_lines(tmp_path / "v.jsonl", [r for r in records[60:70] if r["label"] == "good"]),
        test=put_lines(tmp_path / "test.jsonl", records[70:]),
    )
    with pytest.raises(ConfigError, match="no record of validation has the label 'bad'"):
        prepare_task(TaskConfig(name="t", kind="classification", data=files), open_store(str(tmp_path / "p")))


def several(number: int, kind: str) -> list[dict]:
    """Records with lists of labels or tags, none the near-duplicate of another."""
    records = []
    for n in range(number):
        words = [f"w{n}", f"x{n * 31}", f"y{n * 77}"]
        content = {"tokens": words} if kind == "token_classification" else {"text": " ".join(words)}
        records.append({"id": f"r{n}", **content, "label": ["B-X" if n % 2 else "O", "O", "O"]})
    return records


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_a_label_among_several_that_validation_lacks_is_named_in_a_warning_each_time(tmp_path, kind, caplog):
    records = several(60, kind)
    records[3]["label"] = ["B-RARE", "O", "O"]
    files = TaskFiles(
        train=put_lines(tmp_path / "train.jsonl", records[:40]),
        validation=put_lines(tmp_path / "v.jsonl", records[40:50]),
        test=put_lines(tmp_path / "test.jsonl", records[50:]),
    )
    config = TaskConfig(
        name="t", kind=kind, multi_label=kind == "classification", data=files, split=TaskSplit(similarity=1.0)
    )
    for _ in range(2):  # prepared, and read
        caplog.clear()
        task = prepare_task(config, open_store(str(tmp_path / "p")))
        assert task.task.labels == ("B-RARE", "B-X", "O")
        (line,) = caplog.messages
        assert line.startswith("t: no record of validation has the labels 'B-RARE', 1 of 3, ")
        assert line.endswith("add such records to data.validation")


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_where_validation_has_all_labels_nothing_is_warned_of(tmp_path, kind, caplog):
    multi = {"multi_label": kind == "classification", "split": {"similarity": 1.0}}
    prepared(tmp_path, several(100, kind), kind=kind, **multi)
    assert not caplog.messages


def test_several_labels_of_which_no_record_has_any_are_refused(tmp_path):
    records = [record | {"label": []} for record in several(60, "classification")]
    with pytest.raises(ConfigError, match="no record of train has a label .columns.label=label."):
        prepared(tmp_path, records, multi_label=True, split={"similarity": 1.0})


def test_another_seed_splits_otherwise_and_under_another_name(tmp_path):
    one = prepared(tmp_path, sentences(100))
    config = replace(one.task, split=TaskSplit(seed=1))
    other = prepare_task(config, open_store(str(tmp_path / "p")))
    assert one.digest != other.digest
    assert {e.id for e in one.read_test()} != {e.id for e in other.read_test()}


@pytest.mark.parametrize(("inside", "ending"), [("\u2028", "\n"), ("\u0085", "\n"), (" ", "\r\n")])
def test_a_line_ends_where_json_lines_do_and_not_within_a_text(tmp_path, inside, ending):
    records = sentences(9)
    records[7]["text"] = f"first{inside}second"
    lines = "".join(json.dumps(record, ensure_ascii=False) + ending for record in records)
    (tmp_path / "r.jsonl").write_bytes(lines.encode())
    config = TaskConfig(name="t", kind="classification", data=TaskFiles(uri=str(tmp_path / "r.jsonl")))
    assert [e.id for e in read_examples(config, config.data.uri)] == [record["id"] for record in records]


QUESTIONS = TaskConfig(name="qa", kind="question_answering", columns=TaskColumns(pair="context"))


@pytest.mark.parametrize(
    "context",
    [
        "One line.\r\nAnna in 1889.\r\n",
        "\n\nAnna in 1889.",
        "Cafe\u0301, \u1112\u1161\u11ab: Anna in 1889.",
        "\ufeff 1889 ",
    ],
)
@pytest.mark.parametrize("told", ["start", "answer_start", None])
def test_an_answers_start_is_one_in_the_context_as_the_record_has_it(context, told):
    answer = "1889"
    label = {"text": answer} | ({told: context.index(answer)} if told else {})
    found = example_of(QUESTIONS, {"text": "When?", "context": context, "label": label}, "r.jsonl:1")
    assert found.pair != context, "the context needs no normalising"
    start = found.target["start"]
    assert found.pair[start : start + len(answer)] == answer == found.target["text"]


def test_an_answer_is_normalised_as_its_context_is_and_refused_where_it_does_not_stand():
    row = {"text": "Where?", "context": "first\r\nthe cafe\u0301 there"}
    answer = "cafe\u0301"
    found = example_of(
        QUESTIONS, row | {"label": {"text": answer, "start": row["context"].index(answer)}}, "r:1"
    )
    assert found.target == {"text": "café", "start": found.pair.index("café")}
    for wrong in (
        {"text": answer, "start": 0},
        {"text": answer, "start": -5},
        "bar",
        {"text": " ", "start": 11},
    ):
        with pytest.raises(ValueError, match="does not stand in the context|is not an answer"):
            example_of(QUESTIONS, row | {"label": wrong}, "r:1")


@pytest.mark.parametrize("kind", ["generation", "regression", "question_answering"])
@pytest.mark.parametrize("similarity", [0.7, 1.0])
def test_several_good_answers_to_one_question_stay_together(tmp_path, kind, similarity):
    context = "Anna and Berta and Carla went home"
    records = []
    for number in range(60):
        for answer in ("Anna", "Berta", "Berta"):
            label = len(answer) if kind == "regression" else answer
            records.append({"text": f"{number} {number * 7}?", "pair": context, "label": label})
    columns = {"pair": "pair"} if kind == "question_answering" else {}
    if columns:  # alike contexts would make one group of all
        records = [r | {"pair": f"{context} in {r['text'] * 5}"} for r in records]
    task = prepared(tmp_path, records, kind=kind, columns=columns, split={"similarity": similarity})
    splits = everything(task)
    assert task.left_out == {"contradiction": 0, "repeated": 60}
    where = {name: [e.text for e in examples] for name, examples in splits.items()}
    assert all(len(texts) == 2 * len(set(texts)) > 0 for texts in where.values())
    assert not set(where["train"]) & {*where["validation"], *where["test"]} | {*where["validation"]} & {
        *where["test"]
    }


def test_texts_of_one_template_that_form_one_group_are_named_with_what_keeps_them_apart(tmp_path):
    template = (
        "The quarterly report of the northern branch says that the result of item {} was as expected by all"
    )
    records = [{"id": str(n), "text": template.format(n), "label": "ab"[n % 2]} for n in range(60)]
    with pytest.raises(
        ConfigError, match=r"60 of 60 texts of t are one group of near-duplicates.*split.similarity=0.7"
    ):
        prepared(tmp_path, records)
    splits = everything(prepared(tmp_path, records, split={"similarity": 1.0}))
    assert all(splits.values()) and sum(map(len, splits.values())) == 60


def test_a_split_that_is_empty_for_want_of_records_is_not_laid_on_near_duplicates(tmp_path):
    with pytest.raises(ConfigError, match="split of t is empty; raise its fraction"):
        prepared(tmp_path, sentences(3))


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_records_of_one_class_are_named(tmp_path, kind):
    tagged = kind == "token_classification"
    records = [
        r | {"tokens": r["text"].split(" "), "label": ["O"] * 8 if tagged else "good"} for r in sentences(100)
    ]
    with pytest.raises(
        ConfigError, match="all records have the label '(good|O)': nothing is to be told apart"
    ):
        prepared(tmp_path, records, kind=kind)


@pytest.mark.parametrize("number", [1e200, -1e31, "1e200"])
def test_a_number_that_no_float32_holds_is_named_with_its_record(tmp_path, number):
    records = [
        {"text": r["text"], "label": number if n == 3 else 1.0 * n} for n, r in enumerate(sentences(60))
    ]
    with pytest.raises(ConfigError, match=r"record 4: label=.* is beyond 1e\+30, the largest number"):
        prepared(tmp_path, records, kind="regression")


@pytest.mark.parametrize("noted", [True, False])
def test_a_split_that_was_changed_after_it_was_made_is_refused(tmp_path, noted):
    made = prepared(tmp_path, sentences(80))
    if not noted:  # as an older version made it
        record = json.loads(made.store.read(RECORD))
        del record["checksums"]
        made.store.put(RECORD, json.dumps(record).encode())
    before = everything(made)
    for split in SPLITS:
        path = f"{split}.jsonl"
        content = made.store.read(path)
        appended = content + content.partition(b"\n")[0] + b"\n"
        swapped = content.replace(b'"target": "good"', b'"target": "bad"', 1)
        assert swapped != content
        for changed in (appended, swapped) if noted else (appended,):
            made.store.put(path, changed)
            with pytest.raises(
                DamagedFileError, match=f"{path} is damaged: it .*delete the folder that it lies in"
            ):
                everything(prepared(tmp_path, sentences(80)))
        made.store.put(path, content)
        assert everything(prepared(tmp_path, sentences(80))) == before


def test_texts_that_differ_in_punctuation_or_width_alone_fall_into_one_split(tmp_path):
    plain = [r | {"text": f"{r['text']} w{i}", "id": str(i)} for i, r in enumerate(sentences(120))]
    pointed = [r | {"text": r["text"].replace(" ", ", ") + "!", "id": f"p{r['id']}"} for r in plain]
    wide = str.maketrans({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
    widened = [r | {"text": r["text"].translate(wide), "id": f"w{r['id']}"} for r in plain]
    splits = everything(prepared(tmp_path, plain + pointed + widened, split={"similarity": 1.0}))
    where = {example.id: name for name, examples in splits.items() for example in examples}
    assert len(where) == 360 and len(set(where.values())) == 3
    assert all(where[r["id"]] == where[f"p{r['id']}"] == where[f"w{r['id']}"] for r in plain)


def test_a_question_whose_punctuation_decides_its_label_contradicts_nothing(tmp_path):
    records = [r | {"text": f"{r['text']} w{i}"} for i, r in enumerate(sentences(100))]
    asked = [
        r | {"text": r["text"] + "?", "label": other(r["label"]), "id": f"q{i}"}
        for i, r in enumerate(records)
    ]
    task = prepared(tmp_path, records + asked, split={"similarity": 1.0})
    assert task.left_out["contradiction"] == 0 and sum(task.counts.values()) == 200


@pytest.mark.parametrize("split_given", [False, True])
def test_a_split_of_an_earlier_version_goes_on_and_no_other_is_taken_for_it(tmp_path, caplog, split_given):
    records = sentences(150)
    if split_given:
        paths = {
            name: put_lines(tmp_path / f"{name}.jsonl", records[start:end])
            for name, start, end in (("train", 0, 100), ("validation", 100, 125), ("test", 125, 150))
        }
        files = TaskFiles(**paths)
    else:
        files = TaskFiles(uri=put_lines(tmp_path / "records.jsonl", records))
    config = TaskConfig(name="t", kind="classification", data=files, split=TaskSplit(similarity=1.0))
    store = open_store(str(tmp_path / "p"))
    made = prepare_task(config, store)
    assert not caplog.messages
    given_records = read_given(config)
    _, contradicting = without_contradictions(config, given_records)
    # What has no near-duplicate of the new kind lies where the version before put it.
    assert split_given or made.checksums["test"] == "1bd6144c328d32c88b9ca457db830ff1"
    former = digest_of(config, given_records, contradicting, version=1)
    assert former == ("a9fc2ef56c25" if split_given else "c376e6d85ce7")  # as the version before named it
    assert former != made.digest
    for info in list(made.store.list()):  # as an earlier version left it: another split, under its own name
        name = {"train.jsonl": "test.jsonl", "test.jsonl": "train.jsonl"}.get(info.path, info.path)
        content = made.store.read(info.path)
        if info.path == RECORD:
            record = json.loads(content)
            counts = record["counts"]
            record["counts"] = counts | {"train": counts["test"], "test": counts["train"]}
            del record["near_duplicates"], record["checksums"]
            content = json.dumps(record).encode()
        store.child(f"t-{former}").put(name, content)
    begun = prepare_task(config, store)
    assert begun.digest == former and begun.read("train") == made.read_test()
    (line,) = caplog.messages
    assert former in line and "delete that folder" in line


@pytest.mark.parametrize(
    ("alike", "named"),
    [
        (["pos", "Pos", "pos ", "ｐｏｓ"], "'Pos' (20), 'pos' (20), 'pos ' (20), 'ｐｏｓ' (20)"),
        (["caf\u00e9", "cafe\u0301"], r"'cafe\u0301' (40), 'caf\xe9' (40)"),
    ],
)
def test_labels_that_case_width_blanks_or_composition_alone_tell_apart_are_named(
    tmp_path, caplog, alike, named
):
    records = [
        {"text": f"w{n} x{n * 31}", "label": [*alike, "neg"][n % (len(alike) + 1)]}
        for n in range(20 * (len(alike) + 1) if len(alike) == 4 else 120)
    ]
    for _ in range(2):  # prepared, and read
        caplog.clear()
        task = prepared(tmp_path, records, split={"similarity": 1.0, "validation": 0.3})
        assert set(task.task.labels) == {*alike, "neg"}, "they are not merged"
        (line,) = caplog.messages
        assert line.startswith(f"t: the labels {named} are as many classes")


def test_tags_of_one_kind_of_entity_written_in_two_ways_are_named(tmp_path, caplog):
    tags = [["B-PER", "I-PER", "O"], ["B-Per", "O", "O"], ["O", "B-LOC", "I-LOC"]]
    records = [{"tokens": [f"w{n}", f"x{n * 31}", f"y{n * 77}"], "label": tags[n % 3]} for n in range(90)]
    prepared(tmp_path, records, kind="token_classification", split={"similarity": 1.0})
    (line,) = caplog.messages
    assert line.startswith("t: the labels 'PER' (60), 'Per' (30) are as many classes")


def test_labels_that_differ_otherwise_are_not_named(tmp_path, caplog):
    records = [{"text": f"w{n} x{n * 31}", "label": ["1", "10", "a-b", "ab"][n % 4]} for n in range(160)]
    prepared(tmp_path, records, split={"similarity": 1.0})
    assert not caplog.messages


def test_a_task_is_not_split_into_the_folder_of_its_records(tmp_path):
    (tmp_path / "records").mkdir()
    put_lines(tmp_path / "records" / "a.jsonl", sentences(400))
    (tmp_path / "link").symlink_to(tmp_path / "records")
    task = TaskConfig(name="t", kind="classification", data=TaskFiles(uri=str(tmp_path / "records")))
    for place in ("records", "records/prepared", "link/prepared"):
        with pytest.raises(ConfigError, match="lies in .*records, .* choose a folder beside it"):
            prepare_task(task, open_store(str(tmp_path / place)))
    assert [path.name for path in (tmp_path / "records").rglob("*")] == ["a.jsonl"]
    assert prepare_task(task, open_store(str(tmp_path))).counts["train"] > 0
