"""Pictures that lie in the arena: at the same place for each program, and written over as soon as they are read."""

import ctypes
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from test_row_source import CASES
from test_row_source import build as build_case
from test_stream import EXAMPLE, NETWORKS, assert_same_bits

import tte
from tte.artifact import Artifact
from tte.codegen.check import PlanError, check_input, check_plan
from tte.codegen.plan import Plan, find_pairs, plan_memory, plan_together
from tte.ir import Builder, Graph
from tte.runner.toolchain import find_toolchains

OVER = ("float with mean", "uint8", "blocks", "no padding", "dilation")  # pictures that lie above what replaces them


@cache
def build(name: str, place: str) -> Artifact:
    if name in CASES:
        return build_case(name, place)
    return tte.compile(NETWORKS[name], EXAMPLE, "last-layer", "host", "net", input=place)


def offset_of(graph: Graph, plan: Plan) -> int:
    return plan.offsets[graph.inputs[0].name]


@pytest.mark.parametrize("name", [*OVER, "the stem learns", "fork"])
def test_the_same_bits_as_from_memory_of_the_caller(name: str) -> None:
    arena, caller = build(name, "arena"), build(name, "caller")
    assert_same_bits(arena, caller)
    programs = arena.compiled.programs
    (offset,) = {offset_of(p.graph, p.plan) for p in programs}
    assert (offset > 0) == (name not in ("the stem learns", "no padding", "dilation"))  # at both places it is tried
    # Where the caller is to write it: what lies there is then not copied.
    board, other = arena.host(), caller.host()
    find_place = board._library["net_input"]
    find_place.restype = ctypes.c_void_p
    place = find_place()
    x = np.random.default_rng(2).uniform(0, 9, arena.build.input.shape).astype(arena.build.input.dtype)
    ctypes.memmove(place, x.tobytes(), x.nbytes)
    y = np.empty(arena.build.output.shape, arena.build.output.dtype)
    assert board._call("infer", ctypes.c_void_p(place), y.ctypes.data_as(ctypes.c_void_p)) == 0
    np.testing.assert_array_equal(y, other.infer(x))


@pytest.mark.parametrize("name", OVER)
def test_the_checker_sees_a_picture_that_lies_too_low(name: str) -> None:
    """By four bytes, or in one program elsewhere than in the others."""
    programs = build(name, "arena").compiled.programs
    graphs, plans = [p.graph for p in programs], [p.plan for p in programs]
    lower = [
        replace(plan, offsets=plan.offsets | {graph.inputs[0].name: offset_of(graph, plan) - 4})
        for graph, plan in zip(graphs, plans, strict=True)
    ]
    for graph, plan, wrong in zip(graphs, plans, lower, strict=True):
        pairs = find_pairs(graph, graph.owners(), plan.buffers)
        assert any(plan.buffers[p.dying].name == graph.inputs[0].name for p in pairs)
        with pytest.raises(PlanError):
            check_plan(graph, wrong)
    high = [replace(p, arena_bytes=p.arena_bytes + 64) for p in plans]
    high[1] = shift(high[1], 64)
    check_plan(graphs[1], high[1])
    with pytest.raises(PlanError, match="not at one place"):
        check_input(graphs, high)


def shift(plan: Plan, by: int) -> Plan:
    """Everything further up."""
    offsets = {name: offset + by for name, offset in plan.offsets.items()}
    return replace(plan, offsets=offsets, scratch={i: offset + by for i, offset in plan.scratch.items()})


def test_programs_that_do_not_mind_follow_the_one_that_does() -> None:
    """Also where they come first."""
    minds = build("blocks", "arena").compiled.programs[1].graph
    builder = Builder()
    x = minds.inputs[0]
    builder.call("sum", x, axis=(1, 2, 3), keepdims=True, layer="sum")
    easy = Graph("easy", (x,), nodes=tuple(builder.nodes), outputs=(builder.nodes[-1].output,))
    alone = plan_memory(minds, hold_input=True)
    assert offset_of(minds, alone) > 0 == offset_of(easy, plan_memory(easy, hold_input=True))
    assert plan_memory(minds, hold_input=True, input_offset=0).arena_bytes > alone.arena_bytes
    for graphs in ([easy, minds], [minds, easy]):
        plans = plan_together(graphs, hold_input=True)
        check_input(graphs, plans)
        for graph, plan in zip(graphs, plans, strict=True):
            check_plan(graph, plan)
        assert max(plan.arena_bytes for plan in plans) == alone.arena_bytes


@pytest.mark.skipif(not find_toolchains(), reason="no compiler for boards")
@pytest.mark.parametrize("name", ["float with mean", "uint8"])
def test_an_emulated_board(name: str) -> None:
    pytest.importorskip("unicorn")
    there, here = CASES[name].compile("arena", "stm32f746"), build(name, "caller")
    x = np.random.default_rng(0).uniform(0, 9, (3, *here.build.input.sample)).astype(here.build.input.dtype)
    results = [a.run({"x": x, "y": np.arange(3)}, runner=r) for a, r in ((there, "unicorn"), (here, "host"))]
    assert len({(tuple(r.loss), r.weights_sha256) for r in results}) == 1
