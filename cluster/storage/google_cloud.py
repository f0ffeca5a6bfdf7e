"""Google Cloud Storage by its JSON API. `cluster.storage.uris` opens it by URI.

Not by pyarrow's client, which cannot write an object on the condition that there is none (ifGenerationMatch): commit
records and drivers' leases stand on that.

Credentials are the application default ones (Workload Identity included), found and renewed by google-auth. Where
STORAGE_EMULATOR_HOST is set, requests go there and without credentials, as those of Google's own clients do.

The API: https://cloud.google.com/storage/docs/json_api/v1; which errors pass: …/docs/retry-strategy.
"""

import contextlib
import functools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import google.auth
import requests
import urllib3
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.auth.transport.requests import AuthorizedSession

from cluster.storage.remote import Failure, RemoteStore
from cluster.storage.store import TOO_SHORT, ObjectInfo, RetryPolicy, checked_path

T = TypeVar("T")

_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)
# As it is stored: a server unpacks an object that was put with Content-Encoding gzip for whoever does not take gzip.
_AS_STORED = {"Accept-Encoding": "gzip"}
_MEDIA, _BYTES = {"uploadType": "media"}, {"Content-Type": "application/octet-stream"}
_CONNECTIONS = 32
_RIGHTS = "give the service account the role roles/storage.objectUser on the bucket"
_REMEDIES = {
    401: _RIGHTS,
    403: _RIGHTS,
    404: "create the bucket or correct the URI",
    416: TOO_SHORT,
}
_NO_KEY = "run as a service account, or set GOOGLE_APPLICATION_CREDENTIALS to its key file"
_AWAY = "check that the store can be reached, and STORAGE_EMULATOR_HOST if it is not Google's"


class GoogleStore(RemoteStore):
    """A bucket and prefix of Google Cloud Storage."""

    def read(self, path: str) -> bytes:
        return self._body(path, {})

    def read_range(self, path: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        span = {"Range": f"bytes={start}-{start + length - 1}"}
        return self._whole(path, self._body(path, span), start, length)

    def _body(self, path: str, span: dict[str, str]) -> bytes:
        def read(http: "_Client", at: str) -> bytes:
            answer = http.get(at, params={"alt": "media"}, headers=_AS_STORED | span, stream=True)
            return answer.raw.read(decode_content=False)  # which checks the length

        return self._call("read", path, read)

    def put(self, path: str, data: bytes | memoryview) -> None:
        self._call("write", path, lambda http, at: http.insert(at, _MEDIA, bytes(data), _BYTES))

    def upload(self, local: Path, path: str) -> None:
        """In one request, however large: what is cut off on the way does not become an object."""

        def upload(http: "_Client", at: str) -> None:
            with open(local, "rb") as file:
                size = local.stat().st_size
                # An empty file has no length for requests, which would send it in chunks.
                stored = http.insert(at, _MEDIA, file if size else b"", _BYTES)
            if stored != size:  # sent again after a renewed token, a file that was read is empty
                raise _RefusedError(408, f"{stored:,} bytes were stored of {size:,}")

        self._call("write", path, upload)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex
        about = json.dumps({"metadata": {"writer": writer}}, allow_nan=False).encode()
        parts = ((b"application/json", about), (b"application/octet-stream", data))
        body = b"".join(
            b"--%s\r\nContent-Type: %s\r\n\r\n%s\r\n" % (writer.encode(), *part) for part in parts
        )
        body += b"--%s--" % writer.encode()
        headers = {"Content-Type": f"multipart/related; boundary={writer}"}
        condition = {"uploadType": "multipart", "ifGenerationMatch": "0"}

        def insert(http: "_Client", at: str) -> bool:
            try:
                http.insert(at, condition, body, headers)
            except _RefusedError as error:
                if error.status != 412:
                    raise
                # If the answer to our first try was lost, what stands there and refuses the second is ours.
                return http.get(at).json().get("metadata", {}).get("writer") == writer
            return True

        return self._call("write", path, insert)

    def size(self, path: str) -> int:
        return int(self._call("look up", path, lambda http, at: http.get(at).json())["size"])

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("delete", path, lambda http, at: http.delete(at))

    def scan(self, prefix: str = "") -> Iterator[ObjectInfo]:
        root = self._key("")
        query = {"prefix": root + prefix, "fields": "nextPageToken,items(name,size,generation)"}
        while True:
            page = self._call(
                "list", prefix, lambda http, at: http.get(at, params=query).json(), is_object=False
            )
            for entry in page.get("items", []):
                if not entry["name"].endswith("/"):  # else a folder, as consoles make them
                    name = entry["name"].removeprefix(root)
                    yield ObjectInfo(name, int(entry["size"]), entry["generation"])
            if "nextPageToken" not in page:
                return
            query["pageToken"] = page["nextPageToken"]

    def clock(self) -> float:
        query = {"prefix": self._key(""), "maxResults": "1"}
        answer = self._call("list", "", lambda http, at: http.get(at, params=query), is_object=False)
        return parsedate_to_datetime(answer.headers["Date"]).timestamp()

    def _key(self, path: str) -> str:
        prefix = self.uri.removeprefix("gs://").partition("/")[2]
        return f"{prefix}/{checked_path(path)}" if prefix else checked_path(path)

    def _call(
        self, operation: str, path: str, send: Callable[["_Client", str], T], is_object: bool = True
    ) -> T:
        """The result of `send(client, bucket and object as they stand in a URL)`."""
        bucket = quote(self.uri.removeprefix("gs://").partition("/")[0], safe="")
        at = f"{bucket}/o/{quote(self._key(path), safe='')}" if is_object else f"{bucket}/o"
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        return self._retried(operation, path, lambda: send(_client(emulator, self.policy, os.getpid()), at))

    @staticmethod
    def _failure(error: Exception) -> Failure | None:
        if isinstance(error, _RefusedError):
            if error.status == 404 and "bucket does not exist" not in str(error):
                return Failure("", "", is_absent=True)
            passes = error.status in (408, 429) or error.status >= 500
            return Failure(str(error), _REMEDIES.get(error.status, _AWAY), is_passing=passes)
        if isinstance(error, GoogleAuthError):  # the service that renews a token fails now and then
            return Failure(str(error), _NO_KEY, is_passing=not isinstance(error, DefaultCredentialsError))
        if isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError):
            return Failure(str(error), _AWAY, is_passing=True)
        return None


class _RefusedError(Exception):
    """An answer that is an error; its message is what the API says, in one line."""

    def __init__(self, status: int, text: str) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]["message"]
        super().__init__(f"{status} {' '.join(text.split())[:200]}")
        self.status = status


class _Client:
    """Requests to the API whose errors are raised, for one process."""

    def __init__(self, emulator: str, policy: RetryPolicy) -> None:
        self._session: requests.Session
        if emulator:
            self._server = emulator if "://" in emulator else f"http://{emulator}"
            self._session = requests.Session()
        else:
            self._server = "https://storage.googleapis.com"
            credentials, _ = google.auth.default(scopes=_SCOPES)
            self._session = AuthorizedSession(credentials)
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
        self._session.mount(self._server, adapter)
        self._timeout = (policy.connect_seconds, policy.silence_seconds)

    def get(self, at: str, **options: Any) -> requests.Response:
        return self._send("GET", f"/storage/v1/b/{at}", **options)

    def delete(self, at: str) -> None:
        self._send("DELETE", f"/storage/v1/b/{at}")

    def insert(self, at: str, params: dict[str, str], data: Any, headers: dict[str, str]) -> int:
        """Make the object named in `at` of `data`; the bytes that it has."""
        bucket, _, name = at.partition("/o/")
        params = params | {"name": unquote(name)}
        path = f"/upload/storage/v1/b/{bucket}/o"
        answer = self._send("POST", path, params=params, data=data, headers=headers)
        return int(answer.json()["size"])

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        answer = self._session.request(method, self._server + path, timeout=self._timeout, **options)
        if answer.status_code >= 400:
            raise _RefusedError(answer.status_code, answer.text)
        return answer


@functools.cache
def _client(emulator: str, policy: RetryPolicy, process: int) -> _Client:
    """One for all threads of a process: a fork may not share sockets."""
    return _Client(emulator, policy)
