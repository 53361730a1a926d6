"""Parts of the backward program that can run row by row, with the forward rows that they read computed again."""

from collections.abc import Iterator, Sequence
from math import gcd

from tte.ir import Graph, Node, Value
from tte.ir.rows import adds_rows, find_windows, shares_bytes
from tte.passes.fuse import inline
from tte.passes.regions import attrs_of, wrap
from tte.passes.tile import Group

COLUMNS = 8  # of a row that are made at a time, where that helps
LONGEST = 12  # gradients that follow one another in a region


def find_row_groups(graph: Graph, first: int) -> Iterator[Group]:
    """Groups of nodes from number ``first`` on, each from one narrow gradient to another, as regions by rows.

    Gradients of weights are added up row by row, in the order in which they were summed before; what else is done with
    them comes behind the region. What a region reads of the forward it computes again, from the first value that one of
    its weights has read, so that nothing else is kept.
    """
    rows = _Rows(graph, first)
    for chain in rows.find_chains():
        if group := rows.form_group(chain):
            yield group


class _Rows:
    def __init__(self, graph: Graph, first: int) -> None:
        self.graph, self.first = graph, first
        self.uses = graph.uses()
        self.maker = {v.name: i for i, node in enumerate(graph.nodes) for v in node.outputs}
        self.lasting = {v.name for v in graph.lasting}
        self.stored = {v.name for v in (*graph.params, *graph.consts)}

    def find_chains(self) -> Iterator[tuple[int, ...]]:
        """Nodes that follow one another, each waited for by others: those behind a value no larger than what comes."""
        nodes = self.graph.nodes
        line = [j for j in range(self.first, len(nodes)) if any(v.name in self.uses for v in nodes[j].outputs)]
        sizes = [nodes[j].output.type.nbytes for j in line]
        cuts = [c for c in range(1, len(line)) if sizes[c - 1] <= sizes[c]] + [len(line)]
        for at, start in enumerate(cuts):
            for stop in cuts[at + 1 :]:
                if stop - start <= LONGEST:
                    yield tuple(line[start:stop])

    def form_group(self, chain: Sequence[int]) -> Group | None:
        nodes = self.graph.nodes
        members: dict[int, Node] = {j: nodes[j] for j in chain}
        rest: dict[int, Node] = {}
        own = {v.name for j in chain for v in nodes[j].outputs if not self._is_needed(v, chain)}
        near = {v.name for j in chain for v in (*nodes[j].inputs, *nodes[j].outputs)}
        again = self._find_again([*members.values()], near)
        while True:
            made = own | {v.name for m in again for v in nodes[m].outputs}
            readers = {j for name in made for j in self.uses.get(name, ()) if j >= self.first} - members.keys()
            if not readers:
                break
            for j in readers:
                parts = _take_sum(nodes[j])
                if parts is None:
                    return None
                members[j], rest[j] = parts
            again = self._find_again([*members.values()], near)
        repeated = [nodes[m] for m in sorted(again)]
        sums = [members[j] for j in sorted(rest)]
        body = [*repeated, *(nodes[j] for j in chain), *sums]
        kept = [v for j in reversed(chain) for v in nodes[j].outputs if v.name not in own]
        pictures = body[: len(body) - len(sums)]
        if not sums or not _go_by_rows(body, {v.name for v in kept}) or any(map(adds_rows, pictures)):
            return None
        columns = gcd(COLUMNS, *(node.output.type.shape[2] for node in pictures))
        attrs = attrs_of("rows", again) | {"columns": columns}
        region = wrap(body, [*kept, *(node.output for node in sums)], attrs, nodes[chain[-1]].layer)
        inside = tuple(v for node in (*repeated, *(nodes[j] for j in chain)) for v in node.outputs if v not in kept)
        return Group(tuple(sorted(members)), region, inside, tuple(sorted(again)), tuple(rest[j] for j in sorted(rest)))

    def _is_near(self, bits: Value, near: set[str]) -> bool:
        others = [v for v in self.graph.nodes[self.maker[bits.name]].outputs if v != bits]
        readers = [self.graph.nodes[j] for v in others for j in self.uses.get(v.name, ()) if j >= self.first]
        sums = [parts[0] for node in readers if (parts := _take_sum(node))]
        gradients = [v for node in sums for v in node.inputs if self.maker.get(v.name, -1) >= self.first]
        return 0 < len(sums) == len(readers) and all(v.name in near for v in gradients)

    def _is_needed(self, value: Value, chain: Sequence[int]) -> bool:
        """By others than this chain and sums over rows."""
        readers = [j for j in self.uses.get(value.name, ()) if j not in chain]
        return value.name in self.lasting or any(_take_sum(self.graph.nodes[j]) is None for j in readers)

    def _find_again(self, members: Sequence[Node], near: set[str]) -> set[int]:
        """The nodes of the forward that make what these read, but for the first value. Those of which only bits are
        read as well, if what else they make is for sums over gradients that are ``near``."""
        read = {v.name: v for node in members for v in node.inputs if v.name not in self.stored}
        makers = {v.name: self.maker.get(v.name, -1) for v in read.values() if v.type.dtype != "bit"}
        asked = {m for m in makers.values() if m < self.first}
        lowest = min(asked, default=self.first)
        asked |= {self.maker[v.name] for v in read.values() if v.type.dtype == "bit" and self._is_near(v, near)}
        again: set[int] = set()
        while asked:
            m = asked.pop()
            if m > lowest and m not in again:
                again.add(m)
                sources = (self.maker.get(v.name, -1) for v in self.graph.nodes[m].inputs if v.name not in self.stored)
                asked.update(sources)
        return again


def _take_sum(node: Node) -> tuple[Node, Node] | None:
    """A sum over rows, and what is done with it; None if that is not what the node is."""
    sum_, *rest = inline(node, node.output.name)
    if not rest or not adds_rows(sum_):
        return None
    return sum_, rest[0] if len(rest) == 1 else wrap(rest, node.outputs, {"strategy": "fused"}, node.layer)


def _go_by_rows(body: Sequence[Node], kept: set[str]) -> bool:
    made = {v.name: v for node in body for v in node.outputs}
    for node in body:
        windows = find_windows(node)
        if windows is None or node.op == "source":
            return False
        if any(v.name in made and not own for v, own in zip(node.inputs, windows, strict=True)):
            return False
    return not any(v.type.dtype == "bit" and (v.name in kept or shares_bytes(v)) for v in made.values())
