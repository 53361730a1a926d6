"""Integers in place of the float32 gradients of quantised layers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tte.ir import Builder, Const, Graph, Node, Param, TensorType, Value, rewrite
from tte.ops.gradients import FARTHEST, FINER, integer_multiplier, least_distance
from tte.ops.loss import COARSEST, FRACTION, exponentials
from tte.ops.pool import spreads_over
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


def find_logits(node: Node, producer: Mapping[str, Node]) -> Node | None:
    """What makes floats of the int8 logits whose plain cross entropy, or its gradient, a node computes."""
    plain = node.op in ("nn.cross_entropy", "nn.cross_entropy_grad") and len(node.inputs) == 2
    source = producer.get(node.inputs[0].name) if plain and not node.attrs["label_smoothing"] else None
    if source is not None and source.op == "reshape":
        source = producer.get(source.inputs[0].name)
    fits = source is not None and source.op == "qnn.dequantize" and source.attrs["scale"] < COARSEST  # type: ignore[operator]
    return source if fits else None


def quantize_loss(graph: Graph) -> Graph:
    """Cross entropy of int8 logits without floats, but for the loss itself."""
    builder, producer = Builder(), graph.producer()
    for node in graph.nodes:
        source = find_logits(node, producer)
        if source is None or node.op != "nn.cross_entropy":
            builder.append(node)
            continue
        q, factors = _read_logits(builder, node, source)
        attrs = {"scale": source.attrs["scale"], "reduction": node.attrs["reduction"]}
        loss = builder.call("qnn.integer_cross_entropy", q, node.inputs[1], factors, layer=node.layer, **attrs)
        builder.nodes[-1] = replace(builder.nodes[-1], outputs=node.outputs)
        assert loss.type == node.output.type
    consts = {c.name: c for c in (*graph.consts, *builder.consts.values())}
    return rewrite(graph, builder.nodes, consts=tuple(consts.values()))


def _read_logits(builder: Builder, node: Node, source: Node) -> tuple[Value, Value]:
    """The int8 logits in the shape of the float ones that ``node`` reads, and the exponentials of their scale."""
    q, shape = source.inputs[0], node.inputs[0].type.shape
    if q.type.shape != shape:
        q = builder.call("reshape", q, newshape=shape, layer=node.layer)
    scale = source.attrs["scale"]
    assert isinstance(scale, float)
    return q, builder.const(exponentials(scale))


def quantize_gradients(graph: Graph) -> Graph:
    """The backward of layers with int8 weights in integers, from where the first of them reads a gradient, or from the
    loss where that is computed of integers.

    The outputs of ``graph`` are the loss and one gradient per param, as ``differentiate`` leaves them; so are those
    of the result, float32: sums times what a unit of them stands for. The ranges that ``tte.ops.gradients`` tells of
    become params of their own, with their updates.
    """
    graph = quantize_loss(graph)
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
    unit    a float32 scalar, or None: 2^-FRACTION, until the gradient begins; exponent: an int32 scalar
    factor  broadcasts to the value
    size    about the logarithm to base 2 of its largest element, in units
    room    the value may be shifted so far to the left
    """

    value: Value
    unit: Value | None
    exponent: Value
    factor: np.ndarray
    size: float
    room: int
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
        rules |= {"nn.cross_entropy_grad": self.loss}
        rules |= {"nn.max_pool2d_grad": self.spread, "nn.avg_pool2d_grad": self.spread}
        known = any(v.name in self.found for v in node.inputs)
        begins = node.op in PRODUCTS or node.op == "nn.cross_entropy_grad"
        return rules[node.op](node) if node.op in rules and (known or begins) else None

    # --- one rule per operator: what it makes of integers, or None where only floats will do

    def loss(self, node: Node) -> _Integers | None:
        source = find_logits(node, self.producer)
        if source is None:
            return None
        q, factors = _read_logits(self.builder, node, source)
        value = self.call("qnn.integer_cross_entropy_grad", q, node.inputs[1], factors)
        rows = q.type.size // q.type.shape[-1] if node.attrs["reduction"] == "mean" else 1
        return _Integers(value, None, self.zero, np.ones(1) / rows, FRACTION, 0)

    def mask(self, node: Node) -> _Integers | None:
        g = self.found[node.inputs[0].name]
        return None if node.attrs["alpha"] else replace(g, masks=(*g.masks, node.inputs[1]))

    def multiply(self, node: Node) -> _Integers | None:
        g, factor = self.found.get(node.inputs[0].name), node.inputs[1]
        if g is None or not isinstance(factor, Const) or node.output.type.shape != g.value.type.shape:
            return None
        if math.prod(factor.type.shape[:-1]) > 1:  # differs along rows or columns
            return None
        size = g.size + math.log2(max(float(np.median(np.abs(factor.data))), 1e-30))
        return replace(g, factor=g.factor * factor.data.astype(np.float64), size=size)

    def add(self, node: Node) -> _Integers | None:
        a, b = (self.found.get(v.name) for v in node.inputs)
        if a is None or b is None or a.value.type.shape != b.value.type.shape:
            return None
        if a.unit is None or a.unit != b.unit:
            return None
        a, b = (self.rounded(g) if g.masks or not _per_channel(g) else g for g in (a, b))
        size = max(a.size, b.size) + 0.5
        return self.rescaled("qnn.add_gradients", {"a_bits": a, "b_bits": b}, size)

    def sum(self, node: Node) -> _Integers | None:
        g = self.rounded(self.found[node.inputs[0].name])
        if math.prod(node.inputs[0].type.shape) // node.output.type.size >= 2**23:
            return None
        room = _room(128 * math.prod(node.inputs[0].type.shape) // node.output.type.size)
        return replace(g, value=self.call("qnn.sum", g.value, **node.attrs), room=room)

    def move(self, node: Node) -> _Integers | None:
        g = self.found[node.inputs[0].name]
        g = g if g.unit is None and g.factor.size == 1 and not g.masks else self.rounded(g)
        return replace(g, value=self.call(node.op, g.value, **node.attrs))

    def spread(self, node: Node) -> _Integers | None:
        """Over the windows of a pool, of which an average divides all by the same number."""
        attrs, op, count = dict(node.attrs), node.op, 1
        size, strides = attrs["pool_size"], attrs["strides"]
        assert isinstance(size, tuple) and isinstance(strides, tuple)
        if op == "nn.avg_pool2d_grad":
            whole, padding = attrs.pop("count_include_pad"), attrs["padding"]
            if not whole and padding != (0, 0, 0, 0):
                return None
            op, count = "qnn.sum_pool2d_grad", math.prod(size)
        windows = spreads_over(size, strides)
        if windows > 255:
            return None
        g = self.rounded(self.found[node.inputs[0].name])
        value = self.call(op, g.value, *node.inputs[1:], **attrs)
        room = _room(128 * windows) if windows > 1 else g.room
        return replace(g, value=value, factor=g.factor / count, size=g.size - math.log2(count), room=room)

    def product(self, node: Node) -> _Integers | None:
        """Of a gradient and int8 weights or activations; a float gradient becomes integers here."""
        at = PRODUCTS[node.op]
        other = node.inputs[1 - at]
        if len(node.inputs) > 2 or other.type.dtype not in ("int8", "int16"):
            return None
        gradient = node.inputs[at]
        largest = 128 * 255 * _count_terms(node, gradient.type, other.type)
        if largest >= 2**31:
            return None
        g = self.rounded(self.found[gradient.name]) if gradient.name in self.found else self.begin(gradient)
        operands = (g.value, other) if at == 0 else (other, g.value)
        value = self.call(f"qnn.{node.op.removeprefix('nn.')}", *operands, **node.attrs)
        size = g.size + 0.5 * math.log2(max(self.energy(other) / node.output.type.shape[-1], 1e-9))
        return _Integers(value, g.unit, g.exponent, g.factor, size, _room(largest))

    # --- between floats and integers

    def begin(self, gradient: Value) -> _Integers:
        real = self.real(gradient)
        unit = self.call("qnn.gradient_unit", real)
        q = self.call("qnn.quantize_gradient", real, unit)
        self.found[gradient.name] = _Integers(q, unit, self.zero, np.ones(1), math.log2(127), WIDEST)
        self.floats[gradient.name] = real
        return self.found[gradient.name]

    def begun(self, g: _Integers) -> _Integers:
        """A gradient that a loss of integers gives, as int8: here its unit is found."""
        multiplier, bits = _integer_multiplier(g.factor)
        operands, bits = self.builder.const(multiplier), bits + FRACTION
        value = self.masked(g.value, g.masks)
        unit = self.call("qnn.gradient_unit", value, operands, bits=bits)
        q = self.call("qnn.quantize_gradient", value, unit, operands, bits=bits)
        return _Integers(q, unit, g.exponent, np.ones(1), math.log2(127), WIDEST)

    @property
    def zero(self) -> Value:
        return self.builder.const(np.asarray(0, np.int32))

    def real(self, value: Value) -> Value:
        """The float32 form of a value of the old graph."""
        if value.name in self.floats or value.name not in self.found:
            return self.floats.get(value.name, value)
        g = self.found[value.name]
        unit = g.unit or self.builder.const(np.asarray(2.0**-FRACTION, np.float32))
        operands = [g.value, self.call("qnn.gradient_scale", unit, g.exponent)]
        if g.factor.size > 1 or g.factor.item() != 1.0:
            operands.append(self.builder.const(g.factor.astype(np.float32)))
        self.floats[value.name] = self.masked(self.call("qnn.dequantize_gradient", *operands, room=g.room), g.masks)
        return self.floats[value.name]

    def rounded(self, g: _Integers) -> _Integers:
        """As int8, of which each element means the same."""
        assert _per_channel(g), f"{self.layer}: a factor of shape {g.factor.shape}"
        if g.unit is None:
            return self.begun(g)
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
            assert g.unit is not None
            multiplier, bits[name] = _integer_multiplier(g.factor)
            least.append(least_distance(g.value.type.dtype, bits[name], FINER if len(given) > 1 else 0))
            operands += [g.value, self.builder.const(multiplier), g.exponent]
            unit = g.unit
        exponent = self.call("qnn.gradient_exponent", range, *(g.exponent for g in given.values()), least=tuple(least))
        q = self.masked(self.call(op, *operands, exponent, **bits), masks)
        self.ranges.append((range, self.call("qnn.observe_gradient", range, q, exponent, unit)))
        return _Integers(q, unit, exponent, np.ones(1), size, WIDEST)

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


WIDEST = 24  # room of an int8


def _room(largest: int) -> int:
    """How far int32 of this size may be shifted to the left."""
    return 31 - largest.bit_length()


def _integer_multiplier(factor: np.ndarray) -> tuple[np.ndarray, int]:
    multiplier, bits = integer_multiplier(factor)
    return multiplier.reshape(-1), bits
