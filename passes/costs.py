"""What passes that save memory have to know: how many bytes are alive at a node, and how many may be."""

from dataclasses import dataclass, replace

from tte.ir import Graph, Value
from tte.ir.rows import align, find_stream, row_bytes, saved_bytes, stream_rows
from tte.ir.tiles import scratch_bytes
from tte.passes.inplace import find_owners, is_view, place_results


@dataclass(frozen=True)
class Arena:
    """limit: bytes that it may have, or has anyway for another program; holds_input: the input lies in it, too, and may
    be written over; may_recompute: results of the forward may be computed a second time to stay within the limit."""

    limit: int = 0
    holds_input: bool = False
    may_recompute: bool = False


ANY = Arena()


class Costs:
    """Bytes alive at a node, or while a chain of nodes runs by rows. forward: how many nodes make the first output."""

    def __init__(self, graph: Graph, arena: Arena) -> None:
        self.graph = graph
        owners = replace(graph, nodes=tuple(place_results(graph))).owners()
        held = graph.inputs[:1] if arena.holds_input else ()
        stored = {v.name for v in (*graph.inputs[len(held) :], *graph.params, *graph.consts)}
        self.last = graph.last_use()
        births = {v.name: -1 for v in held}
        births |= {v.name: i for i, node in enumerate(graph.nodes) for v in node.outputs}
        deaths: dict[str, int] = {}
        for name, end in self.last.items():
            deaths[owners[name]] = max(end, deaths.get(owners[name], -1))
        values = {v.name: v for v in graph.values()}
        self.buffers = [
            (births[name], deaths.get(name, births[name]), align(values[name].type.nbytes))
            for name in dict.fromkeys(owners.values())
            if name not in stored
        ]
        self.viewed = {node.inputs[0].name for node in graph.nodes if is_view(node)}
        self.roots = find_owners(graph)
        self.ends: dict[str, int] = {}  # of what may be written over by what lies below it, views included
        for name, root in self.roots.items():
            if root in births:
                self.ends[root] = max(self.last.get(name, -1), self.ends.get(root, -1))
        needed = {v.name for v in graph.outputs}
        forward = 0
        for i in reversed(range(len(graph.nodes))):
            if any(v.name in needed for v in graph.nodes[i].outputs):
                needed |= {v.name for v in graph.nodes[i].inputs}
                forward = max(forward, i + 1)
        self.forward = forward

    def node(self, i: int) -> int:
        alive = sum(size for birth, death, size in self.buffers if birth <= i <= death)
        node = self.graph.nodes[i]
        stream = find_stream(node)
        outer = node.arguments
        shifts = stream.shifts if stream else {}
        saved = max((self.saved(outer[name], node.output, i, shift) for name, shift in shifts.items()), default=0)
        return alive + align(scratch_bytes(node)) - saved

    def kept(self, a: int, b: int) -> list[Value]:
        """What nodes a to b make that is read behind them."""
        made = [v for node in self.graph.nodes[a : b + 1] for v in node.outputs]
        return [v for v in made if self.last.get(v.name, -1) > b or v.name in self.viewed]

    def chain_bound(self, a: int, b: int) -> int:
        """No more than ``chain``: a row of each tensor between the nodes, the result over an operand."""
        kept = self.kept(a, b)
        names = {v.name for v in kept}
        made = [v for node in self.graph.nodes[a : b + 1] for v in node.outputs if v.name not in names]
        result = align(self.graph.nodes[b].output.type.nbytes)
        return self.around(a) + sum(align(v.type.nbytes) for v in kept) + sum(map(row_bytes, made)) - result

    def around(self, a: int) -> int:
        """Bytes alive before node a that are so at it."""
        return sum(size for birth, death, size in self.buffers if birth < a <= death)

    def chain(self, a: int, b: int) -> int | None:
        """Bytes alive while nodes a to b run by rows; None if they cannot."""
        kept = self.kept(a, b)
        names = frozenset(v.name for v in kept)
        nodes = self.graph.nodes[a : b + 1]
        if any(v.type.dtype == "bit" and v.name not in names for node in nodes for v in node.outputs):
            return None  # rows of bits share bytes
        stream = stream_rows(nodes, names)
        whole = self.around(a) + sum(align(v.type.nbytes) for v in kept) + stream.nbytes
        operands = {v.name: v for node in nodes for v in node.inputs}
        shifts = stream.shifts.items()
        saved = (self.saved(operands[name], nodes[-1].output, b, shift) for name, shift in shifts)
        return whole - max(saved, default=0)

    def saved(self, operand: Value, result: Value, b: int, shift: int) -> int:
        """Bytes by which it helps to write the result of a chain, which ends at node b, over an operand."""
        if self.ends.get(self.roots[operand.name], b + 1) > b:
            return 0
        return saved_bytes(align(operand.type.nbytes), align(result.type.nbytes), shift)
