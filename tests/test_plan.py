"""Memory plans: what is known by hand, what the checker must catch, and nothing that it must not."""

from dataclasses import replace

import hard_plans
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import programs

from tte.codegen.check import PlanError, check_input, check_plan
from tte.codegen.plan import Buffer, Plan, place, plan_memory, plan_together
from tte.ir import Graph, Node, parse
from tte.passes.inplace import work_in_place

CHAIN = """
def @chain(%x: Tensor[(4,), float32]) {
  %0 = nn.relu(%x, layer="a") /* ty=Tensor[(4,), float32] */;
  %1 = concatenate(%0, %0, axis=0, layer="b") /* ty=Tensor[(8,), float32] */;
  %2 = reshape(%1, newshape=(1, 8), layer="c") /* ty=Tensor[(1, 8), float32] */;
  %3 = nn.relu(%2, layer="d") /* ty=Tensor[(1, 8), float32] */;
  %4 = nn.mask(%3, lower=0.0, layer="e") /* ty=Tensor[(1, 8), bit] */;
  return %4;
}
"""
STEP = """
def @step(%x: Tensor[(4,), float32]) {
  param @w: Tensor[(4,), float32];
  param @v: Tensor[(4,), float32];
  %0 = multiply(%x, @w) /* ty=Tensor[(4,), float32] */;
  %1 = subtract(@w, %0, inplace=(0,)) /* ty=Tensor[(4,), float32] */;
  %2 = multiply(@v, %0) /* ty=Tensor[(4,), float32] */;
  %3 = nn.relu(%0) /* ty=Tensor[(4,), float32] */;
  @w := %1;
  @v := %2;
  return %3;
}
"""
CONTRACT = """
def @contract(%x: Tensor[(4,), float32]) {
  param @w: Tensor[(1,), float32];
  %0 = sum(%x, axis=(0,), keepdims=True) /* ty=Tensor[(1,), float32] */;
  %1 = add(%0, %x) /* ty=Tensor[(4,), float32] */;
  %2 = nn.softmax(%1) /* ty=Tensor[(4,), float32] */;
  %3 = add(@w, %2) /* ty=Tensor[(4,), float32] */;
  return %3;
}
"""
# At no node more than 7 words are alive, and yet they do not fit into 7 (found by search).
FRAGMENTED = ((6, 0, 0), (4, 1, 1), (1, 0, 2), (2, 2, 2), (2, 1, 3), (3, 3, 3), (1, 2, 4), (1, 2, 4), (5, 4, 4))


def buffers_of(*rows: tuple[int, int, int]) -> tuple[Buffer, ...]:
    """From (words, birth, death)."""
    return tuple(Buffer(str(i), "", 4 * size, birth, death) for i, (size, birth, death) in enumerate(rows))


def test_chain_with_a_view() -> None:
    graph = parse(CHAIN)
    plan = plan_memory(graph)
    # Alive: %0 | %0 %1 | %1 | %1 %3 | %3 %4; bits are bytes, rounded up to words.
    assert plan.live == (16, 48, 32, 64, 36)
    assert (plan.arena_bytes, plan.lower_bound, plan.gap, plan.proof, plan.peak_node) == (64, 64, 0, "bound", 3)
    assert [(b.name, b.layer, b.size, b.birth, b.death) for b in plan.peak] == [
        ("1", "b", 32, 1, 3),
        ("3", "d", 32, 3, 4),
    ]
    assert plan.offsets["2"] == plan.offsets["1"]
    check_plan(graph, plan)


def test_in_place_results_share_the_buffer() -> None:
    graph = work_in_place(parse(CHAIN))
    plan = plan_memory(graph)
    assert plan.live == (16, 48, 32, 32, 36)
    assert plan.offsets["3"] == plan.offsets["1"]
    check_plan(graph, plan)


@pytest.mark.parametrize("text", [CHAIN, STEP])
@pytest.mark.parametrize("offset", [None, 0, 8, 64])
def test_an_input_in_the_arena_lies_where_it_must(text: str, offset: int | None) -> None:
    graph = parse(text)
    plan = plan_memory(graph, hold_input=True, input_offset=offset)
    place = plan.offsets[graph.inputs[0].name]
    assert place == offset or offset is None
    check_plan(graph, plan)
    with pytest.raises(PlanError, match="%x was last written by %0"):
        check_plan(graph, replace(plan, offsets=plan.offsets | {"0": place}))


@settings(deadline=None, max_examples=100)
@given(st.lists(programs(8), min_size=1, max_size=3))
def test_programs_share_an_arena(graphs: list[Graph]) -> None:
    """Their input is at one place, which is never worse than the start, and they are placed as if they were alone."""
    plans = plan_together(graphs, hold_input=True)
    check_input(graphs, plans)
    for graph, plan in zip(graphs, plans, strict=True):
        check_plan(graph, plan)
    assert max(p.arena_bytes for p in plans) <= max(
        plan_memory(g, hold_input=True, input_offset=0).arena_bytes for g in graphs
    )
    assert all(p.arena_bytes >= plan_memory(g, hold_input=True).arena_bytes for g, p in zip(graphs, plans, strict=True))


def test_params_have_storage_of_their_own() -> None:
    graph = parse(STEP)
    plan = plan_memory(graph)
    # %1 is written into @w. %2 waits to be copied into @v.
    assert set(plan.offsets) == {"0", "2", "3"}
    assert plan.live == (16, 16, 32, 48)
    check_plan(graph, plan)


def test_scratch_lives_at_its_node_only() -> None:
    graph, scratch = parse(CHAIN), {1: 30, 4: 100}
    plan = plan_memory(graph, scratch)
    assert plan.live == (16, 80, 32, 64, 136)
    assert set(plan.scratch) == {1, 4}
    check_plan(graph, plan, scratch)
    with pytest.raises(PlanError, match=r"node 4 .*scratch.4"):
        check_plan(graph, replace(plan, scratch={1: plan.scratch[1], 4: plan.offsets["3"]}), scratch)


def test_alignment_and_emptiness() -> None:
    plan = plan_memory(parse(CHAIN), alignment=16)
    assert plan.live == (16, 48, 32, 64, 48)
    assert all(offset % 16 == 0 for offset in plan.offsets.values())
    assert plan_memory(Graph("nothing")).arena_bytes == 0


def test_placement_above_the_bound_is_proved_by_search(monkeypatch) -> None:
    monkeypatch.setattr("tte.codegen.plan.SORT_KEYS", (lambda b: (b.size,),))
    placed, proof = place(buffers_of(*((3 * size, birth, death) for size, birth, death in FRAGMENTED)), 84)
    assert (max(b.end for b in placed), proof) == (96, "search")


@pytest.mark.parametrize(("most", "fits"), [(96, True), (93, False), (83, False)])
def test_no_effort_is_made_for_an_arena_that_is_too_large(monkeypatch, most: int, fits: bool) -> None:
    monkeypatch.setattr("tte.codegen.plan.SORT_KEYS", (lambda b: (b.size,),))
    placed, proof = place(buffers_of(*((3 * size, birth, death) for size, birth, death in FRAGMENTED)), 84, most=most)
    assert (max(b.end for b in placed) <= most) == fits and (proof == "search") == fits


def test_search_reaches_the_bound_where_greedy_does_not(monkeypatch) -> None:
    rows = ((3, 0, 1), (1, 0, 3), (2, 2, 4), (2, 2, 2), (3, 3, 4))
    monkeypatch.setattr("tte.codegen.plan.SORT_KEYS", (lambda b: (b.size,),))
    placed, proof = place(buffers_of(*rows), 24)
    assert (max(b.end for b in placed), proof) == (24, "bound")


def test_a_hard_instance_reaches_the_bound_from_the_bottom_up() -> None:
    """CP-SAT's own search gives up on it. What is cut out of a full rectangle fits into it."""
    buffers, bound = hard_plans.draw(120, hard_plans.KINDS["pinwheels"], 0.2, 3)
    assert max(sum(b.size for b in buffers if b.birth <= t <= b.death) for t in range(240)) == bound
    placed, proof = place(buffers, bound)
    assert max(b.end for b in placed) == bound and proof == "bound"
    for i, one in enumerate(placed):
        assert not any(one.meets(o) and one.offset < o.end and o.offset < one.end for o in placed[:i])


@settings(deadline=None)
@given(programs(12), st.booleans(), st.dictionaries(st.integers(0, 12), st.integers(1, 50)))
def test_plans_pass_the_checker(graph: Graph, in_place: bool, scratch: dict[int, int]) -> None:
    graph = work_in_place(graph) if in_place else graph
    scratch = {i: size for i, size in scratch.items() if i < len(graph.nodes) and graph.nodes[i].op != "reshape"}
    plan = plan_memory(graph, scratch)
    check_plan(graph, plan, scratch)
    assert plan.lower_bound == max(plan.live) <= plan.arena_bytes
    assert plan.proof == "bound" or plan.gap > 0


@settings(deadline=None, max_examples=200)
@given(programs(10), st.data())
def test_wrong_offsets_are_caught_exactly_when_a_byte_is_lost(graph: Graph, data) -> None:
    plan = plan_memory(graph)
    assume(plan.buffers)
    victim = data.draw(st.sampled_from(plan.buffers))
    offset = data.draw(st.integers(-1, plan.arena_bytes // 4)) * 4
    moved = tuple(replace(b, offset=offset) if b == victim else b for b in plan.buffers)
    same = {name for name, at in owners(graph).items() if at == victim.name}
    wrong = replace(plan, offsets={n: offset if n in same else at for n, at in plan.offsets.items()})
    if loses_a_byte(graph, moved, plan.arena_bytes):
        with pytest.raises(PlanError, match=r"%\d+"):
            check_plan(graph, wrong)
    else:
        check_plan(graph, wrong)


def owners(graph: Graph) -> dict[str, str]:
    """The value whose bytes a view shows (no node of these programs works in place)."""
    result: dict[str, str] = {}
    for node in graph.nodes:
        name = node.inputs[0].name
        result[node.output.name] = result.get(name, name) if node.op == "reshape" else node.output.name
    return result


def loses_a_byte(graph: Graph, buffers: tuple[Buffer, ...], arena: int) -> bool:
    """Somebody leaves the arena, or writes over what is read at that node or later."""
    nbytes = {v.name: v.type.nbytes for v in graph.values()}
    reads: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        reads |= {owners(graph).get(v.name, v.name): i for v in node.inputs}
    for value in (*graph.outputs, *(v for _, v in graph.updates)):
        reads[owners(graph).get(value.name, value.name)] = len(graph.nodes)
    return any(b.offset < 0 or b.offset + nbytes[b.name] > arena for b in buffers) or any(
        a.birth <= b.birth <= reads[a.name]
        and a.offset < b.offset + nbytes[b.name]
        and b.offset < a.offset + nbytes[a.name]
        for a in buffers
        for b in buffers
        if a != b
    )


def with_offset(plan: Plan, name: str, offset: int) -> Plan:
    return replace(plan, offsets=plan.offsets | {name: offset})


def test_negative_controls() -> None:
    graph = parse(CHAIN)
    plan = plan_memory(graph)
    high, low = sorted(("1", "3"), key=lambda name: -plan.offsets[name])
    wrong = {
        "an offset 4 bytes less": with_offset(plan, high, plan.offsets[high] - 4),
        "a view somewhere else": with_offset(plan, "2", plan.offsets["3"]),
        "an offset that is not aligned": replace(with_offset(plan, high, plan.offsets[high] + 1), arena_bytes=65),
        "an arena one byte smaller": replace(plan, arena_bytes=63),
        "a value without a place": replace(plan, offsets={k: v for k, v in plan.offsets.items() if k != low}),
    }
    for what, bad in wrong.items():
        with pytest.raises(PlanError):
            check_plan(graph, bad)
            pytest.fail(what)


def test_a_lifetime_that_ends_too_early_is_caught() -> None:
    graph = parse(STEP)
    shorter = replace(graph, nodes=(*graph.nodes[:3], replace(graph.nodes[3], inputs=(graph.inputs[0],))))
    plan = plan_memory(shorter)  # believes that %0 is not read by the last node
    check_plan(shorter, plan)
    with pytest.raises(PlanError, match=r"node 3 \(nn.relu, layer -\): byte 0 of %0 was last written by %3"):
        check_plan(graph, plan)


def in_place(graph: Graph, node: int, k: int) -> Graph:
    nodes: list[Node] = list(graph.nodes)
    nodes[node] = replace(nodes[node], inplace=(k,))
    return replace(graph, nodes=tuple(nodes))


@pytest.mark.parametrize(
    ("graph", "node", "k", "what"),
    [
        (CHAIN, 0, 0, "a graph input"),
        (CONTRACT, 1, 0, "a buffer of another size"),
        (CONTRACT, 3, 0, "a param of another size"),
        (CONTRACT, 2, 0, "against the contract"),
        (STEP, 2, 1, "an operand that is read later"),
        (STEP, 0, 1, "a param that is read later"),
        (STEP, 3, 0, None),
    ],
)
def test_illegal_in_place_is_caught(graph: str, node: int, k: int, what: str | None) -> None:
    wrong = in_place(parse(graph), node, k)
    if what is None:
        check_plan(wrong, plan_memory(wrong))
        return
    with pytest.raises(PlanError):
        check_plan(wrong, plan_memory(wrong))


def test_a_param_must_end_up_with_its_update() -> None:
    graph = parse(STEP)
    check_plan(graph, plan_memory(graph))
    forgotten = replace(graph, updates=graph.updates[1:])
    with pytest.raises(PlanError, match=r"byte 0 of %w was last written by %1"):
        check_plan(forgotten, plan_memory(forgotten))
    swapped = replace(graph, updates=((graph.params[0], graph.params[1]), (graph.params[1], graph.params[0])))
    with pytest.raises(PlanError, match="update of @v"):
        check_plan(swapped, plan_memory(swapped))
