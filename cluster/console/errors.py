"""Errors that a user can mend: the base class, and the error of a configuration."""

from collections.abc import Sequence

from cluster.console.printable import printable


class UserError(Exception):
    """Base class of errors that a user can mend: the message names what, where and the remedy."""


class ConfigError(UserError, ValueError):
    """The configuration cannot be used; its message has one line for each problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__([printable(problem, lines=True) for problem in problems])

    @property
    def problems(self) -> list[str]:
        return self.args[0]

    def __str__(self) -> str:
        return "\n".join(self.problems)
