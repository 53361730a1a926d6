"""verify is worth something: what is wrong is found and named, by a judge that shares nothing with the judged."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import test_bad_input
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import tte
import tte.artifact
import tte.compiler
import tte.passes.autodiff
import tte.proof
from tte.ir import OPS, Builder, Graph, rewrite
from tte.oracle import Trajectory, run_graph
from tte.passes.optimizer import attach_sgd


class Forked(nn.Module):
    """(1, 2, 6, 6) -> 3 classes; what ``first`` gives is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.head((self.second(y) * y).mean((2, 3)))


@pytest.fixture(scope="module")
def forked() -> tte.Artifact:
    return tte.compile(Forked().eval(), (torch.zeros(1, 2, 6, 6),), target="host")


def wrong_tensors(module: nn.Module | None = None) -> set[str]:
    proof = tte.compile(module or Forked().eval(), (torch.zeros(1, 2, 6, 6),), target="host").verify(steps=2)
    wrong = {row["name"] for row in proof["tensors"] if not row["ok"]}
    assert proof["ok"] == (not wrong and proof["loss_error"] <= proof["tolerance"])
    return wrong


ALL = {f"{layer}.{kind}" for layer in ("first", "second", "head") for kind in ("weight", "bias")}


def scaled(position: int, factor: float = 1.001) -> Callable[..., Any]:
    """conv2d's gradient rule with one of its results a thousandth too large."""
    right = OPS["nn.conv2d"].grad
    assert right is not None

    def wrong(backward: Any, dy: Any, *inputs: Any, **attrs: Any) -> Any:
        results = list(right(backward, dy, *inputs, **attrs))
        if results[position] is not None:
            results[position] = backward.call("multiply", results[position], backward.const(factor))
        return tuple(results)

    return wrong


@pytest.mark.parametrize(
    ("position", "named"),
    [
        (0, {"first.weight", "first.bias"}),
        (1, {"first.weight", "second.weight"}),
        (2, {"first.bias", "second.bias"}),
    ],
)
def test_a_thousandth_is_found(position: int, named: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "nn.conv2d", replace(OPS["nn.conv2d"], grad=scaled(position)))
    assert wrong_tensors() == named


def test_a_forgotten_summand_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(builder: Any, gradients: Any, value: Any, gradient: Any, node: Any) -> None:
        gradients.setdefault(value.name, gradient)

    monkeypatch.setattr(tte.passes.autodiff, "_accumulate", forget)
    assert wrong_tensors() == {"first.weight", "first.bias"}


def test_an_update_uphill_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def uphill(graph: Graph, *settings: Any) -> Graph:
        builder = Builder()
        builder.nodes.extend(graph.nodes)
        gradients = [builder.call("negative", g) for g in graph.outputs[1:]]
        return attach_sgd(rewrite(graph, builder.nodes, outputs=(graph.outputs[0], *gradients)), *settings)

    monkeypatch.setattr(tte.compiler, "attach_sgd", uphill)
    assert wrong_tensors() == ALL


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled C is judged, not the graph behind it."""
    right = tte.artifact.emit  # type: ignore[attr-defined]

    def wrong(*arguments: Any) -> dict[str, str]:
        files = right(*arguments)
        path = next(p for p in files if p.endswith("_kernels.c"))
        assert "FMAF(" in files[path]
        return files | {path: re.sub(r"= *\n? *(\w*FMAF\()", r"= 1.001f * \1", files[path])}

    monkeypatch.setattr("tte.artifact.emit", wrong)
    assert wrong_tensors() == ALL


@pytest.mark.parametrize("where", ["gradients", "values", "losses", "everything"])
def test_nan_never_passes(where: str, forked: tte.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    follow = tte.proof.follow

    def poisoned(*arguments: Any, **options: Any) -> Trajectory:
        right = follow(*arguments, **options)
        bad: dict[str, Any] = {"values": {name: v * np.nan for name, v in right.values.items()}}
        bad["gradients"] = [{name: v * np.nan for name, v in step.items()} for step in right.gradients]
        bad["losses"] = [*right.losses[:-1], float("nan")]
        return replace(right, **{n: v for n, v in bad.items() if where in (n, "everything")})

    monkeypatch.setattr(tte.proof, "follow", poisoned)
    assert not forked.verify(steps=2)["ok"]


UINT8 = {"dtype": "uint8", "layout": "nhwc", "std": [500.0]}
SCHEMES: dict[str, dict[str, Any]] = {
    "full": {"train": "full"},
    "head": {"train": "full", "head": {"layer": "fc", "classes": 3}},
    "format": {"train": "bias-only", "io": {"input": UINT8 | {"mean": [99.0]}}},
    "head and format": {
        "train": "last-layer",
        "head": {"layer": "fc", "classes": 3},
        "io": {"input": UINT8 | {"mean": [99.0, 120.0]}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    """The network of the bad inputs, with names that say the layer."""
    return test_bad_input.network()


@pytest.mark.parametrize("kind", SCHEMES)
def test_models_without_a_module(kind: str, net: onnx.ModelProto) -> None:
    """An ONNX model is judged by PyTorch's operators on the graph, and verify says so."""
    proof = tte.compile(net, update_scheme=SCHEMES[kind], target="host").verify(steps=3)
    assert proof["ok"], proof
    assert proof["oracle"].startswith("torch interpretation of the ")
    assert ("prepared" in proof["oracle"]) == ("head" in kind)


def test_the_graph_oracle_computes_what_onnx_says(net: onnx.ModelProto) -> None:
    compiled = tte.compile(net, target="host").compiled
    forward, tensors = run_graph(compiled.imported, compiled.originals)
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 6))
    expected = ReferenceEvaluator(net).run(None, {"x": x.astype(np.float32)})[0]
    values = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tensors.items()}
    np.testing.assert_allclose(forward(values, torch.from_numpy(x)).numpy(), expected, rtol=1e-5)


def test_a_module_is_its_own_judge(forked: tte.Artifact) -> None:
    proof = forked.verify(steps=2)
    assert proof["ok"] and proof["oracle"] == "torch module"
    assert {row["name"] for row in proof["tensors"]} == ALL


@pytest.mark.parametrize("rule", ["0", "2"])
def test_a_shared_weight_is_one_tensor(rule: str) -> None:
    """A rule for either layer trains it for both: its gradient is the sum of both layers'."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    module[2].weight = module[0].weight
    scheme = {"train": [{"layer": rule, "weight": "all"}]}
    proof = tte.compile(module, (torch.zeros(1, 4),), scheme, target="host").verify(steps=3)
    assert proof["ok"] and [row["name"] for row in proof["tensors"]] == ["2.weight"]


class Normed(nn.Module):
    """What the bias of ``first`` adds to a channel, the norm takes away; the weight's gradient is small, not zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.Linear(64, 3)
        nn.init.normal_(self.head.weight, std=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)).flatten(1))


def test_a_gradient_of_zero_is_no_error_but_a_missing_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_tensors(Normed().eval()) == set()
    monkeypatch.setitem(OPS, "nn.conv2d", replace(OPS["nn.conv2d"], grad=scaled(1, 0.0)))
    assert wrong_tensors(Normed().eval()) == {"first.weight"}


def test_behind_a_head_of_zeros_gradients_are_of_a_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has none, right or wrong."""
    scheme = {"train": "full", "head": {"layer": "head", "classes": 3}}
    example = (torch.zeros(1, 2, 6, 6),)
    assert tte.compile(Normed().eval(), example, scheme, target="host").verify(steps=3)["ok"]
    monkeypatch.setitem(OPS, "nn.conv2d", replace(OPS["nn.conv2d"], grad=scaled(1)))
    rows = tte.compile(Normed().eval(), example, scheme, target="host").verify(steps=3)["tensors"]
    errors = {row["name"]: row["gradient_error"] for row in rows}
    assert errors["first.weight"] > 5e-4 > errors["head.weight"]


def test_the_mean_in_a_bias_is_no_error() -> None:
    """A batch norm's mean that is folded into a bias makes it large, and its rounding larger than the user's bias."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.normal_(0, 1e4)
    norm.bias.data.normal_(0, 1e-2)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), norm, nn.Flatten(), nn.Linear(128, 3)).eval()
    assert tte.compile(net, (torch.zeros(1, 2, 6, 6),), "bias-only", target="host").verify(steps=3)["ok"]


def outputs_classes(*behind: nn.Module) -> nn.Module:
    """(1, 2, 6, 6) -> (1, 5, 1, 1) and further."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.AdaptiveAvgPool2d(1), *behind).eval()


@pytest.mark.parametrize("behind", [(), (nn.Softmax(1),), (nn.Softmax(1), nn.Flatten()), (nn.LogSoftmax(1),)], ids=str)
def test_classes_are_on_the_axis_of_pytorch(behind: tuple[nn.Module, ...]) -> None:
    artifact = tte.compile(outputs_classes(*behind), (torch.zeros(1, 2, 6, 6),), target="host")
    assert artifact.build.classes == 5
    assert artifact.verify(steps=3)["ok"]


@pytest.mark.parametrize("model", [nn.Conv2d(2, 5, 3), nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 1, 1))], ids=str)
def test_an_output_with_other_axes_than_classes_is_refused(model: nn.Module) -> None:
    with pytest.raises(tte.TTEError, match="axis 1") as caught:
        tte.compile(model.eval(), (torch.zeros(1, 2, 6, 6),), target="host")
    assert caught.value.code == "TTE-E042" and "(1, classes)" in caught.value.fix


@pytest.mark.parametrize("indices", [[2, 0], [0, 1, 1, 3]], ids=str)
def test_elements_that_are_picked_behind_a_trained_layer(indices: list[int]) -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(len(indices), 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x))[:, indices]).mean((2, 3))

    part = {"layer": "second", "weight": {"in_channels": 1, "select": [1]}}
    for train in ("full", [{"layer": "first", "weight": "all", "bias": True}, part]):
        scheme = {"train": train}
        artifact = tte.compile(Picked().eval(), (torch.zeros(1, 2, 6, 6),), update_scheme=scheme, target="host")
        assert artifact.verify(steps=3)["ok"]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_an_output_without_a_batch_dimension(loss: str) -> None:
    class Squeezed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).squeeze(0)

    scheme = {"train": "full", "loss": loss}
    assert tte.compile(Squeezed(4, 3).eval(), (torch.zeros(1, 4),), scheme, "host").verify(steps=3)["ok"]
