"""Stores by URI: `file://` or a plain path, `s3://`, `gs://`.

No other module but `cluster.storage.google_cloud` speaks to an object store.

S3 takes credentials, region and endpoint from the standard AWS variables, profiles and roles (IRSA included),
Google Cloud Storage from its application default credentials.
"""

import functools
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3
import botocore.exceptions as aws
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.utils import is_valid_endpoint_url, is_valid_ipv6_endpoint_url

from cluster.console.errors import ConfigError
from cluster.console.printable import printable
from cluster.limits.bounds import location_problem, seconds_given
from cluster.storage.google_cloud import GoogleStore
from cluster.storage.local import LocalStore
from cluster.storage.remote import Failure, RemoteStore
from cluster.storage.store import (
    PATIENCE,
    TOO_SHORT,
    ObjectInfo,
    RetryPolicy,
    StorageError,
    Store,
    checked_path,
)

__all__ = ["ObjectInfo", "RetryPolicy", "StorageError", "Store", "lies_in", "open_parent", "open_store"]

T = TypeVar("T")

# Up to 64 MiB one request; above, parts of 32 MiB (S3 takes 10,000), 4 at once: workers share a link.
MULTIPART = TransferConfig(
    multipart_threshold=64 << 20,
    multipart_chunksize=32 << 20,
    max_concurrency=4,
    preferred_transfer_client="classic",
)


def open_store(uri: str, policy: RetryPolicy | None = None) -> Store:
    """The store at `uri`, which may be empty. Connects at first use; can be pickled. Raises `ConfigError`.

    Without a policy a store that is away is waited for as long as STORE_PATIENCE_SECONDS says: 120 unless it is set,
    and 540 in a session's workers (cluster/sessions/session.py). More is of use only below `heartbeat.timeout_seconds`.
    """
    policy = policy or RetryPolicy(give_up_seconds=seconds_given(PATIENCE, RetryPolicy.give_up_seconds))
    scheme, separator, rest = uri.partition("://")
    if not separator and re.match(r"(s3|gs|file):/", uri):
        raise ConfigError([f"{uri} has one slash too few: {uri.replace(':/', '://', 1)}"])
    if problem := location_problem(scheme if separator else "file", rest or uri):
        raise ConfigError([f"the location {printable(uri)[:60]} {problem}"])
    if not separator or (scheme == "file" and rest.startswith("/")):
        return LocalStore(f"file://{Path(rest or uri).expanduser().absolute()}", policy)
    bucket = rest.partition("/")[0]
    if scheme == "s3" and bucket and not {"@", ":"} & set(bucket):
        return S3Store(f"s3://{rest.strip('/')}", policy, _endpoint())
    if scheme == "gs" and bucket and not {"@", ":"} & set(bucket):
        return GoogleStore(f"gs://{rest.strip('/')}", policy)
    if {"@", ":"} & set(bucket):  # whoever wrote it there meant a key: it is not shown
        raise ConfigError(
            [f"a {scheme}:// URI holds credentials: give them by the AWS variables or a role instead"]
        )
    raise ConfigError(
        [f"{uri} is not a location: use a path, file:///PATH, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"]
    )


def open_parent(uri: str) -> tuple[Store, str]:
    """The store that holds the file at `uri`, and the file's name there. Raises `ConfigError`."""
    parent, slash, name = uri.rstrip("/").rpartition("/")
    return open_store(parent + slash), name


def lies_in(inner: str, outer: str) -> bool:
    """Whether what is at one URI is the other one's place or a part of it, however both are spelled and linked."""
    return path_within(inner, outer) is not None


def path_within(inner: str, outer: str) -> str | None:
    """The path of one URI's place within the other's, as `lies_in` has it; None where it does not lie there."""
    places = []
    for uri in (inner, outer):
        scheme, _, place = open_store(uri).uri.partition("://")
        places.append(
            f"{scheme}://{os.path.realpath(place) if scheme == 'file' else place}".rstrip("/") + "/"
        )
    return places[0].removeprefix(places[1]) if places[0].startswith(places[1]) else None


# --- S3 ---

_BUSY = {
    "SlowDown",
    "RequestTimeout",
    "ConditionalRequestConflict",
    "OperationAborted",
    "Throttling",
    "ThrottlingException",
    "RequestThrottled",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
}
# Not only of the store: a role's keys come from services of their own, which fail now and then.
_PASSING = (
    aws.HTTPClientError,
    aws.ConnectionError,
    aws.IncompleteReadError,
    aws.FlexibleChecksumError,
    aws.MetadataRetrievalError,
    aws.CredentialRetrievalError,
)
_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role, and the bucket's policy"
_REMEDIES = {
    "403": _KEYS,
    "AccessDenied": _KEYS,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "InvalidRange": TOO_SHORT,
    "NoSuchBucket": "create the bucket or correct the URI",
    "RequestTimeTooSkewed": "this host's clock is wrong: start chrony or ntpd on it",
    "NotImplemented": "use a store that knows conditional writes (If-None-Match)",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or a role",
    "": "check that the store runs, and AWS_ENDPOINT_URL if it is not Amazon's",
}


@dataclass(frozen=True)
class S3Store(RemoteStore):
    """A bucket and prefix of S3, or of a store that speaks its protocol at `endpoint` (None: Amazon's)."""

    endpoint: str | None = None

    def read(self, path: str) -> bytes:
        return self._body(path)

    def read_range(self, path: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        return self._whole(path, self._body(path, Range=f"bytes={start}-{start + length - 1}"), start, length)

    def put(self, path: str, data: bytes | memoryview) -> None:
        if memoryview(data).nbytes > MULTIPART.multipart_threshold:
            self._transfer(path, lambda: io.BytesIO(data))
        else:
            self._call("write", path, lambda s3, at: s3.put_object(**at, Body=bytes(data)))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex

        def put(s3: Any, at: dict[str, str]) -> bool:
            try:
                s3.put_object(**at, Body=data, IfNoneMatch="*", Metadata={"writer": writer})
            except aws.ClientError as error:
                if error.response["Error"]["Code"] not in ("PreconditionFailed", "412"):
                    raise
                # If the answer to our first try was lost, what stands there and refuses the second is ours.
                return s3.head_object(**at)["Metadata"].get("writer") == writer
            return True

        return self._call("write", path, put)

    def upload(self, local: Path, path: str) -> None:
        self._transfer(path, lambda: open(local, "rb"))  # noqa: SIM115  (the transfer closes it)

    def _transfer(self, path: str, source: Callable[[], BinaryIO]) -> None:
        def transfer(s3: Any, at: dict[str, str]) -> None:
            with source() as file:
                s3.upload_fileobj(file, **at, Config=MULTIPART)

        self._call("write", path, transfer)

    def size(self, path: str) -> int:
        return self._call("look up", path, lambda s3, at: s3.head_object(**at)["ContentLength"])

    def delete(self, path: str) -> None:
        self._call("delete", path, lambda s3, at: s3.delete_object(**at))

    def scan(self, prefix: str = "") -> Iterator[ObjectInfo]:
        bucket, root = self._key("")
        request = {"Bucket": bucket, "Prefix": root + prefix}
        while True:
            page = self._call("list", prefix, lambda s3, _: s3.list_objects_v2(**request))
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # else a folder, as consoles make them
                    yield ObjectInfo(entry["Key"].removeprefix(root), entry["Size"], entry["ETag"].strip('"'))
            if not page["IsTruncated"]:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def clock(self) -> float:
        bucket, root = self._key("")
        request = {"Bucket": bucket, "Prefix": root, "MaxKeys": 1}
        answer = self._call("list", "", lambda s3, _: s3.list_objects_v2(**request))
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def _body(self, path: str, **span: str) -> bytes:
        """The answer's body, read inside the retries: the client checks length and sum, but tries no more."""
        return self._call("read", path, lambda s3, at: s3.get_object(**at, **span)["Body"].read())

    def _key(self, path: str) -> tuple[str, str]:
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        return bucket, f"{prefix}/{checked_path(path)}" if prefix else checked_path(path)

    def _call(self, operation: str, path: str, send: Callable[[Any, dict[str, str]], T]) -> T:
        """The result of `send(client, {"Bucket": …, "Key": …})`, tried again until the policy gives up.

        The client itself makes 3 quick attempts; ours are for a store that is away, and for a body cut off.
        """
        bucket, key = self._key(path)

        def attempt() -> T:
            client = _s3_client(self.endpoint, self.policy, os.getpid(), _aws_variables())
            return send(client, {"Bucket": bucket, "Key": key})

        return self._retried(operation, path, attempt)

    @staticmethod
    def _failure(error: Exception) -> Failure | None:
        if isinstance(error, aws.ClientError):
            code, text = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            return Failure(
                f"{code} {text}".strip(),
                _REMEDIES.get(code, _REMEDIES[""]),
                is_passing=code in _BUSY or status == 429 or (status >= 500 and status != 501),
                is_absent=code in ("404", "NoSuchKey"),
            )
        if isinstance(error, aws.BotoCoreError):
            remedy = _REMEDIES.get(type(error).__name__, _REMEDIES[""])
            return Failure(str(error), remedy, is_passing=isinstance(error, _PASSING))
        return None


def _endpoint() -> str | None:
    """The store's address by the environment; None for Amazon's. ConfigError, which does not show it, if it is none."""
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if given := os.environ.get(variable):
            if _is_address(given):
                return given
            remedy = "give it as http://HOST:PORT or https://HOST"
            raise ConfigError([f"the variable {variable} is no address of a store; {remedy}"])
    return None


def _is_address(text: str) -> bool:
    if not re.fullmatch(r"https?://\S+", text, re.IGNORECASE):
        return False
    try:  # as the client does, whose own error shows all of it
        return bool(is_valid_endpoint_url(text) or is_valid_ipv6_endpoint_url(text))
    except ValueError:
        return False


def _aws_variables() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.cache
def _s3_client(
    endpoint: str | None, policy: RetryPolicy, process: int, variables: tuple[tuple[str, str], ...]
) -> Any:
    """One client for all threads of a process (a fork may not share sockets) while the variables stay."""
    config = Config(
        connect_timeout=policy.connect_seconds,
        read_timeout=policy.silence_seconds,
        # Standard: backs off with jitter, up to a quota of retries, so as not to besiege a store in trouble.
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=32,
        tcp_keepalive=True,
        # A private server has seldom a name for each bucket; Amazon is giving up names in paths.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return boto3.Session().client("s3", endpoint_url=endpoint, config=config)
