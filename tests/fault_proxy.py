"""A pass-through proxy before the S3 server that breaks chosen requests, as networks and busy servers do."""

import asyncio
import contextlib
import re
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Literal

# 403: what a role without the right gets; reset: before the request is passed on; lost: carried out without an answer;
# late: the same, but carried out only at `deliver`; truncate, corrupt: the body.
Fault = Literal["503", "500", "403", "reset", "lost", "late", "truncate", "corrupt", "hang", "slow"]
PIECES, PAUSE_SECONDS = 10, 0.02  # of a slow answer
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"  # as S3 says it
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


@dataclass
class Rule:
    """Break the next `times` requests of a method whose target contains `target`."""

    fault: Fault
    times: int
    method: str
    target: str


class FaultProxy:
    """Listens on loopback at `url` while it is entered; `broken` lists the faults that were served."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._rules: list[Rule] = []
        self.broken: list[Fault] = []
        self._late: list[bytes] = []

    def break_next(self, fault: Fault, times: int = 1, method: str = "", target: str = "") -> None:
        self._rules.append(Rule(fault, times, method, target))

    def clear(self) -> None:
        """Break no further request."""
        self._rules.clear()

    def deliver(self) -> list[bytes]:
        """Carry out the requests that are late; the first line of each answer."""
        late, self._late = self._late, []
        return [self._send(request) for request in late]

    def _send(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._upstream_port)) as upstream:
            upstream.sendall(request)
            with upstream.makefile("rb") as answer:
                line = answer.readline()
                while b" 100 " in line or not line.strip():
                    line = answer.readline()
        return line

    def __enter__(self) -> "FaultProxy":
        is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(is_up)))
        self._thread.start()
        is_up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join()

    async def _run(self, is_up: threading.Event) -> None:
        self._loop, self._is_over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        is_up.set()
        await self._is_over.wait()
        server.close()

    def _fault_for(self, head: bytes) -> Fault | None:
        method, target, _ = head.decode("latin-1").split(" ", 2)
        for rule in self._rules:
            if rule.times and rule.method in ("", method) and rule.target in target:
                rule.times -= 1
                self.broken.append(rule.fault)
                return rule.fault
        return None

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(answer):
            head = await client.readuntil(b"\r\n\r\n")
            fault = self._fault_for(head)
            if fault in ("503", "500", "403"):
                await _read_body(head, client)
                body = DENIED if fault == "403" else b""
                status = b"HTTP/1.1 %s Broken\r\nContent-Length: %d\r\n" % (fault.encode(), len(body))
                answer.write(status + b"Connection: close\r\n\r\n" + body)
                await answer.drain()
            elif fault == "hang":
                await client.read(-1)  # until the client gives up
            elif fault == "reset":
                _reset(answer)
            elif fault == "late":
                if b"100-continue" in head.lower():
                    answer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    await answer.drain()
                length = _LENGTH.search(head)
                body = await client.readexactly(int(length[1]) if length else 0)
                self._late.append(_one_a_connection(head) + body)
                _reset(answer)
            else:
                await self._pass(head, client, answer, fault)

    async def _pass(
        self, head: bytes, client: asyncio.StreamReader, answer: asyncio.StreamWriter, fault: Fault | None
    ) -> None:
        upstream, request = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        request.write(_one_a_connection(head))
        sending = asyncio.ensure_future(_pump(client, request))
        try:
            if fault is None:
                await _pump(upstream, answer)
            else:
                await _answer_badly(*await _read_answer(upstream, head), answer, fault)
        finally:
            sending.cancel()
            request.close()


def _one_a_connection(head: bytes) -> bytes:
    """`Connection` is not signed; all other headers stay as they are."""
    return re.sub(rb"\r\n(?i:connection):[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n"


async def _read_answer(upstream: asyncio.StreamReader, request_head: bytes) -> tuple[bytes, bytes]:
    """Head and body. Not up to the end of the connection: Go's servers keep that open for another 500 ms."""
    head = await upstream.readuntil(b"\r\n\r\n")
    if b" 100 " in head[:20]:
        rest, body = await _read_answer(upstream, request_head)
        return head + rest, body
    length = _LENGTH.search(head)
    if request_head.startswith(b"HEAD ") or b" 204 " in head[:20]:
        return head, b""
    return head, await (upstream.readexactly(int(length[1])) if length else upstream.read(-1))


async def _answer_badly(head: bytes, body: bytes, answer: asyncio.StreamWriter, fault: Fault) -> None:
    whole, middle = head + body, len(head) + len(body) // 2
    if fault == "truncate":
        answer.write(whole[:middle])
    elif fault == "corrupt" and body:
        answer.write(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif fault == "slow":
        for piece in range(PIECES):
            answer.write(whole[len(whole) * piece // PIECES : len(whole) * (piece + 1) // PIECES])
            await asyncio.sleep(PAUSE_SECONDS)
    elif fault == "lost":
        return _reset(answer)
    else:
        answer.write(whole)
    await answer.drain()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while piece := await source.read(1 << 16):
        sink.write(piece)
        await sink.drain()


async def _read_body(head: bytes, client: asyncio.StreamReader) -> None:
    length = _LENGTH.search(head)
    if length and b"100-continue" not in head.lower():
        await client.readexactly(int(length[1]))


def _reset(answer: asyncio.StreamWriter) -> None:
    linger_for_no_time = struct.pack("ii", 1, 0)  # closes with RST in place of FIN
    answer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_no_time)
    answer.transport.abort()
