"""Tile calculus: what may run tile by tile along an axis, most often the channels between two convolutions.

An operator says, by letters, which axes of its operands and its result run together. Where one tensor is cut along an
axis, it follows how the others are: cut along an axis of theirs, read whole, or a sum over the tiles. So a chain of
operators may run tile by tile, and of a tensor inside the chain only one tile exists at any time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tte.ir.graph import Graph, Node, Value, remembered
from tte.ir.rows import Pieces, find_stream


@dataclass(frozen=True)
class Cut:
    """Element i along ``axis`` of a tensor lies at ``first + i`` on the line that is divided into tiles."""

    axis: int
    first: int = 0

    def span(self, value: Value) -> tuple[int, int]:
        """The part of the line that the tensor covers."""
        return self.first, self.first + value.type.shape[self.axis]


def find_cuts(node: Node, known: Mapping[str, Cut]) -> dict[str, Cut] | None:
    """How operands and results of ``node`` are cut if those in ``known`` are; None: it cannot run by tiles.

    An operand that is not in it is read whole; a result that is not in it is a sum over the tiles.
    """
    if node.body is None:
        return _cut_call(node, known)
    outer = node.arguments | node.results
    cuts = spread_cuts(node.body, {inner: known[v.name] for inner, v in outer.items() if v.name in known})
    return cuts and {v.name: cuts[inner] for inner, v in outer.items() if inner in cuts}


def spread_cuts(graph: Graph, known: Mapping[str, Cut]) -> dict[str, Cut] | None:
    """How the values of a graph are cut if those in ``known`` are; None: some node cannot run by tiles."""
    cuts = dict(known)
    while True:
        before = len(cuts)
        for node in graph.nodes:
            own = {v.name: cuts[v.name] for v in (*node.inputs, *node.outputs) if v.name in cuts}
            found = find_cuts(node, own) if own else {}
            if found is None or any(cuts.get(name, cut) != cut for name, cut in found.items()):
                return None
            cuts |= found
        if len(cuts) == before:
            return cuts


def _cut_call(node: Node, known: Mapping[str, Cut]) -> dict[str, Cut] | None:
    values = (*node.inputs, *node.outputs)
    letters = _find_letters(node)
    if letters is None:
        return None
    at = _find_starts(node)
    ways = {
        (axes[known[v.name].axis], known[v.name].first - start.get(known[v.name].axis, 0))
        for v, axes, start in zip(values, letters, at, strict=True)
        if v.name in known
    }
    if len(ways) != 1:
        return None
    ((letter, first),) = ways
    if letter == "." or (letter not in letters[-1] and node.definition.start is None):
        return None
    cuts: dict[str, Cut] = {}
    for value, axes, start in zip(values, letters, at, strict=True):
        if letter in axes:
            axis = axes.index(letter)
            cut = Cut(axis, first + start.get(axis, 0))
            if cuts.setdefault(value.name, cut) != cut:
                return None
    return cuts


def _find_letters(node: Node) -> tuple[str, ...] | None:
    """Of each operand, then of each result, a letter per axis."""
    definition = node.definition
    if definition.axes:
        *operands, result = definition.axes(*(v.type for v in node.inputs), **node.attrs)
        return *operands, *(result for _ in node.outputs)
    if node.output.type.dtype == "bit":
        return None  # a byte of what it makes holds bits of several tiles
    if node.op == "concatenate" or definition.kind == "elementwise":
        shape = node.output.type.shape
        names = "".join(chr(ord("a") + d) for d in range(len(shape)))
        joined = node.attrs.get("axis")
        operands = []
        for value in node.inputs:
            own = value.type.shape
            tail = zip(names[len(shape) - len(own) :], own, shape[len(shape) - len(own) :], strict=True)
            operands.append("".join(c if n == m or names.index(c) == joined else "." for c, n, m in tail))
        return *operands, *(names for _ in node.outputs)
    return None


def _find_starts(node: Node) -> list[dict[int, int]]:
    """Of each operand, then of each result: axis -> where on that axis of the result it begins, if not at 0."""
    starts: list[dict[int, int]] = [{} for _ in (*node.inputs, *node.outputs)]
    if node.op == "concatenate":
        axis, at = node.attrs["axis"], 0
        assert isinstance(axis, int)
        for k, value in enumerate(node.inputs):
            starts[k] = {axis: at}
            at += value.type.shape[axis]
    return starts


@dataclass(frozen=True)
class Tiles(Pieces):
    """How a region runs tile by tile: all members for the first tile, then all for the second, and so on.

    width   elements of a tile
    cuts    of the values of the body; others are whole
    spans   of each member, the part of the line for which it runs
    sizes   value inside -> bytes of its tile
    """

    width: int
    cuts: dict[str, Cut]
    spans: tuple[tuple[int, int], ...]
    sizes: dict[str, int]

    @property
    def pieces(self) -> dict[str, int]:
        return self.sizes


@remembered
def find_tiles(node: Node) -> Tiles | None:
    """How a node runs by tiles; None if it does not, or cannot."""
    if node.body is None or node.attrs["strategy"] != "tiles":
        return None
    width = node.attrs.get("width")
    return find_line(node.body).divide(width) if isinstance(width, int) else None


@dataclass(frozen=True)
class Line:
    """How the members of a body follow when all that stays inside is cut along its last axis; no cuts: they do not."""

    cuts: dict[str, Cut]
    spans: tuple[tuple[int, int], ...] = ()
    inside: tuple[Value, ...] = ()
    ends: frozenset[int] = frozenset()

    @property
    def widths(self) -> list[int]:
        """All that tiles may have, ascending: no tile lies in two pieces of a tensor."""
        common = math.gcd(*self.ends)
        return [w for w in range(1, common + 1) if common % w == 0 and w < max(self.ends)]

    def divide(self, width: int) -> Tiles | None:
        if width not in self.widths:
            return None
        sizes = {}
        for value in self.inside:
            count = value.type.size // value.type.shape[-1] * width
            sizes[value.name] = -(-count // 8) if value.type.dtype == "bit" else count * value.type.numpy.itemsize
        return Tiles(width, self.cuts, self.spans, sizes)


@remembered
def find_line(body: Graph) -> Line:
    """See ``Line``."""
    kept = {v.name for v in body.outputs}
    inside = tuple(v for node in body.nodes for v in node.outputs if v.name not in kept)
    cuts = spread_cuts(body, {v.name: Cut(v.type.rank - 1) for v in inside}) or {}
    sums = {v.name for node in body.nodes for v in node.outputs if v.name not in cuts}
    if any(v.name in sums and v.type.dtype != "float32" for v in body.outputs):
        return Line({})  # what it has come to is kept where the result will be
    if any(node.op == "concatenate" for node in body.nodes):
        return Line({})  # its kernel makes no tiles
    spans: list[tuple[int, int]] = []
    ends: set[int] = set()
    for node in body.nodes:
        own = [cuts[v.name].span(v) for v in (*node.outputs, *node.inputs) if v.name in cuts]
        if not own or any(v.name in sums for v in node.inputs):
            return Line({})  # a sum is not there before the last tile
        made = [cuts[v.name].span(v) for v in node.outputs if v.name in cuts] or own
        spans.append((min(start for start, _ in made), max(stop for _, stop in made)))
        ends |= {end for span in own for end in span}
    return Line(cuts, tuple(spans), inside, frozenset(ends))


def scratch_bytes(node: Node) -> int:
    """What a node needs beside operands and results while it runs, by rows or by tiles."""
    inside = find_stream(node) or find_tiles(node)
    return inside.nbytes if inside else 0


def find_scratch(graph: Graph) -> dict[int, int]:
    """Node index -> bytes, of those that need any."""
    return {i: size for i, node in enumerate(graph.nodes) if (size := scratch_bytes(node))}


def find_start(node: Node) -> Value | None:
    """The operand that the sum of a node begins with, if nothing else in it is read from that."""
    if node.body is None:
        start = node.definition.start
        found = node.inputs[start] if start is not None and start < len(node.inputs) else None
        return found if found and sum(v.name == found.name for v in node.inputs) == 1 else None
    inner = next((v for member in node.body.nodes if (v := find_start(member))), None)
    if inner is None or sum(v.name == inner.name for member in node.body.nodes for v in member.inputs) > 1:
        return None
    return node.arguments.get(inner.name)
