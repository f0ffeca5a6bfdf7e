"""What a run starts from is known by its content, and held against the bytes that are loaded."""

import json
import os
import shutil
from pathlib import Path

import pytest
from task_files import BACKBONES, put_backbone, put_lines, put_task, sentences

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers.exported.folder import load_exported
from trainers.exported.formats import read_stored
from trainers.exported.model_digest import content_digest, hashed, listing_digest
from trainers.exported.model_files import ModelFolderError
from trainers.finetuning.backbone import (
    ORIGIN,
    OtherBackboneError,
    backbone_digest,
    backbone_name,
    load_backbone,
)
from trainers.finetuning.config import FinetuneConfig
from trainers.finetuning.run import finetune
from trainers.pretraining.config import PretrainConfig
from trainers.pretraining.initial import initial_values
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task
from tune.trials.finetuning import FinetuneTrials


@pytest.fixture
def model(tmp_path):
    put_backbone(tmp_path / "model")
    return str(tmp_path / "model")


def config_of(tmp_path, model):
    uri = put_lines(tmp_path / "records.jsonl", sentences(120))
    task = put_task(tmp_path / "task.yaml", name="t", kind="classification", data={"uri": uri})
    return from_dict(
        FinetuneConfig,
        {
            "run": {"task": task, "prepared": str(tmp_path / "prepared"), "storage": str(tmp_path / "runs")},
            "backbone": {"uri": model},
            "batch": {"min_steps": 1, "max_steps": 1},
            "engine": {"precision": "fp32", "zero_stage": 0},
        },
    )


def replaced(model):
    """Another model of the same shape in the same place: sizes and times stay."""
    path = Path(model, "model.safetensors")
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", BACKBONES)
def test_what_is_loaded_has_the_digest_of_the_folder_wherever_it_lies_and_whenever_it_was_written(
    tmp_path, kind
):
    digest = content_digest(open_store(put_backbone(tmp_path / "model", BACKBONES[kind])))
    shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "README.md").write_text("not of the model")
    source = hashed(open_store(str(tmp_path / "copy")))
    load_exported(source)
    assert len(digest) == 32 and source.digest() == digest == content_digest(
        open_store(str(tmp_path / "copy"))
    )
    replaced(str(tmp_path / "copy"))
    assert content_digest(open_store(str(tmp_path / "copy"))) != digest


def test_a_file_that_changes_between_two_reads_is_no_model(model):
    source = hashed(open_store(model))
    source.read("config.json")
    open_store(model).put("config.json", b"{}")
    with pytest.raises(ModelFolderError, match="config.json changed while it was read"):
        source.read("config.json")


def test_a_backbone_that_was_replaced_in_place_is_loaded_by_no_run_and_no_trial(tmp_path, model):
    config = config_of(tmp_path, model)
    prepared = prepare_task(load_task(config.run.task), open_store(config.run.prepared))
    digest = backbone_digest(config)
    trials = FinetuneTrials(config, prepared, digest)
    load_backbone(config, 0, digest)
    assert trials.changed() is None
    replaced(model)
    with pytest.raises(OtherBackboneError, match=f"was replaced while the run goes on: {digest} there"):
        load_backbone(config, 0, digest)
    with pytest.raises(OtherBackboneError):
        finetune(config, prepared=prepared, judge=False, backbone=digest)
    assert not open_store(str(tmp_path / "runs")).exists("finetune/seed-0/result.json")
    assert trials.changed().startswith(
        f"base.backbone.uri={model} was replaced while the sweep goes on: {digest}"
    )


def test_a_run_of_before_there_was_a_digest_of_content_goes_on_under_the_name_that_it_has(tmp_path, model):
    config, run = config_of(tmp_path, model), open_store(str(tmp_path / "run"))
    digest = backbone_digest(config)
    assert backbone_name(run, config, digest) == digest
    read = ("config.json", "model.safetensors", "tokenizer.json")
    former = listing_digest([info for info in open_store(model).list() if info.path in read])
    run.put(ORIGIN, json.dumps({"backbone": former}).encode())
    assert backbone_name(run, config, digest) == former
    os.utime(f"{model}/config.json", (1, 1))
    assert backbone_name(run, config, digest) not in (former, digest)  # and so it is refused
    run.put(ORIGIN, json.dumps({"backbone": digest}).encode())
    assert backbone_name(run, config, digest) == digest


def test_a_model_that_pretraining_starts_from_is_held_against_what_was_pinned(model):
    config = from_dict(
        PretrainConfig, {"run": {"init_from": model}, "corpus": {"uri": "raw", "prepared": "p"}}
    )
    shape = read_stored(open_store(model)).config
    digest = content_digest(open_store(model))
    values = initial_values(config, shape, digest)
    name, weight = next(iter(read_stored(open_store(model)).parameters()))
    assert values(name, weight.shape).equal(weight.float())
    replaced(model)
    with pytest.raises(
        ConfigError, match=f"holds another model than the run was started from: {digest} there"
    ):
        initial_values(config, shape, digest)
