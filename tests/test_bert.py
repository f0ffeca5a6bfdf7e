"""An encoder goes to transformers' BERT and comes back, and computes the same either way."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.storage.uris import open_store
from data.tokens.tokenizer import FixedTokenizer, TokenizerConfig, train_tokenizer
from trainers.exported.bert import SWITCHES, fits_bert
from trainers.exported.folder import export, load_exported
from trainers.model.backbone import Backbone, build
from trainers.model.shape import ModelConfig

SAMPLE = ["今天天气真好，我们去公园吧。the love of Denmark and the kings of kingdoms"] * 20
SMALL = dict(hidden_size=48, num_layers=3, num_heads=4, intermediate_size=80, max_positions=64)
SHAPES = {
    "pretraining": ModelConfig(**SMALL, **SWITCHES, num_token_types=2, pair_head=True, tie_embeddings=True),
    "masked": ModelConfig(**SMALL, **SWITCHES, num_token_types=1, tie_embeddings=True, norm_eps=1e-12),
    "untied": ModelConfig(**SMALL, **SWITCHES, num_token_types=2, pair_head=True),
}


@pytest.fixture(scope="module")
def fixed() -> FixedTokenizer:
    return train_tokenizer(SAMPLE, TokenizerConfig(kind="wordpiece", vocab_size=70))


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter moved, biases and norms too, and large enough to tell logits apart."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def exported_model(fixed: FixedTokenizer, shape: ModelConfig, uri: str) -> Backbone:
    sized = ModelConfig(**{**shape.__dict__, "vocab_size": fixed.vocab_size})
    model = shaken(build(sized, seed=2))
    export(model.named_parameters(), sized, fixed.json.encode(), fixed.boundary_id, open_store(uri))
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(6, 70, (3, 40), generator=generator), (torch.arange(40) >= 25).long().expand(3, 40)


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_logits(fixed, name, tmp_path):
    model = exported_model(fixed, SHAPES[name], str(tmp_path))
    kind = transformers.BertForPreTraining if SHAPES[name].pair_head else transformers.BertForMaskedLM
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, types = batch()
    types = types * (SHAPES[name].num_token_types > 1)
    with torch.no_grad():
        hidden = model(tokens, types_BT=types)
        theirs = loaded.eval()(input_ids=tokens, token_type_ids=types)
        words = theirs.prediction_logits if SHAPES[name].pair_head else theirs.logits
        assert words.std() > 0.1
        assert (model.logits(hidden) - words).abs().max() < 1e-4
        if SHAPES[name].pair_head:
            assert (model.pair_logits(hidden) - theirs.seq_relationship_logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_loading_gives_back_what_was_exported(fixed, name, tmp_path):
    expected = dict(exported_model(fixed, SHAPES[name], str(tmp_path)).named_parameters())
    found = dict(load_exported(open_store(str(tmp_path))).model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_transformers_frames_texts_and_names_the_special_tokens(fixed, tmp_path):
    exported_model(fixed, SHAPES["pretraining"], str(tmp_path))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pair = loaded("今天", "天气")
    assert loaded.convert_ids_to_tokens(pair["input_ids"]) == [
        "[CLS]",
        "今",
        "天",
        "[SEP]",
        "天",
        "气",
        "[SEP]",
    ]
    assert (loaded.mask_token, loaded.pad_token) == ("[MASK]", "[PAD]")
    assert loaded.decode(loaded("今天天气真好，", add_special_tokens=False)["input_ids"]) == "今天天气真好，"


def transformers_bert(kind: type, folder, fixed: FixedTokenizer, **options):
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=fixed.vocab_size,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=64,
        **options,
    )
    model = shaken(kind(config))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(fixed.json)
    return model


@pytest.mark.parametrize("kind", [transformers.BertForPreTraining, transformers.BertForMaskedLM])
def test_what_transformers_made_computes_the_same_here(fixed, kind, tmp_path):
    reference = transformers_bert(kind, tmp_path, fixed)
    model = load_exported(open_store(str(tmp_path))).model
    tokens, types = batch()
    with torch.no_grad():
        hidden = model(tokens, types_BT=types)
        theirs = reference(input_ids=tokens, token_type_ids=types)
        assert (model.logits(hidden) - theirs[0]).abs().max() < 1e-4
        if kind is transformers.BertForPreTraining:
            assert (model.pair_logits(hidden) - theirs.seq_relationship_logits).abs().max() < 1e-4


def test_a_folder_of_an_old_version_is_read_too(fixed, tmp_path):
    """Both names of the tied bias, the tied matrix and the numbers of the positions stood in it."""
    reference = transformers_bert(transformers.BertForPreTraining, tmp_path, fixed)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    weights["cls.predictions.bias"] = reference.cls.predictions.bias.detach().clone()
    weights["cls.predictions.decoder.bias"] = reference.cls.predictions.bias.detach().clone()
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_exported(open_store(str(tmp_path))).model
    tokens, _ = batch()
    with torch.no_grad():
        assert (model.logits(model(tokens)) - reference(tokens).prediction_logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"architectures": ["BertForSequenceClassification"]}, "BertForSequenceClassification"),
        ({"model_type": "gpt2"}, "model_type='gpt2'.*llama, bert"),
    ],
)
def test_a_shape_that_the_encoder_lacks_is_refused_by_name(fixed, change, message, tmp_path):
    transformers_bert(transformers.BertForMaskedLM, tmp_path, fixed)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        load_exported(open_store(str(tmp_path)))


def test_a_missing_weight_and_pickled_weights_are_refused_by_name(fixed, tmp_path):
    transformers_bert(transformers.BertForMaskedLM, tmp_path, fixed)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.key.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.key\.bias is missing"):
        load_exported(open_store(str(tmp_path)))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="save_pretrained.*pickled weights are not read"):
        load_exported(open_store(str(tmp_path)))


@pytest.mark.parametrize(
    "change",
    [{"attention": "causal"}, {"positions": "rotary"}, {"num_token_types": 0}, {"num_kv_heads": 2}],
    ids=str,
)
def test_a_shape_that_bert_lacks_is_exported_under_our_own_names(fixed, change, tmp_path):
    shape = ModelConfig(**{**SHAPES["pretraining"].__dict__, **change})
    assert not fits_bert(shape)
    model = exported_model(fixed, shape, str(tmp_path))
    loaded = load_exported(open_store(str(tmp_path))).model
    assert loaded.config == model.config
    tokens, _ = batch()
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded(tokens)), model.logits(model(tokens)))
