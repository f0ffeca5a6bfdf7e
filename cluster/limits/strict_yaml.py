"""YAML from outside: bounded before it is expanded, and refused where a parser would guess."""

import re
from collections import Counter
from typing import Any

import yaml

from cluster.console.errors import ConfigError

LARGEST_BYTES = 1 << 20
"""Of a document: a configuration has some KiB."""
DEEPEST = 64
"""Lists and mappings within each other: PyYAML and JSON call themselves for each, and Python allows 1,000 calls."""
LONGEST_NUMBER = 400
"""Characters: Python prints no number of more than 4,300 digits."""
_KEYS = (str, int, float, bool, type(None))


class ConfigLoader(yaml.SafeLoader):
    """Refuses aliases, keys that stand twice, what lies too deep, and numbers that are too long."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # nine lines of nine aliases each are 400 million values
            raise _refusal("an alias (*name) is not taken: write the value out", self.peek_event().start_mark)
        if self._depth == DEEPEST:
            raise _refusal(f"more than {DEEPEST} levels deep", self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:  # the parser would take the last one silently
                raise _refusal(f"key {name} stands twice", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, _KEYS):
                raise _refusal(f"key {key} is a {type(key).__name__}; put it in quotes", node.start_mark)
        return mapping

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            raise _refusal(f"a number of {len(node.value):,} characters", node.start_mark)
        return super().construct_scalar(node)


class ConfigDumper(yaml.SafeDumper):
    """Writes what `ConfigLoader` reads back as the same value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _yaml_class in (
    ConfigLoader,
    ConfigDumper,
):  # YAML 1.1, which PyYAML speaks, takes 1e-3 for text: it wants 1.0e-3.
    _yaml_class.add_implicit_resolver(  # type: ignore[attr-defined]
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def parse_yaml(content: str | bytes, where: str) -> Any:
    """The value of a YAML document.

    Raises:
        ConfigError: one line that begins with `where`.
    """
    if len(content) > LARGEST_BYTES:
        raise ConfigError([f"{where}: {len(content):,} bytes of YAML; at most: {LARGEST_BYTES:,}"])
    try:
        return yaml.load(content.decode() if isinstance(content, bytes) else content, Loader=ConfigLoader)
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,  # of dates and numbers out of range
        AttributeError,  # of `!!timestamp x`
        KeyError,  # of `!!bool x`
        IndexError,  # of `!!int ""`
        TypeError,  # of `!!timestamp {=: x}`
    ) as error:
        raise ConfigError([f"{where}: not YAML: {_told(error)}"]) from None


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _told(error: Exception) -> str:
    """An error in one line, without the text around it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        at = error.problem_mark
        said = ", ".join(filter(None, (error.context, error.problem)))
        return f"{' '.join(said.split())} (line {at.line + 1}, column {at.column + 1})"
    return " ".join(str(error).split())
