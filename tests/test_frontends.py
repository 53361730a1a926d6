"""Every operator through both frontends, and what is refused."""

import logging
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tte.ops  # noqa: F401
from tte.errors import TTEError
from tte.frontends import import_model
from tte.ir import Graph, evaluate, parse, verify
from tte.passes.batch_norm import fold_batch_norm
from tte.passes.canonicalize import canonicalize
from tte.passes.layout import to_nhwc

PICTURE = (1, 6, 8, 8)
LINE = (1, 6, 20)
ROW = (1, 12)


class Call(nn.Module):
    """A function as a module, with layers where it needs some."""

    def __init__(self, function: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(*self.children(), x)


class Scale(nn.Module):
    """Parameters of the module's own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))
        self.register_buffer("offset", torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.offset


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Shared(nn.Module):
    """One activation that is called twice, as in many published models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 3)
        self.act, self.head_1 = nn.Hardswish(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head_1(self.act(self.conv2(self.act(self.conv1(x)))))


def shuffle(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, 2, 3, 8, 8).transpose(1, 2).reshape(1, 6, 8, 8)


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv2d": (nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2)), PICTURE),
    "conv2d-same": (nn.Conv2d(6, 8, (3, 4), padding="same", bias=False), PICTURE),
    "conv2d-dilated": (nn.Conv2d(6, 8, 3, dilation=2, bias=False), PICTURE),
    "conv2d-grouped": (nn.Conv2d(6, 9, 3, groups=3), PICTURE),
    "conv2d-depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding=1), PICTURE),
    "conv2d-one-channel": (nn.Conv2d(1, 4, 3), (1, 1, 8, 8)),
    "conv1d": (nn.Sequential(nn.Conv1d(6, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv1d(8, 4, 3)), LINE),
    "conv1d-depthwise": (nn.Conv1d(6, 6, 3, groups=6, bias=False), LINE),
    "conv-transpose2d": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), PICTURE),
    "conv-transpose2d-grouped": (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False), PICTURE),
    "conv-transpose2d-norm": (nn.Sequential(nn.ConvTranspose2d(6, 4, 2, groups=2), nn.BatchNorm2d(4)), PICTURE),
    "linear": (nn.Linear(12, 5), ROW),
    "linear-no-bias": (nn.Linear(12, 5, bias=False), ROW),
    "linear-sequence": (nn.Linear(20, 5), LINE),
    "matmul": (Call(lambda x: x @ x.transpose(1, 2)), LINE),
    "relu": (nn.ReLU(), PICTURE),
    "relu-inplace": (nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True)), PICTURE),
    "relu6": (nn.ReLU6(), PICTURE),
    "clamp": (Call(lambda x: x.clamp(-0.5, 0.75)), PICTURE),
    "clamp-min": (Call(lambda x: x.clamp(min=-0.5)), PICTURE),
    "clamp-max": (Call(lambda x: x.clamp_max(0.5)), PICTURE),
    "hardtanh": (nn.Hardtanh(-0.3, 0.6), PICTURE),
    "leaky-relu": (nn.LeakyReLU(0.2), PICTURE),
    "hardsigmoid": (nn.Hardsigmoid(), PICTURE),
    "hardswish": (nn.Hardswish(), PICTURE),
    "hardswish-by-hand": (Call(lambda x: x * F.relu6(x + 3) / 6), PICTURE),
    "sigmoid": (nn.Sigmoid(), PICTURE),
    "tanh": (nn.Tanh(), PICTURE),
    "silu": (nn.SiLU(), PICTURE),
    "gelu": (nn.GELU(), PICTURE),
    "gelu-tanh": (nn.GELU("tanh"), PICTURE),
    "softplus": (nn.Softplus(), PICTURE),
    "gelu-by-hand": (Call(lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))), PICTURE),
    "gelu-tanh-by-hand": (Call(lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * (0.044715 * x**3 + x)))), PICTURE),
    "exp-log": (Call(lambda x: torch.log(torch.exp(x) + 1.5)), ROW),
    "sqrt": (Call(lambda x: torch.sqrt(x.abs() + 0.5) + torch.rsqrt(x * x + 1)), ROW),
    "negative": (Call(lambda x: -x - torch.sign(x)), ROW),
    "numbers": (Call(lambda x: (2 - x) * 0.5 / 4 + 1), PICTURE),
    "add": (Call(lambda x: x + x * 2), PICTURE),
    "square": (Call(lambda x: x**2 - x.square() * 0.5), ROW),
    "parameters": (nn.Sequential(nn.Conv2d(6, 4, 1), Scale(4, 1, 1)), PICTURE),
    "broadcast": (Call(lambda c, x: c(x) * x.mean((2, 3), keepdim=True), conv=nn.Conv2d(6, 6, 1)), PICTURE),
    "max-pool2d": (nn.MaxPool2d(3, 2, padding=1), PICTURE),
    "max-pool2d-ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), PICTURE),
    "max-pool1d": (nn.MaxPool1d(2), LINE),
    "avg-pool2d": (nn.AvgPool2d(2), PICTURE),
    "avg-pool2d-pad": (nn.AvgPool2d(3, 2, padding=1), PICTURE),
    "avg-pool2d-exclude": (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), PICTURE),
    "avg-pool2d-ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), PICTURE),
    "avg-pool2d-ceil-exclude": (nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True, count_include_pad=False), PICTURE),
    "avg-pool2d-ceil-pad": (nn.AvgPool2d((4, 3), (3, 2), (2, 1), ceil_mode=True), (1, 3, 8, 6)),
    "avg-pool1d": (nn.AvgPool1d(2), LINE),
    "avg-pool1d-ceil-pad": (nn.AvgPool1d(3, 2, 1, ceil_mode=True), LINE),
    "global-avg-pool": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), PICTURE),
    "adaptive-avg-pool": (nn.AdaptiveAvgPool2d((2, 4)), PICTURE),
    "global-max-pool": (nn.AdaptiveMaxPool2d(1), PICTURE),
    "flatten": (nn.Sequential(nn.Conv2d(6, 3, 1), nn.Flatten(), nn.ReLU(), nn.Linear(192, 5)), PICTURE),
    "view": (Call(lambda x: x.view(1, -1)), PICTURE),
    "view-after-conv": (Call(lambda c, x: c(x).view(1, 3, -1).relu(), conv=nn.Conv2d(6, 3, 1)), PICTURE),
    "permute": (Call(lambda c, x: c(x).permute(0, 2, 3, 1), conv=nn.Conv2d(6, 3, 1)), PICTURE),
    "shuffle": (Call(lambda a, b, x: b(shuffle(a(x))), a=nn.Conv2d(6, 6, 1), b=nn.Conv2d(6, 6, 1)), PICTURE),
    "squeeze": (Call(lambda x: x.unsqueeze(2).squeeze(0).unsqueeze(0)), PICTURE),
    "concatenate": (Call(lambda a, x: torch.cat([a(x), a(x) * 2, x], 1), a=nn.Conv2d(6, 2, 1)), PICTURE),
    "stack": (Call(lambda x: torch.stack([x, x * 2], 1)), ROW),
    "chunk": (Call(lambda c, x: torch.mul(*c(x).chunk(2, 1)), conv=nn.Conv2d(6, 6, 1)), PICTURE),
    "slice": (Call(lambda c, x: c(x)[:, 1:5, ::2, -3:], conv=nn.Conv2d(6, 6, 1)), PICTURE),
    "index": (Call(lambda c, x: c(x)[:, 2], conv=nn.Conv2d(6, 6, 1)), PICTURE),
    "index-list": (Call(lambda c, x: c(x)[:, [2, 0, 5]], conv=nn.Conv2d(6, 6, 1)), PICTURE),
    "pad": (Call(lambda c, x: F.pad(c(x), (1, 2, 3, 0), value=0.5), conv=nn.Conv2d(6, 3, 1)), PICTURE),
    "pad-and-crop": (nn.Sequential(nn.ConstantPad2d((-1, 2, 1, -2), 0.5), nn.Conv2d(6, 3, 3)), PICTURE),
    "zero-pad": (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 3, 3, stride=2)), PICTURE),
    "nearest": (nn.Upsample(scale_factor=2), PICTURE),
    "nearest-size-rounded": (nn.Upsample(size=(46, 5)), (1, 2, 14, 8)),
    "nearest-size": (nn.Upsample(size=(5, 11)), PICTURE),
    "bilinear": (nn.Upsample(size=(5, 11), mode="bilinear"), PICTURE),
    "bilinear-corners": (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), PICTURE),
    "mean": (Call(lambda c, x: c(x).mean((2, 3)), conv=nn.Conv2d(6, 6, 1)), PICTURE),
    "mean-all": (Call(lambda x: x.mean()), PICTURE),
    "mean-channels": (Call(lambda c, x: c(x).mean(1, keepdim=True), conv=nn.Conv2d(6, 6, 1)), PICTURE),
    "sum": (Call(lambda x: x.sum((-1, -2)) + x.sum(2).sum(2)), PICTURE),
    "softmax": (nn.Softmax(-1), ROW),
    "softmax-channels": (nn.Sequential(nn.Conv2d(6, 3, 1), nn.Softmax(1)), PICTURE),
    "log-softmax": (nn.Sequential(nn.Linear(12, 5), nn.LogSoftmax(-1)), ROW),
    "batch-norm": (nn.Sequential(nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()), PICTURE),
    "batch-norm-bias": (nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)), PICTURE),
    "batch-norm-1d": (nn.Sequential(nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5)), LINE),
    "batch-norm-dense": (nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5)), ROW),
    "batch-norm-alone": (nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)), PICTURE),
    "dropout": (nn.Sequential(nn.Linear(12, 5), nn.Dropout(), nn.Identity()), ROW),
    "layer-norm": (nn.LayerNorm(20), LINE),
    "group-norm": (nn.Sequential(nn.Conv2d(6, 6, 1), nn.GroupNorm(3, 6)), PICTURE),
    "residual": (Residual(), PICTURE),
    "shared": (Shared(), PICTURE),
    "squeeze-excite": (Squeeze(), PICTURE),
    "tied": (Call(lambda a, x: a(F.relu(a(x))), conv=nn.Conv2d(6, 6, 3, padding=1)), PICTURE),
}  # fmt: skip


def prepared(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The module with statistics and parameters that are not the initial ones, and an input."""
    module, shape = MODELS[name]
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module.eval(), torch.randn(shape)


def simplify(graph: Graph) -> Graph:
    for step in (canonicalize, to_nhwc, fold_batch_norm):
        graph = verify(step(graph))
    return graph


def export(module: nn.Module, x: torch.Tensor, path: Path, dynamo: bool) -> Path:
    """As close to the module as the exporter can; what dynamo writes by default, optimised, is beside it."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(
                module, (x,), path, dynamo=True, optimize=False, verbose=False, external_data=False
            )
            assert program is not None
            program.optimize()
            program.save(path.with_name("default.onnx"), external_data=True)
        else:
            keep = torch.onnx.TrainingMode.PRESERVE
            torch.onnx.export(module, (x,), path, dynamo=False, do_constant_folding=False, training=keep)
    return path


def largest_error(graph: Graph, module: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = module(x).numpy()
    found = evaluate(graph, [x.numpy()]).outputs[0]
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


def check_names(graph: Graph, module: nn.Module) -> None:
    """Constants are the module's own tensors, element by element, and layers are its modules."""
    state = {k: v.numpy() for k, v in module.state_dict().items()}
    layers = {path for path, _ in module.named_modules()}
    folded = {layer + ".bias" for layer, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for const in graph.consts:
        if const.origin is None:
            assert const.name.startswith("const."), const.name
            continue
        user = state[const.origin.name]
        assert const.origin.shape == user.shape and const.origin.index.shape == const.data.shape
        assert const.name == const.origin.name
        if const.name not in folded:  # the bias of a folded batch norm is beta plus something that does not learn
            scale = 1.0 if const.origin.scale is None else const.origin.scale
            np.testing.assert_allclose(const.data, scale * user.flat[const.origin.index], rtol=1e-6)
    assert {node.layer for node in graph.nodes} <= layers


@pytest.mark.parametrize("name", MODELS)
def test_pytorch(name: str) -> None:
    module, x = prepared(name)
    imported = verify(import_model(module, (x,)))
    assert largest_error(imported, module, x) < 1e-5
    check_names(imported, module)
    graph = simplify(imported)
    assert largest_error(graph, module, x) < 1e-5
    check_names(graph, module)
    for text in (imported, graph):
        assert parse(str(text), {c.name: c.data for c in text.consts}) == text


# PyTorch's exporters write these in a form that is not that of the module; ONNX's Clip is hardtanh, not clamp.
OTHER_TEXT = {(name, dynamo) for name in ("group-norm", "clamp", "clamp-min", "clamp-max") for dynamo in (False, True)}
NO_ONNX = {("chunk", True)}  # a sequence of tensors


@cache
def text_of(name: str) -> str:
    module, x = prepared(name)
    return str(simplify(import_model(module, (x,))))


@pytest.mark.parametrize("dynamo", [False, True], ids=["onnx", "onnx-dynamo"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_gives_the_same_text(name: str, dynamo: bool, tmp_path: Path) -> None:
    module, x = prepared(name)
    path = export(module, x, tmp_path / "m.onnx", dynamo)
    if dynamo:
        assert largest_error(simplify(verify(import_model(path.with_name("default.onnx")))), module, x) < 1e-5
    if (name, dynamo) in NO_ONNX:
        with pytest.raises(TTEError, match="not supported"):
            import_model(path)
        return
    graph = simplify(verify(import_model(path)))
    assert largest_error(graph, module, x) < 1e-5
    check_names(graph, module)
    if (name, dynamo) not in OTHER_TEXT:
        assert str(graph) == text_of(name)


class Clashing(nn.Module):
    """Names that TVM and the IR use for their own."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(12, 12)
        self.lv = nn.Linear(12, 12)
        self.gv = nn.Parameter(torch.randn(12))

    def forward(self, lv: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.tanh(lv) + self.gv) * self.x(lv) + self.lv(lv)


def test_names_that_clash(tmp_path: Path) -> None:
    module, x = Clashing().eval(), torch.randn(ROW)
    assert largest_error(simplify(import_model(module, (x,))), module, x) < 1e-5
    proto = onnx.load(export(module, x, tmp_path / "m.onnx", dynamo=False))
    names = dict(
        zip(["gv", "lv.weight", "lv.bias", "x.weight", "x.bias"], ["lv", "lv1", "0", "a b", "a?b"], strict=True)
    )
    for tensor in proto.graph.initializer:
        tensor.name = names[tensor.name]
    for node in proto.graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
    graph = simplify(import_model(proto))
    assert largest_error(graph, module, x) < 1e-5
    origins = {c.name: c.origin.name for c in graph.consts if c.origin}
    assert origins == {"lv": "lv", "lv1": "lv1", "param.0": "0", "a_b": "a b", "a_b_": "a?b"}


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("options", [{"dynamo": False, "opset_version": 13}, {"dynamo": True, "opset_version": 18}])
def test_gelu_of_older_exports(options: dict[str, Any], form: str, tmp_path: Path) -> None:
    module, x = nn.Sequential(nn.Linear(12, 5), nn.GELU(form)), torch.randn(ROW)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), tmp_path / "m.onnx", verbose=False, **options)
    assert str(simplify(import_model(tmp_path / "m.onnx"))) == str(simplify(import_model(module, (x,))))


ERF = [
    torch.erf,
    lambda x: torch.erf(x).relu(),
    lambda x: torch.erf(x) + torch.erf(x),
    lambda x: torch.cat([torch.erf(x), x], 1),
    lambda x: x * (1 + torch.erf(x)),
    lambda x: 2 * torch.erf(x),
]


@pytest.mark.parametrize("function", ERF)
def test_erf_outside_of_gelu_is_refused(function: Callable[..., torch.Tensor]) -> None:
    error = refusal(Call(function), torch.zeros(ROW))
    assert error.code == "TTE-E024" and "only in gelu" in error.where


def refusal(model: Any, *inputs: Any) -> TTEError:
    with pytest.raises(TTEError) as caught:
        import_model(model, tuple(inputs) or None)
    assert caught.value.fix
    return caught.value


def test_unsupported_operators_are_listed_at_once() -> None:
    class Exotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Call(lambda x: torch.sin(x))
            self.second = nn.Sequential(nn.ReLU(), Call(lambda x: torch.cumsum(x, 1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).sort(1)[0]

    error = refusal(Exotic(), torch.zeros(ROW))
    assert error.code == "TTE-E024"
    assert error.where.split("\n         ") == [
        "first: sin(float32[1, 12])",
        "second.1: cumsum(float32[1, 12])",
        "the model itself: sort(float32[1, 12])",
    ]


def test_unsupported_operators_of_onnx_are_listed_at_once(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(12, 4), Call(torch.sin), nn.ELU())
    error = refusal(export(module, torch.zeros(ROW), tmp_path / "m.onnx", dynamo=False))
    assert error.where.split("\n         ") == ["1: Sin(float[1, 4])", "2: Elu(float[1, 4])"]
    error = refusal(export(Call(torch.sin), torch.zeros(ROW), tmp_path / "m.onnx", dynamo=False))
    assert error.where == "node /Sin: Sin(float[1, 12])"


def test_names_that_the_exporter_makes_up_are_no_layers(tmp_path: Path) -> None:
    """Of a module that has no parts, and of a file that has lost what was written beside its nodes."""
    path = tmp_path / "m.onnx"
    model = onnx.load(export(nn.Linear(12, 4), torch.zeros(ROW), path, dynamo=True))
    for node in model.graph.node:
        node.ClearField("metadata_props")
    assert [node.name for node in model.graph.node] == ["node_linear"]
    assert [layer.name for layer in tte.analyze(model).layers] == ["weight"]


def test_unsupported_forms_of_supported_operators_say_why() -> None:
    model = nn.Sequential(nn.MaxPool2d(2, dilation=2), nn.Conv2d(6, 2, 1), nn.ReflectionPad2d(1))
    error = refusal(model, torch.zeros(PICTURE))
    assert "0: nn.max_pool2d(float32[1, 6, 8, 8]): pooling with dilation" in error.where
    assert "2: nn.pad(float32[1, 2, 3, 3]): padding mode reflect" in error.where
    for mode in ("nearest", "bilinear"):
        assert "does not divide" in refusal(nn.Upsample(scale_factor=1.3, mode=mode), torch.zeros(PICTURE)).where


class Stopped(nn.Module):
    """A gradient that is stopped inside of forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                y = self.first(x)
        else:
            y = self.first(x.detach())
            y = y.detach() if self.how == "detach" else y * torch.tensor(2.0)
        return self.last(y)


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_a_stopped_gradient_is_refused(how: str) -> None:
    model, x = nn.Sequential(Stopped(how), nn.ReLU()).eval(), torch.zeros(ROW)
    with torch.no_grad():
        error = refusal(model, x)
    assert error.code == "TTE-E024" and error.where.startswith(f"0: {how}: stops the gradient")
    assert refusal(torch.export.export(model, (x,))).where == error.where


def test_detach_in_front_of_all_parameters_is_fine() -> None:
    module, x = Stopped("").eval(), torch.randn(ROW)
    assert largest_error(import_model(module, (x,)), module, x) < 1e-5


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(12)])
def test_training_mode_is_refused(layer: nn.Module, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 12), layer).train()
    error = refusal(model, torch.zeros(ROW))
    assert error.code == "TTE-E029" and error.where.startswith("1 (") and "eval()" in error.fix
    if isinstance(layer, nn.Dropout):  # PyTorch itself refuses batch norm of one sample in training mode
        program = torch.export.export(model, (torch.zeros(ROW),))
        assert refusal(program).code == "TTE-E029"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training = torch.onnx.TrainingMode.TRAINING
            torch.onnx.export(model, (torch.zeros(ROW),), tmp_path / "m.onnx", dynamo=False, training=training)
        assert refusal(tmp_path / "m.onnx").code == "TTE-E029"


def test_training_mode_without_dropout_or_norm_is_fine() -> None:
    assert import_model(nn.Sequential(nn.Linear(12, 3), nn.ReLU()).train(), (torch.zeros(ROW),)).nodes


def test_dynamic_shapes_are_refused(tmp_path: Path) -> None:
    model, x = nn.Conv2d(6, 3, 3), torch.zeros(1, 6, 8, 8)
    dim = torch.export.Dim("height", min=4, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: dim},))
    assert refusal(program).code == "TTE-E022"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), tmp_path / "m.onnx", dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n", 2: "height"}}
        )
    assert "height" in refusal(tmp_path / "m.onnx").what


def test_free_batch_of_onnx_becomes_one(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(6, 3, 3), nn.Flatten(), nn.Linear(108, 2)).eval(), torch.randn(1, 6, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "n"}}
        torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=False, input_names=["x"], dynamic_axes=axes)
    assert largest_error(simplify(import_model(tmp_path / "m.onnx")), model, x) < 1e-5


def test_batch_is_one(tmp_path: Path) -> None:
    x = torch.zeros(4, 12)
    error = refusal(nn.Linear(12, 3), x)
    assert error.code == "TTE-E027" and "(1, 12)" in error.fix
    assert refusal(torch.export.export(nn.Linear(12, 3), (x,))).code == "TTE-E027"
    assert refusal(export(nn.Linear(12, 3), x, tmp_path / "m.onnx", dynamo=False)).code == "TTE-E027"


def test_control_flow_is_refused(tmp_path: Path) -> None:
    branch = Call(lambda x: torch.relu(x) if x.sum() > 0 else x)
    assert refusal(branch, torch.zeros(ROW)).code == "TTE-E026"
    cond = Call(lambda x: torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,)))
    error = refusal(cond, torch.zeros(ROW))
    assert error.code == "TTE-E026" and "cond" in error.what


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 2)).eval()
    model[1].weight.data[1, 2] = value
    error = refusal(model, torch.zeros(ROW))
    assert error.code == "TTE-E028" and error.where == "1.weight"
    assert refusal(export(model, torch.zeros(ROW), tmp_path / "m.onnx", dynamo=False)).where == "1.weight"


def test_what_is_not_a_model(tmp_path: Path) -> None:
    assert refusal(nn.Linear(12, 3)).code == "TTE-E021"
    assert refusal(tmp_path / "none.onnx").code == "TTE-E020"
    assert refusal([1, 2]).code == "TTE-E020"
    for name in ("m.onnx", "m.pt2", "m.pt", "m.ir"):
        (tmp_path / name).write_bytes(b"\x08\x0a not a model \xff")
        assert refusal(tmp_path / name).code in ("TTE-E020", "TTE-E010")


def test_one_input_one_output(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    assert refusal(Two(), torch.zeros(ROW), torch.zeros(ROW)).code == "TTE-E023"
    assert refusal(Call(lambda x: (x + 1, x * 2)), torch.zeros(ROW)).code == "TTE-E023"
    assert refusal(Call(lambda layer, x: layer.weight * 2, layer=nn.Linear(2, 2)), torch.zeros(ROW)).code == "TTE-E023"
    assert refusal(Call(lambda x: x * 2), torch.zeros(ROW, dtype=torch.int32)).code == "TTE-E023"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Two(), (torch.zeros(ROW), torch.zeros(ROW)), tmp_path / "m.onnx", dynamo=False)
    assert refusal(tmp_path / "m.onnx").code == "TTE-E023"


def test_files(tmp_path: Path) -> None:
    """.pt2, .onnx with its data in another file, and tte's own text give what the module gives."""
    module, x = prepared("residual")
    graph = import_model(module, (x,))
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    assert import_model(tmp_path / "m.pt2") == graph
    (tmp_path / "m.ir").write_text(str(graph))
    np.savez(tmp_path / "m.npz", **{c.name: c.data for c in graph.consts})
    again = import_model(tmp_path / "m.ir")
    assert again == graph and largest_error(again, module, x) < 1e-5
    assert again.consts[0].origin is not None and again.consts[0].origin.name == graph.consts[0].name

    proto = onnx.load(export(module, x, tmp_path / "m.onnx", dynamo=False))
    onnx.save(proto, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    expected = str(import_model(tmp_path / "m.onnx"))
    assert str(import_model(tmp_path / "e.onnx")) == expected == str(import_model(onnx.load(tmp_path / "m.onnx")))
    assert refusal(onnx.load(tmp_path / "e.onnx", load_external_data=False)).code == "TTE-E020"
    (tmp_path / "e.data").unlink()
    assert refusal(tmp_path / "e.onnx").code == "TTE-E020"


def by_hand(node: onnx.NodeProto, shape: tuple[int, ...], **constants: np.ndarray) -> onnx.ModelProto:
    """ReLU(node(x)) as ONNX."""
    node.output[:] = ["a"]
    values = [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", shape), ("y", [None] * len(shape)))]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(
        [node, onnx.helper.make_node("Relu", ["a"], ["y"])], "g", values[:1], values[1:], weights
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_pixel_shuffle() -> None:
    module, x = nn.PixelShuffle(2), torch.randn(1, 8, 3, 4)
    assert largest_error(import_model(module, (x,)), module, x) == 0.0


def test_split_into_one() -> None:
    node = onnx.helper.make_node("Split", ["x", "sizes"], ["a"], axis=1)
    graph = simplify(import_model(by_hand(node, ROW, sizes=np.asarray([12]))))
    assert [n.op for n in graph.nodes] == ["nn.relu"]


def test_forms_that_only_onnx_has_are_refused() -> None:
    weight = np.ones((6, 2, 3, 3), np.float32)
    node = onnx.helper.make_node("ConvTranspose", ["x", "w"], ["a"], strides=[2, 2], output_shape=[17, 18])
    assert "output_shape" in refusal(by_hand(node, PICTURE, w=weight)).where
    mode = {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}
    node = onnx.helper.make_node("Resize", ["x", "", "", "size"], ["a"], **mode)
    assert "one row" in refusal(by_hand(node, PICTURE, size=np.asarray([1, 6, 1, 4]))).where


def test_old_opset(tmp_path: Path) -> None:
    proto = onnx.load(export(nn.Linear(12, 3), torch.zeros(ROW), tmp_path / "m.onnx", dynamo=False))
    proto.opset_import[0].version = 5
    assert "opset 5" in refusal(proto).what


@pytest.fixture(scope="module")
def small_onnx(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    )
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    return export(module.eval(), torch.zeros(1, 2, 6, 6), path, dynamo=False).read_bytes()


def import_damaged(data: bytes, path: Path) -> None:
    """Either a graph that is valid and can be simplified, or a TTEError."""
    path.write_bytes(data)
    try:
        simplify(verify(import_model(path)))
    except TTEError as error:
        assert error.code.startswith("TTE-E0") and error.fix


@pytest.mark.parametrize("seed", range(6))
def test_damaged_onnx(seed: int, small_onnx: bytes, tmp_path: Path) -> None:
    """Bits flipped, bytes replaced, cut off and doubled: 25 of each round."""
    rng = np.random.default_rng(seed)
    for _ in range(25):
        data = bytearray(small_onnx)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            kind = rng.integers(4)
            if kind == 0:
                data[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[at] = int(rng.integers(256))
            elif kind == 2:
                del data[at : at + int(rng.integers(1, 20))]
            else:
                data[at:at] = data[at : at + int(rng.integers(1, 20))]
        import_damaged(bytes(data), tmp_path / "m.onnx")
    for length in rng.integers(0, len(small_onnx), 5):
        import_damaged(small_onnx[:length], tmp_path / "m.onnx")
