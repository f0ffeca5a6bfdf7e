"""One driver at a time: a living one is never put aside, a dead one always."""

import json
import os
import signal
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


@pytest.mark.slow
def test_the_lease_of_a_process_that_was_killed_is_taken_over(run, tmp_path):
    program = "import os; from cluster.storage import open_store; from trainers.lease import lease\n"
    program += f"with lease(open_store({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."})
    assert run.exists(LEASE)
    with lease(run):
        assert json.loads(run.read(LEASE))["pid"] == os.getpid()


@pytest.mark.slow
def test_another_process_under_the_same_number_does_not_keep_a_dead_driver_alive(run):
    with lease(run):
        dead = json.loads(run.read(LEASE)) | {"process_started": 1.0}
    run.put(LEASE, json.dumps(dead).encode())
    with lease(run):
        pass


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("successor", [b'{"host": "elsewhere", "pid": 7, "token": "another"}', None])
def test_a_driver_whose_run_was_taken_over_is_told_and_leaves_the_lease_alone(run, monkeypatch, successor):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    told, is_told = [], threading.Event()

    def on_lost(message: str) -> None:
        told.append(message)
        is_told.set()

    with lease(run, on_lost=on_lost):
        if successor:
            run.put(LEASE, successor)
        else:
            run.delete(LEASE)  # it took over, and has ended by now
        assert is_told.wait(20)
    assert len(told) == 1 and run.uri in told[0]
    assert (run.read(LEASE) if run.exists(LEASE) else None) == successor


def test_a_suspended_driver_ends_at_once_without_a_trace_when_it_wakes(run, tmp_path):
    program = f"""
import atexit, signal
from cluster.storage import open_store
from trainers import lease as leases
leases.RENEW_SECONDS = 1.0
run = open_store({str(tmp_path)!r})
signal.signal(signal.SIGTERM, lambda *_: run.put("stop", b""))
atexit.register(lambda: run.put("stop", b""))
with leases.lease(run):
    print("driving", flush=True)
    signal.pause()
"""
    command = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": "."}, **pipes) as driver:
        assert driver.stdout.readline() == "driving\n"
        driver.send_signal(signal.SIGSTOP)
        successor = b'{"host": "elsewhere", "pid": 7, "token": "another"}'
        run.put(LEASE, successor)
        driver.send_signal(signal.SIGCONT)
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert "process 7 on elsewhere" in errors and "Traceback" not in errors
    assert [info.path for info in run.list()] == [LEASE] and run.read(LEASE) == successor
