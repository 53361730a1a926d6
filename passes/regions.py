"""Puts nodes of the line into one region."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from tte.ir import Graph, Node, Value
from tte.ir.op import Attrs


def attrs_of(strategy: str, again: Collection[int]) -> Attrs:
    """Of a region that computes so many nodes of the forward a second time."""
    attrs: Attrs = {"strategy": strategy}
    return attrs | {"again": len(again)} if again else attrs


def enclose(graph: Graph, members: Sequence[int], attrs: Attrs, again: Sequence[int] = ()) -> Node:
    """A region around the nodes of these numbers; its results are what others read, replacements of params last.

    again: nodes that it computes a second time, just for itself
    """
    nodes = [graph.nodes[i] for i in members]
    updates = {v.name for _, v in graph.updates}
    needed = {v.name for v in graph.lasting}
    needed |= {v.name for i, node in enumerate(graph.nodes) if i not in members for v in node.inputs}
    kept = [v for node in reversed(nodes) for v in node.outputs if v.name in needed]
    repeated = [graph.nodes[i] for i in again]
    return wrap([*repeated, *nodes], sorted(kept, key=lambda v: v.name in updates), attrs, nodes[-1].layer)


def wrap(nodes: Sequence[Node], results: Sequence[Value], attrs: Attrs, layer: str) -> Node:
    """A region of these nodes; its operands are what they read from outside, in the order of reading."""
    made = {v.name for node in nodes for v in node.outputs}
    outside = {v.name: v for node in nodes for v in node.inputs if v.name not in made}
    arguments = {name: Value(f"a{i}", v.type) for i, (name, v) in enumerate(outside.items())}
    inner = tuple(replace(m, inputs=tuple(arguments.get(v.name, v) for v in m.inputs)) for m in nodes)
    body = Graph("region", tuple(arguments.values()), nodes=inner, outputs=tuple(results)).renumbered()
    return Node("region", tuple(outside.values()), attrs, tuple(results), layer, body=body)
