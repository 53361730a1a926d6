"""Lets results take over the buffers of operands that die, wherever the operator's declared contract allows it."""

from dataclasses import replace

from tte.ir import OPS, Graph, Node, inplace_inputs, rewrite
from tte.ir.graph import remembered


def work_in_place(graph: Graph) -> Graph:
    """Set ``Node.inplace`` on every node that may overwrite operands which nobody reads afterwards.

    Graph inputs and constants are not ours to write; a param is overwritten only by the value that updates it.
    """
    return rewrite(graph, place_results(graph))


def place_results(graph: Graph) -> list[Node]:
    """The nodes, with what they overwrite."""
    owners = find_owners(graph)
    last: dict[str, int] = {}
    for name, i in graph.last_use().items():
        last[owners[name]] = max(i, last.get(owners[name], -1))
    nodes = []
    for i, node in enumerate(graph.nodes):
        taken: list[int | None] = []
        used: set[str] = set()
        for output in range(len(node.outputs)):
            names = {k: owners[node.inputs[k].name] for k in find_candidates(graph, node, owners, output)}
            taken.append(next((k for k, name in names.items() if last[name] <= i and name not in used), None))
            used |= {names[k] for k in taken[-1:] if k is not None}
        while taken and taken[-1] is None:
            taken.pop()
        nodes.append(node if node.inplace else replace(node, inplace=tuple(taken)))
    return nodes


def find_owners(graph: Graph) -> dict[str, str]:
    """Name of a value -> name of the value of which it is a view, or its own."""
    owners = {v.name: v.name for v in graph.values()}
    for node in graph.nodes:
        if is_view(node):
            owners[node.output.name] = owners[node.inputs[0].name]
    return owners


def is_view(node: Node) -> bool:
    return node.body is None and OPS[node.op].kind == "view"


@remembered
def _find_kinds(graph: Graph) -> tuple[frozenset[str], frozenset[str], dict[str, str]]:
    """Params, what is not ours to write, and what updates a param -> that."""
    foreign = frozenset(v.name for v in (*graph.inputs, *graph.consts))
    return frozenset(p.name for p in graph.params), foreign, {v.name: p.name for p, v in graph.updates}


def find_candidates(graph: Graph, node: Node, owners: dict[str, str], output: int = 0) -> list[int]:
    """The inputs that an output of ``node`` may overwrite once nobody else needs them, params first."""
    allowed = inplace_inputs(node, output)
    made = node.outputs[output]
    stored, foreign, targets = _find_kinds(graph)
    candidates = []
    for k in allowed:
        owner = owners[node.inputs[k].name]
        sharing = [j for j, v in enumerate(node.inputs) if owners[v.name] == owner]
        if node.inputs[k].type.nbytes != made.type.nbytes or any(j not in allowed for j in sharing):
            continue
        if owner in foreign or (owner in stored and targets.get(made.name) != owner):
            continue
        candidates.append(k)
    return sorted(candidates, key=lambda k: owners[node.inputs[k].name] not in stored)
