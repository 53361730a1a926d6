"""Runs parts of the backward program in tiles of channels: of what lies between two layers only a tile exists."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from tte.ir import Graph, Node, Value, rewrite
from tte.ir.tiles import Cut, cut_body, find_cuts
from tte.passes.regions import enclose
from tte.passes.reorder import reorder
from tte.passes.stream import Costs, find_least_forward


def tile_backward(graph: Graph, limit: int = 0) -> Graph:
    """Put nodes behind the loss into regions that run by tiles, where that lowers the peak: as few as will do it, in
    tiles as wide as will do.

    Every number is summed in the same order as before, so it keeps its bits, as long as kernels of convolutions that
    are summed over are 1 x 1. limit: bytes that are needed anyway, or allowed.
    """
    if not graph.updates:
        return graph
    forward = Costs(graph).forward
    groups = [g for g in find_groups(graph) if g.nodes[0] >= forward]
    if not groups:
        return graph
    widths = {g: g.widths[0] for g in groups}
    limit = max(limit, _backward_peak(graph, widths), find_least_forward(_contracted(graph, widths)))
    for group in sorted(groups, key=lambda g: g.saved):
        without = {g: w for g, w in widths.items() if g != group}
        if _backward_peak(graph, without) <= limit:
            widths = without
    for group in widths:
        good = bisect_left(group.widths, True, key=lambda w: _backward_peak(graph, widths | {group: w}) > limit)  # noqa: B023
        widths[group] = group.widths[good - 1]
    return contract(graph, widths) or graph


def _contracted(graph: Graph, widths: Mapping["Group", int]) -> Graph:
    result = contract(graph, widths)
    assert result is not None, "groups that find_groups has tried together"
    return reorder(result)


def _backward_peak(graph: Graph, widths: Mapping["Group", int]) -> int:
    ordered = _contracted(graph, widths)
    costs = Costs(ordered)
    return max(costs.node(i) for i in range(costs.forward, len(ordered.nodes)))


@dataclass(frozen=True)
class Group:
    """Nodes (by number) that can run by tiles together.

    inside: values that then need no buffer of their own; widths: of a tile, all that are possible, ascending
    """

    nodes: tuple[int, ...]
    inside: tuple[Value, ...]
    widths: tuple[int, ...] = ()

    @property
    def saved(self) -> int:
        return max(v.type.nbytes for v in self.inside)


def find_groups(graph: Graph) -> list[Group]:
    """Groups that do not meet, those with the largest values inside first."""
    search = _Search(graph)
    found = [group for i in range(len(graph.nodes)) if (group := search.start_at(i))]
    chosen: list[Group] = []
    for group in sorted(found, key=lambda g: -g.saved):
        if not any(set(group.nodes) & set(other.nodes) for other in chosen):
            chosen.append(group)
            if contract(graph, dict.fromkeys(chosen, 1)) is None:
                chosen.pop()
    return chosen


class _Search:
    """What can be cut along its last axis together with whom."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.readers = graph.uses()
        self.needed = {v.name for v in (*graph.outputs, *(v for _, v in graph.updates))}

    def start_at(self, i: int) -> Group | None:
        """The group of which node ``i`` makes the first value."""
        node, value = self.graph.nodes[i], self.graph.nodes[i].output
        if not self.may_stay(value) or find_cuts(node, {value.name: _last(value)}) is None:
            return None
        grown = self.grow(value)
        if grown is None:
            return None
        members = sorted({i, *grown[0]})
        region = enclose(self.graph, members, {})
        assert region.body
        size = value.type.shape[-1]
        widths = tuple(w for w in range(1, size) if size % w == 0 and cut_body(region.body, w))
        return Group(tuple(members), tuple(grown[1].values()), widths) if widths else None

    def grow(self, value: Value) -> tuple[set[int], dict[str, Value]] | None:
        """Who reads ``value``, and what stays inside with it; None if someone needs more of it than a tile."""
        nodes, inside = set[int](), {value.name: value}
        for i in self.readers[value.name]:
            cuts = find_cuts(self.graph.nodes[i], {value.name: _last(value)})
            if cuts is None:
                return None
            nodes.add(i)
            for made in self.graph.nodes[i].outputs:
                if self.may_stay(made) and cuts.get(made.name) == _last(made) and (more := self.grow(made)):
                    nodes |= more[0]
                    inside |= more[1]
        return nodes, inside

    def may_stay(self, value: Value) -> bool:
        return value.type.rank == 4 and value.name in self.readers and value.name not in self.needed


def _last(value: Value) -> Cut:
    return Cut(value.type.rank - 1)


def contract(graph: Graph, groups: Mapping[Group, int]) -> Graph | None:
    """The graph with each group as a region in tiles of the given width; None if a group would wait for itself."""
    region_of = {
        i: enclose(graph, g.nodes, {"strategy": "tiles", "width": w}) for g, w in groups.items() for i in g.nodes[:1]
    }
    member_of = {i: g.nodes[0] for g in groups for i in g.nodes}
    waiting = [(i, region_of.get(i, node)) for i, node in enumerate(graph.nodes) if member_of.get(i, i) == i]
    made = {v.name for v in (*graph.inputs, *graph.params, *graph.consts)}
    nodes: list[Node] = []
    while waiting:
        ready = [(i, node) for i, node in waiting if all(v.name in made for v in node.inputs)]
        if not ready:
            return None
        for _, node in ready[:1]:
            nodes.append(node)
            made |= {v.name for v in node.outputs}
        waiting.remove(ready[0])
    return rewrite(graph, nodes)
