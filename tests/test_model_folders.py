"""A model's folder that is damaged, or was made to do harm, is refused in one line that names the file."""

import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.console.errors import UserError
from cluster.storage.uris import Store, open_store
from data.tokens.tokenizer import FixedTokenizer, TokenizerConfig, train_tokenizer
from trainers.exported.bert import config_from_bert
from trainers.exported.folder import export, load_exported
from trainers.exported.formats import CONFIG, TASK, read_stored
from trainers.exported.llama import config_from_llama
from trainers.exported.model_files import INDEX, WEIGHTS, read_header
from trainers.finetuning.backbone import backbone_digest, read_facts
from trainers.finetuning.config import BackboneConfig, FinetuneConfig
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.pretraining.config import PretrainConfig
from trainers.pretraining.initial import with_initial
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.export import export_task_model, load_task_model, read_stored_task
from trainers.tasks.heads import AdaptConfig, TaskModel
from trainers.tasks.task import TaskConfig, TaskFiles

LLAMA = ModelConfig(
    vocab_size=32, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, max_positions=32
)
BERT = replace(
    LLAMA, num_token_types=2, pair_head=True, tie_embeddings=True, attention="bidirectional", positions="learned",
    norm="layernorm", norm_place="post", activation="gelu", biases=True, head="transform",
)  # fmt: skip
SHAPES = {"llama": LLAMA, "bert": BERT, "own": replace(LLAMA, attention="bidirectional")}


@pytest.fixture(scope="module")
def fixed() -> FixedTokenizer:
    return train_tokenizer(["one two three four"] * 9, TokenizerConfig(kind="wordpiece", vocab_size=25))


def put_model(folder: Path, fixed: FixedTokenizer, shape: ModelConfig) -> Store:
    store = open_store(str(folder))
    export(build(shape, 1).named_parameters(), shape, fixed.json.encode(), 0, store)
    return store


def put_task_model(folder: Path, fixed: FixedTokenizer, shape: ModelConfig, kind: str) -> Store:
    exported = load_exported(put_model(folder / "backbone", fixed, shape))
    task = TaskConfig(
        name="t",
        kind=kind,  # type: ignore[arg-type]
        labels=("a", "b") if kind == "classification" else (),
        data=TaskFiles(uri="elsewhere.jsonl"),
    )
    model = TaskModel(exported.model, task, AdaptConfig(), seed=0)
    tokenizer, pad = framed(exported.tokenizer, exported.boundary_id, model.causal)
    store = open_store(str(folder / "export"))
    export_task_model(model, Encoder(task, tokenizer, pad, 32, False, model.causal), 0, store)
    return store


def damaged(content: bytes, seed: int, until: int | None = None) -> bytes:
    """Some bits flipped, or a piece taken out, or the end; within the first `until` bytes."""
    dice, data, size = random.Random(seed), bytearray(content), min(until or len(content), len(content))
    match dice.randrange(3):
        case 0:
            for _ in range(dice.randrange(1, 4)):
                data[dice.randrange(size)] ^= 1 << dice.randrange(8)
        case 1:
            at = dice.randrange(size)
            del data[at : at + dice.randrange(1, 30)]
        case 2:
            del data[dice.randrange(size) :]
    return bytes(data)


def header_bytes(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def refusal(read: Callable[[], Any]) -> str | None:
    """What a user is told; None if it could be read after all. Anything but a refusal is not caught."""
    try:
        read()
    except (UserError, FileNotFoundError) as error:
        return str(error)
    return None


def initial(store: Store) -> PretrainConfig:
    given = PretrainConfig()
    corpus = replace(given.corpus, uri="raw", prepared="prepared")
    batch, run = replace(given.batch, seq_len=16), replace(given.run, init_from=store.uri)
    return with_initial(replace(given, batch=batch, run=run, corpus=corpus))


def facts(store: Store) -> Any:
    config = FinetuneConfig(backbone=BackboneConfig(uri=store.uri))
    return backbone_digest(config), read_facts(config)


def check_refusals(store: Store, file: str, read: Callable[[Store], Any], seeds: range) -> None:
    """Whatever is damaged, reading ends in a refusal of one line that names the folder, or in a model."""
    content, refused = store.read(file), 0
    for seed in seeds:
        store.put(file, damaged(content, seed, header_bytes(content) if file == WEIGHTS else None))
        told = refusal(lambda: read(store))
        if told is not None:
            refused += 1
            assert store.uri in told and "\n" not in told, (seed, told)
    store.put(file, content)
    assert refusal(lambda: read(store)) is None
    assert refused > len(seeds) // 2


FILES = (CONFIG, WEIGHTS, "tokenizer.json")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_damaged_folder_is_refused_by_name_or_read(
    fixed: FixedTokenizer, tmp_path: Path, shape: str, file: str
) -> None:
    check_refusals(put_model(tmp_path, fixed, SHAPES[shape]), file, load_exported, range(60))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("read", [initial, facts])
def test_a_run_and_a_fine_tuning_refuse_a_damaged_folder_before_they_start(
    fixed: FixedTokenizer, tmp_path: Path, read: Callable[[Store], Any], file: str
) -> None:
    check_refusals(put_model(tmp_path, fixed, LLAMA), file, read, range(60))


@pytest.mark.slow
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, TASK, "tokenizer.json"])
@pytest.mark.parametrize(
    ("shape", "kind"), [("llama", "generation"), ("bert", "classification"), ("own", "regression")]
)
def test_a_damaged_task_model_is_refused_by_name_or_read(
    fixed: FixedTokenizer, tmp_path: Path, shape: str, kind: str, file: str
) -> None:
    store = put_task_model(tmp_path, fixed, SHAPES[shape], kind)
    check_refusals(store, file, read_stored_task, range(40))
    check_refusals(store, file, load_task_model, range(40, 80))


def test_a_few_damages_of_each_file_end_in_a_line(fixed: FixedTokenizer, tmp_path: Path) -> None:
    store = put_model(tmp_path, fixed, LLAMA)
    for file in FILES:
        check_refusals(store, file, load_exported, range(1_000, 1_010))


def changed(store: Store, file: str, **fields: Any) -> None:
    store.put(file, json.dumps(json.loads(store.read(file)) | fields).encode())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 1 << 40}, "hidden_size=1099511627776 is no whole number"),
        ({"hidden_size": 8.5}, "hidden_size=8.5"),
        ({"hidden_size": "8"}, "hidden_size='8'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": 3, "head_dim": None, "num_key_value_heads": None}, "num_heads=3 does not divide"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_hidden_layers": 10_000_000}, "config.json describes a model of 10,000,000 layers"),
        ({"intermediate_size": 10_000_000}, "config.json describes a model of 2 layers and 480,"),
        ({"vocab_size": 10_000_000}, "config.json describes a model"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is no finite number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
        ({"rms_norm_eps": None, "rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta=inf"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
        ({"model_type": ["llama"]}, "model_type="),
        ({"bos_token_id": -1}, "bos_token_id=-1"),
        ({"bos_token_id": [1]}, "bos_token_id="),
        ({"bos_token_id": 1 << 40}, "bos_token_id="),
        ({"intermediate_size": 24}, "config.json describes a model of 2 layers"),
        ({"intermediate_size": 8}, "down_proj.weight is of shape (8, 16)"),
    ],
)  # fmt: skip
def test_a_number_that_no_model_has_is_refused_by_its_key(
    fixed: FixedTokenizer, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    store = put_model(tmp_path, fixed, LLAMA)
    changed(store, CONFIG, **fields)
    told = refusal(lambda: load_exported(store))
    assert told and named in told and store.uri in told


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[" * 100_000, "is not readable JSON"),
        (b"[]", "is no JSON object"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"", "is not readable JSON"),
    ],
)
@pytest.mark.parametrize("file", [CONFIG, INDEX])
def test_json_that_is_none_is_refused_by_its_file(
    fixed: FixedTokenizer, tmp_path: Path, file: str, content: bytes, named: str
) -> None:
    store = put_model(tmp_path, fixed, LLAMA)
    store.put(file, content)
    told = refusal(lambda: load_exported(store))
    assert told and f"{store.uri}/{file} {named}" in told


@pytest.mark.parametrize(
    "named", ["../model.safetensors", "/etc/passwd", "x/model.safetensors", "config.json", 7, None]
)
def test_an_index_names_files_of_the_folder_alone(
    fixed: FixedTokenizer, tmp_path: Path, named: object
) -> None:
    store = put_model(tmp_path, fixed, LLAMA)
    store.put(INDEX, json.dumps({"weight_map": {"norm.weight": named}}).encode())
    told = refusal(lambda: load_exported(store))
    assert told and f"{store.uri}/{INDEX} names {named!r}" in told


def test_defaults_of_a_config_are_those_of_the_transformers_classes() -> None:
    llama, bert = transformers.LlamaConfig(), transformers.BertConfig()
    ours = config_from_llama({}, "here")
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers) == (
        llama.vocab_size,
        llama.hidden_size,
        llama.num_hidden_layers,
    )
    assert (ours.num_heads, ours.kv_heads) == (llama.num_attention_heads, llama.num_key_value_heads)
    assert (ours.intermediate_size, ours.max_positions) == (
        llama.intermediate_size,
        llama.max_position_embeddings,
    )
    assert (ours.norm_eps, ours.tie_embeddings) == (llama.rms_norm_eps, llama.tie_word_embeddings)
    assert ours.rope_theta == llama.rope_parameters["rope_theta"]
    ours = config_from_bert({"architectures": ["BertForMaskedLM"]}, "here")
    assert (ours.vocab_size, ours.hidden_size, ours.num_layers) == (
        bert.vocab_size,
        bert.hidden_size,
        bert.num_hidden_layers,
    )
    assert (ours.num_heads, ours.intermediate_size) == (bert.num_attention_heads, bert.intermediate_size)
    assert (ours.max_positions, ours.num_token_types) == (bert.max_position_embeddings, bert.type_vocab_size)
    assert (ours.norm_eps, ours.tie_embeddings) == (bert.layer_norm_eps, bert.tie_word_embeddings)


def test_a_folder_without_its_epsilon_computes_as_transformers_does(
    fixed: FixedTokenizer, tmp_path: Path
) -> None:
    store = put_model(tmp_path, fixed, LLAMA)
    fields = json.loads(store.read(CONFIG))
    del fields["rms_norm_eps"]
    store.put(CONFIG, json.dumps(fields).encode())
    ours, tokens = load_exported(store).model, torch.arange(20)[None]
    assert ours.config.norm_eps == 1e-6 != LLAMA.norm_eps
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), theirs, atol=1e-5, rtol=1e-5)


def test_each_header_that_we_write_reads_as_the_library_reads_it(
    fixed: FixedTokenizer, tmp_path: Path
) -> None:
    store = put_model(tmp_path, fixed, BERT)
    expected = load_file(tmp_path / WEIGHTS)
    assert {n: (t.shape, t.dtype) for n, t in read_header(store, WEIGHTS).items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }


def put_safetensors(store: Store, header: object, data: bytes = b"", length: int | None = None) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if length is None else length
    store.put(WEIGHTS, struct.pack("<Q", size) + encoded + data)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({}, b"", 1 << 62),
        ({}, b"", 0),
        (b"[" * 50_000, b"", None),
        (b"[]", b"", None),
        ({"a": 1}, b"", None),
        ({"a": {**ONE, "dtype": "F31"}}, bytes(8), None),
        ({"a": {**ONE, "dtype": ["F32"]}}, bytes(8), None),
        ({"a": {**ONE, "shape": [3]}}, bytes(8), None),
        ({"a": {**ONE, "shape": [-2]}}, bytes(8), None),
        ({"a": {**ONE, "shape": [True, 2]}}, bytes(8), None),
        ({"a": {**ONE, "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}, b"", None),
        ({"a": ONE}, bytes(7), None),
        ({"a": ONE}, bytes(9), None),
        ({"a": ONE, "b": ONE}, bytes(8), None),
        ({"a": {**ONE, "data_offsets": [8, 16]}}, bytes(16), None),
        ({"a": {**ONE, "data_offsets": [0]}}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
    ],
)
def test_junk_for_weights_is_refused_by_its_file(
    fixed: FixedTokenizer, tmp_path: Path, header: object, data: bytes, length: int | None
) -> None:
    store = put_model(tmp_path, fixed, LLAMA)
    put_safetensors(store, header, data, length)
    told = refusal(lambda: read_stored(store))
    assert told and told.startswith(f"{store.uri}/{WEIGHTS} is not readable safetensors: ")
    assert "\n" not in told


def with_weights(store: Store, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = Path(store.uri.removeprefix("file://")) / WEIGHTS
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_a_tokenizer_with_more_entries_than_the_embedding_is_refused(
    fixed: FixedTokenizer, tmp_path: Path
) -> None:
    """Its last ids would end what is asked of the model in an IndexError."""
    store = put_model(tmp_path, fixed, replace(LLAMA, vocab_size=fixed.vocab_size - 1))
    told = refusal(lambda: load_exported(store))
    assert told and f"{store.uri}/tokenizer.json has {fixed.vocab_size} entries, its embedding " in told


def test_whole_numbers_are_no_weights(fixed: FixedTokenizer, tmp_path: Path) -> None:
    store = put_model(tmp_path, fixed, LLAMA)
    with_weights(store, lambda w: w.update({"model.norm.weight": torch.ones(8, dtype=torch.int32)}))
    told = refusal(lambda: load_exported(store))
    assert told and "norm.weight holds torch.int32" in told


def test_a_weight_of_a_task_model_is_not_stretched_to_its_place(
    fixed: FixedTokenizer, tmp_path: Path
) -> None:
    store = put_task_model(tmp_path, fixed, BERT, "classification")
    with_weights(store, lambda w: w.update({"classifier.weight": torch.ones(1, 8)}))
    for read in (read_stored_task, load_task_model):
        told = refusal(lambda read=read: read(store))  # type: ignore[misc]
        assert told and r"head.out.weight is of shape (1, 8)" in told


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task": None}, "name"),
        ({"task": {"name": "t", "kind": "poems", "data": {"uri": "x"}}}, "kind"),
        ({"pooling": "median"}, "pooling"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": 33}, "max_tokens=33 is more than its 32 positions"),
        ({"scale": [0.0]}, "scale"),
        ({"scale": [0.0, float("nan")]}, "scale"),
        ({"scale": "01"}, "scale"),
    ],
)
def test_a_task_that_is_none_is_refused_by_its_key(
    fixed: FixedTokenizer, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    store = put_task_model(tmp_path, fixed, LLAMA, "classification")
    changed(store, TASK, **fields)
    told = refusal(lambda: read_stored_task(store))
    assert told and told.startswith(f"{store.uri}/{TASK}: ") and named in told
