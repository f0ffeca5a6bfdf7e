"""The whole path of fine-tuning, through the function and through the command that users call."""

import gc
import itertools
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch
import yaml
from task_files import BACKBONES, put_backbone, put_lines, put_task, sentences, small_tokenizer

from cluster.console.errors import ConfigError
from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import open_store
from tests.small_finetune import (
    SHORT,
    answers_again,
    command,
    config,
    judged_answers,
    losses_of,
    put_place,
    run_of,
)
from trainers.evaluation.verdict import VERDICT, TestSplitError, claim_test_split
from trainers.exported.folder import load_exported
from trainers.finetune import main
from trainers.finetuning.backbone import load_backbone, read_facts
from trainers.finetuning.group import trains_alone
from trainers.finetuning.job import FinetuneOrder, identity_of
from trainers.finetuning.report import write_task_report
from trainers.finetuning.run import finetune
from trainers.prediction.pieces import Predictor
from trainers.recovery.lease import RunTakenError, lease
from trainers.reporting.metrics import read_metrics, steps_of
from trainers.tasks.export import load_task_model
from trainers.tasks.heads import TaskModel
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import TaskPrompt, load_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return put_place(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def learnt(place):
    return finetune(config(place, "learnt"))


def test_what_can_be_learnt_is_learnt_and_judged_once(place, learnt):
    (seed,) = learnt.seeds
    assert seed["test"]["metrics"]["accuracy"] > 0.9
    assert seed["test"]["interval"][0] <= seed["test"]["metrics"]["accuracy"] <= seed["test"]["interval"][1]
    with pytest.raises(TestSplitError):
        claim_test_split(run_of(place, "learnt"), "another")


def test_a_finished_run_is_not_trained_again(place, learnt):
    before = run_of(place, "learnt").list()
    assert finetune(config(place, "learnt")) == learnt
    assert run_of(place, "learnt").list() == before


def test_a_run_does_not_go_on_under_another_configuration(place, learnt):
    with pytest.raises(ConfigError, match="optimizer.learning_rate=0.02, but the run was started with 0.01"):
        finetune(config(place, "learnt", optimizer={"learning_rate": 0.02}))


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [("precision", "bf16", "'fp32'"), ("gradient_clip", 3.0, "1.0"), ("deepspeed", {"a": {"b": 1}}, "{}")],
)
def test_what_alters_its_numbers_may_not_change_in_a_run_that_is_not_finished(place, key, value, before):
    finetune(config(place, "begun", batch=SHORT), keep_model=False, judge=False)
    run_of(place, "begun").delete("result.json")
    with pytest.raises(ConfigError) as refused:
        finetune(config(place, "begun", batch=SHORT, engine={key: value}), keep_model=False, judge=False)
    [line] = refused.value.problems
    assert f"engine.{key}={value!r}, but the run was started with {before};" in line


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_go_on_from_another_backbone_at_the_same_place(place, tmp_path, finished):
    uri = put_backbone(tmp_path / "model")
    settings = {"backbone": {"uri": uri}, "batch": SHORT}
    name = f"of-another-{finished}"
    finetune(config(place, name, **settings), keep_model=False, judge=False)
    if not finished:
        run_of(place, name).delete("result.json")
    put_backbone(tmp_path / "model", replace(BACKBONES["causal"], init_std=0.01))
    with pytest.raises(
        ConfigError, match="backbone.uri=.* holds another model than the run was started from"
    ):
        finetune(config(place, name, **settings), keep_model=False, judge=False)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metric": "macro_f1"}, "metric=macro_f1, but the run was started with accuracy"),
        ({"prompt": {"template": "{text}?"}}, r"prompt.template='{text}\?', .* started with '{text}'"),
    ],
)
def test_a_run_does_not_go_on_under_another_metric_or_prompt(
    place, tmp_path, finished, content, message, learnt
):
    task = yaml.safe_load((place / "task.yaml").read_text()) | content
    changed = put_task(tmp_path / "task.yaml", **task)
    name = "learnt"
    if not finished:
        name = f"unfinished-{next(iter(content))}"
        finetune(config(place, name, batch=SHORT), keep_model=False, judge=False)
        run_of(place, name).delete("result.json")
    settings = config(place, name, **({} if finished else {"batch": SHORT}))
    with pytest.raises(ConfigError, match=message) as refused:
        finetune(replace(settings, run=replace(settings.run, task=changed)), keep_model=False, judge=False)
    assert len(refused.value.problems) == 1


def test_a_checkpoint_is_of_one_metric_and_prompt(place):
    task = prepare_task(load_task(str(place / "task.yaml")), open_store(str(place / "prepared")))
    identities = [
        identity_of(FinetuneOrder(config(place, "identity"), replace(task, task=changed), 0, "backbone"))
        for changed in (
            task.task,
            replace(task.task, metric="macro_f1"),
            replace(task.task, prompt=TaskPrompt(template="{text}?")),
        )
    ]
    assert all(one != other for one, other in itertools.combinations(identities, 2))
    assert all(found["backbone"]["uri"].endswith("model") for found in identities)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"max_tokens": 8}}, "records of t are longer than 8 tokens"),
        ({"optimizer": {"learning_rate": 0.02}}, "optimizer.learning_rate=0.02, but the run was started"),
    ],
)
def test_a_dry_run_finds_what_a_run_would_be_refused_for(place, learnt, changes, message):
    name = "dry" if "batch" in changes else "learnt"
    before = run_of(place, name).list()
    with pytest.raises(ConfigError, match=message):
        main([*command(place, name, changes)[2:], "--dry-run"])
    main([*command(place, name, {})[2:], "--dry-run"])
    assert run_of(place, name).list() == before


def test_a_command_does_not_train_a_run_beside_one_that_lives(place, learnt):
    with lease(run_of(place, "learnt")), pytest.raises(RunTakenError, match="is being driven by process"):
        main(command(place, "learnt", {})[2:])


def test_what_is_said_of_a_backbone_without_its_weights_is_what_loading_finds(place, tmp_path):
    for uri in (place / "model", put_huggingface_bert(tmp_path)):
        settings = config(place, "facts", backbone={"uri": str(uri)})
        found, loaded = read_facts(settings), load_backbone(settings, seed=0)
        assert (found.shape, found.boundary_id) == (loaded.model.config, loaded.boundary_id)
        assert found.tokenizer.to_str() == loaded.tokenizer.to_str()


def test_the_exported_model_gives_the_same_scores_in_transformers(place, learnt):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    export = run_of(place, "learnt").child("export")
    folder = export.uri.removeprefix("file://")
    theirs, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ours, encoder = load_task_model(export)
    texts = [record["text"] for record in sentences(20, seed=9)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=True)
    with torch.no_grad():
        logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mask = batch["attention_mask"].bool()
        scores = ours(batch["input_ids"], mask, torch.zeros_like(batch["input_ids"]))
    torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-5)
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    assert encoder.tokenizer.encode(texts[0]).ids == tokenizer(texts[0])["input_ids"]


def put_huggingface_bert(folder) -> str:
    """A BERT as Hugging Face's folders have it: no token of its own opens a document."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    shape |= {"vocab_size": 512, "max_position_embeddings": 128}
    BertForPreTraining(BertConfig(**shape)).save_pretrained(folder)
    tokenizer = json.loads(small_tokenizer().json)
    tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if each["id"] != 0]
    tokenizer["model"]["vocab"] = {
        "<unused>" if name == "<|endoftext|>" else name: number
        for name, number in tokenizer["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["bert", "rotary", "huggingface"])
def test_an_encoder_is_trained_judged_and_exported_with_the_answers_that_were_judged(place, backbone):
    folder = place / backbone
    uri = (
        put_huggingface_bert(folder)
        if backbone == "huggingface"
        else put_backbone(folder, BACKBONES[backbone])
    )
    finetune(config(place, f"on-{backbone}", backbone={"uri": uri}, batch=SHORT))
    run = run_of(place, f"on-{backbone}")
    answers = judged_answers(run)
    for judged, found in zip(answers, answers_again(run.child("export"), answers), strict=True):
        assert found.value == judged["answer"]
        assert found.confidence == pytest.approx(judged["confidence"], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_predict_answers_the_test_records_as_they_were_judged(place, tmp_path, precision):
    name = f"judged-in-{precision}"
    engine = {"precision": precision, "zero_stage": 1}
    verdict = finetune(config(place, name, batch=SHORT, engine=engine)).seeds[0]["test"]
    run = run_of(place, name)
    judged = judged_answers(run)
    texts = [{"id": one["id"], "text": one["text"]} for one in judged]
    export = run.child("export").uri
    lines = Predictor(export, str(tmp_path), 64, 1).lines([(one["id"], one) for one in texts])
    assert [line["answer"] for line in lines] == [one["answer"] for one in judged]
    for line, one in zip(lines, judged, strict=True):
        assert line["confidence"] == pytest.approx(one["confidence"], abs=2e-6)  # it is rounded to six digits
    right = sum(line["answer"] == one["target"] for line, one in zip(lines, judged, strict=True))
    assert right / len(judged) == verdict["metrics"]["accuracy"]


def test_adapters_are_merged_into_what_is_exported(place):
    finetune(config(place, "lora", batch=SHORT, adapt={"train": "lora", "lora_rank": 2}))
    run = run_of(place, "lora")
    answers = judged_answers(run)
    for judged, found in zip(answers, answers_again(run.child("export"), answers), strict=True):
        assert found.value == judged["answer"]
        assert found.confidence == pytest.approx(judged["confidence"], abs=1e-4)
    pretrained = dict(load_backbone(config(place, "lora"), seed=0).model.named_parameters())
    moved = {
        name.split(".")[-2]
        for name, p in load_task_model(run.child("export"))[0].backbone.named_parameters()
        if not torch.equal(p, pretrained[name])
    }
    assert moved == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_a_run_stops_where_validation_no_longer_improves_and_keeps_the_best(place):
    changes = {"validation": {"times": 12, "patience": 2}, "optimizer": {"learning_rate": 1e-9}}
    told = []
    result = finetune(
        config(place, "early", batch=SHORT | {"min_steps": 24, "max_steps": 24}, **changes),
        on_validation=lambda step, score: told.append((step, score.score)), keep_model=False,
    ).seeds[0]  # fmt: skip
    scores = [score for _, score in told]
    best = scores.index(max(scores))  # of equals the first
    assert result["best_step"] == told[best][0] and result["steps"] == told[-1][0] == told[best + 2][0] < 24


@pytest.mark.parametrize("stage", [0, 1])
def test_runs_one_after_another_do_not_fill_the_memory_with_their_models(place, stage):
    def models() -> int:
        return sum(isinstance(each, TaskModel) for each in gc.get_objects())

    before = models()
    engine = {"zero_stage": stage, "precision": "bf16"}
    finetune(config(place, f"gone-{stage}", batch=SHORT, engine=engine), keep_model=False)
    assert models() == before


@pytest.mark.slow
def test_each_seed_is_a_run_of_its_own_and_begins_otherwise(place):
    result = finetune(config(place, "seeds", batch=SHORT, run={"seeds": (0, 1)}), keep_model=False)
    assert [seed["seed"] for seed in result.seeds] == [0, 1]
    assert len(result.values("test")) == 2
    first, second = (losses_of(run_of(place, "seeds", seed)) for seed in (0, 1))
    assert len(first) == len(second) == 6 and first[0] != second[0]


def test_the_report_of_a_run_counts_the_answers_that_were_judged(place, learnt):
    task = prepare_task(load_task(str(place / "task.yaml")), open_store(str(place / "prepared")))
    write_task_report(run_of(place, "learnt"), task)
    page = run_of(place, "learnt").read("report.html").decode()
    answers = judged_answers(run_of(place, "learnt"))
    wrong = [a for a in answers if a["answer"] != a["target"]]
    assert len(answers) == task.counts["test"] and all(a["text"] in page for a in wrong[:30])
    assert (f"{len(wrong):,} wrong answers" if wrong else "No answer was wrong") in page
    for label in ("bad", "good"):
        row = [
            sum((a["target"], a["answer"]) == (label, other) for a in answers) for other in ("bad", "good")
        ]
        (found,) = re.findall(rf"<tr><td>{label}</td>(.*?)</tr>", page)
        assert [int(cell) for cell in re.findall(r">(\d+)<", found)] == row


def test_a_trial_does_not_load_the_test_split(place):
    task = prepare_task(load_task(str(place / "task.yaml")), open_store(str(place / "prepared")))
    hidden = task.store.read("test.jsonl")
    task.store.delete("test.jsonl")
    try:
        result = finetune(config(place, "trial"), prepared=task, judge=False, keep_model=False)
    finally:
        task.store.put("test.jsonl", hidden)
    assert "test" not in result.seeds[0] and not run_of(place, "trial").exists(VERDICT)


@pytest.mark.parametrize("from_scratch", [True, False])
def test_from_scratch_takes_shape_and_tokenizer_but_no_weight_of_the_backbone(place, from_scratch):
    name = f"head-{from_scratch}"
    changes = {"backbone": {"from_scratch": from_scratch}, "adapt": {"train": "head"}, "batch": SHORT}
    finetune(config(place, name, **changes), judge=False)
    model, encoder = load_task_model(run_of(place, name).child("export"))
    backbone = load_exported(open_store(str(place / "model")))
    given = dict(backbone.model.named_parameters())
    matrices = {n: p for n, p in model.backbone.named_parameters() if p.dim() > 1}
    assert len(matrices) > 8
    # The head alone is trained, so that what the export holds is what the run began with.
    assert {torch.equal(p, given[n]) for n, p in matrices.items()} == {not from_scratch}
    assert model.backbone.config == replace(backbone.model.config, pair_head=False)
    texts = ["a fine film", "the plot"]
    ids = [[encoder.tokenizer.encode(text).ids[1:-1] for text in texts]]
    assert ids == [[backbone.tokenizer.encode(t, add_special_tokens=False).ids for t in texts]]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(place):
    changes = {
        "checkpoint": {"every_steps": 20}, "batch": {"rows_per_step": 16, "min_steps": 150, "epochs": 1.0},
        "validation": {"times": 15, "patience": 0}, "adapt": {"dropout": 0.2},
    }  # fmt: skip
    finetune(config(place, "unbroken", **changes))
    run = run_of(place, "broken")
    process = subprocess.Popen(command(place, "broken", changes), process_group=0)
    while not (checkpoints := run.list("checkpoints/")) or not any("COMMIT" in i.path for i in checkpoints):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not run.exists("result.json")
    finetune(config(place, "broken", **changes))
    results = [json.loads(run_of(place, name).read("result.json")) for name in ("unbroken", "broken")]
    assert results[0] == results[1]
    steps = [record["step"] for record in steps_of(read_metrics(run))]
    assert len(steps) == 150 == max(steps)


@pytest.mark.slow
def test_a_run_that_was_cut_off_at_its_judgement_is_judged_without_more_training(place, monkeypatch):
    from trainers.finetuning import end as finetune_end
    from trainers.finetuning import worker as finetune_worker

    def cut_off(*arguments):
        raise KeyboardInterrupt

    settings = config(place, "cut", batch=SHORT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_end, "answer", cut_off)
        finetune(settings)
    run = run_of(place, "cut")
    assert run.exists("test.claim.json") and not run.exists(VERDICT)
    monkeypatch.setattr(finetune_worker, "train_seed", cut_off)  # it could come to another choice
    found = finetune(settings).seeds[0]
    assert found == json.loads(run.read("result.json"))
    monkeypatch.undo()
    unbroken = finetune(config(place, "uncut", batch=SHORT)).seeds[0]
    assert found == unbroken
    answers = judged_answers(run)
    assert [a.value for a in answers_again(run.child("export"), answers)] == [a["answer"] for a in answers]
    assert not run.list("best/") and not run.list("chosen")


def test_a_group_of_rays_workers_learns_what_this_process_alone_learns(place, ray_session):
    changes = {"batch": SHORT, "adapt": {"dropout": 0.0}}
    told = {"alone": [], "group": []}
    finetune(
        config(place, "alone", **changes), keep_model=False, judge=False, alone=True,
        on_validation=lambda step, score: told["alone"].append((step, score.records)),
    )  # fmt: skip
    changes["cluster"] = {"num_workers": 2, "cpus_per_worker": 0.5}
    found = finetune(
        config(place, "group", **changes), alone=False,
        on_validation=lambda step, score: told["group"].append((step, score.records)),
    )  # fmt: skip
    assert losses_of(run_of(place, "group")) == pytest.approx(losses_of(run_of(place, "alone")), rel=1e-4)
    assert told["group"] == told["alone"] and len(told["alone"]) == 3
    assert "test" in found.seeds[0] and run_of(place, "group").exists("export/config.json")


def test_records_that_do_not_fit_are_one_error_before_a_worker_is_started(place):
    settings = config(place, "long", batch={"max_tokens": 8}, cluster={"num_workers": 2})
    with pytest.raises(ConfigError, match="records of t are longer than 8 tokens"):
        finetune(settings)  # there is no Ray here to start one in
    assert not run_of(place, "long").list()


@pytest.mark.parametrize(
    ("cluster", "alone"),
    [
        ({}, True),
        ({"num_workers": 2}, False),
        ({"gpus_per_worker": 1.0}, False),
        ({"address": "head:6379"}, False),  # a driver in a Ray job is on the head, which has no GPU
    ],
)
def test_the_command_trains_itself_only_what_one_worker_does_here(cluster, alone, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert trains_alone(ClusterConfig(**cluster)) == alone
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not trains_alone(ClusterConfig(**cluster))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"uri": "nowhere"}}, "backbone.uri=.*nowhere holds no exported model"),
        ({"batch": {"max_tokens": 4096}}, "batch.max_tokens=4,096 is more than the backbone's 128 positions"),
        ({"batch": {"max_tokens": 8}}, "records of t are longer than 8 tokens"),
        (
            {"adapt": {"train": "lora", "lora_targets": ("qvk_proj",)}},
            "names qvk_proj, .*; nearest: qkv_proj",
        ),
        (
            {"adapt": {"train": "lora", "lora_targets": ("up_proj",)}},
            "nothing would be adapted; it has down_proj",
        ),
    ],
)
def test_bad_input_is_one_error_before_training(place, changes, message):
    with pytest.raises(ConfigError, match=message):
        finetune(config(place, "bad", **changes))


def test_a_head_alone_is_refused_where_there_is_none(place, tmp_path):
    uri = put_lines(tmp_path / "g.jsonl", [{"text": f"{n}", "label": f"{n}"} for n in range(80)])
    task = put_task(tmp_path / "g.yaml", name="g", kind="generation", data={"uri": uri})
    settings = config(place, "nothing", adapt={"train": "head"})
    settings = replace(settings, run=replace(settings.run, task=task))
    with pytest.raises(ConfigError, match="adapt.train=head trains nothing"):
        finetune(settings)


def test_a_backbone_with_a_foreign_tokenizer_is_refused(place, tmp_path):
    source, target = open_store(str(place / "model")), open_store(str(tmp_path / "model"))
    for info in source.list():
        target.put(info.path, source.read(info.path))
    fields = json.loads(target.read("config.json"))
    fields.pop("pretraining", None)  # as in a folder of others, which names no tokenizer
    target.put("config.json", json.dumps(fields).encode())
    tokenizer = json.loads(target.read("tokenizer.json"))
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][0] | {"id": 512 + number, "content": f"<{number}>"} for number in range(9)
    ]
    target.put("tokenizer.json", json.dumps(tokenizer).encode())
    with pytest.raises(ConfigError, match="521 entries, its embedding 512"):
        finetune(config(place, "foreign", backbone={"uri": str(tmp_path / "model")}))


def test_a_foreign_tokenizer_of_equal_size_is_refused_with_and_without_loading_the_weights(place, tmp_path):
    target = open_store(put_backbone(tmp_path / "model"))
    tokenizer = json.loads(target.read("tokenizer.json"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    target.put("tokenizer.json", json.dumps(tokenizer).encode())
    foreign = config(place, "foreign", backbone={"uri": target.uri})
    for read in (read_facts, lambda config: load_backbone(config, seed=0)):
        with pytest.raises(ConfigError, match="is the tokenizer .*, but the model was trained with"):
            read(foreign)
