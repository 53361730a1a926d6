"""Reads YAML into plain data and remembers the line of every value, for error messages; and JSON."""

import difflib
import json
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tte.errors import TTEError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12

Place = tuple[str | int, ...]  # where something stands in a document: ("train", 0, "weight")


@dataclass(frozen=True)
class Document:
    """Plain data, and the line that each of its values begins on (no lines when it is not from a file)."""

    name: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)

    def where(self, path: Place) -> str:
        """File, line and place: "sparse.yaml:4, train[0].weight"."""
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
        text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
        file = self.name if known is None else f"{self.name}:{self.lines[known]}"
        return f"{file}, {text}" if text else file


def read_yaml(path: Path, fix: str) -> Document:
    """The plain data of a YAML file: no anchors, aliases, tags or double keys.

    Raises TTEError (E030) with file and line; ``fix`` is said when there is no such file.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(2, "no such file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as problem:  # ValueError: a null byte
        reason = getattr(problem, "strerror", None) or str(problem)
        where = reprlib.repr(str(path))
        raise TTEError("TTE-E030", f"cannot read the update scheme: {reason}", where=where, fix=fix) from problem
    if len(content) > MAX_BYTES:
        raise _unreadable(f"larger than {MAX_BYTES // 1024} KB", str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise _unreadable(f"not UTF-8 (byte {problem.start})", str(path)) from problem
    return parse_yaml(text, str(path))


def _unreadable(what: str, where: str) -> TTEError:
    return TTEError("TTE-E030", f"the update scheme is {what}", where=where, fix="see docs/scheme.md for the format")


def parse_yaml(text: str, name: str) -> Document:
    """The same from text; ``name`` is what errors call it."""
    lines: dict[Place, int] = {(): 1}
    try:
        depth = 0
        # Before anything is built: no aliases (they can grow without bound), no depth that recursion cannot follow.
        for event in yaml.parse(text, yaml.SafeLoader):
            at = f"{name}:{event.start_mark.line + 1}" if event.start_mark else name
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _unreadable("not plain YAML: anchors and aliases are not allowed", at)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise _unreadable("nested too deeply", at)
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as problem:
        if isinstance(problem, yaml.reader.ReaderError):  # a character that YAML does not allow
            reason, line = str(problem).partition("\n")[0], text.count("\n", 0, problem.position)
        else:
            assert isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark
            reason, line = str(problem.problem), problem.problem_mark.line
        raise _unreadable(f"not valid YAML: {reason}", f"{name}:{line + 1}") from problem
    return Document(name, _to_data(root, (), lines, name) if root else {}, lines)


def _to_data(node: yaml.Node, path: Place, lines: dict[Place, int], name: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_to_data(item, (*path, i), lines, name) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        data = {}
        for key, value in node.value:
            at = f"{name}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise _unreadable("not valid: a key is one word", at)
            if key.value in data:
                raise _unreadable(f"not valid: the key {show(key.value)} stands twice", at)
            lines[(*path, key.value)] = key.start_mark.line + 1
            data[key.value] = _to_data(value, (*path, key.value), lines, name)
        return data
    assert isinstance(node, yaml.ScalarNode)
    if node.style in ("'", '"') or path[-1:] == ("layer",):  # a layer called 1.10 keeps its name
        return str(node.value)
    return _to_scalar(node.value, node.tag.rpartition(":")[2])


def _to_scalar(text: str, tag: str) -> Any:
    """YAML 1.1 as PyYAML resolves it, and 1e-3 is a number, as one expects."""
    try:
        if tag == "int":
            return int(text.replace("_", ""), 0 if re.match(r"[-+]?0[xb]", text) else 10)
        if tag == "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.replace("_", "").lower()))
        if tag == "str" and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", text):
            return float(text)
    except ValueError:  # 1:30, or more digits than an integer may have
        return text
    if tag == "bool":
        return text.lower() in ("true", "yes", "on")
    return None if tag == "null" else text


def read_json(path: Path, code: str, what: str, fix: str) -> Any:
    """The content of a file that tte wrote. Raises TTEError with ``code`` and ``fix``; ``what`` it is not."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise TTEError(code, f"{what}: there is no such file", where=str(path), fix=fix) from problem
    except (OSError, ValueError, RecursionError) as problem:  # UnicodeDecodeError is a ValueError
        reason = "it is not JSON"
        if isinstance(problem, OSError):
            reason = f"it cannot be read: {problem.strerror}"
        elif isinstance(problem, json.JSONDecodeError):
            reason = f"it is damaged in line {problem.lineno}, column {problem.colno}"
        raise TTEError(code, f"{what}: {reason}", where=str(path), fix=fix) from problem


def suggest(name: str, valid: Iterable[str], kind: str) -> str:
    """What to write instead: the nearest valid name, and the others (not more than 12)."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, 1)
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return (f"did you mean {near[0]}? " if near else "") + f"{kind}: {shown}"


def tally(count: int, noun: str) -> str:
    """ "1 layer", "2,048 layers"; ``noun`` is the singular."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def show(value: Any) -> str:
    """A value of the user's in a message: never long."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a number with too many digits"
