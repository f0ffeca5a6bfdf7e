"""Stores by URI: `file://` or a plain path, `s3://`, `gs://`. No other module speaks to an object store.

S3 takes credentials, region and endpoint from the standard AWS variables, profiles and roles (IRSA included),
Google Cloud Storage from its application default credentials.
"""

import contextlib
import functools
import io
import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import boto3
import botocore.exceptions as aws
import pyarrow.fs
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from cluster.store import (
    READ_AHEAD_BYTES,
    TOO_SHORT,
    LocalStore,
    ObjectInfo,
    RetryPolicy,
    StorageError,
    Store,
    checked_path,
)

__all__ = ["ObjectInfo", "RetryPolicy", "StorageError", "Store", "open_store"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Up to 64 MiB one request; above, parts of 32 MiB (S3 takes 10,000), 4 at once: workers share a link.
MULTIPART = TransferConfig(
    multipart_threshold=64 << 20,
    multipart_chunksize=32 << 20,
    max_concurrency=4,
    preferred_transfer_client="classic",
)
FIRST_BACKOFF_SECONDS = 0.1  # doubled after each failure up to
LONGEST_BACKOFF_SECONDS = 5.0  # and cut by up to a half at random, so that many readers do not return at once


def open_store(uri: str, policy: RetryPolicy | None = None) -> Store:
    """The store at `uri`, which may be empty. Connects at first use; can be pickled. Raises `ValueError`."""
    policy = policy or RetryPolicy()
    scheme, separator, rest = uri.partition("://")
    if not separator or (scheme == "file" and rest.startswith("/")):
        return LocalStore(f"file://{Path(rest or uri).expanduser().absolute()}", policy)
    bucket = rest.partition("/")[0]
    if scheme == "s3" and bucket and not {"@", ":"} & set(bucket):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return S3Store(f"s3://{rest.strip('/')}", policy, endpoint)
    if scheme == "gs" and bucket and not {"@", ":"} & set(bucket):
        return GoogleStore(f"gs://{rest.strip('/')}", policy)
    if {"@", ":"} & set(bucket):  # whoever wrote it there meant a key: it is not shown
        raise ValueError(
            f"a {scheme}:// URI holds credentials: give them by the AWS variables or a role instead"
        )
    raise ValueError(
        f"{uri} is not a location: use a path, file:///PATH, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    )


# --- S3 ---

_BUSY = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}
_NETWORK = (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, aws.FlexibleChecksumError)
_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role, and the bucket's policy"
_REMEDIES = {
    "403": _KEYS,
    "AccessDenied": _KEYS,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "InvalidRange": TOO_SHORT,
    "NoSuchBucket": "create the bucket or correct the URI",
    "NotImplemented": "use a store that knows conditional writes (If-None-Match)",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or a role",
    "": "check that the store runs, and AWS_ENDPOINT_URL if it is not Amazon's",
}


@dataclass(frozen=True)
class S3Store(Store):
    """A bucket and prefix of S3, or of a store that speaks its protocol at `endpoint` (None: Amazon's)."""

    endpoint: str | None = None

    def read(self, path: str) -> bytes:
        return self._body(path)

    def read_range(self, path: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        return self._whole(path, self._body(path, Range=f"bytes={start}-{start + length - 1}"), start, length)

    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Remote(self, path, self.size(path)), READ_AHEAD_BYTES))

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
        first_failure, backoff = None, FIRST_BACKOFF_SECONDS
        while True:
            try:
                client = _s3_client(self.endpoint, self.policy, os.getpid(), _aws_variables())
                return send(client, {"Bucket": bucket, "Key": key})
            except (aws.BotoCoreError, aws.ClientError) as error:
                code, cause, is_passing = _read_error(error)
                if code in ("404", "NoSuchKey"):
                    raise self._absent(path) from None
                patience = self.policy.give_up_seconds
                if is_passing and first_failure is None and patience:
                    logger.warning(
                        "cannot %s %s/%s yet (%s); trying for %g s",
                        operation,
                        self.uri,
                        path,
                        cause,
                        patience,
                    )
                first_failure = first_failure or time.monotonic()
                if not is_passing or time.monotonic() >= first_failure + patience:
                    raise self._error(operation, path, cause, _REMEDIES.get(code, _REMEDIES[""])) from error
            time.sleep(backoff * random.uniform(0.5, 1))
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)


def _read_error(error: Exception) -> tuple[str, str, bool]:
    """Code, cause in words, and whether trying again may help."""
    if not isinstance(error, aws.ClientError):
        return type(error).__name__, str(error), isinstance(error, _NETWORK)
    code, text = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return code, f"{code} {text}".strip(), code in _BUSY or status == 429 or (status >= 500 and status != 501)


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


class _Remote(io.RawIOBase):
    """A seekable file over ranged reads."""

    def __init__(self, store: Store, path: str, num_bytes: int) -> None:
        self._store, self._path, self._num_bytes, self._position = store, path, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._num_bytes - self._position))
        buffer[:length] = self._store.read_range(self._path, self._position, length)
        self._position += length
        return length


# --- Google Cloud Storage ---


class GoogleStore(Store):
    """Enough to read a corpus and to write results. No run directory: pyarrow offers no conditional write."""

    def _files(self) -> pyarrow.fs.FileSystem:
        return pyarrow.fs.GcsFileSystem(
            retry_time_limit=timedelta(seconds=max(1.0, self.policy.give_up_seconds))
        )

    def _at(self, path: str) -> str:
        return f"{self.uri.removeprefix('gs://')}/{checked_path(path)}".rstrip("/")

    def read(self, path: str) -> bytes:
        with (
            self._named("read", path),
            self._files().open_input_stream(self._at(path), compression=None) as file,
        ):
            return file.readall()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        with self._named("read", path), self._files().open_input_file(self._at(path)) as file:
            return self._whole(path, file.read_at(length, start), start, length)

    def open(self, path: str) -> BinaryIO:
        with self._named("open", path):
            return self._files().open_input_file(self._at(path))

    def put(self, path: str, data: bytes | memoryview) -> None:
        with (
            self._named("write", path),
            self._files().open_output_stream(self._at(path), compression=None) as file,
        ):
            file.write(data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        cause = "gs:// has no conditional write here"
        raise self._error("write once", path, cause, "keep what is written on s3:// or a shared file system")

    def upload(self, local: Path, path: str) -> None:
        # The source is opened outside `_named`: its absence is no absence in the store.
        with open(local, "rb") as source, self._named("write", path):  # noqa: SIM117
            with self._files().open_output_stream(self._at(path), compression=None) as file:
                shutil.copyfileobj(source, file, READ_AHEAD_BYTES)

    def size(self, path: str) -> int:
        with self._named("look up", path):
            found = self._files().get_file_info(self._at(path))
            if found.type is not pyarrow.fs.FileType.File:
                raise FileNotFoundError
            return found.size

    def delete(self, path: str) -> None:
        with self._named("delete", path), contextlib.suppress(FileNotFoundError):
            self._files().delete_file(self._at(path))

    def scan(self, prefix: str = "") -> Iterator[ObjectInfo]:
        root = self._at("")
        folder = self._at(prefix.rpartition("/")[0])
        with self._named("list", prefix):
            selector = pyarrow.fs.FileSelector(folder, allow_not_found=True, recursive=True)
            for found in self._files().get_file_info(selector):
                inside = found.path.removeprefix(f"{root}/")
                if found.type is pyarrow.fs.FileType.File and inside.startswith(prefix):
                    yield ObjectInfo(inside, found.size, f"{found.mtime_ns}-{found.size}")
