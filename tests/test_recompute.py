"""Forward results that are computed twice: the fewest multiply-accumulates for a limit, and the same bits."""

import itertools
import random
from collections.abc import Iterator, Sequence
from math import isqrt
from pathlib import Path

import networks
import numpy as np
import pytest
import qdq
import recompute as recompute_table
import torch
from hypothesis import given, settings
from models import load_networks
from programs import programs, sample
from test_quantized import mcunet  # noqa: F401  a fixture
from test_stream import EXAMPLE, Block, network

import tte
from tte import compiler
from tte.codegen.plan import plan_memory
from tte.errors import TTEError
from tte.ir import OPS, Builder, Graph, TensorType, Value, evaluate, parse, verify
from tte.ir.op import Op
from tte.passes import recompute as module
from tte.passes.autodiff import differentiate
from tte.passes.fuse import fuse_elementwise, fuse_updates
from tte.passes.inplace import work_in_place
from tte.passes.io import take_rows
from tte.passes.optimizer import attach_sgd
from tte.passes.recompute import execute, find_schedule, pareto, recompute
from tte.passes.reorder import reorder

pytestmark = pytest.mark.usefixtures("import_once")


def peak(graph: Graph) -> int:
    """As the planner sees it."""
    return plan_memory(work_in_place(graph)).lower_bound


def macs(graph: Graph) -> int:
    return sum(node.macs for node in graph.nodes)


# --- the optimum ------------------------------------------------------------------------------------------------------


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
    forward, backward = rng.choice([(4, 4), (5, 3), (6, 2)])
    reads = [sorted({max(0, i - 1), rng.randrange(i)}) if i else [] for i in range(forward)] + [[forward - 1]]
    for i in range(backward):
        reads.append(sorted({forward + i, *rng.sample(range(forward), rng.randint(0, 2))}))
    n = len(reads)
    sizes = [rng.randint(1, 5) if i <= forward else rng.randint(1, 2) for i in range(n)]
    kinds = rng.choices(["work", "over", "two"], [2, 2, 1], k=n)
    for i, kind in enumerate(kinds):
        if kind == "over" and reads[i]:
            sizes[i] = sizes[reads[i][0]]
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


@pytest.mark.parametrize("seed", (*range(8), 23, 37, 51, 54, 57, 63))
def test_nothing_is_cheaper(seed: int) -> None:
    """Against all schedules of small graphs, for every limit."""
    graph = random_step(seed)
    ways = [(count_bytes(graph, order), order) for order in all_orders(graph)]
    costs = [(height, sum(graph.nodes[t].macs for t in order) - macs(graph)) for height, order in ways]
    least, most = min(height for height, _ in costs), costs[0][0]
    assert most == peak(graph)
    for limit in range(least - 4, most + 4, 4):
        if limit < least:
            with pytest.raises(TTEError, match=f" {least:,} bytes are alive"):
                find_schedule(graph, limit)
            continue
        schedule = find_schedule(graph, limit)
        after = verify(execute(graph, schedule.nodes))
        assert schedule.proved
        assert schedule.macs == min(cost for height, cost in costs if height <= limit) == macs(after) - macs(graph)
        assert schedule.peak == count_bytes(graph, schedule.nodes) == peak(after) <= limit


@pytest.mark.parametrize("effort", [module.EFFORT, 0])
def test_chain_in_twice_the_root(effort: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more at most; also by the heuristic alone, as for graphs that are too large for proofs."""
    if not effort:
        monkeypatch.setattr(module, "LARGEST", 0)
    graph = chain(16)
    unit = graph.nodes[0].output.type.nbytes
    schedule = find_schedule(graph, 2 * isqrt(16) * unit)
    assert schedule.macs <= 16
    assert schedule.proved == bool(effort)
    assert schedule.peak == peak(execute(graph, schedule.nodes)) < peak(graph) / 2


def test_front() -> None:
    graph = chain(16)
    front = pareto(graph)
    assert front[0] == (peak(graph), 0)
    assert len(front) >= 5
    for (bytes_, macs_), (fewer, more) in itertools.pairwise(front):
        assert bytes_ > fewer and macs_ < more
    for bytes_, macs_ in front:
        schedule = find_schedule(graph, bytes_)
        assert (schedule.peak, schedule.macs) == (bytes_, macs_)
    with pytest.raises(TTEError, match=f"allow {front[-1][0]:,} bytes"):
        recompute(graph, front[-1][0] - 1)


# --- the meaning ------------------------------------------------------------------------------------------------------


def training(graph: Graph) -> Graph:
    return reorder(fuse_elementwise(fuse_updates(attach_sgd(differentiate(networks.with_loss(graph)), 0.1))))


def check_same(graph: Graph, limit: int) -> Graph:
    after = verify(recompute(graph, limit))
    assert peak(after) <= limit
    one, other = evaluate(graph, networks.sample(graph)), evaluate(work_in_place(after), networks.sample(graph))
    for a, b in zip(one.outputs, other.outputs, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in one.params.items():
        np.testing.assert_array_equal(other.params[name], value)
    return after


def updates_in_place(graph: Graph) -> list[str]:
    owners = work_in_place(graph).owners()
    placed = work_in_place(graph)
    return [p.name for p, v in placed.updates if owners[v.name] == p.name]


def test_same_numbers_from_fewer_bytes() -> None:
    """Where a param is read a second time it has its old value: all are still written where they stand."""
    graph = training(networks.residual(networks.RESIDUAL_WEIGHTS))
    front = pareto(graph)
    assert front[-1][0] < front[0][0]
    for limit, extra in front:
        after = check_same(graph, limit)
        assert macs(after) - macs(graph) == extra
        assert updates_in_place(after) == updates_in_place(graph) == [p.name for p, _ in graph.updates]
    assert str(recompute(graph, front[-1][0])) == str(recompute(graph, front[-1][0]))
    assert recompute(graph, front[0][0]) == graph


def test_input_that_comes_by_rows_comes_once() -> None:
    graph = reorder(take_rows(training(networks.residual(networks.RESIDUAL_WEIGHTS))))
    front = pareto(graph)
    assert front[-1][0] < front[0][0]
    assert [n.op for n in check_same(graph, front[-1][0]).nodes].count("source") == 1


@settings(deadline=None, max_examples=60)
@given(programs(12))
def test_meaning_of_any_program_is_kept(graph: Graph) -> None:
    """Views, masks, updates before and behind the first output, in-place results."""
    for limit, extra in pareto(graph, 3):
        schedule = find_schedule(graph, limit)
        after = verify(recompute(graph, limit))
        assert (peak(after), macs(after) - macs(graph)) == (schedule.peak, schedule.macs) == (limit, extra)
        one, other = evaluate(graph, sample(graph)), evaluate(work_in_place(after), sample(graph))
        for a, b in zip(one.outputs, other.outputs, strict=True):
            np.testing.assert_array_equal(a, b)
        for name, value in one.params.items():
            np.testing.assert_array_equal(other.params[name], value)


def test_weights_are_read_before_they_are_updated() -> None:
    """%0 is idle while most is alive, but then @w is no longer what it was made from."""
    big, small = "/* ty=Tensor[(1, 64), float32] */;\n", "/* ty=Tensor[(1, 1), float32] */;\n"
    text = (
        "def @p(%x: Tensor[(1, 64), float32]) {\nparam @w: Tensor[(1, 64), float32];\n"
        f"%0 = multiply(%x, @w) {big}%1 = sum(%0, axis=(1,), keepdims=True) {small}%2 = exp(%x) {big}"
        f"%3 = subtract(@w, %2) {big}%4 = concatenate(%x, %x, axis=1) /* ty=Tensor[(1, 128), float32] */;\n"
        f"%5 = sum(%4, axis=(1,), keepdims=True) {small}%6 = multiply(%0, %5) {big}"
    )
    updating = verify(parse(f"{text}@w := %3;\nreturn %1, %6;\n}}\n"))
    assert updates_in_place(updating) == ["w"]
    with pytest.raises(TTEError, match="E049"):
        recompute(updating, peak(updating) - 1)
    other = verify(parse(f"{text}return %1, %6, %3;\n}}\n"))
    assert [n.op for n in recompute(other, peak(other) - 1).nodes].count("multiply") == 3


def test_views_are_of_the_copy_that_is_there() -> None:
    graph = verify(
        parse(
            "def @p(%x: Tensor[(1, 64), float32]) {\n"
            "%0 = exp(%x) /* ty=Tensor[(1, 64), float32] */;\n"
            "%1 = reshape(%0, newshape=(64,)) /* ty=Tensor[(64,), float32] */;\n"
            "%2 = sum(%1, axis=(0,), keepdims=True) /* ty=Tensor[(1,), float32] */;\n"
            "%3 = concatenate(%x, %x, axis=1) /* ty=Tensor[(1, 128), float32] */;\n"
            "%4 = sum(%3, axis=(1,), keepdims=True) /* ty=Tensor[(1, 1), float32] */;\n"
            "%5 = multiply(%1, %4) /* ty=Tensor[(1, 64), float32] */;\nreturn %2, %5;\n}\n"
        )
    )
    after = recompute(graph, 4 + 512 + 4)
    ops = ["exp", "reshape", "sum", "concatenate", "sum", "exp", "reshape", "multiply"]
    assert ([n.op for n in after.nodes], peak(graph), peak(after)) == (ops, 256 + 4 + 512 + 4, 4 + 512 + 4)


# --- the code ---------------------------------------------------------------------------------------------------------


def compile_within(share: float, monkeypatch: pytest.MonkeyPatch, *model: object, **options: object) -> tte.Artifact:
    """Compiled with ``recompute`` behind ``reorder``, for a share of the peak of the training step."""

    def shrink(graph: Graph) -> Graph:
        if not graph.updates:
            return graph
        after = recompute(graph, int(peak(graph) * share))
        assert len(after.nodes) > len(graph.nodes)
        return after

    at = 1 + compiler.SHRINK.index(reorder)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "SHRINK", (*compiler.SHRINK[:at], shrink, *compiler.SHRINK[at:]))
        return tte.compile(*model, **options)


def steps(artifact: tte.Artifact, x: np.ndarray) -> tuple[str, list[float]]:
    result = artifact.run({"x": x, "y": np.arange(len(x)) % 3}, runner="host")
    return result.weights_sha256, result.loss


@pytest.mark.parametrize("module", [network(Block(4), Block(4, 5, padding=2)), network(Block(4, stride=2), Block(4))])
def test_code_learns_the_same(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"update_scheme": {"train": "full"}, "target": "host", "name": "net"}
    x = np.random.default_rng(0).standard_normal((4, 2, 24, 20)).astype(np.float32)
    plain = tte.compile(module, EXAMPLE, **options)
    less = compile_within(0.9, monkeypatch, module, EXAMPLE, **options)
    assert less.plan.lower_bound < plain.plan.lower_bound
    assert steps(less, x) == steps(plain, x)


def test_code_of_an_integer_network_learns_the_same(mcunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    x = qdq.inputs(qdq.RECIPES["mcunet"], 8)[:, 0]
    plain = tte.compile(mcunet, update_scheme="full")
    less = compile_within(0.9, monkeypatch, mcunet, update_scheme="full")
    assert less.plan.lower_bound < plain.plan.lower_bound
    assert steps(less, x) == steps(plain, x)


def test_code_of_resnet8_learns_the_same(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = next(n for n in load_networks() if n.name == "resnet8")
    given = (net.model, net.example, net.scheme("full"), "host")
    plain, less = tte.compile(*given), compile_within(0.8, monkeypatch, *given)
    assert less.plan.arena_bytes < 0.8 * plain.plan.arena_bytes
    assert steps(less, net.samples(4)["x"]) == steps(plain, net.samples(4)["x"])


def test_column_of_mcunet(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Percent of all multiply-accumulates, for 90 % to 50 % of the peak; less than 42 % is impossible."""
    monkeypatch.setitem(OPS, "sketch", OPS["test.work"])  # until the end of the test
    graph = recompute_table.sketch("mcunet-5fps")
    assert (len(graph.nodes), peak(graph)) == (92, 850_180)
    rows = recompute_table.measure(graph)
    assert [round(row["percent"], 2) for row in rows[:5]] == [0.72, 1.70, 2.85, 4.02, 6.97]
    assert all(row["proved"] for row in rows[:5])
    assert "allow 360,452 bytes" in rows[5]["refused"]
    after = recompute(graph, 850_180 // 2)
    assert peak(after) <= 850_180 // 2
