"""Continuing prompts with an exported model.

    python trainers/generate.py --model runs/NAME/export --prompt "To be, or" --prompt "Enter" --temperature
    0.7

Legend: B prompts, T positions, V vocabulary.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from cluster.configuration.config import run_entry
from cluster.configuration.keys import keys_of
from cluster.hardware.machine import device_here
from cluster.limits.bounds import finite_number, whole_number
from cluster.storage.uris import open_store
from trainers.exported.folder import load_exported
from trainers.exported.sampling import SamplingConfig, complete


def main(argv: Sequence[str] | None = None) -> None:
    """Continue the prompts of the command line and print them."""
    arguments = parse(argv)
    exported = load_exported(open_store(arguments.model))
    exported.model.to(device_here())
    for prompt, completion in zip(
        arguments.prompt, complete(exported, arguments.prompt, arguments.sampling), strict=True
    ):
        print(
            f"{prompt}{completion.text}\n--- {len(completion.tokens)} tokens, ended by {completion.ended_by}"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `sampling` holds the fields of SamplingConfig."""
    parser = argparse.ArgumentParser(description="Continue prompts with an exported model.")
    parser.add_argument(
        "--model", required=True, metavar="URI", help="exported folder: a path, file://, s3:// or gs://"
    )
    parser.add_argument(
        "--prompt", required=True, action="append", help="beginning of a document; repeatable"
    )
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends a continuation; repeatable"
    )
    for key in keys_of(SamplingConfig).values():
        if key.name != "stop":
            flag = f"--{key.name.replace('_', '-')}"
            parser.add_argument(
                flag,
                type={int: whole_number, float: finite_number}[key.hint],
                default=key.default,
                help=f"{key.doc} (default {key.default})",
            )
    arguments = parser.parse_args(argv)
    given = {key: getattr(arguments, key) for key in keys_of(SamplingConfig)}
    arguments.sampling = SamplingConfig(**given | {"stop": tuple(arguments.stop)})
    if problems := list(arguments.sampling.problems("")):
        parser.error("; ".join(problem.lstrip(".") for problem in problems))
    return arguments


if __name__ == "__main__":
    run_entry(main, ValueError)  # a missing folder, a model of another shape, a prompt that is too long
