"""Law L6: the test split judges once."""

import json

import pytest

from cluster.storage.uris import open_store
from trainers.evaluation.verdict import CLAIM, VERDICT, TestSplitError, claim_test_split, record_verdict


def test_test_split_is_read_once(tmp_path):
    run = open_store(str(tmp_path))
    claim_test_split(run, "step-00000010-w2-a1")
    record_verdict(run, {"step": 10, "loss": 1.5})
    assert json.loads(run.read(VERDICT)) == {"step": 10, "loss": 1.5}
    with pytest.raises(TestSplitError, match="judges a run only once"):
        claim_test_split(run, "step-00000010-w2-a1")
    with pytest.raises(TestSplitError, match="judges a run only once"):
        record_verdict(run, {"step": 10, "loss": 1.4})
    assert json.loads(run.read(VERDICT)) == {"step": 10, "loss": 1.5}


def test_a_cut_judgement_goes_on_but_for_no_other_checkpoint(tmp_path):
    run = open_store(str(tmp_path))
    claim_test_split(run, "step-00000010-w2-a1")
    claim_test_split(run, "step-00000010-w2-a1")
    with pytest.raises(TestSplitError, match="cannot judge step-00000020-w2-a1 too"):
        claim_test_split(run, "step-00000020-w2-a1")
    assert json.loads(run.read(CLAIM)) == {"checkpoint": "step-00000010-w2-a1"}
