"""Fuses an operator with the elementwise work behind it into one region, so that nothing in between gets a buffer."""

from dataclasses import dataclass, field, replace

from tte.ir import OPS, Builder, Const, Graph, Node, Param, Value, find_anchor, rewrite
from tte.passes.regions import wrap

UPDATES = ("nn.sgd", "qnn.sgd", "qnn.integer_sgd")


def fuse_updates(graph: Graph) -> Graph:
    """Gradient + update: a gradient that is consumed at once never gets a buffer."""
    return _fuse(graph, updates=True)


def fuse_elementwise(graph: Graph) -> Graph:
    """Convolution (or other anchor) + bias + residual add + activation, and chains of elementwise operators."""
    return _fuse(graph, updates=False)


def transpose_first(graph: Graph) -> Graph:
    """``transpose(f(x))`` becomes ``f(transpose(x))``, so that f is done as the elements are stored."""
    builder = Builder()
    makers: dict[str, Node] = {}
    uses = graph.uses()
    kept = {v.name for v in graph.lasting}
    for node in graph.nodes:
        maker = makers.get(node.inputs[0].name) if node.op == "transpose" else None
        if maker is None or len(uses[maker.output.name]) > 1 or maker.output.name in kept:
            builder.append(node)
            makers |= {node.output.name: node} if _turns(node) else {}
            continue
        builder.nodes.remove(maker)
        x = builder.call("transpose", maker.inputs[0], layer=node.layer, **node.attrs)
        turned = replace(maker, inputs=(x, *maker.inputs[1:]), outputs=node.outputs)
        builder.append(turned)
        makers[node.output.name] = turned
    return rewrite(graph, builder.nodes)


def _turns(node: Node) -> bool:
    """Elementwise work on one tensor, and on numbers, whose result is of its shape."""
    if not _is_elementwise(node) or len(node.outputs) > 1 or node.output.type.dtype == "bit":
        return False
    numbers = all(isinstance(v, Const) and v.type.size == 1 for v in node.inputs[1:])
    return numbers and node.inputs[0].type.shape == node.output.type.shape and node.op != "broadcast_to"


# Kernels that can make an operand as they read it: which.
READERS = {"nn.conv2d_transpose": 0, "nn.conv2d_weight_grad": 1, "sum": 0}


def fuse_producers(graph: Graph) -> Graph:
    """What is large but made of little, such as the gradient of an average, is made anew by each of its readers."""
    uses = graph.uses()
    kept = {v.name for v in graph.lasting}
    nodes = list(graph.nodes)
    for i, maker in enumerate(graph.nodes):
        readers = uses.get(maker.output.name, [])
        if maker.output.name in kept or not readers or not _spreads(maker):
            continue
        if all(_makes_as_it_reads(graph.nodes[j], maker.output) for j in readers):
            for j in readers:
                nodes[j] = _merge(maker, nodes[j])
            nodes[i] = replace(maker, outputs=())
    return rewrite(graph, [node for node in nodes if node.outputs])


def _spreads(node: Node) -> bool:
    """Elementwise work on floats whose operands are much smaller than its result."""
    members = node.body.nodes if node.body else (node,)
    if (
        any(OPS[m.op].kind != "elementwise" or m.output.type.dtype != "float32" for m in members)
        or len(node.outputs) > 1
    ):
        return False
    return 4 * sum(v.type.nbytes for v in node.inputs if not isinstance(v, Const)) <= node.output.type.nbytes


def _makes_as_it_reads(node: Node, value: Value) -> bool:
    members = node.body.nodes if node.body else (node,)
    anchor = find_anchor(members)
    if anchor is None or members[anchor].op not in READERS or members[anchor].attrs.get("groups", 1) != 1:
        return False
    outer = node.arguments
    at = [(m, k) for m in members for k, v in enumerate(m.inputs) if outer.get(v.name, v) == value]
    return at == [(members[anchor], READERS[members[anchor].op])]


def _merge(maker: Node, reader: Node) -> Node:
    """One region around both, with what ``maker`` makes inside."""
    return wrap((*inline(maker, "m"), *inline(reader, "r")), reader.outputs, {"strategy": "fused"}, reader.layer)


def inline(node: Node, prefix: str) -> list[Node]:
    """The members of a region, reading what the region reads; the results of the last are those of the region."""
    if node.body is None:
        return [node]
    names = node.arguments | node.results
    for member in node.body.nodes:
        for value in member.outputs:
            names.setdefault(value.name, Value(f"{prefix}~{value.name}", value.type))
    return [
        replace(
            member,
            inputs=tuple(names[v.name] for v in member.inputs),
            outputs=tuple(names[v.name] for v in member.outputs),
        )
        for member in node.body.nodes
    ]


@dataclass
class _Group:
    """Consecutive members; each but the last is read by the next one only."""

    members: list[Node] = field(default_factory=list)

    @property
    def output(self) -> Value:
        return self.members[-1].output


def _fuse(graph: Graph, updates: bool) -> Graph:
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers[value.name] = readers.get(value.name, 0) + 1
    for value in graph.lasting:
        readers[value.name] = readers.get(value.name, 0) + 1
    ending = _names_leading_to_updates(graph)
    split = {} if updates else _split_weights(graph)
    groups: dict[str, _Group] = {}  # by the name of the group's output
    order: list[_Group] = []
    for node in graph.nodes:
        if node.output.name in split:
            continue  # every reader reads the parts
        group = None
        if node.body is None and node.definition.kind == "elementwise" and (node.output.name in ending) == updates:
            group = _extendable(node, groups, readers)
        if group is None:
            group = _Group([split[v.name] for v in node.inputs if v.name in split])
        else:
            order.remove(group)  # a region stands where its last member stood
        group.members.append(node)
        groups[group.output.name] = group
        order.append(group)
    return rewrite(graph, [_region(g) if len(g.members) > 1 else g.members[0] for g in order])


def _names_leading_to_updates(graph: Graph) -> set[str]:
    """Results of elementwise calls from which the way leads only into an update."""
    names: set[str] = set()
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value.name, []).append(node)
    for node in reversed(graph.nodes):
        after = readers.get(node.output.name, [])
        if node.op in UPDATES or (after and all(n.output.name in names for n in after) and _is_elementwise(node)):
            names.add(node.output.name)
    return names


def _split_weights(graph: Graph) -> dict[str, Node]:
    """Weights put together from stored parts, if every reader can read the parts where they are: no buffer needed."""
    candidates = {
        n.output.name: n
        for n in graph.nodes
        if n.op == "concatenate" and all(isinstance(v, Param | Const) for v in n.inputs)
    }
    for node in graph.nodes:
        for i, value in enumerate(node.inputs):
            if (parts := candidates.get(value.name)) and not (i == 1 and _reads_parts(node, parts)):
                del candidates[value.name]
    for value in graph.outputs:
        candidates.pop(value.name, None)
    return candidates


def _reads_parts(node: Node, parts: Node) -> bool:
    """The kernel of ``node`` reads its second operand where its parts lie, which follow one another along an axis."""
    axis, groups = parts.attrs["axis"], node.attrs.get("groups", 1)
    depthwise = groups != 1 and groups == node.inputs[0].type.shape[-1]
    return node.body is None and {
        "nn.conv2d": (axis == 3 and groups == 1) or (axis == 0 and depthwise),
        "nn.conv2d_transpose": groups == 1 or (axis == 0 and depthwise),
        "nn.dense": axis == 1,
        "matmul": axis == 1 and not node.attrs.get("transpose_b"),
    }.get(node.op.removeprefix("q"), False)


def _is_elementwise(node: Node) -> bool:
    return node.body is None and OPS[node.op].kind == "elementwise"


def _extendable(node: Node, groups: dict[str, _Group], readers: dict[str, int]) -> _Group | None:
    """The group that ``node`` may join: it alone reads the group's output, element by element."""
    for value in reversed(node.inputs):
        group = groups.get(value.name)
        if group is None or readers[value.name] != 1 or value.type.shape != node.output.type.shape:
            continue
        if value.type.dtype == "bit" or len(group.members[-1].outputs) > 1:
            continue  # packed bits, and second results, are stored where they are made
        head = next(m for m in group.members if m.op != "concatenate" or m is group.members[-1])
        kind = "opaque" if head.body else head.definition.kind
        if kind in ("anchor", "elementwise") and node.output.type.dtype != "bit":
            return group
    return None


def _region(group: _Group) -> Node:
    """One node around the members; its inputs are what they read from outside."""
    layer = next(m.layer for m in group.members if m.op != "concatenate")
    return wrap(group.members, group.members[-1].outputs, {"strategy": "fused"}, layer)
