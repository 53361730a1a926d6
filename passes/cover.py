"""Chooses regions for the backward in which parts of the forward are computed again, so that nobody keeps them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd

from tte.ir import Graph, Node, rewrite
from tte.ir.graph import remembered
from tte.ir.rows import align
from tte.ir.tiles import Cut, find_cuts
from tte.passes.costs import ANY, Arena, Costs
from tte.passes.inplace import find_owners
from tte.passes.quantized import drop_saturation_masks
from tte.passes.recompute import recompute_forward
from tte.passes.reorder import reorder
from tte.passes.row_groups import find_row_groups
from tte.passes.stream import find_least
from tte.passes.tile import Group, arrange, find_groups, repeat_in_tiles, tile_backward, widen

EFFORT = 5.0  # of the question to CP-SAT, in its own deterministic time
MOST = 4  # nodes of the forward of which a group may compute any selection again
TRIES = 4


def cover_backward(graph: Graph, arena: Arena = ANY) -> Graph:
    """The same program with the backward in regions that compute again what they read of the forward: for the fewest
    extra multiply-accumulates found with which no more than ``arena.limit`` bytes are alive at a node.

    As it is where results may not be computed twice, or where ``recompute`` does what this cannot; where that cannot
    either, with as few bytes alive as were found.
    """
    if not (arena.may_recompute and graph.updates):
        return graph
    question = _find_question(graph, arena.holds_input)
    limit = arena.limit
    for _ in range(TRIES):
        chosen = question.ask(limit)
        covered = chosen and question.apply(chosen)
        if not covered:
            break
        excess = find_least(covered, arena) - arena.limit
        if excess <= 0:
            costs = Costs(covered, arena)
            return rewrite(covered, [widen(n, arena.limit - costs.node(i)) for i, n in enumerate(covered.nodes)])
        limit -= excess
    lowest = question.ask(None)
    covered = lowest and question.apply(lowest)
    other = recompute_forward(reorder(tile_backward(graph, arena)), arena)
    return covered if covered and find_least(covered, arena) < find_least(other, arena) else graph


@remembered
def _find_question(graph: Graph, holds_input: bool) -> "_Question":
    return _Question(graph, Arena(holds_input=holds_input))


@dataclass(frozen=True, eq=False)
class Way:
    """One way to run some nodes of the backward: a node alone, or a group as a region.

    nodes  by number
    macs   extra ones
    at     when, on the line of nodes
    reads  buffers that the forward has made, by name
    fixed  bytes alive meanwhile, but for those
    """

    nodes: tuple[int, ...]
    group: Group | None
    macs: int
    at: int
    reads: frozenset[str]
    fixed: int


class _Question:
    """Which ways cover the backward, each node once, put to CP-SAT."""

    def __init__(self, graph: Graph, arena: Arena) -> None:
        self.graph, self.arena = graph, arena
        self.first = Costs(graph, arena).forward
        self.uses = graph.uses()
        self.maker = {v.name: i for i, node in enumerate(graph.nodes) for v in node.outputs}
        self.replaced = {v.name: p.name for p, v in graph.updates}
        self.owners = find_owners(graph)
        held = graph.inputs[:1] if arena.holds_input else ()
        made = (*held, *(v for node in graph.nodes[: self.first] for v in node.outputs))
        lasting = {self.owners[v.name] for v in graph.lasting}
        self.saved = {v.name: align(v.type.nbytes) for v in made if self.owners[v.name] == v.name not in lasting}
        groups = find_groups(graph, self.first)
        self.turn: dict[int, int] = {}  # node of a group -> when that runs
        self.turn = {j: self._find_time(group.nodes) for group in groups for j in group.nodes}
        self.ways = [*self._measure(groups, [])]
        for group in groups:
            others = [g for g in groups if g != group]
            self.ways += self._measure(others, group.nodes)
            for again in self._find_repeats(group):
                if found := repeat_in_tiles(graph, self.first, group, again):
                    self.ways += self._measure([*others, found], found.nodes)
        for found in find_row_groups(graph, self.first):
            others = [g for g in groups if not set(g.nodes) & set(found.nodes)]
            self.ways += self._measure([*others, found], found.nodes)

    def _find_repeats(self, group: Group) -> Iterator[tuple[int, ...]]:
        """Selections of what the forward has made for this group, or for what reads the same gradients."""
        known = {v.name for v in (*group.region.inputs, *group.inside)}
        near = {j for name in known for j in self.uses.get(name, ()) if j >= self.first}
        near = {j for j in near if all(v.name in known or not self._behind(v.name) for v in self.graph.nodes[j].inputs)}
        makers = {self.maker.get(v.name, self.first) for j in near for v in self.graph.nodes[j].inputs}
        able = [m for m in makers if m < self.first and self._can_repeat(m)]
        able = sorted(sorted(able, key=lambda m: -sum(v.type.nbytes for v in self.graph.nodes[m].outputs))[:MOST])
        for count in range(1, len(able) + 1):
            yield from combinations(able, count)

    def _behind(self, name: str) -> bool:
        return self.maker.get(name, -1) >= self.first

    def _can_repeat(self, m: int) -> bool:
        node = self.graph.nodes[m]
        cuts = (
            find_cuts(node, {node.output.name: Cut(node.output.type.rank - 1)}) if node.output.type.rank == 4 else None
        )
        return cuts is not None and all(v.name in cuts for v in node.outputs)

    def _measure(self, groups: Sequence[Group], about: Sequence[int]) -> Iterator[Way]:
        """How nodes run when these groups are regions; only those of the nodes ``about``, if there are any."""
        nodes = self._arrange(groups)
        if nodes is None:
            return
        costs = Costs(replace(self.graph, nodes=tuple(nodes)), self.arena)
        group_of = {group.region.output.name: group for group in groups}
        rest = {node.output.name for group in groups for node in group.rest}
        for i, node in enumerate(nodes[costs.forward :], costs.forward):
            if node.output.name in rest:
                continue
            group = group_of.get(node.output.name)
            members = group.nodes if group else (self.maker[node.output.name],)
            if about and not set(members) & set(about):
                continue
            kept = sum(size for birth, death, size in costs.buffers if birth < costs.forward <= i <= death)
            kept -= sum(align(v.type.nbytes) for v in self.graph.outputs)
            reads = {self.owners.get(v.name, "") for v in node.inputs} & self.saved.keys()
            macs = sum(self.graph.nodes[m].macs for m in group.again) if group else 0
            # What only updates a param needs nothing that was not there before it could run.
            fixed = 0 if all(v.name in self.replaced for v in node.outputs) and not group else costs.node(i) - kept
            yield Way(members, group, macs, self._find_time(members), frozenset(reads), fixed)

    def _arrange(self, groups: Sequence[Group]) -> list[Node] | None:
        """The line with these regions, in which what nobody waits for comes as soon as it can."""
        nodes = arrange(self.graph, groups)
        parts = [(node, group) for group in groups for node in (group.region, *group.rest)]
        times = {node.output.name: self._find_time(group.nodes) for node, group in parts}

        def find_time(node: Node) -> int:
            if node.output.name in times:
                return times[node.output.name]
            j = self.maker[node.output.name]
            return j if j < self.first else self._find_time((j,))

        line = nodes and sorted(nodes, key=find_time)
        if not line:
            return None
        behind = {name for name in self.maker if self._behind(name)}
        for node in line:
            if any(v.name in behind for v in node.inputs):
                return nodes  # a region is awaited before all its members can run
            behind.difference_update(v.name for v in node.outputs)
        return line

    def _find_time(self, members: Sequence[int]) -> int:
        """The last node of these that others wait for; of those on which nobody waits, when they can run."""
        nodes = [(j, self.graph.nodes[j]) for j in members]
        awaited = [j for j, node in nodes if any(v.name in self.uses for v in node.outputs)]
        ready = [self.maker[v.name] for _, node in nodes for v in node.inputs if self._behind(v.name)]
        replaced = [self.replaced[v.name] for _, node in nodes for v in node.outputs if v.name in self.replaced]
        ready += [self.turn.get(j, j) for name in replaced for j in self.uses[name] if j not in members]
        return max(awaited or ready, default=self.first)

    def ask(self, given: int | None) -> list[Way] | None:
        """The cheapest ways that together keep within so many bytes; of all, those with the lowest peak."""
        from ortools.sat.python import cp_model

        model = cp_model.CpModel()
        chosen = [model.new_bool_var("") for _ in self.ways]
        for j in range(self.first, len(self.graph.nodes)):
            model.add_exactly_one(c for c, way in zip(chosen, self.ways, strict=True) if j in way.nodes)
        times = sorted({way.at for way in self.ways})
        needed = {(name, t): model.new_bool_var("") for name in self.saved for t in (-1, *times)}
        for c, way in zip(chosen, self.ways, strict=True):
            for name in sorted(way.reads):
                for t in (-1, *(t for t in times if t <= way.at)):
                    model.add_implication(c, needed[name, t])
        unit = gcd(4, *self.saved.values())
        most = max(way.fixed for way in self.ways) + sum(self.saved.values())
        limit = model.new_int_var(0, most // unit, "") if given is None else given // unit
        for c, way in zip(chosen, self.ways, strict=True):
            kept = sum(size // unit * needed[name, way.at] for name, size in self.saved.items())
            model.add(kept + -(-way.fixed // unit) <= limit).only_enforce_if(c)
        kept = sum(size // unit * needed[name, -1] for name, size in self.saved.items())
        model.add(kept <= limit)
        step = gcd(*(way.macs for way in self.ways)) or 1
        # Fewest multiply-accumulates, then fewest regions.
        costs = [way.macs // step * len(self.ways) + (way.group is not None) for way in self.ways]
        model.minimize(limit if given is None else sum(c * cost for c, cost in zip(chosen, costs, strict=True)))
        solver = cp_model.CpSolver()
        solver.parameters.random_seed = 1
        solver.parameters.num_workers = 1
        solver.parameters.linearization_level = 2  # far fewer answers to try
        solver.parameters.max_deterministic_time = EFFORT
        if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        return [way for c, way in zip(chosen, self.ways, strict=True) if solver.value(c)]

    def apply(self, ways: Sequence[Way]) -> Graph | None:
        nodes = self._arrange([way.group for way in ways if way.group])
        return None if nodes is None else reorder(drop_saturation_masks(rewrite(self.graph, nodes)))
