"""Heads, losses, adapters and rates, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from task_files import SHAPE

from cluster.limits.bounds import LARGEST_INTEGER
from trainers.model.backbone import build
from trainers.model.lora import LoRALinear, add_lora, merge_lora
from trainers.optim.optimizer import OptimizerConfig, parameter_groups
from trainers.tasks.encoding import IGNORED
from trainers.tasks.heads import AdaptConfig, TaskModel, rate_scales
from trainers.tasks.task import TaskColumns, TaskConfig

B, T = 3, 7
TOKENS = torch.randint(6, SHAPE.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([7, 4, 2])
MASK = torch.arange(T) < LENGTHS[:, None]
TYPES = torch.zeros_like(TOKENS)


def model(kind="classification", labels=("a", "b", "c"), multi_label=False, **adapt) -> TaskModel:
    pair = TaskColumns(pair="pair") if kind in ("pairs", "question_answering") else TaskColumns()
    labels = labels if kind in ("classification", "token_classification") else ()
    task = TaskConfig(name="t", kind=kind, labels=labels, multi_label=multi_label, columns=pair)
    return TaskModel(build(SHAPE, seed=3), task, AdaptConfig(**{"dropout": 0.0} | adapt), seed=0)


def test_padding_changes_no_score():
    made = model().eval()
    scores = made(TOKENS, MASK, TYPES)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = made(
            TOKENS[row : row + 1, :length], MASK[row : row + 1, :length], TYPES[row : row + 1, :length]
        )
        torch.testing.assert_close(scores[row], alone[0])


def test_losses_are_torchs():
    weights = torch.tensor([0.5, 1.0, 2.0])
    made = model().eval()
    scores, labels = made(TOKENS, MASK, TYPES), torch.tensor([2, 0, 1])
    expected = F.cross_entropy(scores, labels, weights, reduction="none").sum()
    torch.testing.assert_close(made(TOKENS, MASK, TYPES, labels, weights), expected)
    made = model(multi_label=True).eval()
    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    expected = F.binary_cross_entropy_with_logits(made(TOKENS, MASK, TYPES), several, reduction="sum")
    torch.testing.assert_close(made(TOKENS, MASK, TYPES, several), expected)
    made = model("token_classification").eval()
    tags = torch.where(MASK, 1, IGNORED)
    expected = F.cross_entropy(made(TOKENS, MASK, TYPES)[MASK], tags[MASK], reduction="sum")
    torch.testing.assert_close(made(TOKENS, MASK, TYPES, tags), expected)


def test_an_answers_position_is_never_sought_in_the_padding():
    made = model("question_answering").eval()
    places = torch.tensor([[1, 2], [0, 3], [1, 1]])
    scores = made(TOKENS, MASK, TYPES)
    expected = 0.0
    for row, length in enumerate(LENGTHS.tolist()):
        expected += sum(F.cross_entropy(scores[row, :length, i], places[row, i]) for i in (0, 1)) / 2
    torch.testing.assert_close(made(TOKENS, MASK, TYPES, places), expected)


def test_head_alone_and_lora_leave_the_backbone_as_it_is():
    before = build(SHAPE, seed=3).state_dict()
    for train in ("head", "lora"):
        made = model(train=train)
        made(TOKENS, MASK, TYPES, torch.tensor([0, 1, 2])).backward()
        moved = {name for name, p in made.named_parameters() if p.grad is not None}
        assert moved == {name for name, p in made.named_parameters() if p.requires_grad}
        assert all(name.startswith("head.") or ".lora_" in name for name in moved)
        merge_lora(made)
        assert all(torch.equal(before[n], p) for n, p in made.backbone.named_parameters())


def test_a_merged_adapter_does_what_the_adapted_layer_did():
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("o_proj", torch.nn.Linear(6, 5))
    plain = net(x := torch.randn(4, 6))
    assert add_lora(net, ["o_proj"], rank=2, alpha=8.0, seed=0) == 1
    torch.testing.assert_close(net(x), plain)  # it starts as what it adapts
    layer = net.o_proj
    assert isinstance(layer, LoRALinear)
    layer.lora_up.data.normal_()
    adapted = net(x)
    assert not torch.allclose(adapted, plain)
    merge_lora(net)
    assert isinstance(net.o_proj, torch.nn.Linear)
    torch.testing.assert_close(net(x), adapted)


def test_an_adapter_takes_the_largest_seed():
    net = torch.nn.Sequential()
    net.add_module("o_proj", torch.nn.Linear(6, 5))
    assert add_lora(net, ["o_proj"], rank=2, alpha=8.0, seed=LARGEST_INTEGER) == 1


def test_each_layer_learns_slower_than_the_one_above():
    made = model()
    groups = parameter_groups(
        made.named_parameters(), OptimizerConfig(learning_rate=1.0), rate_scales(made, decay=0.5)
    )
    rate = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    by_name = {name: rate[id(p)] for name, p in made.named_parameters()}
    L = SHAPE.num_layers
    assert by_name["head.out.weight"] == 1.0
    assert by_name["backbone.norm.weight"] == 1.0
    for layer in range(L):
        of_layer = {by_name[n] for n in by_name if f"layers.{layer}." in n}
        assert of_layer == {0.5 ** (L - layer)}
    assert by_name["backbone.embed_tokens.weight"] == 0.5 ** (L + 1)


def test_dropout_works_in_training_alone():
    made = model(dropout=0.5)
    assert not torch.equal(made.train()(TOKENS, MASK, TYPES), made(TOKENS, MASK, TYPES))
    assert torch.equal(made.eval()(TOKENS, MASK, TYPES), made(TOKENS, MASK, TYPES))


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_pooling_takes_the_hidden_states_that_it_says(pooling):
    made = model(pooling=pooling)
    hidden = torch.randn(B, T, SHAPE.hidden_size)
    pooled = made.pool(hidden, MASK)
    for row, length in enumerate(LENGTHS.tolist()):
        expected = {
            "first": hidden[row, 0],
            "last": hidden[row, length - 1],
            "mean": hidden[row, :length].mean(0),
        }
        torch.testing.assert_close(pooled[row], expected[pooling])
