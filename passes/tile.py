"""Runs parts of the backward program in tiles of channels: of what lies between two layers only a tile exists."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tte.ir import Graph, Node, Value, rewrite
from tte.ir.tiles import Cut, find_cuts, find_widths, scratch_bytes
from tte.passes.regions import enclose
from tte.passes.reorder import reorder
from tte.passes.stream import Costs, find_least_forward


def tile_backward(graph: Graph, limit: int = 0, hold_input: bool = False) -> Graph:
    """Put nodes behind the loss into regions that run by tiles, where that lowers the peak: as few as will do it, in
    tiles as wide as will do.

    Every number is summed in the same order as before, so it keeps its bits, as long as kernels of convolutions that
    are summed over are 1 x 1. limit: bytes that are needed anyway, or allowed; hold_input: see ``stream_forward``.
    """
    if not graph.updates:
        return graph
    forward = Costs(graph).forward
    groups = find_groups(graph, forward)
    if not groups:
        return graph
    forward_peak = find_least_forward(_contracted(graph, groups), hold_input)
    limit = max(limit, _backward_peak(graph, groups, hold_input), forward_peak)
    for group in sorted(groups, key=lambda g: g.saved):
        without = [g for g in groups if g != group]
        if _backward_peak(graph, without, hold_input) <= limit:
            groups = without
    ordered = _contracted(graph, groups)
    costs = Costs(ordered, hold_input)
    return rewrite(ordered, [_widen(node, limit - costs.node(i)) for i, node in enumerate(ordered.nodes)])


def _widen(node: Node, room: int) -> Node:
    """The node with the tiles that kernels like best, among those that need no more than ``room`` additional bytes.

    Kernels work on 8, or 4, or 2 channels at a time; beyond 16 wider tiles gain nothing.
    """
    if node.body is None or node.attrs["strategy"] != "tiles":
        return node
    widths = {w: replace(node, attrs=node.attrs | {"width": w}) for w in find_widths(node.body)}
    widths = {w: n for w, n in widths.items() if scratch_bytes(n) - scratch_bytes(node) <= room}
    return widths[max(widths, key=lambda w: (min(w & -w, 8), min(w, 16), -w))]


def _contracted(graph: Graph, groups: Sequence["Group"]) -> Graph:
    result = contract(graph, groups)
    assert result is not None, "groups that find_groups has tried together"
    return reorder(result)


def _backward_peak(graph: Graph, groups: Sequence["Group"], hold_input: bool) -> int:
    ordered = _contracted(graph, groups)
    costs = Costs(ordered, hold_input)
    return max(costs.node(i) for i in range(costs.forward, len(ordered.nodes)))


@dataclass(frozen=True)
class Group:
    """Nodes (by number) that can run by tiles together; inside: values that then need no buffer of their own."""

    nodes: tuple[int, ...]
    inside: tuple[Value, ...]

    @property
    def saved(self) -> int:
        return max(v.type.nbytes for v in self.inside)


def find_groups(graph: Graph, first: int) -> list[Group]:
    """Groups of nodes from number ``first`` on that do not meet, those with the largest values inside before others."""
    search = _Search(graph, first)
    found = [group for i in range(first, len(graph.nodes)) if (group := search.start_at(i))]
    chosen: list[Group] = []
    for group in sorted(dict.fromkeys(found), key=lambda g: -g.saved):
        if not any(set(group.nodes) & set(other.nodes) for other in chosen):
            chosen.append(group)
            if contract(graph, chosen) is None:
                chosen.pop()
    return chosen


class _Search:
    """What can be cut along its last axis together with whom."""

    def __init__(self, graph: Graph, first: int) -> None:
        self.graph = graph
        self.readers = graph.uses()
        self.maker = {v.name: i for i, node in enumerate(graph.nodes) if i >= first for v in node.outputs}
        self.needed = {v.name for v in (*graph.outputs, *(v for _, v in graph.updates))}

    def start_at(self, i: int) -> Group | None:
        """The group in which what node ``i`` makes stays inside, and all that can be cut with it."""
        inside: dict[str, Value] = {}
        nodes: set[int] = set()
        queue = [self.graph.nodes[i].output]
        while queue:
            value = queue.pop()
            users = self.find_users(value) if value.name not in inside else None
            if users is None:
                continue
            inside[value.name] = value
            nodes |= set(users)
            for j, cuts in users.items():
                own = (*self.graph.nodes[j].inputs, *self.graph.nodes[j].outputs)
                queue += [v for v in own if v != value and cuts.get(v.name) == _last(v)]
        if not nodes:
            return None
        members = tuple(sorted(nodes))
        body = enclose(self.graph, members, {}).body
        assert body
        return Group(members, tuple(inside.values())) if find_widths(body) else None

    def find_users(self, value: Value) -> dict[int, dict[str, Cut]] | None:
        """The nodes that make and read ``value``, and how they are cut; None if one needs more than a tile."""
        if value.type.rank != 4 or value.name not in self.maker or value.name in self.needed:
            return None
        users = {}
        for j in (self.maker[value.name], *self.readers.get(value.name, ())):
            cuts = find_cuts(self.graph.nodes[j], {value.name: _last(value)})
            if cuts is None:
                return None
            users[j] = cuts
        return users


def _last(value: Value) -> Cut:
    return Cut(value.type.rank - 1)


def contract(graph: Graph, groups: Sequence[Group]) -> Graph | None:
    """The graph with each group as a region in the narrowest tiles; None if one would wait for itself."""
    region_of = {}
    for group in groups:
        region = enclose(graph, group.nodes, {"strategy": "tiles", "width": 1})
        assert region.body
        region_of[group.nodes[0]] = replace(region, attrs=region.attrs | {"width": find_widths(region.body)[0]})
    inside = {i for group in groups for i in group.nodes[1:]}
    waiting = [region_of.get(i, node) for i, node in enumerate(graph.nodes) if i not in inside]
    made = {v.name for v in (*graph.inputs, *graph.params, *graph.consts)}
    nodes: list[Node] = []
    while waiting:
        held = []
        for node in waiting:
            if all(v.name in made for v in node.inputs):
                nodes.append(node)
                made |= {v.name for v in node.outputs}
            else:
                held.append(node)
        if len(held) == len(waiting):
            return None
        waiting = held
    return rewrite(graph, nodes)
