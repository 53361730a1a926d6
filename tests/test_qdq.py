"""Quantised models: the arithmetic of onnxruntime bit for bit, exact rounding without floats, refusals."""

import platform
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import qdq
from onnx import TensorProto, helper, numpy_helper

import tte
from tte.compiler import lower
from tte.ir import Graph, evaluate, verify
from tte.ops.quantized import scale_to_int8
from tte.passes.quantized import Settings, fixed_scale, lower_qdq
from tte.saved import read_state, write_onnx

# Its sums of two tensors and its averages round differently on other processors.
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="onnxruntime's bits on x86 are claimed")


def session(model: Path | bytes, outputs: list[str] | None = None) -> Any:
    """A function x -> outputs, optimised as by default, with int8 activations in integers.

    Without the option, onnxruntime on x86 leaves convolutions around residual additions in float32 when activations are
    int8 (not when they are uint8; not on Arm): then the order of its float sums decides what a tie becomes.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(model, options)
    name = made.get_inputs()[0].name
    return lambda x: made.run(outputs, {name: x})


def integers(model: Path | onnx.ModelProto, requantize: str = "float") -> Graph:
    return verify(lower_qdq(lower(model), Settings(requantize)))


def float_operators(graph: Graph) -> set[str]:
    moves = {"transpose", "reshape", "concatenate", "nn.max_pool2d"}
    return {n.op for n in graph.nodes if not n.op.startswith("qnn.") and n.op not in moves}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    onnxruntime.set_default_logger_severity(3)
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = qdq.quantize(qdq.RECIPES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


@x86
@pytest.mark.parametrize("name", [n for n in qdq.RECIPES if n != "float-head"])
def test_networks_agree_with_onnxruntime(name: str, quantized: Any) -> None:
    model = quantized(name)
    graph, run = integers(model), session(model)
    allowed = {
        "pools": {"nn.avg_pool2d"},
        "swish": {"nn.hard_swish", "sigmoid", "multiply", "nn.leaky_relu", "mean"},
        "numbers": {"multiply", "add", "mean"},
    }
    assert float_operators(graph) == allowed.get(name.removesuffix("-uint8"), set())
    for x in qdq.inputs(qdq.RECIPES[name], 100):
        np.testing.assert_array_equal(evaluate(graph, [x]).outputs[0], run(x)[0])


@x86
def test_what_a_float_head_reads_agrees_with_onnxruntime(quantized: Any, tmp_path: Path) -> None:
    """The order of onnxruntime's float sums is the processor's affair; what goes into them is not."""
    model = onnx.load(quantized("float-head"))
    head = next(n for n in model.graph.node if n.op_type == "Gemm")
    model.graph.output.append(helper.make_tensor_value_info(head.input[0], TensorProto.FLOAT, None))
    graph, run = integers(quantized("float-head")), session(model.SerializeToString())
    assert [n.op for n in graph.nodes if n.op == "nn.dense"] == ["nn.dense"] and float_operators(graph) == {"nn.dense"}
    feature = next(n for n in graph.nodes if n.op == "nn.dense").inputs[0]
    graph = verify(Graph("main", graph.inputs, graph.params, graph.consts, graph.nodes, (*graph.outputs, feature)))
    for x in qdq.inputs(qdq.RECIPES["float-head"], 100):
        ours, theirs = evaluate(graph, [x]).outputs, run(x)
        np.testing.assert_array_equal(ours[1], theirs[1])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-6 * np.abs(theirs[0]).max())


@x86
@pytest.mark.parametrize("per_channel", [True, False])
def test_float_weights_behind_a_pair_are_integers(per_channel: bool, tmp_path: Path) -> None:
    """onnxruntime's AddQDQPairToWeight."""
    options = {"AddQDQPairToWeight": True}
    recipe = replace(qdq.RECIPES["ds-cnn"], per_channel=per_channel, options=options)
    model = qdq.quantize(recipe, tmp_path)
    graph, run = integers(model), session(model)
    assert float_operators(graph) == set()
    for x in qdq.inputs(recipe, 20):
        np.testing.assert_array_equal(evaluate(graph, [x]).outputs[0], run(x)[0])


@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_operators_on_integers_are_refused_with_the_form_that_is_not(form: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_dynamic

    if form == "static":
        model = qdq.quantize(qdq.RECIPES["autoencoder"], tmp_path, QuantFormat.QOperator)
    else:
        qdq.export(qdq.RECIPES["autoencoder"], tmp_path / "float.onnx")
        quantize_dynamic(tmp_path / "float.onnx", model := tmp_path / "int8.onnx")
    with pytest.raises(tte.TTEError, match="operators on integers: (QGemm|MatMulInteger)") as problem:
        tte.analyze(model)
    assert problem.value.code == "TTE-E080" and "QuantFormat.QDQ" in str(problem.value.fix)


def test_layers_are_named_as_before_they_were_quantised(quantized: Any) -> None:
    graph = lower(quantized("branches-uint8"))
    layers = list(dict.fromkeys(node.layer for node in graph.nodes))
    assert layers == ["input.1", "stem.0", "", "left.0", "right.0", "head.0", "fc"]


def test_constants_that_no_layer_reads_are_numbers(quantized: Any) -> None:
    """They have zero points as activations have, and do not learn; weights beside them do."""
    artifact = tte.compile(quantized("numbers"), update_scheme="full")
    learned = {p.origin.name for p in artifact.compiled.forward.params if p.origin}
    assert len(learned) == 5 and not learned & {"gain_quantized", "offset_quantized", "dense.bias_quantized"}


@x86
@pytest.mark.parametrize("name", ["mobilenet-v2-uint8", "mcunet", "resnet8", "branches-uint8", "pools-uint8", "ds-cnn"])
def test_generated_c_agrees_with_onnxruntime(name: str, quantized: Any) -> None:
    model = quantized(name)
    scheme = {"train": "last-layer", "quantized": {"requantize": "float"}}
    host, run = tte.compile(model, update_scheme=scheme).host(), session(model)
    for x in qdq.inputs(qdq.RECIPES[name], 100):
        np.testing.assert_array_equal(host.infer(x[0]), run(x)[0])


@x86
def test_what_was_learned_goes_back_into_the_model(quantized: Any, tmp_path: Path) -> None:
    """Trained integers in the place of the model's own: onnxruntime then answers as the device does, bit for bit."""
    model, inputs = quantized("mcunet"), qdq.inputs(qdq.RECIPES["mcunet"], 8)
    scheme = {"train": "last-k:6", "optimizer": {"lr": 0.001}, "quantized": {"requantize": "float"}}
    artifact = tte.compile(model, update_scheme=scheme)
    host = artifact.host()
    for label, x in enumerate(inputs):
        host.train_step(x[0], np.asarray([label]))
    write_onnx(tmp_path / "trained.onnx", read_state(host.save_state(), artifact.build.folder), model)
    before, after = session(model), session(tmp_path / "trained.onnx")
    for x in inputs:
        np.testing.assert_array_equal(host.infer(x[0]), after(x)[0])
        assert (after(x)[0] != before(x)[0]).any()
    assert len({after(x)[0].tobytes() for x in inputs}) > 4


# --- single operators on every integer, with many scales --------------------------------------------------------------


def island(
    op: str, operands: int, shape: tuple[int, ...], grids: list[tuple[float, int]], dtype: Any, **attrs: Any
) -> Any:
    """operator(dequantize(...), ...) between integers of the given (scale, zero point), the last one the result's."""
    nodes, stored = [], []
    for i, (scale, zero) in enumerate(grids):
        stored += [numpy_helper.from_array(np.float32(scale), f"s{i}"), numpy_helper.from_array(dtype(zero), f"z{i}")]
    names = [f"x{i}" for i in range(operands)]
    nodes.append(helper.make_node("Split", ["x"], names, axis=1))  # also in one part
    for i in range(operands):
        nodes.append(helper.make_node("QuantizeLinear", [names[i], f"s{i}", f"z{i}"], [f"q{i}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", f"z{i}"], [f"d{i}"]))
    nodes.append(helper.make_node(op, [f"d{i}" for i in range(operands)], ["y"], **attrs))
    nodes.append(helper.make_node("QuantizeLinear", ["y", f"s{operands}", f"z{operands}"], ["r"]))
    nodes.append(helper.make_node("DequantizeLinear", ["r", f"s{operands}", f"z{operands}"], ["out"]))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * len(shape))
    graph = helper.make_graph(nodes, "island", [given], [result], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


ISLANDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "add": ("Add", 2, {}),
    "concatenate": ("Concat", 2, {"axis": 1}),
    "average": ("AveragePool", 1, {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "average, padded": ("AveragePool", 1, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "average of all": ("AveragePool", 1, {"kernel_shape": [16, 32]}),
    "global average": ("GlobalAveragePool", 1, {}),
    "maximum": ("MaxPool", 1, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
}


@x86
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("name", ISLANDS)
def test_operators_agree_with_onnxruntime(name: str, dtype: Any) -> None:
    """Equal scales and halves, where ties are the rule, and scales drawn at random."""
    op, operands, attrs = ISLANDS[name]
    rng = np.random.default_rng(0)
    low = np.iinfo(dtype).min
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256))).reshape(2, 65536) + low
    for draw in range(12):
        scales = rng.uniform(0.01, 0.06, operands + 1)
        scales = [scales, [scales[0]] * (operands + 1), [scales[0], *[scales[0] / 2] * operands]][draw % 3]
        zeros = rng.integers(low, low + 256, operands + 1)
        grids = [(float(np.float32(s)), int(z)) for s, z in zip(scales, zeros, strict=True)]
        if operands == 1:
            q = rng.permuted(pairs[0])[None].reshape(1, 128, 16, 32)
        else:
            q = pairs.reshape(1, 2, 65536)
        real = [(q[:, i : i + q.shape[1] // operands] - zeros[i]).astype(np.float32) * np.float32(grids[i][0])
                for i in range(operands)]  # fmt: skip
        x = np.concatenate(real, 1)
        model = island(op, operands, x.shape, grids, dtype, **attrs)
        ours = evaluate(integers(model), [x]).outputs[0]
        np.testing.assert_array_equal(ours, session(model.SerializeToString())(x)[0], str(grids))


@x86
@pytest.mark.parametrize("name", ["average, rounded up", "softmax"])
def test_what_onnxruntime_optimises_otherwise_agrees_without_optimisation(name: str) -> None:
    """It has an approximate softmax for int8, and its int8 average takes no notice of ceil_mode."""
    attrs = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}
    op, attrs = ("Softmax", {"axis": 1}) if name == "softmax" else ("AveragePool", attrs)
    grids = [(0.02, 5), (1 / 256, -128)] if name == "softmax" else [(0.02, 5), (0.0173, -3)]
    shape = (1, 200) if name == "softmax" else (1, 4, 8, 8)
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = island(op, 1, shape, grids, np.int8, **attrs)
    run = onnxruntime.InferenceSession(model.SerializeToString(), plain)
    graph = integers(model)
    for x in np.random.default_rng(0).standard_normal((20, *shape)).astype(np.float32):
        np.testing.assert_array_equal(evaluate(graph, [x]).outputs[0], run.run(None, {"x": x})[0])


# --- integers only ----------------------------------------------------------------------------------------------------


def test_fixed_point_differs_from_exact_rounding_in_fewer_than_one_of_1e5() -> None:
    rng = np.random.default_rng(0)
    outputs = wrong = 0
    for draw in range(40):
        real = np.exp(rng.uniform(np.log(1e-6), np.log(0.9 if draw % 4 else 8.0), 1))
        multiplier, shift = fixed_scale(real)
        reach = min(2**30, int(128 / real[0]))
        acc = rng.integers(-reach, reach + 1, 25_000).astype(np.int32)
        ours = np.clip(scale_to_int8(acc, multiplier, shift=shift), -128, 127)
        ratio = Fraction(float(real[0]))
        exact = np.clip([round(int(a) * ratio) for a in acc], -128, 127)  # halves to even
        assert np.abs(ours - exact).max() <= 1
        outputs += acc.size
        wrong += int((ours != exact).sum())
    assert outputs == 10**6 and wrong < outputs * 1e-5, wrong


# --- models whose quantisation is refused -----------------------------------------------------------------------------


def conv_model(**changes: Any) -> onnx.ModelProto:
    """x -> Q -> DQ -> conv (weights and bias dequantised) -> Q -> DQ; ``changes`` replace tensors or drop nodes."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "x_scale": np.float32(0.02), "x_zero": np.int8(3), "y_scale": np.float32(0.05), "y_zero": np.int8(-4),
        "conv.weight": rng.integers(-127, 128, (4, 2, 3, 3)).astype(np.int8), "w_scale": np.full(4, 0.01, np.float32),
        "w_zero": np.zeros(4, np.int8), "conv.bias": rng.integers(-99, 99, 4).astype(np.int32),
        "b_scale": np.full(4, 0.0002, np.float32), "b_zero": np.zeros(4, np.int32),
    }  # fmt: skip
    dropped = changes.pop("without", ())
    tensors |= {"z_scale": tensors["y_scale"], "z_zero": tensors["y_zero"]} | changes
    nodes = [
        ("QuantizeLinear", ["x", "x_scale", "x_zero"], "x_q", {}),
        ("DequantizeLinear", ["x_q", "x_scale", "x_zero"], "x_d", {}),
        ("DequantizeLinear", ["conv.weight", "w_scale", "w_zero"], "w_d", {"axis": 0}),
        ("DequantizeLinear", ["conv.bias", "b_scale", "b_zero"], "b_d", {"axis": 0}),
        ("Conv", ["x_d", "w_d", "b_d"], "y", {"pads": [1, 1, 1, 1]}),
        ("QuantizeLinear", ["y", "y_scale", "y_zero"], "y_q", {}),
        ("DequantizeLinear", ["y_q", "z_scale", "z_zero"], "out", {}),
    ]
    made, renamed = [], {}
    for op, inputs, output, attrs in nodes:
        if output in dropped:
            renamed[output] = renamed.get(inputs[0], inputs[0])
            continue
        made.append(helper.make_node(op, [renamed.get(i, i) for i in inputs], [output], **attrs))
    result = renamed.get("out", "out")
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 2, 5, 5))],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, (1, 4, 5, 5))],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_the_model_itself_is_computed_in_integers() -> None:
    assert float_operators(integers(conv_model())) == set()


W, F = np.zeros((4, 2, 3, 3)), np.float32
CHANNELS = {"x_scale": np.full(2, 0.1, F), "x_zero": np.zeros(2, np.int8)}


def weights_of(dtype: type) -> dict[str, np.ndarray]:
    return {"conv.weight": W.astype(dtype), "w_zero": np.zeros(4, dtype)}


REFUSED = {
    "asymmetric weights": ({"w_zero": np.asarray([0, 5, 0, 0], np.int8)}, "conv.weight", "weights, with zero point 5"),
    "uint8 weights": (weights_of(np.uint8), "conv.weight", "weights of uint8"),
    "int16 weights": (weights_of(np.int16), "conv.weight", "weights of int16"),
    "int16 activations": ({"x_zero": np.int16(3)}, "x", "activations of int16"),
    "int8 in, uint16 out": ({"y_zero": np.uint16(3), "z_zero": np.uint16(3)}, "y", "activations of uint16"),
    "scale per channel": (CHANNELS, "x", "activations with a scale per channel"),
    "scale of zero": ({"x_scale": F(0)}, "x", "the scale 0; scales are above 0"),
    "negative scale": ({"y_scale": F(-0.1)}, "y", "the scale -0.1"),
    "scale that is NaN": ({"w_scale": np.asarray([1, np.nan, 1, 1], F)}, "conv.weight", "the scale nan"),
    "infinite scale": ({"b_scale": np.asarray([1, 1, np.inf, 1], F)}, "conv.bias", "the scale inf"),
    "pairs that disagree": ({"z_scale": F(0.1)}, "y_q", "dequantised with"),
    "input not quantised": ({"without": ("x_q",)}, "x", "DequantizeLinear of what is float32"),
    "input not dequantised": ({"without": ("x_d",)}, "x_q", "Conv of what is int8, without DequantizeLinear"),
    "weights not dequantised": ({"without": ("w_d",)}, "conv.weight", "Conv of what is int8"),
    "biases not dequantised": ({"without": ("b_d",)}, "conv.bias", "Conv of what is int32"),
    "result not quantised": ({"without": ("y_q",)}, "y", "DequantizeLinear of what is float32"),
    "result not dequantised": ({"without": ("out",)}, "y_q", "the model's output is int8"),
    "a scale too few": ({"w_scale": np.full(3, 0.01, F)}, "conv.weight", "3 scales for 4 channels, which are axis 0"),
    "no scale": ({"w_scale": np.zeros(0, F)}, "conv.weight", "0 scales for 4 channels"),
    "no scale of activations": ({"x_scale": np.zeros(0, F)}, "x", "0 scales, but 1 zero points"),
    "a zero point too few": ({"w_zero": np.zeros(3, np.int8)}, "conv.weight", "4 scales, but 3 zero points"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_quantisation_that_is_not_computed_is_refused(name: str) -> None:
    changes, tensor, message = REFUSED[name]
    with pytest.raises(tte.TTEError) as problem:
        tte.compile(conv_model(**changes), update_scheme="bias-only")
    assert (problem.value.code, problem.value.where) == ("TTE-E080", tensor)
    assert message in problem.value.what


@pytest.mark.parametrize("dropped", [("x_q", "x_d"), ("y_q", "out")])
def test_without_a_pair_the_layer_stays_float_and_a_note_says_so(dropped: tuple[str, str]) -> None:
    model = conv_model(without=dropped)
    artifact = tte.compile(model, update_scheme={"loss": "mse", "train": [{"layer": "conv", "bias": True}]})
    assert [n for n in artifact.compiled.notes if n.startswith("conv: computes in float32")]
    x = np.random.default_rng(1).standard_normal((1, 2, 5, 5)).astype(np.float32)
    ours, theirs = artifact.host().infer(x[0]), session(model.SerializeToString())(x)[0]
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=0, atol=1e-5 if "out" in dropped else 0.0501)


def test_no_note_where_everything_is_in_integers() -> None:
    scheme = {"loss": "mse", "train": [{"layer": "conv", "bias": True}]}
    assert not tte.compile(conv_model(), update_scheme=scheme).compiled.notes


def test_a_scale_that_integers_cannot_hold_is_refused() -> None:
    scheme = {"loss": "mse", "train": [{"layer": "conv", "bias": True}]}
    model = conv_model(y_scale=np.float32(1e-7), z_scale=np.float32(1e-7))
    with pytest.raises(tte.TTEError, match="times finer than that of the sums") as problem:
        tte.compile(model, update_scheme=scheme)
    assert (problem.value.code, problem.value.where) == ("TTE-E080", "conv")
    tte.compile(model, update_scheme=scheme | {"quantized": {"requantize": "float"}})
