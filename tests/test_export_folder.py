"""An export deletes and replaces what an export of this project wrote, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from task_files import put_backbone, small_tokenizer

from cluster.configuration.config import to_yaml
from cluster.console.errors import ConfigError
from cluster.storage.uris import Store, open_store
from trainers.exported import folder as exported_folder
from trainers.exported.folder import export, load_exported
from trainers.exported.formats import CONFIG, TASK
from trainers.exported.model_files import INDEX, WEIGHTS
from trainers.exported.replacing import UNFINISHED, ForeignFolderError, foreign_problem
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.pretraining.config import PretrainConfig
from trainers.pretraining.run_folder import check_unchanged

SHAPE = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=128)
OTHERS_FILES = (
    "models/production/weights.bin",
    "model-cards/notes.md",
    "model-00001-of-00002.safetensors.bak",
    "old/model.safetensors",
    "old/model-00001-of-00002.safetensors",
    "model.bin",
    "modelling.py",
    "models.safetensors",
)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported_folder, "MAX_FILE_BYTES", 40_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model*") if path.is_file())


def put_export(folder: Path, *, overwrite: bool = False, **shape: int) -> None:
    config, tokenizer = ModelConfig(vocab_size=512, **{**SHAPE, **shape}), small_tokenizer()
    state = build(config, 1).named_parameters()
    export(state, config, tokenizer.json.encode(), 0, open_store(str(folder)), overwrite=overwrite)


def saved_by_transformers(folder: Path, **options: str) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("size", ["50KB", "1GB"])
def test_a_model_that_transformers_saved_is_left_as_it_is(tmp_path: Path, size: str) -> None:
    saved_by_transformers(tmp_path, max_shard_size=size)
    before = contents(tmp_path)
    assert (INDEX in before) == (size == "50KB")
    with pytest.raises(ForeignFolderError, match=r"holds config\.json.*--overwrite"):
        put_export(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", ["50KB", "1GB"])
def test_overwriting_replaces_a_foreign_model_and_nothing_beside_it(
    tmp_path: Path, size: str, small_files: None
) -> None:
    saved_by_transformers(tmp_path, max_shard_size=size)
    for path in OTHERS_FILES:
        open_store(str(tmp_path)).put(path, path.encode())
    put_export(tmp_path, overwrite=True)
    assert all((tmp_path / path).read_bytes() == path.encode() for path in OTHERS_FILES)
    index = json.loads((tmp_path / INDEX).read_bytes())["weight_map"]
    found = [name for name in weight_files(tmp_path) if name not in OTHERS_FILES]
    assert found == sorted({INDEX, *index.values()})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = load_exported(open_store(str(tmp_path))).model.embed_tokens.weight
    assert torch.equal(loaded["model.embed_tokens.weight"], expected)


def test_exporting_again_deletes_its_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as smaller:
        smaller.setattr(exported_folder, "MAX_FILE_BYTES", 40_000)
        put_export(tmp_path)
    number = len(weight_files(tmp_path)) - 1
    assert number > 2
    names = [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]
    assert weight_files(tmp_path) == [*names, INDEX]  # as transformers names them
    shard = "model-00001-of-00099.safetensors"  # somebody's, and no part of the export
    for path in (*OTHERS_FILES, shard):
        open_store(str(tmp_path)).put(path, path.encode())
    put_export(tmp_path)
    assert all((tmp_path / path).read_bytes() == path.encode() for path in (*OTHERS_FILES, shard))
    assert not any((tmp_path / name).exists() for name in (*names, INDEX))
    assert load_file(tmp_path / WEIGHTS).keys()


def test_what_an_earlier_version_wrote_is_replaced(tmp_path: Path, small_files: None) -> None:
    put_export(tmp_path)
    index = json.loads((tmp_path / INDEX).read_bytes())
    for name in sorted(set(index["weight_map"].values())):
        (tmp_path / name).rename(tmp_path / f"{name[:11]}.safetensors")
    index["weight_map"] = {k: f"{v[:11]}.safetensors" for k, v in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert load_exported(open_store(str(tmp_path)))
    put_export(tmp_path)
    assert all("-of-" in name for name in weight_files(tmp_path) if name != INDEX)


def test_a_model_that_was_trained_on_in_transformers_is_foreign(tmp_path: Path) -> None:
    put_export(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # which keeps our key in config.json
    assert "pretraining" in json.loads((tmp_path / CONFIG).read_bytes())
    before = contents(tmp_path)
    with pytest.raises(ForeignFolderError, match=r"config\.json"):
        put_export(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        WEIGHTS, INDEX, "model-00002-of-00003.safetensors", "model-00001.safetensors", "tokenizer.json",
        "tokenizer_config.json", "generation_config.json", TASK,
    ],
)  # fmt: skip
def test_a_part_of_a_foreign_model_refuses_an_export_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ForeignFolderError, match=name):
        put_export(tmp_path)
    assert contents(tmp_path) == {name: b"{}"}


def test_a_foreign_file_that_would_be_read_in_place_of_an_export_refuses_it(
    tmp_path: Path, small_files: None
) -> None:
    put_export(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"somebody's")
    with pytest.raises(ForeignFolderError, match=rf"holds {WEIGHTS}"):
        put_export(tmp_path)


class Cut(Exception):
    pass


@pytest.mark.parametrize("put", range(1, 9))
def test_an_export_that_was_cut_off_does_not_load_and_is_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_files: None, put: int
) -> None:
    """Whatever was written before, and whatever the next export writes."""
    put_export(tmp_path)
    (tmp_path / "model-cards").mkdir()
    (tmp_path / "model-cards/notes.md").write_text("kept")
    left = put
    original = type(open_store(str(tmp_path))).put

    def cut(self: Store, path: str, data: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Cut
        original(self, path, data)

    with monkeypatch.context() as patched:
        patched.setattr(type(open_store(str(tmp_path))), "put", cut)
        with pytest.raises(Cut):
            put_export(tmp_path, num_layers=3)
    if put > 1:
        with pytest.raises(FileNotFoundError):
            load_exported(open_store(str(tmp_path)))
    monkeypatch.setattr(exported_folder, "MAX_FILE_BYTES", 1 << 30)
    put_export(tmp_path)
    assert weight_files(tmp_path) == [WEIGHTS]
    assert not (tmp_path / UNFINISHED).exists()
    assert (tmp_path / "model-cards/notes.md").read_text() == "kept"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 2


def test_a_foreign_model_in_the_place_of_a_cut_export_is_not_taken_for_ours(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path)
    (tmp_path / UNFINISHED).write_text(json.dumps({"files": [WEIGHTS]}))
    before = contents(tmp_path)
    for config in (before[CONFIG], b"{", b"[]"):
        (tmp_path / CONFIG).write_bytes(config)
        with pytest.raises(ForeignFolderError):
            put_export(tmp_path)
    assert contents(tmp_path)[WEIGHTS] == before[WEIGHTS]


def test_names_that_lead_out_of_the_folder_are_not_deleted(tmp_path: Path) -> None:
    folder, target = tmp_path / "a/b", tmp_path / WEIGHTS
    put_export(folder)
    target.write_text("kept")
    names = ["../../model.safetensors", str(target), "x/../model.safetensors", "tokenizer.json", 7]
    (folder / UNFINISHED).write_text(json.dumps({"files": names}))
    put_export(folder)
    assert target.read_text() == "kept"


def test_a_run_does_not_start_where_a_foreign_model_lies_in_its_export_folder(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    check_unchanged(run, PretrainConfig())
    saved_by_transformers(tmp_path / "export")
    with pytest.raises(ConfigError, match=r"export holds config\.json.*elsewhere"):
        check_unchanged(run, PretrainConfig())


@pytest.mark.parametrize("name", [WEIGHTS, "model-00001-of-00002.safetensors", INDEX])
def test_weights_without_config_json_are_nobodys_cut_export_where_no_run_has_begun(
    tmp_path: Path, name: str
) -> None:
    run = open_store(str(tmp_path))
    run.put(f"export/{name}", b"somebody's, still being copied")
    with pytest.raises(ConfigError, match=f"export holds {re.escape(name)}.*elsewhere"):
        check_unchanged(run, PretrainConfig())
    run.put("config.yaml", to_yaml(PretrainConfig()).encode())  # an earlier version's run, which left them
    check_unchanged(run, PretrainConfig())


def test_weights_alone_which_an_earlier_version_left_do_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"cut")
    target = open_store(str(tmp_path))
    assert foreign_problem(target) is None
    put_export(tmp_path, overwrite=not foreign_problem(target))
    assert load_exported(target)


def test_the_exports_of_the_tests_are_ours(tmp_path: Path) -> None:
    put_backbone(tmp_path)
    assert foreign_problem(open_store(str(tmp_path))) is None
