"""Re-reads a memory plan with suspicion: replays the program on an arena of tags. Shares no code with the planner."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from tte.codegen.plan import Plan
from tte.ir import OPS, Graph, Node, Value, inplace_inputs
from tte.ir.rows import Stream, adds_rows, count_rows, find_stream, find_windows, row_bytes, shares_bytes
from tte.ir.tiles import Tiles, find_scratch, find_start, find_tiles


class PlanError(Exception):
    """Under this plan some kernel would read or write a byte that is not its own: a bug of the planner."""


def check_plan(graph: Graph, plan: Plan, scratch: Mapping[int, int] | None = None) -> None:
    """Run ``graph`` node by node on memory in which every byte remembers who wrote it.

    Each result has tags of its own, one per byte. A read must find exactly the tags of what it means to read, before
    and after the node has written (a kernel writes while it reads). scratch: as given to ``plan_memory``.
    Raises PlanError, which names the node and the tensors.
    """
    scratch = find_scratch(graph) if scratch is None else scratch
    memory = _Memory(plan)
    for value in (*graph.inputs, *graph.params, *graph.consts):
        if value.name not in plan.offsets:
            memory.storage[value.name] = np.empty(value.type.nbytes, np.int64)
        memory.write(value.name, value.type.nbytes, "start")
    untouchable = {id(memory.storage[v.name]) for v in (*graph.inputs, *graph.consts) if v.name in memory.storage}
    for i, node in enumerate(graph.nodes):
        at = f"node {i} ({node.op}, layer {node.layer or '-'})"
        if tiles := find_tiles(node):
            check_tiles(node, tiles, at)
        names = [v.name for v in node.inputs]
        for name in names:
            memory.read(name, at)
        if stream := find_stream(node):
            _replay_stream(node, stream, memory, f"scratch.{i}", at)
            over = memory.find(node.output.name, node.output.type.nbytes, at)
            for name in [n for n in names if not np.shares_memory(memory.find(n, len(memory.tags[n]), at), over)]:
                memory.read(name, at)
            for value in node.outputs:
                memory.read(value.name, at)
            continue
        if node.body is None and OPS[node.op].kind == "view":
            memory.share(names[0], node.output.name, at)
            continue
        overwritten: list[str] = []
        for j, k in enumerate(node.inplace):
            if k is None:
                continue
            taken, allowed = names[k], inplace_inputs(node, j)
            shared = [n for n in names if memory.tags[n] is memory.tags[taken]]
            fits = node.inputs[k].type.nbytes == node.outputs[j].type.nbytes
            same_index = all(k in allowed for k, n in enumerate(names) if n in shared)
            if not (fits and same_index) or id(memory.storage.get(taken)) in untouchable or taken in overwritten:
                raise PlanError(f"{at}: may not work in place of %{taken}")
            overwritten += shared
            memory.share(taken, node.outputs[j].name, at)
        made = [(v.name, v.type.nbytes) for v in node.outputs]
        made += [(f"scratch.{i}", scratch[i])] if i in scratch else []
        for name, size in made:
            memory.write(name, size, at)
        for name in [n for n in names if n not in overwritten] + [name for name, _ in made]:
            memory.read(name, at)
    for value in graph.outputs:
        memory.read(value.name, "end")
    for param, value in graph.updates:
        memory.read(value.name, f"update of @{param.name}")
        memory.storage[param.name][:] = memory.tags[value.name]
    memory.tags |= {param.name: memory.tags[value.name] for param, value in graph.updates}
    for param in graph.params:
        memory.read(param.name, "end")


def check_input(graphs: Sequence[Graph], plans: Sequence[Plan]) -> None:
    """Callers write the input before they say which program is to read it. Raises PlanError where that makes a
    difference."""
    places = {plan.offsets.get(graph.inputs[0].name) for graph, plan in zip(graphs, plans, strict=True)}
    if len(places) > 1:
        raise PlanError(f"the input lies at {places}, not at one place")


def _replay_stream(node: Node, stream: Stream, memory: "_Memory", scratch: str, at: str) -> None:
    """Run a region row by row, as its C does, on the bytes of operands, results and rings.

    Raises PlanError where a row is read that is not there (any more), or a result is not complete.
    """
    assert node.body
    nodes, columns = node.body.nodes, node.attrs.get("columns")
    outer = {inner: v.name for inner, v in (node.arguments | node.results).items()}
    makers = {v.name: k for k, numbers in enumerate(stream.steps) for j in numbers for v in nodes[j].outputs}
    sums = {member.output.name for member in nodes if adds_rows(member)}
    heights = [count_rows(nodes[numbers[0]]) for numbers in stream.steps]
    made = [0] * len(stream.steps)
    so_far: dict[str, int] = {}  # of a sum that is not complete, what its bytes hold
    for member in nodes:
        for value in member.outputs:
            memory.expect(outer.get(value.name, f"{scratch}.{value.name}"), value.type.nbytes)

    def find_row(value: Value, row: int, col: int) -> tuple[str, np.ndarray, np.ndarray]:
        """Name, bytes, and what they must be; of what is inside of a step, some columns."""
        name, size = outer.get(value.name, f"{scratch}.{value.name}"), row_bytes(value)
        start, wanted = row * size, memory.tags[name][row * size : (row + 1) * size]
        if value.name in stream.parts:
            size, pixel = stream.parts[value.name], size // value.type.shape[2]
            start, wanted = stream.offsets[value.name], wanted[col * pixel : col * pixel + size]
        elif value.name in stream.rings:
            start = stream.offsets[value.name] + row % stream.rings[value.name] * size
        inside = value.name in stream.offsets
        found = memory.find(scratch, stream.nbytes, at) if inside else memory.find(name, value.type.nbytes, at)
        return value.name if inside else name, found[start : start + size], wanted

    def run(j: int, row: int, col: int, last: bool) -> None:
        """Member ``j`` makes its row, or the columns of it from ``col`` on, ``last`` if they end it."""
        reads: list[tuple[str, int, np.ndarray, np.ndarray]] = []
        for value, own in zip(nodes[j].inputs, find_windows(nodes[j]) or (), strict=True):
            if not own or (value.name in outer and shares_bytes(value)):
                name = outer[value.name]
                reads.append((name, 0, memory.find(name, value.type.nbytes, at), memory.tags[name]))
                continue
            for window in own:
                for r in range(max(0, window.start(row)), min(value.type.shape[1], window.stop(row))):
                    name, found, wanted = find_row(value, r, col)
                    reads.append((name, r, found, wanted))

        def read() -> None:
            for name, r, found, wanted in reads:
                if not np.array_equal(found, wanted):
                    raise PlanError(f"{at}: row {row} of member {j} reads row {r} of %{name}, which is not there")

        read()
        for value in nodes[j].outputs:
            if value.name in sums:
                found = memory.find(outer[value.name], value.type.nbytes, at)
                if row + col and (found != so_far[value.name]).any():
                    raise PlanError(f"{at}: the sum %{value.name} is written over before row {row}")
                so_far[value.name] = min(so_far.values(), default=-1) - 1  # a tag of its own
                ends = last and row == count_rows(nodes[j]) - 1
                found[:] = memory.tags[outer[value.name]] if ends else so_far[value.name]
                continue
            if shares_bytes(value):
                if row == 0:
                    memory.find(outer[value.name], value.type.nbytes, at)[:] = memory.tags[outer[value.name]]
                continue
            _, found, wanted = find_row(value, row, col)
            found[:] = wanted
        read()  # a kernel writes while it reads

    def make(k: int) -> None:
        row, numbers = made[k], stream.steps[k]
        for demand in stream.demands[k]:
            while made[demand.maker] < demand.end(row):
                make(demand.maker)
        if made[k] > row:
            return  # a sum has taken it as soon as all was there
        width = nodes[numbers[0]].output.type.shape[2] if len(numbers) > 1 else 1
        step = columns if len(numbers) > 1 and isinstance(columns, int) else 1
        for col in range(0, width, step):
            for j in numbers:
                run(j, row, col, col + step >= width)
        made[k] += 1
        for s in stream.follow(k):
            while made[s] < heights[s] and all(made[d.maker] >= d.end(made[s]) for d in stream.awaits[s]):
                make(s)

    for k in (stream.last, *stream.rest):
        while made[k] < heights[k]:
            make(k)
    for value in (*node.body.outputs, *(m.output for m in nodes if m.op == "source")):
        k = makers[value.name]
        if made[k] < heights[k]:
            raise PlanError(f"{at}: only {made[k]} rows of %{value.name} are made")


def check_tiles(node: Node, tiles: Tiles, at: str) -> None:
    """Run a region tile by tile, as its C does, on memory in which every tile of a tensor remembers what it holds.

    Raises PlanError where a tile is read that is not there (any more), or a result is not complete.
    """
    assert node.body
    body, width = node.body, tiles.width
    line = range(0, max(stop for _, stop in tiles.spans), width)
    inner = {v.name: name for name, v in node.arguments.items()}
    place = {v.name: v.name for v in body.inputs}
    for result, value in node.results.items():
        taken = node.overwrites.get(value.name)
        place[result] = inner[taken.name] if taken else result
    held: dict[str, dict[int, str]] = {v.name: dict.fromkeys(line, v.name) for v in body.inputs}
    buffers: dict[str, tuple[str, int]] = dict.fromkeys(tiles.sizes, ("", -1))  # whose tile lies there
    added: dict[str, list[int]] = {}
    for tile in line:
        for k, (member, span) in enumerate(zip(body.nodes, tiles.spans, strict=True)):
            if not span[0] <= tile < span[1]:
                continue
            begins_with = find_start(member) if tile > span[0] and member.output.name not in tiles.cuts else None
            for value in member.inputs:
                name = value.name
                if name in buffers:
                    good = buffers[name] == (name, tile)
                elif value == begins_with:
                    good = True  # it is the sum so far
                else:
                    wanted = (tile,) if name in tiles.cuts else line
                    good = all(held.get(place.get(name, ""), {}).get(t) == name for t in wanted)
                if not good:
                    raise PlanError(
                        f"{at}: for tile {tile}, member {k} ({member.op}) reads %{name}, which is not there"
                    )
            for value in member.outputs:
                name = value.name
                if name in buffers:
                    buffers[name] = (name, tile)
                elif name in tiles.cuts:
                    held.setdefault(place[name], {})[tile] = name
                else:  # a sum, which nobody may read before the last tile
                    held[place[name]] = dict.fromkeys(line, name if tile == span[1] - width else "")
                    added.setdefault(name, []).append(tile)
    for k, member in enumerate(body.nodes):
        ends = [tiles.cuts[v.name].span(v) for v in member.inputs if v.name in tiles.cuts]
        for value in member.outputs:
            if value.name not in place:
                continue
            cut = tiles.cuts.get(value.name)
            start, stop = cut.span(value) if cut else (min(a for a, _ in ends), max(b for _, b in ends))
            found = [t for t in line if held[place[value.name]].get(t) == value.name] if cut else added[value.name]
            if found != list(range(start, stop, width)):
                raise PlanError(f"{at}: of the result of member {k}, %{value.name}, only tiles {found} are there")


class _Memory:
    """The arena and everything beside it, byte by byte."""

    def __init__(self, plan: Plan) -> None:
        self.arena = np.full(plan.arena_bytes, -1)
        self.offsets = plan.offsets | {f"scratch.{i}": offset for i, offset in plan.scratch.items()}
        self.storage: dict[str, np.ndarray] = {}  # of values outside of the arena
        self.tags: dict[str, np.ndarray] = {}  # what the bytes of a value must be
        self.authors: list[str] = []  # who wrote, in time ...
        self.firsts: list[int] = [0]  # ... and the first tag of each, one more than authors

    def find(self, name: str, size: int, at: str) -> np.ndarray:
        if name in self.storage:
            return self.storage[name]
        offset = self.offsets.get(name, -1)
        if offset < 0 or offset % 4 or offset + size > len(self.arena):
            raise PlanError(
                f"{at}: %{name}, {size} bytes at {offset}, does not fit an arena of {len(self.arena)} bytes"
            )
        return self.arena[offset : offset + size]

    def expect(self, name: str, size: int) -> None:
        """Tags for what will be written."""
        first = self.firsts[-1]
        self.tags[name] = np.arange(first, first + size)
        self.authors.append(name)
        self.firsts.append(first + size)

    def write(self, name: str, size: int, at: str) -> None:
        self.expect(name, size)
        self.find(name, size, at)[:] = self.tags[name]

    def read(self, name: str, at: str) -> None:
        found = self.find(name, len(self.tags[name]), at)
        for byte in np.flatnonzero(found != self.tags[name])[:1]:
            author = "nobody" if found[byte] < 0 else "%" + self.authors[bisect_right(self.firsts, found[byte]) - 1]
            raise PlanError(f"{at}: byte {byte} of %{name} was last written by {author}")

    def share(self, name: str, other: str, at: str) -> None:
        """``other`` is the same bytes as ``name``."""
        self.tags[other] = self.tags[name]
        if name in self.storage:
            self.storage[other] = self.storage[name]
        self.read(other, at)
