"""YAML as settings use it: plain values and small nests of them, each key once, no aliases."""

from __future__ import annotations

from typing import Any

from mclfast._base.checks import shortened
from mclfast._base.optional import optional_import

#: Longest text in bytes: parsing takes a second or two for so many.
MAX_BYTES = 2**18
# Plans of comparisons have four levels.
_MAX_DEPTH = 16
_MERGE = "tag:yaml.org,2002:merge"


def parse(text: str) -> Any:
    """The value of a YAML text; limits are checked before any value is made.

    Args:
        text: the whole text.

    Raises:
        ValueError: the text is no YAML, is too long or nested too deeply, holds an alias (a few
            hundred bytes of them can stand for gigabytes), or gives a key twice.
    """
    yaml = optional_import("yaml", extra="train")
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes where {MAX_BYTES:,} are the most")
    try:
        _check_events(yaml, text)
        _check_keys(yaml, yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _check_events(yaml: Any, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"the alias *{shortened(event.anchor, 40)} in line {line}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"more than {_MAX_DEPTH} levels of nesting in line {line}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_keys(yaml: Any, node: Any) -> None:
    """Raises ValueError if a mapping gives a key twice: YAML readers take the last one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(yaml, item)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                raise ValueError(f"the merge key << in line {line}")
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    name = shortened(key.value, 40)
                    raise ValueError(f"{name!r} twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
            _check_keys(yaml, value)
