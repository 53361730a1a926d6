"""Runs parts of the backward program in tiles of channels: of what lies between two layers only a tile exists."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tte.ir import Graph, Node, Value, rewrite
from tte.ir.graph import remembered
from tte.ir.rows import in_pieces
from tte.ir.tiles import Cut, find_cuts, find_line, scratch_bytes
from tte.passes.costs import ANY, Arena, Costs
from tte.passes.fuse import fuse_producers
from tte.passes.regions import attrs_of, enclose
from tte.passes.reorder import reorder
from tte.passes.stream import find_least


def tile_backward(graph: Graph, arena: Arena = ANY) -> Graph:
    """Put nodes behind the loss into regions that run by tiles, where that lowers the peak: as few as will do it, in
    tiles as wide as will do.

    Every number is summed in the same order as before, so it keeps its bits, as long as kernels of convolutions that
    are summed over are 1 x 1.
    """
    if not graph.updates or any(map(in_pieces, graph.nodes)):
        return graph
    plain = _find_choice(graph, arena.holds_input)
    if plain.least > arena.limit and (fused := fuse(graph)) != graph:
        slim = _find_choice(fused, arena.holds_input)
        if slim.least < plain.least:  # else making values anew as they are read takes time for nothing
            return slim.choose(arena.limit)
    return plain.choose(arena.limit) if plain.groups else graph


fuse = remembered(fuse_producers)


@remembered
def _find_choice(graph: Graph, holds_input: bool) -> "_Choice":
    return _Choice(graph, Arena(holds_input=holds_input))


class _Choice:
    """Which groups of a graph run by tiles. least: the lowest peak of all, if all do, in the narrowest tiles."""

    def __init__(self, graph: Graph, arena: Arena) -> None:
        self.graph, self.arena = graph, arena
        self.chosen: dict[int, Graph] = {}  # by the limit
        self.groups = find_groups(graph, Costs(graph, arena).forward)
        self.least = find_least(self.order(self.groups), arena)

    def order(self, groups: Sequence["Group"]) -> Graph:
        result = contract(self.graph, groups)
        assert result is not None, "groups that find_groups has tried together"
        return reorder(result)

    def peak(self, ordered: Graph) -> int:
        """Behind the loss."""
        costs = Costs(ordered, self.arena)
        return max(costs.node(i) for i in range(costs.forward, len(ordered.nodes)))

    def choose(self, limit: int) -> Graph:
        limit = max(limit, self.least)
        if limit not in self.chosen:
            self.chosen[limit] = self._choose(limit)
        return self.chosen[limit]

    def _choose(self, limit: int) -> Graph:
        groups = self.groups
        for group in sorted(groups, key=lambda g: g.saved):
            without = [g for g in groups if g != group]
            if self.peak(self.order(without)) <= limit:
                groups = without
        ordered = self.order(groups)
        costs = Costs(ordered, self.arena)
        return rewrite(ordered, [widen(node, limit - costs.node(i)) for i, node in enumerate(ordered.nodes)])


def widen(node: Node, room: int) -> Node:
    """The node with the tiles that kernels like best, among those that need no more than ``room`` additional bytes.

    Kernels work on 8, or 4, or 2 channels at a time; beyond 16 wider tiles gain nothing.
    """
    if node.body is None or node.attrs["strategy"] != "tiles":
        return node
    widths = {w: replace(node, attrs=node.attrs | {"width": w}) for w in find_line(node.body).widths}
    widths = {w: n for w, n in widths.items() if scratch_bytes(n) - scratch_bytes(node) <= room}
    return widths[max(widths, key=lambda w: (min(w & -w, 8), min(w, 16), -w))]


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes (by number) that can run by tiles together, as one region in the narrowest tiles.

    inside: values that then need no buffer of their own
    again: nodes of the forward that the region computes a second time
    rest: what is left of the nodes, behind the region
    """

    nodes: tuple[int, ...]
    region: Node
    inside: tuple[Value, ...]
    again: tuple[int, ...] = ()
    rest: tuple[Node, ...] = ()

    @property
    def saved(self) -> int:
        return max(v.type.nbytes for v in self.inside)


def find_groups(graph: Graph, first: int) -> list[Group]:
    """Groups of nodes from number ``first`` on that do not meet, those with the largest values inside before others."""
    search = _Search(graph, first)
    found: list[Group] = []
    for i in range(first, len(graph.nodes)):
        known = any(graph.nodes[i].output in group.inside for group in found)
        if not known and (group := search.start_at(i)):
            found.append(group)
    chosen: list[Group] = []
    for group in sorted(found, key=lambda g: -g.saved):
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
        self.needed = {v.name for v in graph.lasting}

    def start_at(self, i: int) -> Group | None:
        """The group in which what node ``i`` makes stays inside, and all that can be cut with it."""
        inside: dict[str, Value] = {}
        nodes: dict[int, dict[str, Cut]] = {}
        queue = [self.graph.nodes[i].output]
        while queue:
            value = queue.pop()
            users = self.find_users(value) if value.name not in inside else None
            if users is None or self.waits(nodes | users):
                continue
            inside[value.name] = value
            nodes |= users
            for j, cuts in users.items():
                own = (*self.graph.nodes[j].inputs, *self.graph.nodes[j].outputs)
                queue += [v for v in own if v != value and cuts.get(v.name) == _last(v)]
        if not nodes:
            return None
        return _form_group(self.graph, sorted(nodes), tuple(inside.values()))

    def waits(self, nodes: Mapping[int, Mapping[str, Cut]]) -> bool:
        """Whether one of the nodes, with their cuts, needs what is there only when others have made all their tiles."""
        made: set[str] = set()
        late: set[str] = set()
        for j in range(min(nodes), max(nodes) + 1):
            node = self.graph.nodes[j]
            waiting = any(v.name in late for v in node.inputs)
            if cuts := nodes.get(j):
                if waiting:
                    return True
                made |= {v.name for v in node.outputs}
                late |= {v.name for v in node.outputs if v.name not in cuts}
            elif waiting or any(v.name in made for v in node.inputs):
                late |= {v.name for v in node.outputs}
        return False

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


def _form_group(
    graph: Graph, members: Sequence[int], inside: tuple[Value, ...], again: tuple[int, ...] = ()
) -> Group | None:
    """The group of these nodes, in the narrowest tiles; None if they cannot run by tiles."""
    region = enclose(graph, members, attrs_of("tiles", again), again)
    assert region.body
    widths = find_line(region.body).widths
    region = replace(region, attrs=region.attrs | {"width": widths[0]}) if widths else region
    return Group(tuple(members), region, inside, again) if widths else None


def repeat_in_tiles(graph: Graph, first: int, group: Group, again: tuple[int, ...]) -> Group | None:
    """The group as one that computes nodes of the forward again, with all that reads their results behind the loss."""
    readers = graph.uses()
    made = [v for m in again for v in graph.nodes[m].outputs]
    members = {*group.nodes, *(j for v in made for j in readers.get(v.name, ()) if j >= first)}
    return _form_group(graph, sorted(members), (*group.inside, *made), again)


def _last(value: Value) -> Cut:
    return Cut(value.type.rank - 1)


def contract(graph: Graph, groups: Sequence[Group]) -> Graph | None:
    """The graph with each group as a region; None if one would wait for itself."""
    nodes = arrange(graph, groups)
    return None if nodes is None else rewrite(graph, nodes)


def arrange(graph: Graph, groups: Sequence[Group]) -> list[Node] | None:
    """The nodes of the graph in an order in which each group can run as a region; None if there is none."""
    parts = {group.nodes[0]: (group.region, *group.rest) for group in groups}
    inside = {i for group in groups for i in group.nodes[1:]}
    waiting = [n for i, node in enumerate(graph.nodes) if i not in inside for n in parts.get(i, (node,))]
    made = {v.name for v in (*graph.inputs, *graph.params, *graph.consts)}
    targets = {v.name: p.name for p, v in graph.updates}
    unread = Counter(name for node in waiting for name in {v.name for v in node.inputs})
    nodes: list[Node] = []
    patient = True  # what replaces a param waits for all who read it, if they do not wait for what is made with it
    while waiting:
        held = []
        for node in waiting:
            own = {v.name for v in node.inputs}
            replaced = {targets[v.name] for v in node.outputs if v.name in targets}
            if own <= made and not (patient and any(unread[p] > (p in own) for p in replaced)):
                nodes.append(node)
                made |= {v.name for v in node.outputs}
                unread.subtract(own)
            else:
                held.append(node)
        stuck = len(held) == len(waiting)
        if stuck and not patient:
            return None
        patient, waiting = not stuck, held
    return nodes
