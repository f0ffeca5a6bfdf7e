"""What the loop refuses to go on from."""

from types import SimpleNamespace

import pytest
import torch

from cluster.storage import open_store
from trainers.checkpoint import CheckpointConfig, latest_checkpoint
from trainers.checkpoint_writer import CheckpointWriter
from trainers.loop import restore
from trainers.state import VALUE, StateSlice


@pytest.mark.parametrize("key", ["manifest", "tokenizer", "order"])
def test_a_checkpoint_made_with_another_tokenizer_or_other_data_is_refused_by_name(key, tmp_path):
    identity = {"manifest": "m1", "tokenizer": "t1", "order": "o1"}
    store = open_store(str(tmp_path))
    with CheckpointWriter(store, CheckpointConfig(), rank=0, world_size=1, attempt=1) as writer:
        weight = StateSlice("norm.weight", VALUE, (4,), 0, torch.ones(4))
        writer.save(3, [weight], {"identity": identity, "guard": {}, "selection": {}})
    parts = SimpleNamespace(newest=latest_checkpoint(store), identity=identity | {key: "another"})
    with pytest.raises(ValueError, match=rf"step-00000003.*{key}: {identity[key]} there, another here"):
        restore(parts)
