"""Real networks, rebuilt in PyTorch around weights that other people trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import load_mnist, load_pictures, require_pack
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A model and what it is trained with here.

    model: a module in eval mode or the path of an ONNX file; samples(n): real data where the pack has it;
    sparse: an update scheme that trains some input channels of some layers
    """

    name: str
    model: nn.Module | Path
    shape: tuple[int, ...]
    loss: str
    samples: Callable[[int], dict[str, np.ndarray]]
    sparse: dict[str, Any]
    rate: float = 0.01

    @property
    def example(self) -> tuple[Tensor, ...] | None:
        return (torch.zeros(self.shape),) if isinstance(self.model, nn.Module) else None

    def scheme(self, train: Any) -> dict[str, Any]:
        """An update scheme for this network: train is a short form, or "sparse"."""
        rules = self.sparse["train"] if train == "sparse" else train
        io = {"target": "input"} if self.loss == "mse" else {}
        return {"loss": self.loss, "optimizer": {"lr": self.rate}, "train": rules, "io": io}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels with zeros (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.grow = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


class KerasNetwork(nn.Module):
    """Runs the layer list of a Keras model; submodules have the names of its layers."""

    def __init__(self, stem: Path) -> None:
        super().__init__()
        self.records = json.loads(stem.with_suffix(".json").read_text())["layers"]
        weights = np.load(stem.with_suffix(".npz"))
        for record in self.records:
            layer = _keras_layer(record, weights)
            if layer is not None:
                self.add_module(record["name"], layer)

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for record in self.records:
            name, config, kind = record["name"], record["config"], record["class_name"]
            inputs = [values[i] for i in record["inbound"]] or [x]
            y = inputs[0]
            if kind in ("Conv2D", "DepthwiseConv2D"):
                y = _same(y, config) if config["padding"] == "same" else y
                y = getattr(self, name)(y)
            elif kind in ("BatchNormalization", "Dense"):
                y = getattr(self, name)(y)
            elif kind == "ReLU":
                y = F.relu6(y) if config.get("max_value") == 6 else F.relu(y)
            elif kind == "Add":
                y = inputs[0] + inputs[1]
            elif kind == "AveragePooling2D":
                y = F.avg_pool2d(y, tuple(config["pool_size"]))
            elif kind == "GlobalAveragePooling2D":
                y = y.mean((2, 3), keepdim=bool(config.get("keepdims")))
            elif kind in ("Flatten", "Reshape"):
                y = y.permute(0, 2, 3, 1).flatten(1) if y.dim() == 4 else y.flatten(1)
                if kind == "Reshape" and len(config["target_shape"]) > 1:
                    y = y.reshape(1, config["target_shape"][-1], *config["target_shape"][:-1])
            elif kind == "ZeroPadding2D":
                (top, bottom), (left, right) = config["padding"]
                y = F.pad(y, (left, right, top, bottom))
            elif kind == "Activation" and y.dim() == 4 and config.get("activation") == "softmax":
                y = y.flatten(1)
            activation = config.get("activation")
            y = F.relu(y) if activation == "relu" else torch.softmax(y, -1) if activation == "softmax" else y
            values[name] = y
        return values[self.records[-1]["name"]]


def _keras_layer(record: dict[str, Any], weights: Any) -> nn.Module | None:
    name, config, kind = record["name"], record["config"], record["class_name"]

    def get(key: str) -> Tensor | None:
        return torch.from_numpy(weights[f"{name}/{key}"]) if f"{name}/{key}" in weights else None

    if kind in ("Conv2D", "DepthwiseConv2D"):
        kernel = get("kernel") if kind == "Conv2D" else get("depthwise_kernel")
        assert kernel is not None
        if kind == "Conv2D":
            w = kernel.permute(3, 2, 0, 1)
        else:
            w = kernel.permute(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
        groups = 1 if kind == "Conv2D" else kernel.shape[2]
        bias = get("bias")
        conv = nn.Conv2d(
            w.shape[1] * groups, w.shape[0], w.shape[2:], config["strides"], groups=groups, bias=bias is not None
        )
        return _filled(conv, weight=w, bias=bias)
    if kind == "BatchNormalization":
        mean, variance = get("moving_mean"), get("moving_variance")
        assert mean is not None
        norm = nn.BatchNorm2d(len(mean), eps=config["epsilon"])
        return _filled(norm, weight=get("gamma"), bias=get("beta"), running_mean=mean, running_var=variance)
    if kind == "Dense":
        kernel = get("kernel")
        assert kernel is not None
        return _filled(nn.Linear(*kernel.shape), weight=kernel.T, bias=get("bias"))
    return None


def _filled(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """The module with these tensors; those that are None keep what makes them do nothing."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                getattr(module, name).copy_(tensor)
    return module


def _same(x: Tensor, config: dict[str, Any]) -> Tensor:
    """Keras' padding "same": what stride and kernel need, the odd one at the end."""
    pads: list[int] = []
    sizes = [int(n) for n in x.shape[2:]]  # plain numbers also while the model is traced
    for size, kernel, stride in reversed(list(zip(sizes, config["kernel_size"], config["strides"], strict=True))):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class DsCnn(nn.Module):
    """The keyword-spotting network of MLPerf Tiny: 49 x 10 MFCC, four depthwise-separable blocks, 12 words."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 1, 4, 5))
        self.stem = nn.Sequential(nn.Conv2d(1, channels, (10, 4), 2), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, 1, 1, groups=channels),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, 1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                )
                for _ in range(4)
            )
        )
        self.pool = nn.AvgPool2d((25, 5))
        self.fc = nn.Linear(channels, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(self.pad(x)))).flatten(1))


class Autoencoder(nn.Module):
    """640-128-8-128-640 with batch norm, as for machine sounds in MLPerf Tiny, shortened."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (640, 128, 8, 128)
        hidden: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            hidden += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
        self.hidden = nn.Sequential(*hidden)
        self.out = nn.Linear(128, 640)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))


CIFAR_MEAN = np.asarray([0.485, 0.456, 0.406], np.float32)
CIFAR_STD = np.asarray([0.229, 0.224, 0.225], np.float32)


def _cifar(n: int, normalise: bool) -> dict[str, np.ndarray]:
    x, y = load_pictures("cifar10-jpeg", 1)
    step = max(1, len(x) // n)
    x, y = x[::step][:n].astype(np.float32), y[::step][:n]
    x = (x / 255 - CIFAR_MEAN) / CIFAR_STD if normalise else x
    return {"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32), "y": y}


def _flowers(n: int) -> dict[str, np.ndarray]:
    """Flowers of five kinds, numbered 0 to 4: new to a network for ImageNet, so that no loss is almost zero."""
    from PIL import Image

    x, y = load_pictures("flowers5", 1)
    step = max(1, len(x) // n)
    small = [np.asarray(Image.fromarray(p).resize((128, 128))) for p in x[::step][:n]]
    return {"x": (np.stack(small).transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32), "y": y[::step][:n]}


def _mnist14(n: int) -> dict[str, np.ndarray]:
    """14 x 14 means of 2 x 2 pixels, in the ONNX model's layout."""
    x, y = load_mnist(1)
    x = x[:n].reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    return {"x": x[:, None].astype(np.float32), "y": y[:n]}


def _words(n: int) -> dict[str, np.ndarray]:
    pack = np.load(require_pack() / "data" / "kws01-mfcc-int8.npz")
    x = (pack["x"][:n].astype(np.float32) - float(pack["zero"])) * float(pack["scale"]) / 32
    return {"x": x[:, None], "y": pack["labels"][:n].astype(np.int32)}


def _spectra(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((n, 640)).astype(np.float32)}


def resnet20() -> ResNet20:
    network = ResNet20()
    weights = np.load(require_pack() / "models" / "resnet20-cifar10.npz")
    network.load_state_dict({k: torch.from_numpy(np.array(weights[k])) for k in weights.files})
    return network.eval()


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Random weights, with batch-norm statistics that are not those of a new layer."""
    torch.manual_seed(0)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.normal_(0, 0.1)
    return network.eval()


def _rule(layer: str, channels: float = 0.25) -> dict[str, Any]:
    return {"layer": layer, "weight": {"in_channels": channels}, "bias": True}


def load_networks() -> list[Network]:
    """All six. Weights of DS-CNN and the autoencoder are random: nobody publishes them in an open float format."""
    models = require_pack() / "models"
    whole = {"weight": "all", "bias": True}
    return [
        Network(
            "mnist14",
            models / "onnx2c-mnist14.onnx",
            (1, 1, 14, 14),
            "cross_entropy",
            _mnist14,
            {"train": [{"layer": "cnn2", "weight": {"in_channels": 0.5}}, {"layer": "linear", **whole}]},
        ),
        Network(
            "resnet20",
            resnet20(),
            (1, 3, 32, 32),
            "cross_entropy",
            lambda n: _cifar(n, True),
            {"train": [_rule("layer3.*"), _rule("layer2.2.conv2", 0.5), {"layer": "linear", **whole}]},
            0.001,
        ),
        Network(
            "resnet8",
            KerasNetwork(models / "mlperf-resnet8-cifar10").eval(),
            (1, 3, 32, 32),
            "cross_entropy",
            lambda n: _cifar(n, False),
            {"train": [_rule("conv2d_{4..8}"), {"layer": "dense", **whole}]},
            0.0001,
        ),
        Network(
            "mobilenet",
            KerasNetwork(models / "imagenet-mobilenetv1-025-128").eval(),
            (1, 3, 128, 128),
            "cross_entropy",
            _flowers,
            {"train": [_rule("conv_pw_{9..13}"), _rule("conv_dw_13"), {"layer": "conv_preds", **whole}]},
            0.00001,
        ),
        Network(
            "dscnn",
            _seeded(DsCnn),
            (1, 1, 49, 10),
            "cross_entropy",
            _words,
            {"train": [_rule("blocks.{2..3}.3"), _rule("blocks.3.0", 0.5), {"layer": "fc", **whole}]},
        ),
        Network(
            "autoencoder",
            _seeded(Autoencoder),
            (1, 640),
            "mse",
            _spectra,
            {"train": [_rule("hidden.3", 0.5), {"layer": "out", **whole}]},
        ),
    ]


def export_onnx(network: Network, path: Path) -> Path:
    """The same network as an ONNX file that keeps batch norm and the names of parameters."""
    assert isinstance(network.model, nn.Module)
    torch.onnx.export(
        network.model,
        network.example,
        str(path),
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )
    return path
