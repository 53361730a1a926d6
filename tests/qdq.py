"""Networks that onnxruntime quantises, for tests of quantised models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlperf import ResNet8, conv
from torch import Tensor, nn
from torch.nn import functional as F


class Inverted(nn.Module):
    """Expand, depthwise, project, and a skip where shapes agree."""

    def __init__(self, i: int, o: int, expand: int, k: int = 3, stride: int = 1) -> None:
        super().__init__()
        m = i * expand
        first = [conv(i, m, 1, act=nn.ReLU6)] if expand > 1 else []
        self.body = nn.Sequential(*first, conv(m, m, k, stride, m, nn.ReLU6), conv(m, o, 1, act=None))
        self.skip = i == o and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skip else y


class Mobile(nn.Module):
    """A stem, inverted residuals (channels, expansion, kernel, stride), global average pooling, a dense head."""

    def __init__(self, stem: int, blocks: list[tuple[int, int, int, int]], last: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = conv(3, stem, 3, 2, act=nn.ReLU6)
        channels = [stem, *(b[0] for b in blocks)]
        self.blocks = nn.Sequential(
            *(Inverted(i, o, e, k, s) for i, (o, e, k, s) in zip(channels, blocks, strict=False))
        )
        self.last = conv(channels[-1], last, 1, act=nn.ReLU6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.last(self.blocks(self.stem(x)))).flatten(1))


class Branches(nn.Module):
    """Max pooling, and branches of different scales that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.left, self.right, self.head = conv(12, 8, 1), conv(12, 6, 5, act=None), conv(14 + 12, 16)
        self.fc = nn.Linear(16 * 4 * 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = torch.cat([self.left(x), self.right(x), F.max_pool2d(x, 3, 1, 1)], 1)
        return self.fc(F.max_pool2d(self.head(x), 3, 2, 1).flatten(1))


class Pools(nn.Module):
    """Average pooling with and without padding, a mean, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 8, act=None), nn.Linear(8 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.a(x), 2)
        x = F.avg_pool2d(self.b(x), 3, 2, 1, count_include_pad=False)
        return self.fc(F.avg_pool2d(x, 2, 1).flatten(1))


class Swish(nn.Module):
    """Activations that integers do not compute: hard-swish, sigmoid as a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.fc = (
            conv(3, 8, act=None),
            conv(8, 8, act=None),
            conv(8, 8, 1, act=None),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.a(x))
        x = self.b(x)
        x = x * torch.sigmoid(self.gate(x))
        return self.fc(F.leaky_relu(x, 0.1).mean((2, 3)))


class DsCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, (10, 4), 2, (4, 1)), nn.ReLU())
        self.blocks = nn.Sequential(
            *(nn.Sequential(conv(24, 24, 3, 1, 24), conv(24, 24, 1)) for _ in range(3)), nn.AvgPool2d((24, 5))
        )
        self.fc = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).flatten(1))


class Numbers(nn.Module):
    """Constants that are quantised as activations are: a scale, the bias of a dense layer that ONNX takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dense, self.fc = conv(3, 8), nn.Linear(64, 12), nn.Linear(12, 5)
        self.gain, self.offset = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.gain + self.offset
        return self.fc(F.relu(self.dense(x.flatten(2))).mean(1))


def autoencoder() -> nn.Module:
    sizes = [96, 48, 48, 8, 48, 48]
    layers = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*layers, nn.Linear(48, 96))


@dataclass(frozen=True)
class Recipe:
    """A network and how onnxruntime is to quantise it; excluded: operators that stay float."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    per_channel: bool = True
    unsigned: bool = False
    excluded: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def mobilenet_v2() -> nn.Module:
    return Mobile(16, [(8, 1, 3, 1), (8, 6, 3, 2), (8, 6, 3, 1), (16, 6, 3, 2), (16, 6, 3, 1), (24, 6, 3, 1)], 48)


def mcunet() -> nn.Module:
    return Mobile(16, [(8, 1, 3, 1), (16, 4, 7, 2), (16, 3, 5, 1), (24, 3, 7, 2), (24, 4, 5, 1), (24, 4, 3, 1)], 40)


def small_resnet8() -> nn.Module:
    return ResNet8(16)


RECIPES = {
    "mobilenet-v2": Recipe(mobilenet_v2, (1, 3, 32, 32)),
    "mobilenet-v2-uint8": Recipe(mobilenet_v2, (1, 3, 32, 32), per_channel=False, unsigned=True),
    "mcunet": Recipe(mcunet, (1, 3, 32, 32)),
    "mcunet-per-tensor": Recipe(mcunet, (1, 3, 32, 32), per_channel=False),
    "resnet8": Recipe(small_resnet8, (1, 3, 16, 16)),
    "resnet8-uint8": Recipe(small_resnet8, (1, 3, 16, 16), unsigned=True),
    "ds-cnn": Recipe(DsCnn, (1, 1, 49, 10)),
    "autoencoder": Recipe(autoencoder, (1, 96), per_channel=False),
    "branches": Recipe(Branches, (1, 3, 16, 16)),
    "branches-uint8": Recipe(Branches, (1, 3, 16, 16), per_channel=False, unsigned=True),
    "pools": Recipe(Pools, (1, 3, 16, 16)),
    "pools-uint8": Recipe(Pools, (1, 3, 16, 16), unsigned=True),
    "swish": Recipe(Swish, (1, 3, 12, 12)),
    "numbers": Recipe(Numbers, (1, 3, 8, 8)),
    "numbers-uint8": Recipe(Numbers, (1, 3, 8, 8), per_channel=False, unsigned=True),
    "float-head": Recipe(mcunet, (1, 3, 32, 32), excluded=("Gemm",)),
}


def export(recipe: Recipe, path: Path) -> None:
    """The float network, statistics of batch norm drawn, batch norm folded by the exporter."""
    torch.manual_seed(len(str(recipe.shape)))
    model = recipe.make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.2, 1.0)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    torch.onnx.export(model, (torch.zeros(recipe.shape),), str(path), dynamo=False, opset_version=17)


def quantize(recipe: Recipe, folder: Path, form: Any = None) -> Path:
    """The network as onnxruntime quantises it; form: its QuantFormat, pairs by default."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    folder.mkdir(parents=True, exist_ok=True)
    given, result = folder / "float.onnx", folder / "int8.onnx"
    export(recipe, given)
    graph = onnx.load(given).graph
    name = graph.input[0].name
    samples = iter([{name: x} for x in inputs(recipe, 8, seed=1)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(samples, None)

    quantize_static(
        given,
        result,
        Reader(),
        quant_format=form or QuantFormat.QDQ,
        per_channel=recipe.per_channel,
        activation_type=QuantType.QUInt8 if recipe.unsigned else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        # Where the CPU has no VNNI, onnxruntime's sums of uint8 x int8 saturate; with seven bits they cannot.
        reduce_range=recipe.unsigned,
        nodes_to_exclude=[n.name for n in graph.node if n.op_type in recipe.excluded],
        extra_options=recipe.options,
    )
    return result


def inputs(recipe: Recipe, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *recipe.shape)).astype(np.float32)
