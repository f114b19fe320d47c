"""JSON and YAML that others wrote, read within bounds. Nothing else parses either.

A text from outside may nest without end, repeat itself through aliases, or ask for objects that
are no plain data. Whatever is wrong with one is a `ParseError`, with one line that says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, cast

import yaml

# Values that a YAML file may have when all aliases are written out. No configuration comes near.
_MOST_VALUES = 10_000

# Levels of a YAML file, and of a JSON text: Python's own recursion ends at 1000, and code that
# handles a value may need several calls a level.
_MOST_LEVELS = 50
_MOST_LEVELS_JSON = 100

# Brackets of a JSON text, and its strings, in which they mean nothing.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


class ParseError(ValueError):
    """A text that is not what it should be.

    Args:
        message: One line.
        line: Number of the line at fault, counted from 1, where it is known.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def read_json(text: str, *, strict: bool = True) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        strict: Whether NaN and infinity, which are no JSON, and halves of surrogate pairs, which no
            encoding can write, are refused. Some libraries write them; who takes them checks the
            values itself.

    Raises:
        ParseError: If it is not JSON, is nested too deeply, or repeats a key.
    """
    _check_depth(text)
    number = _finite if strict else float
    try:
        value = json.loads(
            text, parse_constant=number, parse_float=number, object_pairs_hook=_unrepeated
        )
    # Among them: more digits than Python reads as a number.
    except ValueError as error:
        raise ParseError(f"not JSON: {error}") from error
    if strict:
        _refuse_surrogates(text, value)
    return value


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text, by the rules of YAML 1.2.

    `010` is ten, `no` and `1:30` are texts. PyYAML follows YAML 1.1: 8, false, 90.

    Raises:
        ParseError: If it is not YAML, too deep or too large, repeats a key, or has a tag that asks
            for more than plain data.
    """
    return read_yaml_lines(text)[0]


def read_yaml_lines(text: str) -> tuple[Any, dict[str, int]]:
    """Return the value of a YAML text, and the line of every dotted key.

    Raises:
        ParseError: As `read_yaml`.
    """
    try:
        # 1. Nodes know their lines. They are checked before anything is made of them.
        root = cast(Any, yaml).compose(text, Loader=_Loader)
        lines: dict[str, int] = {}
        if root is None:
            return None, lines
        _check_size(root)
        _find_lines(root, "", lines)
        # 2. The values, from the same nodes.
        value = _Loader("").construct_document(root)
        _refuse_surrogates(text, value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        line = None if mark is None else mark.line + 1
        raise ParseError(f"not valid YAML: {what}", line) from error
    return value, lines


def write_yaml(value: Any, *, flow: bool = False) -> str:
    """Return a value as YAML that this module and every other reader read back unchanged.

    Args:
        value: Plain data.
        flow: Whether it is to be on one line.
    """
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=math.inf if flow else 80,
    )


def _refuse_surrogates(text: str, value: Any) -> None:
    # Only an escape such as \\ud800 makes one, in JSON and in YAML.
    if "\\" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str)):
        raise ParseError("half of a surrogate pair is no text")


def _finite(text: str) -> float:
    """Return a number; JSON has no others, but Python reads NaN, Infinity and 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; Python would silently keep the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found


def _check_depth(text: str) -> None:
    """Refuse a JSON text that nests too deeply, before anything recurses into it."""
    # Python's own limit is no bound: libraries raise it.
    depth = 0
    for bracket in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket[0], 0)
        if depth > _MOST_LEVELS_JSON:
            raise ParseError("nested too deeply")


def _check_size(root: yaml.Node) -> None:
    """Refuse nodes that contain themselves, nest too deeply or are too many, aliases counted."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in inside:
            raise ParseError("an alias stands inside of what it repeats")
        if depth > _MOST_LEVELS:
            raise ParseError("nested too deeply")
        # Each node once: written out, aliases of aliases are exponentially many.
        if id(node) not in sizes:
            inside.add(id(node))
            total = 1 + sum(size(child, depth + 1) for child in _children(node))
            inside.remove(id(node))
            sizes[id(node)] = total
            if total > _MOST_VALUES:
                raise ParseError(f"more than {_MOST_VALUES} values")
        return sizes[id(node)]

    size(root, 0)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _find_lines(node: yaml.Node, prefix: str, lines: dict[str, int]) -> None:
    """Collect the line of every dotted key; a repeated key is refused."""
    if not isinstance(node, yaml.MappingNode):
        return
    here: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        # PyYAML would silently keep the last of two equal keys.
        if key in here:
            raise ParseError(f"{prefix}{key} is given twice, first on line {here[key]}", line)
        here[key] = lines[prefix + key] = line
        _find_lines(value_node, f"{prefix}{key}.", lines)


class _Loader(yaml.SafeLoader):
    """Plain data alone, by the core schema of YAML 1.2."""

    # PyYAML's tables belong to the class, so they are replaced and not changed.
    yaml_implicit_resolvers: ClassVar[Any] = {}
    yaml_constructors: ClassVar[Any] = {}

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node; refuse it where it is too deep."""
        self._level += 1
        # Here and not by Python's own limit, which libraries raise.
        if self._level > _MOST_LEVELS + 1:
            raise ParseError("nested too deeply")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or YAML 1.2 would read as something else."""

    # An alias would be read as well, but nobody writes one by hand.
    def ignore_aliases(self, data: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # In single quotes this line break of Unicode would be read back as a space.
        style = '"' if "\x85" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

# Source: YAML 1.2.2, section 10.3.2.
_INTEGER = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_CORE = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (_INTEGER, "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
}
_SPECIAL = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


def _scalar(kind: str, text: str) -> Any:
    """Return the value of a scalar of the core schema."""
    # A tag such as !!int may stand before anything.
    if not re.fullmatch(_CORE[kind][0], text):
        raise ValueError(f"{text!r} is no {kind}")
    if kind == "int":
        # 0o17 and 0x1f are Python's own, but a leading zero is not.
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return _SPECIAL[text.lower()] if text.lower() in _SPECIAL else float(text)
    return None if kind == "null" else text.lower() == "true"


def _add_core_schema() -> None:
    def construct(loader: Any, node: yaml.Node) -> Any:
        try:
            return _scalar(node.tag.rpartition(":")[2], loader.construct_scalar(node))
        except ValueError as error:
            raise ParseError(
                f"a value cannot be read: {error}", node.start_mark.line + 1
            ) from error

    def refuse(loader: Any, node: yaml.Node) -> NoReturn:
        raise ParseError(
            f"a value cannot be read: {node.tag} is no plain data", node.start_mark.line + 1
        )

    for kind, (pattern, first) in _CORE.items():
        tag = f"tag:yaml.org,2002:{kind}"
        # The empty text is null too; PyYAML files it under the first character "".
        letters = [*first, ""] if kind == "null" else list(first)
        for where in (_Loader, _Dumper):
            where.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), letters)
        _Loader.add_constructor(tag, construct)
    safe: Mapping[Any, Any] = yaml.SafeLoader.yaml_constructors
    for kind in ("str", "seq", "map"):
        tag = f"tag:yaml.org,2002:{kind}"
        _Loader.add_constructor(tag, safe[tag])
    _Loader.add_constructor(cast(Any, None), refuse)


_add_core_schema()
