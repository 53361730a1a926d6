"""PyTorch programs that were quantised by PT2E (torchao)."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tte
from tte.compiler import lower
from tte.ir import evaluate, verify
from tte.passes.quantized import Settings, lower_qdq

warnings.simplefilter("ignore")
pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
xnnpack = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer", reason="this torchao has no XNNPACKQuantizer")

SHAPE = (1, 3, 12, 12)


class Net(nn.Module):
    """Convolutions with and without activation, a skip, max pooling, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.point(torch.relu(self.depthwise(x)))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


class Scaled(nn.Module):
    """A constant that is quantised as an activation is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * self.gain).flatten(1)


def quantized(per_channel: bool = True, make: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(SHAPE)
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=per_channel)
    prepared = pt2e.prepare_pt2e(
        torch.export.export(model, (x,)).module(), xnnpack.XNNPACKQuantizer().set_global(config)
    )
    for _ in range(8):
        prepared(torch.randn(SHAPE))
    return torch.export.export(pt2e.convert_pt2e(prepared), (x,))


@pytest.mark.parametrize("per_channel", [True, False])
def test_program_is_computed_in_integers(per_channel: bool, tmp_path: Path) -> None:
    """PyTorch computes it in float32 with rounding in between: the sums' order decides ties, rarely."""
    program = quantized(per_channel)
    torch.export.save(program, tmp_path / "model.pt2")
    graph = verify(lower_qdq(lower(tmp_path / "model.pt2"), Settings("float")))
    used = {n.op for n in graph.nodes}
    assert {op for op in used if not op.startswith("qnn.")} <= {"transpose", "reshape", "nn.max_pool2d"}
    assert {"qnn.conv2d", "qnn.dense", "qnn.add", "nn.max_pool2d"} <= used
    scale = next(n for n in graph.nodes[::-1] if n.op == "qnn.dequantize").attrs["scale"]
    off = 0
    for seed in range(50):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        theirs = program.module()(x).detach().numpy()
        ours = evaluate(graph, [x.numpy()]).outputs[0]
        steps = np.abs(ours - theirs) / float(scale)  # type: ignore[arg-type]
        assert steps.max() < 1.5
        off += int((steps > 0.5).sum())
    assert off <= 2  # of 250


def test_layers_have_the_modules_names_and_learn() -> None:
    program = quantized()
    assert [(row.name, row.trainable) for row in tte.analyze(program).layers] == [
        (name, "weight and bias") for name in ("stem.0", "depthwise", "point", "fc")
    ]
    artifact = tte.compile(program, update_scheme="last-k:2")
    assert not artifact.compiled.notes
    x = np.random.default_rng(0).standard_normal((4, *SHAPE[1:])).astype(np.float32)
    result = artifact.run({"x": x, "y": np.arange(4)}, runner="host", epochs=20)
    assert np.mean(result.loss[-4:]) < np.mean(result.loss[:4])
    assert {p.name: p.type.dtype for p in artifact.compiled.forward.params if p.name.endswith("weight")} == {
        "point.weight": "int8",
        "fc.weight": "int8",
    }


def test_grids_that_are_not_int8_are_refused() -> None:
    program = quantized()
    for node in program.graph.nodes:
        if getattr(node.target, "__name__", "") == "quantize_per_tensor.default":
            node.args = (*node.args[:2], 300, *node.args[3:])
            break
    with pytest.raises(tte.TTEError, match="1 operator not supported") as problem:
        tte.analyze(program)
    assert "the zero point 300 is no int8" in problem.value.where


def test_constants_that_no_layer_reads_are_numbers() -> None:
    program = quantized(make=Scaled)
    artifact = tte.compile(program, update_scheme={"train": "full", "loss": "mse"})
    assert {p.name for p in artifact.compiled.forward.params} == {"conv.weight", "conv.bias"}
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    theirs = program.module()(x).detach().numpy()
    steps = np.abs(artifact.host().infer(x[0].numpy()).reshape(theirs.shape) - theirs) / 0.02
    assert steps.max() < 1.5 and (steps > 0.5).sum() <= 2, steps.max()


def test_asymmetric_weights_are_refused() -> None:
    program = quantized()
    for tensor in (*program.constants.values(), *program.state_dict.values()):
        if tensor.dtype == torch.int64:  # zero points per channel
            tensor[1] = 5
    with pytest.raises(tte.TTEError, match="asymmetric weights, with zero point 5") as problem:
        tte.analyze(program)
    assert problem.value.code == "TTE-E080" and "weight" in problem.value.where
