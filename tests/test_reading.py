"""Reading texts gives what transformers computes for the same texts, alone and in a batch."""

import io
import json
from dataclasses import replace

import pytest
import torch
import transformers

from cluster.storage.uris import open_store
from data.tokens.tokenizer import FixedTokenizer, TokenizerConfig, fix_tokenizer, train_tokenizer
from trainers import embed, fill_mask, next_sentence
from trainers.exported.bert import SWITCHES
from trainers.exported.folder import export, load_exported
from trainers.exported.reading import Reader
from trainers.exported.sampling import SamplingConfig, complete
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.objectives.kinds import ObjectiveConfig

SAMPLE = ["今天天气真好，我们去公园吧。the love of Denmark and the kings of kingdoms"] * 20
TEXT = "今天天气真[MASK]，我们[MASK]公园吧。"
SMALL = dict(vocab_size=70, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=80, max_positions=40)
BERT = ModelConfig(**SMALL, **SWITCHES, num_token_types=2, pair_head=True, tie_embeddings=True)


@pytest.fixture(scope="module")
def fixed() -> FixedTokenizer:
    return train_tokenizer(SAMPLE, TokenizerConfig(kind="wordpiece", vocab_size=70))


def exported_to(folder, fixed: FixedTokenizer, config: ModelConfig = BERT, objective=None) -> str:
    model = build(config, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    uri = str(folder)
    tokenizer, target = fixed.json.encode(), open_store(uri)
    export(model.named_parameters(), config, tokenizer, fixed.boundary_id, target, objective=objective)
    return uri


@pytest.fixture(scope="module")
def folder(fixed, tmp_path_factory) -> str:
    return exported_to(tmp_path_factory.mktemp("export"), fixed)


@pytest.fixture(scope="module")
def reader(folder) -> Reader:
    return Reader(load_exported(open_store(folder)))


@pytest.fixture(scope="module")
def reference(folder):
    return (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.BertForPreTraining.from_pretrained(folder).eval(),
    )


@torch.no_grad()
def test_each_mask_is_filled_as_transformers_fills_it(reader, reference):
    tokenizer, bert = reference
    inputs = tokenizer(TEXT, return_tensors="pt")
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    expected = bert(**inputs).prediction_logits[0, places].double().softmax(dim=-1)
    found = reader.fill(TEXT, top=70, words=["好"])
    assert len(found) == len(expected) == 2
    for filled, probabilities in zip(found, expected, strict=True):
        by_token = [probabilities[tokenizer.convert_tokens_to_ids(text)] for text in ("好",)]
        assert filled.words["好"].probability == pytest.approx(by_token[0].item(), abs=1e-5)
        assert filled.words["好"].rank == 1 + (probabilities > by_token[0] + 1e-9).sum()
        likeliest = [candidate.probability for candidate in filled.candidates]
        assert likeliest == pytest.approx(probabilities.sort(descending=True).values.tolist(), abs=1e-5)
        assert sum(likeliest) == pytest.approx(1)
        assert filled.candidates[filled.words["好"].rank - 1].token == "好"


@torch.no_grad()
def test_pairs_and_their_order_in_a_batch_are_judged_as_transformers_does(reader, reference):
    tokenizer, bert = reference
    pairs = [("今天天气真好。", "我们去公园吧。"), ("我们", "the kings of Denmark"), ("今天", "天")]
    expected = [
        bert(**tokenizer(*pair, return_tensors="pt")).seq_relationship_logits.softmax(dim=-1)[0, 0].item()
        for pair in pairs
    ]
    assert reader.goes_on(pairs) == pytest.approx(expected, abs=1e-5)
    assert reader.goes_on(pairs[::-1], batch_size=2) == pytest.approx(expected[::-1], abs=1e-5)
    assert reader.goes_on([]) == []


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_the_pooled_states_whatever_the_batch(reader, reference, pooling):
    tokenizer, bert = reference
    texts = ["今天天气真好。", "the kings", "公"]
    expected = []
    for text in texts:
        states = bert.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected.append(states[0] if pooling == "cls" else states[1:-1].mean(dim=0))
    for batch_size in (1, 2, 3):
        found = reader.embed(texts, pooling, batch_size=batch_size)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_model_of_the_mixed_objective_is_asked_one_position_before(fixed, tmp_path):
    exported = load_exported(open_store(exported_to(tmp_path, fixed, ModelConfig(**SMALL))))
    ids = [fixed.boundary_id, *exported.tokenizer.encode("今天[MASK]气", add_special_tokens=False).ids]
    hidden = exported.model(torch.tensor([ids]), sees_all_B=torch.ones(1, dtype=torch.bool))
    expected = exported.model.logits(hidden)[0, 2].double().softmax(dim=-1)
    [filled] = Reader(exported).fill("今天[MASK]气", top=1)
    assert filled.candidates[0].probability == pytest.approx(expected.max().item(), abs=1e-6)


def test_an_encoder_refuses_to_continue_a_text(folder):
    with pytest.raises(ValueError, match="is an encoder.*fill_mask"):
        complete(load_exported(open_store(folder)), ["今天"], SamplingConfig())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda reader: reader.fill("今天"), r"no \[MASK\] in '今天'"),
        (lambda reader: reader.goes_on([("", "天")]), "has no tokens"),
        (lambda reader: reader.fill("天" * 50 + "[MASK]"), "53 tokens.*40 positions"),
        (lambda reader: reader.embed(["天", ""]), "has no tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(reader, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(reader)


def test_what_the_model_lacks_is_refused_by_name(fixed, tmp_path):
    bpe = train_tokenizer(SAMPLE, TokenizerConfig(vocab_size=300))
    plain = json.loads(bpe.json)
    plain["added_tokens"] = plain["added_tokens"][:1]
    for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        plain["model"]["vocab"][f"<{name}>"] = plain["model"]["vocab"].pop(name)
    config = ModelConfig(**{**SMALL, "vocab_size": 300})
    model = build(config, seed=1)
    store = open_store(str(tmp_path))
    export(model.named_parameters(), config, json.dumps(plain).encode(), 0, store)
    reader = Reader(load_exported(store))
    with pytest.raises(ValueError, match=r"tokenizer has no \[MASK\]"):
        reader.fill("[MASK]")
    with pytest.raises(ValueError, match="no pair head.*masked_next_sentence"):
        reader.goes_on([("a", "b")])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_transformers_frames_texts_of_an_export_as_they_are_read_here(kind, tmp_path):
    size = {"bpe": 300, "wordpiece": 70}[kind]
    fixed = train_tokenizer(SAMPLE, TokenizerConfig(kind=kind, vocab_size=size))
    folder = exported_to(tmp_path, fixed, replace(BERT, vocab_size=size))
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder),
        Reader(load_exported(open_store(folder))),
    )
    for texts in [("the love of [MASK] and kings",), ("the kings", "of [MASK]."), (TEXT,), ("[MASK] of",)]:
        expected, [rows] = theirs(*texts), ours._batches([texts], 1)
        assert rows.tokens_BT.tolist() == [expected["input_ids"]]
        assert rows.types_BT.tolist() == [expected["token_type_ids"]]


def test_an_export_keeps_the_fingerprint_of_its_corpus(fixed, folder):
    stored = open_store(folder).read("tokenizer.json").decode()
    assert "TemplateProcessing" in stored
    assert fix_tokenizer(stored, "here", "<|endoftext|>").fingerprint == fixed.fingerprint


def test_another_tokenizer_in_an_export_is_refused_by_name(fixed, tmp_path):
    folder = exported_to(tmp_path, fixed)
    other = train_tokenizer(SAMPLE, TokenizerConfig(kind="wordpiece", vocab_size=69))
    (tmp_path / "tokenizer.json").write_text(other.json)
    with pytest.raises(ValueError, match=f"{other.fingerprint}.*{fixed.fingerprint}"):
        load_exported(open_store(folder))


def test_a_model_that_only_continues_texts_is_not_asked_to_read_them(fixed, tmp_path):
    folder = exported_to(tmp_path, fixed, ModelConfig(**SMALL), ObjectiveConfig())
    with pytest.raises(ValueError, match=r"objective\.kind=causal"):
        Reader(load_exported(open_store(folder)))


def test_a_blank_before_a_mask_belongs_to_the_hidden_word(tmp_path):
    fixed = train_tokenizer(SAMPLE, TokenizerConfig(vocab_size=300))
    reader = Reader(load_exported(open_store(exported_to(tmp_path, fixed, replace(BERT, vocab_size=300)))))
    with_blank, without = (reader.fill(f"the love{blank}[MASK] Denmark", top=3) for blank in (" ", ""))
    assert with_blank == without


def test_the_entries_print_what_was_asked(folder, capsys, monkeypatch):
    fill_mask.main(["--model", folder, "--text", TEXT, "--word", "好", "--word", "天气", "--top", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == TEXT and len(printed) == 7 and printed[3].strip() == "天气: no token"
    assert len(printed[1].removeprefix("  [MASK] 1: ").split("  ")) == 3 and "好: rank" in printed[2]
    next_sentence.main(["--model", folder, "--first", "今天", "--second", "天气", "--second", "公园"])
    probabilities = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(probabilities) == 2 and all(0 <= each <= 1 for each in probabilities)
    monkeypatch.setattr("sys.stdin", io.StringIO("今天\n\n公园\n the kings\n"))
    embed.main(["--model", folder, "--pooling", "cls", "--batch-size", "2"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == ["今天", "公园", "the kings"]
    assert {len(record["embedding"]) for record in records} == {48}
