"""Row calculus: which rows of its operands an operator reads for one row of its result, and what follows from that.

A row is an index of axis 1 of a (1, H, W, C) tensor. A chain of such operators may run row by row, each row made once,
as soon as it is asked for; of a tensor inside the chain only a ring of rows exists at any time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

from tte.ir.graph import Graph, Node, Value, find_anchor, remembered
from tte.ir.op import OPS, Window


@dataclass(frozen=True)
class Demand:
    """Row r of a step asks for the rows below ``min(height, window.stop(r))`` of what the step ``maker`` makes."""

    maker: int
    window: Window
    height: int

    def end(self, row: int) -> int:
        return min(self.height, self.window.stop(row))


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
    """How a chain runs row by row, in steps; most are one node.

    steps    nodes by number; those of one step make the same row together, some columns at a time
    demands  of each step, those that are ever unmet when a row is made, in order
    awaits   sum over rows -> its demands; it takes its next row as soon as they are met
    last     the step that is made first of all, on demand of its rows
    rest     steps of which rows are left when the last step is done, in the order in which they are finished
    rings    value name -> how many of its rows have to be kept
    sizes    value name -> bytes of a row
    parts    value inside of a step -> bytes of the columns that exist at a time
    shifts   operand -> by how many bytes the last step's result must lie below it, at least, to be written over it
    """

    steps: tuple[tuple[int, ...], ...]

    demands: tuple[tuple[Demand, ...], ...]
    awaits: dict[int, tuple[Demand, ...]] = field(hash=False)
    last: int
    rest: tuple[int, ...]
    rings: dict[str, int] = field(hash=False)
    sizes: dict[str, int] = field(hash=False)
    parts: dict[str, int] = field(hash=False)
    shifts: dict[str, int] = field(hash=False)

    @property
    def pieces(self) -> dict[str, int]:
        return {name: rows * self.sizes[name] for name, rows in self.rings.items()} | self.parts

    def follow(self, k: int) -> list[int]:
        """The sums that may take a row when step ``k`` has made one."""
        return [s for s, demands in self.awaits.items() if any(d.maker == k for d in demands)]


def adds_rows(node: Node) -> bool:
    """Its result is a sum over the rows of an operand."""
    return node.body is None and OPS[node.op].along is not None


def count_rows(node: Node) -> int:
    """How many rows it makes, or takes."""
    along = None if node.body else OPS[node.op].along
    return (node.output if along is None else node.inputs[along]).type.shape[1]


@remembered
def find_windows(node: Node) -> tuple[tuple[Window, ...], ...] | None:
    """Of each input the windows that a row reads, () for an input that is read whole; None: it does not go by rows."""
    shapes = [v.type.shape for v in node.outputs]
    if adds_rows(node):
        windows = _windows(node)
        return windows if windows and all(v.type.shape[0] == 1 for v in node.inputs) else None
    if any(len(s) != 4 or s[0] != 1 or s[:2] != shapes[0][:2] for s in shapes):
        return None
    return _body_windows(node.body, shapes[0][1]) if node.body else _windows(node)


@remembered
def _body_windows(body: Graph, rows: int) -> tuple[tuple[Window, ...], ...] | None:
    weights = [m for m in body.nodes if m.op == "concatenate" and m is not body.nodes[-1]]
    members = [m for m in body.nodes if m not in weights]
    if find_anchor(members) not in (None, 0):
        return None  # what is made as it is read is not made by rows
    found: dict[str, list[Window]] = {v.name: [] for v in body.inputs}
    for member in members:
        windows = _windows(member)
        if windows is None or member.output.type.shape[:2] != (1, rows):
            return None
        for value, own in zip(member.inputs, windows, strict=True):
            if value.name in found:
                found[value.name] += own
            elif value in (m.output for m in members) and own != (SAME,):
                return None
    return tuple(tuple(dict.fromkeys(found[v.name])) for v in body.inputs)


SAME = Window(1, 1, 0)


def _windows(node: Node) -> tuple[tuple[Window, ...], ...] | None:
    definition = OPS.get(node.op)
    if definition is None:
        return None
    if definition.rows:
        windows = definition.rows(*(v.type for v in node.inputs), **node.attrs)
        return None if windows is None else tuple(() if w is None else (w,) for w in windows)
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


def stream_rows(nodes: Sequence[Node], kept: frozenset[str], columns: int = 0) -> Stream:
    """Run the chain once in the mind. ``kept``: values that are needed whole, outside.

    columns: where of a value just one row exists, and its readers read it pixel by pixel, so many columns of it do
    """
    alone = tuple((k,) for k in range(len(nodes)))
    stream = _stream(_form_steps(nodes, alone), alone, (), kept)
    if not columns:
        return stream
    steps: list[tuple[int, ...]] = []
    parts: list[tuple[str, int]] = []
    for k, node in sorted(enumerate(nodes), key=lambda item: -stream.sizes.get(item[1].output.name, 0)):
        value = node.output
        readers = [j for j, other in enumerate(nodes) if value in other.inputs]
        step = (k, *readers)
        if stream.rings.get(value.name) != 1 or any({*step} & {*other} for other in steps):
            continue
        if all(_makes_columns(nodes[j]) for j in step) and all(_reads_pixels(nodes[j], value) for j in readers):
            steps.append(step)
            parts.append((value.name, row_bytes(value) // value.type.shape[2] * columns))
    taken = {j for step in steps for j in step}
    together = tuple(sorted([*steps, *((k,) for k in range(len(nodes)) if k not in taken)]))
    return _stream(_form_steps(nodes, together), together, tuple(parts), kept)


def _makes_columns(node: Node) -> bool:
    anchor = node.body.nodes[0] if node.body else node
    return len(node.outputs) == 1 and anchor.definition.columns


def _reads_pixels(node: Node, value: Value) -> bool:
    windows = find_windows(node) or ()
    return all(own == (SAME,) for v, own in zip(node.inputs, windows, strict=True) if v == value)


def _form_steps(nodes: Sequence[Node], steps: Sequence[Sequence[int]]) -> tuple["_Step", ...]:
    makers = {v.name: k for k, step in enumerate(steps) for j in step for v in nodes[j].outputs}
    return tuple(_Step.of([nodes[j] for j in step], k, makers) for k, step in enumerate(steps))


@remembered
def find_stream(node: Node) -> Stream | None:
    """How a node runs by rows; None if it does not."""
    if node.body is None or node.attrs["strategy"] != "rows":
        return None
    columns = node.attrs.get("columns", 0)
    assert isinstance(columns, int)
    return _body_stream(node.body, columns)


@remembered
def _body_stream(body: Graph, columns: int) -> Stream:
    return stream_rows(body.nodes, frozenset(v.name for v in body.outputs), columns)


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
    adds: bool  # a sum over rows
    drains: bool  # all rows are made, even those that nobody reads

    @staticmethod
    def of(nodes: Sequence[Node], number: int, makers: Mapping[str, int]) -> "_Step":
        reads, operands = [], []
        for node in nodes:
            windows = find_windows(node)
            assert windows is not None, f"{node.op} does not go by rows"
            for value, own in zip(node.inputs, windows, strict=True):
                maker = makers.get(value.name)
                if maker is None:
                    operands.append((value.name, *_rows(value), own if _rows(value)[0] > 1 else ()))
                elif maker != number:
                    reads += [(maker, window, value.name) for window in own]
        adds = [adds_rows(node) for node in nodes]
        inside = {v.name for node in nodes for v in node.inputs if makers.get(v.name) == number}
        made = [v for node, sums in zip(nodes, adds, strict=True) if not sums for v in node.outputs]
        outputs = tuple((v.name, row_bytes(v)) for v in made if v.name not in inside)
        drains = any(adds) or any(node.op == "source" for node in nodes)
        return _Step(outputs, count_rows(nodes[0]), tuple(reads), tuple(operands), all(adds), drains)


def _rows(value: Value) -> tuple[int, int]:
    """How many, and bytes of each; anything that is no picture is one."""
    by_rows = value.type.rank == 4 and value.type.dtype != "bit"
    return (value.type.shape[1], row_bytes(value)) if by_rows else (1, value.type.nbytes)


def row_bytes(value: Value) -> int:
    """Bytes of a row. (Where rows of bits share bytes, they are kept whole: see ``shares_bytes``.)"""
    return value.type.nbytes // value.type.shape[1]


def shares_bytes(value: Value) -> bool:
    """A byte of it holds bits of two rows."""
    return value.type.dtype == "bit" and value.type.size // value.type.shape[1] % 8 != 0


@lru_cache(maxsize=4096)
def _stream(
    steps: tuple[_Step, ...],
    numbers: tuple[tuple[int, ...], ...],
    parts: tuple[tuple[str, int], ...],
    kept: frozenset[str],
) -> Stream:
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
        if made[k] > row:
            return  # a sum has taken it as soon as all was there
        for maker, window, name in steps[k].reads:
            for i in range(max(0, window.start(row)), Demand(maker, window, steps[maker].height).end(row)):
                last[name][i] = clock
        for name, rows, _, windows in steps[k].operands:
            for window in windows or (Window(rows, 0, 0),):
                for i in range(max(0, window.start(row)), min(rows, window.stop(row))):
                    last[name][i] = clock
        written[k].append(clock)
        made[k] += 1
        clock += 1
        for s, waiting in awaits.items():
            if any(d.maker == k for d in waiting):
                while made[s] < steps[s].height and all(made[d.maker] >= d.end(made[s]) for d in waiting):
                    make(s)

    awaits = {
        k: tuple(dict.fromkeys(Demand(maker, window, steps[maker].height) for maker, window, _ in step.reads))
        for k, step in enumerate(steps)
        if step.adds
    }
    awaited = {maker for step in steps if not step.adds for maker, _, _ in step.reads}
    final = max(k for k, step in enumerate(steps) if not step.adds and k not in awaited)
    for _ in range(steps[final].height):
        make(final)
    rest = []
    for k in reversed(range(len(steps))):
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
    shifts = {}
    for result, size in steps[final].outputs[:1]:
        if result not in kept:
            continue
        shifts = {name: _shift(written[final], size, last[name], own) for name, (_, own) in operands.items()}
    unmet = tuple(tuple(d) for d in demands)
    return Stream(numbers, unmet, awaits, final, tuple(rest), rings, sizes, dict(parts), shifts)


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
