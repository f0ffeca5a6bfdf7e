"""What keeps a Ray of this machine's own to this machine and user: loopback addresses, and a token."""

import os
import secrets
import stat
import sys
from ipaddress import ip_address

TOKEN = "RAY_AUTH_TOKEN"
"""Variable that holds the token of all Ray processes below this one."""


def set_local_variables() -> None:
    """Set what Ray reads when it is imported, for a local session of this process and those below it.

    The token is that of the environment or a new one. It needs no file: whoever may read a process's environment may
    also trace the process.

    Raises:
        RuntimeError: Ray was imported before, with other values.
    """
    variables = {
        # Ray's switch for machines that join no cluster, by default on for macOS and Windows: each server of a node
        # then listens on loopback, and else on all addresses (ray 2.60).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        TOKEN: os.environ.get(TOKEN) or secrets.token_hex(32),
    }
    late = [name for name, value in variables.items() if os.environ.get(name) != value]
    if late and "ray" in sys.modules:
        raise RuntimeError(
            f"ray was imported before its session, which must set {', '.join(late)}: import it later"
        )
    os.environ.update(variables)


def is_loopback(address: str) -> bool:
    """Whether an IP address, also an IPv4 one written as IPv6, is of this machine alone."""
    ip = ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def close_token_file() -> None:
    """Take the file in which Ray keeps this user's token from all others: it is written with the usual mode, 0644."""
    path = os.path.expanduser("~/.ray/auth_token")
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:  # there is none, or it is out of this user's reach
        return
    if not mode & 0o077:
        return
    try:
        os.chmod(path, mode & 0o700)
    except OSError as error:  # another user's, or a mounted Secret
        print(
            f"{path} holds Ray's token and others can open it: take it from them ({error.strerror})",
            flush=True,
        )
        return
    print(
        f"{path} holds Ray's token and others could open it: its mode is now {mode & 0o700:04o}", flush=True
    )
