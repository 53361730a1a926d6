"""Lets a transposed convolution add to what is there, in place of a second tensor and an addition."""

from dataclasses import replace
from typing import Any

import numpy as np

from tte.ir import Builder, Graph, Node, Value, rewrite


def accumulate(graph: Graph) -> Graph:
    """``add(conv2d_transpose(g, w), y)`` becomes ``conv2d_transpose(g, w, y)``: its sums begin with y, often in place.

    That is how gradients meet at a fork. Permutations in between are applied to y, backwards, and to the result; like
    every ``take`` of all elements in another order, they become ``permute``, which works in place.
    """
    builder = Builder()
    uses = graph.uses()
    kept = {v.name for v in graph.lasting}
    makers: dict[str, Node] = {}
    new: dict[str, Value] = {}

    def find_sum(value: Value) -> list[Node] | None:
        """The permutations that lead to ``value``, and before them the convolution, if nobody else reads any of it."""
        node = makers.get(value.name)
        if node is None or len(uses[value.name]) > 1 or value.name in kept:
            return None
        if node.op == "nn.conv2d_transpose" and len(node.inputs) == 2:
            return [node]
        rest = find_sum(node.inputs[0]) if node.op == "permute" else None
        return None if rest is None else [node, *rest]

    for node in graph.nodes:
        node = replace(_permutation(node), inputs=tuple(new.get(v.name, v) for v in node.inputs))
        found = None
        if node.op == "add" and node.inputs[0] != node.inputs[1] and node.inputs[0].type == node.inputs[1].type:
            found = next(((k, way) for k in (1, 0) if (way := find_sum(node.inputs[k]))), None)
        if found is None:
            makers[node.output.name] = node
            builder.append(node)
            continue
        start, (*moves, convolution) = node.inputs[1 - found[0]], found[1]
        builder.nodes = [n for n in builder.nodes if n not in found[1]]
        for move in moves:
            back = tuple(int(i) for i in np.argsort(_tuple(move.attrs["order"])))
            start = builder.call("permute", start, layer=node.layer, axis=move.attrs["axis"], order=back)
        (total,) = builder.append(
            replace(convolution, inputs=(*convolution.inputs, start), outputs=(builder.fresh(node.output.type),))
        )
        for move in reversed(moves):
            total = builder.call("permute", total, layer=node.layer, **move.attrs)
        new[node.output.name] = total
    return rewrite(
        graph,
        builder.nodes,
        outputs=tuple(new.get(v.name, v) for v in graph.outputs),
        updates=tuple((p, new.get(v.name, v)) for p, v in graph.updates),
    )


def _permutation(node: Node) -> Node:
    if node.op != "take":
        return node
    axis, indices = node.attrs["axis"], _tuple(node.attrs["indices"])
    assert isinstance(axis, int)
    if sorted(indices) != list(range(node.inputs[0].type.shape[axis])):
        return node
    return replace(node, op="permute", attrs={"axis": axis, "order": indices})


def _tuple(attr: Any) -> tuple[int, ...]:
    assert isinstance(attr, tuple)
    return attr
