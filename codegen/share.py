"""Least code: C functions that differ only in numbers become one, which is given the numbers."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tte.codegen.kernel import CTYPES

Function = Mapping[str, Any]  # what the templates print of a kernel
SIDES = ("body", "portable")

NUMBER = re.compile(r"(?<![\w.])(\d+)(u?)(?![\w.])")
# Lines whose numbers have to be constant: for the preprocessor, of tables, and sizes of arrays.
CONSTANT = re.compile(r"\s*(#|static const |(const )?\w+ \w+\[)")


def share(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """The functions in their order, before the first of those that are alike the one that is to be called for all.

    numbers  of one that is to be called: the C type of those it is given, "" for none
    instead  of the others: its name; and "shape": the numbers for it
    """
    groups: dict[tuple[str, ...], list[Function]] = {}
    for function in functions:
        groups.setdefault(_outline(function), []).append(function)
    made: dict[str, list[dict[str, Any]]] = {}
    for members in groups.values():
        rows = zip(*map(_list_numbers, members), strict=True)
        for name, printed in zip((f["name"] for f in members), _join(members, list(rows)), strict=True):
            made[name] = printed
    return [printed for function in functions for printed in made[function["name"]]]


def _join(members: Sequence[Function], places: Sequence[tuple[int, ...]]) -> list[list[dict[str, Any]]]:
    """What each becomes. places: the numbers at each place, by member."""
    first = members[0]
    if len(members) == 1:
        return [[dict(first)]]
    differing = [values for values in dict.fromkeys(places) if len(set(values)) > 1]
    rest = iter(places)

    def replace(number: re.Match[str]) -> str:
        values = next(rest)
        if values not in differing:
            return number[0]
        return f"{'(uint32_t)' * bool(number[2])}shape[{differing.index(values)}]"

    whole = dict(first) | {"name": f"{first['name']}_any"} | {side: _edit(first[side], replace) for side in SIDES}
    fits = all(-(2**15) <= n < 2**15 for values in differing for n in values)
    whole["numbers"] = CTYPES["int16" if fits else "int32"] if differing else ""
    others = [
        dict(member) | {"instead": whole["name"], "numbers": whole["numbers"], "shape": list(row)}
        for member, row in zip(members, zip(*differing, strict=True) if differing else [()] * len(members), strict=True)
    ]
    return [[whole, others[0]], *([other] for other in others[1:])]


def _outline(function: Function) -> tuple[str, ...]:
    """What has to be equal: all but numbers, and how it is called."""
    if function["assembly"]:
        return (function["name"],)
    kept = ("template", "args", "rows", "columns", "tile", "stack")
    return (*(repr(function[key]) for key in kept), *(_edit(function[side], lambda n: "0" + n[2]) for side in SIDES))


def _list_numbers(function: Function) -> list[int]:
    numbers: list[int] = []

    def add(number: re.Match[str]) -> str:
        value = int(number[1])
        numbers.append(value - 2**32 if value >= 2**31 else value)
        return ""

    for side in () if function["assembly"] else SIDES:
        _edit(function[side], add)
    return numbers


def _edit(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """The text with other numbers where these may be variables; those that only a literal can be are kept."""

    def one(number: re.Match[str]) -> str:
        return number[0] if int(number[1]) >= (2**32 if number[2] else 2**31) else replace(number)

    return "\n".join(line if CONSTANT.match(line) else NUMBER.sub(one, line) for line in text.split("\n"))
