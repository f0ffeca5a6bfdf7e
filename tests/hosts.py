"""Hosts with addresses of their own on one machine: network namespaces on a bridge, with links to cut and to slow."""

import contextlib
import os
import subprocess

from tests.ray_nodes import Place

NETWORK = "10.213.77"


class Hosts:
    """So many hosts, while it is entered; the machine itself has `address` on their bridge.

    Raises:
        OSError: this machine has no network namespaces, or not for this user.
    """

    address = f"{NETWORK}.1"

    def __init__(self, number: int) -> None:
        self._name = f"rp{os.getpid() % 100_000}"
        self._numbers = range(number)

    def place(self, host: int) -> Place:
        """Where a command runs on a host, from 0."""
        return Place(f"{NETWORK}.{host + 2}", ("ip", "netns", "exec", self._space(host)))

    def cut(self, host: int) -> None:
        """Pull the cable: packets are lost without a word."""
        _run(f"ip link set {self._link(host)} down")

    def slow(self, host: int, megabits: int) -> None:
        """Limit what goes to a host, in Mbit/s. A token bucket, not netem, which many kernels lack."""
        _run(f"tc qdisc replace dev {self._link(host)} root tbf rate {megabits}mbit burst 64kb latency 100ms")

    def __enter__(self) -> "Hosts":
        try:
            _run(f"ip link add {self._name} type bridge")
            _run(f"ip addr add {self.address}/24 dev {self._name}")
            _run(f"ip link set {self._name} up")
            for host in self._numbers:
                self._add(host)
            self.slow(0, megabits=1_000)  # a kernel that cannot is found out here
            _run(f"tc qdisc delete dev {self._link(0)} root")
        except OSError:
            self.__exit__()
            raise
        return self

    def _add(self, host: int) -> None:
        space, link, inside = self._space(host), self._link(host), self.place(host)
        _run(f"ip netns add {space}")
        _run(f"ip link add {link} type veth peer name eth0 netns {space}")
        _run(f"ip link set {link} master {self._name} up")
        for command in (
            "ip link set lo up",
            f"ip addr add {inside.address}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {self.address}",
        ):
            _run(" ".join([*inside.prefix, command]))

    def __exit__(self, *_: object) -> None:
        for host in self._numbers:
            with contextlib.suppress(OSError):
                _run(f"ip netns delete {self._space(host)}")  # takes the link with it
        with contextlib.suppress(OSError):
            _run(f"ip link delete {self._name}")

    def _space(self, host: int) -> str:
        return f"{self._name}h{host}"

    def _link(self, host: int) -> str:
        return f"{self._name}v{host}"


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")
