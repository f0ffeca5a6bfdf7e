"""As much of Google Cloud Storage's JSON API as the store speaks, in memory on loopback."""

import itertools
import json
import re
import threading
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 100
_NO_BUCKET = b'{"error": {"message": "The specified bucket does not exist."}}'


class GoogleStub:
    """Serves one bucket while it is entered; `port` is where."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.objects: dict[str, tuple[bytes, dict[str, Any]]] = {}
        self.generations, self.lock = itertools.count(1), threading.Lock()

    def __enter__(self) -> "GoogleStub":
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def insert(self, name: str, content: bytes, metadata: dict[str, str], is_conditional: bool) -> bool:
        with self.lock:
            if is_conditional and name in self.objects:
                return False
            generation = str(next(self.generations))
            about = {"name": name, "size": str(len(content)), "generation": generation, "metadata": metadata}
            self.objects[name] = content, about
            return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body leave at once: in two packets, the second waits 40 ms for the receipt of the first.
    wbufsize = -1
    stub: GoogleStub

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body, metadata, query = self.rfile.read(length), {}, self._query()
        if len(body) < length:
            return  # cut off: no object
        if self._bucket() != self.stub.bucket:
            return self._answer(404, _NO_BUCKET)
        if query["uploadType"] == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            about, content = BytesParser().parsebytes(head + body).get_payload()
            metadata = json.loads(about.get_payload())["metadata"]
            body = content.get_payload(decode=True)
        is_new = self.stub.insert(query["name"], body, metadata, query.get("ifGenerationMatch") == "0")
        about = {"name": query["name"], "size": str(len(body))}
        self._answer(200 if is_new else 412, json.dumps(about).encode())

    def do_GET(self) -> None:
        if self._name() is None:
            return self._list()
        if not (found := self._found()):
            return
        content, about = found
        if self._query().get("alt") != "media":
            return self._answer(200, json.dumps(about).encode())
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, last = int(span[1]), int(span[2])
            part = content[start : last + 1]
            return self._answer(206 if part else 416, part)
        self._answer(200, content)

    def do_DELETE(self) -> None:
        if self._found():
            self.stub.objects.pop(self._name() or "", None)
            self._answer(204, b"")

    def _list(self) -> None:
        query = self._query()
        names = sorted(name for name in list(self.stub.objects) if name.startswith(query["prefix"]))
        names = [name for name in names if name > query.get("pageToken", "")]
        page: dict[str, Any] = {"items": [self.stub.objects[name][1] for name in names[:PAGE]]}
        if len(names) > PAGE:
            page["nextPageToken"] = names[PAGE - 1]
        if self._bucket() == self.stub.bucket:
            return self._answer(200, json.dumps(page).encode())
        self._answer(404, _NO_BUCKET)

    def _found(self) -> tuple[bytes, dict[str, Any]] | None:
        found = self.stub.objects.get(self._name() or "")
        if not found:
            self._answer(404, b'{"error": {"message": "No such object"}}')
        return found

    def _bucket(self) -> str:
        return urlsplit(self.path).path.partition("/b/")[2].split("/")[0]

    def _name(self) -> str | None:
        name = urlsplit(self.path).path.partition("/o/")[2]
        return unquote(name) if name else None

    def _query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:  # else the client's next request goes into the closing connection
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""
