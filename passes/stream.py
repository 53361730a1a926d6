"""Runs parts of the forward program row by row, so that of what lies between two layers only a few rows exist."""

from collections.abc import Sequence

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
    chains = _cost_chains(costs)
    limit = max(limit, _least_peak(single[:end], chains))
    nodes: list[Node] = []
    at = 0
    for a, b in _fewest(single[:end], chains, limit):
        nodes += [*graph.nodes[at:a], enclose(graph, range(a, b + 1), {"strategy": "rows"})]
        at = b + 1
    return rewrite(graph, [*nodes, *graph.nodes[at:]])


def find_least(graph: Graph, arena: Arena) -> int:
    """The most bytes alive at a node once ``stream_forward`` has done what it can."""
    costs = Costs(graph, arena)
    behind = (costs.node(i) for i in range(costs.forward, len(graph.nodes)))
    return max(*behind, find_least_forward(graph, arena))


def find_least_forward(graph: Graph, arena: Arena) -> int:
    """The lowest peak of the forward program that ``stream_forward`` can reach in this order."""
    costs = Costs(graph, arena)
    return _least_peak([costs.node(i) for i in range(costs.forward)], _cost_chains(costs))


def _cost_chains(costs: Costs) -> dict[tuple[int, int], int]:
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
            if not able[b] or (b > a and not _follows(node, made)):
                break
            made |= {v.name for v in node.outputs}
            result.append((a, b))
    return result


def _follows(node: Node, made: set[str]) -> bool:
    """It reads some of what is made, and none of that whole."""
    windows = find_windows(node) or ()
    read = [own for value, own in zip(node.inputs, windows, strict=True) if value.name in made]
    return bool(read) and all(read)


def _can_stream(node: Node) -> bool:
    by_rows = find_windows(node) is not None and not adds_rows(node)
    return by_rows and node.output.type.shape[1] > 1 and node.output.type.dtype != "bit"


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
