"""Gives every tensor its place in one static arena: lifetimes, lower bound, offsets, and a proof where there is one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf

from tte.ir import Graph, Value
from tte.ir.rows import find_stream, saved_bytes
from tte.ir.tiles import find_scratch

# Effort of CP-SAT in its own deterministic time (a unit is 5 to 60 s): the same plan on every machine, however slow.
EFFORT = 1.0
MANY = 300  # of more buffers a unit takes longer: they get less of it


@dataclass(frozen=True)
class Buffer:
    """Bytes [offset, offset + size) of the arena, taken from node ``birth`` to node ``death``, both included.

    name   the value that is born here (views and in-place results live in the same bytes), or "scratch.<node>"
    layer  the user's name of the layer of the node that makes it
    fixed  the offset that it must have; None: any
    """

    name: str
    layer: str
    size: int
    birth: int
    death: int
    offset: int = 0
    fixed: int | None = None

    @property
    def end(self) -> int:
        return self.offset + self.size

    def meets(self, other: "Buffer") -> bool:
        """Both are alive at some node."""
        return self.birth <= other.death and other.birth <= self.death


@dataclass(frozen=True)
class Plan:
    """Where everything lies while a program runs. Sizes and offsets in bytes, multiples of ``alignment``.

    lower_bound  the most bytes alive at one node: no placement needs less
    proof        why no placement is smaller: "bound" (the arena equals the lower bound), "search" (CP-SAT has excluded
                 every smaller arena), or "" (not proved)
    offsets      of every value in the arena, views and in-place results included
    scratch      node index -> offset of its kernel's scratch
    live         bytes alive at each node
    """

    arena_bytes: int
    lower_bound: int
    proof: str
    alignment: int
    buffers: tuple[Buffer, ...]
    offsets: dict[str, int]
    scratch: dict[int, int]
    live: tuple[int, ...]

    @property
    def proved(self) -> bool:
        return self.proof != ""

    @property
    def gap(self) -> int:
        return self.arena_bytes - self.lower_bound

    @property
    def peak_node(self) -> int:
        """The first node at which most bytes are alive."""
        return self.live.index(self.lower_bound) if self.live else 0

    @property
    def peak(self) -> tuple[Buffer, ...]:
        """The buffers alive at the peak, largest first."""
        alive = [b for b in self.buffers if b.birth <= self.peak_node <= b.death]
        return tuple(sorted(alive, key=lambda b: (-b.size, b.offset)))


def plan_memory(
    graph: Graph,
    scratch: Mapping[int, int] | None = None,
    alignment: int = 4,
    hold_input: bool = False,
    input_offset: int | None = None,
    most: float = inf,
) -> Plan:
    """Place all that ``graph`` keeps in the arena.

    scratch: node index -> bytes that its kernel needs while it runs, by default ``find_scratch``. Graph inputs are the
    caller's memory; with ``hold_input`` the first lies in the arena up to its last use, at ``input_offset`` if that is
    given. Params and constants have storage of their own, also for results computed in place of a param. An arena of
    more than ``most`` bytes is of no use: where there is no smaller one, any will do.
    """
    scratch = find_scratch(graph) if scratch is None else scratch
    owners = graph.owners()
    held = graph.inputs[:1] if hold_input else ()
    buffers = find_buffers(graph, owners, scratch, alignment, held, input_offset)
    pairs = find_pairs(graph, owners, buffers)
    live = count_live(graph, buffers, pairs)
    bound = max(live, default=0)
    placed, proof = place(buffers, bound, alignment, pairs, most)
    offset = {b.name: b.offset for b in placed}
    return Plan(
        arena_bytes=max((b.end for b in placed), default=0),
        lower_bound=bound,
        proof=proof,
        alignment=alignment,
        buffers=placed,
        offsets={name: offset[owner] for name, owner in owners.items() if owner in offset},
        scratch={i: offset[_scratch_name(i)] for i in scratch if _scratch_name(i) in offset},
        live=live,
    )


def find_lower_bound(graph: Graph, hold_input: bool = False) -> int:
    """The most bytes alive at one node of what ``plan_memory`` would place."""
    owners = graph.owners()
    buffers = find_buffers(graph, owners, find_scratch(graph), 4, graph.inputs[:1] if hold_input else ())
    return max(count_live(graph, buffers, find_pairs(graph, owners, buffers)), default=0)


def count_live(graph: Graph, buffers: Sequence[Buffer], pairs: Sequence["Pair"]) -> tuple[int, ...]:
    """Bytes alive at each node."""
    return tuple(
        sum(b.size for b in buffers if b.birth <= i <= b.death) - sum(p.saved for p in pairs if p.node == i)
        for i in range(len(graph.nodes))
    )


def plan_together(graphs: Sequence[Graph], hold_input: bool = False) -> list[Plan]:
    """Plans of programs that run in one arena; with ``hold_input`` the input has the same offset in each of them.

    That is where the first program likes it best. If another one then needs more bytes than the first, they lead in
    turn, and the start of the arena is tried as well.
    """
    if not hold_input:
        return [plan_memory(graph) for graph in graphs]
    tried = []
    for leader in graphs:
        first = plan_memory(leader, hold_input=True)
        place = first.offsets[leader.inputs[0].name]
        tried.append([first if g is leader else plan_memory(g, hold_input=True, input_offset=place) for g in graphs])
        if _arena_bytes(tried[-1]) == first.arena_bytes:
            return tried[-1]
    tried.append([plan_memory(g, hold_input=True, input_offset=0) for g in graphs])
    return min(tried, key=_arena_bytes)


def _arena_bytes(plans: Sequence[Plan]) -> int:
    """Bytes of the arena that all of these programs fit."""
    return max(plan.arena_bytes for plan in plans)


@dataclass(frozen=True)
class Pair:
    """Two buffers (by number) that may overlap: ``born`` is written, by rows, over ``dying`` at ``node``, if it lies at
    least ``shift`` bytes below; that saves ``saved`` bytes there."""

    node: int
    dying: int
    born: int
    shift: int
    saved: int


def find_pairs(graph: Graph, owners: Mapping[str, str], buffers: Sequence[Buffer]) -> tuple[Pair, ...]:
    """Of each node that runs by rows the pair of an operand and the first result that saves most."""
    number = {b.name: k for k, b in enumerate(buffers)}
    pairs = []
    for i, node in enumerate(graph.nodes):
        stream = find_stream(node)
        if stream is None or node.body is None or owners[node.output.name] != node.output.name:
            continue
        born = number[node.output.name]
        found = []
        for inner, value in node.arguments.items():
            dying = number.get(owners[value.name], -1)
            if inner in stream.shifts and dying >= 0 and buffers[dying].death == i:
                saved = saved_bytes(buffers[dying].size, buffers[born].size, stream.shifts[inner])
                # An operand that is only the front of its buffer would say too little.
                if saved > 0 and _align(value.type.nbytes, 4) == buffers[dying].size:
                    found.append(Pair(i, dying, born, stream.shifts[inner], saved))
        pairs += sorted(found, key=lambda p: -p.saved)[:1]
    return tuple(pairs)


def find_buffers(
    graph: Graph,
    owners: Mapping[str, str],
    scratch: Mapping[int, int],
    alignment: int,
    held: Sequence[Value] = (),
    fixed: int | None = None,
) -> tuple[Buffer, ...]:
    """What has to be placed, in order of birth. What outlives the program is alive up to the last node."""
    death: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        death |= {owners[v.name]: i for v in (*node.inputs, *node.outputs)}
    for value in graph.lasting:
        death[owners[value.name]] = len(graph.nodes) - 1
    buffers = [Buffer(v.name, "", _align(v.type.nbytes, alignment), 0, death.get(v.name, 0), fixed=fixed) for v in held]
    for i, node in enumerate(graph.nodes):
        for value in node.outputs:
            if owners[value.name] == value.name:
                size = _align(value.type.nbytes, alignment)
                buffers.append(Buffer(value.name, node.layer, size, i, death[value.name]))
        if scratch.get(i):
            buffers.append(Buffer(_scratch_name(i), node.layer, _align(scratch[i], alignment), i, i))
    return tuple(buffers)


def place(
    buffers: Sequence[Buffer], bound: int, alignment: int = 4, pairs: Sequence[Pair] = (), most: float = inf
) -> tuple[tuple[Buffer, ...], str]:
    """The buffers with offsets, and the proof (see ``Plan``): greedy in several orders, then CP-SAT."""
    below = {(p.born, p.dying): p.shift for p in pairs}
    meets = [[j for j, other in enumerate(buffers) if j != i and b.meets(other)] for i, b in enumerate(buffers)]
    floor = max([bound, *(b.fixed + b.size for b in buffers if b.fixed is not None)])
    best: list[int] = []
    height = -1
    for key, strategy in product(SORT_KEYS, (_fill, _stack)):
        order = sorted(range(len(buffers)), key=lambda i: (buffers[i].fixed is None, key(buffers[i]), i))
        offsets = strategy(buffers, meets, order, below)
        top = max((o + b.size for o, b in zip(offsets, buffers, strict=True)), default=0)
        if height < 0 or top < height:
            best, height = offsets, top
        if height == floor:
            break
    best, height, proved = _search(buffers, best, floor, height, alignment, pairs, most)
    free = all(b.fixed is None for b in buffers)  # else only placements that agree with that are excluded
    return _at(buffers, best), "bound" if height == bound else "search" if proved and free else ""


SortKey = Callable[[Buffer], tuple[int, ...]]
SORT_KEYS: tuple[SortKey, ...] = (
    lambda b: (-b.size, b.birth),
    lambda b: (b.birth - b.death, -b.size),
    lambda b: ((b.birth - b.death - 1) * b.size, b.birth),
    lambda b: (b.birth, -b.size),
    lambda b: (-b.death, -b.size),
)


Below = Mapping[tuple[int, int], int]  # (born, dying) -> how far below, see ``Pair``


def _fill(buffers: Sequence[Buffer], meets: Sequence[Sequence[int]], order: Sequence[int], below: Below) -> list[int]:
    """Each buffer in turn at the lowest offset that is free while it lives."""
    offsets = [-1] * len(buffers)
    for i in order:
        offset = buffers[i].fixed or 0
        for low, high in sorted(_between(buffers, offsets, i, j, below) for j in meets[i] if offsets[j] >= 0):
            if offset <= low:
                break
            offset = max(offset, high)
        offsets[i] = offset
    return offsets


def _between(buffers: Sequence[Buffer], offsets: Sequence[int], i: int, j: int, below: Below) -> tuple[int, int]:
    """Buffer i may not begin between these offsets, because of j."""
    low = offsets[j] - below.get((i, j), buffers[i].size)
    return low, offsets[j] + below.get((j, i), buffers[j].size)


def _stack(buffers: Sequence[Buffer], meets: Sequence[Sequence[int]], order: Sequence[int], below: Below) -> list[int]:
    """Always next the buffer that can stand lowest on those it meets; ``order`` decides ties."""
    offsets = [b.fixed or 0 for b in buffers]
    left = dict.fromkeys(order)
    while left:
        i = min(left, key=lambda j: (buffers[j].fixed is None, offsets[j]))  # the first of the lowest
        del left[i]
        for j in meets[i]:
            if j in left:
                offsets[j] = max(offsets[j], offsets[i] + below.get((i, j), buffers[i].size))
    return offsets


def _search(
    buffers: Sequence[Buffer],
    best: list[int],
    bound: int,
    height: int,
    alignment: int,
    pairs: Sequence[Pair],
    most: float,
) -> tuple[list[int], int, bool]:
    """The lowest placement between ``bound`` and ``height`` (which ``best`` has), and whether lower ones are excluded.

    First asks for the bound itself, then bisects: questions with a fixed height are far easier than minimisation. Each
    is asked from the bottom up first, in one order after the other: that finds most answers at once. What it does not
    decide is left to CP-SAT's own search, for half of the effort that is left; a question without an answer counts as a
    no that proves nothing. The first of these is asked from the bottom up once more, for longer.
    """
    total = EFFORT * min(1.0, MANY / max(1, len(buffers)))
    trial, left, proved = bound, total, True

    def ask_upwards(effort: float) -> tuple[str, list[int]]:
        answers = (_fit(buffers, trial, alignment, pairs, effort, key)[:2] for key in SORT_KEYS)
        return next((answer for answer in answers if answer[0] != "UNKNOWN"), ("UNKNOWN", []))

    while bound < height and bound <= most and left > total / 16:
        status, offsets = ask_upwards(total / 100)
        if status == "UNKNOWN":
            status, offsets, effort = _fit(buffers, trial, alignment, pairs, left / 2)
            left -= effort
        if status == "UNKNOWN" and proved:
            status, offsets = ask_upwards(total / 40)
        if offsets:
            best, height = offsets, max(o + b.size for o, b in zip(offsets, buffers, strict=True))
        else:
            bound, proved = trial + alignment, proved and status == "INFEASIBLE"
        trial = bound + int(min(height, most + alignment) - bound) // alignment // 2 * alignment
    return best, height, proved and bound >= height


def _fit(
    buffers: Sequence[Buffer],
    height: int,
    alignment: int,
    pairs: Sequence[Pair],
    effort: float,
    upwards: SortKey | None = None,
) -> tuple[str, list[int], float]:
    """Offsets below ``height``, or none, and the effort: rectangles, time x bytes, must not overlap, but for pairs.

    What is written over ends one step early among the rectangles, and has its last step with each other one by one.
    upwards: always place next what can lie lowest, as low as it can, ties in this order; None: as CP-SAT likes
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    starts, times, places = [], [], []
    dying = {p.dying for p in pairs}
    for i, buffer in enumerate(buffers):
        size = buffer.size // alignment
        least, most = (0, height - buffer.size) if buffer.fixed is None else (buffer.fixed, buffer.fixed)
        starts.append(model.new_int_var(least // alignment, most // alignment, f"offset{i}"))
        length = buffer.death - buffer.birth + (i not in dying)
        times.append(model.new_fixed_size_interval_var(buffer.birth, length, f"time{i}"))
        places.append(model.new_fixed_size_interval_var(starts[i], size, f"place{i}"))
    model.add_no_overlap_2d(times, places)
    for pair in pairs:
        for j, other in enumerate(buffers):
            if j == pair.dying or not other.birth <= pair.node <= other.death:
                continue
            above, under = model.new_bool_var(""), model.new_bool_var("")
            room = _align(pair.shift, alignment) if j == pair.born else other.size
            model.add(starts[j] + room // alignment <= starts[pair.dying]).only_enforce_if(under)
            model.add(starts[pair.dying] + buffers[pair.dying].size // alignment <= starts[j]).only_enforce_if(above)
            model.add_bool_or(above, under)
    solver = cp_model.CpSolver()
    solver.parameters.random_seed = 1
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = effort
    if upwards is not None:
        order = sorted(range(len(buffers)), key=lambda i: upwards(buffers[i]))
        strategy = (cp_model.CHOOSE_LOWEST_MIN, cp_model.SELECT_MIN_VALUE)
        model.add_decision_strategy([starts[i] for i in order], *strategy)
        solver.parameters.search_branching = cp_model.FIXED_SEARCH
    status = solver.status_name(solver.solve(model))
    found = status in ("OPTIMAL", "FEASIBLE")
    offsets = [solver.value(start) * alignment for start in starts] if found else []
    return status, offsets, solver.response_proto.deterministic_time


def _at(buffers: Sequence[Buffer], offsets: Sequence[int]) -> tuple[Buffer, ...]:
    return tuple(replace(b, offset=o) for b, o in zip(buffers, offsets, strict=True))


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _scratch_name(node: int) -> str:
    return f"scratch.{node}"
