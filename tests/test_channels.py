"""Channels that learn come first: the function stays, the weights follow, and nothing is copied that can be moved."""

from dataclasses import replace

import networks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tte.errors import TTEError
from tte.ir import Const, Graph, Origin, TensorType, Value, evaluate, verify
from tte.passes.channels import select_channels
from tte.scheme import Learned, UpdateScheme, find_layers, resolve


def with_origins(graph: Graph) -> tuple[Graph, dict[str, np.ndarray]]:
    """Every named constant comes from a user's tensor in reversed layout, scaled per element; also those tensors."""
    rng, users = np.random.default_rng(7), {}
    new: dict[str, Value] = {}
    for const in graph.consts:
        if const.name.startswith("const."):
            continue
        shape = const.type.shape[::-1]
        index = np.arange(const.type.size).reshape(shape).T
        scale = rng.uniform(0.5, 2, const.type.shape)
        user = np.empty(const.type.size)
        user[index.reshape(-1)] = (const.data / scale).reshape(-1)
        users[const.name] = user
        new[const.name] = replace(const, origin=Origin(const.name, shape, index, scale))
    nodes = tuple(replace(n, inputs=tuple(new.get(v.name, v) for v in n.inputs)) for n in graph.nodes)
    return replace(graph, nodes=nodes, consts=tuple(new.get(c.name, c) for c in graph.consts)), users  # type: ignore[misc]


def check(graph: Graph, *rules: dict[str, object]) -> tuple[Graph, list[str]]:
    """Select; the result computes the same, and every weight still knows where its elements came from."""
    graph, users = with_origins(graph)
    resolved = resolve(UpdateScheme.load({"train": list(rules)}), graph)
    result, notes = select_channels(graph, resolved)
    verify(result)
    x = np.random.default_rng(1).standard_normal(graph.inputs[0].type.shape).astype(np.float32)
    before, after = evaluate(graph, [x]).outputs, evaluate(result, [x]).outputs
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * max(1, np.abs(a).max()))
    consts = {c.name: c for c in result.consts}
    for name, user in users.items():
        const = consts[name]
        assert const.origin is not None and const.origin.scale is not None
        np.testing.assert_allclose(user[const.origin.index] * const.origin.scale, const.data, rtol=1e-6)
    for learned in resolved.layers:
        if learned.channels is not None:
            assert learned.weight is not None
            assert trained_channels(graph, consts[learned.weight], learned) == learned.channels
    assert bool(notes) == any(n.op == "take" for n in result.nodes)
    return result, notes


def trained_channels(graph: Graph, const: Const, learned: Learned) -> tuple[int, ...]:
    """Which of the original channels the first of a weight are, as its origin has it."""
    before = next(c for c in graph.consts if c.name == const.name)
    assert before.origin and const.origin and learned.channels and learned.axis is not None
    per = const.type.shape[learned.axis] // learned.of
    places = np.indices(const.type.shape)[learned.axis] // per
    place = dict(zip(before.origin.index.reshape(-1).tolist(), places.reshape(-1).tolist(), strict=True))
    first = np.take(const.origin.index, range(len(learned.channels) * per), learned.axis)
    return tuple(sorted({place[i] for i in first.reshape(-1).tolist()}))


def rule(layer: str, *channels: int) -> dict[str, object]:
    return {"layer": layer, "weight": {"select": list(channels)}, "bias": True}


X = Value("x", TensorType((1, 6, 6, 3)))


def test_between_two_convolutions() -> None:
    net = networks.Network()
    h = net.call("nn.relu", net.conv("a", X, 6))
    h = net.call("nn.max_pool2d", h, pool_size=(2, 2), strides=(2, 2))
    graph = net.graph(X, net.conv("b", h, 4))
    result, notes = check(graph, rule("b", 4, 1))
    assert not notes and [n.op for n in result.nodes] == [n.op for n in graph.nodes]


@pytest.mark.parametrize("layer", ["stem", "a", "b", "depthwise", "narrow", "head"])
def test_residual_network(layer: str) -> None:
    _, notes = check(networks.residual(), rule(layer, 1))
    assert bool(notes) == (layer == "stem")  # the model's input keeps its order


def test_wants_that_nest_need_no_copy() -> None:
    # a and depthwise read the same stream: first 2, then 2 and 5.
    _, notes = check(networks.residual(), rule("a", 2), rule("depthwise", 5, 2))
    assert not notes
    _, notes = check(networks.residual(), rule("a", 2), rule("depthwise", 5))
    assert len(notes) == 1 and notes[0].startswith("depthwise") and "another layer" in notes[0]


def test_a_new_order_of_the_input_is_a_copy() -> None:
    net = networks.Network()
    _, notes = check(net.graph(X, net.conv("a", X, 4)), rule("a", 2))
    assert notes == ["a: the channels that learn are copied together at run time: its input has a fixed order"]


def test_the_output_keeps_its_order() -> None:
    net = networks.Network()
    h = net.conv("a", X, 6)
    graph = net.graph(X, net.conv("b", h, 4))
    _, notes = check(replace(graph, outputs=(graph.nodes[0].output, *graph.outputs)), rule("b", 3))
    assert len(notes) == 1 and "the model's output" in notes[0]


@pytest.mark.parametrize("swap", [False, True])
def test_what_is_added_to_a_fixed_order_is_fixed(swap: bool) -> None:
    net = networks.Network()
    a, b = net.conv("a", X, 6), net.conv("b", X, 6)
    grouped = net.conv("grouped", a, 6, groups=2)
    h = net.call("add", *((b, a) if swap else (a, b)))
    h = net.call("add", net.conv("c", h, 6), grouped)
    _, notes = check(net.graph(X, h), rule("c", 4))
    assert len(notes) == 1 and "grouped (nn.conv2d)" in notes[0]


def test_flattened_concatenation() -> None:
    net = networks.Network()
    a, b = net.conv("a", X, 4), net.conv("b", X, 5)
    flat = net.call("reshape", net.call("concatenate", a, b, axis=3), newshape=(1, 324))
    y = net.call("add", net.dense("d", flat, 3), net.dense("e", net.call("mean", net.conv("c", a, 2), axis=(1, 2)), 3))
    _, notes = check(net.graph(X, y), rule("c", 3))
    assert not notes


@pytest.mark.parametrize("channels_last", [True, False])
def test_flatten_into_dense(channels_last: bool) -> None:
    net = networks.Network()
    h = net.call("nn.relu", net.conv("a", X, 4))
    h = net.conv("b", h, 5)
    other = net.conv("c", h, 2)
    flat = h if channels_last else net.call("transpose", h, axes=(0, 3, 1, 2))
    y = net.dense("d", net.call("reshape", flat, newshape=(1, 180)), 3)
    y = net.call("add", y, net.dense("e", net.call("mean", other, axis=(1, 2)), 3))
    result, notes = check(net.graph(X, y), rule("c", 4, 2), rule("b", 3))
    assert not notes
    before = next(c for c in net.graph(X, y).consts if c.name == "d.weight")
    assert not np.array_equal(next(c for c in result.consts if c.name == "d.weight").data, before.data)
    _, notes = check(net.graph(X, y), rule("d", 7, 100))
    assert "several places" in notes[0]


def test_squeeze_and_excitation() -> None:
    net = networks.Network()
    h = net.conv("a", X, 6)
    s = net.call("mean", h, axis=(1, 2), keepdims=True)
    s = net.call("sigmoid", net.conv("up", net.call("nn.relu", net.conv("down", s, 2, kernel=1)), 6, kernel=1))
    h = net.call("multiply", h, s)
    _, notes = check(net.graph(X, net.conv("b", h, 4)), rule("b", 5, 0), rule("up", 1))
    assert not notes


def test_concatenation_is_moved_block_by_block() -> None:
    net = networks.Network()
    a, b = net.conv("a", X, 4), net.conv("b", X, 5)
    both = net.call("concatenate", a, b, X, axis=3)
    y = net.call("add", net.conv("c", both, 3), net.conv("d", a, 3))
    _, notes = check(net.graph(X, y), rule("d", 3, 1))
    assert not notes
    _, notes = check(net.graph(X, y), rule("c", 6, 1))
    assert len(notes) == 1


def test_zero_padded_shortcut() -> None:
    net = networks.Network()
    h = net.call("nn.relu", net.conv("a", X, 4))
    wide = net.call("pad", h, pad_width=((0, 0, 0), (0, 0, 0), (0, 0, 0), (2, 2, 0)))
    y = net.conv("c", net.call("nn.relu", wide), 3)
    _, notes = check(net.graph(X, net.call("add", y, net.conv("b", h, 3))), rule("b", 3))
    assert not notes


def test_filters_of_a_depthwise_convolution_stay_with_their_channel() -> None:
    net = networks.Network()
    h = net.conv("a", X, 4)
    w, b = net.weight("dw.weight", 8, 3, 3, 1), net.weight("dw.bias", 8)
    h = net.call("nn.conv2d", h, w, b, layer="dw", groups=4, padding=(1, 1, 1, 1))
    _, notes = check(net.graph(X, net.conv("c", h, 3)), rule("dw", 2))
    assert len(notes) == 1


def test_per_channel_constants_follow() -> None:
    net = networks.Network()
    h = net.conv("a", X, 4)
    h = net.call("add", net.call("multiply", h, net.weight("s", 4)), net.weight("t", 1, 1, 1, 4))
    h = net.call("multiply", h, net.builder.const(np.arange(144, dtype=np.float32).reshape(1, 6, 6, 4)))
    _, notes = check(net.graph(X, net.conv("b", h, 3)), rule("b", 3))
    assert not notes


def shared_weight() -> Graph:
    net = networks.Network()
    h = net.conv("a", X, 4)
    w = net.weight("shared", 4, 3, 3, 4)
    for layer in ("b", "c"):
        h = net.call("nn.relu", net.call("nn.conv2d", h, w, padding=(1, 1, 1, 1), layer=layer))
    return net.graph(X, h)


def test_shared_weight() -> None:
    _, notes = check(shared_weight(), rule_without_bias("b", 2))
    assert len(notes) == 2 and "b (nn.conv2d) shares its weights" in notes[0]


def rule_without_bias(layer: str, *channels: int) -> dict[str, object]:
    return {"layer": layer, "weight": {"select": list(channels)}}


def test_weight_that_is_not_only_a_weight() -> None:
    net = networks.Network()
    w = net.weight("w", 4, 1, 1, 3)
    y = net.call(
        "add", net.call("nn.conv2d", X, w, layer="a"), net.call("reshape", net.call("sum", w, axis=(3,)), newshape=(4,))
    )
    with pytest.raises(TTEError) as caught:
        check(net.graph(X, y), rule_without_bias("a", 2))
    assert caught.value.code == "TTE-E033"


def random_network(rng: np.random.Generator) -> Graph:
    """A chain of random layers over a few live streams, with residual additions and concatenations."""
    net = networks.Network(seed=int(rng.integers(1 << 30)))
    streams: list[Value] = [X]
    for i in range(int(rng.integers(3, 10))):
        h = streams[int(rng.integers(max(0, len(streams) - 3), len(streams)))]
        c = h.type.shape[3]
        match int(rng.integers(8)):
            case 0 | 1:
                h = net.conv(f"conv{i}", h, int(rng.choice([4, 6])), kernel=int(rng.choice([1, 3])))
            case 2:
                h = net.conv(f"depthwise{i}", h, c, groups=c)
            case 3 | 4:
                same = [s for s in streams if s.type == h.type]
                h = net.call("add", h, same[int(rng.integers(len(same)))])
            case 5:
                h = net.call(str(rng.choice(["nn.relu", "tanh", "nn.hard_swish"])), h)
            case 6:
                h = net.call("concatenate", h, streams[int(rng.integers(len(streams)))], axis=3)
            case _:
                if c % 2 == 0:
                    h = net.conv(f"grouped{i}", h, 6, groups=2)
        streams.append(h)
    h = net.call("add", net.conv("left", streams[-1], 4), net.conv("right", streams[len(streams) // 2], 4))
    return net.graph(X, net.dense("head", net.call("reshape", h, newshape=(1, 144)), 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 30))
def test_random_networks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = random_network(rng)
    rules = []
    for layer in find_layers(graph):
        if layer.axis is not None and rng.random() < 0.6:
            count = int(rng.integers(1, layer.channels + 1))
            rules.append(rule(layer.name, *(int(c) for c in rng.permutation(layer.channels)[:count])))
    if rules:
        check(graph, *rules)
