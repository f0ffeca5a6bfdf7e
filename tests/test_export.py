import json
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from cluster.storage.uris import open_store
from data.shards.manifest import FRAGMENT_DTYPES, Fragments, Manifest, write_manifest
from data.tokens.tokenizer import fix_tokenizer
from trainers import export as export_module
from trainers.checkpoints.keeping import CheckpointConfig
from trainers.checkpoints.state import VALUE, StateSlice
from trainers.checkpoints.writer import CheckpointWriter
from trainers.export import main
from trainers.exported import folder as exported_folder
from trainers.exported.folder import export, load_exported
from trainers.exported.replacing import ForeignFolderError
from trainers.exported.sampling import SamplingConfig, generate
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig

BOUNDARY = "<|endoftext|>"
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer"
SHAPE = dict(hidden_size=48, num_layers=3, num_heads=4, intermediate_size=80, max_positions=96)
SHAPES = {
    "plain": dict(),
    "grouped": dict(num_kv_heads=2),
    "tied": dict(tie_embeddings=True),
    "grouped-tied": dict(num_kv_heads=1, tie_embeddings=True, rope_theta=50_000.0, norm_eps=1e-3),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        [TEXT],
        BpeTrainer(
            vocab_size=300, special_tokens=[BOUNDARY], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return trained


def exported_model(tokenizer, shape, uri, **options):
    model = build(ModelConfig(vocab_size=tokenizer.get_vocab_size(), **SHAPE, **shape), seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    boundary_id = tokenizer.token_to_id(BOUNDARY)
    export(
        model.named_parameters(),
        model.config,
        tokenizer.to_str().encode(),
        boundary_id,
        open_store(uri),
        **options,
    )
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_computes_the_same_logits(tokenizer, shape, tmp_path):
    model = exported_model(tokenizer, shape, str(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM and loaded.dtype == torch.float32
    tokens = torch.randint(300, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens)), loaded(tokens).logits
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_continues_a_prompt_with_the_same_tokens(tokenizer, shape, tmp_path):
    model = exported_model(tokenizer, shape, str(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [0, *tokenizer.encode("To be").ids]
    theirs = loaded.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(
            1, len(prompt)
        ),  # else the boundary, which is the padding too, would be masked
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    ours = generate(model, [prompt], SamplingConfig(max_new_tokens=12, temperature=0))
    assert ours[0] == theirs[0, len(prompt) :].tolist()


def test_transformers_reads_the_same_tokenizer(tokenizer, tmp_path):
    exported_model(tokenizer, {}, str(tmp_path))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids
    assert loaded.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert loaded.bos_token == loaded.eos_token == loaded.pad_token == BOUNDARY
    assert loaded.model_max_length == 96 and loaded.padding_side == "left"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_loading_gives_back_what_was_exported(tokenizer, shape, tmp_path):
    model = exported_model(tokenizer, shape, str(tmp_path))
    loaded = load_exported(open_store(str(tmp_path)))
    assert loaded.tokenizer.to_str() == tokenizer.to_str()
    assert loaded.boundary_id == tokenizer.token_to_id(BOUNDARY)
    expected = dict(model.named_parameters())
    found = dict(loaded.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_transformers_saved_loads_here(tokenizer, tmp_path):
    model = exported_model(tokenizer, SHAPES["grouped-tied"], str(tmp_path))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    (tmp_path / "again/tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    loaded = load_exported(open_store(str(tmp_path / "again"))).model
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded.logits(loaded(tokens)), model.logits(model(tokens)))


def test_a_large_model_is_cut_into_files_that_transformers_joins(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(exported_folder, "MAX_FILE_BYTES", 100_000)
    model = exported_model(tokenizer, {}, str(tmp_path))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    assert all(file.stat().st_size < 110_000 for file in files)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.logits(model(tokens))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
        loaded = load_exported(open_store(str(tmp_path))).model
        assert (theirs - expected).abs().max() < 1e-4
        assert torch.equal(loaded.logits(loaded(tokens)), expected)


def test_exporting_again_leaves_no_trace_of_the_larger_export(tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as smaller:
        smaller.setattr(exported_folder, "MAX_FILE_BYTES", 100_000)
        exported_model(tokenizer, {}, str(tmp_path))
    exported_model(tokenizer, {"tie_embeddings": True}, str(tmp_path))
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_bf16_export_halves_the_file(tokenizer, tmp_path):
    exported_model(tokenizer, {}, str(tmp_path), dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), "missing, the first: norm.weight"),
        (lambda state: state.update({"norm.bias": torch.zeros(48)}), "norm.bias"),
        (lambda state: state.update({"norm.weight": torch.zeros(47)}), r"\(47,\).*\(48,\)"),
    ],
    ids=["missing", "unknown", "other shape"],
)
def test_weights_of_another_model_are_refused_and_leave_no_loadable_export(
    tokenizer, tmp_path, change, message
):
    config = ModelConfig(vocab_size=300, **SHAPE)
    state = dict(build(config, 0).named_parameters())
    change(state)
    with pytest.raises(ValueError, match=message):
        export(state, config, tokenizer.to_str().encode(), 0, open_store(str(tmp_path)))
    with pytest.raises(FileNotFoundError):
        load_exported(open_store(str(tmp_path)))


def test_a_shape_that_the_decoder_lacks_is_refused_by_name(tokenizer, tmp_path):
    exported_model(tokenizer, {}, str(tmp_path))
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"attention_bias": True}))
    with pytest.raises(ValueError, match="attention_bias=True"):
        load_exported(open_store(str(tmp_path)))


@pytest.fixture
def run(tokenizer, tmp_path):
    """A run's folder with checkpoints of the steps 1 and 2; returns it and the models."""
    fixed = fix_tokenizer(tokenizer.to_str(), "test", BOUNDARY)
    corpus, store = open_store(str(tmp_path / "prepared")), open_store(str(tmp_path / "run"))
    corpus.put(fixed.path, fixed.json.encode())
    fragments = Fragments.from_columns({name: [] for name in FRAGMENT_DTYPES})
    manifest = Manifest(
        tokenizer=fixed.fingerprint,
        vocab_size=fixed.vocab_size,
        boundary_id=fixed.boundary_id,
        token_dtype="uint16",
        sources=(),
        shards=(),
        fragments=fragments,
        duplicates={},
        set_aside={},
    )
    write_manifest(corpus, manifest)
    store.put("manifest.json", json.dumps({"digest": manifest.digest}).encode())
    sections = {"model": SHAPE | {"vocab_size": 0}, "corpus": {"prepared": corpus.uri}}
    store.put("config.yaml", yaml.safe_dump(sections).encode())
    config = ModelConfig(vocab_size=fixed.vocab_size, **SHAPE)
    models = {step: build(config, seed=step) for step in (1, 2)}
    with CheckpointWriter(store, CheckpointConfig(), rank=0, world_size=1, attempt=1) as writer:
        for step, model in models.items():
            slices = [
                StateSlice(name, VALUE, tuple(p.shape), 0, p.detach().flatten())
                for name, p in model.named_parameters()
            ]
            writer.save(step, slices, {})
    return store, models


@pytest.mark.parametrize(("which", "step"), [("1", 1), ("last", 2)])
def test_the_entry_exports_the_checkpoint_that_was_asked_for(run, which, step, tmp_path, capsys):
    store, models = run
    main(["--run", store.uri, "--step", which, "--output", str(tmp_path / "out")])
    loaded = dict(load_exported(open_store(str(tmp_path / "out"))).model.named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in models[step].named_parameters())
    assert f"step-{step:08d}" in capsys.readouterr().out


def test_the_entry_replaces_a_model_of_others_only_where_it_is_told_to(run, tmp_path):
    store, models = run
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "out", max_shard_size="20KB")
    (tmp_path / "out/models").mkdir()
    (tmp_path / "out/models/weights.bin").write_bytes(b"kept")
    arguments = ["--run", store.uri, "--step", "last", "--output", str(tmp_path / "out")]
    with pytest.raises(ForeignFolderError, match=r"out holds config\.json.*--overwrite"):
        main(arguments)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 32
    main([*arguments, "--overwrite"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.norm.weight, models[2].norm.weight)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "out/models/weights.bin").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--run", "/nowhere"], "/nowhere/config.yaml"),
        (["--run", "RUN", "--step", "9"], "step 9"),
        (["--run", "RUN"], "best"),
        (["--run", "RUN", "--step", "newest"], "--step newest"),
    ],
)
@pytest.mark.slow
def test_the_entry_says_in_a_line_what_is_missing(run, arguments, named, tmp_path):
    given = [run[0].uri if argument == "RUN" else argument for argument in arguments]
    command = [sys.executable, export_module.__file__, *given, "--output", str(tmp_path / "out")]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode != 0
    assert named in failed.stderr and "Traceback" not in failed.stderr
