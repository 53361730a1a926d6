"""Integers in place of the float32 gradients of quantised layers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tte.ir import Builder, Const, Graph, Node, Param, TensorType, Value, rewrite
from tte.ops.gradients import FARTHEST, FINER, least_distance
from tte.ops.rules import read_numbers

RANGE = "gradient_range"
# The same elements in another order or number.
MOVES = ("reshape", "transpose", "permute", "slice", "broadcast_to")
PRODUCTS = {"nn.conv2d_transpose": 0, "nn.conv2d_weight_grad": 1, "matmul": 0}  # which operand is the gradient


def _count_terms(node: Node, gradient: TensorType, other: TensorType) -> int:
    """Products in a sum, at the most."""
    if node.op == "matmul":
        return max(gradient.shape)
    if node.op == "nn.conv2d_weight_grad":  # one a pixel
        return gradient.size // gradient.shape[-1]
    groups = node.attrs["groups"]
    assert isinstance(groups, int)
    return other.size // other.shape[-1] // groups  # a window of each filter


def quantize_gradients(graph: Graph) -> Graph:
    """The backward of layers with int8 weights in integers, from where the first of them reads a gradient.

    The outputs of ``graph`` are the loss and one gradient per param, as ``differentiate`` leaves them; so are those
    of the result, float32: sums times what a unit of them stands for. The ranges that ``tte.ops.gradients`` tells of
    become params of their own, with their updates.
    """
    state = _State(graph)
    for node in graph.nodes:
        state.lower(node)
    outputs = tuple(state.real(v) for v in graph.outputs)
    consts = {c.name: c for c in (*graph.consts, *state.builder.consts.values())}
    return rewrite(
        graph,
        state.builder.nodes,
        params=(*graph.params, *(range for range, _ in state.ranges)),
        consts=tuple(consts.values()),
        outputs=outputs,
        updates=(*graph.updates, *state.ranges),
    )


@dataclass(frozen=True)
class _Integers:
    """A gradient: value * factor * 2^exponent * unit, where ``masks`` are set.

    value   int8, or int32: sums that nothing has rounded yet
    unit    a float32 scalar; exponent: an int32 scalar
    factor  broadcasts to the value
    size    about the logarithm to base 2 of its largest element, in units
    """

    value: Value
    unit: Value
    exponent: Value
    factor: np.ndarray
    size: float
    masks: tuple[Value, ...] = ()


@dataclass
class _State:
    """The graph that is being written; ``found`` has what became integers, by the name of the float it replaces."""

    graph: Graph
    builder: Builder = field(default_factory=Builder)
    found: dict[str, _Integers] = field(default_factory=dict)
    floats: dict[str, Value] = field(default_factory=dict)
    ranges: list[tuple[Param, Value]] = field(default_factory=list)
    layer: str = ""

    def __post_init__(self) -> None:
        self.producer = self.graph.producer()
        self.uses = self.graph.uses()

    def call(self, op: str, *inputs: Value, **attrs: object) -> Value:
        return self.builder.call(op, *inputs, layer=self.layer, **attrs)

    def lower(self, node: Node) -> None:
        """Append the integer form of a node that reads integers or makes the first of them, else the node itself."""
        self.layer = node.layer
        result = self.integers(node)
        if result is None:
            self.builder.append(replace(node, inputs=tuple(map(self.real, node.inputs))))
            return
        if len(self.uses.get(node.output.name, [])) > 1:
            result = self.rounded(result)  # several read it: once and for all
        self.found[node.output.name] = result
        if node.output in self.graph.outputs:
            self.real(node.output)

    def integers(self, node: Node) -> _Integers | None:
        rules: dict[str, Callable[[Node], _Integers | None]]
        rules = {"nn.apply_mask": self.mask, "multiply": self.multiply, "add": self.add, "sum": self.sum}
        rules |= dict.fromkeys(MOVES, self.move) | dict.fromkeys(PRODUCTS, self.product)
        known = any(v.name in self.found for v in node.inputs)
        return rules[node.op](node) if node.op in rules and (known or node.op in PRODUCTS) else None

    # --- one rule per operator: what it makes of integers, or None where only floats will do

    def mask(self, node: Node) -> _Integers | None:
        g = self.found[node.inputs[0].name]
        return None if node.attrs["alpha"] else replace(g, masks=(*g.masks, node.inputs[1]))

    def multiply(self, node: Node) -> _Integers | None:
        g, factor = self.found.get(node.inputs[0].name), node.inputs[1]
        if g is None or not isinstance(factor, Const) or node.output.type.shape != g.value.type.shape:
            return None
        size = g.size + math.log2(max(float(np.median(np.abs(factor.data))), 1e-30))
        return replace(g, factor=g.factor * factor.data.astype(np.float64), size=size)

    def add(self, node: Node) -> _Integers | None:
        a, b = (self.found.get(v.name) for v in node.inputs)
        if a is None or b is None or a.unit != b.unit or a.value.type.shape != b.value.type.shape:
            return None
        a, b = (self.rounded(g) if g.masks or not _per_channel(g) else g for g in (a, b))
        size = max(a.size, b.size) + 0.5
        return self.rescaled("qnn.add_gradients", {"a_bits": a, "b_bits": b}, size)

    def sum(self, node: Node) -> _Integers | None:
        g = self.rounded(self.found[node.inputs[0].name])
        if math.prod(node.inputs[0].type.shape) // node.output.type.size >= 2**23:
            return None
        return replace(g, value=self.call("qnn.sum", g.value, **node.attrs))

    def move(self, node: Node) -> _Integers | None:
        g = self.rounded(self.found[node.inputs[0].name])
        return replace(g, value=self.call(node.op, g.value, **node.attrs))

    def product(self, node: Node) -> _Integers | None:
        """Of a gradient and int8 weights or activations; a float gradient becomes integers here."""
        at = PRODUCTS[node.op]
        other = node.inputs[1 - at]
        if len(node.inputs) > 2 or other.type.dtype not in ("int8", "int16"):
            return None
        gradient = node.inputs[at]
        if 128 * 255 * _count_terms(node, gradient.type, other.type) >= 2**31:
            return None
        g = self.rounded(self.found[gradient.name]) if gradient.name in self.found else self.begin(gradient)
        operands = (g.value, other) if at == 0 else (other, g.value)
        value = self.call(f"qnn.{node.op.removeprefix('nn.')}", *operands, **node.attrs)
        size = g.size + 0.5 * math.log2(max(self.energy(other) / node.output.type.shape[-1], 1e-9))
        return _Integers(value, g.unit, g.exponent, g.factor, size)

    # --- between floats and integers

    def begin(self, gradient: Value) -> _Integers:
        real = self.real(gradient)
        unit = self.call("qnn.gradient_unit", real)
        q = self.call("qnn.quantize_gradient", real, unit)
        zero = self.builder.const(np.asarray(0, np.int32))
        self.found[gradient.name] = _Integers(q, unit, zero, np.ones(1), math.log2(127))
        self.floats[gradient.name] = real
        return self.found[gradient.name]

    def real(self, value: Value) -> Value:
        """The float32 form of a value of the old graph."""
        if value.name in self.floats or value.name not in self.found:
            return self.floats.get(value.name, value)
        g = self.found[value.name]
        scale = self.call("qnn.gradient_scale", g.unit, g.exponent)
        real = self.call("multiply", self.call("cast", g.value, dtype="float32"), scale)
        if g.factor.size > 1 or g.factor.item() != 1.0:
            real = self.call("multiply", real, self.builder.const(g.factor.astype(np.float32)))
        self.floats[value.name] = self.masked(real, g.masks)
        return self.floats[value.name]

    def rounded(self, g: _Integers) -> _Integers:
        """As int8, of which each element means the same."""
        assert _per_channel(g), f"{self.layer}: a factor of shape {g.factor.shape}"
        if g.value.type.dtype != "int8" or g.factor.size > 1:
            return self.rescaled("qnn.rescale_gradient", {"bits": g}, g.size, g.masks)
        return replace(g, value=self.masked(g.value, g.masks), masks=())

    def masked(self, q: Value, masks: tuple[Value, ...]) -> Value:
        for bits in masks:
            q = self.call("nn.apply_mask", q, bits)
        return q

    def rescaled(
        self, op: str, given: Mapping[str, _Integers], size: float, masks: tuple[Value, ...] = ()
    ) -> _Integers:
        """int8 of a new range; ``given``: the operands, by the attribute that has the bits of their multipliers."""
        data = np.asarray([np.clip(round(size * 256), -FARTHEST, FARTHEST), 0], np.int32)
        range = Param(f"{RANGE}.{len(self.ranges)}", TensorType((2,), "int32"), data)
        operands: list[Value] = []
        bits, least = {}, []
        for name, g in given.items():
            multiplier, bits[name] = _integer_multiplier(g.factor)
            least.append(least_distance(g.value.type.dtype, bits[name], FINER if len(given) > 1 else 0))
            operands += [g.value, self.builder.const(multiplier), g.exponent]
            unit = g.unit
        exponent = self.call("qnn.gradient_exponent", range, *(g.exponent for g in given.values()), least=tuple(least))
        q = self.masked(self.call(op, *operands, exponent, **bits), masks)
        self.ranges.append((range, self.call("qnn.observe_gradient", range, q, exponent, unit)))
        return _Integers(q, unit, exponent, np.ones(1), size)

    def energy(self, value: Value) -> float:
        """About the sum of squares of a weight; of activations, of so many ones."""
        if isinstance(value, Const | Param):
            return float(np.square(read_numbers(value.data, np.dtype(np.float64))).sum())
        node = self.producer.get(value.name)
        if node is None or node.op not in ("concatenate", "take", "permute", "qnn.round"):
            return float(value.type.size)
        return sum(map(self.energy, node.inputs))


def _per_channel(g: _Integers) -> bool:
    """The factor is one number, or one for each element of the last axis."""
    return g.factor.size in (1, g.factor.shape[-1])


def _integer_multiplier(factor: np.ndarray) -> tuple[np.ndarray, int]:
    """(multiplier, bits): factor = multiplier / 2^bits, with 30 bits for the largest."""
    largest = float(np.abs(factor).max())
    bits = 30 - math.frexp(largest)[1]
    return np.rint(factor.reshape(-1) * 2.0**bits).astype(np.int32), bits
