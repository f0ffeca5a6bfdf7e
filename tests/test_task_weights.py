"""Class weights: what each label's loss weighs, by hand, by scikit-learn, and by what is learnt with them."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from task_files import put_backbone, put_lines, put_task

from cluster.configuration.config import from_dict
from cluster.storage.uris import open_store
from trainers.finetuning.config import FinetuneConfig
from trainers.finetuning.run import finetune
from trainers.tasks.encoding import IGNORED, Batch
from trainers.tasks.evaluation import class_weights
from trainers.tasks.heads import loss_sum, target_weight
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig

ONE = TaskConfig(name="t", kind="classification", labels=("a", "b"))
SEVERAL = TaskConfig(name="t", kind="classification", labels=("a", "b"), multi_label=True)
TAGS = TaskConfig(name="t", kind="token_classification", labels=("O", "B"))


def examples(*targets):
    return [Example(str(i), "text", "", [], target) for i, target in enumerate(targets)]


def batch(targets) -> Batch:
    tokens = torch.zeros(len(targets), 1, dtype=torch.long)
    return Batch(tokens, tokens == 0, tokens, targets)


def mean_loss(task, scores, targets, weights):
    """What a step of one batch goes down."""
    of_batch = batch(targets)
    total = loss_sum(task.kind, scores, targets, of_batch.mask_BT, weights)
    return total / target_weight(task.kind, of_batch, weights)


def test_one_labels_weights_are_those_counted_by_hand():
    weights = class_weights(ONE, examples("a", "a", "a", "b"))
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    scores, targets = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 1])
    # -log of 1/2 and of 1/4, weighted 2/3 and 2.
    expected = (2 / 3 * math.log(2) + 2 * math.log(4)) / (2 / 3 + 2)
    assert mean_loss(ONE, scores, targets, weights).item() == pytest.approx(expected)


def test_several_labels_weights_are_those_counted_by_hand():
    weights = class_weights(SEVERAL, examples(["a", "b"], ["b"], [], []))
    without, having = [4 / (2 * 3), 4 / (2 * 2)], [4 / (2 * 1), 4 / (2 * 2)]
    assert weights.tolist() == [pytest.approx(without), pytest.approx(having)]
    scores, targets = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    # -log of 3/4 for having a, of 1/2 for all else.
    expected = (2 * math.log(4 / 3) + math.log(2) + 2 / 3 * math.log(2) + math.log(2)) / (2 + 1 + 2 / 3 + 1)
    assert mean_loss(SEVERAL, scores, targets, weights).item() == pytest.approx(expected)


def test_weights_are_scikit_learns_balanced_ones():
    generator = np.random.default_rng(0)
    one = generator.choice(["a", "b"], size=50, p=[0.9, 0.1])
    expected = compute_class_weight("balanced", classes=np.array(["a", "b"]), y=one)
    assert class_weights(ONE, examples(*one)).tolist() == pytest.approx(expected.tolist())
    of_three = TaskConfig(name="t", kind="classification", labels=("a", "b", "none drew it"))
    assert class_weights(of_three, examples(*one)).tolist()[:2] == pytest.approx(expected.tolist())
    several = generator.random((50, 2)) < (0.1, 0.6)
    found = class_weights(
        SEVERAL, examples(*([n for n, has in zip("ab", row, strict=True) if has] for row in several))
    )
    for column, of_label in zip(several.T, found.T, strict=True):
        expected = compute_class_weight("balanced", classes=np.array([False, True]), y=column)
        assert of_label.tolist() == pytest.approx(expected.tolist())


def test_tags_are_weighted_word_by_word_and_padding_not_at_all():
    weights = class_weights(TAGS, examples(["O", "O", "B"], ["O"]))
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    targets = torch.tensor([[0, 0, 1], [0, IGNORED, IGNORED]])
    assert target_weight(TAGS.kind, batch(targets), weights) == pytest.approx(3 * 2 / 3 + 2)
    scores = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), weights, ignore_index=IGNORED)
    torch.testing.assert_close(mean_loss(TAGS, scores, targets, weights), expected)


def test_weights_keep_the_scale_of_the_loss_however_rare_a_label_is():
    rare = examples(*[["a"]] * 10, *[["b"]] * 10, *[[]] * 980)
    targets = torch.tensor([[float(name in e.target) for name in "ab"] for e in rare])
    weights = class_weights(SEVERAL, rare)
    assert target_weight(SEVERAL.kind, batch(targets), weights) == pytest.approx(targets.numel(), rel=1e-5)
    undecided = torch.zeros_like(targets)
    assert mean_loss(SEVERAL, undecided, targets, weights).item() == pytest.approx(math.log(2), rel=1e-5)


def test_having_a_label_and_not_having_it_pull_equally_however_rare_it_is():
    rare = examples(*[["a"]] * 10, *[["b"]] * 300, *[[]] * 690)
    targets = torch.tensor([[float(name in e.target) for name in "ab"] for e in rare])
    bias = torch.zeros(2, requires_grad=True)
    mean_loss(SEVERAL, bias.expand_as(targets), targets, class_weights(SEVERAL, rare)).backward()
    assert bias.grad.tolist() == pytest.approx([0, 0], abs=1e-6)
    bias.grad = None
    mean_loss(SEVERAL, bias.expand_as(targets), targets, None).backward()
    assert bias.grad.tolist() == pytest.approx([(0.5 - 0.01) / 2, (0.5 - 0.3) / 2])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    put_backbone(folder / "model")
    return folder


def rare_in_training(place, several: bool, weighted: bool) -> float:
    """Mean probability that a model gives to a label of one record in eight that no text tells of."""
    records = [
        {"text": f"w{n} x{n * 31} end", "label": "rare" if n % 8 == 0 else "other"} for n in range(240)
    ]
    if several:
        records = [record | {"label": [record["label"]] * (record["label"] == "rare")} for record in records]
    name = f"{several}-{weighted}"
    data = {"uri": put_lines(place / f"{several}.jsonl", records)}
    content = {"kind": "classification", "multi_label": several, "data": data, "split": {"similarity": 1.0}}
    run = {"name": name, "task": put_task(place / f"{several}.yaml", name=f"t{several}", **content)}
    sections = {
        "run": run | {"storage": str(place / "runs"), "prepared": str(place / "prepared")},
        "backbone": {"uri": str(place / "model")},
        "adapt": {"train": "head", "dropout": 0.0},
        "batch": {"rows_per_step": 256, "min_steps": 60, "max_steps": 60, "class_weights": weighted},
        "optimizer": {"learning_rate": 0.05, "weight_decay": 0.0},
        "engine": {"precision": "fp32", "zero_stage": 0, "micro_batch_rows": 128},
        "validation": {"times": 1},
    }
    finetune(from_dict(FinetuneConfig, sections))
    lines = open_store(str(place / "runs")).read(f"{name}/seed-0/answers.jsonl").decode().splitlines()
    answers = [json.loads(line) for line in lines]
    rare = [a["answer"] in ("rare", ["rare"]) for a in answers]
    return float(
        np.mean([a["confidence"] if r else 1 - a["confidence"] for a, r in zip(answers, rare, strict=True)])
    )


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["one-label", "several-labels"])
def test_a_label_that_no_text_tells_of_is_given_by_half_with_weights_and_by_its_share_without(place, several):
    assert rare_in_training(place, several, weighted=False) == pytest.approx(1 / 8, abs=0.08)
    assert rare_in_training(place, several, weighted=True) == pytest.approx(1 / 2, abs=0.12)
