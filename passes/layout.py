"""Channels last: carries transpositions through the graph until they meet their inverse or the end.

Nothing is moved when a transposition is met: it is remembered that a value v is ``transpose(value, order)`` of one that
exists, and operators are applied to that. Only who needs v itself pays for the move.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from tte.ir import OPS, Builder, Const, Graph, Node, Value, rewrite
from tte.passes.canonicalize import canonicalize

Order = tuple[int, ...]


@dataclass(frozen=True)
class Pending:
    """Stands for ``transpose(value, order)``, then reshaped to ``flat`` where that is given."""

    value: Value
    order: Order
    flat: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape before ``flat``."""
        return tuple(self.value.type.shape[a] for a in self.order)

    @property
    def plain(self) -> bool:
        return self.order == tuple(range(len(self.order))) and self.flat is None


def to_nhwc(graph: Graph) -> Graph:
    """The same function with as few transpositions as possible; weights are transposed at compile time."""
    state = _Sinking(Builder())
    for value in (*graph.inputs, *graph.params, *graph.consts):
        state.env[value.name] = Pending(value, tuple(range(value.type.rank)))
    for node in graph.nodes:
        state.layer = node.layer
        if node.body or len(node.outputs) != 1:
            inputs = tuple(state.plain(v) for v in node.inputs)
            outputs = state.builder.append(replace(node, inputs=inputs, outputs=_fresh(state.builder, node)))
            state.env |= {v.name: _identity(new) for v, new in zip(node.outputs, outputs, strict=True)}
            continue
        state.env[node.output.name] = _sink(state, node)
    outputs = tuple(state.plain(v) for v in graph.outputs)
    consts = {c.name: c for c in graph.consts} | state.builder.consts
    return canonicalize(rewrite(graph, state.builder.nodes, consts=tuple(consts.values()), outputs=outputs))


def _fresh(builder: Builder, node: Node) -> tuple[Value, ...]:
    return tuple(builder.fresh(v.type) for v in node.outputs)


def _identity(value: Value) -> Pending:
    return Pending(value, tuple(range(value.type.rank)))


def _inverse(order: Order) -> Order:
    return tuple(order.index(i) for i in range(len(order)))


@dataclass
class _Sinking:
    builder: Builder
    env: dict[str, Pending] = field(default_factory=dict)
    layer: str = ""
    moved: dict[tuple[str, Order], Value] = field(default_factory=dict)

    def call(self, op: str, *inputs: Value, **attrs: Any) -> Value:
        return self.builder.call(op, *inputs, layer=self.layer, **attrs)

    def transpose(self, value: Value, order: Order) -> Value:
        """The transposed value: nothing, a view where only dimensions of length 1 move, or a node; made once."""
        if order == tuple(range(len(order))):
            return value
        shape = tuple(value.type.shape[a] for a in order)
        if (value.name, order) not in self.moved:
            long = [a for a in order if value.type.shape[a] != 1]
            view = long == sorted(long) and not isinstance(value, Const)
            move = self.call("reshape", value, newshape=shape) if view else self.call("transpose", value, axes=order)
            self.moved[value.name, order] = move
        return self.moved[value.name, order]

    def plain(self, value: Value) -> Value:
        """The value itself."""
        pending = self.env[value.name]
        result = self.transpose(pending.value, pending.order)
        return self.call("reshape", result, newshape=pending.flat) if pending.flat is not None else result

    def ordered(self, value: Value, order: Order) -> Value:
        """What stands for ``value`` under ``order``: transpose(result, order) = value."""
        pending = self.env[value.name]
        if pending.flat is not None:
            return self.transpose(self.plain(value), _inverse(order))
        inverse = _inverse(order)
        return self.transpose(pending.value, tuple(pending.order[a] for a in inverse))


def _sink(state: _Sinking, node: Node) -> Pending:
    """The node applied to what its operands stand for."""
    first = state.env[node.inputs[0].name] if node.inputs else None
    if node.op == "transpose" and first and first.flat is None:
        axes = node.attrs["axes"]
        assert isinstance(axes, tuple)
        return Pending(first.value, tuple(first.order[a] for a in axes))
    if node.op == "reshape" and first:
        return _reshape(state, first, node)
    if node.op == "nn.dense" and first and first.flat is not None:
        return _dense(state, first, node)
    if OPS[node.op].kind == "elementwise" and node.op != "broadcast_to":
        return _elementwise(state, node)
    if node.op == "concatenate":
        order = _common_order(state, node)
        parts = [state.ordered(v, order) for v in node.inputs]
        return Pending(state.call("concatenate", *parts, axis=order[int(node.attrs["axis"])]), order)  # type: ignore[arg-type]
    if first and first.flat is None and not first.plain and (moved := _along(state, first, node)):
        return moved
    inputs = tuple(state.plain(v) for v in node.inputs)
    return _identity(state.call(node.op, *inputs, **node.attrs))


def _along(state: _Sinking, x: Pending, node: Node) -> Pending | None:
    """Operators with attributes per dimension, and those that work along the last one."""
    order, attrs = x.order, dict(node.attrs)
    back = _inverse(order)

    def permuted(values: Any) -> tuple[Any, ...]:
        return tuple(values[back[d]] for d in range(len(order)))

    if node.op in ("pad", "slice"):
        attrs = {k: permuted(v) if isinstance(v, tuple) else v for k, v in attrs.items()}
        return Pending(state.call(node.op, x.value, **attrs), order)
    if node.op == "take":
        return Pending(state.call("take", x.value, **attrs | {"axis": order[int(attrs["axis"])]}), order)  # type: ignore[arg-type]
    if node.op == "broadcast_to" and len(order) == node.output.type.rank:
        return Pending(state.call("broadcast_to", x.value, shape=permuted(attrs["shape"])), order)
    if node.op in ("mean", "sum"):
        axis = attrs["axis"]
        assert isinstance(axis, tuple)
        y = state.call(node.op, x.value, axis=tuple(sorted(order[a] for a in axis)), keepdims=attrs["keepdims"])
        if attrs["keepdims"]:
            return Pending(y, order)
        left = [order[d] for d in range(len(order)) if d not in axis]
        return Pending(y, tuple(sorted(left).index(d) for d in left))
    last = len(order) - 1
    if node.op in ("nn.softmax", "nn.log_softmax", "nn.batch_norm", "nn.dense") and order[last] == last:
        others = tuple(state.plain(v) for v in node.inputs[1:])
        return Pending(state.call(node.op, x.value, *others, **attrs), order)
    return None


def _common_order(state: _Sinking, node: Node) -> Order:
    """The order to bring all operands to: that of the largest one that waits for a transposition."""
    rank = node.output.type.rank
    waiting = [p for v in node.inputs if (p := state.env[v.name]).flat is None and not p.plain and len(p.order) == rank]
    identity = tuple(range(rank))
    return max(waiting, key=lambda p: p.value.type.size).order if waiting else identity


def _elementwise(state: _Sinking, node: Node) -> Pending:
    pendings = [state.env[v.name] for v in node.inputs]
    flat = [p for p in pendings if p.flat is not None]
    # Beside a flattened value only numbers need no order.
    if len(flat) == 1 and all(p.value.type.size == 1 for p in pendings if p.flat is None):
        numbers = [p.value if p.flat is not None else _scalar(state, p.value) for p in pendings]
        return replace(flat[0], value=state.call(node.op, *numbers, **node.attrs))
    order = _common_order(state, node)
    rank = node.output.type.rank
    inputs = []
    for value in node.inputs:
        missing = rank - value.type.rank
        if order == tuple(range(rank)) or value.type.size == 1 and missing:
            inputs.append(state.plain(value))
        elif missing:
            full = state.call("reshape", state.plain(value), newshape=(1,) * missing + value.type.shape)
            inputs.append(state.transpose(full, _inverse(order)))
        else:
            inputs.append(state.ordered(value, order))
    return Pending(state.call(node.op, *inputs, **node.attrs), order)


def _scalar(state: _Sinking, value: Value) -> Value:
    return value if value.type.rank == 0 else state.call("reshape", value, newshape=())


def _dense(state: _Sinking, x: Pending, node: Node) -> Pending:
    """A dense layer after flatten: the columns of its weights are permuted instead of its input."""
    assert x.flat is not None
    w, *bias = (state.plain(v) for v in node.inputs[1:])
    if x.flat[-1] != math.prod(x.shape):
        return _identity(state.call("nn.dense", state.plain(node.inputs[0]), w, *bias))
    rows = state.call("reshape", w, newshape=(w.type.shape[0], *x.shape))
    rows = state.call("transpose", rows, axes=(0, *(1 + a for a in _inverse(x.order))))
    rows = state.call("reshape", rows, newshape=w.type.shape)
    return _identity(state.call("nn.dense", state.call("reshape", x.value, newshape=x.flat), rows, *bias))


def _reshape(state: _Sinking, x: Pending, node: Node) -> Pending:
    """A reshape that splits and merges neighbouring dimensions commutes with the transposition."""
    new = node.output.type.shape
    if x.plain:
        return _identity(state.call("reshape", x.value, newshape=new))
    groups = _groups(x.shape, new)
    # Where the dimensions of each group lie in memory; dimensions of length 1 lie anywhere.
    places = [[x.order[d] for d in old] for old, _ in groups]
    memory = [a for a in range(len(x.order)) if x.value.type.shape[a] != 1]
    by_place = sorted(range(len(groups)), key=lambda i: min(places[i]))
    value = x.value
    if [a for i in by_place for a in places[i]] != memory:
        if len(groups) == 1 and len([d for d in new if d != 1]) == 1:
            return replace(x, flat=new)
        ones = [a for a in range(len(x.order)) if x.value.type.shape[a] == 1]
        value = state.transpose(value, (*ones, *(a for i in by_place for a in places[i])))
    order = [d for i in by_place for d in groups[i][1]]
    # A new dimension of length 1 goes in front of the next longer one, so that pictures stay (N, H, W, C).
    following = None
    for d in reversed(range(len(new))):
        if d in order:
            following = d
        else:
            order.insert(len(order) if following is None else order.index(following), d)
            following = d
    if new and new[0] == 1:
        order = [0, *(d for d in order if d != 0)]
    value = state.call("reshape", value, newshape=tuple(new[d] for d in order))
    return Pending(value, _inverse(tuple(order)))


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Dimensions longer than 1, in the smallest groups with equal numbers of elements."""
    left = [d for d, n in enumerate(old) if n != 1]
    right = [d for d, n in enumerate(new) if n != 1]
    groups = []
    while left or right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(old[d] for d in a)) != (n := math.prod(new[d] for d in b)):
            if m < n:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        groups.append((a, b))
    return groups
