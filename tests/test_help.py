"""Laws of `--help`: whoever sets a key can read there what it means."""

import re
import subprocess
import sys

import pytest

from cluster.configuration.keys import help_text, keys_of
from cluster.nodes.fitness import PreflightConfig
from cluster.sessions.session import PROJECT
from data.prepare import PrepareConfig
from trainers.finetuning.config import FinetuneConfig
from trainers.planning.cluster_plan import ClusterPlanConfig
from trainers.pretraining.config import PretrainConfig
from trainers.tasks.task import TaskConfig
from tune.curves.label_curve import LabelEfficiencyConfig
from tune.sweep import SweepConfig
from tune.sweep_pretraining import PretrainSweepConfig

CONFIGS = [
    PreflightConfig,
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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_section_says_what_it_is_for(config: type) -> None:
    assert re.findall(r"(?m)^[a-z_.]+: *$", help_text(config, "", {})) == []


@pytest.mark.slow
def test_whoever_reads_only_the_first_lines_sees_no_traceback() -> None:
    command = [sys.executable, str(PROJECT / "data" / "prepare.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as entry:
        assert entry.stdout and entry.stderr
        entry.stdout.close()
        assert entry.stderr.read() == b""
    assert entry.returncode == 0
