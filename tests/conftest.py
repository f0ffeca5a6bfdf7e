"""What tests share: one S3 server, one Ray session, a folder of the store for each test."""

import os
import uuid
from collections.abc import Iterator

import pytest

from cluster.local_s3 import BUCKETS, LocalS3
from cluster.session import PROJECT, RAY_ENVIRONMENT

# Boto asks a cloud's metadata service for keys where it finds none; on a laptop that only takes time.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"ray_session", "s3"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """A real S3 server, to which the AWS variables of this process lead."""
    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_uri(s3: LocalS3) -> str:
    """An empty place in the S3 server."""
    return f"s3://{BUCKETS[0]}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_session(s3: LocalS3) -> Iterator[None]:
    """One local Ray for all tests. Its workers import the project's packages and see the S3 server."""
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
        runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT)}},
    )
    yield
    ray.shutdown()
