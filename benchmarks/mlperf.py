"""The networks of MLPerf Tiny, with weights that nobody trained: for what they cost."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tte


def conv(
    i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Module:
    """A convolution that keeps sizes, up to its stride, with batch norm and activation."""
    layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


class ResNet8(nn.Module):
    """Image classification: 3 x size x size, ten classes."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.a1, self.a2 = conv(16, 16), conv(16, 16, act=None)
        self.b1, self.b2, self.bs = conv(16, 32, 3, 2), conv(32, 32, act=None), conv(16, 32, 1, 2, act=None)
        self.c1, self.c2, self.cs = conv(32, 64, 3, 2), conv(64, 64, act=None), conv(32, 64, 1, 2, act=None)
        self.pool, self.fc = nn.AvgPool2d(size // 4), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.a2(self.a1(x)))
        x = F.relu(self.bs(x) + self.b2(self.b1(x)))
        x = F.relu(self.cs(x) + self.c2(self.c1(x)))
        return self.fc(self.pool(x).flatten(1))


class MobileNet(nn.Module):
    """Visual wake words: MobileNetV1, a quarter of its width, 3 x 96 x 96, two classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        pairs = zip(widths, widths[1:], strides, strict=False)
        blocks = [nn.Sequential(conv(i, i, 3, stride, i), conv(i, o, 1)) for i, o, stride in pairs]
        self.stem, self.blocks = conv(3, 8, 3, 2), nn.Sequential(*blocks)
        self.pool, self.fc = nn.AvgPool2d(3), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class DsCnn(nn.Module):
    """Keyword spotting: 49 x 10 MFCC, twelve words."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 64, (10, 4), 2, (5, 1)), nn.ReLU())
        self.blocks = nn.Sequential(*(nn.Sequential(conv(64, 64, 3, 1, 64), conv(64, 64, 1)) for _ in range(4)))
        self.pool, self.fc = nn.AvgPool2d((25, 5)), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def autoencoder() -> nn.Module:
    """Anomaly detection: dense layers between 640 and 8."""
    sizes = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    hidden = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*hidden, nn.Linear(128, 640))


@dataclass(frozen=True)
class Shape:
    """A network, the shape of its input, and how many multiply-accumulates an inference takes."""

    make: Callable[[], nn.Module]
    input: tuple[int, ...]
    macs: int
    loss: str = "cross_entropy"


SHAPES = {
    "resnet8": Shape(ResNet8, (1, 3, 32, 32), 12_501_632),
    "mobilenet": Shape(MobileNet, (1, 3, 96, 96), 7_489_664),
    "dscnn": Shape(DsCnn, (1, 1, 49, 10), 2_656_768),
    "autoencoder": Shape(autoencoder, (1, 640), 264_192, "mse"),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return SHAPES[name].make().eval()


def compile_float(name: str, scheme: str = "full", target: str = "cortex-m7") -> tte.Artifact:
    shape = SHAPES[name]
    return tte.compile(make(name), (torch.zeros(shape.input),), {"loss": shape.loss, "train": scheme}, target, name)


def quantize(network: nn.Module, shape: tuple[int, ...], model: Path) -> None:
    """All layers int8, for an input whose scale is 1 / 128."""
    x = np.random.default_rng(0).integers(-128, 128, (8, *shape[1:])).astype(np.float32) / 128
    x.flat[:2] = -1, 127 / 128
    tte.quantize(network, {"x": x}, model, int8_head=True)


def compile_int8(
    name: str, folder: Path, target: str = "cortex-m7", scheme: str = "bias-only", gradients: str = "float32"
) -> tte.Artifact:
    """All layers int8, and int8 in; where only the biases learn, all weights stay in the flash."""
    shape, model = SHAPES[name], folder / f"{name}.onnx"
    quantize(make(name), shape.input, model)
    rules = {"loss": shape.loss, "train": scheme, "io": {"input": {"dtype": "int8", "std": [128]}}}
    rules["quantized"] = {"gradients": gradients}
    if shape.loss == "mse":
        rules["io"]["target"] = "input"
    elif len(shape.input) == 4:
        rules["io"]["input"]["layout"] = "nhwc"
    return tte.compile(model, update_scheme=rules, target=target, name=name, memory_plan="fastest")
