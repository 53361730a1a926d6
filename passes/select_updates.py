"""Turns what learns into params: a layer that learns in part gets a trained piece in RAM and a frozen one in flash."""

from dataclasses import replace

import numpy as np

from tte.ir import Const, Graph, Node, Origin, Param, TensorType, Value, rewrite
from tte.scheme import Learned, Resolved


def select_updates(graph: Graph, resolved: Resolved) -> Graph:
    """The graph whose learning constants are params of the same name.

    A weight W that learns in part becomes ``concatenate(@W, @W.frozen)`` along its input channels: the trained ones
    come first, which ``select_channels`` has seen to.
    """
    consts = {c.name: c for c in graph.consts}
    parts: dict[str, tuple[Param, Const, int, str]] = {}
    stored: dict[str, Value] = {}
    for learned in resolved.layers:
        for name in (learned.weight, learned.bias):
            if name is None or name in stored or name in parts:
                continue
            if name == learned.weight and learned.channels is not None:
                parts[name] = _split(consts[name], learned)
            else:
                c = consts[name]
                stored[name] = Param(c.name, c.type, c.data, c.origin)
    nodes: list[Node] = []
    for node in graph.nodes:
        for name in [v.name for v in node.inputs if v.name in parts and v.name not in stored]:
            param, frozen, axis, layer = parts[name]
            whole = Value(f"~{name}", consts[name].type)
            stored[name] = whole
            nodes.append(Node("concatenate", (param, frozen), {"axis": axis}, (whole,), layer))
        nodes.append(replace(node, inputs=tuple(stored.get(v.name, v) for v in node.inputs)))
    params = [v for v in stored.values() if isinstance(v, Param)] + [p[0] for p in parts.values()]
    order = {c.name: i for i, c in enumerate(graph.consts)}
    return rewrite(
        graph,
        nodes,
        params=(*graph.params, *sorted(params, key=lambda p: order[p.name])),
        consts=(*(c for c in graph.consts if c.name not in stored), *(p[1] for p in parts.values())),
    )


def _split(const: Const, learned: Learned) -> tuple[Param, Const, int, str]:
    assert learned.channels is not None and learned.axis is not None
    axis = learned.axis
    # A depthwise convolution may have several filters per channel: they lie side by side.
    count = len(learned.channels) * (const.type.shape[axis] // learned.of)
    assert 0 < count < const.type.shape[axis], (const.name, count)
    name = const.name
    trained, frozen = _piece(const, axis, slice(0, count)), _piece(const, axis, slice(count, None))
    return Param(name, *trained), Const(f"{name}.frozen", *frozen), axis, learned.layer


def _piece(const: Const, axis: int, part: slice) -> tuple[TensorType, np.ndarray, Origin | None]:
    where = (slice(None),) * axis + (part,)
    data = np.ascontiguousarray(const.data[where])
    origin = const.origin
    if origin is not None:
        scale = None if origin.scale is None else origin.scale[where]
        origin = replace(origin, index=origin.index[where], scale=scale)
    return const.type.with_shape(data.shape), data, origin
