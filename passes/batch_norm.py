"""Batch norm with frozen statistics becomes part of the layer before it, or three elementwise operators."""

from dataclasses import replace

import numpy as np

from tte.ir import Builder, Const, Graph, Node, Origin, Value, rewrite
from tte.passes.canonicalize import sort_constants

LINEAR = ("nn.conv2d", "nn.conv2d_transpose", "nn.dense")


def fold_batch_norm(graph: Graph) -> Graph:
    """The graph without nn.batch_norm.

    With s = gamma / sqrt(var + eps), a layer (w, b) followed by batch norm becomes (w', b'):
        w' = s * w           origin: the user's w, scale s
        b' = beta + (b - mean) * s      origin: the user's beta, scale 1
    A step on w' with learning rate s^2 * lr and on b' with lr is then exactly a step of SGD on the user's own w and
    beta with frozen statistics; gamma is frozen. Where there is no layer to fold into, it becomes
        (x - mean) * g + beta,   g = gamma / sqrt(var + eps)      origin: the user's gamma, scale 1 / sqrt(var + eps)
    which is exact for gamma and beta.
    """
    producer, uses = graph.producer(), graph.uses()
    outputs = {v.name for v in graph.outputs}
    builder = Builder()
    env: dict[str, Value] = {}
    for old in graph.nodes:
        node = replace(old, inputs=tuple(env.get(v.name, v) for v in old.inputs))
        if node.op != "nn.batch_norm":
            builder.append(node)
            continue
        assert all(isinstance(v, Const) for v in node.inputs[1:]), f"{node.layer}: batch norm with computed parameters"
        linear = producer.get(node.inputs[0].name)
        # Of what this batch norm reads in the old graph: a layer that another one was folded into has its readers.
        read_once = len(uses[old.inputs[0].name]) == 1 and old.inputs[0].name not in outputs
        if linear and linear.op in LINEAR and read_once and _owned(linear, uses) and _owned(node, uses):
            at = next(i for i, n in enumerate(builder.nodes) if n.outputs == linear.outputs)
            linear = builder.nodes[at]
            w, b = _fold(linear, node, builder)
            builder.nodes[at] = replace(linear, inputs=(linear.inputs[0], w, b))
            env[node.output.name] = linear.output
        else:
            env[node.output.name] = _scale_and_shift(node, builder)
    consts = {c.name: c for c in graph.consts} | builder.consts
    new_outputs = tuple(env.get(v.name, v) for v in graph.outputs)
    return sort_constants(rewrite(graph, builder.nodes, consts=tuple(consts.values()), outputs=new_outputs))


def _owned(node: Node, uses: dict[str, list[int]]) -> bool:
    """All parameters are constants that nobody else reads."""
    return all(isinstance(v, Const) and len(uses[v.name]) == 1 for v in node.inputs[1:])


def _constants(node: Node) -> tuple[Const, ...]:
    return tuple(v for v in node.inputs[1:] if isinstance(v, Const))


def _inverse_deviation(node: Node) -> np.ndarray:
    """1 / sqrt(var + eps): (C,) float64"""
    var = _constants(node)[3].data.astype(np.float64)
    return np.asarray(1.0 / np.sqrt(var + float(node.attrs["epsilon"])))  # type: ignore[arg-type]


def _fold(linear: Node, norm: Node, builder: Builder) -> tuple[Const, Const]:
    weight, *bias = _constants(linear)
    gamma, beta, mean, _ = _constants(norm)
    s = gamma.data * _inverse_deviation(norm)
    per_weight = np.broadcast_to(_per_weight(linear, weight, s), weight.data.shape)
    w = builder.const((weight.data * per_weight).astype(np.float32), weight.name, _scaled(weight.origin, per_weight))
    b = bias[0].data if bias else 0.0
    shift = (beta.data + (b - mean.data) * s).astype(np.float32)
    if beta.origin is not None:
        return w, builder.const(shift, beta.name, beta.origin)
    if bias and bias[0].origin is not None:
        return w, builder.const(shift, bias[0].name, _scaled(bias[0].origin, s))
    return w, builder.const(shift)  # the user has no such tensor


def _per_weight(linear: Node, weight: Const, s: np.ndarray) -> np.ndarray:
    """s per output channel, in a shape that broadcasts to the weight's."""
    if linear.op != "nn.conv2d_transpose":
        return s.reshape(-1, *[1] * (weight.type.rank - 1))
    # (C, KH, KW, O/groups): input channel c belongs to group c // (C/groups), which has O/groups outputs of its own.
    groups = int(linear.attrs["groups"])  # type: ignore[arg-type]
    per_group = s.reshape(groups, 1, 1, 1, -1)
    spread = np.broadcast_to(per_group, (groups, weight.type.shape[0] // groups, 1, 1, weight.type.shape[3]))
    return spread.reshape(weight.type.shape[0], 1, 1, -1)


def _scaled(origin: Origin | None, scale: np.ndarray) -> Origin | None:
    if origin is None:
        return None
    total = scale if origin.scale is None else origin.scale * scale
    return replace(origin, scale=np.ascontiguousarray(total, np.float64))


def _scale_and_shift(node: Node, builder: Builder) -> Value:
    x = node.inputs[0]
    gamma, beta, mean, _ = _constants(node)
    inverse = _inverse_deviation(node)
    if mean.data.any():
        x = builder.call("subtract", x, mean, layer=node.layer)
    # A nameless gamma (batch norm without affine parameters) makes a nameless constant.
    name = gamma.name if gamma.origin else None
    scale = builder.const((gamma.data * inverse).astype(np.float32), name, _scaled(gamma.origin, inverse))
    x = builder.call("multiply", x, scale, layer=node.layer)
    return builder.call("add", x, beta, layer=node.layer) if beta.origin or beta.data.any() else x
