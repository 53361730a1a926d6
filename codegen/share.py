"""Least code: C functions that differ only in numbers and in the assembly they call become one, which is given both."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Function = Mapping[str, Any]  # what the templates print of a kernel

# With its sign where it has one; a subtraction has a space behind its minus, or an operand before it.
NUMBER = re.compile(r"((?<![\w.)\]])-|(?<=_t\))-)?(?<![\w.])(\d+)(u?)(?![\w.])")
# Lines whose numbers have to be constant: for the preprocessor, of tables, and sizes of arrays.
CONSTANT = re.compile(r"\s*(#|static const |(const )?\w+ \w+\[)")


def share(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """The functions in their order, before the first of those that are alike the one that is to be called for all.

    Where there is a portable form it is a function of its own, under the opposite guard.

    numbers  whether one that is to be called is given any
    given    the functions that it is given: name -> parameters
    instead  of the others: its name; and "shape": the numbers for it as int16; "given": the functions for it
    """
    forms = [form for function in functions for form in _split(function)]
    assembly = {f["name"]: f["assembly"] for f in functions if f["assembly"]}
    groups: dict[tuple[str, ...], list[_Draft]] = {}
    for form in forms:
        draft = _Draft.of(form, assembly)
        groups.setdefault(draft.outline, []).append(draft)
    made: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for drafts in groups.values():
        for draft, printed in zip(drafts, _join(drafts), strict=True):
            made[draft.function["name"], draft.function["guard"]] = printed
    return [printed for form in forms for printed in made[form["name"], form["guard"]]]


def _split(function: Function) -> list[Function]:
    if not function["portable"]:
        return [function]
    fast = dict(function) | {"portable": "", "guard": function["needs"]}
    return [fast, fast | {"body": function["portable"], "guard": "!" + function["needs"], "stack": 0}]


@dataclass(frozen=True)
class _Draft:
    """A function whose calls of assembly are to be filled in: its text, the functions called, their parameters."""

    function: Function
    text: str
    called: tuple[str, ...]
    parameters: tuple[Sequence[str], ...]

    @staticmethod
    def of(function: Function, assembly: Mapping[str, Sequence[str]]) -> "_Draft":
        text = function["body"]
        called = tuple(name for name in dict.fromkeys(function["parts"]) if name in assembly and name in text)
        for i, name in enumerate(called):
            text = re.sub(rf"\b{name}\b", f"part{i}", text)
        return _Draft(function, text, called, tuple(assembly[name] for name in called))

    @property
    def outline(self) -> tuple[str, ...]:
        """What has to be equal: all but numbers and names, and how it is called."""
        if self.function["assembly"]:
            return (self.function["name"],)
        kept = [repr(self.function[key]) for key in ("guard", "args", "rows", "columns", "tile", "stack")]
        return (*kept, repr(self.parameters), _edit(self.text, lambda n: "0" + n[3]))


def _join(drafts: Sequence[_Draft]) -> list[list[dict[str, Any]]]:
    """What each becomes."""
    first = drafts[0]
    if len(drafts) == 1:
        return [[dict(first.function)]]
    text, shapes = _join_texts([draft.text for draft in drafts])
    given = [i for i in range(len(first.called)) if len({draft.called[i] for draft in drafts}) > 1]
    for i, name in enumerate(first.called):
        text = text if i in given else re.sub(rf"\bpart{i}\b", name, text)
    joined = {"numbers": any(shapes), "given": {f"part{i}": first.parameters[i] for i in given}}
    whole = dict(first.function) | {"name": f"{first.function['name']}_any", "body": text} | joined
    others = [
        dict(draft.function)
        | joined
        | {"instead": whole["name"], "shape": shape, "given": [draft.called[i] for i in given]}
        for draft, shape in zip(drafts, shapes, strict=True)
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
