import copy
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tte.errors import TTEError
from tte.ir import Const, Graph, Origin, TensorType, Value
from tte.scheme import Learned, Resolved, UpdateScheme, expand_braces, find_layers, resolve

GRAPH = networks.residual()  # stem, a, b, depthwise, narrow, head

VALID = """\
version: 1
loss: {name: cross_entropy, label_smoothing: 0.1, class_weights: [1, 1, 1, 1, 2.5]}
optimizer: {name: sgd, lr: 1e-3, clip_loss_grad: 4.0}
train:
  - {layer: "{a,b}", bias: true}
  - {layer: "*", weight: none, bias: false}
  - layer: narrow
    weight: {in_channels: 0.5, select: l2}
  - {layer: b, weight: {select: [3, 1]}, bias: true}
  - {layer: depthwise, weight: {in_channels: 3}}
  - {layer: head, weight: all, bias: true}
io: {input: {dtype: uint8, layout: nhwc, mean: [127.5], std: [127.5]}, target: label}
budget: {sram: 256KB, flash: 1MB}
"""


def refuse(source, graph: Graph = GRAPH) -> TTEError:  # type: ignore[no-untyped-def]
    with pytest.raises(TTEError) as caught:
        resolve(UpdateScheme.load(source), graph)
    assert caught.value.what and caught.value.where and caught.value.fix
    return caught.value


def train(*rules: dict[str, object]) -> dict[str, object]:
    return {"train": list(rules)}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "s.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def names(resolved: Resolved) -> list[str]:
    return [n for e in resolved.layers for n in (e.weight, e.bias) if n]


ALL = [f"{layer}.{kind}" for layer in ("stem", "a", "b", "depthwise", "narrow", "head") for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    ("form", "learned"),
    [
        ("full", ALL),
        ("last-layer", ALL[-2:]),
        ("last-k:2", ALL[-4:]),
        ("last-k:6", ALL),
        ("bias-only", ALL[1::2]),
    ],
)
def test_short_forms(form: str, learned: list[str]) -> None:
    assert names(resolve(UpdateScheme.load(form), GRAPH)) == learned
    assert names(resolve(UpdateScheme.load({"train": form}), GRAPH)) == learned


def test_file(tmp_path: Path) -> None:
    scheme = UpdateScheme.load(write(tmp_path, VALID))
    assert (
        scheme.optimizer.lr == 1e-3
        and scheme.budget.sram == 256 * 1024
        and scheme.loss.class_weights == (1, 1, 1, 1, 2.5)
    )
    norms = np.square(GRAPH.find("narrow.weight").data.astype(float)).sum(axis=(0, 1, 2))  # type: ignore[attr-defined]
    largest = tuple(sorted(np.argsort(-norms)[:4].tolist()))
    assert resolve(scheme, GRAPH).layers == (
        Learned("b", "b.weight", "b.bias", (1, 3), 3, 8),
        Learned("depthwise", "depthwise.weight", None, (0, 1, 2), 0, 8),
        Learned("narrow", "narrow.weight", None, largest, 3, 8),
        Learned("head", "head.weight", "head.bias"),
    )


def test_resolved_yaml_says_the_same(tmp_path: Path) -> None:
    resolved = resolve(UpdateScheme.load(write(tmp_path, VALID)), GRAPH)
    again = resolve(UpdateScheme.load(write(tmp_path, resolved.to_yaml())), GRAPH)
    assert again.layers == resolved.layers and again.to_yaml() == resolved.to_yaml()
    assert again.scheme.model_dump(exclude={"train"}) == resolved.scheme.model_dump(exclude={"train"})


def test_channels_are_numbered_as_the_user_does(tmp_path: Path) -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    graph = net.graph(x, net.dense("d", x, 3))
    columns = np.array([2, 0, 3, 1])  # ours -> the user's
    d = graph.find("d.weight")
    assert isinstance(d, Const)
    moved = replace(d, origin=Origin("d.weight", (3, 4), np.arange(12).reshape(3, 4)[:, columns]))
    graph = replace(graph, nodes=tuple(replace(n, inputs=(n.inputs[0], moved, *n.inputs[2:])) for n in graph.nodes))
    resolved = resolve(UpdateScheme.load(train({"layer": "d", "weight": {"select": [1, 2]}})), graph)
    assert resolved.layers[0].channels == (0, 3)
    again = resolve(UpdateScheme.load(write(tmp_path, resolved.to_yaml())), graph)
    assert again.layers == resolved.layers


def test_last_rule_wins() -> None:
    scheme = train({"layer": "*", "weight": "all", "bias": True}, {"layer": "[!h]*", "bias": True})
    assert names(resolve(UpdateScheme.load(scheme), GRAPH)) == [*ALL[1:-2:2], *ALL[-2:]]


def test_braces() -> None:
    assert list(expand_braces("b.{9..11}.{x,y}")) == ["b.9.x", "b.9.y", "b.10.x", "b.10.y", "b.11.x", "b.11.y"]
    assert list(expand_braces("plain{x}")) == ["plain{x}"]


def test_layer_called_like_a_number(tmp_path: Path) -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    graph = net.graph(x, net.dense("1.10", net.dense("1.1", x, 4), 3))
    scheme = UpdateScheme.load(write(tmp_path, "train:\n  - {layer: 1.10, weight: all}\n"))
    resolved = resolve(scheme, graph)
    assert names(resolved) == ["1.10.weight"]
    assert names(resolve(UpdateScheme.load(write(tmp_path, resolved.to_yaml())), graph)) == ["1.10.weight"]


def with_origin(graph: Graph, name: str, user: str) -> Graph:
    """The graph whose constant ``name`` comes from the user's tensor ``user``."""

    def changed(v: Value) -> Value:
        if v.name != name:
            return v
        assert isinstance(v, Const)
        return replace(v, origin=Origin(user, v.type.shape, np.arange(v.type.size).reshape(v.type.shape)))

    nodes = tuple(replace(n, inputs=tuple(changed(v) for v in n.inputs)) for n in graph.nodes)
    return replace(graph, consts=tuple(changed(c) for c in graph.consts), nodes=nodes)  # type: ignore[misc]


def test_folded_batch_norm_is_named_for_its_bias() -> None:
    graph = with_origin(GRAPH, "a.bias", "bn1.bias")
    assert names(resolve(UpdateScheme.load(train({"layer": "bn1", "bias": True})), graph)) == ["a.bias"]
    assert names(resolve(UpdateScheme.load(train({"layer": "bn*", "bias": True})), graph)) == ["a.bias"]
    both = train({"layer": "a", "weight": "all"}, {"layer": "bn1", "bias": True})
    assert names(resolve(UpdateScheme.load(both), graph)) == ["a.weight", "a.bias"]
    error = refuse(train({"layer": "bn1", "weight": "all"}), graph)
    assert error.code == "TTE-E033" and "train the weight of a" in error.fix
    assert "bn1" in refuse(train({"layer": "bn2", "bias": True}), graph).fix


def scale_and_shift() -> Graph:
    net = networks.Network()
    x = Value("x", TensorType((1, 4, 4, 2)))
    h = net.call("nn.relu", net.conv("conv", x, 3))
    h = net.call("multiply", h, net.weight("bn.weight", 3), layer="bn")
    h = net.call("add", h, net.weight("bn.bias", 3), layer="bn")
    graph = net.graph(x, net.call("mean", net.call("multiply", h, net.builder.const(2.0)), axis=(1, 2)))
    return with_origin(with_origin(graph, "bn.weight", "bn.weight"), "bn.bias", "bn.bias")


def test_scale_and_shift_is_a_layer() -> None:
    graph = scale_and_shift()
    assert [(x.name, x.op) for x in find_layers(graph)] == [("conv", "nn.conv2d"), ("bn", "multiply")]
    assert names(resolve(UpdateScheme.load("full"), graph)) == ["conv.weight", "conv.bias", "bn.weight", "bn.bias"]
    assert refuse(train({"layer": "bn", "weight": {"in_channels": 0.5}}), graph).code == "TTE-E033"


def by_number(count: int, numbers: list[int], ratios: list[float]) -> dict[str, object]:
    return {"train": {"n_bias_update": count, "weight_idx": numbers, "ratio": ratios}}


def test_layers_by_number(tmp_path: Path) -> None:
    """The convolutions are stem, a, b, depthwise and narrow; the head is the classifier."""
    scheme = by_number(4, [1, 2, 3, 4], [0.25, 0.0, 1.0, 0.5])
    rules = train(
        {"layer": "a", "weight": {"in_channels": 0.25, "select": "l2"}, "bias": True},
        {"layer": "b", "bias": True},
        {"layer": "depthwise", "weight": "all", "bias": True},
        {"layer": "narrow", "weight": {"in_channels": 0.5, "select": "l2"}, "bias": True},
        {"layer": "head", "weight": "all", "bias": True},
    )
    resolved = resolve(UpdateScheme.load(scheme), GRAPH)
    assert resolved.layers == resolve(UpdateScheme.load(rules), GRAPH).layers
    assert resolved.layers[1] == Learned("b", None, "b.bias")
    for text in (resolved.to_yaml(), yaml.safe_dump(scheme)):
        assert resolve(UpdateScheme.load(write(tmp_path, text)), GRAPH).layers == resolved.layers
    assert names(resolve(UpdateScheme.load(by_number(0, [], [])), GRAPH)) == ALL[-2:]


def test_an_error_in_numbers_names_its_line(tmp_path: Path) -> None:
    text = "train:\n  n_bias_update: 2\n  weight_idx: [3, 4]\n  ratio:\n    - 1.0\n    - 0.01\n"
    error = refuse(write(tmp_path, text))
    assert error.code == "TTE-E033" and error.where.startswith(f"{tmp_path / 's.yaml'}:6")


def test_new_head_learns() -> None:
    head = {"layer": "head", "classes": 3}
    scheme = UpdateScheme.load({"train": "bias-only", "head": head})
    assert names(resolve(scheme, GRAPH)) == [*ALL[1:-2:2], *ALL[-2:]]
    frozen = {"train": [{"layer": "*", "bias": True}], "head": head}
    assert refuse(frozen).code == "TTE-E036"


@pytest.mark.parametrize(
    ("scheme", "code", "said"),
    [
        ("", "TTE-E030", "it is ''"),
        ("ful", "TTE-E030", "did you mean full?"),
        ("no/such/file.yaml", "TTE-E030", "no such file"),
        (train({"layer": "a", "weight": {"channels": 0.25}}), "TTE-E031", "did you mean in_channels?"),
        (train({"layer": "a", "weight": {"in_channels": 1.5}}), "TTE-E031", "(0, 1]"),
        (train({"layer": "a", "weight": {"in_channels": 0}}), "TTE-E031", "(0, 1]"),
        (train({"layer": "a", "weight": {"in_channels": True}}), "TTE-E031", "(0, 1]"),
        (train({"layer": "a", "weight": {"in_channels": [0, 1]}}), "TTE-E031", "said by select: [0, 1]"),
        (train({"layer": ["a", "b"], "weight": "all"}), "TTE-E031", "a pattern for several layers: {a,b}"),
        (train({"layer": "a", "bias": [True]}), "TTE-E031", "one value, not a list"),
        (train("a"), "TTE-E031", "keys: layer, weight, bias"),
        ({"train": "full", "io": {"input": ["int8"]}}, "TTE-E031", "keys: dtype, layout"),
        (train({"layer": "a", "weight": {"select": [1, 1]}}), "TTE-E031", "different"),
        (train({"layer": "a", "weight": {"select": [-1]}}), "TTE-E031", "from 0"),
        (train({"layer": "a", "weight": {"select": [8]}}), "TTE-E033", "0 to 7"),
        (train({"layer": "a", "weight": {"select": list(range(9))}}), "TTE-E033", "channels: select names number 8"),
        (train({"layer": "a", "weight": {"select": [1], "in_channels": 2}}), "TTE-E031", "lists 1"),
        (train({"layer": "a", "weight": {"select": [1], "in_channels": 0.5}}), "TTE-E033", "lists 1"),
        (train({"layer": "a", "weight": {"in_channels": 9}}), "TTE-E033", "a has 8 input channels: 9 of"),
        (train({"layer": "a", "weight": {"in_channels": 0.1}}), "TTE-E033", "0.125"),
        (train({"layer": "a", "weight": {"select": "l2"}}), "TTE-E031", "in_channels is missing"),
        (train({"layer": "a", "weight": "al"}), "TTE-E031", "did you mean all?"),
        (train({"layer": "a", "bias": "yes"}), "TTE-E031", "true, false"),
        (train({"layer": "a"}), "TTE-E031", "fix:   add weight: all"),
        (train({"layr": "a", "bias": True}), "TTE-E031", "did you mean layer?"),
        (train({"layer": "a", "weight": "most"}), "TTE-E031", "none, {in_channels: 0.25}"),
        ({"train": "full", "head": {"layer": "a"}}, "TTE-E031", "number of classes"),
        (train({"layer": "depthwis", "bias": True}), "TTE-E032", "did you mean depthwise?"),
        (train({"layer": "blocks.{1..9}.*", "bias": True}), "TTE-E032", "no layer matches"),
        (train({"layer": "a{1..999999999}{1..999999999}", "bias": True}), "TTE-E031", "more than"),
        (train({"layer": "a", "weight": "none"}), "TTE-E034", "trains nothing"),
        (train(), "TTE-E034", "trains nothing"),
        ("last-k:7", "TTE-E033", "6 layers"),
        (by_number(6, [], []), "TTE-E033", "5 convolutions before its classifier, not 6"),
        (by_number(2, [2], [1.0]), "TTE-E033", "numbers from 3 to 4"),
        (by_number(0, [4], [1.0]), "TTE-E033", "raise n_bias_update"),
        (by_number(2, [5], [1.0]), "TTE-E033", "convolution 5"),
        (by_number(2, [3], [0.01]), "TTE-E033", "depthwise has 8 input channels: 0.01"),
        (by_number(2, [3, 4], [1.0]), "TTE-E031", "2 numbers in weight_idx, but 1 in ratio"),
        (by_number(2, [3, 3], [1.0, 1.0]), "TTE-E031", "twice"),
        (by_number(2, [3], [1.5]), "TTE-E031", "less than or equal to 1"),
        (by_number(2, [3], [float("nan")]), "TTE-E031", "ratio"),
        (by_number(-1, [], []), "TTE-E031", "greater than or equal to 0"),
        ({"train": {"n_bias_update": 2}}, "TTE-E031", "weight_idx is missing"),
        (
            {"train": {"n_bias_update": 2, "weight_idx": [], "ratio": [], "ratios": []}},
            "TTE-E031",
            "did you mean ratio?",
        ),
        ({"train": "last-kk"}, "TTE-E031", "did you mean last-k:6?"),
        ({"train": "full", "optimizer": {"momentum": 0.9}}, "TTE-E035", "not available yet"),
        ({"train": "full", "optimizer": {"accumulate": 4}}, "TTE-E035", "not available yet"),
        ({"train": "full", "optimizer": {"lr": 1e7}}, "TTE-E031", "a number above 0, at most 1e+06"),
        ({"train": "full", "optimizer": {"lr": -1.0}}, "TTE-E031", "lr should be greater than 0, not -1.0"),
        ({"train": "full", "optimizer": {"lr": float("nan")}}, "TTE-E031", "finite"),
        ({"train": "full", "optimizer": {"lr": 10**5000}}, "TTE-E031", "lr"),
        ({"train": "full", "quantized": {"qas": True}}, "TTE-E035", "float32"),
        ({"train": "full", "quantized": {"weight_storage": "int8"}}, "TTE-E031", "int8_sr"),
        ({"train": "full", "loss": "mse2"}, "TTE-E031", "did you mean mse?"),
        ({"train": "full", "loss": {"name": "mse", "delta": 2.0}}, "TTE-E031", "huber"),
        ({"train": "full", "loss": "mse", "io": {"target": "label"}}, "TTE-E031", "target: float` or `target: input"),
        ({"train": "full", "io": {"input": {"std": [0.0]}}}, "TTE-E031", "above 0"),
        ({"train": "full", "budget": {"sram": "256KX"}}, "TTE-E031", "fix:   write 256KB"),
        ({"train": "full", "lr": 0.1}, "TTE-E031", "unknown key 'lr'"),
        ({"train": "full", "version": 2}, "TTE-E031", "version"),
        ({"train": "full", 3: 4}, "TTE-E031", "strings"),
        ({}, "TTE-E031", "add `train: full`"),
        (5, "TTE-E031", "mapping"),
    ],
)
def test_refused(scheme: object, code: str, said: str) -> None:
    error = refuse(scheme)
    assert error.code == code and said in str(error)


def test_a_layer_without_bias() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    h = net.call("nn.dense", x, net.weight("w", 4, 4), layer="a")
    graph = net.graph(x, h)
    error = refuse("bias-only", graph)
    assert error.code == "TTE-E034" and "a has no bias" in error.what
    both = resolve(UpdateScheme.load(train({"layer": "a", "weight": "all", "bias": True})), graph)
    assert names(both) == ["w"] and both.notes == ("a has no bias",)
    assert resolve(UpdateScheme.load("full"), graph).notes == ()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("train:\n  - {layer: a, bias: true}\n  - {layer: nowhere, bias: true}\n", 3, "nowhere"),
        ("version: 1\ntrain: full\noptimizer:\n  name: sgd\n  lrr: 0.1\n", 5, "did you mean lr?"),
        ("train: full\nbudget: {sram: [1]}\n", 2, "sram"),
        ("train: full\ntrain: full\n", 2, "twice"),
        ("train: full\nloss: mse\nio:\n  target: label\n", 4, "does not fit mse"),
        ("train: [\n", 2, "YAML"),
        ("a: &x [1]\nb: *x\n", 1, "anchors"),
        ("train: full\n? [a]\n: 1\n", 2, "one word"),
        ("train: full\noptimizer: {lr: 1:30}\n", 2, "1:30"),
        ("- 1\n- 2\n", 1, "mapping"),
        ("", 1, "train is missing"),
        ("[" * 5000, 1, "deep"),
        ("version: 1\ntrain: \0", 2, "YAML"),
        (b"train: \xff\xfe", 0, "UTF-8"),
        ("#" * 300_000, 0, "larger"),
        ("train: !!python/object/apply:os.system [echo]\n", 1, "mapping"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str | bytes, line: int, said: str) -> None:
    path = write(tmp_path, text)
    error = refuse(path)
    assert error.where.startswith(f"{path}:{line}" if line else str(path))
    assert said in str(error)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 12), st.floats(), st.text(max_size=6), st.just({"in_channels": 0.5}),
    st.just([]), st.just("all"), st.just("a"), st.just([0, 2]), st.just("l2"), st.just(10**40), st.just({}),
)  # fmt: skip


def places(data: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(p for key, value in children for p in places(value, (*path, key)))]


BASE = yaml.safe_load(VALID.replace("1e-3", "0.001"))
PLACES = places(BASE)[1:]


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from(("set", "delete", "add")), VALUES), min_size=1, max_size=3
    )
)
def test_changed_schemes_end_well(changes: list[tuple[tuple[str | int, ...], str, object]]) -> None:
    data = copy.deepcopy(BASE)
    for path, how, value in changes:
        node = data
        try:
            for key in path[:-1]:
                node = node[key]
            if how == "set":
                node[path[-1]] = value
            elif how == "delete":
                del node[path[-1]]
            elif isinstance(node, dict):
                node[f"{path[-1]}x"] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    for source in (data, yaml.safe_dump(data)):
        _ends_well(source)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, len(VALID) - 1), st.integers(0, 8), st.text("{}[]:,-*&!? \n\t\"'#|>0a\0\x85é", max_size=3))
@example(0, 0, "")
def test_damaged_text_ends_well(position: int, length: int, inserted: str) -> None:
    _ends_well(VALID[:position] + inserted + VALID[position + length :])


def _ends_well(source: object) -> None:
    """A valid scheme or a TTEError; anything else is a traceback for the user."""
    from tte.document import parse_yaml

    try:
        resolved = resolve(
            UpdateScheme.load(parse_yaml(source, "s").data if isinstance(source, str) else source), GRAPH
        )
    except TTEError:
        return
    assert resolved.layers and UpdateScheme.load(parse_yaml(resolved.to_yaml(), "s").data)
