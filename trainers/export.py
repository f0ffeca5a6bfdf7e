"""A trained model as a folder that transformers loads as Llama or BERT, and back.

python trainers/export.py --run runs/NAME --step best --output exports/NAME
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from cluster.configuration.config import run_entry
from cluster.configuration.stored_file import DamagedFileError, as_config, place_of, read_json, read_yaml
from cluster.storage.uris import Store, open_store
from data.shards.manifest import read_manifest
from data.tokens.tokenizer import read_tokenizer
from trainers.checkpoints.keeping import checkpoint_at
from trainers.checkpoints.reader import CheckpointReader
from trainers.exported.folder import export
from trainers.model.shape import ModelConfig
from trainers.objectives.kinds import ObjectiveConfig
from trainers.stored.run_files import PUT_BACK, Pinned, StoredConfig


def export_run(
    run: Store, which: int | Literal["best", "last"], target: Store, *, overwrite: bool = False
) -> str:
    """Export a checkpoint of a run's folder; returns its name.

    Raises:
        FileNotFoundError: `run` is not the folder of a run, or its prepared corpus is gone.
        ValueError: without `overwrite`, another's model is there.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    sections: dict[str, Any] = read_yaml(run, "config.yaml", StoredConfig, PUT_BACK)
    prepared = sections.get("corpus", {}).get("prepared")
    if not prepared or "model" not in sections:
        raise DamagedFileError(place_of(run, "config.yaml"), "corpus.prepared or model is missing", PUT_BACK)
    corpus = open_store(prepared)
    manifest = read_manifest(corpus, read_json(run, "manifest.json", Pinned, PUT_BACK)["digest"])
    config = as_config(ModelConfig, sections["model"], place_of(run, "config.yaml"), PUT_BACK)
    config = replace(config, vocab_size=config.vocab_size or manifest.vocab_size)
    record = checkpoint_at(run, which)
    tokenizer = read_tokenizer(corpus, manifest.tokenizer)
    objective = as_config(
        ObjectiveConfig, sections.get("objective", {}), place_of(run, "config.yaml"), PUT_BACK
    )
    values = CheckpointReader(run, record).values()
    export(values, config, tokenizer, manifest.boundary_id, target, objective=objective, overwrite=overwrite)
    return record.name


def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint of a run from the command line."""
    parser = argparse.ArgumentParser(description="Export a checkpoint of a run for transformers.")
    parser.add_argument(
        "--run", required=True, metavar="URI", help="the run's folder: a path, file://, s3://, gs://"
    )
    parser.add_argument(
        "--step", default="best", help="best (default), last, or the number of finished steps"
    )
    parser.add_argument("--output", required=True, metavar="URI", help="folder to write")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model there that no export of this project wrote: config, tokenizer, model*.safetensors",
    )
    arguments = parser.parse_args(argv)
    which = arguments.step
    if which not in ("best", "last"):
        if not which.isdecimal():
            parser.error(f"--step {which} is none of best, last and a number of steps")
        which = int(which)
    target = open_store(arguments.output)
    name = export_run(open_store(arguments.run), which, target, overwrite=arguments.overwrite)
    print(f"{name} is exported to {target.uri}")


if __name__ == "__main__":
    run_entry(main, ValueError)  # a model of another shape
