import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from trainers.exported.llama import llama_config, to_llama
from trainers.model.backbone import Backbone, build, initial_value
from trainers.model.layers import Cache, attention_mask
from trainers.model.shape import ModelConfig, count_parameters, flops_per_token
from trainers.objectives.causal import causal_lm, document_segments

SMALL = dict(vocab_size=97, hidden_size=48, num_layers=3, num_heads=4, intermediate_size=80, max_positions=64)
SHAPES = {
    "plain": ModelConfig(**SMALL),
    "grouped": ModelConfig(**SMALL, num_kv_heads=2),
    "one-kv-head": ModelConfig(**SMALL, num_kv_heads=1),
    "tied": ModelConfig(**SMALL, tie_embeddings=True, rope_theta=500_000.0),
}
LLAMA_7B = ModelConfig(
    vocab_size=32_000, hidden_size=4_096, num_layers=32, num_heads=32, intermediate_size=11_008
)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def config(request) -> ModelConfig:
    return request.param


def tokens_of(config: ModelConfig, rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def llama_of(model: Backbone) -> LlamaForCausalLM:
    """transformers' own model with the same weights."""
    reference = LlamaForCausalLM(
        LlamaForCausalLM.config_class(**llama_config(model.config, 0, torch.float32))
    )
    missing, unexpected = reference.load_state_dict(
        dict(to_llama(model.named_parameters(), model.config)), strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    reference.tie_weights()
    return reference.eval()


def test_logits_and_gradients_are_those_of_transformers_llama(config):
    model = build(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are too even to tell a wrong order of heads
            parameter.mul_(3)
    reference = llama_of(model)
    tokens = tokens_of(config)
    logits, expected = model.logits(model(tokens)), reference(tokens).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)

    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    gradients = dict(to_llama(((n, p.grad) for n, p in model.named_parameters()), config))
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-4, rtol=1e-3)


def test_a_position_sees_no_later_token(config):
    model, tokens = build(config, seed=0), tokens_of(config)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % config.vocab_size
    torch.testing.assert_close(model(tokens)[:, :12], model(changed)[:, :12])
    assert not torch.allclose(model(tokens)[:, 12], model(changed)[:, 12])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_attention_stays_within_the_document(lengths):
    """Each document of a row is computed as if it stood alone: rotary positions are relative."""
    config = SHAPES["grouped"]
    model, boundary = build(config, seed=0), 7
    row = tokens_of(config, 1, sum(lengths))
    row[row == boundary] = 8
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    row[0, starts[:-1]] = boundary
    packed = model(row, document_segments(row, boundary))
    alone = torch.cat([model(row[:, a:b]) for a, b in pairwise(starts)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_one_document_needs_no_mask(config):
    model, tokens = build(config, seed=0), tokens_of(config)
    segments = torch.zeros_like(tokens)
    assert attention_mask(None, None, torch.empty(0), causal=True) is None
    torch.testing.assert_close(model(tokens), model(tokens, segments), atol=1e-5, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_cached_logits_equal_uncached_ones_however_the_tokens_arrive(pieces):
    config = SHAPES["grouped"]
    model, tokens = build(config, seed=0), tokens_of(config, 2, sum(pieces))
    cache = Cache(config, 2, sum(pieces), like=model.embed_tokens.weight)
    with torch.no_grad():
        parts = [model(part, torch.zeros_like(part), cache) for part in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=1e-4)


def test_parameter_count_is_that_of_the_model(config):
    with torch.device("meta"):
        model = Backbone(config)
    counted = count_parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    embedding = {id(p): p.numel() for p in (model.embed_tokens.weight, model.lm_head.weight)}
    assert counted.embedding == sum(embedding.values())
    assert counted.non_embedding == counted.total - counted.embedding


def test_parameter_count_by_hand():
    config = ModelConfig(
        vocab_size=10, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=12
    )
    attention = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8  # q, k, v, o
    mlp = 3 * 8 * 12
    assert count_parameters(config).non_embedding == 2 * (attention + mlp + 8 + 8) + 8
    assert count_parameters(config).embedding == 2 * 10 * 8


def test_seven_billion_shape_has_the_published_count():
    """6,738,415,616: sum of the tensors of meta-llama/Llama-2-7b-hf."""
    with torch.device("meta"):
        model = Backbone(LLAMA_7B)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert count_parameters(LLAMA_7B).total == 6_738_415_616
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())


def test_flops_by_hand():
    config = ModelConfig(
        vocab_size=10, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=12
    )
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12) + 10 * 8
    attention = 2 * (2 * 2 * 2 * 4 * 5)  # layers, score and mix, 2 a multiply-add, heads, width, positions
    assert flops_per_token(config, seq_len=5) == 3 * (2 * matrices + attention)


def test_flops_are_those_that_torch_counts(config):
    tokens = tokens_of(config, 2, 16)
    model = build(config, seed=0)
    # The counter does not know the CPU's flash kernel; the plain one is made of products that it counts.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    assert 3 * counter.get_total_flops() == flops_per_token(config, seq_len=16) * tokens.numel()


def test_initial_weights_follow_from_seed_and_name_alone(config):
    first, again, other = (dict(build(config, seed=s).named_parameters()) for s in (5, 5, 6))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter, initial_value(config, 5, name, parameter.shape))
        assert parameter.dim() == 1 or not torch.equal(parameter, other[name])
    matrices = [p.flatten()[:50] for p in first.values() if p.dim() == 2]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)


def test_initial_spread_is_gpt2s():
    config = ModelConfig(
        vocab_size=500, hidden_size=128, num_layers=8, num_heads=4, intermediate_size=256, init_std=0.02
    )
    for name, parameter in build(config, seed=0).named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        residual = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(16) if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_tied_head_is_the_embedding():
    model = build(SHAPES["tied"], seed=0)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing_changes_no_gradient(config, masked):
    rows = tokens_of(config)
    gradients = []
    for keep in (True, False):
        model = build(config, seed=0)
        model.activation_checkpointing = not keep
        causal_lm(model, rows, torch.ones(len(rows)), boundary_id=7, document_mask=masked).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_bf16_weights_give_the_float32_loss_to_bf16_precision(config):
    rows = tokens_of(config)
    losses = [
        causal_lm(build(config, 0, dtype=dtype), rows, torch.ones(len(rows)), boundary_id=0).total
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)


@pytest.mark.slow
def test_norms_keep_their_statistic_in_float32():
    """256 + 1 is 256 in bf16: a bf16 sum of squares would stop growing."""
    norm = build(ModelConfig(**SMALL | {"hidden_size": 4_096}), 0, dtype=torch.bfloat16).norm
    ones = torch.ones(1, 4_096, dtype=torch.bfloat16)
    assert norm(ones)[0, 0].item() == pytest.approx(1.0, abs=2**-7)


@pytest.mark.parametrize(
    ("wrong", "keys"),
    [
        ({"num_heads": 5}, ["num_heads=5", "hidden_size=48", "nearest: 4"]),
        ({"num_kv_heads": 3}, ["num_kv_heads=3", "num_heads=4"]),
        ({"hidden_size": 12}, ["odd width 3", "nearest model.hidden_size: 16"]),
        (
            {"num_layers": 0, "rope_theta": 0.0, "vocab_size": -1},
            ["num_layers=0", "rope_theta", "vocab_size=-1"],
        ),
    ],
)
def test_every_impossible_shape_is_named(wrong, keys):
    text = "\n".join(ModelConfig(**SMALL | wrong).problems("model"))
    assert all(key in text for key in keys), text
    assert not list(ModelConfig(**SMALL).problems("model"))


def test_every_shape_without_problems_runs():
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 24), st.integers(1, 6), st.integers(0, 6))
    def run(hidden_size, num_heads, num_kv_heads):
        config = ModelConfig(
            vocab_size=5, hidden_size=hidden_size, num_layers=1, num_heads=num_heads,
            num_kv_heads=num_kv_heads, intermediate_size=3,
        )  # fmt: skip
        if not list(config.problems("model")):
            assert build(config, 0)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, hidden_size)

    run()
