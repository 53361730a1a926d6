"""Puts nodes of the line into one region."""

from collections.abc import Sequence
from dataclasses import replace

from tte.ir import Graph, Node, Value
from tte.ir.op import Attrs


def enclose(graph: Graph, members: Sequence[int], attrs: Attrs) -> Node:
    """A region around the nodes of these numbers; its results are what others read, replacements of params last."""
    nodes = [graph.nodes[i] for i in members]
    updates = {v.name for _, v in graph.updates}
    needed = {v.name for v in graph.outputs} | updates
    needed |= {v.name for i, node in enumerate(graph.nodes) if i not in members for v in node.inputs}
    made = {v.name for node in nodes for v in node.outputs}
    outside: dict[str, Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value.name not in made:
                outside.setdefault(value.name, value)
    arguments = {name: Value(f"a{i}", v.type) for i, (name, v) in enumerate(outside.items())}
    inner = tuple(replace(m, inputs=tuple(arguments.get(v.name, v) for v in m.inputs)) for m in nodes)
    kept = [v for node in reversed(nodes) for v in node.outputs if v.name in needed]
    kept.sort(key=lambda v: v.name in updates)
    body = Graph("region", tuple(arguments.values()), nodes=inner, outputs=tuple(kept)).renumbered()
    return Node("region", tuple(outside.values()), attrs, tuple(kept), nodes[-1].layer, body=body)
