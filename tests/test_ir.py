"""The language: text, types, the verifier and the interpreter."""

import pickle
from dataclasses import replace

import networks
import numpy as np
import pytest

from tte.errors import TTEError
from tte.ir import (
    OPS,
    Builder,
    Graph,
    InvalidGraph,
    InvalidType,
    Node,
    Param,
    TensorType,
    Value,
    evaluate,
    parse,
    verify,
)
from tte.passes.autodiff import differentiate
from tte.passes.fuse import fuse_elementwise, fuse_updates
from tte.passes.optimizer import attach_sgd


def training_graph() -> Graph:
    graph = differentiate(networks.with_loss(networks.residual(networks.RESIDUAL_WEIGHTS)))
    return verify(fuse_elementwise(fuse_updates(attach_sgd(graph, 0.1))))


def test_text_parses_back() -> None:
    graph = training_graph()
    assert any(node.op == "region" for node in graph.nodes)
    again = parse(str(graph), {s.name: s.data for s in (*graph.params, *graph.consts)})
    assert again == graph
    assert str(again) == str(graph)
    xs = networks.sample(graph)
    for name, value in evaluate(graph, xs).params.items():
        np.testing.assert_array_equal(evaluate(again, xs).params[name], value)


def test_text_is_what_it_says() -> None:
    builder = Builder()
    x = Value("x", TensorType((1, 4)))
    y = builder.call("clip", builder.call("negative", x, layer="minus"), max=6.0)
    text = str(Graph("main", (x,), nodes=tuple(builder.nodes), outputs=(y,)).renumbered())
    assert text == (
        "def @main(%x: Tensor[(1, 4), float32]) {\n"
        '  %0 = negative(%x, layer="minus") /* ty=Tensor[(1, 4), float32] */;\n'
        "  %1 = clip(%0, max=6.0) /* ty=Tensor[(1, 4), float32] */;\n"
        "  return %1;\n"
        "}\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("clip(%0", "clop(%0", "no operator named clop"),
        ("clip(%0", "clip(%7", "%7 is used before it is defined"),
        ("max=6.0", "top=6.0", "has no attribute 'top'"),
        ("max=6.0", "max=six", "is not a number"),
        ("(1, 4), float32] */;\n  %1", "(1, 4), float31] */;\n  %1", "is not a tensor type"),
        ("return %1;\n}", "", "ends before the graph is closed"),
        ("  return", "  @x := %1;\n  return", "@x is used before it is defined"),
        ("def @main", "graph main", "a graph begins with"),
        ("%1 = clip", "%1 clip", "cannot read"),
    ],
)
def test_damaged_text_is_refused_with_its_line(old: str, new: str, what: str) -> None:
    text = (
        "def @main(%x: Tensor[(1, 4), float32]) {\n"
        "  %0 = negative(%x) /* ty=Tensor[(1, 4), float32] */;\n"
        "  %1 = clip(%0, max=6.0) /* ty=Tensor[(1, 4), float32] */;\n"
        "  return %1;\n}\n"
    )
    parse(text)
    assert old in text
    with pytest.raises(TTEError, match="TTE-E010") as problem:
        parse(text.replace(old, new), file="net.ir")
    assert what in str(problem.value)
    assert "net.ir:" in problem.value.where


def test_builder_refuses_what_does_not_fit() -> None:
    builder = Builder()
    x, y = Value("x", TensorType((2, 3))), Value("y", TensorType((2, 4)))
    for op, inputs, attrs in (
        ("add", (x, y), {}),
        ("nn.dense", (x, y), {}),
        ("clip", (x,), {"lo": 1.0}),
        ("transpose", (x,), {}),
        ("no.such.operator", (x,), {}),
    ):
        with pytest.raises(InvalidType):
            builder.call(op, *inputs, **attrs)


def edit(graph: Graph, i: int, **changes: object) -> Graph:
    nodes = list(graph.nodes)
    nodes[i] = replace(nodes[i], **changes)
    return replace(graph, nodes=tuple(nodes))


def test_verifier_finds_every_kind_of_fault() -> None:
    graph = attach_sgd(differentiate(networks.with_loss(networks.residual(("head.bias",)))), 0.1)
    verify(graph)
    update = next(i for i, n in enumerate(graph.nodes) if n.op == "nn.sgd")
    relu = next(i for i, n in enumerate(graph.nodes) if n.op == "nn.relu")
    head = graph.params[0]
    wrong = Value(graph.nodes[relu].output.name, TensorType((1,)))
    faults = {
        "use before definition": replace(graph, nodes=graph.nodes[::-1]),
        "wrong type": edit(graph, relu, outputs=(wrong,)),
        "second definition": replace(graph, nodes=(*graph.nodes, graph.nodes[relu])),
        "unknown operator": edit(graph, relu, op="nn.rely"),
        "missing attribute": edit(graph, 0, attrs={}),
        "update of a constant": replace(graph, params=graph.params[1:], updates=graph.updates),
        "update of another type": replace(graph, updates=((head, graph.outputs[0]),)),
        "two updates": replace(graph, updates=graph.updates * 2),
        "output nobody makes": replace(graph, outputs=(Value("nothing", TensorType(())),)),
        "in place of a buffer that is read later": edit(graph, relu + 1, inplace=(0,)),
        "in place of a constant": edit(graph, 0, inplace=(1,)),
        "in place against the contract": edit(graph, update, inplace=(1,)),
        "weights of another shape": replace(graph, params=(replace(head, data=np.zeros(1)), *graph.params[1:])),
    }
    for fault, broken in faults.items():
        try:
            verify(broken)
        except InvalidGraph:
            continue
        pytest.fail(f"not found: {fault}")
    verify(edit(graph, update, inplace=(0,)))


def test_in_place_update_must_be_the_last_reader() -> None:
    """A param may be overwritten only behind everything that reads it."""
    builder = Builder()
    w = Param("w", TensorType((3,)), np.ones(3, np.float32))
    rate = Param("rate", TensorType(()), np.asarray(0.5, np.float32))
    x = Value("x", TensorType((3,)))
    new = builder.call("nn.sgd", w, x, rate)
    y = builder.call("multiply", w, x)
    graph = Graph("main", (x,), (w, rate), (), tuple(builder.nodes), (y,), ((w, new),)).renumbered()
    verify(graph)
    with pytest.raises(InvalidGraph, match="read later"):
        verify(edit(graph, 0, inplace=(0,)))


def test_interpreter_reads_old_params_and_returns_new_ones() -> None:
    builder = Builder()
    w = Param("w", TensorType((2,)), np.asarray([1, 2], np.float32))
    x = Value("x", TensorType((2,)))
    total = builder.call("add", w, x)
    again = builder.call("multiply", total, w)
    graph = Graph("main", (x,), (w,), (), tuple(builder.nodes), (again,), ((w, total),)).renumbered()
    result = evaluate(graph, [np.asarray([3, 4], np.float32)])
    np.testing.assert_array_equal(result.outputs[0], [4, 12])
    np.testing.assert_array_equal(result.params["w"], [4, 6])
    np.testing.assert_array_equal(w.data, [1, 2])
    second = evaluate(graph, [np.asarray([3, 4], np.float32)], result.params)
    np.testing.assert_array_equal(second.params["w"], [7, 10])


def test_region_means_its_body() -> None:
    x = Value("x", TensorType((4,)))
    inner = Builder()
    a = Value("a", TensorType((4,)))
    y = inner.call("nn.relu", inner.call("negative", a))
    body = Graph("region", (a,), nodes=tuple(inner.nodes), outputs=(y,)).renumbered()
    out = Value("0", TensorType((4,)))
    graph = Graph("main", (x,), nodes=(Node("region", (x,), {"strategy": "fused"}, (out,), body=body),), outputs=(out,))
    verify(graph)
    assert parse(str(graph)) == graph == pickle.loads(pickle.dumps(graph))  # without what verify remembers with it
    np.testing.assert_array_equal(evaluate(graph, [np.asarray([-1, 2, -3, 0], np.float32)]).outputs[0], [1, 0, 3, 0])


def test_types_are_static_and_plain() -> None:
    assert TensorType((2, 9), "bit").nbytes == 3
    assert TensorType((), "float32").nbytes == 4
    with pytest.raises(AssertionError):
        TensorType((np.int64(3),))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        TensorType((3,), "float64")
    assert all(op.infer.__doc__ or op.kind == "elementwise" for op in OPS.values())
