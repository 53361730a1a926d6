"""Row calculus: which rows of its operands an operator reads for one row of its result, and what follows from that.

A row is an index of axis 1 of a (1, H, W, C) tensor. A chain of such operators may run row by row, each row made once,
as soon as it is asked for; of a tensor inside the chain only a ring of rows exists at any time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

from tte.ir.graph import Node, Value, remembered
from tte.ir.op import OPS, Window


@dataclass(frozen=True)
class Demand:
    """Row r of a node asks for the rows below ``min(height, r * stride - padding + size)`` of what ``maker`` makes."""

    maker: int
    window: Window
    height: int

    def end(self, row: int) -> int:
        return min(self.height, row * self.window.stride - self.window.padding + self.window.size)


class Pieces:
    """Tensors of which only a piece exists at a time, inside of a region: one behind the other in its scratch."""

    @property
    def pieces(self) -> dict[str, int]:
        """Value name -> bytes of the piece."""
        raise NotImplementedError

    @property
    def offsets(self) -> dict[str, int]:
        """Of each piece in the memory that all of them share."""
        return dict(zip(self.pieces, accumulate(map(align, self.pieces.values()), initial=0), strict=False))

    @property
    def nbytes(self) -> int:
        return sum(map(align, self.pieces.values()))


@dataclass(frozen=True)
class Stream(Pieces):
    """How a chain runs row by row.

    demands  of each node, those that are ever unmet when they are made, in order
    rest     nodes of which rows are left when the last node is done, in the order in which they are finished
    rings    value name -> how many of its rows have to be kept
    sizes    value name -> bytes of a row
    shifts   operand -> by how many bytes the last node's result must lie below it, at least, to be written over it
    """

    demands: tuple[tuple[Demand, ...], ...]
    rest: tuple[int, ...]
    rings: dict[str, int] = field(hash=False)
    sizes: dict[str, int] = field(hash=False)
    shifts: dict[str, int] = field(hash=False)

    @property
    def pieces(self) -> dict[str, int]:
        return {name: rows * self.sizes[name] for name, rows in self.rings.items()}


@remembered
def find_windows(node: Node) -> tuple[tuple[Window, ...], ...] | None:
    """Of each input the windows that a row reads, () for an input that is read whole; None: it does not go by rows."""
    shapes = [v.type.shape for v in node.outputs]
    if any(len(s) != 4 or s[0] != 1 or s[:2] != shapes[0][:2] for s in shapes):
        return None
    if node.body is None:
        return _windows(node)
    weights = [m for m in node.body.nodes if m.op == "concatenate" and m is not node.body.nodes[-1]]
    members = [m for m in node.body.nodes if m not in weights]
    found: dict[str, list[Window]] = {v.name: [] for v in node.body.inputs}
    for member in members:
        windows = _windows(member)
        if windows is None or member.output.type.shape[:2] != shapes[0][:2]:
            return None
        for value, own in zip(member.inputs, windows, strict=True):
            if value.name in found:
                found[value.name] += own
            elif value in (m.output for m in members) and own != (SAME,):
                return None
    return tuple(tuple(dict.fromkeys(found[v.name])) for v in node.body.inputs)


SAME = Window(1, 1, 0)


def _windows(node: Node) -> tuple[tuple[Window, ...], ...] | None:
    definition = OPS.get(node.op)
    if definition is None:
        return None
    if definition.rows:
        windows = definition.rows(*(v.type for v in node.inputs), **node.attrs)
        return tuple(() if w is None else (w,) for w in windows)
    if definition.kind != "elementwise":
        return None
    shape = node.output.type.shape
    result = []
    for value in node.inputs:
        own = value.type.shape
        varies = len(own) == 4 and own[1] != 1
        if varies and own != shape:
            return None  # only what lies in memory as the result does
        result.append((SAME,) if varies else ())
    return tuple(result)


def stream_rows(nodes: Sequence[Node], kept: frozenset[str]) -> Stream:
    """Run the chain once in the mind. ``kept``: values that are needed whole, outside."""
    return _stream(tuple(_Step.of(node, nodes) for node in nodes), kept)


def find_stream(node: Node) -> Stream | None:
    """How a node runs by rows; None if it does not."""
    if node.body is None or node.attrs["strategy"] != "rows":
        return None
    return stream_rows(node.body.nodes, frozenset(v.name for v in node.body.outputs))


# Regions of which the members run in turns, each a piece at a time, and how a reader is told.
STRATEGIES = {"rows": "row by row", "tiles": "tile by tile"}


def in_pieces(node: Node) -> bool:
    return node.attrs.get("strategy") in STRATEGIES


def expand(node: Node) -> Iterator[Node]:
    """The nodes that a region runs by rows or tiles, reading what the region reads; another node is its own."""
    if node.body is None or not in_pieces(node):
        yield node
        return
    outer = node.arguments
    for member in node.body.nodes:
        yield replace(member, inputs=tuple(outer.get(v.name, v) for v in member.inputs))


@dataclass(frozen=True)
class _Step:
    outputs: tuple[tuple[str, int], ...]  # names, bytes of a row
    height: int
    reads: tuple[tuple[int, Window, str], ...]  # node, window, name of the value
    operands: tuple[tuple[str, int, int, tuple[Window, ...]], ...]  # name, rows, bytes of a row, windows (none: whole)
    drains: bool  # all rows are made, even those that nobody reads

    @staticmethod
    def of(node: Node, nodes: Sequence[Node]) -> "_Step":
        makers = {v.name: i for i, other in enumerate(nodes) for v in other.outputs}
        windows = find_windows(node)
        assert windows is not None, f"{node.op} does not go by rows"
        height = node.output.type.shape[1]
        reads = [
            (makers[value.name], window, value.name)
            for value, own in zip(node.inputs, windows, strict=True)
            if value.name in makers
            for window in own
        ]
        operands = [
            (value.name, *_rows(value), own)
            for value, own in zip(node.inputs, windows, strict=True)
            if value.name not in makers
        ]
        outputs = tuple((v.name, row_bytes(v)) for v in node.outputs)
        return _Step(outputs, height, tuple(reads), tuple(operands), node.op == "source")


def _rows(value: Value) -> tuple[int, int]:
    """How many, and bytes of each; anything that is no picture is one."""
    by_rows = value.type.rank == 4 and value.type.dtype != "bit"
    return (value.type.shape[1], row_bytes(value)) if by_rows else (1, value.type.nbytes)


def row_bytes(value: Value) -> int:
    """Bytes of a row. (Rows of bits share bytes: they are kept whole.)"""
    return value.type.nbytes // value.type.shape[1]


@lru_cache(maxsize=4096)
def _stream(steps: tuple[_Step, ...], kept: frozenset[str]) -> Stream:
    made = [0] * len(steps)
    written: list[list[int]] = [[] for _ in steps]  # event that makes row j
    last: dict[str, list[int]] = {
        name: [-1] * s.height for s in steps for name, _ in s.outputs
    }  # event that reads it last
    demands: list[dict[Demand, None]] = [{} for _ in steps]
    operands = {name: (rows, size) for s in steps for name, rows, size, _ in s.operands}
    last |= {name: [-1] * rows for name, (rows, _) in operands.items()}
    clock = 0

    def make(k: int) -> None:
        nonlocal clock
        row = made[k]
        for maker, window, _ in steps[k].reads:
            demand = Demand(maker, window, steps[maker].height)
            while made[maker] < demand.end(row):
                demands[k].setdefault(demand)
                make(maker)
        for maker, window, name in steps[k].reads:
            start = max(0, row * window.stride - window.padding)
            for i in range(start, Demand(maker, window, steps[maker].height).end(row)):
                last[name][i] = clock
        for name, rows, _, windows in steps[k].operands:
            for window in windows or (Window(rows, 0, 0),):
                start = row * window.stride - window.padding
                for i in range(max(0, start), min(rows, start + window.size)):
                    last[name][i] = clock
        written[k].append(clock)
        made[k] += 1
        clock += 1

    final = len(steps) - 1
    for _ in range(steps[final].height):
        make(final)
    rest = []
    for k in reversed(range(final)):
        needed = steps[k].drains or any(name in kept for name, _ in steps[k].outputs)
        if needed and made[k] < steps[k].height:
            rest.append(k)
            while made[k] < steps[k].height:
                make(k)
    rings, sizes = {}, {}
    for k, step in enumerate(steps):
        for name, size in step.outputs:
            if name not in kept:
                rings[name], sizes[name] = _ring(written[k], last[name]), size
    result, size = steps[final].outputs[0]
    shifts = {}
    if result in kept:
        shifts = {name: _shift(written[final], size, last[name], own) for name, (_, own) in operands.items()}
    return Stream(tuple(tuple(d) for d in demands), tuple(rest), rings, sizes, shifts)


def _ring(written: Sequence[int], last: Sequence[int]) -> int:
    """The most rows from the first that is still read to the one that is written."""
    most, first = 1, 0
    for j, event in enumerate(written):
        while first < j and last[first] < event:
            first += 1
        most = max(most, j - first + 1)
    return most


def _shift(written: Sequence[int], size: int, last: Sequence[int], own: int) -> int:
    """How far below an operand, rows of ``own`` bytes, a result, rows of ``size``, is not written over what is read.

    Row j ends at (j + 1) * size, and must end where the first row that is still read begins.
    """
    shift, first = 0, 0
    for j, event in enumerate(written):
        while first < len(last) and last[first] < event:
            first += 1
        if first < len(last):
            shift = max(shift, (j + 1) * size - first * own)
    return align(shift)


def saved_bytes(dying: int, born: int, shift: int) -> int:
    """By writing one buffer over another, ``shift`` bytes below it: both together take max(born, dying + shift)."""
    return dying + born - max(born, dying + shift)


def align(size: int) -> int:
    """Bytes of a buffer: a multiple of 4."""
    return -(-size // 4) * 4
