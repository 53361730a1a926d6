"""Gives a model a new last layer with another number of outputs."""

from dataclasses import replace

import numpy as np

from tte.document import suggest
from tte.errors import TTEError
from tte.ir import OPS, Builder, Const, Graph, InvalidType, Node, Origin, Value, rewrite
from tte.scheme import find_layers

# What may stand behind the head: each element or each row by itself, or the same elements in another shape.
FOLLOWERS = frozenset(
    "reshape transpose mean sum nn.softmax nn.log_softmax nn.adaptive_avg_pool2d nn.avg_pool2d nn.max_pool2d".split()
)


def replace_head(graph: Graph, layer: str, classes: int, init: str = "zero") -> Graph:
    """The graph whose dense layer or convolution ``layer`` is a new one with ``classes`` outputs, all zero.

    The new weights keep the user's names; their origins have the user's layout with the new number of outputs. Of a
    quantised head the new one is float32, to the end of the model, and its names are those from before quantisation.
    Raises TTEError (E036) if there is no such layer, or another one behind it depends on the number of outputs.
    """
    assert init == "zero"
    heads = [n for n in graph.nodes if n.op in ("nn.dense", "nn.conv2d") and n.layer == layer]
    heads = [n for n in heads if isinstance(n.inputs[1], Const) and n.attrs.get("groups", 1) == 1]
    if len(heads) != 1:
        names = [x.name for x in find_layers(graph) if x.op in ("nn.dense", "nn.conv2d")]
        raise TTEError(
            "TTE-E036",
            f"{layer!r} is not one dense layer or convolution",
            where="head.layer",
            fix=suggest(layer, names[::-1], "layers, last first"),
        )
    head = heads[0]
    builder = Builder()
    new: dict[str, Value] = {}
    for node in graph.nodes:
        inputs = tuple(new.get(v.name, v) for v in node.inputs)
        if node is head:
            stored = [_new_weight(builder, v, classes) for v in node.inputs[1:] if isinstance(v, Const)]
            value = builder.call(node.op, node.inputs[0], *stored, layer=layer, **node.attrs)
            new[node.output.name] = value
        elif inputs == node.inputs:
            builder.append(node)
        elif node.op in ("qnn.quantize", "qnn.dequantize"):  # the grid of another classifier's results
            new[node.output.name] = inputs[0]
        else:
            new[node.output.name] = _follow(builder, node, inputs, layer)
    # The new constants take the names of the old ones.
    kept = tuple(c for c in graph.consts if c.name not in builder.consts)
    if any(v.name in builder.consts for node in builder.nodes if node.layer != layer for v in node.inputs):
        raise _not_last(layer, "its weight is also another layer's")
    consts = (*kept, *builder.consts.values())
    return rewrite(graph, builder.nodes, consts=consts, outputs=tuple(new.get(v.name, v) for v in graph.outputs))


def _follow(builder: Builder, node: Node, inputs: tuple[Value, ...], layer: str) -> Value:
    """The node on operands of a new shape."""
    if OPS[node.op].kind != "elementwise" and node.op not in FOLLOWERS:
        raise _not_last(layer, f"{node.layer or node.op} ({node.op}) depends on its outputs")
    attrs = dict(node.attrs)
    if node.op == "reshape":
        attrs["newshape"] = _new_shape(node, inputs[0], layer)
    try:
        return builder.call(node.op, *inputs, layer=node.layer, **attrs)
    except InvalidType as problem:
        raise _not_last(layer, f"{node.layer or node.op} ({node.op}) depends on its outputs: {problem}") from problem


def _new_shape(node: Node, value: Value, layer: str) -> tuple[int, ...]:
    """The old target shape with the one dimension changed that makes the sizes agree."""
    old = node.output.type.shape
    for axis in sorted(range(len(old)), key=lambda a: (old[a] == 1, -a)):
        rest = node.output.type.size // old[axis]
        if value.type.size % rest == 0:
            return (*old[:axis], value.type.size // rest, *old[axis + 1 :])
    raise _not_last(layer, f"a reshape to {old} depends on its outputs")


def _not_last(layer: str, why: str) -> TTEError:
    return TTEError(
        "TTE-E036",
        f"{layer} cannot be replaced: {why}",
        where="head.layer",
        fix="name the model's last layer with weights, or change the model before it is compiled",
    )


def _new_weight(builder: Builder, old: Const, classes: int) -> Const:
    """Zeros with ``classes`` rows; in the user's layout the axis of the outputs has that length."""
    data = np.zeros((classes, *old.type.shape[1:]), old.type.numpy)
    origin = old.origin
    if origin is not None:
        if origin.quantized is not None:  # as onnxruntime names what it makes of fc.weight
            origin = replace(origin, name=origin.name.removesuffix("_quantized"))
        places = np.unravel_index(origin.index, origin.shape)
        rows = np.arange(old.type.shape[0]).reshape(-1, *[1] * (old.type.rank - 1))
        candidates = (a for a, size in enumerate(origin.shape) if size == old.type.shape[0])
        axis = next((a for a in candidates if np.all(places[a] == rows)), None)
        if axis is None:  # not a plain layout of the user's: ours is the one to go by
            origin = Origin(origin.name, data.shape, np.arange(data.size).reshape(data.shape))
        else:
            shape = (*origin.shape[:axis], classes, *origin.shape[axis + 1 :])
            first = [np.broadcast_to(p[:1], data.shape) for p in places]
            first[axis] = np.indices(data.shape)[0]
            origin = Origin(origin.name, shape, np.ravel_multi_index(tuple(first), shape))
    return builder.const(data, old.name, origin)
