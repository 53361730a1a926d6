"""Makes a graph smaller without changing what it computes: constant folding, common subexpressions, dead code, and
conversions of the input that change nothing."""

from dataclasses import replace

import numpy as np

from tte.ir import OPS, Builder, Const, Graph, Node, Origin, Value, rewrite

MOVES = ("reshape", "transpose", "slice", "take")  # operators that only move elements: origins move along


def fold_constants(graph: Graph, shared: bool = False) -> Graph:
    """Compute what depends on constants only.

    Of a user's tensor that has several readers nothing is computed unless ``shared``: if it is to learn, all of them
    must see it learn.
    """
    builder = Builder()
    folded: dict[str, Value] = {}
    nodes = []
    for node in graph.nodes:
        inputs = tuple(folded.get(v.name, v) for v in node.inputs)
        node = replace(node, inputs=inputs)
        if node.body or len(node.outputs) != 1 or not inputs or not all(isinstance(v, Const) for v in inputs):
            nodes.append(node)
            continue
        constants = [v for v in inputs if isinstance(v, Const)]
        if not shared and any(c.origin and not _single_use(graph, c) for c in constants):
            nodes.append(node)
            continue
        data = np.asarray(OPS[node.op].ref(*(c.data for c in constants), **node.attrs), order="C")
        origin = _moved(constants[0].origin, node) if node.op in MOVES else None
        # A moved weight keeps the user's name as long as nobody reads the unmoved one.
        name = constants[0].name if origin and _single_use(graph, constants[0]) else None
        folded[node.output.name] = builder.const(data, name, origin)
    outputs = tuple(folded.get(v.name, v) for v in graph.outputs)
    replaced = {c.name for c in builder.consts.values()}
    kept = tuple(c for c in graph.consts if c.name not in replaced)
    return rewrite(graph, nodes, consts=(*kept, *builder.consts.values()), outputs=outputs)


def _moved(origin: Origin | None, node: Node) -> Origin | None:
    if origin is None:
        return None
    ref = OPS[node.op].ref
    scale = None if origin.scale is None else ref(origin.scale, **node.attrs)
    return replace(origin, index=ref(origin.index, **node.attrs), scale=scale)


def _single_use(graph: Graph, const: Const) -> bool:
    return sum(v.name == const.name for node in graph.nodes for v in node.inputs) == 1


def eliminate_common_subexpressions(graph: Graph) -> Graph:
    """Compute equal calls once. Calls that update a param in place are left alone."""
    seen: dict[object, tuple[Value, ...]] = {}
    same: dict[str, Value] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(same.get(v.name, v) for v in node.inputs))
        key = (node.op, tuple(v.name for v in node.inputs), repr(node.attrs))
        if node.body is None and not node.inplace and key in seen:
            same |= {old.name: new for old, new in zip(node.outputs, seen[key], strict=True)}
            continue
        seen[key] = node.outputs
        nodes.append(node)
    return rewrite(
        graph,
        nodes,
        outputs=tuple(same.get(v.name, v) for v in graph.outputs),
        updates=tuple((p, same.get(v.name, v)) for p, v in graph.updates),
    )


def eliminate_dead_code(graph: Graph) -> Graph:
    """Drop every call whose result reaches neither an output nor an update."""
    live = {v.name for v in graph.lasting}
    nodes = []
    for node in reversed(graph.nodes):
        if any(v.name in live for v in node.outputs):
            nodes.append(node)
            live |= {v.name for v in node.inputs}
    return rewrite(graph, reversed(nodes))


def drop_identity(graph: Graph) -> Graph:
    """Read an int8 input as it is where its numbers are the model's integers already.

    Elementwise operators whose other operands are scalars are a function of 256 values. It is evaluated on all.
    """
    given = value = graph.inputs[0]
    table = every = np.arange(-128, 128).astype(np.int8)
    chain: set[str] = set()
    while value is given or value.type.dtype != "int8":
        readers = [node for node in graph.nodes if value in node.inputs]
        if (
            given.type.dtype != "int8"
            or len(readers) != 1
            or value in graph.outputs
            or not _is_scalar(readers[0], value)
        ):
            return graph
        (node,) = readers
        operands = [v.data.reshape(()) if isinstance(v, Const) else table for v in node.inputs]
        with np.errstate(all="ignore"):
            table, value = OPS[node.op].ref(*operands, **node.attrs), node.output
        chain.add(value.name)
    if value in graph.outputs or not np.array_equal(table, every):
        return graph
    x = Value(given.name, value.type)
    nodes = [
        replace(node, inputs=tuple(x if v == value else v for v in node.inputs))
        for node in graph.nodes
        if node.output.name not in chain
    ]
    return rewrite(graph, nodes, inputs=(x, *graph.inputs[1:]))


def _is_scalar(node: Node, value: Value) -> bool:
    """Each element of the one result is a function of the same element of ``value``, and everywhere the same one."""
    others = [v for v in node.inputs if v != value]
    alone = len(node.outputs) == 1 and node.inputs.count(value) == 1
    return (
        alone
        and node.body is None
        and node.definition.kind == "elementwise"
        and all(isinstance(v, Const) and v.type.size == 1 for v in others)
    )
