"""What a session is like, in a process of its own: only one fits into a process."""

import errno
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.console.errors import ConfigError
from cluster.sessions import session
from cluster.sessions.loopback import close_token_file, is_loopback, set_local_variables
from cluster.sessions.session import PROJECT, ray_session
from cluster.sessions.workers import ClusterConfig
from tests.ray_nodes import RayNodes
from tests.small_run import listening

ASK = """
import json, logging, os, time
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig

def has_bars():
    import ray.data

    return ray.data.DataContext.get_current().enable_progress_bars

def logged():
    # What stands in this process's logs then.
    told = "\\x1b[2J at s3://KEY:PLANTED@bucket"
    print("printed", told, flush=True)
    logging.getLogger("of.a.worker").warning("logged %s", told)
    return [open(os.readlink(f"/proc/self/fd/{number}")).read() for number in (1, 2)]

def ask():
    from ray.util.state import get_actor

    began, error = time.monotonic(), None
    try:
        get_actor("0" * 32, timeout=10)
    except Exception as caught:
        error = [each.__name__ for each in type(caught).__mro__]
    policies = getattr(os, "sched_getscheduler", lambda pid: None)
    seconds = time.monotonic() - began
    return {"error": error, "seconds": seconds, "policy": policies(0), "bars": has_bars(), "logs": logged()}

with ray_session(ClusterConfig(address="local")):
    import ray

    found = ray.get(ray.remote(ask).remote())
    found["bars"] |= has_bars()
    print(json.dumps(found | {"head": ray.get_runtime_context().gcs_address}), flush=True)
    input()
"""


@pytest.fixture(scope="module")
def answer() -> Iterator[dict[str, Any]]:
    """What a task of a local session finds; the session lives as long as this."""
    command = [sys.executable, "-c", ASK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # What users set for a cluster or to be rid of a token must not open it.
    opened = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    with subprocess.Popen(command, cwd=PROJECT, env=os.environ | opened, **pipes) as driver:
        told = next(line for line in driver.stdout if line.startswith("{"))
        yield json.loads(told) | {"pid": driver.pid}
        driver.communicate("\n", timeout=60)
    assert driver.returncode == 0


@pytest.mark.cluster
def test_who_asks_the_dashboard_that_a_local_session_lacks_is_refused_at_once(answer: dict[str, Any]) -> None:
    """Ray Train's watcher of its controller asks once a second, and each end of a worker group waits for it."""
    assert "RayStateApiException" in answer["error"], "the only error that the watcher takes"
    assert answer["seconds"] < 10, "it looked for the dashboard's address"


@pytest.mark.cluster
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has it")
def test_processes_of_a_local_session_are_of_the_batch_class(answer: dict[str, Any]) -> None:
    assert answer["policy"] == os.SCHED_BATCH


@pytest.mark.cluster
def test_ray_data_has_no_progress_bar_of_its_own_for_a_thread_of_it_can_hang_after_ctrl_c(
    answer: dict[str, Any],
) -> None:
    assert answer["bars"] is False


@pytest.mark.cluster
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux has it")
def test_logs_of_rays_processes_hold_no_key_and_no_control_sequence(answer: dict[str, Any]) -> None:
    out, err = answer["logs"]
    assert "printed \\u001b[2J at s3://***@bucket" in out and "logged \\u001b[2J at s3://***@bucket" in err
    assert "PLANTED" not in out + err and "\x1b[2J" not in out + err


@pytest.mark.cluster
def test_a_local_session_listens_on_loopback_alone(answer: dict[str, Any]) -> None:
    found = listening(answer["pid"])
    assert found and all(map(is_loopback, found)), found


@pytest.mark.cluster
def test_the_token_of_a_local_session_stands_in_no_command_line(answer: dict[str, Any]) -> None:
    driver = psutil.Process(answer["pid"])
    below = driver.children(recursive=True)
    (token,) = {each.environ()["RAY_AUTH_TOKEN"] for each in below if each.name() in ("raylet", "gcs_server")}
    assert not [each for each in (driver, *below) if token in " ".join(each.cmdline())]


INTRUDE = """
import sys, ray
ray.init(address=sys.argv[1])
print(ray.get(ray.remote(lambda: "in").remote()))
"""


@pytest.mark.cluster
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_process_without_the_token_runs_nothing_in_a_local_session(
    mode: str, answer: dict[str, Any], tmp_path: Path
) -> None:
    own = without_ray() | {"HOME": str(tmp_path), "RAY_AUTH_MODE": mode} | session.FEW_TRIES
    own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray asks at this machine's outer address
    if mode == "token":
        own["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    command = [sys.executable, "-c", INTRUDE, answer["head"]]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "in" not in done.stdout.splitlines(), done.stdout
    assert "AuthenticationError" in done.stderr, done.stderr


def test_a_token_file_that_is_mounted_read_only_is_told_of_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "chmod", refuse)
    close_token_file()
    told = capsys.readouterr().out
    assert str(path) in told and "take it from them" in told and "secret" not in told


def test_a_ray_imported_before_its_session_is_refused_for_it_would_listen_on_all_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", session)
    set_local_variables()  # the tests' own have been set before
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(RuntimeError, match="must set RAY_AUTH_MODE: import it later"):
        set_local_variables()


@pytest.mark.parametrize(("mode", "closed"), [(0o644, 0o600), (0o660, 0o600), (0o400, 0o400)])
def test_a_token_file_that_others_could_read_is_closed_to_them(
    mode: int,
    closed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    close_token_file()  # there is none yet
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(mode)
    close_token_file()
    assert path.stat().st_mode & 0o777 == closed
    told = capsys.readouterr().out
    assert (str(path) in told) == (mode != closed) and "secret" not in told


@pytest.mark.parametrize("refuses", [False, True])
def test_who_starts_them_is_scheduled_as_before_also_where_the_kernel_refuses(
    refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [0]

    def set_scheduler(pid: int, policy: int, parameters: object) -> None:
        if refuses:
            raise OSError(22, "Invalid argument")  # as gVisor answers
        policies.append(policy)

    monkeypatch.setattr(os, "SCHED_OTHER", 0, raising=False)
    monkeypatch.setattr(os, "SCHED_BATCH", 3, raising=False)
    monkeypatch.setattr(os, "sched_param", lambda priority: None, raising=False)
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: policies[-1], raising=False)
    monkeypatch.setattr(os, "sched_setscheduler", set_scheduler, raising=False)
    with session.giving_way():
        inside = policies[-1]
    assert (inside, policies[-1]) == (0 if refuses else 3, 0)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:9", "127.0.0.1:9 does not answer: "),
        ("ray://127.0.0.1:9", "ray://127.0.0.1:9 does not answer: "),
        ("head", "head is no address of a Ray head: give it as head:6379 or ray://head:10001"),
    ],
)
def test_a_head_that_is_not_there_is_one_line_within_the_time_that_a_starting_one_gets(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CONNECT_SECONDS", 0.5)
    for name in session.FEW_TRIES:
        monkeypatch.setenv(name, "1")  # taken back after the test
    began = time.monotonic()
    with pytest.raises(ConfigError) as found, ray_session(ClusterConfig(address=address)):
        pass
    (line,) = found.value.problems
    assert line.startswith(f"cluster.address={address}: {why}") and "\n" not in line
    assert time.monotonic() - began < 30


def without_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


JOIN = """
import sys
from cluster.configuration.config import run_entry
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig

def main():
    with ray_session(ClusterConfig(address=sys.argv[1])):
        print("in")

run_entry(main)
"""


@pytest.mark.cluster
def test_a_token_that_is_wrong_or_missing_is_one_line_that_says_where_to_give_it(tmp_path: Path) -> None:
    tokens = {"right": secrets.token_hex(32), "wrong": secrets.token_hex(32), "missing": ""}
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": tokens["right"]}
    with RayNodes(tmp_path / "nodes.txt", settings=settings) as nodes:
        nodes.start_head(num_cpus=1)
        assert not all(map(is_loopback, listening(nodes.nodes[0].pid))), "other machines could not join"
        clean = without_ray() | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}  # no token of this user's
        started = {}
        for name, token in tokens.items():
            command = [sys.executable, "-c", JOIN, nodes.address]
            own = clean | ({"RAY_AUTH_TOKEN": token} if token else {})
            started[name] = subprocess.Popen(
                command, cwd=PROJECT, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        said = {name: (*each.communicate(timeout=180), each.returncode) for name, each in started.items()}
    assert said["right"][0].splitlines()[-1] == "in" and said["right"][2] == 0, said["right"]
    for name in ("wrong", "missing"):
        out, error, code = said[name]
        assert code == 2 and "in" not in out.splitlines(), said[name]
        (line,) = [line for line in error.splitlines() if line.startswith("cluster.address=")]
        assert "RAY_AUTH_TOKEN" in line and tokens["wrong"] not in line
        assert "Traceback" not in error
