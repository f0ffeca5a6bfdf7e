"""The end of a run: validation has chosen a checkpoint, the test split judges it, once, and it is exported.

Law L6: `test.json` exists at most once in a run. Before the test split is opened, the claim on it is written down with
the checkpoint that it is for; another claim, or a second reading after the verdict, is an error.
"""

import json
from typing import Any

from cluster.configuration.stored_file import read_json
from cluster.console.errors import UserError
from cluster.storage.uris import Store
from trainers.stored.run_files import PUT_BACK, Claim

CLAIM = "test.claim.json"
VERDICT = "test.json"
EXPORT = "export"
"""Folder of the chosen model, as transformers loads it."""


class TestSplitError(UserError, RuntimeError):
    """The test split was to be read for anything but the one judgement of the chosen checkpoint."""

    __test__ = False  # not a test class for pytest


def claim_test_split(run: Store, checkpoint: str) -> None:
    """Take the one right of a run to read the test split, for this checkpoint.

    A judgement that was cut off before its verdict may claim again, for the same checkpoint.

    Raises:
        TestSplitError: the verdict exists, or the claim is for another checkpoint.
    """
    if run.exists(VERDICT):
        raise TestSplitError(
            f"{run.uri}/{VERDICT} exists: the test split was read, and judges a run only once"
        )
    if not run.put_if_absent(CLAIM, json.dumps({"checkpoint": checkpoint}, allow_nan=False).encode()):
        refuse_other_claim(run, checkpoint)


def refuse_other_claim(run: Store, checkpoint: str) -> None:
    """Raise `TestSplitError` if the run has taken its right for another checkpoint than this one."""
    if not run.exists(CLAIM):
        return
    if (first := read_json(run, CLAIM, Claim, PUT_BACK)["checkpoint"]) != checkpoint:
        raise TestSplitError(
            f"the test split was opened to judge {first}, and cannot judge {checkpoint} too; "
            f"compare models on the validation split"
        )


def record_verdict(run: Store, verdict: dict[str, Any]) -> None:
    """Write `test.json`.

    Raises:
        TestSplitError: there is one.
    """
    if not run.put_if_absent(VERDICT, json.dumps(verdict, indent=2, allow_nan=False).encode()):
        raise TestSplitError(f"{run.uri}/{VERDICT} exists already: the test split judges a run only once")
