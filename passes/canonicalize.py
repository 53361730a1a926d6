"""One form per idea: puts back together what exporters and importers take apart.

Each rule looks at one node and at the producers of its operands, and returns the value that replaces the node's
output, or None. Rules run in order of execution until nothing changes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tte.ir import OPS, Builder, Const, Graph, Node, Value, rewrite
from tte.passes.simplify import eliminate_common_subexpressions, eliminate_dead_code, fold_constants

COMMUTATIVE = ("add", "multiply")
BINARY = ("add", "subtract", "multiply", "divide")
LINEAR = ("nn.conv2d", "nn.conv2d_transpose", "nn.dense")


def canonicalize(graph: Graph) -> Graph:
    """The same function in the operators that the rest of the compiler looks for."""
    before = ""
    while before != (before := str(graph)):
        graph = eliminate_common_subexpressions(eliminate_dead_code(_apply_rules(graph)))
        graph = fold_constants(graph)  # at the end: a weight that is read once keeps its name when it is folded
    return sort_constants(graph)


def sort_constants(graph: Graph) -> Graph:
    """Constants in the order of their first use, so that equal programs have equal texts."""
    order = dict.fromkeys(v.name for node in graph.nodes for v in node.inputs)
    position = {name: i for i, name in enumerate(order)}
    return replace(graph, consts=tuple(sorted(graph.consts, key=lambda c: position.get(c.name, len(position)))))


@dataclass
class Rewriter:
    """The graph that is being written: ``producer`` and ``uses`` are of new values."""

    builder: Builder
    producer: dict[str, Node] = field(default_factory=dict)
    uses: dict[str, list[Node]] = field(default_factory=dict)  # readers in the old graph
    layer: str = ""

    def call(self, op: str, *inputs: Value, **attrs: object) -> Value:
        result = self.builder.call(op, *inputs, layer=self.layer, **attrs)
        self.producer[result.name] = self.builder.nodes[-1]
        return result

    def made_by(self, value: Value, *ops: str) -> Node | None:
        """The node that makes ``value`` if it is one of ``ops``."""
        node = self.producer.get(value.name)
        return node if node is not None and node.op in ops else None

    def read_once(self, value: Value) -> bool:
        return len(self.uses.get(value.name, ())) == 1


Rule = Callable[[Rewriter, Node], Value | None]


def _apply_rules(graph: Graph) -> Graph:
    state = Rewriter(Builder())
    old_uses = graph.uses()
    outputs = {v.name for v in graph.outputs}

    def readers(name: str) -> list[Node]:
        found = [graph.nodes[i] for i in old_uses.get(name, [])]
        return [*found, *found[:1]] if name in outputs else found  # an output is one more reader

    env: dict[str, Value] = {}
    for value in (*graph.inputs, *graph.params, *graph.consts):
        state.uses[value.name] = readers(value.name)
    for node in graph.nodes:
        old = node
        node = replace(node, inputs=tuple(env.get(v.name, v) for v in node.inputs))
        state.layer = node.layer
        state.uses["~self"] = readers(old.output.name)
        result = next((r for rule in RULES if (r := rule(state, node)) is not None), None)
        if result is None:
            outputs_new = tuple(state.builder.fresh(v.type) for v in node.outputs)
            node = replace(node, outputs=outputs_new)
            state.builder.append(node)
            for value, new in zip(old.outputs, outputs_new, strict=True):
                env[value.name] = new
                state.producer[new.name] = node
                state.uses[new.name] = readers(value.name)
            continue
        assert result.type == node.output.type, f"{node.op}: {node.output.type} became {result.type}"
        env[old.output.name] = result
        state.uses.setdefault(result.name, readers(old.output.name))
    consts = {c.name: c for c in graph.consts} | state.builder.consts
    new_outputs = tuple(env.get(v.name, v) for v in graph.outputs)
    return rewrite(graph, state.builder.nodes, consts=tuple(consts.values()), outputs=new_outputs)


def _number(value: Value) -> float | None:
    """The number of a constant with one element that is not one of the user's tensors."""
    if isinstance(value, Const) and value.type.size == 1 and value.origin is None:
        return float(value.data.item())
    return None


def _is(value: Value, number: float) -> bool:
    found = _number(value)
    return found is not None and math.isclose(found, number, rel_tol=1e-6)


# Views and moves


def _drop_identity(state: Rewriter, node: Node) -> Value | None:
    """What gives its operand back."""
    x = node.inputs[0] if node.inputs else None
    if x is None or x.type != node.output.type:
        return None
    same = {
        "reshape": True,
        "transpose": node.attrs.get("axes") == tuple(range(x.type.rank)),
        "broadcast_to": True,
        "cast": True,
        "concatenate": len(node.inputs) == 1,
        "slice": True,
        "pad": True,
        "clip": node.attrs.get("min") == -math.inf and node.attrs.get("max") == math.inf,
        "add": _all_are(node.inputs[-1], 0.0),
        "subtract": _all_are(node.inputs[-1], 0.0),
        "multiply": _all_are(node.inputs[-1], 1.0),
        "divide": _all_are(node.inputs[-1], 1.0),
    }
    return x if same.get(node.op, False) else None


def _all_are(value: Value, number: float) -> bool:
    return isinstance(value, Const) and value.origin is None and bool((value.data == number).all())


def _merge_reshapes(state: Rewriter, node: Node) -> Value | None:
    inner = node.op == "reshape" and state.made_by(node.inputs[0], "reshape")
    return state.call("reshape", inner.inputs[0], **node.attrs) if inner else None


def _reshape_last(state: Rewriter, node: Node) -> Value | None:
    """Views go behind elementwise operators, so that these stand next to the layer that they can be fused with."""
    if node.op != "nn.batch_norm" and (OPS[node.op].kind != "elementwise" or node.op == "broadcast_to"):
        return None
    view = state.made_by(node.inputs[0], "reshape")
    if view is None or not state.read_once(node.inputs[0]):
        return None
    x, others = view.inputs[0], node.inputs[1:]
    # A constant beside it must be a number, or run along a last dimension that the view does not touch.
    last = x.type.shape[-1:] if x.type.shape[-1:] == node.output.type.shape[-1:] else ()
    if not all(isinstance(v, Const) and v.type.shape in ((), last) for v in others):
        return None
    y = state.call(node.op, x, *others, **node.attrs)
    return state.call("reshape", y, newshape=node.output.type.shape)


def _merge_transposes(state: Rewriter, node: Node) -> Value | None:
    inner = node.op == "transpose" and state.made_by(node.inputs[0], "transpose")
    if not inner:
        return None
    first, second = _ints(inner.attrs["axes"]), _ints(node.attrs["axes"])
    return state.call("transpose", inner.inputs[0], axes=tuple(first[a] for a in second))


def _pad_last(state: Rewriter, node: Node) -> Value | None:
    """Padding goes behind a transposition, towards the convolution that takes it over."""
    pad = state.made_by(node.inputs[0], "pad") if node.op == "transpose" else None
    if pad is None or not state.read_once(node.inputs[0]):
        return None
    axes, width = _ints(node.attrs["axes"]), _ints(pad.attrs["pad_width"])
    x = state.call("transpose", pad.inputs[0], axes=axes)
    return state.call("pad", x, **pad.attrs | {"pad_width": tuple(width[a] for a in axes)})


def _merge_slices(state: Rewriter, node: Node) -> Value | None:
    inner = node.op == "slice" and state.made_by(node.inputs[0], "slice")
    if not inner:
        return None
    first = [_ints(inner.attrs[k]) for k in ("begin", "end", "strides")]
    second = [_ints(node.attrs[k]) for k in ("begin", "end", "strides")]
    strides = tuple(a * b for a, b in zip(first[2], second[2], strict=True))
    begin = tuple(b + s * c for b, s, c in zip(first[0], first[2], second[0], strict=True))
    last = tuple(b + s * (n - 1) + 1 for b, s, n in zip(begin, strides, node.output.type.shape, strict=True))
    end = tuple(e if n == 1 or s == 1 else min(full, e) for e, n, s, full in
                zip(last, node.output.type.shape, strides, inner.inputs[0].type.shape, strict=True))  # fmt: skip
    return state.call("slice", inner.inputs[0], begin=begin, end=end, strides=strides)


def _ints(value: object) -> tuple[Any, ...]:
    assert isinstance(value, tuple)
    return value


def _reduce_then_reshape(state: Rewriter, node: Node) -> Value | None:
    """A kept dimension that is reshaped away need not be kept."""
    if node.op not in ("mean", "sum") or not node.attrs["keepdims"]:
        return None
    readers = state.uses["~self"]
    if not readers or any(r.op != "reshape" for r in readers):
        return None
    y = state.call(node.op, node.inputs[0], axis=node.attrs["axis"], keepdims=False)
    return state.call("reshape", y, newshape=node.output.type.shape)


# Operands


def _constant_second(state: Rewriter, node: Node) -> Value | None:
    if node.op in COMMUTATIVE and isinstance(node.inputs[0], Const) and not isinstance(node.inputs[1], Const):
        return state.call(node.op, node.inputs[1], node.inputs[0])
    return None


def _short_constant(state: Rewriter, node: Node) -> Value | None:
    """Leading dimensions of length 1 of a constant operand say nothing; neither does the shape of a number."""
    if node.op not in BINARY:
        return None
    for i, value in enumerate(node.inputs):
        other = node.inputs[1 - i]
        if not isinstance(value, Const) or isinstance(other, Const) or other.type.rank < value.type.rank:
            continue
        shape = value.type.shape
        while shape and shape[0] == 1 and (len(shape) > 1 or value.origin is None):
            shape = shape[1:]
        if shape == value.type.shape:
            continue
        short = state.call("reshape", value, newshape=shape)
        return state.call(node.op, *((short, other) if i == 0 else (other, short)))
    return None


def _merge_factors(state: Rewriter, node: Node) -> Value | None:
    """(x * a) * b with numbers whose product is exact"""
    outer = _number(node.inputs[1]) if node.op == "multiply" else None
    inner = state.made_by(node.inputs[0], "multiply")
    factor = _number(inner.inputs[1]) if inner else None
    if outer is None or inner is None or factor is None or math.frexp(outer)[0] != 0.5:
        return None
    return state.call("multiply", inner.inputs[0], state.builder.const(factor * outer))


# Layers


def _dense(state: Rewriter, node: Node) -> Value | None:
    """matmul with a constant matrix on the right"""
    if node.op != "matmul" or node.attrs["transpose_a"]:
        return None
    x, w = node.inputs
    if not isinstance(w, Const) or w.type.rank != 2:
        return None
    return state.call("nn.dense", x, w if node.attrs["transpose_b"] else state.call("transpose", w, axes=(1, 0)))


def _bias(state: Rewriter, node: Node) -> Value | None:
    """A constant per output channel, added to a convolution or dense layer"""
    if node.op != "add" or not isinstance(node.inputs[1], Const):
        return None
    x, b = node.inputs
    linear = state.made_by(x, *LINEAR)
    if linear is None or len(linear.inputs) != 2 or not state.read_once(x):
        return None
    channels = x.type.shape[-1]
    if b.type.size != channels or b.type.shape[-1:] != (channels,):
        return None
    if b.type.rank > 1:
        b = state.call("reshape", b, newshape=(channels,))
    state.layer = linear.layer
    return state.call(linear.op, *linear.inputs, b, **linear.attrs)


def _padding(state: Rewriter, node: Node) -> Value | None:
    """Zeros around the picture in front of a convolution"""
    pad = state.made_by(node.inputs[0], "pad") if node.op == "nn.conv2d" else None
    if pad is None or pad.attrs["value"] != 0.0:
        return None
    batch, rows, columns, channels = (_ints(w) for w in _ints(pad.attrs["pad_width"]))
    if any((*batch, *channels, rows[2], columns[2])):
        return None
    around = (rows[0], columns[0], rows[1], columns[1])
    padding = tuple(p + q for p, q in zip(_ints(node.attrs["padding"]), around, strict=True))
    return state.call(node.op, pad.inputs[0], *node.inputs[1:], **node.attrs | {"padding": padding})


def _global_pool(state: Rewriter, node: Node) -> Value | None:
    """Adaptive pooling whose windows do not overlap, and pooling over the whole picture"""
    if node.op not in ("nn.adaptive_avg_pool2d", "nn.avg_pool2d"):
        return None
    x, height, width = node.inputs[0], *node.inputs[0].type.shape[1:3]
    out = node.output.type.shape[1:3]
    if node.op == "nn.avg_pool2d":
        if node.attrs["pool_size"] != (height, width) or any(_ints(node.attrs["padding"])):
            return None
    if out == (1, 1):
        return state.call("mean", x, axis=(1, 2), keepdims=True)
    if node.op == "nn.avg_pool2d" or height % out[0] or width % out[1]:
        return None
    size = (height // out[0], width // out[1])
    return state.call("nn.avg_pool2d", x, pool_size=size, strides=size)


# Activations


def _rsqrt(state: Rewriter, node: Node) -> Value | None:
    """1 / sqrt(x)"""
    root = state.made_by(node.inputs[1], "sqrt") if node.op == "divide" and _is(node.inputs[0], 1.0) else None
    return state.call("rsqrt", root.inputs[0]) if root else None


def _clip(state: Rewriter, node: Node) -> Value | None:
    """clip(clip(x)), clip(relu(x)), clip from 0 up; not where they differ in the gradient at their bounds"""
    if node.op != "clip":
        return None
    low, high, inclusive = float(node.attrs["min"]), float(node.attrs["max"]), node.attrs["inclusive"]  # type: ignore[arg-type]
    if low == 0.0 and high == math.inf and not inclusive:
        return state.call("nn.relu", node.inputs[0])
    inner = state.made_by(node.inputs[0], "clip", "nn.relu")
    if inner is None or inner.attrs.get("inclusive", False) != inclusive:
        return None
    limits = (0.0, math.inf) if inner.op == "nn.relu" else (inner.attrs["min"], inner.attrs["max"])
    low, high = max(low, float(limits[0])), min(high, float(limits[1]))  # type: ignore[arg-type]
    return state.call("clip", inner.inputs[0], min=low, max=high, inclusive=inclusive) if low < high else None


def _relu6_of(state: Rewriter, value: Value) -> Value | None:
    """x, if value is clip(x + 3, 0, 6)"""
    clip = state.made_by(value, "clip")
    if clip is None or (clip.attrs["min"], clip.attrs["max"]) != (0.0, 6.0):
        return None
    shifted = state.made_by(clip.inputs[0], "add")
    return shifted.inputs[0] if shifted and _is(shifted.inputs[1], 3.0) else None


def _is_sixth(node: Node) -> bool:
    return (node.op == "divide" and _is(node.inputs[1], 6.0)) or (node.op == "multiply" and _is(node.inputs[1], 1 / 6))


def _hard_sigmoid(state: Rewriter, node: Node) -> Value | None:
    """clip(x + 3, 0, 6) / 6, or clip(x / 6 + 1/2, 0, 1)"""
    x = None
    if _is_sixth(node):
        x = _relu6_of(state, node.inputs[0])
    elif node.op == "clip" and (node.attrs["min"], node.attrs["max"]) == (0.0, 1.0):
        shifted = state.made_by(node.inputs[0], "add")
        scaled = shifted and _is(shifted.inputs[1], 0.5) and state.made_by(shifted.inputs[0], "multiply", "divide")
        x = scaled.inputs[0] if scaled and _is_sixth(scaled) else None
    return state.call("nn.hard_sigmoid", x) if x is not None else None


def _hard_swish(state: Rewriter, node: Node) -> Value | None:
    """x * hard_sigmoid(x), or x * clip(x + 3, 0, 6) / 6"""
    if node.op == "multiply":
        for x, gate in (node.inputs, node.inputs[::-1]):
            hard = state.made_by(gate, "nn.hard_sigmoid")
            if hard and hard.inputs[0] == x:
                return state.call("nn.hard_swish", x)
    if _is_sixth(node) and (product := state.made_by(node.inputs[0], "multiply")):
        for x, gate in (product.inputs, product.inputs[::-1]):
            if _relu6_of(state, gate) == x:
                return state.call("nn.hard_swish", x)
    return None


def _silu(state: Rewriter, node: Node) -> Value | None:
    """x * sigmoid(x)"""
    if node.op != "multiply":
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        sigmoid = state.made_by(gate, "sigmoid")
        if sigmoid and sigmoid.inputs[0] == x:
            return state.call("nn.silu", x)
    return None


def _product(state: Rewriter, values: Sequence[Value], depth: int = 4) -> tuple[float, list[str]]:
    """The number and the names of the values in a product of products."""
    number, names = 1.0, list[str]()
    for value in values:
        inner = state.made_by(value, "multiply") if depth else None
        if (found := _number(value)) is not None:
            number *= found
        elif inner:
            factor, rest = _product(state, inner.inputs, depth - 1)
            number, names = number * factor, names + rest
        else:
            names.append(value.name)
    return number, sorted(names)


def _gelu_tanh(state: Rewriter, node: Node) -> Value | None:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), multiplied in any order"""

    def is_product(values: Sequence[Value], number: float, factors: Sequence[Value]) -> bool:
        (a, names), (b, others) = _product(state, values), _product(state, factors)
        return math.isclose(a, number * b, rel_tol=1e-6) and names == others

    if node.op != "multiply":
        return None
    halves = [inner for v in node.inputs if (inner := state.made_by(v, "multiply"))]
    for gate in (v for product in (node, *halves) for v in product.inputs):
        one = state.made_by(gate, "add")
        tanh = state.made_by(one.inputs[0], "tanh") if one and _is(one.inputs[1], 1.0) else None
        scaled = state.made_by(tanh.inputs[0], "multiply") if tanh else None
        if scaled is None or not _is(scaled.inputs[1], math.sqrt(2 / math.pi)):
            continue
        total = state.made_by(scaled.inputs[0], "add")
        for x, cubic in (total.inputs, total.inputs[::-1]) if total else ():
            if is_product((cubic,), 0.044715, (x, x, x)) and is_product(node.inputs, 0.5, (x, gate)):
                return state.call("nn.gelu", x, approximate="tanh")
    return None


RULES: Sequence[Rule] = (
    _drop_identity, _merge_reshapes, _reshape_last, _merge_transposes, _pad_last, _merge_slices, _reduce_then_reshape,
    _constant_second, _short_constant, _merge_factors, _dense, _bias, _padding, _global_pool, _rsqrt, _clip,
    _hard_sigmoid, _hard_swish, _silu, _gelu_tanh,
)  # fmt: skip
