"""Forward results that are computed twice: the fewest multiply-accumulates for a limit, and the same bits."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import networks
import numpy as np
import pytest
import qdq
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import programs, sample
from test_stream import Block, network

import tte
from tte import compiler
from tte.codegen.check import check_plan
from tte.codegen.plan import plan_memory
from tte.errors import TTEError
from tte.ir import OPS, Builder, Graph, TensorType, Value, evaluate, verify
from tte.ir.op import Op
from tte.passes import recompute as module
from tte.passes.autodiff import differentiate
from tte.passes.fuse import fuse_elementwise, fuse_updates
from tte.passes.inplace import work_in_place
from tte.passes.optimizer import attach_sgd
from tte.passes.recompute import execute, find_schedule, pareto, recompute
from tte.passes.reorder import reorder


def peak(graph: Graph) -> int:
    """As the planner sees it."""
    return plan_memory(work_in_place(graph)).lower_bound


def macs(graph: Graph) -> int:
    return sum(node.macs for node in graph.nodes)


# --- the optimum --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of any size and cost; ``over`` may overwrite its first operand, ``two`` has a second result."""

    def infer(*xs: TensorType, size: int, macs: int = 1) -> TensorType:
        return TensorType((size,), "int8")

    def ref(*xs: np.ndarray, size: int, macs: int = 1) -> np.ndarray:
        return np.full(size, sum(int(x.sum()) for x in xs) + 1).astype(np.int8)

    def two(*xs: TensorType, size: int, macs: int = 1) -> tuple[TensorType, TensorType]:
        return TensorType((size,), "int8"), TensorType((4,), "int8")

    cost = {"macs": lambda *xs, size, macs=1: macs}
    monkeypatch.setitem(OPS, "test.work", Op("test.work", infer, ref, **cost))
    monkeypatch.setitem(OPS, "test.over", Op("test.over", infer, ref, inplace=(0,), **cost))
    monkeypatch.setitem(OPS, "test.two", Op("test.two", two, ref, **cost))


def step(
    reads: Sequence[Sequence[int]], sizes: Sequence[int], costs: Sequence[int], start: int, kinds: Sequence[str] = ()
) -> Graph:
    """Task i makes sizes[i] * 4 bytes from what tasks reads[i] make; ``start`` tasks come before and with the loss.

    Of what has a second result, those behind the loss read the second.
    """
    builder = Builder()
    x = Value("x", TensorType((4,), "int8"))
    made: list[tuple[Value, ...]] = []
    for i, tasks in enumerate(reads):
        inputs = [made[t][-1 if i >= start else 0] for t in tasks] or [x]
        kind = kinds[i] if kinds else "work"
        made.append(builder.calls(f"test.{kind}", *inputs, size=4 * sizes[i], macs=costs[i]))
    graph = Graph("train", (x,), nodes=tuple(builder.nodes), outputs=(made[start - 1][0], made[-1][0]))
    return verify(graph.renumbered())


def chain(n: int) -> Graph:
    """n unit layers forward, n backward; every one of these reads a gradient and what its layer read."""
    reads = [[i - 1] if i else [] for i in range(n)] + [[n - 1]]  # the loss
    reads += [[n + i, n - 1 - i] for i in range(n)]
    return step(reads, [1] * len(reads), [1] * len(reads), n + 1)


def random_step(seed: int) -> Graph:
    rng = random.Random(seed)
    forward, backward = rng.choice([(3, 5), (4, 4), (4, 3), (5, 3)])
    reads = [sorted({max(0, i - 1), rng.randrange(i)}) if i else [] for i in range(forward)] + [[forward - 1]]
    for i in range(backward):
        reads.append(sorted({forward + i, *rng.sample(range(forward), rng.randint(0, 2))}))
    n = len(reads)
    sizes = [rng.randint(1, 3) for _ in range(n)]
    kinds = rng.choices(["work", "over", "two"], [3, 2, 1], k=n)
    return step(reads, sizes, [rng.randint(0, 3) for _ in range(n)], forward + 1, kinds)


def all_orders(graph: Graph) -> Iterator[list[int]]:
    """Every task before the loss may come once more, before any task behind it, if what it reads is there."""
    makers = {v.name: i for i, node in enumerate(graph.nodes) for v in node.outputs}
    start = 1 + makers[graph.outputs[0].name]
    behind = range(start, len(graph.nodes))
    for slots in itertools.product((None, *behind), repeat=start - 1):
        yield [*range(start), *(t for b in behind for t in (*(k for k, s in enumerate(slots) if s == b), b))]


def count_bytes(graph: Graph, order: Sequence[int]) -> int:
    """The most bytes alive at one task; a reader takes the latest copy."""
    latest: dict[str, int] = {"x": -1}
    span: dict[tuple[str, int], int] = {}  # a copy -> where it is read last
    first = []
    for at, task in enumerate(order):
        node = graph.nodes[task]
        copies = [(v.name, latest[v.name]) for v in node.inputs]
        span |= dict.fromkeys(copies, at)
        first.append(copies[0])
        for value in node.outputs:
            latest[value.name] = at
            span[value.name, at] = at
    sizes = {v.name: -(-v.type.nbytes // 4) * 4 for node in graph.nodes for v in node.outputs} | {"x": 0}
    kept = {(v.name, latest[v.name]) for v in graph.outputs}
    heights = []
    for at, task in enumerate(order):
        node = graph.nodes[task]
        live = sum(
            sizes[name] for (name, birth), end in span.items() if birth <= at and (at <= end or (name, birth) in kept)
        )
        dies = span[first[at]] == at and first[at] not in kept and sizes[first[at][0]] == sizes[node.output.name]
        heights.append(live - (sizes[node.output.name] if node.op == "test.over" and dies else 0))
    return max(heights)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_cheaper(seed: int) -> None:
    """Against all schedules of small graphs, for every limit."""
    graph = random_step(seed)
    ways = [(count_bytes(graph, order), order) for order in all_orders(graph)]
    costs = [(height, sum(graph.nodes[t].macs for t in order) - macs(graph)) for height, order in ways]
    least, given = min(height for height, _ in costs), costs[0][0]
    assert given == peak(graph)
    for limit in range(least - 4, given + 4, 4):
        if limit < least:
            with pytest.raises(TTEError, match=f" {least:,} bytes are alive"):
                find_schedule(graph, limit)
            continue
        schedule = find_schedule(graph, limit)
        after = verify(execute(graph, schedule.nodes))
        assert schedule.proved
        assert schedule.macs == min(cost for height, cost in costs if height <= limit) == macs(after) - macs(graph)
        assert schedule.peak == count_bytes(graph, schedule.nodes) == peak(after) <= limit
