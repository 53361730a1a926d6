"""Least code: C functions that differ only in numbers and in the assembly they call become one, which is given both."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Function = Mapping[str, Any]  # what the templates print of a kernel
SIDES = ("body", "portable")

# With its sign where it has one; a subtraction has a space behind its minus, or an operand before it.
NUMBER = re.compile(r"((?<![\w.)\]])-|(?<=_t\))-)?(?<![\w.])(\d+)(u?)(?![\w.])")
# Lines whose numbers have to be constant: for the preprocessor, of tables, and sizes of arrays.
CONSTANT = re.compile(r"\s*(#|static const |(const )?\w+ \w+\[)")


def share(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """The functions in their order, before the first of those that are alike the one that is to be called for all.

    numbers  whether one that is to be called is given any
    given    the functions that it is given: name -> parameters
    instead  of the others: its name; and "shape": by side, the numbers for it as int16; "given": functions for it
    """
    assembly = {f["name"]: f["assembly"] for f in functions if f["assembly"]}
    groups: dict[tuple[str, ...], list[_Draft]] = {}
    for function in functions:
        draft = _Draft.of(function, assembly)
        groups.setdefault(draft.outline, []).append(draft)
    made: dict[str, list[dict[str, Any]]] = {}
    for drafts in groups.values():
        for draft, printed in zip(drafts, _join(drafts), strict=True):
            made[draft.function["name"]] = printed
    return [printed for function in functions for printed in made[function["name"]]]


@dataclass(frozen=True)
class _Draft:
    """A function whose calls of assembly are to be filled in: texts by side, the functions called, their parameters."""

    function: Function
    texts: dict[str, str]
    called: tuple[str, ...]
    parameters: tuple[Sequence[str], ...]

    @staticmethod
    def of(function: Function, assembly: Mapping[str, Sequence[str]]) -> "_Draft":
        called = tuple(part for part in dict.fromkeys(function["parts"]) if part in assembly)
        texts = {side: function[side] for side in SIDES}
        for i, name in enumerate(called):
            texts["body"] = re.sub(rf"\b{name}\b", f"part{i}", texts["body"])
        return _Draft(function, texts, called, tuple(assembly[name] for name in called))

    @property
    def outline(self) -> tuple[str, ...]:
        """What has to be equal: all but numbers and names, and how it is called."""
        if self.function["assembly"]:
            return (self.function["name"],)
        kept = [repr(self.function[key]) for key in ("template", "args", "rows", "columns", "tile", "stack")]
        return (*kept, repr(self.parameters), *(_edit(text, lambda n: "0" + n[3]) for text in self.texts.values()))


def _join(drafts: Sequence[_Draft]) -> list[list[dict[str, Any]]]:
    """What each becomes."""
    first = drafts[0]
    if len(drafts) == 1:
        return [[dict(first.function)]]
    joined = {side: _join_texts([draft.texts[side] for draft in drafts]) for side in SIDES}
    whole = dict(first.function) | {side: text for side, (text, _) in joined.items()}
    given = [i for i in range(len(first.called)) if len({draft.called[i] for draft in drafts}) > 1]
    for i, name in enumerate(first.called):
        if i not in given:
            whole["body"] = re.sub(rf"\bpart{i}\b", name, whole["body"])
    whole |= {
        "name": f"{first.function['name']}_any",
        "numbers": any(any(shapes) for _, shapes in joined.values()),
        "given": {f"part{i}": first.parameters[i] for i in given},
    }
    others = [
        dict(draft.function)
        | {
            "instead": whole["name"],
            "numbers": whole["numbers"],
            "shape": {side: shapes[k] for side, (_, shapes) in joined.items()},
            "given": [draft.called[i] for i in given],
        }
        for k, draft in enumerate(drafts)
    ]
    return [[whole, others[0]], *([other] for other in others[1:])]


def _join_texts(texts: Sequence[str]) -> tuple[str, list[list[int]]]:
    """One text for all, and for each the numbers that it is given: two int16 for a number that is none."""
    places = list(zip(*map(_list_numbers, texts), strict=True))  # the numbers at each place, by text
    starts: dict[tuple[int, ...], int] = {}
    shapes: list[list[int]] = [[] for _ in texts]
    for values in dict.fromkeys(places):
        if len(set(values)) > 1:
            starts[values] = len(shapes[0])
            for shape, value in zip(shapes, values, strict=True):
                shape += [value] if _are_short(values) else [value >> 16, (value & 0xFFFF ^ 0x8000) - 0x8000]
    rest = iter(places)

    def replace(number: re.Match[str]) -> str:
        values = next(rest)
        if values not in starts:
            return number[0]
        i, sign = starts[values], "+" if number[1] else ""
        if _are_short(values):
            return f"{sign}{'(uint32_t)' * bool(number[3])}shape[{i}]"
        return f"{sign}{'(int32_t)' * (not number[3])}((uint32_t)shape[{i}] << 16 | (uint16_t)shape[{i + 1}])"

    return _edit(texts[0], replace), shapes


def _are_short(values: Sequence[int]) -> bool:
    return all(-(2**15) <= value < 2**15 for value in values)


def _list_numbers(text: str) -> list[int]:
    numbers: list[int] = []

    def add(number: re.Match[str]) -> str:
        numbers.append((int((number[1] or "") + number[2]) + 2**31) % 2**32 - 2**31)
        return ""

    _edit(text, add)
    return numbers


def _edit(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """The text with other numbers where these may be variables; those that only a literal can be are kept."""

    def one(number: re.Match[str]) -> str:
        return number[0] if int(number[2]) >= (2**32 if number[3] else 2**31) else replace(number)

    return "\n".join(line if CONSTANT.match(line) else NUMBER.sub(one, line) for line in text.split("\n"))
