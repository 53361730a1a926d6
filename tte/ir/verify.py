"""Re-reads a graph with suspicion; runs after every pass."""

from collections.abc import Mapping

from tte.ir.graph import Const, Graph, Node, Param, Value, find_anchor, remembered
from tte.ir.op import OPS, InvalidType
from tte.ir.tiles import find_start, find_tiles


class InvalidGraph(Exception):
    """A graph that breaks a rule of the language: a bug in whatever wrote it."""


def verify(graph: Graph) -> Graph:
    """Check single assignment, definition before use, types, updates and in-place rules; return the graph.

    Raises InvalidGraph, naming the node.
    """
    if problem := _find_problem(graph):
        raise InvalidGraph(f"@{graph.name}{problem}")
    return graph


@remembered
def _find_problem(graph: Graph) -> str:
    """What is wrong with it, and at which node; "" if nothing is."""
    try:
        _verify(graph)
    except InvalidGraph as problem:
        return str(problem)
    return ""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvalidGraph(f": {what}")


def _verify(graph: Graph) -> None:
    defined: dict[str, Value] = {}
    for value in (*graph.inputs, *graph.params, *graph.consts):
        _require(value.name not in defined, f"{value.name} is defined twice")
        defined[value.name] = value
    weights: list[Param | Const] = [*graph.params, *graph.consts]
    for stored in weights:
        if stored.data.shape != stored.type.shape or stored.data.dtype != stored.type.numpy:
            raise InvalidGraph(f": @{stored.name} is {stored.type}, its data {stored.data.shape} {stored.data.dtype}")
    for i, node in enumerate(graph.nodes):
        at = f"node {i} ({node.op}, layer {node.layer or '-'})"
        for value in node.inputs:
            _require(defined.get(value.name) == value, f"{at} reads %{value.name}, which is not defined before it")
        if node.body:
            _require(node.op == "region", f"{at} has a body")
            own = [v.type for v in node.body.inputs]
            _require(own == [v.type for v in node.inputs], f"{at}: operands do not fit the region's inputs")
            _require(not node.body.params and not node.body.updates, f"{at}: params belong to the outer graph")
            if problem := _find_problem(node.body):
                raise InvalidGraph(f" {at}{problem}")
            types = tuple(v.type for v in node.body.outputs)
            if node.attrs.get("strategy") == "tiles":  # once the body is known to be sound
                fits = find_tiles(node) is not None
                _require(fits, f"{at}: its members cannot run in tiles of {node.attrs.get('width')}")
        else:
            _require(node.op in OPS, f"{at}: no such operator")
            try:
                _require(list(node.attrs) == list(OPS[node.op].attributes), f"{at}: attributes {list(node.attrs)}")
                types = OPS[node.op].infer_types(tuple(v.type for v in node.inputs), node.attrs)
            except InvalidType as problem:
                raise InvalidGraph(f": {at}: {problem}") from problem
        if types != tuple(v.type for v in node.outputs):
            raise InvalidGraph(f": {at}: typed {node.outputs}, inferred {types}")
        for value in node.outputs:
            _require(value.name not in defined, f"{at} defines %{value.name} a second time")
            defined[value.name] = value
    for value in graph.outputs:
        _require(defined.get(value.name) == value, f"returns %{value.name}, which is not defined")
    _verify_updates(graph, defined)
    _verify_inplace(graph)


def _verify_updates(graph: Graph, defined: Mapping[str, Value]) -> None:
    params = {p.name: p for p in graph.params}
    targets = [p.name for p, _ in graph.updates]
    _require(len(targets) == len(set(targets)), "a param is updated twice")
    for param, value in graph.updates:
        _require(params.get(param.name) == param, f"@{param.name} is updated but is not a param")
        _require(defined.get(value.name) == value, f"@{param.name} := %{value.name}, which is not defined")
        if param.type != value.type:
            raise InvalidGraph(f": @{param.name}: {param.type} := {value.type}")


@remembered
def inplace_inputs(node: Node, output: int) -> tuple[int, ...]:
    """The inputs whose buffer an output may take over, by the operators' declared contracts.

    The result of fused operators may take over what only those behind the anchor read, which do so at the same index,
    or what the anchor alone reads if its contract allows it.
    """
    if not node.body:
        return tuple(k for k in OPS[node.op].inplace if k < len(node.inputs)) if output == 0 else ()
    body, target = node.body, node.outputs[output].type
    if node.attrs["strategy"] == "rows":
        return ()  # the first row is written before the last is read
    if node.attrs["strategy"] == "tiles":
        return _inplace_tiles(node, output)
    if output > 0:
        return ()
    allowed = []
    anchor = find_anchor(body.nodes)
    for i, value in enumerate(body.inputs):
        readers = [(n, k) for n in body.nodes for k, v in enumerate(n.inputs) if v.name == value.name]
        behind = () if anchor is None else body.nodes[: anchor + 1]
        safe = not any(n in behind for n, _ in readers)
        alone = len(readers) == 1 and readers[0][1] in OPS[readers[0][0].op].inplace
        if readers and (safe or alone) and value.type.shape == target.shape and value.type.dtype == target.dtype:
            allowed.append(i)
    return tuple(allowed)


def _inplace_tiles(node: Node, output: int) -> tuple[int, ...]:
    """What no other member reads once a tile of the result is made; a sum may take over only what it begins with."""
    tiles = find_tiles(node)
    assert node.body and tiles
    made = node.body.outputs[output]
    at, maker = next((i, n) for i, n in enumerate(node.body.nodes) if made in n.outputs)
    last = node.body.last_use()
    if made.name in tiles.cuts:
        allowed = [maker.inputs[k] for k in inplace_inputs(maker, maker.outputs.index(made))]
        allowed = [v for v in allowed if tiles.cuts.get(v.name) == tiles.cuts[made.name] and last[v.name] == at]
    else:
        start = find_start(maker)
        readers = [n for n in node.body.nodes if start in n.inputs]
        allowed = [start] if start and len(readers) == 1 and start.type == made.type else []
    return tuple(i for i, v in enumerate(node.body.inputs) if v in allowed)


def _verify_inplace(graph: Graph) -> None:
    last = graph.last_use()
    views = {n.output.name: n.inputs[0].name for n in graph.nodes if n.op != "region" and OPS[n.op].kind == "view"}

    def root(name: str) -> str:
        while name in views:
            name = views[name]
        return name

    ends: dict[str, int] = {}
    for name, end in last.items():
        ends[root(name)] = max(end, ends.get(root(name), -1))
    external = {v.name for v in (*graph.inputs, *graph.consts)}
    targets = {v.name: p.name for p, v in graph.updates}
    params = {p.name for p in graph.params}
    for i, node in enumerate(graph.nodes):
        taken = [root(v.name) for v in node.overwrites.values()]
        _require(len(taken) == len(set(taken)), f"node {i} ({node.op}) makes two results in place of one operand")
        for j, k in enumerate(node.inplace):
            if k is None:
                continue
            at = f"node {i} ({node.op}) works in place"
            _require(k in inplace_inputs(node, j), f"{at} on input {k} against its contract")
            owner = root(node.inputs[k].name)
            _require(node.inputs[k].type.nbytes == node.outputs[j].type.nbytes, f"{at} on a buffer of another size")
            _require(owner not in external, f"{at} on %{owner}, which is not ours to write")
            if owner in params:
                _require(targets.get(node.outputs[j].name) == owner, f"{at} on @{owner} without updating it")
            _require(ends[owner] <= i, f"{at} on %{owner}, which is read later")
            sharing = [k for k, v in enumerate(node.inputs) if root(v.name) == owner]
            _require(all(k in inplace_inputs(node, j) for k in sharing), f"{at} and reads %{owner} at another index")
