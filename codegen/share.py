"""Least code: C functions that differ only in numbers become one, which is given the numbers."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Function = Mapping[str, Any]  # what the templates print of a kernel
SIDES = ("body", "portable")

NUMBER = re.compile(r"(?<![\w.])(\d+)(u?)(?![\w.])")
# Lines whose numbers have to be constant: for the preprocessor, of tables, and sizes of arrays.
CONSTANT = re.compile(r"\s*(#|static const |(const )?\w+ \w+\[)")


def share(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """The functions in their order, before the first of those that are alike the one that is to be called for all.

    numbers  whether one that is to be called is given any
    instead  of the others: its name; and "shape": by side, the numbers for it as int16
    """
    groups: dict[tuple[str, ...], list[Function]] = {}
    for function in functions:
        groups.setdefault(_outline(function), []).append(function)
    made: dict[str, list[dict[str, Any]]] = {}
    for members in groups.values():
        for function, printed in zip(members, _join(members), strict=True):
            made[function["name"]] = printed
    return [printed for function in functions for printed in made[function["name"]]]


def _join(members: Sequence[Function]) -> list[list[dict[str, Any]]]:
    """What each becomes."""
    first = members[0]
    if len(members) == 1:
        return [[dict(first)]]
    joined = {side: _join_texts([member[side] for member in members]) for side in SIDES}
    numbers = any(any(shapes) for _, shapes in joined.values())
    whole = dict(first) | {"name": f"{first['name']}_any", "numbers": numbers}
    others = [
        dict(member)
        | {"instead": whole["name"], "numbers": numbers, "shape": {side: joined[side][1][i] for side in SIDES}}
        for i, member in enumerate(members)
    ]
    whole |= {side: text for side, (text, _) in joined.items()}
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
        i = starts[values]
        if _are_short(values):
            return f"{'(uint32_t)' * bool(number[2])}shape[{i}]"
        return f"{'(int32_t)' * (not number[2])}((uint32_t)shape[{i}] << 16 | (uint16_t)shape[{i + 1}])"

    return _edit(texts[0], replace), shapes


def _are_short(values: Sequence[int]) -> bool:
    return all(-(2**15) <= value < 2**15 for value in values)


def _outline(function: Function) -> tuple[str, ...]:
    """What has to be equal: all but numbers, and how it is called."""
    if function["assembly"]:
        return (function["name"],)
    kept = ("template", "args", "rows", "columns", "tile", "stack")
    return (*(repr(function[key]) for key in kept), *(_edit(function[side], lambda n: "0" + n[2]) for side in SIDES))


def _list_numbers(text: str) -> list[int]:
    numbers: list[int] = []

    def add(number: re.Match[str]) -> str:
        value = int(number[1])
        numbers.append(value - 2**32 if value >= 2**31 else value)
        return ""

    _edit(text, add)
    return numbers


def _edit(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """The text with other numbers where these may be variables; those that only a literal can be are kept."""

    def one(number: re.Match[str]) -> str:
        return number[0] if int(number[1]) >= (2**32 if number[2] else 2**31) else replace(number)

    return "\n".join(line if CONSTANT.match(line) else NUMBER.sub(one, line) for line in text.split("\n"))
