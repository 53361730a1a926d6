"""The table of operators: everything the compiler knows of an operator's mathematics is one record in it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, get_origin

from tte.ir.types import TensorType

Attr = int | float | bool | str | tuple  # type: ignore[type-arg]
Attrs = dict[str, Attr]


class InvalidType(ValueError):
    """A type rule refuses its operands; the message says why. Whoever built the node knows where it came from."""


@dataclass(frozen=True)
class Window:
    """Output row r reads the input rows from r * stride - padding, ``size`` of them (less those outside).

    spread: these are rows of the input with spread - 1 empty ones behind each, as transposed convolutions see it
    """

    size: int
    stride: int
    padding: int
    spread: int = 1

    def start(self, row: int) -> int:
        return -((self.padding - row * self.stride) // self.spread)

    def stop(self, row: int) -> int:
        return (row * self.stride - self.padding + self.size - 1) // self.spread + 1


@dataclass(frozen=True)
class Op:
    """One operator.

    infer   type rule:   (input types..., *, attributes) -> type or tuple of types; raises InvalidType.
            Its keyword-only parameters *are* the operator's attributes and their defaults.
    ref     semantics:   (input arrays..., *, attributes) -> array or tuple of arrays, in numpy
    grad    vjp rule:    (backward, dy, inputs..., *, attributes) -> one Value or None per input; no rule: None.
            ``backward`` is a passes.autodiff.Backward: it says what is wanted and builds nodes.
    kind    "elementwise": y[i] depends on operands at i (or broadcast) only: fusable, and computable in place
            "view":        the same bytes under another shape: no kernel
            "anchor":      has a kernel of its own; an elementwise tail may be fused into its store
            "opaque":      has a kernel of its own, nothing is fused into it
    inplace the inputs whose buffer output 0 may take over when they die here
    macs    multiply-accumulates: (input types..., *, attributes) -> int
    rows    (input types..., *, attributes) -> of each input the Window that an output row reads, None: all of it.
            No rule, or None: the operator does not go row by row, unless it is elementwise.
    columns its kernel can make some columns of a row at a time
    along   the operand, if there is one, over whose rows the result is a sum; a row of it is what is added at a time
    axes    (input types..., *, attributes) -> of each input, then of the result, a letter for each axis. What is at i
            along a letter of the result depends on what is at i along it in operands; over a letter that the result
            lacks it is a sum. "." may not be cut. No rule: nothing may be cut, unless the operator is elementwise.
    start   the operand, if there is one, that such a sum begins with; None: sums cannot be continued.
    """

    name: str
    infer: Callable[..., TensorType | tuple[TensorType, ...]]
    ref: Callable[..., Any]
    grad: Callable[..., Any] | None = None
    kind: str = "opaque"
    inplace: tuple[int, ...] = ()
    macs: Callable[..., int] | None = None
    rows: Callable[..., tuple[Window | None, ...]] | None = None
    axes: Callable[..., tuple[str, ...]] | None = None
    columns: bool = False
    along: int | None = None
    start: int | None = None

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Name -> default (inspect.Parameter.empty where it must be given)."""
        parameters = inspect.signature(self.infer).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.infer) or ""

    def complete(self, attrs: Attrs) -> Attrs:
        """The attributes with defaults filled in, in the order of the type rule."""
        known = self.attributes
        if unknown := sorted(set(attrs) - set(known)):
            raise InvalidType(f"{self.name} has no attribute {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        if missing := [k for k, v in known.items() if v is inspect.Parameter.empty and k not in attrs]:
            raise InvalidType(f"{self.name} needs the attribute {missing[0]!r}")
        return {k: attrs.get(k, default) for k, default in known.items()}

    def check_call(self, operands: int, attrs: Attrs) -> None:
        """Raise InvalidType for what a type rule must not be asked: operands or attributes of the wrong number or kind.

        Our own passes know better; a text may hold anything.
        """
        parameters = inspect.signature(self.infer).parameters.values()
        given = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        needed = [p for p in given if p.default is p.empty and p.kind is not inspect.Parameter.VAR_POSITIONAL]
        many = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in given)
        if operands < len(needed) or (operands > len(given) and not many):
            raise InvalidType(f"{self.name} takes {', '.join(p.name for p in given)}, not {operands} operands")
        for p in parameters:
            if p.name in attrs and not _is_a(attrs[p.name], p.annotation):
                kind = str(p.annotation) if get_args(p.annotation) else p.annotation.__name__
                raise InvalidType(f"{self.name}: {p.name}={attrs[p.name]!r} is not {kind}")

    def infer_types(self, types: tuple[TensorType, ...], attrs: Attrs) -> tuple[TensorType, ...]:
        result = self.infer(*types, **attrs)
        return result if isinstance(result, tuple) else (result,)


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if type(value) is not tuple:
            return False
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return len(value) == len(items) and all(map(_is_a, value, items))
    if type(value) is int:
        return kind in (int, float) and abs(value) < 2**31
    return type(value) is kind


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    assert op.name not in OPS, f"{op.name} is registered twice"
    assert op.kind in ("elementwise", "view", "anchor", "opaque"), op.kind
    OPS[op.name] = op
    return op
