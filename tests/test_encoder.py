"""The backbone in the shape of BERT and of a bidirectional encoder of today."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForPreTraining

from tests.bert_reference import BERT, SMALL, bert_of, lively
from trainers.model.backbone import Backbone, build
from trainers.model.shape import ModelConfig, count_parameters, flops_per_token

SHAPES = {
    "bert": BERT,
    "today": ModelConfig(**SMALL, attention="bidirectional"),
    "grouped-with-biases": ModelConfig(**SMALL, attention="bidirectional", num_kv_heads=2, biases=True),
    "untied-transform": ModelConfig(**SMALL, attention="bidirectional", head="transform", norm="layernorm"),
    "learned-causal": ModelConfig(**SMALL, positions="learned", activation="gelu", num_token_types=3),
}
PADDING = -1


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def config(request) -> ModelConfig:
    return request.param


def tokens_of(rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


def test_logits_of_tokens_and_pairs_are_those_of_transformers_bert_under_padding_and_types():
    model = lively(build(BERT, seed=3))
    tokens = tokens_of()
    types = (torch.arange(20) >= 9).long().expand(3, 20)
    length = torch.tensor([20, 13, 17])
    filled = torch.arange(20) < length[:, None]
    expected = bert_of(model)(tokens, token_type_ids=types, attention_mask=filled.long())
    hidden = model(tokens, torch.where(filled, 0, PADDING), types_BT=types)
    torch.testing.assert_close(
        model.logits(hidden)[filled], expected.prediction_logits[filled], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        model.pair_logits(hidden), expected.seq_relationship_logits, atol=1e-4, rtol=1e-4
    )


def test_bert_base_has_the_published_count():
    """110,106,428: the parameters of google-bert/bert-base-uncased's BertForPreTraining, tied ones once."""
    base = dict(vocab_size=30_522, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3_072)
    switches = {key: getattr(BERT, key) for key in BERT.__dataclass_fields__ if key not in SMALL}
    config = ModelConfig(**base, max_positions=512, **switches)
    with torch.device("meta"):
        reference = BertForPreTraining(BertConfig())
    assert count_parameters(config).total == reference.num_parameters() == 110_106_428


def test_every_position_sees_all_of_its_segment_and_no_other(config):
    model, tokens = lively(build(config, seed=0)), tokens_of(2)
    segments = (torch.arange(20) >= 12).long().expand(2, 20)
    changed = tokens.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 97
    before, after = model(tokens, segments), model(changed, segments)
    torch.testing.assert_close(before[:, 12:], after[:, 12:])
    moved = (before != after).any(dim=-1)[:, :12]
    assert moved.all() if config.attention == "bidirectional" else not moved[:, :11].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 19), st.sampled_from(list(SHAPES.values())))
def test_padding_changes_no_hidden_state_before_it(length, config):
    model, tokens = build(config, seed=0), tokens_of()
    filled = torch.arange(20) < length
    padded = model(tokens, torch.where(filled, 0, PADDING).expand(3, 20))
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:, :length], model(tokens[:, :length]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_rows_that_see_all_and_causal_ones_stand_in_one_batch(bidirectional):
    shape = ModelConfig(**SMALL)
    model, tokens = build(shape, seed=0), tokens_of(2)
    alone = build(ModelConfig(**SMALL, attention="bidirectional") if bidirectional else shape, seed=0)(tokens)
    mixed = model(tokens, sees_all_B=torch.tensor([True, False]))
    row = 0 if bidirectional else 1
    torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-4)


def test_the_loss_at_slots_is_that_of_these_positions_alone(config):
    model, tokens = build(config, seed=0), tokens_of()
    slots, targets = torch.tensor([[1, 5, 5], [0, 19, 2], [7, 8, 9]]), tokens_of(3, 3)
    weights = torch.tensor([[1.0, 0, 2], [1, 1, 1], [0.5, 1, 1]])
    total, per_row, *_ = model(tokens, targets_BP=targets, weights_BP=weights, slots_BP=slots)
    log_probabilities = model.logits(model(tokens)).log_softmax(dim=-1)
    each = -log_probabilities[torch.arange(3)[:, None], slots, targets] * weights
    torch.testing.assert_close(total, each.sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(per_row, each.sum(dim=1), atol=1e-4, rtol=1e-5)


def test_parameter_count_is_that_of_the_model(config):
    with torch.device("meta"):
        model = Backbone(config)
    named = dict(model.named_parameters())
    counted = count_parameters(config)
    assert counted.total == sum(p.numel() for p in named.values())
    assert counted.vectors == sum(p.numel() for p in named.values() if p.dim() == 1)
    inside = [p.numel() for name, p in named.items() if p.dim() == 2 and name.startswith("layers.")]
    assert counted.matrices == sum(inside)


def test_flops_are_those_that_torch_counts(config):
    model, tokens = build(config, seed=0), tokens_of(2, 16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model(tokens)
        model.logits(hidden[:, :4])
        if config.pair_head:
            model.pair_logits(hidden)
    expected = flops_per_token(config, seq_len=16, target_share=0.25) * tokens.numel()
    assert 3 * counter.get_total_flops() == pytest.approx(expected)


def test_biases_start_at_zero_and_norms_at_one(config):
    for name, parameter in build(config, seed=0).named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(
                parameter, torch.full_like(parameter, 0.0 if name.endswith(".bias") else 1.0)
            ), name


def test_activation_checkpointing_changes_no_gradient(config):
    gradients = []
    for recompute in (False, True):
        model = build(config, seed=0)
        model.activation_checkpointing = recompute
        total, *others = model(tokens_of(), targets_BP=tokens_of())
        (total + sum(other.sum() for other in others if other.requires_grad)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.slow
def test_compiled_gradients_are_the_uncompiled_ones(config):
    segments = torch.where(torch.arange(20) < 15, 0, PADDING).expand(3, 20)
    gradients = []
    for compiled in (False, True):
        model = build(config, seed=0)
        if compiled:
            model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        slots = torch.arange(5).expand(3, 5)
        total, *others = model(tokens_of(), segments, targets_BP=tokens_of(3, 5), slots_BP=slots)
        (total + sum(other.sum() for other in others if other.requires_grad)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_learned_positions_may_have_heads_of_odd_width():
    odd = dict(vocab_size=5, hidden_size=9, num_layers=1, num_heads=3, intermediate_size=4, max_positions=8)
    learned, rotary = ModelConfig(**odd, positions="learned"), ModelConfig(**odd)
    assert not list(learned.problems("model")) and "odd width 3" in "".join(rotary.problems("model"))
    assert build(learned, 0)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 9)


def test_a_negative_number_of_token_types_is_named():
    [problem] = ModelConfig(**SMALL, num_token_types=-1).problems("model")
    assert "model.num_token_types=-1" in problem
