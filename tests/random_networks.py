"""Random PyTorch networks with forks, shared weights and odd shapes, and random update schemes for them."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tte.ir import Graph
from tte.scheme import find_layers

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardsigmoid, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus,
    lambda: nn.GELU(approximate="tanh"), lambda: nn.Hardtanh(-0.5, 0.7),
)  # fmt: skip


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor], text: str) -> None:
        super().__init__()
        self.function, self.text = function, text

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)

    def extra_repr(self) -> str:
        return self.text


class Scale(nn.Module):
    """A parameter that is multiplied and added: read twice."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape) * 0.3 + 0.8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p + self.p


class Network(nn.Module):
    """A list of steps, each a module applied to earlier values; the last is a vector of 2 to 5 numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.random = r = random.Random(seed)
        self.shape = (1, r.randint(1, 4), r.randint(4, 8), r.randint(4, 8))
        self.ops = nn.ModuleList()
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        while len(self.steps) < r.randint(3, 8):
            self.grow()
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean = torch.randn(norm.num_features) * 0.3
            norm.running_var = torch.rand(norm.num_features) + 0.5
            nn.init.normal_(norm.weight, 0.9, 0.3)
        k = self.add(nn.AdaptiveAvgPool2d(1) if r.random() < 0.5 else nn.Identity(), len(self.steps))
        k = self.add(nn.Flatten(), k)
        self.classes = r.randint(2, 5)
        k = self.add(nn.Linear(self.values(torch.zeros(self.shape))[k].shape[1], self.classes, r.random() < 0.8), k)
        if r.random() < 0.2:
            self.add(r.choice((nn.Softmax(1), nn.LogSoftmax(-1))), k)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for op, sources in self.steps:
            found.append(self.ops[op](*(found[k] for k in sources)))
        return found

    def add(self, module: nn.Module, *sources: int) -> int:
        self.ops.append(module)
        self.steps.append((len(self.ops) - 1, sources))
        return len(self.steps)

    def grow(self) -> None:
        """One more random piece; what gives no picture, or a large one, is taken back."""
        before = len(self.steps), len(self.ops)
        try:
            self.piece()
            shape = self.eval()(torch.zeros(self.shape)).shape
            if len(shape) == 4 and min(shape) > 0 and shape.numel() < 2000:
                return
        except (RuntimeError, ValueError):
            pass
        del self.steps[before[0] :]
        self.ops = self.ops[: before[1]]

    def piece(self) -> None:
        r = self.random
        values = self.values(torch.zeros(self.shape))
        k = r.choice([len(values) - 1] * 4 + [r.randrange(len(values))])
        _, c, h, w = values[k].shape
        kind = r.choice(
            ("conv",) * 4
            + (
                "depthwise",
                "grouped",
                "transposed",
                "max",
                "average",
                "adaptive",
                "norm",
                "norm",
                "act",
                "act",
                "add",
                "add",
                "multiply",
                "concatenate",
                "section",
                "pad",
                "resize",
                "excite",
                "scale",
                "shared",
                "turn",
                "block",
                "divide",
                "center",
                "gate",
                "line",
                "constant",
            )  # fmt: skip
        )
        size, stride = (r.randint(1, 3), r.randint(1, 3)), (r.randint(1, 2), r.randint(1, 2))
        if kind == "conv":
            padding, dilation = r.choice((0, 1, (1, 0), (2, 1))), r.choice((1, 1, 2))
            self.add(nn.Conv2d(c, r.randint(1, 6), size, stride, padding, dilation, bias=r.random() < 0.7), k)
        elif kind == "depthwise":
            k = self.add(nn.ZeroPad2d([r.randint(0, 2) for _ in range(4)]), k)
            self.add(nn.Conv2d(c, c * r.randint(1, 3), size, stride, 1, r.randint(1, 2), groups=c), k)
        elif kind == "grouped":
            self.add(nn.Conv2d(c, 2 * r.randint(1, 2), size, stride, 1, groups=2), k)
        elif kind == "transposed":
            groups = r.choice((1, 1, c))
            out = r.randint(1, 3) * groups
            more = [r.randint(0, s - 1) for s in stride]
            padding, dilation = r.choice((0, 1)), r.randint(1, 2)
            self.add(nn.ConvTranspose2d(c, out, size, stride, padding, more, groups, dilation=dilation), k)
        elif kind == "max":
            window, padding = r.choice((2, 3, (2, 3))), r.choice((0, 1))
            self.add(nn.MaxPool2d(window, r.randint(1, 2), padding, ceil_mode=r.random() < 0.5), k)
        elif kind == "average":
            window, step, padding = r.choice((2, 3, (3, 2))), r.randint(1, 3), r.choice((0, 1))
            self.add(nn.AvgPool2d(window, step, padding, r.random() < 0.5, r.random() < 0.5), k)
        elif kind == "adaptive":
            self.add(nn.AdaptiveAvgPool2d((r.randint(1, 4), r.randint(1, 4))), k)
        elif kind == "norm":
            self.add(nn.BatchNorm2d(c), k)
        elif kind == "act":
            self.add(r.choice(ACTIVATIONS)(), k)
        elif kind in ("add", "multiply"):
            function: Callable[..., Tensor] = torch.add if kind == "add" else torch.mul
            self.add(Call(function, kind), k, r.randrange(len(values)))
        elif kind == "concatenate":
            self.add(Call(lambda *xs: torch.cat(xs, 1), kind), k, r.randrange(len(values)))
        elif kind == "section":
            start = r.randint(0, c - 1)
            self.add(Call(lambda x: x[:, start:, :, 1:], f"{kind} {start}"), k)
        elif kind == "pad":
            self.add(nn.ConstantPad2d([r.randint(-1, 2) for _ in range(4)], r.choice((0.0, 0.5))), k)
        elif kind == "resize":
            options: dict[str, Any] = r.choice(
                ({"mode": "nearest"}, {"mode": "bilinear", "align_corners": r.random() < 0.5})
            )
            options |= r.choice(({"scale_factor": 2}, {"size": (r.randint(1, 9), r.randint(1, 9))}))
            self.add(Call(lambda x: F.interpolate(x, **options), f"{kind} {options}"), k)
        elif kind == "excite":
            squeezed = self.add(nn.Conv2d(c, 2, 1), self.add(nn.AdaptiveAvgPool2d(1), k))
            gate = self.add(nn.Sigmoid(), self.add(nn.Conv2d(2, c, 1), self.add(nn.ReLU(), squeezed)))
            self.add(Call(torch.mul, kind), k, gate)
        elif kind == "scale":
            self.add(Scale(r.choice(((c, 1, 1), (1,), (h, w)))), k)
        elif kind == "shared":
            first = self.add(nn.Conv2d(c, c, 3, padding=1), k)
            self.steps.append((self.steps[-1][0], (self.add(nn.Tanh(), first),)))
        elif kind == "turn":
            axes = r.sample((1, 2, 3), 3)
            self.add(Call(lambda x: x.permute(0, *axes), f"{kind} {axes}"), k)
        elif kind == "divide":
            around = r.choice(((1,), (2, 3), (1, 3)))
            wide = self.add(nn.Conv2d(c, c, 1), k)
            self.add(Call(lambda x, y: x / (y.abs().mean(around, keepdim=True) + 1), f"{kind} {around}"), k, wide)
        elif kind == "center":
            around = r.choice(((1,), (2, 3), (1, 2, 3), (-1,)))
            self.add(Call(lambda x: x - x.mean(around, keepdim=True), f"{kind} {around}"), k)
        elif kind == "gate":
            axis = r.choice((1, 2, -1))
            self.add(Call(lambda x: x * x.softmax(axis) - x.log_softmax(axis), f"{kind} {axis}"), k)
        elif kind == "line":
            groups, options = r.choice((1, c)), {"padding": r.randint(0, 2), "dilation": r.randint(1, 2)}
            line = self.add(
                nn.Conv1d(c, 2 * groups, 3, stride[0], groups=groups, **options), self.add(nn.Flatten(2), k)
            )
            self.add(Call(lambda x: x.unsqueeze(2), kind), line)
        elif kind == "constant":
            ones = torch.ones(1, 1, h, w)
            self.add(Call(lambda x: torch.cat((x.clamp(-0.5, 0.5), ones, x), 1), kind), k)
        else:
            wide = self.add(nn.ReLU(), self.add(nn.Conv2d(c, 4, 1), k))
            deep = self.add(nn.ReLU6(), self.add(nn.Conv2d(4, 4, 3, padding=1, groups=4), wide))
            self.add(Call(torch.add, "residual"), k, self.add(nn.Conv2d(4, c, 1), deep))


def draw_scheme(graph: Graph, seed: int, classes: int) -> dict[str, Any]:
    """A scheme for the simplified graph: whole layers, parts of input channels, biases; any loss."""
    r = random.Random(seed)
    name = r.choice(("cross_entropy", "cross_entropy", "mse", "l1", "huber", "bce_with_logits"))
    loss: dict[str, Any] = {"name": name, "reduction": r.choice(("mean", "sum"))}
    if name == "cross_entropy" and r.random() < 0.5:
        loss |= {"label_smoothing": 0.1, "class_weights": [round(r.uniform(0.1, 2), 2) for _ in range(classes)]}
    scheme: dict[str, Any] = {"loss": loss, "optimizer": {"lr": 0.02}, "train": "full"}
    if r.random() < 0.3:
        scheme["optimizer"]["clip_loss_grad"] = 0.1
    rules: list[dict[str, Any]] = []
    for layer in find_layers(graph):
        rule: dict[str, Any] = {"layer": layer.name}
        if layer.weight and r.random() < 0.8:
            rule["weight"] = "all"
            if layer.axis is not None and layer.channels > 1 and r.random() < 0.7:
                channels = r.sample(range(layer.channels), r.randint(1, layer.channels - 1))
                rule["weight"] = r.choice(({"in_channels": len(channels), "select": "l2"}, {"select": channels}))
        if layer.bias and r.random() < 0.7:
            rule["bias"] = True
        rules += [rule] if len(rule) > 1 else []
    return scheme | ({"train": rules} if rules and r.random() < 0.7 else {})
