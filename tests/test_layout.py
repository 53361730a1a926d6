"""Channels last, and the canonical forms that it ends in."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tte.ops  # noqa: F401
from tte.frontends import import_model
from tte.ir import Builder, Graph, Origin, TensorType, Value, evaluate, rewrite, verify
from tte.passes.batch_norm import fold_batch_norm
from tte.passes.canonicalize import canonicalize
from tte.passes.layout import to_nhwc


class Block(nn.Module):
    """A residual block as in ResNet."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Gate(nn.Module):
    """Squeeze and excitation, as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


def separable(before: int, channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False), nn.BatchNorm2d(before), nn.ReLU6(),
        nn.Conv2d(before, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.Hardswish(), Gate(channels),
    )  # fmt: skip


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "resnet": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8, 1), Block(8, 16, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        ),
        (1, 3, 8, 8),
    ),
    "mobilenet": (
        nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, 2), separable(4, 8, 1), separable(8, 8, 2),
            nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Softmax(-1),
        ),
        (1, 3, 16, 16),
    ),
    "speech": (
        nn.Sequential(
            nn.Conv1d(6, 8, 5, 2, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(16, 3),
        ),
        (1, 6, 20),
    ),
}  # fmt: skip


def simplify(graph: Graph) -> Graph:
    for step in (canonicalize, to_nhwc, fold_batch_norm):
        graph = verify(step(graph))
    return graph


@pytest.mark.parametrize("name", NETWORKS)
def test_published_shapes_have_one_transposition(name: str) -> None:
    module, shape = NETWORKS[name]
    graph = simplify(import_model(module.eval(), (torch.zeros(shape),)))
    assert [n.op for n in graph.nodes].count("transpose") == 1
    assert not {"nn.batch_norm", "matmul", "pad"} & {n.op for n in graph.nodes}
    assert all(len(n.inputs) == 3 for n in graph.nodes if n.op in ("nn.conv2d", "nn.dense"))
    x = torch.randn(shape)
    np.testing.assert_allclose(evaluate(graph, [x.numpy()]).outputs[0], module(x).detach(), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 5, 1, 1)], ids=["one channel", "one pixel"])
def test_nothing_moves_where_the_order_in_memory_is_the_same(shape: tuple[int, ...]) -> None:
    graph = simplify(import_model(nn.Conv2d(shape[1], 1, 1), (torch.zeros(shape),)))
    assert {n.op for n in graph.nodes} == {"reshape", "nn.conv2d"}


def test_flatten_permutes_the_weights_of_the_dense_layer() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 6, 2)).eval()
    graph = simplify(import_model(module, (torch.zeros(1, 3, 7, 8),)))
    assert [n.op for n in graph.nodes] == ["transpose", "nn.conv2d", "nn.relu", "reshape", "nn.dense"]
    weight = next(c for c in graph.consts if c.name == "3.weight")
    assert weight.origin is not None
    # column (y, x, c) of ours is column (c, y, x) of the user's
    y, x, c, out = 3, 2, 1, 1
    assert weight.origin.index[out, (y * 6 + x) * 4 + c] == out * 120 + (c * 5 + y) * 6 + x
    np.testing.assert_array_equal(
        weight.data.reshape(-1), module[3].weight.detach().numpy().flat[weight.origin.index.flat]
    )


def test_text_in_text_out() -> None:
    builder = Builder()
    x = Value("x", TensorType((1, 2, 4, 4)))
    w = builder.const(np.ones((3, 1, 1, 2), np.float32), "c.weight", Origin("c.weight", (3, 2, 1, 1), np.arange(6)))
    b = builder.const(
        np.ones((1, 3, 1, 1), np.float32), "c.bias", Origin("c.bias", (3,), np.arange(3).reshape(1, 3, 1, 1))
    )
    y = builder.call("nn.conv2d", builder.call("transpose", x, axes=(0, 2, 3, 1)), w, layer="c")
    y = builder.call("add", builder.call("transpose", y, axes=(0, 3, 1, 2)), b, layer="c")
    y = builder.call("mean", builder.call("nn.relu", y), axis=(2, 3), keepdims=True)
    y = builder.call("reshape", y, newshape=(1, 3))
    graph = rewrite(Graph("main", (x,), consts=tuple(builder.consts.values()), outputs=(y,)), builder.nodes)
    assert str(to_nhwc(graph)) == (
        "def @main(%x: Tensor[(1, 2, 4, 4), float32]) {\n"
        "  const @c.weight: Tensor[(3, 1, 1, 2), float32];\n"
        "  const @c.bias: Tensor[(3,), float32];\n"
        '  %0 = transpose(%x, axes=(0, 2, 3, 1), layer="c") /* ty=Tensor[(1, 4, 4, 2), float32] */;\n'
        '  %1 = nn.conv2d(%0, @c.weight, @c.bias, layer="c") /* ty=Tensor[(1, 4, 4, 3), float32] */;\n'
        "  %2 = nn.relu(%1) /* ty=Tensor[(1, 4, 4, 3), float32] */;\n"
        "  %3 = mean(%2, axis=(1, 2)) /* ty=Tensor[(1, 3), float32] */;\n"
        "  return %3;\n"
        "}\n"
    )


@st.composite
def moving_graphs(draw: st.DrawFn) -> Graph:
    """Random programs of operators that move, split, merge, reduce and combine, over values of small shapes."""
    builder = Builder()
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    values: list[Value] = [Value("x", TensorType(shape))]

    def constant(size: tuple[int, ...]) -> Value:
        seed = draw(st.integers(0, 99))
        return builder.const(np.random.default_rng(seed).standard_normal(size).astype(np.float32))

    for _ in range(draw(st.integers(2, 10))):
        x = draw(st.sampled_from(values[-4:]))
        rank, dims = x.type.rank, x.type.shape
        kind = draw(
            st.sampled_from(
                "transpose transpose reshape unary binary const pad slice concat reduce softmax dense take".split()
            )
        )
        if kind == "transpose" and rank:
            values.append(builder.call("transpose", x, axes=tuple(draw(st.permutations(range(rank))))))
        elif kind == "reshape":
            split = [f for d in dims for f in draw(st.sampled_from(factors(d)))]
            merged = draw(
                st.sampled_from(
                    [
                        split,
                        [d for d in split if d != 1],
                        [math.prod(split)],
                        [1, *split],
                        [math.prod(split[:2]), *split[2:]],
                    ]
                )
            )
            values.append(builder.call("reshape", x, newshape=tuple(merged)))
        elif kind == "unary":
            values.append(builder.call(draw(st.sampled_from(["nn.relu", "tanh"])), x))
        elif kind == "binary":
            same = [v for v in values if v.type.shape == dims]
            values.append(builder.call(draw(st.sampled_from(["add", "multiply"])), x, draw(st.sampled_from(same))))
        elif kind == "const":
            size = tuple(draw(st.sampled_from([1, d])) for d in dims[draw(st.integers(0, rank)) :])
            operands = draw(st.permutations([x, constant(size)]))
            values.append(builder.call("add", *operands))
        elif kind == "pad":
            width = tuple((draw(st.integers(0, 1)), draw(st.integers(0, 2)), draw(st.integers(0, 1))) for _ in dims)
            values.append(builder.call("pad", x, pad_width=width, value=0.5))
        elif kind == "slice":
            begin = tuple(draw(st.integers(0, d - 1)) for d in dims)
            strides = tuple(draw(st.integers(1, 2)) for _ in dims)
            values.append(builder.call("slice", x, begin=begin, end=dims, strides=strides))
        elif kind == "concat" and rank:
            same = [v for v in values if v.type.shape == dims]
            values.append(
                builder.call("concatenate", x, draw(st.sampled_from(same)), axis=draw(st.integers(0, rank - 1)))
            )
        elif kind == "reduce" and rank:
            axis = tuple(sorted(draw(st.sets(st.integers(0, rank - 1), min_size=1))))
            values.append(builder.call("mean", x, axis=axis, keepdims=draw(st.booleans())))
        elif kind == "softmax" and rank:
            values.append(builder.call("nn.softmax", x))
        elif kind == "dense" and rank >= 2:
            values.append(builder.call("nn.dense", x, constant((3, dims[-1]))))
        elif kind == "take" and rank:
            axis = draw(st.integers(0, rank - 1))
            values.append(builder.call("take", x, axis=axis, indices=tuple(draw(st.permutations(range(dims[axis]))))))
        if values[-1].type.size > 4000:
            values.pop()
    outputs = tuple(v for v in values[-2:] if v.name != "x")
    graph = Graph("main", (values[0],), consts=tuple(builder.consts.values()), outputs=outputs)
    return rewrite(graph, builder.nodes)


def factors(n: int) -> list[list[int]]:
    return [[n], [1, n], [n, 1], *([[a, n // a] for a in range(2, n) if n % a == 0])]


@settings(max_examples=300, deadline=None)
@given(moving_graphs(), st.integers(0, 99))
def test_random_programs_mean_the_same(graph: Graph, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(graph.inputs[0].type.shape).astype(np.float32)
    expected = evaluate(verify(graph), [x]).outputs
    for step in (canonicalize, to_nhwc):
        after = verify(step(graph))
        for a, b in zip(evaluate(after, [x]).outputs, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
