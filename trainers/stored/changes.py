"""What differs from the configuration that a run or a sweep was begun with. Each field says whether its value may."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.configuration.config import to_dict
from cluster.configuration.given import flatten
from cluster.configuration.keys import Change, keys_of, sections_of


@dataclass(frozen=True)
class Difference:
    """A key, or an entry of one that holds a mapping, with its former value and the present one."""

    name: str
    before: Any
    now: Any
    may_change: Change


def differences(
    before: Mapping[str, Any], now: Any, former: Mapping[str, Any] | None = None
) -> Iterator[Difference]:
    """What differs between a stored configuration and this one, by name. A key that is younger than the stored one had
    its default there, or what was `former` done in its place."""
    cls = type(now)
    known, sections = keys_of(cls), sections_of(cls)
    new = dict(flatten(to_dict(now), sections))
    former = {name: value for name, value in (former or {}).items() if name in known}
    old = dict(flatten(to_dict(cls()), sections)) | former | dict(flatten(before, sections))
    for name in sorted(old.keys() | new.keys()):
        may_change: Change = known[name].may_change if name in known else "never"
        for at, former, present in _within(name, old.get(name), new.get(name)):
            yield Difference(at, former, present, may_change)


def _within(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Entry by entry where two mappings have the same ones, else the whole."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        for entry in sorted(before):
            yield from _within(f"{name}.{entry}", before[entry], now[entry])
    elif before != now:
        yield name, before, now


def changed_keys(
    before: Mapping[str, Any],
    now: Any,
    judged: bool = False,
    finished: bool = False,
    former: Mapping[str, Any] | None = None,
) -> list[str]:
    """One line per key that a begun run cannot change, or cannot once its test split is opened (`judged`) or it is
    `finished`, comparing its stored configuration with this one."""
    passed: set[Change] = {"never"}
    if judged or finished:
        passed.add("until judged")
    if finished:
        passed.add("until finished")
    remedy = "give it back, or choose a new run.name"
    return [
        f"{each.name}={each.now!r}, but the run was started with {each.before!r}; {remedy}"
        for each in differences(before, now, former)
        if each.may_change in passed
    ]
