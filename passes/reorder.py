"""Finds the order of execution that keeps the fewest bytes alive, and says when there is no better one."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from tte.ir import Graph, Node, rewrite
from tte.ir.tiles import scratch_bytes
from tte.passes.inplace import find_candidates, find_owners, is_view

STATES = 2000  # effort of one search: how many sets of executed nodes it may look at
ALIGNMENT = 4  # of buffers, in bytes


@dataclass(frozen=True)
class Order:
    """A permutation of ``graph.nodes``: indices in execution order, the bytes alive at the peak, and whether it is
    proved that no other order has a smaller peak. Operators count as working in place wherever they may."""

    nodes: tuple[int, ...]
    peak: int
    proved: bool


def reorder(graph: Graph) -> Graph:
    """The same program in the best order found; never worse than the order given.

    Comes before ``work_in_place``. Updates of params stay behind the loss, so that a loss that is not finite can still
    stop the step, and behind what reads the old value.
    """
    return rewrite(graph, [graph.nodes[i] for i in find_order(graph).nodes])


def find_order(graph: Graph) -> Order:
    """Greedy orders first, then branch and bound on the best. Deterministic: effort is counted, not timed."""
    assert not any(node.inplace for node in graph.nodes), "reorder comes before work_in_place"
    work = [i for i, node in enumerate(graph.nodes) if not is_view(node)]
    problem = find_problem(graph, work)
    bounds = problem.lower_bounds()
    best = list(range(len(work)))
    peaks = problem.peaks(best)
    proved = peaks[0] <= bounds[0]
    for preference in PREFERENCES:
        if not proved or peaks[1] > bounds[1]:
            order, _ = _search(problem, preference, (_UNLIMITED, _UNLIMITED), states=len(work) + 1)
            if order and problem.peaks(order) < peaks:
                best, peaks = order, problem.peaks(order)
                proved = peaks[0] <= bounds[0]
    while not proved:
        order, complete = _search(problem, PREFERENCES[0], (peaks[0], peaks[0]), states=STATES)
        if order is None:
            proved = complete
            break
        best, peaks = order, problem.peaks(order)
        proved = peaks[0] <= bounds[0]
    # The forward may yet run by rows: then what counts is the backward.
    while peaks[1] > bounds[1]:
        order, _ = _search(problem, PREFERENCES[0], (peaks[0] + 1, peaks[1]), states=STATES)
        if order is None:
            break
        best, peaks = order, problem.peaks(order)
    return Order(tuple(_with_views(graph, [work[i] for i in best])), peaks[0], proved)


def _with_views(graph: Graph, work: Sequence[int]) -> Iterator[int]:
    """The order with every view just before its first reader; views do nothing, so they are not part of the search."""
    maker = {v.name: i for i, node in enumerate(graph.nodes) if is_view(node) for v in node.outputs}
    done: set[int] = set()

    def views_of(node: Node) -> Iterator[int]:
        for value in node.inputs:
            view = maker.get(value.name)
            if view is not None and view not in done:
                done.add(view)
                yield from views_of(graph.nodes[view])
                yield view

    for i in work:
        yield from views_of(graph.nodes[i])
        yield i
    yield from sorted(set(maker.values()) - done)


@dataclass(frozen=True)
class Problem:
    """Tasks (all nodes but views) and the buffers between them, by number.

    after     task -> tasks that must come later
    reads     task -> buffers it reads;      writes: task -> buffers it makes, that of the first output first
    reusable  task -> buffers of which any that dies here saves the first of ``writes``
    readers   buffer -> tasks;   sizes: buffer -> bytes;   kept: the buffer outlives the program
    scratch   task -> bytes while it runs;   behind: the tasks that must follow the loss
    """

    after: tuple[frozenset[int], ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    reusable: tuple[tuple[int, ...], ...]
    readers: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    kept: tuple[bool, ...]
    scratch: tuple[int, ...]
    behind: frozenset[int]

    def peaks(self, order: Sequence[int]) -> tuple[int, int]:
        """The most bytes alive at one task, and at one behind the loss."""
        state = _State(self)
        peaks = [0, 0]
        for task in order:
            peaks[0] = max(peaks[0], state.height(task))
            if task in self.behind:
                peaks[1] = max(peaks[1], state.height(task))
            state.run(task)
        return peaks[0], peaks[1]

    def lower_bounds(self) -> tuple[int, int]:
        """What must be alive at some task, and at some behind the loss, in every order.

        That is what is made by it or before it and needed by it or after it. Of another buffer that exists by then:
        either it is alive, or all its readers have run, and then what they made is (in the same sense) there.
        """
        later = [1 << t for t in range(len(self.reads))]  # bit masks: the task and all that must follow it
        for t in reversed(range(len(self.reads))):
            for u in self.after[t]:
                later[t] |= later[u]
        readers = [sum(1 << t for t in tasks) for tasks in self.readers]
        bounds = [0, 0]
        for task, after in enumerate(later):
            claimed: set[int] = set()

            def cost(b: int, after: int = after, claimed: set[int] = claimed) -> int:
                """Bytes alive if ``b`` has been made; every task is accounted for once."""
                if self.kept[b] or readers[b] & after:
                    return self.sizes[b]
                done = [t for t in self.readers[b] if t not in claimed]
                claimed.update(done)
                return min(self.sizes[b], sum(cost(w) for t in done for w in self.writes[t]))

            earlier = [t for t in range(task) if later[t] >> task & 1]
            claimed.update(earlier)
            live = self.scratch[task] + sum(self.sizes[b] for b in self.writes[task])
            live += sum(cost(b) for t in earlier for b in self.writes[t])
            if any(not self.kept[b] and readers[b] & after == 1 << task for b in self.reusable[task]):
                live -= self.sizes[self.writes[task][0]]
            bounds[0] = max(bounds[0], live)
            if task in self.behind:
                bounds[1] = max(bounds[1], live)
        return bounds[0], bounds[1]


def find_problem(graph: Graph, work: Sequence[int]) -> Problem:
    owners = find_owners(graph)
    task_of = {v.name: t for t, i in enumerate(work) for v in graph.nodes[i].outputs}
    readers: dict[str, list[int]] = {}
    for t, i in enumerate(work):
        for owner in dict.fromkeys(owners[v.name] for v in graph.nodes[i].inputs):
            readers.setdefault(owner, []).append(t)
    kept = {owners[v.name] for v in graph.lasting}
    after: list[set[int]] = [set() for _ in work]
    for owner, tasks in readers.items():
        if owner in task_of:
            after[task_of[owner]].update(tasks)
    loss = task_of.get(owners[graph.outputs[0].name]) if graph.outputs else None
    for param, value in graph.updates:
        update = task_of.get(owners[value.name])
        if update is None:
            continue
        for before in (loss, *readers.get(param.name, [])):
            if before is not None and before < update:
                after[before].add(update)
    stored = {p.name for p in graph.params}
    numbers: dict[str, int] = {}
    writes, candidates = [], []
    for t, i in enumerate(work):
        node, made = graph.nodes[i], []
        candidates.append([owners[node.inputs[k].name] for k in find_candidates(graph, node, owners)])
        for output, value in enumerate(node.outputs):
            names = [owners[node.inputs[k].name] for k in find_candidates(graph, node, owners, output)]
            # A result that replaces its param where it stands needs no buffer.
            if not any(c in stored and c not in kept and readers[c][-1] == t for c in names):
                made.append(value)
            elif output == 0:
                candidates[t] = []
        writes.append(tuple(numbers.setdefault(v.name, len(numbers)) for v in made))
    sizes = {v.name: -(-v.type.nbytes // ALIGNMENT) * ALIGNMENT for i in work for v in graph.nodes[i].outputs}
    return Problem(
        after=tuple(map(frozenset, after)),
        reads=tuple(
            tuple(numbers[o] for o in dict.fromkeys(owners[v.name] for v in graph.nodes[i].inputs) if o in numbers)
            for i in work
        ),
        writes=tuple(writes),
        reusable=tuple(tuple(numbers[c] for c in names if c in numbers) for names in candidates),
        readers=tuple(tuple(readers.get(name, ())) for name in numbers),
        sizes=tuple(sizes[name] for name in numbers),
        kept=tuple(name in kept for name in numbers),
        scratch=tuple(scratch_bytes(graph.nodes[i]) for i in work),
        behind=frozenset(_descendants(after, loss) if loss is not None and graph.updates else ()),
    )


def _descendants(after: Sequence[Collection[int]], task: int) -> set[int]:
    found: set[int] = set()
    for t in range(task, len(after)):
        if t == task or t in found:
            found |= set(after[t])
    return found


class _State:
    """A set of executed tasks: what is alive, what could run next. ``undo`` takes the last task back."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.order: list[int] = []
        self.done = 0  # as a bit mask
        self.live = 0
        self.missing = [0] * len(problem.reads)  # tasks that must come before
        for later in problem.after:
            for t in later:
                self.missing[t] += 1
        self.ready = {t for t, n in enumerate(self.missing) if n == 0}
        self.waiting = [len(r) + k for r, k in zip(problem.readers, problem.kept, strict=True)]  # readers still to come

    def height(self, task: int) -> int:
        """Bytes alive while ``task`` runs."""
        p = self.problem
        height = self.live + p.scratch[task] + sum(p.sizes[b] for b in p.writes[task])
        if any(self.waiting[b] == 1 for b in p.reusable[task]):
            height -= p.sizes[p.writes[task][0]]
        return height

    def growth(self, task: int) -> int:
        """By how much more is alive after ``task`` than before."""
        p = self.problem
        made = sum(p.sizes[b] for b in p.writes[task] if self.waiting[b])
        return made - sum(p.sizes[b] for b in p.reads[task] if self.waiting[b] == 1)

    def run(self, task: int) -> None:
        self.live += self.growth(task)
        for b in self.problem.reads[task]:
            self.waiting[b] -= 1
        self.done |= 1 << task
        self.order.append(task)
        self.ready.discard(task)
        for t in self.problem.after[task]:
            self.missing[t] -= 1
            if self.missing[t] == 0:
                self.ready.add(t)

    def undo(self) -> None:
        task = self.order.pop()
        for t in self.problem.after[task]:
            self.missing[t] += 1
            self.ready.discard(t)
        self.ready.add(task)
        self.done ^= 1 << task
        for b in self.problem.reads[task]:
            self.waiting[b] += 1
        self.live -= self.growth(task)

    def fits(self, task: int, limits: tuple[int, int]) -> bool:
        return self.height(task) < limits[task in self.problem.behind]

    def settle(self, limits: tuple[int, int]) -> None:
        """Run what is right to run now, whatever comes later.

        If the readers that a buffer still waits for are all ready and together make no more than the buffer frees,
        then any order from here stays as low when they come first (they could only free less earlier if others did
        so, and no other task is hindered). A single task with growth <= 0 is the simplest case.
        """
        found = True
        while found:
            found = False
            for task in sorted(self.ready):
                if self.growth(task) <= 0 and self.fits(task, limits):
                    self.run(task)
                    found = True
                    break
                for b in self.problem.reads[task]:
                    group = [t for t in self.problem.readers[b] if t in self.ready]
                    if len(group) < self.waiting[b]:
                        continue
                    made = sum(self.problem.sizes[w] for t in group for w in self.problem.writes[t])
                    if made <= self.problem.sizes[b] and self._run_all(group, limits):
                        found = True
                        break
                if found:
                    break

    def _run_all(self, group: Sequence[int], limits: tuple[int, int]) -> bool:
        """Run the group if it stays below the limits, else change nothing."""
        for n, task in enumerate(group):
            if not self.fits(task, limits):
                for _ in range(n):
                    self.undo()
                return False
            self.run(task)
        return True


Preference = Callable[[_State, int], tuple[int, ...]]
PREFERENCES: tuple[Preference, ...] = (
    lambda state, task: (task,),
    lambda state, task: (state.growth(task), task),
    lambda state, task: (state.height(task), task),
)
_UNLIMITED = 1 << 62


def _search(
    problem: Problem, preference: Preference, limits: tuple[int, int], states: int
) -> tuple[list[int] | None, bool]:
    """An order that stays below limits[0], behind the loss limits[1], and whether the search is complete: no order and
    complete is a proof."""
    state = _State(problem)
    seen: set[int] = set()
    choices: list[tuple[int, list[int]]] = []  # (tasks done before, what else could be tried there)
    while True:
        state.settle(limits)
        if len(state.order) == len(problem.reads):
            return state.order, False
        if state.done not in seen:
            if len(seen) == states:
                return None, False
            seen.add(state.done)
            options = [t for t in state.ready if state.fits(t, limits)]
            options.sort(key=lambda t: preference(state, t), reverse=True)
            choices.append((len(state.order), options))
        while choices and not choices[-1][1]:
            choices.pop()
        if not choices:
            return None, True
        before, options = choices[-1]
        while len(state.order) > before:
            state.undo()
        state.run(options.pop())
