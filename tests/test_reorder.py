"""The order of execution: the optimum where it is known, the meaning always."""

import networks
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import programs, sample

from tte.codegen.check import check_plan
from tte.codegen.plan import plan_memory
from tte.ir import Graph, Node, evaluate, parse, rewrite, verify
from tte.passes.autodiff import differentiate
from tte.passes.fuse import fuse_elementwise, fuse_updates
from tte.passes.inplace import work_in_place
from tte.passes.optimizer import attach_sgd
from tte.passes.reorder import find_order, reorder


def peak(graph: Graph) -> int:
    """As the planner sees it."""
    return plan_memory(work_in_place(graph)).lower_bound


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


BIG, SMALL = "/* ty=Tensor[(1, 64), float32] */;\n", "/* ty=Tensor[(1, 1), float32] */;\n"
MASK, PART = "/* ty=Tensor[(1, 64), bit] */;\n", "/* ty=Tensor[(1, 8), float32] */;\n"


def test_what_a_big_buffer_waits_for_comes_at_once() -> None:
    """Neither the mask nor the slice frees %0, both together do: 256 bytes become 8 + 32."""
    late = verify(
        parse(
            f"def @p(%x: Tensor[(1, 64), float32]) {{\n%0 = exp(%x) {BIG}%1 = nn.softmax(%0) {BIG}"
            f"%2 = nn.softmax(%1) {BIG}%3 = nn.mask(%0) {MASK}"
            f"%4 = slice(%0, begin=(0, 0), end=(1, 8), strides=(1, 1)) {PART}return %2, %3, %4;\n}}\n"
        )
    )
    order = find_order(late)
    assert ops(reorder(late))[-1] == "nn.softmax"
    assert (peak(late), order.peak, order.proved) == (768, 256 + 256 + 8 + 32, True)


def test_what_is_needed_late_is_made_late() -> None:
    early = verify(
        parse(
            f"def @p(%x: Tensor[(1, 64), float32]) {{\n%0 = exp(%x) {BIG}%1 = nn.softmax(%x) {BIG}"
            f"%2 = nn.softmax(%1) {BIG}%3 = sum(%2, axis=(1,), keepdims=True) {SMALL}"
            f"%4 = add(%0, %3) {BIG}return %4;\n}}\n"
        )
    )
    order = find_order(early)
    assert ops(reorder(early)) == ["nn.softmax", "nn.softmax", "sum", "exp", "add"]
    assert (peak(early), order.peak, order.proved) == (768, 512, True)


def training(graph: Graph) -> Graph:
    return verify(fuse_elementwise(fuse_updates(attach_sgd(differentiate(networks.with_loss(graph)), 0.1))))


@pytest.mark.parametrize("graph", [training(networks.residual(networks.RESIDUAL_WEIGHTS)), training(networks.split())])
def test_training_steps(graph: Graph) -> None:
    after = verify(reorder(graph))
    order = find_order(graph)
    assert order.proved
    assert peak(after) == order.peak < peak(graph)
    loss = after.nodes.index(after.producer()[after.outputs[0].name])
    updates = [after.nodes.index(after.producer()[v.name]) for _, v in after.updates]
    assert loss < min(updates)
    # Every update finds its param free of later readers, so nothing has to be copied.
    in_place = work_in_place(after)
    assert all(in_place.nodes[i].inplace for i in updates)
    # An update does not wait: the gradient it needs is made by the same region or just before.
    assert max(np.diff(updates)) <= 6
    check_plan(in_place, plan_memory(in_place))


@settings(deadline=None)
@given(programs(12), st.sampled_from([0, 5, 1000]))
def test_meaning_is_kept_and_the_peak_never_grows(graph: Graph, effort: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tte.passes.reorder.STATES", effort)
        after = verify(reorder(graph))
        assert peak(after) <= find_order(graph).peak <= peak(graph)
    assert sorted(ops(after)) == sorted(ops(graph))
    assert sorted(n.layer for n in after.nodes) == sorted(n.layer for n in graph.nodes)
    one, other = evaluate(graph, sample(graph)), evaluate(work_in_place(after), sample(graph))
    for a, b in zip(one.outputs, other.outputs, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in one.params.items():
        np.testing.assert_array_equal(other.params[name], value)


@settings(deadline=None, max_examples=60)
@given(programs(10, least=7))
def test_small_programs_reach_the_least_peak_of_all_orders(graph: Graph) -> None:
    last = graph.last_use()
    for param, value in graph.updates:  # whose old value is not read later, as in every training step
        update = graph.nodes.index(graph.producer()[value.name])
        assume(all(last.get(name, 0) <= update for name in views(graph, [param.name])))
    order = find_order(graph)
    assert order.proved
    assert order.peak == least_peak(graph, [], {})


def least_peak(graph: Graph, done: list[Node], known: dict[frozenset[str], int]) -> int:
    """The least peak from here on over all orders in which updates follow the loss and all other readers.

    What is alive at a node depends on the set of nodes before it only, not on their order.
    """
    made = {v.name for n in done for v in n.outputs}
    key = frozenset(made)
    left = [n for n in graph.nodes if n.output.name not in made]
    if key not in known:
        peaks = [0] if not left else []
        for node in left:
            rest = [n for n in left if n is not node]
            params = [p.name for p, v in graph.updates if v in node.outputs]
            waits = any(v.name in views(graph, params) for n in rest for v in n.inputs)
            made_later = {n.output.name for n in left}
            if made_later & {v.name for v in node.inputs} or (
                params and (waits or graph.outputs[0].name in made_later)
            ):
                continue
            plan = plan_memory(work_in_place(rewrite(graph, [*done, node, *rest])))
            peaks.append(max(plan.live[len(done)], least_peak(graph, [*done, node], known)))
        known[key] = min(peaks)
    return known[key]


def views(graph: Graph, names: list[str]) -> set[str]:
    """The names and those of all their views."""
    result = set(names)
    for node in graph.nodes:
        if node.op == "reshape" and node.inputs[0].name in result:
            result.add(node.output.name)
    return result
