"""A worker that hangs leaves its stacks and ends with a status of its own; one that beats is left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainers.recovery.heartbeat import EXIT_HUNG, HeartbeatConfig

WORKER = """
import sys, threading, time
from cluster.storage.uris import open_store
from trainers.recovery.heartbeat import Heartbeat, HeartbeatConfig

def wait_for_a_lock_that_nobody_frees():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def spin(seconds):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass

store = {store}
config = HeartbeatConfig(timeout_seconds=0.5, phase_timeout_seconds={phases}, linger_seconds={linger})
with Heartbeat(config, store, rank=3, attempt=2) as heart:
    {body}
print("done")
"""
STORE = "open_store(sys.argv[1])"


def run(
    tmp_path: Path, body: str, phases: dict[str, float] | None = None, store: str = STORE, linger: float = 0.0
):
    code = WORKER.format(store=store, phases=phases or {}, body=body, linger=linger)
    command = [sys.executable, "-c", code, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_worker_stuck_in_a_lock_leaves_its_stacks_and_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    ended = run(tmp_path, "heart.beat(41); wait_for_a_lock_that_nobody_frees()")
    assert ended.returncode == EXIT_HUNG
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name == "00000041-a2-worker00003.txt"
    for text in (file.read_text(), ended.stderr):
        assert "in phase 'step' of step 41" in text
        assert "thread MainThread" in text
        assert "in wait_for_a_lock_that_nobody_frees" in text


def test_a_worker_that_hangs_before_its_first_beat_is_ended_too(tmp_path: Path) -> None:
    ended = run(tmp_path, "wait_for_a_lock_that_nobody_frees()", phases={"start": 0.6})
    assert ended.returncode == EXIT_HUNG
    assert "limit 0.6 s) in phase 'start' of step 0" in ended.stderr


@pytest.mark.slow
def test_a_worker_that_beats_runs_to_its_end(tmp_path: Path) -> None:
    ended = run(tmp_path, "[(heart.beat(step), spin(0.05)) for step in range(20)]")
    assert (ended.returncode, ended.stdout) == (0, "done\n")
    assert not (tmp_path / "stacks").exists()


@pytest.mark.slow
def test_a_slow_phase_has_its_own_limit_and_the_next_phase_the_usual_one_again(tmp_path: Path) -> None:
    body = "heart.beat(0, 'compile'); spin(1.0); print('compiled', flush=True); heart.beat(1); spin(50)"
    started = time.monotonic()
    ended = run(tmp_path, body, phases={"compile": 40.0})
    assert (ended.returncode, ended.stdout) == (EXIT_HUNG, "compiled\n")
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_store_that_hangs_too_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    store = "type('Stuck', (), {'put': lambda self, path, data: wait_for_a_lock_that_nobody_frees()})()"
    ended = run(tmp_path, "heart.beat(7); spin(50)", store=store)
    assert ended.returncode == EXIT_HUNG
    assert "no beat for" in ended.stderr


@pytest.mark.slow
def test_it_lingers_so_that_the_others_can_leave_their_stacks(tmp_path: Path) -> None:
    started = time.monotonic()
    ended = run(tmp_path, "heart.beat(1); spin(50)", linger=2.0)
    assert ended.returncode == EXIT_HUNG
    assert time.monotonic() - started > 2.5


@pytest.mark.parametrize("phase_seconds", [5.0, 15.0])
def test_a_phase_may_not_have_a_shorter_limit_than_all_others(phase_seconds: float) -> None:
    config = HeartbeatConfig(timeout_seconds=10, phase_timeout_seconds={"compile": phase_seconds})
    problems = list(config.problems("heartbeat"))
    assert bool(problems) == (phase_seconds < 10)
    assert all("heartbeat.phase_timeout_seconds.compile=5.0" in problem for problem in problems)


def test_configuration_problems_name_key_and_value() -> None:
    problems = list(HeartbeatConfig(timeout_seconds=0, linger_seconds=-1).problems("heartbeat"))
    assert len(problems) == 2
    assert "heartbeat.timeout_seconds=0" in problems[0]
    assert "heartbeat.linger_seconds=-1" in problems[1]
    assert not list(HeartbeatConfig().problems("heartbeat"))
