import pytest
import torch
from torch import nn

from trainers.model.backbone import Backbone, ModelConfig
from trainers.optim.optimizer import OptimizerConfig, build_optimizer, moments, parameter_groups, role_of

KINDS = ("adamw", "muon", "sgd", "rmsprop")


def decoder(tie: bool = False) -> Backbone:
    return Backbone(ModelConfig(vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, tie_embeddings=tie))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(kind: str, tie: bool) -> None:
    model = decoder(tie)
    groups = parameter_groups(model.named_parameters(), OptimizerConfig(kind=kind))  # type: ignore[arg-type]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    inside = {id(p) for p in model.layers.parameters() if p.dim() == 2}
    assert {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]} == inside
    assert {id(p) for g in groups if g["muon"] for p in g["params"]} == (inside if kind == "muon" else set())


def test_each_role_has_its_own_peak_rate() -> None:
    config = OptimizerConfig(
        kind="muon",
        learning_rate=1.0,
        muon_learning_rate=2.0,
        embedding_learning_rate=3.0,
        head_learning_rate=4.0,
        norm_learning_rate=5.0,
    )
    model = decoder()
    rates = {
        id(p): g["peak_lr"] for g in parameter_groups(model.named_parameters(), config) for p in g["params"]
    }
    assert rates[id(model.layers[0].mlp.down_proj.weight)] == 2.0  # type: ignore[union-attr]
    assert rates[id(model.embed_tokens.weight)] == 3.0
    assert rates[id(model.lm_head.weight)] == 4.0
    assert rates[id(model.norm.weight)] == 5.0
    plain = OptimizerConfig(kind="muon", learning_rate=1.0, muon_learning_rate=2.0)
    assert {plain.peak_rate(role) for role in ("embedding", "head", "norm")} == {1.0}  # type: ignore[arg-type]


def test_frozen_parameters_are_left_out() -> None:
    model = decoder()
    model.embed_tokens.weight.requires_grad = False
    groups = parameter_groups(model.named_parameters(), OptimizerConfig())
    assert all(p.requires_grad for group in groups for p in group["params"])


@pytest.mark.parametrize("kind", ["adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_moments_are_what_the_optimizer_remembers(kind: str, momentum: float) -> None:
    config = OptimizerConfig(kind=kind, momentum=momentum)  # type: ignore[arg-type]
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = build_optimizer([("weight", weight)], config)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    remembered = {key for key, value in optimizer.state[weight].items() if value is not None} - {"step"}
    assert remembered == set(moments(config, role_of("weight", weight.shape)))
    assert torch.equal(weight, torch.ones(4, 3)), "before the engine sets a rate, a step changes nothing"


def test_impossible_values_are_all_named() -> None:
    config = OptimizerConfig(learning_rate=0.0, weight_decay=-1.0, betas=(0.9, 1.0), momentum=1.5)
    named = [problem.split("=")[0] for problem in config.problems("optimizer")]
    assert named == [
        "optimizer.learning_rate",
        "optimizer.weight_decay",
        "optimizer.betas[1]",
        "optimizer.momentum",
    ]
