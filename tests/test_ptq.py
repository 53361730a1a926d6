"""`tte quantize` and tte.quantize: what is written computes what the float model computes, nearly."""

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import qdq
import torch
from torch import nn
from typer.testing import CliRunner

import tte
from tte.cli import app
from tte.frontends.onnx_model import fold_constants
from tte.ptq import fold_batch_norm, name_biases

SHAPE = (1, 3, 16, 16)


def network() -> nn.Module:
    """Ten classes that a random network separates; batch norm with statistics of its own."""
    torch.manual_seed(0)
    model = qdq.Mobile(8, [(8, 2, 3, 1), (12, 2, 5, 2)], 16).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.2, 1.0)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
    return model


def export(model: nn.Module, path: Path) -> Path:
    options: dict[str, Any] = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    torch.onnx.export(model, (torch.zeros(SHAPE),), str(path), dynamo=False, opset_version=17, **options)
    return path


def samples(count: int, seed: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((count, *SHAPE[1:])).astype(np.float32)
    with torch.no_grad():
        y = network()(torch.from_numpy(x)).argmax(1).numpy()
    return {"x": x, "y": y}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    export(network(), tmp_path / "float.onnx")
    np.savez(tmp_path / "calibration.npz", x=samples(32, 1)["x"])
    np.savez(tmp_path / "test.npz", **samples(100, 2))
    return tmp_path


def test_command_measures_before_and_after(files: Path) -> None:
    out = files / "int8.onnx"
    line = [str(files / "float.onnx"), "--calibration", str(files / "calibration.npz"), "-o", str(out)]
    result = CliRunner().invoke(app, ["quantize", *line, "--eval", str(files / "test.npz"), "--json"])
    assert result.exit_code == 0, result.output
    import json

    made = json.loads(result.stdout)
    assert made["samples"] == 32 and made["metric"] == "accuracy" and made["head"] == "/classifier/Gemm"
    assert made["before"] == 1.0 and 0.9 <= made["after"] <= 1.0
    table = CliRunner().invoke(app, ["quantize", *line, "--eval", str(files / "test.npz")])
    assert "/classifier/Gemm (Gemm): the last layer learns best in float32" in table.stdout
    assert "accuracy, before and after" in table.stdout and "1.0000" in table.stdout


@pytest.mark.parametrize(
    ("count", "said"), [(1, "there is one calibration sample"), (4, "the calibration samples are all the same")]
)
def test_calibration_that_says_little_is_noted(count: int, said: str, files: Path) -> None:
    np.savez(files / "same.npz", x=np.ones((count, *SHAPE[1:]), np.float32))
    line = [str(files / "float.onnx"), "--calibration", str(files / "same.npz"), "-o", str(files / "int8.onnx")]
    assert f"note: {said}: the ranges fit this input" in CliRunner().invoke(app, ["quantize", *line]).stdout
    assert tte.quantize(files / "float.onnx", samples(2, 1), files / "int8.onnx").notes == ()


@pytest.mark.parametrize("int8_head", [False, True])
@pytest.mark.parametrize("kind", ["module", "path", "proto"])
def test_every_kind_of_model(kind: str, int8_head: bool, files: Path) -> None:
    model = {"module": network(), "path": files / "float.onnx", "proto": onnx.load(files / "float.onnx")}[kind]
    made = tte.quantize(model, samples(32, 1), files / "int8.onnx", evaluation=samples(50, 3), int8_head=int8_head)
    assert made.before == 1.0 and made.after is not None and made.after >= 0.9
    written = onnx.load(made.output)
    assert "BatchNormalization" not in {n.op_type for n in written.graph.node}
    head = tte.analyze(made.output).layers[-1]
    assert head.name == "classifier" and head.int8 == int8_head
    names = {t.name for t in written.graph.initializer}
    assert {"stem.0.weight_quantized", "blocks.1.body.2.0.weight_scale"} <= names  # the user's own
    scales = [t.dims[0] for t in written.graph.initializer if t.name == "stem.0.weight_scale"]
    assert scales == [8]
    # What was written can be compiled, and what learns in it is int8.
    artifact = tte.compile(made.output, update_scheme="last-k:2")
    assert artifact.host().infer(samples(1, 4)["x"][0]).shape == (1, 10)


def test_batch_norm_is_folded_exactly(files: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(files / "float.onnx")
    x = {model.graph.input[0].name: samples(1, 5)["x"]}
    before = ReferenceEvaluator(model).run(None, x)[0]
    fold_constants(model)
    fold_batch_norm(model)
    assert "BatchNormalization" not in {n.op_type for n in model.graph.node}
    onnx.checker.check_model(model)
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, x)[0], before, rtol=0, atol=1e-5)


def test_targets_that_are_no_classes_are_measured_by_their_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    y = model(torch.from_numpy(x)).detach().numpy()
    made = tte.quantize(model, {"x": x}, tmp_path / "int8.onnx", evaluation={"x": x, "y": y})
    assert made.metric == "mse" and made.before is not None and made.after is not None
    assert made.before < 1e-10 < made.after < 1e-3


class Enlarged(nn.Module):
    """The exporter computes what is enlarged, and by how much, from shapes."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.interpolate(self.conv(x), **self.how)
        return self.fc(x.reshape(x.shape[0], x.shape[1], -1).mean(2))


@pytest.mark.parametrize("how", [{"scale_factor": 2.0}, {"scale_factor": (3.0, 2.0), "mode": "bilinear"}, {"size": 9}])
def test_only_activations_and_weights_are_quantised(how: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    model = Enlarged(**how).eval()
    made = tte.quantize(model, {"x": x}, tmp_path / "int8.onnx")
    graph = onnx.load(made.output).graph
    constants = {t.name for t in graph.initializer}
    assert all(n.input[0] not in constants for n in graph.node if n.op_type == "QuantizeLinear")
    host = tte.compile(made.output, update_scheme="last-layer").host()
    theirs = model(torch.from_numpy(x)).detach().numpy()
    for sample, y in zip(x, theirs, strict=True):
        np.testing.assert_allclose(host.infer(sample).reshape(-1), y, rtol=0, atol=0.1)


def test_the_float_model_is_not_overwritten(files: Path) -> None:
    before, data = (files / "float.onnx").read_bytes(), {"x": np.zeros((2, 3, 16, 16), np.float32)}
    with pytest.raises(tte.TTEError, match="float model itself"):
        tte.quantize(files / "float.onnx", data, files / ".." / files.name / "float.onnx")
    assert (files / "float.onnx").read_bytes() == before


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"x": np.zeros((4, 3, 16, 15), np.float32)},
        r"x is \(4, 3, 16, 15\), the model's input .* wants \(N, 3, 16, 16\)",
    ),
    ({"x": np.zeros((3, 16, 16), np.float32)}, r"x is \(3, 16, 16\)"),
    ({"y": np.zeros(3)}, r"has no array x, only \['y'\]"),
    ({"x": np.zeros((0, 3, 16, 16), np.float32)}, "x holds no samples"),
    ({"x": np.full((2, 3, 16, 16), np.nan, np.float32)}, "NaN or infinite"),
    ({"x": np.array(["a", "b"])}, "x holds no samples"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD)
@pytest.mark.parametrize("place", ["memory", "file"])
def test_calibration_that_does_not_fit_is_refused(arrays: Any, message: str, place: str, files: Path) -> None:
    data: Any = arrays
    if place == "file":
        np.savez(files / "bad.npz", **arrays)
        data = files / "bad.npz"
    with pytest.raises(tte.TTEError, match=message) as problem:
        tte.quantize(files / "float.onnx", data, files / "int8.onnx")
    assert problem.value.code == "TTE-E081"
    assert problem.value.where == ("calibration data" if place == "memory" else str(files / "bad.npz"))
    assert not (files / "int8.onnx").exists()


def test_calibration_in_another_layout_is_told_how_to_turn(files: Path) -> None:
    with pytest.raises(tte.TTEError, match="wants") as problem:
        tte.quantize(files / "float.onnx", {"x": np.zeros((4, 16, 16, 3))}, files / "int8.onnx")
    assert problem.value.fix == "transpose x: x.transpose(0, 3, 1, 2), which is (N, H, W, C) -> (N, C, H, W)"


def test_computed_biases_are_called_after_their_layer() -> None:
    """As PyTorch's newer exporter writes convolutions without bias: two of them may read the same zeros."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    weights = {f"{c}.weight": rng.normal(size=(3, 3, 1, 1)).astype(np.float32) for c in "abc"}
    weights |= {"val_5": np.zeros(3, np.float32), "c.bias": np.ones(3, np.float32)}
    nodes = [
        helper.make_node("Conv", [x, f"{layer}.weight", bias], [y], name=f"node_conv2d_{y}")
        for x, layer, bias, y in (("x", "a", "val_5", "1"), ("1", "b", "val_5", "2"), ("2", "c", "c.bias", "y"))
    ]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, (1, 3, 4, 4)) for n in "xy"]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored))
    name_biases(model)
    fold_batch_norm(model)  # which drops what nothing reads
    onnx.checker.check_model(model)
    assert [n.input[2] for n in model.graph.node] == ["a.bias", "b.bias", "c.bias"]
    assert {t.name for t in model.graph.initializer} == {*weights, "a.bias", "b.bias"} - {"val_5"}


def test_other_mistakes_are_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = samples(4, 1)
    out = files / "int8.onnx"

    def refused(code: str, message: str, model: Any, **options: Any) -> None:
        with pytest.raises(tte.TTEError, match=message) as problem:
            tte.quantize(model, calibration, options.pop("out", out), **options)
        assert problem.value.code == code

    refused("TTE-E020", "no such file", files / "missing.onnx")
    refused("TTE-E020", r"float .onnx files are quantised, not \.pt2", files / "net.pt2")
    refused("TTE-E029", "training mode", network().train())
    refused("TTE-E045", "cannot write", files / "float.onnx", out=files / "no" / "int8.onnx")
    refused("TTE-E045", "is an .onnx file", files / "float.onnx", out=files / "int8.txt")
    for y, message in (
        (None, "has no array y"),
        ([0, 1, 2], "x has 4 samples"),
        ([0, 1, 2, 99], "labels reach from 0 to 99"),
        (np.eye(10, dtype=int)[:4], "not one-hot rows"),
        ([0.0, 1.0, 2.0, 3.0], r"y is \(4,\)"),
    ):
        targets = {} if y is None else {"y": np.asarray(y)}
        refused("TTE-E081", message, files / "float.onnx", evaluation={"x": calibration["x"], **targets})
    assert not out.exists()
    refused("TTE-E081", "cannot be exported for inputs of", nn.Linear(5, 3).eval())
    tte.quantize(files / "float.onnx", calibration, out)
    refused("TTE-E080", f"quantised already\n  where: {out}", out, out=files / "again.onnx")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    refused("TTE-E082", "onnxruntime, which is not installed", files / "float.onnx")


def test_nothing_else_imports_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *rest: Any) -> Any:
        assert not name.startswith("onnxruntime")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    tte.compile(network(), (torch.zeros(SHAPE),), update_scheme="last-layer")
