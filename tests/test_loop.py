"""What the loop refuses to go on from."""

from types import SimpleNamespace

import pytest
import torch

from cluster.storage import open_store
from trainers.checkpoint import CheckpointConfig, best_name, latest_checkpoint
from trainers.checkpoint_writer import CheckpointWriter
from trainers.loop import restore
from trainers.selection import Selection
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


def test_the_record_of_the_best_step_is_written_again_if_it_was_cut_off_from_its_checkpoint(tmp_path):
    store = open_store(str(tmp_path))
    selection = Selection(best_step=3, best_loss=2.0, best_bits_per_byte=1.0, validated_step=3)
    with CheckpointWriter(store, CheckpointConfig(), rank=0, world_size=1, attempt=1) as writer:
        weight = StateSlice("norm.weight", VALUE, (4,), 0, torch.ones(4))
        writer.save(3, [weight], {"identity": {}, "guard": {}, "selection": selection.as_json()})
    parts = SimpleNamespace(
        newest=latest_checkpoint(store),
        identity={},
        run=store,
        engine=SimpleNamespace(load_state=lambda reader: None),
        guard=SimpleNamespace(load=lambda state: None),
        workers=SimpleNamespace(leads=True, world_size=1),
        metrics=None,
        heartbeat=SimpleNamespace(beat=lambda *_: None),
    )
    assert best_name(store) is None
    assert restore(parts) == (3, selection)
    assert best_name(store) == parts.newest.name
