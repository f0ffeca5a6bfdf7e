"""One driver at a time: a living one is never put aside, a dead one always."""

import json
import os
import subprocess
import sys
import threading

import pytest

from cluster.storage import open_store
from trainers import lease as leases
from trainers.lease import LEASE, RunTakenError, lease


@pytest.fixture
def run(tmp_path):
    return open_store(str(tmp_path))


def test_a_second_driver_is_refused_while_the_first_lives_and_not_after(run):
    with lease(run):
        with pytest.raises(RunTakenError, match=f"process {os.getpid()}"), lease(run):
            pass
        assert run.exists(LEASE), "the refused driver took the lease away"
    with lease(run):
        pass
    assert not run.exists(LEASE)


def test_the_lease_of_a_process_that_was_killed_is_taken_over(run, tmp_path):
    program = "import os; from cluster.storage import open_store; from trainers.lease import lease\n"
    program += f"with lease(open_store({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."})
    assert run.exists(LEASE)
    with lease(run):
        assert json.loads(run.read(LEASE))["pid"] == os.getpid()


def test_another_process_under_the_same_number_does_not_keep_a_dead_driver_alive(run):
    with lease(run):
        dead = json.loads(run.read(LEASE)) | {"process_started": 1.0}
    run.put(LEASE, json.dumps(dead).encode())
    with lease(run):
        pass


def test_a_driver_on_another_host_lives_as_long_as_it_renews(run, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    told: list[str] = []
    with lease(run):
        monkeypatch.setattr(leases.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(RunTakenError), lease(run, told.append, patience=0.6):
            pass
        left = run.read(LEASE)
    run.put(LEASE, left)  # as if it had died without a word
    with lease(run, told.append, patience=0.6):
        pass
    assert len(told) == 2


def test_of_many_that_find_a_dead_driver_one_takes_over(run):
    with lease(run):
        dead = json.loads(run.read(LEASE)) | {"process_started": 1.0}
    run.put(LEASE, json.dumps(dead).encode())
    together, done, taken = threading.Barrier(6), threading.Barrier(6), []

    def drive(number: int) -> None:
        together.wait()
        try:
            with lease(run):
                taken.append(number)
                done.wait()
        except RunTakenError:
            done.wait()

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
