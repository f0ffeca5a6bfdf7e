"""Pages of all configuration keys, made from the dataclasses when the docs are built (a hook of MkDocs)."""

import sys
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from cluster.configuration.keys import keys_of, purposes, shown, type_name
from cluster.nodes.fitness import PreflightConfig
from data.prepare import PrepareConfig
from trainers.finetuning.config import FinetuneConfig
from trainers.planning.cluster_plan import ClusterPlanConfig
from trainers.pretraining.config import PretrainConfig
from tune.curves.label_curve import LabelEfficiencyConfig
from tune.search.config import SweepConfig
from tune.sweep_pretraining import PretrainSweepConfig

COMMANDS = {
    "trainers/pretrain.py": PretrainConfig,
    "trainers/finetune.py": FinetuneConfig,
    "data/prepare.py": PrepareConfig,
    "tune/sweep.py": SweepConfig,
    "tune/sweep_pretraining.py": PretrainSweepConfig,
    "tune/label_efficiency.py": LabelEfficiencyConfig,
    "trainers/plan_cluster.py": ClusterPlanConfig,
    "cluster/preflight.py": PreflightConfig,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each command that is configured by keys."""
    for command, cls in COMMANDS.items():
        path = f"configuration/{Path(command).stem}.md"
        files.append(File.generated(config, path, content="\n".join(page(command, cls))))
    return files


def page(command: str, cls: type) -> Iterator[str]:
    """Markdown: each section's keys with type, default and meaning."""
    yield f"# Keys of {Path(command).stem}\n"
    yield f"`python {command} --section.key value`, or `--config FILE` with the same keys in YAML.\n"
    purpose, at = purposes(cls), None
    for key in keys_of(cls).values():
        section = key.name.rpartition(".")[0]
        if section != at:
            yield f"\n## {section or 'Its own'}\n\n{purpose.get(section, '')}\n"
            yield "| key | type | default | meaning |\n|---|---|---|---|"
            at = section
        default = "must be given" if key.default is MISSING else f"`{shown(key.default)}`"
        yield f"| `{key.name}` | `{cell(type_name(key.hint))}` | {cell(default)} | {cell(key.doc)} |"


def cell(text: str) -> str:
    """Text that stays in one cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
