import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.objectives.causal import causal_lm, document_segments

SMALL = ModelConfig(vocab_size=311, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
TIED = ModelConfig(
    vocab_size=311, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, tie_embeddings=True
)


def rows_of(num_rows: int, length: int, vocab_size: int = 311) -> torch.Tensor:
    return torch.randint(vocab_size, (num_rows, length), generator=torch.Generator().manual_seed(num_rows))


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_every_gradient_equal_those_through_whole_logits(config, masked):
    rows, weights, boundary = rows_of(6, 300), torch.tensor([1.0, 1, 0, 1, 1, 0.5]), 5
    model, reference = build(config, 1), build(config, 1)
    loss = causal_lm(model, rows, weights, boundary, masked)
    (loss.total / loss.num_targets).backward()

    tokens, targets = rows[:, :-1], rows[:, 1:]
    hidden = reference(tokens, document_segments(tokens, boundary) if masked else None)
    each = F.cross_entropy(reference.logits(hidden).transpose(1, 2), targets, reduction="none")
    per_row = each.sum(1) * weights
    (per_row.sum() / (weights.sum() * targets.shape[1])).backward()
    torch.testing.assert_close(loss.total, per_row.sum())
    torch.testing.assert_close(loss.per_row_B, per_row.detach())
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_each_target_is_the_next_token():
    """A model that is sure of t + 1 after t pays nothing for a row that counts up."""
    rows = torch.arange(0, 40).repeat(2, 1)

    class Successor(torch.nn.Module):
        def forward(self, tokens_BT, segments_BT, *, targets_BP, weights_BP):
            logits = F.one_hot(tokens_BT + 1, 41).float() * 100
            losses = F.cross_entropy(logits.transpose(1, 2), targets_BP, reduction="none") * weights_BP
            return losses.sum(), losses.sum(1)

    assert causal_lm(Successor(), rows, torch.ones(2), boundary_id=0).total.item() == pytest.approx(
        0, abs=1e-3
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=6))
def test_rows_of_weight_zero_count_for_nothing(kept):
    model, rows, weights = build(SMALL, 0), rows_of(len(kept), 12), torch.tensor(kept, dtype=torch.float32)
    loss = causal_lm(model, rows, weights, 0)
    assert loss.num_targets.item() == 11 * sum(kept)
    assert torch.equal(loss.per_row_B == 0, weights == 0)
    if any(kept):
        alone = causal_lm(model, rows[weights > 0], torch.ones(sum(kept)), 0)
        assert loss.total.item() == pytest.approx(alone.total.item(), rel=1e-5)


def test_padding_within_a_row_counts_for_nothing():
    model, rows = build(SMALL, 0), rows_of(2, 12)
    weights = torch.ones(2, 11)
    weights[1, 6:] = 0
    padded = rows.clone()
    padded[1, 7:] = 3
    ours, cut = causal_lm(model, padded, weights, 0), causal_lm(model, rows[1:, :7], torch.ones(1), 0)
    assert ours.num_targets.item() == 17
    assert ours.per_row_B[1].item() == pytest.approx(cut.total.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
def test_tokens_of_any_integer_type_give_the_same_loss(dtype):
    model, rows = build(SMALL, 0), rows_of(2, 12)
    expected = causal_lm(model, rows, torch.ones(2), 0).total
    assert torch.equal(causal_lm(model, rows.to(dtype), torch.ones(2), 0).total, expected)


def test_bf16_logits_still_give_a_float32_sum():
    """4,096 losses of about 5.7 sum to 23,500, where bf16 has steps of 128."""
    rows = rows_of(16, 257)
    whole = causal_lm(build(SMALL, 0), rows, torch.ones(16), 0)
    half = causal_lm(build(SMALL, 0, dtype=torch.bfloat16), rows, torch.ones(16), 0)
    assert half.total.dtype == torch.float32 and half.per_row_B.dtype == torch.float32
    assert half.total.item() == pytest.approx(whole.total.item(), abs=20)


@pytest.mark.slow
def test_compiled_loss_and_gradient_equal_the_eager_ones():
    rows = rows_of(4, 65)
    eager, compiled = build(TIED, 0), build(TIED, 0)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    for model in (eager, compiled):
        causal_lm(model, rows, torch.ones(4), 5, document_mask=True).total.backward()
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_evaluation_needs_no_gradient():
    with torch.no_grad():
        loss = causal_lm(build(SMALL, 0), rows_of(2, 9), torch.ones(2), 0)
    assert not loss.total.requires_grad
