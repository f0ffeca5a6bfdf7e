"""What workers tell each other, and how long one waits for another that does not come."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainers.engine.collectives import Workers, limit_collectives


def wait_for_one_that_does_not_come(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    group = dist.new_group([0, 1])
    limit_collectives(1.0)
    if rank == 0:
        for each in (None, group):
            started = time.monotonic()
            with pytest.raises(RuntimeError, match="[Tt]imed out"):
                dist.all_reduce(torch.ones(1), group=each)
            assert 0.5 < time.monotonic() - started < 10
        os._exit(0)  # gloo's threads of a group that failed may abort a process that ends otherwise
    else:
        time.sleep(4)


@pytest.mark.slow
def test_every_group_gets_the_limit(tmp_path):
    mp.spawn(wait_for_one_that_does_not_come, (str(tmp_path),), nprocs=2)


def tell_apart(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    workers = Workers()
    assert workers.sum([1.0, *workers.apart(0.5 + rank)]) == [2.0, 0.5, 1.5]
    dist.destroy_process_group()


@pytest.mark.slow
def test_values_that_are_put_apart_arrive_apart_in_one_sum(tmp_path):
    mp.spawn(tell_apart, (str(tmp_path),), nprocs=2)
