"""Laws of `--help`: whoever sets a key can read there what it means."""

import pytest

from cluster.keys import keys_of
from data.prepare import PrepareConfig
from trainers.config import PretrainConfig
from trainers.finetune_config import FinetuneConfig
from trainers.plan_cluster import ClusterPlanConfig
from trainers.task import TaskConfig
from tune.label_efficiency import LabelEfficiencyConfig
from tune.sweep import SweepConfig
from tune.sweep_pretraining import PretrainSweepConfig

CONFIGS = [
    PrepareConfig,
    PretrainConfig,
    ClusterPlanConfig,
    TaskConfig,
    FinetuneConfig,
    SweepConfig,
    PretrainSweepConfig,
    LabelEfficiencyConfig,
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_key_says_what_it_means(config: type) -> None:
    keys = keys_of(config)
    assert keys and [name for name, key in keys.items() if not key.doc] == []
