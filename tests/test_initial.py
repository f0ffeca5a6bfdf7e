"""A run that starts from a folder has its shape, its tokenizer and its weights, and trains on from them."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from data.reading.raw_shards import CorpusConfig
from data.tokens.tokenizer import FixedTokenizer, TokenizerConfig, train_tokenizer
from trainers.exported.folder import export, load_exported
from trainers.exported.formats import read_stored
from trainers.exported.growing import begun
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.objectives.kinds import ObjectiveConfig
from trainers.pretraining.config import BatchConfig, PretrainConfig, RunConfig
from trainers.pretraining.initial import with_initial

SAMPLE = ["今天天气真好，我们去公园吧。the love of Denmark and the kings of kingdoms"] * 20
SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
BOUNDARY = "<|endoftext|>"
OBJECTIVES = {"bert": "masked_next_sentence", "llama": "causal"}


@pytest.fixture(scope="module")
def fixed() -> FixedTokenizer:
    return train_tokenizer(SAMPLE, TokenizerConfig(kind="wordpiece", vocab_size=70))


def without_boundary(fixed: FixedTokenizer) -> str:
    """The tokenizer as Hugging Face's own are: no token opens a document."""
    return fixed.json.replace(BOUNDARY, "[unused0]")


def saved(kind: str, folder, tokenizer_json: str):
    torch.manual_seed(4)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=70, max_position_embeddings=64, **SMALL)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = transformers.BertForPreTraining(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=70, max_position_embeddings=64, num_key_value_heads=2, bos_token_id=0, **SMALL
        )
        model = transformers.LlamaForCausalLM(config)
    model.eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return model


def config_for(folder, kind="causal", **sections) -> PretrainConfig:
    base = PretrainConfig(
        run=RunConfig(init_from=str(folder)),
        objective=ObjectiveConfig(kind=kind),
        corpus=CorpusConfig(uri="raw", prepared="prepared"),
        batch=BatchConfig(seq_len=32),
    )
    return replace(base, **sections)


def logits_of(model, tokens):
    return model.logits(model(tokens))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_hugging_face_folder_gives_shape_tokenizer_and_equal_logits(fixed, kind, tmp_path):
    reference = saved(kind, tmp_path, without_boundary(fixed))
    config = with_initial(config_for(tmp_path, OBJECTIVES[kind]))
    assert config.corpus.tokenizer.path.endswith("/tokenizer.json")
    assert (config.model.hidden_size, config.model.num_layers, config.model.max_positions) == (48, 2, 64)
    assert config.model.vocab_size == 71  # the boundary of documents is new
    model = begun(config.model, 9, read_stored(open_store(str(tmp_path))))
    tokens = torch.randint(6, 70, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = reference(tokens)
        expected = theirs.prediction_logits if kind == "bert" else theirs.logits
        assert (logits_of(model, tokens)[..., :70] - expected).abs().max() < 1e-4


def of_old_norms(stored, model):
    """As converted from TensorFlow."""
    names = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    for now, before in names:
        stored = {name.replace(now, before): tensor for name, tensor in stored.items()}
    return stored


def of_a_masked_model_alone(stored, model):
    return stored | {"architectures": ["BertForMaskedLM"]}


def with_computed_frequencies(stored, model):
    names = (f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2))
    return stored | {name: model.model.rotary_emb.inv_freq.clone() for name in names}


def with_a_tied_head(stored, model):
    return stored | {
        "lm_head.weight": stored["model.embed_tokens.weight"].clone(),
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("bert", of_old_norms),
        ("bert", of_a_masked_model_alone),
        ("llama", with_computed_frequencies),
        ("llama", with_a_tied_head),
    ],
)
def test_a_folder_as_others_write_it_gives_equal_logits(fixed, kind, change, tmp_path):
    reference, path = saved(kind, tmp_path, fixed.json), tmp_path / "model.safetensors"
    changed = change(load_file(path), reference)
    fields = {name: value for name, value in changed.items() if not isinstance(value, torch.Tensor)}
    save_file({name: value for name, value in changed.items() if name not in fields}, path, {"format": "pt"})
    described = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(described))
    if change is with_a_tied_head:
        reference.lm_head.weight = reference.model.embed_tokens.weight
    model = load_exported(open_store(str(tmp_path))).model
    tokens = torch.randint(6, 70, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (logits_of(model, tokens) - reference(tokens)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_first_step_moves_the_weights_as_the_same_step_in_transformers(fixed, kind, tmp_path):
    reference = saved(kind, tmp_path, fixed.json)
    shape = with_initial(config_for(tmp_path, OBJECTIVES[kind])).model
    model = begun(shape, 9, read_stored(open_store(str(tmp_path))))
    tokens = torch.randint(6, 70, (2, 30), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(1, dims=1)
    losses = []
    for each in (model, reference):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        for _ in range(2):
            logits = logits_of(each, tokens) if each is model else each(tokens)[0]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[:2] == pytest.approx(losses[2:], abs=1e-4)


def test_an_export_of_this_project_gives_back_its_weights_and_its_tokenizer(fixed, tmp_path):
    shape = ModelConfig(vocab_size=70, hidden_size=48, num_layers=2, num_heads=4, positions="learned")
    first = build(shape, seed=1)
    export(first.named_parameters(), shape, fixed.json.encode(), 0, open_store(str(tmp_path)))
    config = with_initial(config_for(tmp_path))
    assert config.model == shape
    second = begun(config.model, 2, read_stored(open_store(str(tmp_path))))
    expected = dict(first.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in second.named_parameters())


def test_new_entries_and_a_new_pair_head_start_at_random(fixed, tmp_path):
    shape = ModelConfig(
        vocab_size=70, hidden_size=48, num_layers=2, num_heads=4, attention="bidirectional", num_token_types=2
    )
    first = build(shape, seed=1)
    export(first.named_parameters(), shape, fixed.json.encode(), 0, open_store(str(tmp_path)))
    pairs = ObjectiveConfig(kind="masked_sentence_order")
    given = config_for(tmp_path, model=ModelConfig(vocab_size=80), objective=pairs)
    config = with_initial(given)
    second = begun(config.model, 2, read_stored(open_store(str(tmp_path))))
    untouched = build(config.model, seed=2)
    assert torch.equal(second.embed_tokens.weight[:70], first.embed_tokens.weight)
    assert torch.equal(second.embed_tokens.weight[70:], untouched.embed_tokens.weight[70:])
    assert torch.equal(second.pair_head.pooler.weight, untouched.pair_head.pooler.weight)


def test_a_pair_head_that_the_objective_does_not_train_is_left_out(fixed, tmp_path):
    reference = saved("bert", tmp_path, fixed.json)
    config = with_initial(config_for(tmp_path, "masked"))
    assert not config.model.pair_head
    model = begun(config.model, 1, read_stored(open_store(str(tmp_path))))
    tokens = torch.randint(6, 70, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (logits_of(model, tokens) - reference(tokens)[0]).abs().max() < 1e-4


def test_an_objective_that_the_folder_cannot_have_is_refused_by_name(fixed, tmp_path):
    saved("llama", tmp_path, fixed.json)
    with pytest.raises(ConfigError, match=r"objective\.kind=masked needs model\.attention=bidirectional"):
        with_initial(config_for(tmp_path, "masked"))


def test_without_a_folder_nothing_changes():
    config = PretrainConfig(corpus=CorpusConfig(uri="raw", prepared="prepared"))
    assert with_initial(config) is config


def test_contradictions_are_named_at_once(fixed, tmp_path):
    saved("llama", tmp_path, fixed.json)
    with pytest.raises(ConfigError) as refused:
        with_initial(config_for(tmp_path, model=ModelConfig(hidden_size=96, num_heads=2, num_layers=2)))
    assert [line.partition("=")[0] for line in refused.value.problems] == [
        "model.hidden_size",
        "model.num_heads",
    ]
    with pytest.raises(ConfigError, match=r"batch\.seq_len=128.*max_positions=64"):
        with_initial(config_for(tmp_path, batch=BatchConfig(seq_len=128)))


def test_another_tokenizer_is_refused_by_name(fixed, tmp_path):
    saved("llama", tmp_path, fixed.json)
    other = train_tokenizer(SAMPLE, TokenizerConfig(vocab_size=300))
    (tmp_path / "other.json").write_text(other.json)
    corpus = CorpusConfig(
        uri="raw", prepared="prepared", tokenizer=TokenizerConfig(path=str(tmp_path / "other.json"))
    )
    with pytest.raises(ConfigError, match=rf"{other.fingerprint}.*{fixed.fingerprint}"):
        with_initial(config_for(tmp_path, corpus=corpus))


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.init_from=.*config\.json"):
        with_initial(config_for(tmp_path))
