"""Computes some forward results a second time, just before the backward pass reads them, so that nobody keeps them."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd, isqrt
from typing import Any

from tte.errors import TTEError
from tte.ir import Graph, Node, Value, rewrite
from tte.passes.costs import ANY, Arena
from tte.passes.inplace import find_owners, is_view
from tte.passes.reorder import find_problem
from tte.passes.stream import find_least

EFFORT = 10.0  # of one question to CP-SAT, in its own deterministic time
LARGEST = 40_000  # variables of such a question; beyond, the heuristic answers alone
CHOICES = 12  # that one step of the heuristic compares


@dataclass(frozen=True)
class Schedule:
    """What is executed, in order: indices into ``graph.nodes``, views left out; a second occurrence computes again.

    peak   most bytes alive at one node, operators working in place wherever they may
    macs   extra multiply-accumulates
    bound  no schedule within the limit has fewer of them, among those that compute forward nodes at most twice, the
           second time behind the loss, and leave the order of the others as it is
    """

    nodes: tuple[int, ...]
    peak: int
    macs: int
    bound: int

    @property
    def proved(self) -> bool:
        return self.macs == self.bound


def recompute(graph: Graph, limit: int) -> Graph:
    """The same program with at most ``limit`` bytes alive at a node, for the fewest extra multiply-accumulates found.

    Comes behind ``reorder`` and before ``work_in_place``. Every number is what it was: the same operators read the same
    operands. Raises TTEError (E049) when no way was found.
    """
    return execute(graph, find_schedule(graph, limit).nodes)


def recompute_forward(graph: Graph, arena: Arena = ANY) -> Graph:
    """``recompute`` a training step, if that may be done and has to be.

    Where that is not enough, with as few bytes as were found.
    """
    done = any("again" in node.attrs for node in graph.nodes)  # by regions of the backward
    if not (arena.may_recompute and graph.updates) or done or find_least(graph, arena) <= arena.limit:
        return graph
    try:
        return recompute(graph, arena.limit)
    except TTEError:
        line = _Line(graph)
        return execute(graph, [line.work[t] for t in _find_lowest(line)])


def pareto(graph: Graph, points: int = 10) -> tuple[tuple[int, int], ...]:
    """(bytes at the peak, extra multiply-accumulates), from none to the smallest peak found; neither falls for free."""
    line = _Line(graph)
    first, order = line.peak(line.tasks), _find_lowest(line)
    least = line.peak(order)
    orders: list[Sequence[int]] = [line.tasks, order]
    for i in range(points):
        limit = least + (first - least) * i // points
        order, _ = _find_cheapest(line, limit, _guess(line, limit) or order)
        orders.append(order)
    front: list[tuple[int, int]] = []
    for macs, peak in sorted((line.extra(o), line.peak(o)) for o in orders):
        if not front or peak < front[-1][0]:
            front.append((peak, macs))
    return tuple(front)


def find_schedule(graph: Graph, limit: int) -> Schedule:
    """The cheapest schedule found that keeps within ``limit`` bytes. Deterministic: effort is counted, not timed."""
    line = _Line(graph)
    order: Sequence[int] = line.tasks
    bound = 0
    if line.peak(order) > limit:
        fits = max(line.working_sets()) <= limit
        order = (fits and _guess(line, limit)) or _find_lowest(line)
        least = line.peak(order)
        if least > limit:
            what = f"{least:,} bytes are alive at once even if results are computed twice, {limit:,} are allowed"
            raise TTEError("TTE-E049", what, where=graph.name, fix=f"allow {least:,} bytes, or train less")
        order, bound = _find_cheapest(line, limit, order)
    peak = line.peak(order)
    return Schedule(tuple(line.work[t] for t in order), peak, line.extra(order), bound)


def execute(graph: Graph, nodes: Sequence[int]) -> Graph:
    """The graph that executes these nodes; readers get the latest copy, and views are made where they are read."""
    made: dict[str, Value] = {v.name: v for v in (*graph.inputs, *graph.params, *graph.consts)}
    views = {node.output.name: node for node in graph.nodes if is_view(node)}
    viewed: dict[tuple[str, str], Value] = {}
    done: list[Node] = []
    count = 0

    def add(node: Node, inputs: Iterable[Value]) -> tuple[Value, ...]:
        nonlocal count
        outputs = tuple(Value(f"~{count + i}", v.type) for i, v in enumerate(node.outputs))
        count += len(outputs)
        done.append(replace(node, inputs=tuple(inputs), outputs=outputs))
        return outputs

    def latest(value: Value) -> Value:
        view = views.get(value.name)
        if view is None:
            return made[value.name]
        source = latest(view.inputs[0])
        if (value.name, source.name) not in viewed:
            viewed[value.name, source.name] = add(view, [source])[0]
        return viewed[value.name, source.name]

    for i in nodes:
        node = graph.nodes[i]
        outputs = add(node, [latest(v) for v in node.inputs])
        made |= {old.name: new for old, new in zip(node.outputs, outputs, strict=True)}
    results = tuple(latest(v) for v in graph.outputs)
    updates = tuple((p, latest(v)) for p, v in graph.updates)
    return rewrite(graph, done, outputs=results, updates=updates)


class _Line:
    """The tasks of a graph (all nodes but views) in their order, and what may be computed a second time.

    start   the first task behind the loss
    able    tasks before it that may come a second time; values: the buffers they make
    groups  the tasks behind the loss, put together where none reads ``values``; what comes a second time comes just
            before a group
    last    value -> the last group that may need it or in front of which it may be read, -1 if none
    slots   able task -> the groups in front of which it may come again
    size    how many variables a question about it has
    dying   buffer -> the last task that reads it; of ``values``, that reads it before the loss is known
    """

    def __init__(self, graph: Graph) -> None:
        self.work = [i for i, node in enumerate(graph.nodes) if not is_view(node)]
        self.problem = p = find_problem(graph, self.work)
        nodes = [graph.nodes[i] for i in self.work]
        owners = find_owners(graph)
        task_of = {v.name: t for t, node in enumerate(nodes) for v in node.outputs}
        self.tasks = range(len(nodes))
        self.macs = [node.macs for node in nodes]
        self.maker = {b: t for t, buffers in enumerate(p.writes) for b in buffers}
        self.start = 1 + task_of.get(owners[graph.outputs[0].name], len(nodes)) if graph.outputs else len(nodes)
        updates = {owners[p.name]: task_of[owners[v.name]] for p, v in graph.updates if owners[v.name] in task_of}
        self.able: list[int] = []
        self.values: set[int] = set()
        for t in self.tasks[: self.start]:
            whole = len(p.writes[t]) == len(nodes[t].outputs) and t not in updates.values()
            known = all(p.kept[b] or b in self.values for b in p.reads[t])
            if whole and known and not any(p.kept[b] for b in p.writes[t]):
                self.able.append(t)
                self.values.update(p.writes[t])
        self.groups: list[range] = []
        alone = True
        for t in self.tasks[self.start :]:
            reads = not self.values.isdisjoint(p.reads[t])
            if reads or alone:
                self.groups.append(range(t, t + 1))
            else:
                self.groups[-1] = range(self.groups[-1].start, t + 1)
            alone = reads
        self.group_of = group_of = {t: g for g, tasks in enumerate(self.groups) for t in tasks}
        self.last: dict[int, int] = {}
        self.slots: dict[int, range] = {}
        for t in reversed(self.able):
            for b in p.writes[t]:
                direct = [group_of[r] for r in p.readers[b] if r >= self.start]
                self.last[b] = max(
                    [*direct, *(self.slots[r].stop - 1 for r in p.readers[b] if r in self.slots)], default=-1
                )
            # What it reads must be as it was: it comes before the update. Rows of the input come only once.
            until = min((updates.get(owners[v.name], len(nodes)) for v in nodes[t].inputs), default=len(nodes))
            body = nodes[t].body
            if "source" in [node.op for node in (body.nodes if body else [nodes[t]])]:
                until = -1
            before = sum(tasks.start <= until for tasks in self.groups)
            self.slots[t] = range(min(before, 1 + max(self.last[b] for b in p.writes[t])))
        self.size = sum(map(len, self.slots.values())) + sum(2 + g for g in self.last.values())
        self.dying = {}
        for b, t in self.maker.items():
            readers = [r for r in p.readers[b] if b not in self.values or r < self.start]
            self.dying[b] = len(nodes) if p.kept[b] else max(readers, default=t)
        change = [0] * (len(nodes) + 2)
        for b, t in self.maker.items():
            change[t] += p.sizes[b]
            change[self.dying[b] + 1] -= p.sizes[b]
        # Bytes alive at each task if as little as possible of ``values`` is kept for the backward pass.
        self.fixed = [live + more for live, more in zip(accumulate(change), p.scratch, strict=False)]
        for t in self.tasks:
            if any(b not in self.values and self.dying[b] == t for b in p.reusable[t]):
                self.fixed[t] -= self.first_size(t)

    def first_size(self, t: int) -> int:
        return self.problem.sizes[self.problem.writes[t][0]]

    def may_overwrite(self, t: int) -> list[int]:
        """The values that task ``t`` overwrites if nobody needs them later; none where it overwrites another buffer."""
        p = self.problem
        if any(b not in self.values and self.dying[b] == t for b in p.reusable[t]):
            return []
        return [b for b in p.reusable[t] if b in self.values and (t >= self.start or self.dying[b] == t)]

    def across(self, group: int) -> int:
        """Bytes alive just before a group, without ``values``."""
        t = self.groups[group].start
        others = (b for b, made in self.maker.items() if b not in self.values and made < t <= self.dying[b])
        return sum(self.problem.sizes[b] for b in others)

    def working_sets(self) -> list[int]:
        """Bytes that are alive at each task whatever is computed twice."""
        p = self.problem
        result = []
        for t in self.tasks:
            read = sum(p.sizes[b] for b in p.reads[t] if b in self.values) if t >= self.start else 0
            result.append(self.fixed[t] + read - (self.first_size(t) if self.may_overwrite(t) else 0))
        return result

    def copies(self, order: Sequence[int]) -> dict[tuple[int, int], int]:
        """Buffer and where it is made -> where it is read last, in an order in which tasks may come twice."""
        p = self.problem
        latest: dict[int, int] = {}
        ends: dict[tuple[int, int], int] = {}
        for at, t in enumerate(order):
            for b in p.reads[t]:
                ends[b, latest[b]] = max(at, ends[b, latest[b]])
            for b in p.writes[t]:
                latest[b] = at
                ends[b, at] = len(order) if p.kept[b] else at
        return ends

    def heights(self, order: Sequence[int]) -> list[int]:
        """Bytes alive at each task of the order."""
        p = self.problem
        change = [0] * (len(order) + 2)
        last: set[tuple[int, int]] = set()
        for (b, birth), end in self.copies(order).items():
            change[birth] += p.sizes[b]
            change[end + 1] -= p.sizes[b]
            last.add((b, end))
        result = []
        for at, (t, live) in enumerate(zip(order, accumulate(change), strict=False)):
            overwrites = any((b, at) in last for b in p.reusable[t])
            result.append(live + p.scratch[t] - (self.first_size(t) if overwrites else 0))
        return result

    def peak(self, order: Sequence[int]) -> int:
        return max(self.heights(order), default=0)

    def repeats(self, order: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Position, task, and the group in front of which it comes a second time."""
        group = 0
        for at, t in enumerate(order[self.start :], self.start):
            if t < self.start:
                yield at, t, group
            else:
                group = self.group_of[t] + 1

    def extra(self, order: Sequence[int]) -> int:
        return sum(self.macs[t] for t in order) - sum(self.macs)

    def on_demand(self, dropped: Set[int]) -> list[int] | None:
        """The order that computes these values again when they are first needed behind the loss; None if too late."""
        order = list(self.tasks[: self.start])
        missing = set(dropped)

        def provide(b: int, group: int) -> bool:
            t = self.maker[b]
            if group not in self.slots[t]:
                return False
            for source in self.problem.reads[t]:
                if source in missing and not provide(source, group):
                    return False
            order.append(t)
            missing.difference_update(self.problem.writes[t])
            return True

        for g, tasks in enumerate(self.groups):
            for b in sorted(missing.intersection(self.problem.reads[tasks.start])):
                if b in missing and not provide(b, g):
                    return None
            order.extend(tasks)
        return order


def _find_lowest(line: _Line) -> list[int]:
    """The order of least peak found."""
    orders = [order for dropped in _beginnings(line) if (order := line.on_demand(dropped)) is not None]
    order = min(orders, key=lambda order: line.peak(order))
    return _search(line, None, order)[0] if line.size <= LARGEST else order


def _find_cheapest(line: _Line, limit: int, start: Sequence[int]) -> tuple[list[int], int]:
    """The cheapest order within ``limit`` found, and what none is cheaper than. start: an order within the limit."""
    if line.size > LARGEST:
        return list(start), 0
    order, bound = _search(line, limit, start)
    assert line.peak(order) <= limit, "what is alive is what was stated"
    return order, bound


def _guess(line: _Line, limit: int) -> list[int] | None:
    """A cheap order within ``limit``: from several beginnings, drop what saves most for the least."""
    orders = [order for dropped in _beginnings(line) if (order := _repair(line, limit, dropped))]
    return min(orders, key=line.extra, default=None)


def _beginnings(line: _Line) -> Iterator[set[int]]:
    """Values to drop: none; all but those alive where the forward pass is cut into pieces of about the same bytes."""
    needed = sorted(b for b in line.values if line.last[b] >= 0 and line.slots[line.maker[b]])
    total = list(accumulate(line.problem.sizes[b] for b in needed))
    yield set()
    for pieces in sorted({isqrt(len(needed)) * share // 4 for share in range(1, 9)} - {0, 1}):
        cuts = [line.maker[needed[bisect_left(total, total[-1] * i // pieces)]] for i in range(1, pieces)]
        yield {b for b in needed if not any(line.maker[b] <= cut < line.dying[b] for cut in cuts)}


def _repair(line: _Line, limit: int, dropped: set[int]) -> list[int] | None:
    """Drop, or keep, one value after the other of those that wait at the peak; at the end keep all that may be kept."""

    def excess(order: Sequence[int]) -> int:
        return sum(max(0, height - limit) for height in line.heights(order))

    def worth(b: int) -> tuple[float, int]:
        return line.problem.sizes[b] / (1 + line.macs[line.maker[b]]), b

    order = line.on_demand(dropped)
    if order is None:
        return None
    over, macs = excess(order), line.extra(order)
    while over:
        heights = line.heights(order)
        at = heights.index(max(heights))
        waiting = {
            b for (b, birth), end in line.copies(order).items() if birth < at < end and line.last.get(b, -1) >= 0
        }
        ways = []
        for group in (waiting & dropped, waiting - dropped):
            for b in sorted(group, key=worth)[-CHOICES:]:
                changed = line.on_demand(dropped ^ {b})
                if changed is not None and (less := over - excess(changed)) > 0:
                    ways.append((less / max(1, line.extra(changed) - macs), b, changed))
        if not ways:
            return None
        _, b, order = max(ways, key=lambda way: way[:2])
        dropped = dropped ^ {b}
        over, macs = excess(order), line.extra(order)
    for b in sorted(dropped, key=lambda b: (-line.macs[line.maker[b]], b)):
        changed = line.on_demand(dropped - {b})
        if changed is not None and line.extra(changed) <= macs and not excess(changed):
            dropped, order, macs = dropped - {b}, changed, line.extra(changed)
    return order


class _Question:
    """What to execute when, put to CP-SAT: the cheapest order within ``limit``; without one, the order of least peak.

    again[t, g]  task t is executed once more just before group g
    alive[b, g]  value b is there while group g runs; group -1: when the loss is known
    What is alive between two groups is stated only where an answer breaks the limit (``refine``).
    """

    def __init__(self, line: _Line, limit: int | None, start: Sequence[int]) -> None:
        from ortools.sat.python import cp_model

        p = line.problem
        self.line, self.model, self.given = line, cp_model.CpModel(), limit
        self.unit = gcd(*p.sizes, *p.scratch) or 1
        highest = line.peak(start) // self.unit
        self.limit = self.model.new_int_var(0, highest, "limit") if limit is None else limit // self.unit
        self.again = {(t, g): self.model.new_bool_var(f"again{t},{g}") for t in line.able for g in line.slots[t]}
        self.alive = {
            (b, g): self.model.new_bool_var(f"alive{b},{g}")
            for b in sorted(line.values)
            for g in range(-1, line.last[b] + 1)
        }
        self.stated: set[tuple[int, int]] = set()
        self._link()
        self._hint(start)
        for t in line.tasks[: line.start]:
            kept = [(p.sizes[b], self._alive(b, -1)) for b in line.values if max(line.maker[b], line.dying[b]) < t]
            self._bound(t, line.fixed[t], kept, {b: [self._alive(b, -1)] for b in line.may_overwrite(t)})
        for g, tasks in enumerate(line.groups):
            there = [(p.sizes[b], self._alive(b, g)) for b in line.values]
            # Computed again just behind the group, it is another copy that is needed later.
            later = {
                b: [v - self._made(b, g + 1) for v in (self._alive(b, g + 1), *self._reads(b, g + 1))]
                for b in line.may_overwrite(tasks.start)
            }
            self._bound(tasks.start, max(line.fixed[t] for t in tasks), there, later)
        # Fewest multiply-accumulates, then fewest nodes.
        self.step = gcd(*(line.macs[t] for t in line.able)) or 1
        self.weight = len(line.able) + 1
        cost = sum((line.macs[t] // self.step * self.weight + 1) * again for (t, _), again in self.again.items())
        self.model.minimize(self.limit if limit is None else cost)

    def _alive(self, b: int, g: int) -> Any:
        return self.alive.get((b, g), 0)

    def _made(self, b: int, g: int) -> Any:
        return self.again.get((self.line.maker[b], g), 0)

    def _reads(self, b: int, g: int, after: int = -1) -> list[Any]:
        """What says that ``b`` is read between groups g - 1 and g, by tasks behind ``after``."""
        return [self.again[t, g] for t in self.line.problem.readers[b] if t > after and (t, g) in self.again]

    def _link(self) -> None:
        """Nothing is read that is not there, nothing is made for nothing."""
        line, p, model = self.line, self.line.problem, self.model
        for (b, g), alive in self.alive.items():
            if g >= 0:
                model.add(alive <= self._alive(b, g - 1) + self._made(b, g))
                if line.groups[g].start in p.readers[b]:
                    model.add(alive == 1)
        for t in line.able:
            model.add_at_most_one(self.again[t, g] for g in line.slots[t])
        for (t, g), again in self.again.items():
            for b in line.values.intersection(p.reads[t]):
                model.add(again <= self._alive(b, g - 1) + self._made(b, g))
            model.add(again <= sum(sum([self._alive(b, g), *self._reads(b, g)]) for b in p.writes[t]))

    def _hint(self, order: Sequence[int]) -> None:
        """Where the search begins."""
        line, p = self.line, self.line.problem
        again = {(t, g) for _, t, g in line.repeats(order)}
        position = {line.group_of[t]: at for at, t in enumerate(order) if t in line.group_of} | {-1: line.start - 1}
        spans: dict[int, list[list[int]]] = {}
        for at, t in enumerate(order):
            for b in p.reads[t]:
                spans[b][-1][1] = at
            for b in p.writes[t]:
                spans.setdefault(b, []).append([at, at])
        for key, variable in self.again.items():
            self.model.add_hint(variable, key in again)
        for (b, g), variable in self.alive.items():
            at = position[g]
            self.model.add_hint(variable, any(a <= at < z or (g >= 0 and z == at) for a, z in spans[b]))

    def _bound(self, t: int, fixed: int, there: list[Any], later: dict[int, list[Any]], when: Any = None) -> None:
        """What is alive while task ``t`` runs fits. later: what it may overwrite, with what says that it must not."""
        parts = [(size, variable) for size, variable in there if not isinstance(variable, int)]
        live = fixed // self.unit + sum(size // self.unit * variable for size, variable in parts)
        if later:
            ends = []
            for variables in later.values():
                ends.append(self.model.new_bool_var(""))
                for variable in variables:
                    self.model.add(ends[-1] + variable <= 1)
            saves = self.model.new_bool_var("")
            self.model.add(saves <= sum(ends))
            live -= self.line.first_size(t) // self.unit * saves
        if isinstance(live, int) and isinstance(self.limit, int):
            assert live <= self.limit, "the working set fits"
            return
        stated = self.model.add(live <= self.limit)
        if when is not None:
            stated.only_enforce_if(when)

    def refine(self, order: Sequence[int], limit: int) -> bool:
        """State what is alive where a task comes again in more than ``limit`` bytes; False where none does."""
        heights, found = self.line.heights(order), False
        for at, t, g in self.line.repeats(order):
            if heights[at] > limit and (t, g) not in self.stated:
                self.stated.add((t, g))
                self._bound_again(t, g)
                found = True
        return found

    def _bound_again(self, t: int, g: int) -> None:
        line, p = self.line, self.line.problem
        fixed = line.across(g) + p.scratch[t] + sum(p.sizes[b] for b in {*p.writes[t], *p.reads[t]} & line.values)
        there = []
        for b in sorted(line.values.difference(p.writes[t], p.reads[t])):
            needed = [self._alive(b, g), *self._reads(b, g, after=t)]
            present = self.model.new_bool_var("")
            there.append((p.sizes[b], present))
            for variable in needed:
                if line.maker[b] < t:
                    self.model.add(present >= variable)
                else:  # not made again before t: it is there if it was
                    self.model.add(present >= variable + self._alive(b, g - 1) - 1 - self._made(b, g))
        later = {b: [self._alive(b, g), *self._reads(b, g, after=t)] for b in line.values.intersection(p.reusable[t])}
        self._bound(t, fixed, there, later, self.again[t, g])

    def ask(self, effort: float) -> tuple[list[int] | None, int, float]:
        """An order or None, what no order is better than (multiply-accumulates or bytes), the effort it took."""
        from ortools.sat.python import cp_model

        solver = cp_model.CpSolver()
        solver.parameters.random_seed = 1
        solver.parameters.num_workers = 1
        solver.parameters.linearization_level = 2 if self.given is not None else 1  # a proof of cost is a linear one
        solver.parameters.max_deterministic_time = effort
        status = solver.solve(self.model)
        bound = round(solver.best_objective_bound)
        if self.given is None:
            bound *= self.unit
        else:
            bound = max(0, -((self.weight - 1 - bound) // self.weight)) * self.step
        took = solver.response_proto.deterministic_time
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, bound, took
        again: dict[int, list[int]] = {}
        for (t, g), variable in self.again.items():
            if solver.value(variable):
                again.setdefault(g, []).append(t)
        order = list(self.line.tasks[: self.line.start])
        for g, tasks in enumerate(self.line.groups):
            order += [*again.get(g, ()), *tasks]
        return order, bound, took


def _search(line: _Line, limit: int | None, start: Sequence[int]) -> tuple[list[int], int]:
    """An order no worse than ``start``, and what no order is better than."""
    question = _Question(line, limit, start)
    best, bound, effort = list(start), 0, EFFORT
    while effort > 0:
        order, proved, took = question.ask(effort)
        bound, effort = max(bound, proved), effort - max(took, EFFORT / 1000)
        if order is None:
            break
        if limit is None and line.peak(order) < line.peak(best):
            best = order
        if not question.refine(order, bound if limit is None else limit):
            if limit is not None:
                best = min(best, order, key=lambda o: (line.extra(o), len(o)))
            break
    return best, bound
