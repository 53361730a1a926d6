"""Quantised models at their corners: what stands behind the last layer, numbers that are not finite, full sums."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import qdq
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_qdq import conv_model, session
from torch import Tensor, nn

import tte
from tte.ir import evaluate
from tte.runner.board import STATUS, unpack_state
from tte.saved import read_state, write_onnx

NONFINITE = STATUS.index("NONFINITE")
SHAPE = (1, 3, 8, 8)


class Net(nn.Module):
    """A convolution, the mean of its channels, a dense layer; ``last`` makes the output."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(torch.relu(self.conv(x)).mean((2, 3))))


def quantized(last: Callable[[Tensor], Tensor], folder: Path, **options: Any) -> Path:
    return qdq.quantize(qdq.Recipe(lambda: Net(last), SHAPE, **options), folder)


# --- a softmax at the end, and a new head ----------------------------------------------------------------------------

SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(1),
    "reshaped": lambda z: z.softmax(1).reshape(1, 5, 1, 1),
    "of a picture": lambda z: z.reshape(1, 5, 1, 1).softmax(1).flatten(1),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("last", SOFTMAXES)
def test_the_softmax_of_a_quantised_model_is_absorbed(last: str, clip: float | None, tmp_path: Path) -> None:
    """The loss is the logarithm of the probability that the model itself gives, but for the rounding of that one."""
    optimizer = {"lr": 0.01, "clip_loss_grad": clip}
    artifact = tte.compile(
        quantized(SOFTMAXES[last], tmp_path), update_scheme={"train": "last-layer", "optimizer": optimizer}
    )
    assert "qnn.quantize" in {n.op for n in artifact.compiled.forward.nodes[-4:]}
    board = artifact.host()
    x = qdq.inputs(qdq.Recipe(qdq.autoencoder, SHAPE), 1)[0][0]
    p = board.infer(x).reshape(-1)
    losses = np.asarray([board.evaluate(x, np.int32(c)).loss for c in range(5)])
    np.testing.assert_allclose(np.exp(-losses), p, rtol=0, atol=0.51 / 256)
    assert artifact.verify(steps=2)["ok"]


@pytest.mark.parametrize("int8_head", [False, True])
def test_nothing_behind_a_float_head_is_rounded(int8_head: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((16, *SHAPE[1:])).astype(np.float32)
    made = tte.quantize(Net(SOFTMAXES["softmax"]).eval(), {"x": x}, tmp_path / "m.onnx", int8_head=int8_head)
    operators = [n.op_type for n in onnx.load(made.output).graph.node]
    behind = operators[operators.index("Gemm") + 1 :]
    assert ("QuantizeLinear" in behind) == int8_head and "Softmax" in behind


@pytest.mark.parametrize("last", ["nothing", "softmax", "of a picture"])
@pytest.mark.parametrize("excluded", [(), ("Gemm",)], ids=["int8 head", "float head"])
def test_a_new_head_learns_as_in_float(last: str, excluded: Any, tmp_path: Path) -> None:
    """The logits of the old one were within its grid; those of the new one go where they have to."""
    model = quantized(SOFTMAXES.get(last, lambda z: z), tmp_path, excluded=excluded)
    scheme = {"train": "full", "optimizer": {"lr": 0.1}, "head": {"layer": "fc", "classes": 3}}
    artifact = tte.compile(model, update_scheme=scheme)
    board, rng = artifact.host(), np.random.default_rng(0)
    x, y = rng.standard_normal((30, *SHAPE[1:])).astype(np.float32), rng.integers(0, 3, 30).astype(np.int32)
    x[np.arange(30), y] += 1.5
    for _ in range(10):
        losses = [board.train_step(a, b).loss for a, b in zip(x, y, strict=True)]
    assert np.mean(losses) < 0.5
    assert artifact.compiled.replaced == ("fc.weight", "fc.bias")
    weight = read_state(board.save_state(), artifact.build.folder)["fc.weight"]
    assert (weight.dtype, weight.shape) == (np.float32, (3, 8)) and weight.any()
    with pytest.raises(tte.TTEError) as refused:
        write_onnx(tmp_path / "new.onnx", {"fc.weight": weight}, model, artifact.build.folder)
    assert refused.value.code == "TTE-E064" and ".npz" in refused.value.fix


# --- what stays in float32 says why ----------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two calls of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(torch.relu(self.conv(self.stem(x))))).mean((2, 3)))


class Transposed(nn.Module):
    """A layer and an activation that integers do not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.fc = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.up(torch.tanh(self.stem(x)))).mean((2, 3)))


INT8_LAYER = "computes in float32, though its weights are int8"
NOTES = {
    "shared": (Shared, {f"conv: {INT8_LAYER}: another layer reads its weight too"}),
    "transposed": (
        Transposed,
        {
            f"up: {INT8_LAYER}: integers do not compute nn.conv2d_transpose",
            "sigmoid (1 in the model) computes in float32: integers do not compute sigmoid",
            "tanh (1 in the model) computes in float32: integers do not compute tanh",
        },
    ),
    "nothing": (lambda: Net(lambda z: z), set()),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_say_why_something_is_in_float(name: str, tmp_path: Path) -> None:
    make, notes = NOTES[name]
    artifact = tte.compile(qdq.quantize(qdq.Recipe(make, SHAPE), tmp_path), update_scheme="last-layer")
    assert set(artifact.compiled.notes) == notes


def test_weights_of_a_layer_in_float_are_rounded_when_they_are_exported() -> None:
    """The device has fractions; what the user gets are the nearest integers, as the manual says."""
    scheme = {"loss": "mse", "train": [{"layer": "conv", "weight": "all"}], "optimizer": {"lr": 0.01}}
    artifact = tte.compile(conv_model(without=("y_q", "out")), update_scheme=scheme)
    board = artifact.host()
    for _ in range(3):
        board.train_step(np.ones((2, 5, 5), np.float32), np.ones((4, 5, 5), np.float32))
    (param, _), *_ = artifact.compiled.train.graph.updates
    assert param.origin is not None and param.origin.scale is not None
    units = (unpack_state(board.save_state(), board.build)[param.name] / param.origin.scale).reshape(-1)
    exported = read_state(board.save_state(), artifact.build.folder)["conv.weight"].reshape(-1)[param.origin.index]
    apart = np.abs(exported.reshape(-1) - np.clip(units, -128, 127))
    assert exported.dtype == np.int8 and 0.1 < apart.max() <= 0.5001


# --- NaN -------------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Float operators between quantised ones, and one that looks away from half of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.conv(torch.relu(x)))
        return self.fc(x.mean((2, 3)))


NETWORKS = {"plain": lambda: Net(lambda z: z), "gated": Gated}


@pytest.mark.parametrize("storage", ["int8_sr", "fp32"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("excluded", [(), ("Conv",)], ids=["all", "float convolution"])
def test_nan_is_found_before_anything_is_written(name: str, storage: str, excluded: Any, tmp_path: Path) -> None:
    model = qdq.quantize(qdq.Recipe(NETWORKS[name], SHAPE, excluded=excluded), tmp_path)
    scheme = {"train": "full", "optimizer": {"lr": 0.01}, "quantized": {"weight_storage": storage}}
    artifact = tte.compile(model, update_scheme=scheme)
    board = artifact.host()
    good = np.random.default_rng(0).standard_normal(SHAPE[1:]).astype(np.float32)
    before, blob = board.evaluate(good, np.int32(1)), board.save_state()
    for position in (0, 77, good.size - 1):
        bad = good.copy()
        bad.reshape(-1)[position] = np.nan
        for step in (board.evaluate, board.train_step):
            assert step(bad, np.int32(1)).status == NONFINITE
        assert board.save_state() == blob
        graph = artifact.compiled.forward
        np.testing.assert_array_equal(
            board.infer(bad).reshape(-1), evaluate(graph, [bad.reshape(graph.inputs[0].type.shape)]).outputs[0][0]
        )
    assert board.evaluate(good, np.int32(1)) == before
    assert board.train_step(good, np.int32(1)).status == 0


# --- limits that meet ------------------------------------------------------------------------------------------------

MEETING: dict[str, tuple[str, list[float], int]] = {
    "relu above the grid": ("Relu", [], 127),
    "clip between two integers": ("Clip", [0.0, 0.01], -4),
    "clip below the grid": ("Clip", [-3.0, 0.0], -128),
    "clip above the grid": ("Clip", [3.0, 9.0], 127),
}


@pytest.mark.parametrize("mode", ["fixed", "float", "tflite"])
@pytest.mark.parametrize("case", MEETING)
def test_limits_that_meet_on_one_integer_are_constants(case: str, mode: str) -> None:
    op, limits, zero = MEETING[case]
    model = conv_model(y_zero=np.int8(zero), z_zero=np.int8(zero))
    nodes = list(model.graph.node)
    conv = next(n for n in nodes if n.op_type == "Conv")
    conv.output[0] = "c"
    names = [f"limit{i}" for i in range(len(limits))]
    model.graph.initializer.extend(
        numpy_helper.from_array(np.float32(v), n) for n, v in zip(names, limits, strict=True)
    )
    del model.graph.node[:]
    at = nodes.index(conv) + 1
    model.graph.node.extend([*nodes[:at], helper.make_node(op, ["c", *names], ["y"]), *nodes[at:]])
    scheme = {"loss": "mse", "train": [{"layer": "conv", "weight": "all"}], "quantized": {"requantize": mode}}
    board = tte.compile(model, update_scheme=scheme).host()
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)
    theirs = session(model.SerializeToString())(x)[0]
    np.testing.assert_array_equal(board.infer(x[0]).reshape(theirs.shape), theirs)
    assert board.train_step(x[0], np.ones(theirs.shape[1:], np.float32)).status == 0


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_biases_in_small_units_are_not_taken_for_others(factor: float) -> None:
    """s_x s_w is 1e-9 here: a unit of another layer's is as near to it as zero is."""
    bias = np.asarray([100_000, -90_000, 50_000, -20_000], np.int32)
    small = {"x_scale": 1e-4, "y_scale": 1e-5, "z_scale": 1e-5}
    model = conv_model(
        w_scale=np.full(4, 1e-5, np.float32), b_scale=np.full(4, factor * 1e-9, np.float32),
        **{k: np.float32(v) for k, v in small.items()}, **{"conv.bias": bias},
    )  # fmt: skip
    scheme = {"loss": "mse", "train": [{"layer": "conv", "bias": True}]}
    artifact = tte.compile(model, update_scheme=scheme)
    why = "conv: computes in float32, though its weights are int8: its bias is not in units of its products"
    assert artifact.compiled.notes == ((why,) if factor != 1.0 else ())
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32) * np.float32(1e-2)
    theirs = ReferenceEvaluator(model).run(None, {"x": x})[0]  # onnxruntime never looks at the scale of a bias
    np.testing.assert_allclose(artifact.host().infer(x[0]).reshape(theirs.shape), theirs, rtol=0, atol=1.01e-5)


# --- sums of more products than 32 bits hold at the worst ------------------------------------------------------------


def dense(inputs: int, bias: int) -> onnx.ModelProto:
    """x -> dense layer of ``inputs`` -> two numbers, all of it quantised."""
    rng = np.random.default_rng(0)
    stored = {
        "xs": np.float32(0.02), "xz": np.int8(3), "fc.weight": rng.integers(-5, 6, (2, inputs)).astype(np.int8),
        "ws": np.float32(0.01), "wz": np.int8(0), "fc.bias": np.asarray([1000, bias], np.int32),
        "bs": np.float32(0.02) * np.float32(0.01), "bz": np.int32(0), "ys": np.float32(0.5), "yz": np.int8(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        helper.make_node("DequantizeLinear", ["fc.weight", "ws", "wz"], ["wd"]),
        helper.make_node("DequantizeLinear", ["fc.bias", "bs", "bz"], ["bd"]),
        helper.make_node("Gemm", ["d", "wd", "bd"], ["y"], transB=1),
        helper.make_node("QuantizeLinear", ["y", "ys", "yz"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "ys", "yz"], ["out"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, s)) for n, s in (("x", inputs), ("out", 2))]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def learn(**rule: Any) -> dict[str, Any]:
    return {"loss": "mse", "train": [{"layer": "fc", **rule}]}


@pytest.mark.parametrize("inputs", [65_000, 66_000])
def test_what_is_frozen_cannot_reach_further_than_it_does(inputs: int) -> None:
    model = dense(inputs, -1000)
    board = tte.compile(model, update_scheme=learn(bias=True)).host()
    x = np.random.default_rng(1).standard_normal((1, inputs)).astype(np.float32)
    np.testing.assert_array_equal(board.infer(x[0]).reshape(1, 2), session(model.SerializeToString())(x)[0])


@pytest.mark.parametrize(
    ("inputs", "bias", "rule"),
    [(66_000, 0, {"weight": "all"}), (66_000, 0, {"weight": "all", "bias": True}), (60_000, 2**30, {"weight": "all"})],
)
def test_sums_that_32_bits_do_not_hold_are_refused(inputs: int, bias: int, rule: Any) -> None:
    with pytest.raises(tte.TTEError, match="32 bits do not hold") as problem:
        tte.compile(dense(inputs, bias), update_scheme=learn(**rule))
    assert (problem.value.code, problem.value.where) == ("TTE-E080", "fc")
