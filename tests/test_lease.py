"""One driver at a time: a living one is never put aside, a dead one always."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from cluster.storage.uris import open_store
from tests.fault_proxy import FaultProxy
from trainers.recovery import lease as leases
from trainers.recovery.lease import FOLDER, RunTakenError, lease

FIRST, SECOND = f"{FOLDER}/00000001.json", f"{FOLDER}/00000002.json"
SUCCESSOR = b'{"host": "elsewhere", "pid": 7, "process_started": 1.0, "token": "another"}'


@pytest.fixture
def run(tmp_path):
    return open_store(str(tmp_path))


def put_dead(run):
    """The lease of a process that died without a word, whose number another has by now."""
    dead = leases.place() | {"pid": os.getpid(), "process_started": 1.0, "token": "dead"}
    run.put(FIRST, json.dumps(dead).encode())


def paths(run):
    return [info.path for info in run.list()]


def test_a_second_driver_is_refused_while_the_first_lives_and_not_after(run):
    with lease(run):
        with pytest.raises(RunTakenError, match=f"process {os.getpid()}"), lease(run):
            pass
        assert paths(run) == [FIRST], "the refused driver left a trace"
    with lease(run):
        assert paths(run) == [FIRST.replace("json", "ended"), FIRST, SECOND]


@pytest.mark.parametrize("old", [0, 1, 2])
def test_a_driver_that_counted_from_an_old_listing_looks_again(run, monkeypatch, old):
    for _ in range(2):
        with lease(run):
            pass
    look, seen = leases.newest, [old]
    with lease(run):
        monkeypatch.setattr(leases, "newest", lambda store: seen.pop() if seen else look(store))
        with pytest.raises(RunTakenError), lease(run):
            pass


@pytest.mark.slow
def test_the_lease_of_a_process_that_was_killed_is_taken_over(run, tmp_path):
    program = (
        "import os; from cluster.storage.uris import open_store; from trainers.recovery.lease import lease\n"
    )
    program += f"with lease(open_store({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    killed = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": "."})
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has asked for it yet
    assert paths(run) == [FIRST]
    with lease(run):
        assert json.loads(run.read(SECOND))["pid"] == os.getpid()
    killed.wait()


def test_another_process_under_the_same_number_does_not_keep_a_dead_driver_alive(run):
    put_dead(run)
    with lease(run):
        pass


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_clock_that_is_set_while_a_driver_lives_takes_the_run_from_nobody(run, monkeypatch, seconds):
    with lease(run):
        # What Linux says of a boot is now minus the time since then: it moves with the clock.
        booted = psutil.boot_time() + seconds
        monkeypatch.setattr(psutil, "boot_time", lambda: booted)
        monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: booted)
        with pytest.raises(RunTakenError), lease(run):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["host", "boot", "pid_namespace"])
def test_a_driver_in_another_place_lives_as_long_as_it_renews(run, monkeypatch, differs):
    """Of two containers, or machines, with one host name neither sees the other's processes."""
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    told: list[str] = []
    here = leases.place()
    with lease(run):
        monkeypatch.setattr(leases, "place", lambda: here | {differs: "another"})
        monkeypatch.setattr(leases, "lives", lambda holder: False)
        with pytest.raises(RunTakenError), lease(run, told.append, patience=0.6):
            pass
    run.delete(FIRST.replace("json", "ended"))  # as if it had died without a word
    with lease(run, told.append, patience=0.6):
        pass
    assert len(told) == 2


@pytest.mark.cluster
def test_a_renewal_that_lands_after_the_run_was_taken_over_takes_it_from_nobody(s3, s3_uri, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    direct, told, is_told = open_store(s3_uri), [], threading.Event()
    with FaultProxy(s3.port) as proxy:
        with monkeypatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", proxy.url)
            delayed = open_store(s3_uri)
        with lease(delayed, on_lost=lambda message: (told.append(message), is_told.set())):
            proxy.break_next("late", times=1_000, method="PUT")
            wait_until(lambda: proxy.broken.count("late") > 3)
            monkeypatch.setattr(leases.socket, "gethostname", lambda: "elsewhere")
            with lease(direct, print, patience=1.0, on_lost=told.append):
                proxy.clear()
                answers = proxy.deliver()
                assert len(answers) > 3 and all(b" 200 " in answer for answer in answers)
                assert is_told.wait(30)
                held = direct.read(SECOND.replace("json", "renewed"))
                wait_until(lambda: direct.read(SECOND.replace("json", "renewed")) != held)
    assert len(told) == 1 and "on elsewhere drives it" in told[0]


def wait_until(condition, seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.slow
def test_of_many_that_find_a_dead_driver_one_takes_over(run):
    put_dead(run)
    together, done, taken = threading.Barrier(6), threading.Barrier(6, timeout=30), []

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


@pytest.mark.parametrize("successor", [SECOND, FIRST, None])
def test_a_driver_whose_run_was_taken_over_is_told_and_leaves_the_lease_alone(run, monkeypatch, successor):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    told, is_told = [], threading.Event()

    def on_lost(message: str) -> None:
        told.append(message)
        is_told.set()

    with lease(run, on_lost=on_lost):
        if successor:
            run.put(successor, SUCCESSOR)  # the second number; or the first, in a folder that was begun anew
        else:
            run.delete(FIRST)
        assert is_told.wait(20)
    assert len(told) == 1 and run.uri in told[0]
    assert not any(path.endswith("ended") for path in paths(run))
    assert successor is None or run.read(successor) == SUCCESSOR


@pytest.mark.slow
def test_a_suspended_driver_ends_at_once_without_a_trace_when_it_wakes(run, tmp_path):
    program = f"""
import atexit, signal
from cluster.storage.uris import open_store
from trainers.recovery import lease as leases
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
        run.put(SECOND, SUCCESSOR)
        driver.send_signal(signal.SIGCONT)
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert "process 7 on elsewhere" in errors and "Traceback" not in errors
    assert set(paths(run)) - {FIRST.replace("json", "renewed")} == {FIRST, SECOND}


DAMAGED = b'{"host": "elsewhere", "pid": -1}'


def test_a_damaged_lease_that_nobody_renews_is_taken_over_and_told(run):
    run.put(FIRST, DAMAGED)
    told: list[str] = []
    with lease(run, told.append, patience=0.06):
        assert SECOND in paths(run)
    assert len(told) == 1 and "00000001.json is damaged: pid" in told[0] and "waiting" in told[0]


def test_a_driver_whose_lease_was_damaged_lives_as_long_as_it_renews(run, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)
    lost: list[str] = []
    with lease(run, on_lost=lost.append):
        run.put(FIRST, DAMAGED)
        with pytest.raises(RunTakenError, match="unknown process"), lease(run, print, patience=0.6):
            pass
    assert not lost and FIRST.replace("json", "ended") in paths(run)


def test_files_with_other_names_are_nobodys_lease(run):
    for name in (".DS_Store", "copy.json", "00000009.json.bak", "00000009 2.json"):
        run.put(f"{FOLDER}/{name}", b"\xff")
    with lease(run):
        assert FIRST in paths(run)
