"""What tests share: one S3 server, one Ray session, a folder of the store for each test."""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local_s3 import BUCKETS, LocalS3
from cluster.sessions.loopback import set_local_variables
from cluster.sessions.session import NO_DASHBOARD, PROJECT, RAY_ENVIRONMENT

# Boto asks a cloud's metadata service for keys where it finds none; on a laptop that only takes time.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
# The tensors of tests are so small that a second thread only waits for the first, and for long on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before a test imports ray: every Ray of the tests, also of processes that they start, asks for one token.
set_local_variables()

# Tests compare with what the CPU computes, and start more workers than a machine has GPUs: those of test_gpu.py alone,
# all in processes of their own, see what there is.
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Programs that pip has for Linux on x86-64 alone, and the files whose every test needs one.
SERVER = "weed"
NEEDED = {
    "test_local_s3": SERVER,
    "test_k8s": "kubectl",
    "test_k8s_rules": "kubectl",
}


def is_installed(program: str) -> bool:
    return Path(sys.executable).with_name(program).exists() or bool(shutil.which(program))


def reason_to_skip(program: str) -> str:
    return f"{program} is not installed: pip has it for Linux on x86-64 alone"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if {"ray_session", "s3"} & fixtures:
            item.add_marker(pytest.mark.cluster)
        needed = SERVER if "s3" in fixtures else NEEDED.get(item.path.stem)
        if needed and not is_installed(needed):
            item.add_marker(pytest.mark.skip(reason_to_skip(needed)))
    # The longest files first: processes that take one file after another then end at about the same time.
    long = {item.path for item in items if item.get_closest_marker("cluster")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    """A failed test leaves its driver, and Ray under it, at work for ever."""
    yield
    if small_run := sys.modules.get("tests.small_run"):
        for driver in small_run.STARTED:
            if driver.poll() is None:
                small_run.kill_tree(driver.pid)
        small_run.STARTED.clear()


@pytest.fixture(scope="module")
def gpu() -> Iterator[None]:
    """Processes that the test starts see this machine's GPUs."""
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("needs a GPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES")
        if VISIBLE is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A real S3 server, to which the AWS variables of this process lead."""
    if not is_installed(SERVER):  # asked for by name only: the collection did not see it
        pytest.skip(reason_to_skip(SERVER))
    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_uri(s3: LocalS3) -> str:
    """An empty place in the S3 server, with all in its name that means something else in a URI."""
    return f"s3://{BUCKETS[0]}/{uuid.uuid4().hex} 50%25?é中#x+y"


@pytest.fixture(scope="session")
def ray_session(request: pytest.FixtureRequest) -> Iterator[None]:
    """One local Ray for all tests. Its workers import the project's packages and see the S3 server."""
    if is_installed(SERVER):
        request.getfixturevalue("s3")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray  # here, because it reads the variables above when imported

    # More CPUs than a small machine has: two training workers and Ray Data's reads go on side by side.
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=512 << 20,
        include_dashboard=False,
        logging_level="WARNING",
        runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT), **NO_DASHBOARD}},
    )
    yield
    ray.shutdown()
