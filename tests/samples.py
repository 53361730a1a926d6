"""One row and more for every operator; tests/test_ops.py and tests/test_kernels.py walk this table.

A row says how to make operands and how PyTorch computes the same, in our layouts. It feeds: type rule against
reference, reference against PyTorch, gradient rule against torch.autograd and finite differences, generated C against
reference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tte.ops  # noqa: F401  fills the table
from tte.ir import OPS
from tte.ops.loss import exponentials

Tensor = torch.Tensor


@dataclass(frozen=True)
class Operand:
    """How to draw one. kind: normal, wide (normal * 4), positive, scale, bits, label (0 <= n < high), integers."""

    shape: tuple[int, ...]
    kind: str = "normal"
    high: int = 0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        if self.kind == "bits":
            return rng.random(self.shape) > 0.5
        if self.kind == "label":
            return rng.integers(0, self.high, self.shape).astype(np.int32)
        if self.kind == "index":
            return rng.integers(0, self.high, self.shape).astype(np.uint8)
        if self.kind == "integer":
            return rng.integers(-9, 10, self.shape).astype(np.int32)
        if self.kind in ("int8", "uint8", "int16"):
            limits = np.iinfo(self.kind)
            return rng.integers(limits.min, limits.max + 1, self.shape).astype(self.kind)
        if self.kind == "int32":  # accumulators and biases, a few of them huge
            return (rng.integers(-(2**15), 2**15, self.shape) << rng.choice([0, 0, 0, 15], self.shape)).astype(np.int32)
        if self.kind == "fraction":  # multipliers as integers with 32 bits of fraction
            return rng.integers(2**20, 2**30, self.shape).astype(np.int32)
        if self.kind == "exponent":
            return rng.integers(-10, 3, self.shape).astype(np.int32)
        if self.kind == "unit":  # as many 2^-20
            return np.asarray(rng.integers(2**21, 2**24) * 2.0**-20, np.float32)
        if self.kind == "exponentials":
            return exponentials(self.high / 64)
        if self.kind in ("inf", "nan"):
            return np.asarray(self.kind, np.float32)
        if self.kind == "holed":  # NaN among numbers
            return np.where(rng.random(self.shape) > 0.8, np.nan, rng.standard_normal(self.shape)).astype(np.float32)
        if self.kind == "scale":
            return np.asarray(rng.random(self.shape) * 0.01 + 1e-4, np.float32)
        normal = rng.standard_normal(self.shape)
        scaled = {"normal": normal, "wide": 4 * normal, "positive": np.abs(normal) + 0.1}[self.kind]
        return np.asarray(scaled, np.float32)


@dataclass(frozen=True)
class Sample:
    """operator(operands, attributes) == torch(*operands) in our layouts."""

    op: str
    operands: tuple[Operand, ...]
    torch: Callable[..., Tensor]
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        shapes = "-".join("x".join(map(str, o.shape)) or "scalar" for o in self.operands)
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items())
        return f"{self.op}[{shapes}]{attrs}".replace(" ", "")

    def draw(self, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [operand.draw(rng) for operand in self.operands]

    @property
    def complete_attrs(self) -> dict[str, Any]:
        return OPS[self.op].complete(self.attrs)


SAMPLES: list[Sample] = []


def add(op: str, *operands: tuple[int, ...] | Operand, torch: Callable[..., Tensor], **attrs: Any) -> None:
    made = tuple(o if isinstance(o, Operand) else Operand(o) for o in operands)
    SAMPLES.append(Sample(op, made, torch, attrs))


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def input_gradient(f: Callable[..., Tensor], shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """g, rest -> the gradient of f(x, rest) at x = 0 in direction g; for f linear in x."""

    def gradient(g: Tensor, *rest: Tensor) -> Tensor:
        x = torch.zeros(shape, dtype=g.dtype, requires_grad=True)
        return torch.autograd.grad(f(x, *rest), x, g)[0]

    return gradient


def derivative(f: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """g, x -> g * f'(x)"""

    def gradient(g: Tensor, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x, g)[0]

    return gradient


# --- convolutions ----------------------------------------------------------------------------------------------------


def conv(padding=(0, 0, 0, 0), strides=(1, 1), dilation=(1, 1), groups=1):  # type: ignore[no-untyped-def]
    top, left, bottom, right = padding

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        padded = F.pad(nchw(x), (left, right, top, bottom))
        return nhwc(F.conv2d(padded, w.permute(0, 3, 1, 2), b, strides, 0, dilation, groups))

    return run


def conv_transpose(padding=(0, 0, 0, 0), strides=(1, 1), dilation=(1, 1), groups=1, output_padding=(0, 0)):  # type: ignore[no-untyped-def]
    """From PyTorch's without padding: cut the padding off, add what output_padding adds (zeros: no tap reaches it)."""
    top, left, bottom, right = padding

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.conv_transpose2d(nchw(x), w.permute(0, 3, 1, 2), None, strides, 0, 0, groups, dilation)
        rows = y.shape[2] - top - bottom + output_padding[0]
        columns = y.shape[3] - left - right + output_padding[1]
        y = F.pad(y, (0, max(0, left + columns - y.shape[3]), 0, max(0, top + rows - y.shape[2])))
        y = nhwc(y[:, :, top : top + rows, left : left + columns])
        return y if b is None else y + b

    return run


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 5, 7, 3), (4, 3, 3, 3), {}),
    ((1, 5, 7, 3), (8, 3, 3, 3), {"padding": (1, 1, 1, 1)}),
    ((1, 9, 8, 4), (5, 3, 2, 4), {"padding": (0, 1, 2, 1), "strides": (2, 1), "dilation": (1, 2)}),
    ((1, 8, 8, 3), (8, 3, 3, 3), {"padding": (0, 0, 1, 1), "strides": (2, 2)}),
    ((1, 6, 6, 4), (6, 3, 1, 2), {"groups": 2, "padding": (1, 0, 1, 0)}),
    ((1, 7, 6, 4), (4, 3, 3, 1), {"groups": 4, "padding": (1, 1, 1, 1), "strides": (2, 2)}),
    ((1, 6, 5, 3), (6, 3, 3, 1), {"groups": 3, "padding": (1, 2, 1, 0)}),
    ((1, 4, 4, 8), (16, 1, 1, 8), {}),
    ((1, 5, 5, 3), (7, 1, 1, 3), {"strides": (2, 2)}),
    ((1, 7, 7, 2), (2, 2, 2, 2), {"strides": (3, 3)}),
    ((1, 3, 4, 2), (5, 3, 4, 2), {}),
    ((1, 1, 12, 4), (6, 1, 5, 4), {"padding": (0, 2, 0, 2), "strides": (1, 2)}),
    ((1, 1, 1, 5), (3, 1, 1, 5), {}),
]
for x_shape, w_shape, attrs in CONVOLUTIONS:
    add("nn.conv2d", x_shape, w_shape, torch=conv(**attrs), **attrs)
    add("nn.conv2d", x_shape, w_shape, (w_shape[0],), torch=conv(**attrs), **attrs)
    y_shape = tuple(conv(**attrs)(torch.zeros(x_shape), torch.zeros(w_shape)).shape)

    def weight_gradient(x: Tensor, g: Tensor, attrs=attrs, shape=w_shape) -> Tensor:  # type: ignore[no-untyped-def]
        return input_gradient(lambda w, x: conv(**attrs)(x, w), shape)(g, x)

    add("nn.conv2d_weight_grad", x_shape, y_shape, torch=weight_gradient, kernel_size=w_shape[1:3], **attrs)
for x_shape, y_shape, attrs in (
    ((1, 6, 5, 2), (1, 6, 5, 4), {"groups": 2, "padding": (1, 1, 1, 1), "out_channels": 2}),
    ((1, 6, 5, 3), (1, 4, 3, 5), {"out_channels": 3}),
):

    def first_channels(x: Tensor, g: Tensor, attrs=attrs) -> Tensor:  # type: ignore[no-untyped-def]
        count, rest = attrs["out_channels"], {k: v for k, v in attrs.items() if k != "out_channels"}
        shape = (count, 3, 3, x.shape[3] // rest.get("groups", 1))
        return input_gradient(lambda w, x: conv(**rest)(x, w), shape)(g[..., :count], x)

    add("nn.conv2d_weight_grad", x_shape, y_shape, torch=first_channels, kernel_size=(3, 3), **attrs)

TRANSPOSED: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 5, 7, 3), (3, 3, 3, 4), {}),
    ((1, 4, 3, 8), (8, 3, 3, 8), {"padding": (1, 1, 1, 1), "strides": (2, 2), "output_padding": (1, 0)}),
    ((1, 5, 6, 4), (4, 3, 2, 5), {"padding": (0, 1, 2, 1), "dilation": (1, 2), "strides": (2, 1)}),
    ((1, 4, 4, 4), (4, 3, 1, 3), {"groups": 2, "strides": (2, 2)}),
    ((1, 4, 3, 4), (4, 3, 3, 2), {"groups": 4, "padding": (1, 1, 1, 1), "strides": (2, 2)}),
    ((1, 4, 3, 4), (4, 3, 3, 1), {"groups": 4, "padding": (1, 0, 1, 2)}),
    ((1, 4, 4, 6), (6, 3, 3, 1), {"groups": 3}),
    ((1, 3, 3, 2), (2, 1, 1, 2), {"strides": (3, 3), "output_padding": (2, 1)}),
]
for x_shape, w_shape, attrs in TRANSPOSED:
    add("nn.conv2d_transpose", x_shape, w_shape, torch=conv_transpose(**attrs), **attrs)
    bias = (w_shape[3] * attrs.get("groups", 1),)
    add("nn.conv2d_transpose", x_shape, w_shape, bias, torch=conv_transpose(**attrs), **attrs)
    whole = tuple(conv_transpose(**attrs)(torch.zeros(x_shape), torch.zeros(w_shape)).shape)

    def begun(x: Tensor, w: Tensor, b: Tensor, attrs=attrs) -> Tensor:  # type: ignore[no-untyped-def]
        return b + conv_transpose(**attrs)(x, w)

    add("nn.conv2d_transpose", x_shape, w_shape, whole, torch=begun, **attrs)

# --- matrix products -------------------------------------------------------------------------------------------------

for x_shape, features in (((1, 7), 5), ((3, 8), 16), ((2, 3, 8), 3), ((5,), 4)):
    add("nn.dense", x_shape, (features, x_shape[-1]), torch=F.linear)
    add("nn.dense", x_shape, (features, x_shape[-1]), (features,), torch=F.linear)
for ta in (False, True):
    for tb in (False, True):
        for lead in ((), (2,)):
            a_shape, b_shape = ((6, 5) if ta else (5, 6)), ((8, 6) if tb else (6, 8))
            for b_lead in {(), lead}:

                def product(a: Tensor, b: Tensor, ta=ta, tb=tb) -> Tensor:  # type: ignore[no-untyped-def]
                    return (a.mT if ta else a) @ (b.mT if tb else b)

                add("matmul", (*lead, *a_shape), (*b_lead, *b_shape), torch=product, transpose_a=ta, transpose_b=tb)

# --- elementwise -----------------------------------------------------------------------------------------------------

UNARY: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "negative": ("normal", torch.neg),
    "exp": ("normal", torch.exp),
    "log": ("positive", torch.log),
    "sqrt": ("positive", torch.sqrt),
    "rsqrt": ("positive", torch.rsqrt),
    "abs": ("normal", torch.abs),
    "sign": ("normal", torch.sign),
    "nn.relu": ("normal", F.relu),
    "nn.hard_sigmoid": ("wide", F.hardsigmoid),
    "nn.hard_swish": ("wide", F.hardswish),
    "sigmoid": ("wide", torch.sigmoid),
    "tanh": ("wide", torch.tanh),
    "nn.silu": ("wide", F.silu),
    "nn.gelu": ("wide", F.gelu),
    "nn.softplus": ("wide", F.softplus),
    "nn.leaky_relu": ("normal", F.leaky_relu),
    "clip": ("normal", torch.clone),
}
for name, (kind, function) in UNARY.items():
    for shape in ((1, 3, 5, 4), (), (17,)):
        add(name, Operand(shape, kind), torch=function)
add("clip", Operand((4, 5), "wide"), torch=F.relu6, min=0.0, max=6.0)
add("clip", (4, 5), torch=lambda x: torch.clamp(x, max=0.5), max=0.5)
add("clip", (4, 5), torch=lambda x: torch.clamp(x, min=-0.5), min=-0.5)
add("clip", (4, 5), torch=lambda x: torch.clamp(x, -0.5, 0.7), min=-0.5, max=0.7, inclusive=True)
add("nn.leaky_relu", (4, 5), torch=lambda x: F.leaky_relu(x, 0.2), alpha=0.2)
add("nn.gelu", Operand((3, 9), "wide"), torch=lambda x: F.gelu(x, approximate="tanh"), approximate="tanh")
add("nn.softplus", Operand((40,), "wide"), torch=lambda x: F.softplus(x, 2.0, 3.0), beta=2.0, threshold=3.0)
add("cast", Operand((5,), "integer"), torch=lambda x: x.float(), dtype="float32")
add("cast", Operand((5, 3), "wide"), torch=lambda x: x.int(), dtype="int32")
add("nn.mask", (3, 7), torch=lambda x: x > 0, lower=0.0)
add("nn.mask", (16,), torch=lambda x: (x > -0.5) & (x < 0.5), lower=-0.5, upper=0.5)
add("nn.mask", (1, 2, 2, 3), torch=lambda x: x < 0.5, upper=0.5)
add("nn.apply_mask", (3, 7), Operand((3, 7), "bits"), torch=lambda g, m: torch.where(m, g, 0))
add("nn.apply_mask", (3, 7), Operand((3, 7), "bits"), torch=lambda g, m: torch.where(m, g, 0.1 * g), alpha=0.1)

DERIVATIVES: dict[str, Callable[..., Tensor]] = {
    "nn.sigmoid_grad": lambda g, y: g * y * (1 - y),
    "tanh_grad": lambda g, y: g * (1 - y * y),
    "nn.hard_swish_grad": derivative(F.hardswish),
    "nn.silu_grad": derivative(F.silu),
    "nn.softplus_grad": derivative(F.softplus),
    "nn.gelu_grad": derivative(F.gelu),
}
for name, function in DERIVATIVES.items():
    add(name, (4, 9), Operand((4, 9), "wide"), torch=function)
add(
    "nn.gelu_grad",
    (4, 9),
    Operand((4, 9), "wide"),
    torch=derivative(lambda x: F.gelu(x, approximate="tanh")),
    approximate="tanh",
)
BROADCASTS = [
    ((1, 3, 4, 5), (1, 3, 4, 5)),
    ((1, 3, 4, 5), (5,)),
    ((5,), (1, 3, 4, 5)),
    ((1, 3, 4, 1), (1, 1, 4, 5)),
    ((4, 1), (3,)),
    ((), (3,)),
    ((2, 3), ()),
    ((2, 1, 3), (4, 1)),
]
for name, function in (("add", torch.add), ("subtract", torch.sub), ("multiply", torch.mul), ("divide", torch.div)):
    for a_shape, b_shape in BROADCASTS:
        add(name, a_shape, Operand(b_shape, "positive" if name == "divide" else "normal"), torch=function)

# --- pooling and resizing --------------------------------------------------------------------------------------------


def max_pool(pool_size, strides=(1, 1), padding=(0, 0, 0, 0)):  # type: ignore[no-untyped-def]
    top, left, bottom, right = padding

    def run(x: Tensor) -> Tensor:
        padded = F.pad(nchw(x), (left, right, top, bottom), value=-math.inf)
        return nhwc(F.max_pool2d(padded, pool_size, strides))

    return run


def max_index(pool_size, strides=(1, 1), padding=(0, 0, 0, 0)):  # type: ignore[no-untyped-def]
    top, left, bottom, right = padding

    def run(x: Tensor) -> Tensor:
        padded = F.pad(nchw(x), (left, right, top, bottom), value=-math.inf)
        _, flat = F.max_pool2d(padded, pool_size, strides, return_indices=True)
        width = padded.shape[3]
        rows = torch.arange(flat.shape[2]).view(-1, 1) * strides[0]
        columns = torch.arange(flat.shape[3]) * strides[1]
        return nhwc((flat // width - rows) * pool_size[1] + flat % width - columns).to(torch.uint8)

    return run


def added_up(f: Callable[..., Tensor], window: dict[str, Any]) -> Callable[..., Tensor]:
    """As f computes of float64, in integers: wider ones where windows overlap."""
    overlap = any(size > stride for size, stride in zip(window["pool_size"], window["strides"], strict=True))
    return lambda g, *rest: f(g.double(), *rest).round().to(torch.int16 if overlap else torch.int8)


def max_scatter(pool_size, input_size, strides=(1, 1), padding=(0, 0, 0, 0)):  # type: ignore[no-untyped-def]
    def run(g: Tensor, index: Tensor) -> Tensor:
        y = torch.zeros((1, input_size[0] + 99, input_size[1] + 99, g.shape[3]), dtype=g.dtype)
        for _, i, j, c in np.ndindex(*g.shape):
            at = int(index[0, i, j, c])
            y[0, i * strides[0] + at // pool_size[1], j * strides[1] + at % pool_size[1], c] += g[0, i, j, c]
        return y[:, padding[0] : padding[0] + input_size[0], padding[1] : padding[1] + input_size[1]]

    return run


def avg_pool(pool_size, strides=(1, 1), padding=(0, 0, 0, 0), count_include_pad=False):  # type: ignore[no-untyped-def]
    top, left, bottom, right = padding

    def run(x: Tensor) -> Tensor:
        pads = (left, right, top, bottom)
        total = F.avg_pool2d(F.pad(nchw(x), pads), pool_size, strides)
        if not count_include_pad:
            inside = F.pad(torch.ones_like(nchw(x)), pads)
            total = total / F.avg_pool2d(inside, pool_size, strides)
        return nhwc(total)

    return run


for window in (
    {"pool_size": (2, 2), "strides": (2, 2)},
    {"pool_size": (3, 2), "strides": (2, 1), "padding": (1, 1, 1, 0)},
    {"pool_size": (3, 3), "strides": (2, 2), "padding": (0, 0, 1, 1)},
):
    x_shape = (1, 7, 6, 3)
    y_shape = tuple(max_pool(**window)(torch.zeros(x_shape)).shape)
    add("nn.max_pool2d", x_shape, torch=max_pool(**window), **window)
    add("nn.max_pool2d_argmax", x_shape, torch=max_index(**window), **window)
    # Index 0 may point into the padding; the last element of a window that begins inside never does.
    padding = window.get("padding", (0, 0, 0, 0))
    if not any(padding):
        high = window["pool_size"][0] * window["pool_size"][1]
        add(
            "nn.max_pool2d_grad",
            y_shape,
            Operand(y_shape, "index", high),
            torch=max_scatter(input_size=(7, 6), **window),
            input_size=(7, 6),
            **window,
        )
        add("nn.max_pool2d_grad", Operand(y_shape, "int8"), Operand(y_shape, "index", high),
            torch=added_up(max_scatter(input_size=(7, 6), **window), window), input_size=(7, 6), **window)  # fmt: skip
    share, n = input_gradient(avg_pool(**window, count_include_pad=True), x_shape), math.prod(window["pool_size"])
    add("qnn.sum_pool2d_grad", Operand(y_shape, "int8"), input_size=(7, 6),
        torch=added_up(lambda g, share=share, n=n: share(g) * n, window), **window)  # fmt: skip
    for include in (False, True):
        run = avg_pool(**window, count_include_pad=include)
        add("nn.avg_pool2d", x_shape, torch=run, **window, count_include_pad=include)
        gradient = input_gradient(run, x_shape)
        add("nn.avg_pool2d_grad", y_shape, torch=gradient, **window, count_include_pad=include, input_size=(7, 6))
for size in ((3, 2), (1, 1), (7, 5), (5, 4)):

    def adaptive(x: Tensor, size=size) -> Tensor:  # type: ignore[no-untyped-def]
        return nhwc(F.adaptive_avg_pool2d(nchw(x), size))

    add("nn.adaptive_avg_pool2d", (1, 7, 5, 3), torch=adaptive, output_size=size)
    gradient = input_gradient(adaptive, (1, 7, 5, 3))
    add("nn.adaptive_avg_pool2d_grad", (1, *size, 3), torch=gradient, input_size=(7, 5))
RESIZES: list[tuple[str, str, dict[str, Any]]] = [
    ("nearest", "asymmetric", {"mode": "nearest"}),
    ("linear", "half_pixel", {"mode": "bilinear", "align_corners": False}),
    ("linear", "align_corners", {"mode": "bilinear", "align_corners": True}),
]
for method, coordinate, options in RESIZES:
    for small, large in (((3, 4), (6, 8)), ((3, 4), (5, 7)), ((4, 4), (2, 3)), ((1, 3), (4, 1))):

        def resize(x: Tensor, size=large, options=options) -> Tensor:  # type: ignore[no-untyped-def]
            return nhwc(F.interpolate(nchw(x), size, **options))

        add("nn.resize2d", (1, *small, 2), torch=resize, size=large, method=method, coordinate=coordinate)
        gradient = input_gradient(resize, (1, *small, 2))
        add(
            "nn.resize2d_grad",
            (1, *large, 2),
            torch=gradient,
            input_size=small,
            method=method,
            coordinate=coordinate,
        )

# --- shapes ----------------------------------------------------------------------------------------------------------

add("source", (1, 4, 3, 2), torch=lambda x: x)
add("reshape", (2, 6), torch=lambda x: x.reshape(3, 4), newshape=(3, 4))
add("reshape", (1, 2, 3, 2), torch=lambda x: x.flatten(), newshape=(12,))
add("transpose", (1, 3, 4, 5), torch=lambda x: x.permute(0, 3, 1, 2), axes=(0, 3, 1, 2))
add("transpose", (4, 3), torch=torch.t, axes=(1, 0))
add("concatenate", (1, 2, 3), (1, 4, 3), torch=lambda *xs: torch.cat(xs, 1), axis=1)
add("concatenate", (1, 2, 3), (1, 2, 5), (1, 2, 1), torch=lambda *xs: torch.cat(xs, 2), axis=2)
add("slice", (1, 5, 6), torch=lambda x: x[:, 1:, 1:6:3], begin=(0, 1, 1), end=(1, 5, 6), strides=(1, 1, 3))
add("slice", (7,), torch=lambda x: x[::2], begin=(0,), end=(7,), strides=(2,))
add("pad", (2, 3), torch=lambda x: F.pad(x, (0, 2, 1, 0), value=1.5), pad_width=((1, 0, 0), (0, 2, 0)), value=1.5)


def spread(x: Tensor) -> Tensor:
    y = torch.zeros((4, 7), dtype=x.dtype)
    y[1:4:2, 0:7:3] = x
    return y


add("pad", (2, 3), torch=spread, pad_width=((1, 0, 1), (0, 0, 2)))
add("broadcast_to", (3, 1), torch=lambda x: x.expand(2, 3, 4), shape=(2, 3, 4))
add("broadcast_to", (1, 1, 1, 3), torch=lambda x: x.expand(1, 4, 5, 3), shape=(1, 4, 5, 3))
add("take", (2, 4, 3), torch=lambda x: x[:, [2, 0, 3, 1]], axis=1, indices=(2, 0, 3, 1))
for axis, indices in ((1, (2, 0)), (2, (0, 1, 1, 2)), (0, (1, 1, 1))):

    def pick(x: Tensor, axis=axis, indices=indices) -> Tensor:  # type: ignore[no-untyped-def]
        return x.index_select(axis, torch.tensor(indices))

    add("take", (2, 4, 3), torch=pick, axis=axis, indices=indices)
    picked = [len(indices) if d == axis else n for d, n in enumerate((2, 4, 3))]
    gradient = input_gradient(pick, (2, 4, 3))
    add("take_grad", tuple(picked), torch=gradient, axis=axis, indices=indices, size=(2, 4, 3)[axis])
for axis, order in ((2, (2, 0, 1)), (1, (1, 0, 3, 2)), (0, (0, 1))):
    add(
        "permute",
        (2, 4, 3),
        torch=lambda x, a=axis, o=order: x.index_select(a, torch.tensor(o)),
        axis=axis,
        order=order,
    )
add("take", (40000,), torch=lambda x: x[[39999, 7]], axis=0, indices=(39999, 7))

# --- reductions, normalisation ---------------------------------------------------------------------------------------

for name, function in (("sum", torch.sum), ("mean", torch.mean)):
    for shape, axis, keepdims in (
        ((1, 4, 5, 3), (0, 1, 2), False),
        ((1, 4, 5, 3), (1, 2), True),
        ((1, 4, 5, 3), (1, 2), False),
        ((2, 4, 5), (1,), False),
        ((2, 4, 5), (0, 2), True),
        ((4,), (0,), False),
    ):

        def reduce(x: Tensor, function=function, axis=axis, keepdims=keepdims) -> Tensor:  # type: ignore[no-untyped-def]
            return function(x, axis, keepdims)

        add(name, shape, torch=reduce, axis=axis, keepdims=keepdims)
for shape in ((3, 5), (7,), (1, 2, 2, 4)):
    add("nn.softmax", Operand(shape, "wide"), torch=lambda x: torch.softmax(x, -1))
    add("nn.log_softmax", Operand(shape, "wide"), torch=lambda x: torch.log_softmax(x, -1))
    add("nn.softmax_grad", shape, shape, torch=lambda g, y: y * (g - (g * y).sum(-1, True)))
    add("nn.log_softmax_grad", shape, shape, torch=lambda g, y: g - y.exp() * g.sum(-1, True))


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return nhwc(F.batch_norm(nchw(x), mean, var, gamma, beta, False, 0.0, 1e-3))


add("nn.batch_norm", (1, 3, 4, 5), (5,), (5,), (5,), Operand((5,), "positive"), torch=batch_norm, epsilon=1e-3)

# --- losses and updates ----------------------------------------------------------------------------------------------


def cross_entropy(**options: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return F.cross_entropy(flat, label.reshape(-1).long(), weight, **options)

    return run


def gradient_of_first(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *rest: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x, *rest), x)[0]

    return run


for reduction in ("mean", "sum"):
    for rows in ((1,), (3,), (2, 2)):
        for smoothing in (0.0, 0.1):
            for weights in ((), (Operand((5,), "positive"),)):
                run = cross_entropy(reduction=reduction, label_smoothing=smoothing)
                operands = (Operand((*rows, 5), "wide"), Operand(rows, "label", 5), *weights)
                attrs = {"reduction": reduction, "label_smoothing": smoothing}
                add("nn.cross_entropy", *operands, torch=run, **attrs)
                add("nn.cross_entropy_grad", *operands, torch=gradient_of_first(run), **attrs)
    pointwise: list[tuple[str, Callable[..., Tensor], dict[str, Any]]] = [
        ("nn.mse", F.mse_loss, {}),
        ("nn.l1", F.l1_loss, {}),
        ("nn.huber", F.huber_loss, {"delta": 0.7}),
        ("nn.bce_with_logits", F.binary_cross_entropy_with_logits, {}),
    ]
    for name, function, extra in pointwise:
        for shape in ((3, 4), (1, 2, 3, 2)):

            def loss(x: Tensor, t: Tensor, function=function, extra=extra, reduction=reduction) -> Tensor:  # type: ignore[no-untyped-def]
                return function(x, t, **extra, reduction=reduction)

            add(name, shape, shape, torch=loss, **extra, reduction=reduction)
            add(f"{name}_grad", shape, shape, torch=gradient_of_first(loss), **extra, reduction=reduction)
for shape in ((3, 4), (2, 3, 3, 5)):
    add("nn.sgd", shape, shape, (), torch=lambda w, g, rate: w - rate * g)


# --- integers: a float operator on q - zero_point, then rounding; only "mask" changes how many results there are ----


def counted(f: Callable[..., Tensor], zero_point: int = 0) -> Callable[..., Tensor]:
    """The float operator on what the integers stand for: x - zero_point, w (int16: w / 256 rounded down), b."""

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        w = torch.floor(w.double() / 256) if w.dtype == torch.int16 else w.double()
        return f(x.double() - zero_point, w, None if b is None else b.double()).to(torch.int32)

    return run


def numbers(f: Callable[..., Tensor], k: int, zero_point: int = 0) -> Callable[..., Tensor]:
    """A float operator of which operand k is stored integers."""

    def run(*operands: Tensor) -> Tensor:
        wide = list(operands)
        whole = torch.floor(wide[k].double() / 256) if wide[k].dtype == torch.int16 else wide[k].double()
        wide[k] = whole - zero_point
        return f(*wide)

    return run


def rounded(v: Tensor, zero_point: int, low: int = -128, high: int = 127) -> Tensor:
    return (torch.round(v) + zero_point).clamp(low, high).to(torch.int8)


INT8, INT16, INT32 = "int8", "int16", "int32"
for x_shape, w_shape, attrs in CONVOLUTIONS:
    for kind in (INT8, INT16):
        operands = (Operand(x_shape, INT8), Operand(w_shape, kind), Operand(w_shape[:1], INT32))
        add("qnn.conv2d", *operands, torch=counted(conv(**attrs), -5), zero_point=-5, **attrs)
    y_shape = tuple(conv(**attrs)(torch.zeros(x_shape), torch.zeros(w_shape)).shape)

    def weight_gradient(x: Tensor, g: Tensor, attrs=attrs, shape=w_shape) -> Tensor:  # type: ignore[no-untyped-def]
        return input_gradient(lambda w, x: conv(**attrs)(x, w), shape)(g, x)

    add("nn.conv2d_weight_grad", Operand(x_shape, INT8), y_shape, torch=numbers(weight_gradient, 0, 7),
        kernel_size=w_shape[1:3], zero_point=7, **attrs)  # fmt: skip
for kind, (x_shape, w_shape, attrs) in zip((INT8, INT16) * 9, TRANSPOSED, strict=False):
    add("nn.conv2d_transpose", x_shape, Operand(w_shape, kind), torch=numbers(conv_transpose(**attrs), 1), **attrs)
add("qnn.dense", Operand((1, 7), INT8), Operand((5, 7), INT8), Operand((5,), INT32),
    torch=counted(F.linear, 11), zero_point=11)  # fmt: skip
add("qnn.dense", Operand((2, 8), INT8), Operand((4, 8), INT16), torch=counted(F.linear))
add("matmul", (2, 5), Operand((5, 8), INT8), torch=numbers(torch.matmul, 1, -4), zero_point=-4)
add("matmul", (2, 5), Operand((5, 8), INT16), torch=numbers(torch.matmul, 1))
window = {"pool_size": (3, 2), "strides": (2, 2), "padding": (1, 0, 1, 0)}
add(
    "nn.max_pool2d",
    Operand((1, 5, 6, 3), INT8),
    torch=lambda x: max_pool(**window)(x.double()).to(torch.int8),
    **window,
)
add("nn.max_pool2d_argmax", Operand((1, 5, 6, 3), INT8), torch=lambda x: max_index(**window)(x.double()), **window)
add("qnn.sum_pool2d", Operand((1, 5, 6, 3), INT8), torch=lambda x: (6 * avg_pool(**window, count_include_pad=True)(
    x.double() + 3)).round().to(torch.int32), zero_point=-3, **window)  # fmt: skip
add("qnn.sum", Operand((1, 4, 5, 3), INT8), torch=lambda x: (x.int() - 9).sum((1, 2), dtype=torch.int32), axis=(1, 2),
    zero_point=9)  # fmt: skip
add("qnn.quantize", Operand((3, 50), "wide"), torch=lambda x: rounded(x.float() / 0.05, 3), scale=0.05, zero_point=3)
add("qnn.quantize", Operand((3, 50), "wide"), torch=lambda x: rounded(x.float() / 0.02, -128, -128, 60), scale=0.02,
    zero_point=-128, high=60)  # fmt: skip
add("qnn.round", Operand((3, 50), "wide"), torch=lambda w: rounded(w, 0))
for kind in (INT8, "uint8"):
    add("qnn.affine", Operand((4, 9, 3), kind), Operand((3,), "integer"), Operand((4, 1, 1), "integer"), bits=3,
        torch=lambda x, m, b: (torch.floor((x.double() * m + b) / 8 + 0.5) + 5).clamp(-99, 90).to(torch.int8),
        scale=0.1, zero_point=5, low=-99, high=90)  # fmt: skip
add("qnn.dequantize", Operand((3, 50), INT8), torch=lambda q: (q.double() + 7) * 0.05, scale=0.05, zero_point=-7)
for channels in (1, 6):
    add("qnn.requantize", Operand((1, 9, 6), INT32), Operand((channels,), "scale"), torch=lambda acc, m: rounded(
        acc.float() * m.float(), -4, -100, 90), scale=0.1, zero_point=-4, low=-100, high=90)  # fmt: skip
    add("qnn.requantize", Operand((1, 9, 6), INT32), Operand((channels,), "fraction"), torch=lambda acc, m: (
        ((acc.long() * 2 * m.long() + 2**31) >> 32) + 5).clamp(-128, 127).to(torch.int8), scale=0.1, zero_point=5,
        shift=1)  # fmt: skip


def tflite_round(acc: Tensor, multiplier: Tensor, exponent: Tensor) -> Tensor:
    """Round at bit 31, halves up; then at the exponent's bit, halves away from zero: with floor of doubles."""
    left, right = 2.0 ** exponent.clamp(min=0), 2.0 ** (-exponent).clamp(min=0)
    high = torch.floor(acc.double() * left * multiplier.double() / 2**31 + 0.5)
    return high.sign() * torch.floor(high.abs() / right + 0.5)


add("qnn.requantize", Operand((1, 9, 6), INT32), Operand((6,), "fraction"), torch=lambda acc, m: (
    ((acc.long() * m.long() + 2**34) >> 35) + 5).clamp(-128, 127).to(torch.int8), scale=0.1, zero_point=5,
    shift=-3)  # fmt: skip
add("qnn.requantize", Operand((1, 9, 6), INT32), Operand((1,), "fraction"), torch=lambda acc, m: rounded(
    acc.sign() * torch.floor(acc.abs().double() * m.double() / 2**32 + 0.5), 0), scale=0.1, zero_point=5,
    average=True)  # fmt: skip
add("qnn.requantize", Operand((1, 9, 6), INT32), Operand((6,), "fraction"), Operand((6,), "exponent"),
    torch=lambda acc, m, e: rounded(tflite_round(acc, m, e), 9), scale=0.1, zero_point=9)  # fmt: skip
for unsigned in (False, True):
    add("qnn.quantize", Operand((3, 50), "wide"), torch=lambda x, z=131 if unsigned else 3: (
        torch.round(x.float() / 0.05 + z) - z + 3).clamp(-128, 127).to(torch.int8), scale=0.05, zero_point=3,
        unsigned=unsigned, zero_first=True)  # fmt: skip
halves = {"a_scale": 0.03, "a_zero": -3, "b_scale": 0.017, "b_zero": 20, "scale": 0.04, "zero_point": 1}
add("qnn.add", Operand((1, 5, 9), INT8), Operand((1, 5, 9), INT8), torch=lambda a, b: rounded(
    ((a.float() + 3) * 0.03 + (b.float() - 20) * 0.017) / 0.04, 1), **halves)  # fmt: skip
add("qnn.add", Operand((1, 5, 9), INT8), Operand((1, 5, 9), INT8), torch=lambda a, b: ((
    (a.long() + 3) * round(0.75 * 2**20) + (b.long() - 20) * round(0.425 * 2**20) + 2**19 >> 20) + 1).clamp(
    -128, 127).to(torch.int8), bits=20, **halves)  # fmt: skip
add("qnn.add", Operand((1, 5, 9), INT8), Operand((1, 5, 9), INT8), torch=lambda a, b: rounded(torch.round(
    (a.double() + 3) * 0.75 + (b.double() - 20) * 0.425 + 1e-9), 1), unsigned=True, **halves)  # fmt: skip
add("qnn.add", Operand((1, 5, 9), INT8), Operand((1, 5, 9), INT8), torch=lambda a, b: rounded(torch.round(
    (a.double() + 3) * 0.75 + (b.double() - 20) * 0.425), 1), tflite=True, **halves)  # fmt: skip


def stored_step(rounding: str, power: int = -1) -> Callable[..., Tensor]:
    """qnn.sgd with Python integers: an independent reading of the formula."""

    def one(w: int, d: float, bits: int) -> int:
        if bits == 16 or rounding == "nearest":
            return w + math.floor(np.float32(d * (256 if bits == 16 else 1)) + np.float32(0.5))
        h = int(np.float32(d).view(np.uint32)) * 0x9E3779B9 & 0xFFFFFFFF
        h = (h ^ (h >> 15 | (0xFFFE0000 if h >> 31 else 0))) * 0x85EBCA6B & 0xFFFFFFFF
        return w + math.floor(np.float32(d) + np.float32((h >> 8) * 2.0**-24))

    def run(w: Tensor, g: Tensor, rate: Tensor, scale: Tensor, unit: Tensor) -> Tensor:
        limits = torch.iinfo(w.dtype)
        scale, size = scale.float(), rate.float() * unit.float()
        size = {-2: size / (scale * scale), -1: size / scale, 0: size, 1: size * scale}[power]
        d = -(torch.where(scale < 1e-6, torch.zeros(()), size) * g.float())
        stepped = [one(int(a), float(b), limits.bits) for a, b in zip(w.flatten(), d.flatten(), strict=True)]
        return torch.tensor(stepped).clamp(limits.min, limits.max).to(w.dtype).reshape(w.shape)

    return run


for kind in (INT8, INT16, INT32):
    for rounding, power in (("stochastic", -2), ("stochastic", 0), ("nearest", -1), ("nearest", 1)):
        add("qnn.sgd", Operand((4, 3, 3, 5), kind), Operand((4, 3, 3, 5)), Operand((), "scale"),
            Operand((4, 1, 1, 1), "wide"), Operand((), "positive"), torch=stored_step(rounding, power),
            rounding=rounding, power=power)  # fmt: skip
add("qnn.sgd", Operand((4,), INT32), Operand((4,)), Operand((), "scale"), Operand((4,), "wide"), Operand(()),
    torch=lambda *a: stored_step("stochastic")(*a).clamp(-9, 9), limit=9)  # fmt: skip


# --- gradients as integers --------------------------------------------------------------------------------------------

for x_shape, w_shape, attrs in CONVOLUTIONS:
    y_shape = tuple(conv(**attrs)(torch.zeros(x_shape), torch.zeros(w_shape)).shape)

    def integer_weight_gradient(x: Tensor, g: Tensor, attrs=attrs, shape=w_shape) -> Tensor:  # type: ignore[no-untyped-def]
        gradient = input_gradient(lambda w, x: conv(**attrs)(x, w), shape)
        return gradient(g.double(), x.double() - 7).to(torch.int32)

    add("qnn.conv2d_weight_grad", Operand(x_shape, INT8), Operand(y_shape, INT8),
        torch=integer_weight_gradient, kernel_size=w_shape[1:3], zero_point=7, **attrs)  # fmt: skip
for kind, (x_shape, w_shape, attrs) in zip((INT8, INT16) * 9, TRANSPOSED, strict=False):
    add("qnn.conv2d_transpose", Operand(x_shape, INT8), Operand(w_shape, kind), torch=counted(conv_transpose(**attrs)),
        **attrs)  # fmt: skip
add("qnn.matmul", Operand((5, 2), INT8), Operand((5, 8), INT8), torch=lambda a, b: (
    a.T.double() @ (b.double() + 4)).to(torch.int32), transpose_a=True, zero_point=-4)  # fmt: skip
add("qnn.matmul", Operand((2, 5), INT8), Operand((5, 8), INT16), torch=lambda a, b: (
    a.double() @ torch.floor(b.double() / 256)).to(torch.int32))  # fmt: skip
add("qnn.gradient_unit", (3, 50), torch=lambda g: g.float().abs().max() / 127)
add("qnn.gradient_unit", Operand((3, 50), "holed"), torch=lambda g: g.float().nan_to_num(0).abs().max() / 127)
add("qnn.quantize_gradient", Operand((3, 50), "holed"), Operand((), "scale"), torch=lambda g, unit: rounded(
    g.float().nan_to_num(-math.inf) / unit.float(), 0, -127))  # fmt: skip
add("qnn.quantize_gradient", Operand((3, 50), "wide"), Operand((), "scale"), torch=lambda g, unit: rounded(
    g.float() / unit.float(), 0, -127))  # fmt: skip


def upper(v: Tensor, m: Tensor) -> Tensor:
    """The upper half of a product."""
    return torch.div(v.long() * m.long(), 2**32, rounding_mode="floor")


RANGE = Operand((2,), "integer")  # of an exponent of -7 or -6
add("qnn.gradient_exponent", RANGE, torch=lambda r: torch.div(r[0] + 319, 256, rounding_mode="floor").int() - 7)
add("qnn.gradient_exponent", RANGE, Operand((), "exponent"), Operand((), "exponent"), torch=lambda r, a, b: torch.stack(
    [torch.div(r[0] + 319, 256, rounding_mode="floor").int() - 7, a - 3, b + 4]).max(), least=(-3, 4))  # fmt: skip
add("qnn.gradient_scale", Operand((), "scale"), Operand((), "exponent"), torch=lambda unit, e: unit * 2.0**e)
add("qnn.gradient_scale", Operand((), "scale"), Operand((), "exponent"), Operand(()), torch=lambda unit, e, rate:
    unit * rate * 2.0**e)  # fmt: skip
for channels in (1, 6):
    fixed = Operand((5, 6), INT32), Operand((channels,), "fraction")
    add("qnn.gradient_unit", *fixed, torch=lambda g, m: -(-upper(g, m).abs().max() // 127) * 2.0**-20, bits=52)
    add("qnn.quantize_gradient", fixed[0], Operand((), "unit"), fixed[1], torch=lambda g, unit, m: (
        upper(g, m).sign() * ((upper(g, m).abs() / (unit * 2**20)) + 0.5).floor()).clamp(-127, 127).to(torch.int8),
        bits=52)  # fmt: skip
    add("qnn.dequantize_gradient", *fixed[:1], Operand((), "scale"), Operand((channels,)), torch=lambda v, unit, f:
        v * unit.double() * f)  # fmt: skip
for kind in (INT8, INT16):
    add("qnn.dequantize_gradient", Operand((5, 6), kind), Operand((), "scale"), torch=lambda v, unit: v * unit.double())


def integer_step(rounding: str, room: int, bits: int, limit: int = 2**31 - 1) -> Callable[..., Tensor]:
    """qnn.integer_sgd with Python integers, whose scale is mantissa / 2^exponent."""

    def run(w: Tensor, v: Tensor, scale: Tensor, m: Tensor) -> Tensor:
        scale = min(float(scale), 2.0**200)
        exponent = 31 - math.frexp(scale)[1]
        mantissa, fraction = int(scale * 2.0**exponent), exponent + bits + room - 64
        if fraction < 0:
            mantissa, fraction = 2**31 - 1, 0
        mantissa, fraction = mantissa // 2 ** max(0, fraction - 30), min(fraction, 30)
        stepped = []
        for a, b, c in zip(
            w.flatten().tolist(), v.flatten().tolist(), m.expand(w.shape).flatten().tolist(), strict=True
        ):
            product = b * 2**room * (mantissa * c // 2**32)
            u = 2**fraction // 2
            if rounding == "stochastic" and w.dtype != torch.int16:
                h = (product ^ product // 2**32 ^ a) % 2**32 * 0x9E3779B9 % 2**32
                u = (h ^ (h >> 15 | (0xFFFE0000 if h >> 31 else 0))) * 0x85EBCA6B % 2**32 >> 32 - fraction
            stepped.append(a + (u - product // 2**32) // 2**fraction)
        info = torch.iinfo(w.dtype)
        low, high = (-limit, limit) if w.dtype == torch.int32 else (info.min, info.max)
        return torch.tensor(stepped).clamp(low, high).to(w.dtype).reshape(w.shape)

    return run


for kind in (INT8, INT16, INT32):
    for rounding in ("stochastic", "nearest"):
        for of, room, bits in ((INT8, 24, 24), (INT8, 24, -30), (INT32, 0, 32), (INT32, 0, 70)):
            add("qnn.integer_sgd", Operand((4, 3, 3, 5), kind), Operand((4, 3, 3, 5), of), Operand((), "scale"),
                Operand((4, 1, 1, 1), "fraction"), torch=integer_step(rounding, room, bits), rounding=rounding,
                room=room, bits=bits)  # fmt: skip
for scale in ("scale", "inf"):
    add("qnn.integer_sgd", Operand((4,), INT32), Operand((4,), INT8), Operand((), scale), Operand((4,), "fraction"),
        torch=integer_step("stochastic", 24, 24, 9), room=24, bits=24, limit=9)  # fmt: skip


def integer_softmax(q: Tensor, label: Tensor, factors: Tensor) -> Tensor:
    """qnn.integer_cross_entropy_grad with Python integers."""
    rows = []
    for row, at in zip(q.reshape(-1, q.shape[-1]).tolist(), label.flatten().tolist(), strict=True):
        e = [2**30] * len(row)
        for k, factor in enumerate(factors.tolist()):
            e = [(x * factor + 2**29) // 2**30 if (max(row) - v) >> k & 1 else x for x, v in zip(e, row, strict=True)]
        whole = sum(e).bit_length() - 31
        p = [x * (2**61 // (sum(e) >> whole)) >> 31 + whole for x in e]
        p[at] -= sum(p)
        rows.append(p)
    return torch.tensor(rows, dtype=torch.int32).reshape(q.shape)


for rows in ((1,), (3,), (2, 2)):
    for steps in (1, 3, 64):  # of 64ths: the scale of logits
        logits = Operand((*rows, 7), INT8), Operand(rows, "label", 7), Operand((8,), "exponentials", steps)
        add("qnn.integer_cross_entropy_grad", *logits, torch=integer_softmax)
        for reduction in ("mean", "sum"):
            add("qnn.integer_cross_entropy", *logits, torch=lambda q, label, _, scale=steps / 64, reduction=reduction: (
                cross_entropy(reduction=reduction)(q.double() * scale, label)), scale=steps / 64,
                reduction=reduction)  # fmt: skip


def following(r: Tensor, q: Tensor, e: Tensor, unit: Tensor) -> Tensor:
    """qnn.observe_gradient with Python numbers."""
    sizes = [int(v) if v >= 0 else -1 - int(v) for v in q.flatten()]
    full = sum(v == 127 for v in sizes)
    peak = max(sizes)
    if peak == 0:
        return torch.tensor([int(r[0]) - 256, int(r[1])], dtype=torch.int32)
    octave = peak.bit_length() - 1
    seen = 256 * (int(e) + octave + (full > 0) + (full > len(sizes) // 8)) + peak * 256 // 2**octave - 256
    return torch.tensor([max(seen, int(r[0]) - 7), int(r[1]) + full], dtype=torch.int32)


for n in (3, 4, 64, 5000):
    add("qnn.observe_gradient", RANGE, Operand((n,), INT8), Operand((), "exponent"), Operand((), "scale"),
        torch=following)  # fmt: skip
add("qnn.observe_gradient", RANGE, Operand((9,), INT8), Operand((), "exponent"), Operand((), "nan"),
    torch=lambda r, q, e, unit: r)  # fmt: skip


def shifted(v: Tensor, m: Tensor, shift: int) -> Tensor:
    """v * m / 2^shift in two roundings, halves up: of m, then of the product's upper 32 bits."""
    m = torch.floor(m.double() / 2.0 ** (shift - 32) + 0.5)
    return torch.floor(v.double() * m / 2**32 + 0.5).long()


for channels in (1, 6):
    add("qnn.rescale_gradient", Operand((1, 9, 6), INT32), Operand((channels,), "fraction"), Operand((), "exponent"),
        Operand((), "exponent"), torch=lambda v, m, e, to: shifted(v, m, 46 + int(to - e)).clamp(-128, 127).to(
            torch.int8), bits=46)  # fmt: skip
    add("qnn.rescale_gradient", Operand((1, 9, 6), INT8), Operand((channels,), "fraction"), Operand((), "exponent"),
        Operand((), "exponent"), torch=lambda v, m, e, to: shifted(v.int() * 65536, m, 46 + int(to - e)).clamp(
            -128, 127).to(torch.int8), bits=30)  # fmt: skip
add("qnn.add_gradients", Operand((1, 9, 6), INT32), Operand((6,), "fraction"), Operand((), "exponent"),
    Operand((1, 9, 6), INT8), Operand((1,), "fraction"), Operand((), "exponent"), Operand((), "exponent"),
    torch=lambda a, ma, ea, b, mb, eb, to: torch.round((shifted(a, ma, 46 + int(to - ea)) + shifted(
        b.int() * 65536, mb, 46 + int(to - eb))).double() / 8).clamp(-128, 127).to(torch.int8),
    a_bits=49, b_bits=33)  # fmt: skip
for kind in (INT8, INT16, INT32):
    add("nn.apply_mask", Operand((3, 50), kind), Operand((3, 50), "bits"), torch=lambda g, m: g * m)
