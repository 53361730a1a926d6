"""Runs parts of the forward program row by row, so that of what lies between two layers only a few rows exist."""

from collections.abc import Sequence

from tte.ir import Graph, Node, Value, rewrite
from tte.ir.rows import Stream, align, find_windows, joint_bytes, stream_rows
from tte.ir.tiles import scratch_bytes
from tte.passes.inplace import find_owners, is_view, work_in_place
from tte.passes.regions import enclose


def stream_forward(graph: Graph, floor: int = 0, hold_input: bool = False) -> Graph:
    """Put chains of nodes into regions that run by rows, where that lowers the peak: as few nodes as do it.

    Comes behind ``reorder``: only neighbours are put together. No row is computed twice, so nothing is computed that
    was not before, and every number is what it was. floor: bytes that another program needs anyway; hold_input: the
    arena has a place for the input, up to its last use.
    """
    costs = Costs(graph, hold_input)
    end = costs.forward
    single = [costs.node(i) for i in range(len(graph.nodes))]
    limit = max(floor, *single[end:], 0)
    if max(single[:end], default=0) <= limit:
        return graph
    chains = _cost_chains(costs)
    limit = max(limit, _least_peak(single[:end], chains))
    nodes: list[Node] = []
    at = 0
    for a, b in _fewest(single[:end], chains, limit):
        nodes += [*graph.nodes[at:a], enclose(graph, range(a, b + 1), {"strategy": "rows"})]
        at = b + 1
    return rewrite(graph, [*nodes, *graph.nodes[at:]])


def find_least_forward(graph: Graph, hold_input: bool = False) -> int:
    """The lowest peak of the forward program that ``stream_forward`` can reach in this order."""
    costs = Costs(graph, hold_input)
    return _least_peak([costs.node(i) for i in range(costs.forward)], _cost_chains(costs))


def _cost_chains(costs: "Costs") -> dict[tuple[int, int], int]:
    """First and last node -> bytes alive while they run by rows."""
    chains = _chains(costs.graph, costs.forward)
    return {(a, b): cost for a, b in chains if (cost := costs.chain(a, b)) is not None}


def _chains(graph: Graph, end: int) -> list[tuple[int, int]]:
    """First and last node of all runs of neighbours that can go by rows and of which each reads one before it.

    One node is a run as well: by rows, it may write its result over an operand.
    """
    able = [_can_stream(node) for node in graph.nodes[:end]]
    result = []
    for a in range(end):
        made: set[str] = set()
        for b in range(a, end):
            node = graph.nodes[b]
            if not able[b] or (b > a and not made & {v.name for v in node.inputs}):
                break
            made |= {v.name for v in node.outputs}
            result.append((a, b))
    return result


def _can_stream(node: Node) -> bool:
    windows = find_windows(node)
    return windows is not None and any(windows) and node.output.type.shape[1] > 1 and node.output.type.dtype != "bit"


class Costs:
    """Bytes alive at a node, or while a chain of nodes runs by rows. forward: how many nodes make the first output."""

    def __init__(self, graph: Graph, hold_input: bool = False) -> None:
        self.graph = graph
        placed = work_in_place(graph)
        owners = placed.owners()
        held = graph.inputs[:1] if hold_input else ()
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
        self.ends: dict[str, int] = {}  # of what is ours to write, views included
        for name, root in self.roots.items():
            if root not in stored:
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
        return alive + align(scratch_bytes(self.graph.nodes[i]))

    def kept(self, a: int, b: int) -> list[Value]:
        """What nodes a to b make that is read behind them."""
        made = [v for node in self.graph.nodes[a : b + 1] for v in node.outputs]
        return [v for v in made if self.last.get(v.name, -1) > b or v.name in self.viewed]

    def chain(self, a: int, b: int) -> int | None:
        kept = self.kept(a, b)
        names = frozenset(v.name for v in kept)
        nodes = self.graph.nodes[a : b + 1]
        if any(v.type.dtype == "bit" and v.name not in names for node in nodes for v in node.outputs):
            return None  # rows of bits share bytes
        around = sum(size for birth, death, size in self.buffers if birth < a <= death)
        stream = stream_rows(nodes, names)
        whole = around + sum(align(v.type.nbytes) for v in kept) + stream.nbytes
        return whole - max(
            (self.saved(v, nodes[-1].output, b, stream) for node in nodes for v in node.inputs), default=0
        )

    def saved(self, operand: Value, result: Value, b: int, stream: Stream) -> int:
        """Bytes by which it helps to write the result of a chain, which ends at node b, over an operand."""
        if operand.name not in stream.shifts or self.ends.get(self.roots[operand.name], b + 1) > b:
            return 0
        dying, born = align(operand.type.nbytes), align(result.type.nbytes)
        return dying + born - joint_bytes(dying, born, stream.shifts[operand.name])


def _least_peak(single: Sequence[int], chains: dict[tuple[int, int], int]) -> int:
    """The smallest maximum over the steps of any division of the line into nodes and chains."""
    best = [0]
    for b, cost in enumerate(single):
        ways = [max(best[b], cost)]
        ways += [max(best[a], chain) for (a, last), chain in chains.items() if last == b]
        best.append(min(ways))
    return best[-1]


def _fewest(single: Sequence[int], chains: dict[tuple[int, int], int], limit: int) -> list[tuple[int, int]]:
    """The chains of a division whose steps all stay within ``limit``, with the fewest nodes in chains."""
    best: list[tuple[int, int, tuple[tuple[int, int], ...]] | None] = [(0, 0, ())]
    for b, cost in enumerate(single):
        before = best[b]
        ways = [before] if before is not None and cost <= limit else []
        for (a, last), chain in chains.items():
            if last == b and chain <= limit and (start := best[a]) is not None:
                ways.append((start[0] + b - a + 1, start[1] + 1, (*start[2], (a, b))))
        best.append(min(ways, default=None))
    found = best[-1]
    assert found is not None, "a limit that some division has"
    return list(found[2])
