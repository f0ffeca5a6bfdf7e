"""Each source's loss is that of its own rows, by each model; models of another tokenizer are refused."""

import argparse

import pytest
import torch
from torch.nn.functional import cross_entropy

from cluster.storage.uris import open_store
from data.shards.manifest import read_manifest
from data.shards.shards import read_fragment
from data.tokens.tokenizer import FixedTokenizer, TokenizerConfig, fix_tokenizer, train_tokenizer
from tests.token_corpus import put_text_corpus, put_token_corpus
from trainers import compare
from trainers.exported.folder import export
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig

SHAPE = ModelConfig(
    vocab_size=70, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, max_positions=16
)


@pytest.fixture(scope="module")
def fixed() -> FixedTokenizer:
    sample = ["今天天气真好，我们去公园吧。the love of Denmark and the kings of kingdoms"] * 20
    return train_tokenizer(sample, TokenizerConfig(kind="wordpiece", vocab_size=70))


@pytest.fixture(scope="module")
def corpus(fixed, tmp_path_factory) -> str:
    store = open_store(str(tmp_path_factory.mktemp("prepared")))
    fragments = {(split, source): 2 for source in ("old", "new") for split in ("train", "validation")}
    put_token_corpus(
        store, fragments, fragment_tokens=60, tokenizer=fixed.fingerprint, vocab_size=fixed.vocab_size
    )
    store.put(fixed.path, fixed.json.encode())
    return store.uri


def put_model(folder, tokenizer_json: str, vocab_size: int, seed: int):
    shape = ModelConfig(**{**SHAPE.__dict__, "vocab_size": vocab_size})
    model = build(shape, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    export(model.named_parameters(), shape, tokenizer_json.encode(), 0, open_store(str(folder)))
    return model


def test_losses_are_those_of_each_sources_rows(fixed, corpus, tmp_path, capsys):
    models = {seed: put_model(tmp_path / f"model-{seed}", fixed.json, 70, seed) for seed in (1, 2)}
    uris = {f"model-{seed}": str(tmp_path / f"model-{seed}") for seed in models}
    options = argparse.Namespace(
        corpus=corpus,
        manifest="latest",
        split="validation",
        max_rows=0,
        seq_len=None,
        rows_per_batch=3,
        words="word",
    )
    found = compare.losses(uris, options)
    manifest = read_manifest(open_store(corpus), "latest")
    for source in ("old", "new"):
        for seed, model in models.items():
            losses = []
            for fragment in manifest.select("validation", source):
                tokens = torch.from_numpy(
                    read_fragment(open_store(corpus), manifest, int(fragment)).astype("i8")
                )
                for start in range(0, len(tokens) - 1, 16):
                    row = tokens[start : start + 17]
                    logits = model.logits(model(row[None, :-1]))[0]
                    losses.append(cross_entropy(logits, row[1:], reduction="none"))
            expected = torch.cat(losses).mean().item()
            assert found[source][f"model-{seed}"].loss == pytest.approx(expected, abs=1e-4)
    assert found["old"]["model-1"].loss != pytest.approx(found["new"]["model-1"].loss, abs=1e-4)
    arguments = [part for name, uri in uris.items() for part in ("--model", f"{name}={uri}")]
    compare.main([*arguments, "--corpus", corpus])
    printed = capsys.readouterr().out
    change = found["new"]["model-2"].loss - found["new"]["model-1"].loss
    assert f"{found['new']['model-2'].loss:.3f} ({change:+.3f})" in printed


def test_a_model_whose_tokenizer_lacks_only_the_boundary_is_compared_too(fixed, corpus, tmp_path):
    """As Hugging Face's folders do: preparing adds the boundary, as the last entry."""
    without = fixed.json.replace("<|endoftext|>", "[unused]")
    put_model(tmp_path / "model", without, 70, 1)
    prepared = fix_tokenizer(without, "here", "<|endoftext|>")
    assert prepared.boundary_id == 70
    store = open_store(str(tmp_path / "prepared"))
    manifest = put_text_corpus(store, {"validation": ["今天天气", "真好。"]}, prepared, fragment_tokens=40)
    options = argparse.Namespace(
        corpus=store.uri,
        manifest="latest",
        split="validation",
        max_rows=0,
        seq_len=None,
        rows_per_batch=3,
        words="word",
    )
    [found] = compare.losses({"given": str(tmp_path / "model")}, options).values()
    assert found["given"].tokens == manifest.fragments.num_tokens.sum() - len(manifest.fragments.num_tokens)
    other = argparse.Namespace(**vars(options) | {"corpus": corpus})
    with pytest.raises(ValueError, match=f"is not the corpus's {fixed.fingerprint}"):
        compare.losses({"given": str(tmp_path / "model")}, other)


def test_models_need_names(corpus, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--model", "exports/old", "--corpus", corpus])
    assert "before=exports/old" in capsys.readouterr().err
