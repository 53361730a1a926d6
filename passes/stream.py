"""Runs parts of the forward program row by row, so that of what lies between two layers only a few rows exist."""

from collections.abc import Sequence
from math import inf

from tte.ir import Graph, Node, rewrite
from tte.ir.rows import adds_rows, find_windows
from tte.passes.costs import ANY, Arena, Costs
from tte.passes.regions import enclose


def stream_forward(graph: Graph, arena: Arena = ANY) -> Graph:
    """Put chains of nodes into regions that run by rows, where that lowers the peak: as few nodes as do it.

    Comes behind ``reorder``: only neighbours are put together. No row is computed twice, so nothing is computed that
    was not before, and every number is what it was.
    """
    costs = Costs(graph, arena)
    end = costs.forward
    single = [costs.node(i) for i in range(len(graph.nodes))]
    limit = max(arena.limit, *single[end:], 0)
    if max(single[:end], default=0) <= limit:
        return graph
    chains = _Chains(costs)
    limit = _least_peak(single[:end], chains, limit)
    nodes: list[Node] = []
    at = 0
    for a, b in _fewest(single[:end], chains, limit):
        nodes += [*graph.nodes[at:a], enclose(graph, range(a, b + 1), {"strategy": "rows"})]
        at = b + 1
    return rewrite(graph, [*nodes, *graph.nodes[at:]])


def find_least(graph: Graph, arena: Arena) -> int:
    """The most bytes alive at a node once ``stream_forward`` has done what it can."""
    costs = Costs(graph, arena)
    single = [costs.node(i) for i in range(len(graph.nodes))]
    return _least_peak(single[: costs.forward], _Chains(costs), max(single[costs.forward :], default=0))


class _Chains:
    """Runs of neighbours that can go by rows and of which each reads one before it. What they cost is found out when
    it is asked.

    starts  of each node the first nodes of those that end with it; a node alone is one as well: by rows, it may write
            its result over an operand
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        nodes = costs.graph.nodes[: costs.forward]
        able = [_can_stream(node) for node in nodes]
        self.starts: list[list[int]] = [[] for _ in nodes]
        self.known: dict[tuple[int, int], float] = {}
        for a in range(len(nodes)):
            made: set[str] = set()
            for b, node in enumerate(nodes[a:], a):
                if not able[b] or (b > a and not _follows(node, made)):
                    break
                made |= {v.name for v in node.outputs}
                self.starts[b].append(a)

    def cost(self, a: int, b: int) -> float:
        """Bytes alive while nodes a to b run by rows; infinite where they cannot."""
        if (a, b) not in self.known:
            cost = self.costs.chain(a, b)
            self.known[a, b] = inf if cost is None else cost
        return self.known[a, b]


def _follows(node: Node, made: set[str]) -> bool:
    """It reads some of what is made, and none of that whole."""
    windows = find_windows(node) or ()
    read = [own for value, own in zip(node.inputs, windows, strict=True) if value.name in made]
    return bool(read) and all(read)


def _can_stream(node: Node) -> bool:
    by_rows = find_windows(node) is not None and not adds_rows(node)
    return by_rows and node.output.type.shape[1] > 1 and node.output.type.dtype != "bit"


def _least_peak(single: Sequence[int], chains: _Chains, floor: int) -> int:
    """The smallest maximum over the steps of any division of the line into nodes and chains; ``floor`` where that is
    less."""
    best = [floor]
    for b, cost in enumerate(single):
        least: float = max(best[b], cost)
        bounds = sorted((max(best[a], chains.costs.chain_bound(a, b)), a) for a in chains.starts[b] if least > floor)
        for bound, a in bounds:
            if bound >= least:
                break
            least = min(least, max(best[a], chains.cost(a, b)))
        best.append(int(least))
    return best[-1]


def _fewest(single: Sequence[int], chains: _Chains, limit: int) -> list[tuple[int, int]]:
    """The chains of a division whose steps all stay within ``limit``, with the fewest nodes in chains."""
    best: list[tuple[int, int, tuple[tuple[int, int], ...]] | None] = [(0, 0, ())]
    for b, cost in enumerate(single):
        before = best[b]
        ways = [(before, -1)] if before is not None and cost <= limit else []
        for a in chains.starts[b]:
            if (start := best[a]) is not None and chains.costs.chain_bound(a, b) <= limit:
                ways.append(((start[0] + b - a + 1, start[1] + 1, (*start[2], (a, b))), a))
        best.append(next((way for way, a in sorted(ways) if a < 0 or chains.cost(a, b) <= limit), None))
    found = best[-1]
    assert found is not None, "a limit that some division has"
    return list(found[2])
