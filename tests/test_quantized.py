"""Training in integers: gradients, storage and sparse updates of quantised networks.

The yardstick is torch.autograd, in double precision, of the same integer network written by hand: rounding passes
gradients on unchanged, a clamp passes them where the value before it was inside its limits.
"""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import qas
import qdq
import torch
import torch.nn.functional as F

import tte
import tte.ops  # fills the table of operators
from tte.artifact import Artifact
from tte.compiler import lower
from tte.ir import OPS, Builder, Const, Graph, Param, TensorType, Value, evaluate, verify
from tte.ir.types import Quant
from tte.passes.autodiff import differentiate
from tte.passes.channels import select_channels
from tte.passes.loss import append_loss
from tte.passes.optimizer import _integer_factor as factor
from tte.passes.optimizer import attach_sgd
from tte.passes.quantized import Settings, keep_saturation_masks, lower_qdq
from tte.passes.select_updates import select_updates
from tte.passes.simplify import eliminate_dead_code
from tte.proof_int8 import _steps_before_rounding
from tte.runner.board import STATE_HEADER, unpack_state
from tte.runner.qemu import find_qemu
from tte.saved import read_state
from tte.scheme import UpdateScheme, find_layers, resolve

Tensor = torch.Tensor
torch.set_num_threads(1)


class Clamp(torch.autograd.Function):
    """Integers inside of their limits; the gradient passes where they were, both limits included."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward((v >= low) & (v <= high))
        return v.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.saved_tensors[0], None, None


def straight(rounded: Tensor, exact: Tensor) -> Tensor:
    """The value of ``rounded`` with the derivative of ``exact``."""
    return rounded.detach() + (exact - exact.detach())


class Twin:
    """Writes a network twice: as a graph of tte, and as torch tensors, computed at once.

    A value is (graph value, integers as a float64 tensor, scale, zero point). Scales are such that nothing ties: how
    halves are rounded is for the tests of the forward side.
    """

    def __init__(self, seed: int = 0, mode: str = "fixed", storage: str = "int8_sr") -> None:
        self.rng = np.random.default_rng(seed)
        self.builder, self.mode, self.storage = Builder(), mode, storage
        self.params: list[Param] = []
        self.consts: list[Const] = []
        self.leaves: dict[str, Tensor] = {}
        self.wanted: dict[str, tuple[slice, ...]] = {}

    def call(self, op: str, *inputs: Value, **attrs: Any) -> Value:
        return self.builder.call(op, *inputs, layer=op, **attrs)

    def leaf(self, param: Param, real: np.ndarray, part: tuple[slice, ...] = ()) -> Tensor:
        """Real numbers to differentiate by; the graph's param is the given part of them."""
        self.params.append(param)
        self.leaves[param.name] = torch.from_numpy(np.array(real, np.float64)).requires_grad_()
        self.wanted[param.name] = part
        return self.leaves[param.name]

    # --- the same network twice -------------------------------------------------------------------------------------

    def source(self, *shape: int, scale: float = 0.0213717, zero: int = 3, **limits: int) -> Any:
        """A float that learns, quantised: what stands in front of the operators under test."""
        data = (self.rng.standard_normal(shape) * 1.5).astype(np.float32)
        name = f"x{len(self.params)}"
        param = Param(name, TensorType(shape), data)
        real = self.leaf(param, data)
        y = self.call("qnn.quantize", param, scale=scale, zero_point=zero, **limits)
        v = straight(torch.round(real.float() / np.float32(scale)).double(), real / scale) + zero
        return y, self.clamp(v, **limits), scale, zero

    def given(self, *shape: int, scale: float = 0.02, zero: int = 3) -> Any:
        """Integers that do not depend on anything that learns."""
        q = self.rng.integers(-128, 128, shape)
        self.consts.append(Const("x", TensorType(shape, "int8", Quant((scale,), zero)), q.astype(np.int8)))
        return self.consts[-1], torch.from_numpy(q.astype(np.float64)), scale, zero

    def clamp(self, v: Tensor, low: int = -128, high: int = 127) -> Tensor:
        return Clamp.apply(v, low, high)

    def weight(self, name: str, shape: tuple[int, ...], scale: np.ndarray, part: tuple[int, int] | None) -> Any:
        """Integers around zero; part: (axis, count) that learns, the rest is frozen."""
        q = self.rng.integers(-127, 128, shape)
        rows = scale.reshape(-1, *[1] * (len(shape) - 1))
        where = tuple(slice(0, part[1] if part and d == part[0] else None) for d in range(len(shape)))

        def piece(where: tuple[slice, ...]) -> tuple[TensorType, np.ndarray]:
            wide = self.storage == "int16_ef"
            data = (q[where] * 256 + 128).astype(np.int16) if wide else q[where].astype(np.int8)
            quant = Quant(tuple(float(s) for s in scale[where[0]]), 0, 0)
            return TensorType(data.shape, str(data.dtype), quant), data

        type, data = piece(where)
        if self.storage == "fp32":
            type, data = replace(type, dtype="float32"), data + self.rng.uniform(-0.4, 0.4, data.shape)
            data = data.astype(np.float32)
        param = Param(name, type, data)
        real = self.leaf(param, q * rows, where)
        integers = straight(torch.from_numpy(q.astype(np.float64)), real / torch.from_numpy(rows.copy()))
        w: Value = self.call("qnn.round", param) if self.storage == "fp32" else param
        if part:
            rest = tuple(slice(part[1] if d == part[0] else 0, None) for d in range(len(shape)))
            self.consts.append(Const(f"{name}.frozen", *piece(rest)))
            w = self.call("concatenate", w, self.consts[-1], axis=part[0])
        return w, integers

    def bias(self, name: str, scale: np.ndarray) -> Any:
        q = self.rng.integers(-3000, 3000, scale.shape)
        real = self.leaf(
            Param(name, TensorType(scale.shape, "int32", Quant(tuple(scale.tolist()), 0, 0)), q.astype(np.int32)),
            q * scale,
        )
        return self.params[-1], straight(torch.from_numpy(q.astype(np.float64)), real / torch.from_numpy(scale))

    def scales(self, channels: int) -> np.ndarray:
        return self.rng.uniform(0.001, 0.006, channels)

    def conv(self, x: Any, out: int, k: int = 3, *, part=None, bias=True, scale=0.05, zero=-2, low=-128, high=127,
             padding=(1, 1, 1, 1), **geometry: Any) -> Any:  # fmt: skip
        xv, xq, xs, xz = x
        groups = geometry.get("groups", 1)
        ws = self.scales(out)
        name = f"conv{len(self.params)}"
        w, wq = self.weight(f"{name}.weight", (out, k, k, xv.type.shape[3] // groups), ws, part)
        b, bq = self.bias(f"{name}.bias", ws * xs) if bias else (None, None)
        acc = self.call("qnn.conv2d", xv, w, *([b] if bias else []), zero_point=xz, padding=padding, **geometry)
        top, left, bottom, right = padding
        picture = F.pad((xq - xz).permute(0, 3, 1, 2), (left, right, top, bottom))
        strides, dilation = geometry.get("strides", (1, 1)), geometry.get("dilation", (1, 1))
        total = F.conv2d(picture, wq.permute(0, 3, 1, 2), bq, strides, 0, dilation, groups).permute(0, 2, 3, 1)
        return self.requantize(acc, total, ws * xs, scale, zero, low, high)

    def dense(self, x: Any, out: int, *, part=None, bias=True, scale=0.05, zero=-2) -> Any:  # type: ignore[no-untyped-def]
        xv, xq, xs, xz = x
        ws = self.scales(out)
        name = f"dense{len(self.params)}"
        w, wq = self.weight(f"{name}.weight", (out, xv.type.shape[-1]), ws, part)
        b, bq = self.bias(f"{name}.bias", ws * xs) if bias else (None, None)
        acc = self.call("qnn.dense", xv, w, *([b] if bias else []), zero_point=xz)
        return self.requantize(acc, F.linear(xq - xz, wq, bq), ws * xs, scale, zero, -128, 127)

    def requantize(self, acc: Value, total: Tensor, real: np.ndarray, scale: float, zero: int, low: int, high: int,
                   ratio: float = 1.0) -> Any:  # fmt: skip
        """real: what one unit of an accumulator is worth, times ratio."""
        attrs: dict[str, Any] = {"scale": scale, "zero_point": zero, "low": low, "high": high, "ratio": ratio}
        factor = real / scale
        exact = total * torch.from_numpy(factor)
        if self.mode == "float":
            multiplier = factor.astype(np.float32)
            v = torch.round(total.float() * torch.from_numpy(multiplier)).double()
        else:
            attrs["shift"] = 3
            multiplier = np.rint(factor * 2.0**29).astype(np.int32)
            v = ((total.detach().long() * 8 * torch.from_numpy(multiplier).long() + 2**31) >> 32).double()
        y = self.call("qnn.requantize", acc, self.builder.const(multiplier), **attrs)
        return y, self.clamp(straight(v, exact) + zero, low, high), scale, zero

    def add(self, a: Any, b: Any, scale: float = 0.0617251, zero: int = 5, low: int = -128, high: int = 127) -> Any:
        (av, aq, sa, za), (bv, bq, sb, zb) = a, b
        attrs = {"a_scale": sa, "a_zero": za, "b_scale": sb, "b_zero": zb, "scale": scale, "zero_point": zero}
        bits = 0 if self.mode == "float" else 18
        y = self.call("qnn.add", av, bv, **attrs, low=low, high=high, bits=bits)
        exact = ((aq - za) * sa + (bq - zb) * sb) / scale
        if bits:
            ma, mb = round(sa / scale * 2**18), round(sb / scale * 2**18)
            v = ((aq - za).detach().long() * ma + (bq - zb).detach().long() * mb + 2**17 >> 18).double()
        else:
            v = torch.round(exact)
        return y, self.clamp(straight(v, exact) + zero, low, high), scale, zero

    def mean(self, x: Any, axis: tuple[int, ...], keepdims: bool = False, scale: float = 0.03) -> Any:
        xv, xq, xs, xz = x
        acc = self.call("qnn.sum", xv, axis=axis, keepdims=keepdims, zero_point=xz)
        count = xv.type.size // acc.type.size
        total = (xq - xz).sum(axis, keepdim=keepdims)
        return self.requantize(acc, total, np.asarray([xs / count]), scale, 1, -128, 127, 1 / count)

    def average(self, x: Any, size: tuple[int, int], scale: float = 0.04, **window: Any) -> Any:
        xv, xq, xs, xz = x
        acc = self.call("qnn.sum_pool2d", xv, pool_size=size, zero_point=xz, **window)
        top, left, bottom, right = window.get("padding", (0, 0, 0, 0))
        picture = F.pad((xq - xz).permute(0, 3, 1, 2), (left, right, top, bottom))
        count = size[0] * size[1]
        total = F.avg_pool2d(picture, size, window.get("strides", (1, 1))).permute(0, 2, 3, 1) * count
        total = straight(torch.round(total), total)
        return self.requantize(acc, total, np.asarray([xs / count]), scale, 1, -128, 127, 1 / count)

    def maximum(self, x: Any, size: tuple[int, int], strides: tuple[int, int], padding=(0, 0, 0, 0)) -> Any:  # type: ignore[no-untyped-def]
        xv, xq, xs, xz = x
        top, left, bottom, right = padding
        y = self.call("nn.max_pool2d", xv, pool_size=size, strides=strides, padding=padding)
        picture = F.pad(xq.permute(0, 3, 1, 2), (left, right, top, bottom), value=-1000.0)
        return y, F.max_pool2d(picture, size, strides).permute(0, 2, 3, 1), xs, xz

    def rescale(self, x: Any, scale: float, zero: int) -> Any:
        xv, xq, xs, xz = x
        acc = self.call("qnn.sum", xv, axis=(), zero_point=xz)
        return self.requantize(acc, xq - xz, np.asarray([xs]), scale, zero, -128, 127)

    def concatenate(self, xs: list[Any], axis: int) -> Any:
        y = self.call("concatenate", *(x[0] for x in xs), axis=axis)
        return y, torch.cat([x[1] for x in xs], axis), xs[0][2], xs[0][3]

    def reshape(self, x: Any, *shape: int) -> Any:
        return self.call("reshape", x[0], newshape=shape), x[1].reshape(shape), x[2], x[3]

    # --- the comparison ---------------------------------------------------------------------------------------------

    def finish(self, y: Any) -> tuple[Graph, Tensor]:
        """Both losses: the sum of the squares of the result's real numbers."""
        value, q, scale, zero = y
        real = self.call("qnn.dequantize", value, scale=scale, zero_point=zero)
        loss = self.call("nn.mse", real, self.builder.const(np.zeros(real.type.shape, np.float32)), reduction="sum")
        consts = (*self.builder.consts.values(), *self.consts)
        graph = Graph("main", (), tuple(self.params), consts, tuple(self.builder.nodes), (loss,)).renumbered()
        return verify(graph), ((scale * (q - zero)) ** 2).sum()

    def compare(self, y: Any, bound: float = 1e-5) -> None:
        graph, loss = self.finish(y)
        theirs = torch.autograd.grad(loss, [self.leaves[p.name] for p in graph.params])
        backward = verify(differentiate(verify(keep_saturation_masks(graph))))
        ours = evaluate(backward, []).outputs
        assert abs(float(ours[0]) - loss.item()) <= 1e-5 * loss.item()
        for param, mine, reference in zip(graph.params, ours[1:], theirs, strict=True):
            expected = reference.numpy()[self.wanted[param.name]]
            assert mine.shape == param.type.shape
            size = np.linalg.norm(expected)
            assert size > 0, f"{param.name}: nothing to compare"
            assert np.linalg.norm(mine - expected) <= bound * size, param.name


MODES = pytest.mark.parametrize("mode", ["fixed", "float"])
STORAGES = pytest.mark.parametrize("storage", ["int8_sr", "int16_ef", "fp32"])
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"out": 6},
    "pointwise": {"out": 5, "k": 1, "padding": (0, 0, 0, 0)},
    "asymmetric": {"out": 5, "padding": (0, 2, 1, 0), "strides": (2, 1)},
    "strided": {"out": 5, "k": 3, "strides": (2, 3), "padding": (0, 1, 1, 0)},
    "dilated": {"out": 3, "dilation": (2, 1)},
    "grouped": {"out": 6, "groups": 2},
    "depthwise": {"out": 4, "groups": 4, "strides": (2, 2), "padding": (0, 0, 1, 1)},
    "multiplier": {"out": 8, "groups": 4},
    "no bias": {"out": 4, "bias": False},
    "part": {"out": 5, "part": (3, 3)},
    "part of depthwise": {"out": 4, "groups": 4, "part": (0, 3)},
    "part of multiplier": {"out": 8, "groups": 4, "part": (0, 6)},
    "relu6": {"out": 6, "low": -128, "high": 60, "zero": -128},
}


@MODES
@STORAGES
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("alone", [False, True], ids=["and input", "weights only"])
def test_gradient_of_convolution(case: str, mode: str, storage: str, alone: bool) -> None:
    net = Twin(len(case), mode, storage)
    x = net.given(2, 6, 7, 4) if alone else net.source(2, 6, 7, 4)  # a layer whose input learns needs one product more
    net.compare(net.conv(x, **CONVOLUTIONS[case]))


@MODES
@STORAGES
@pytest.mark.parametrize("part", [None, (1, 4)], ids=["all", "part"])
def test_gradient_of_dense(mode: str, storage: str, part: Any) -> None:
    net = Twin(1, mode, storage)
    net.compare(net.dense(net.source(3, 9), 5, part=part))


@MODES
@pytest.mark.parametrize("limits", [{}, {"low": 0}, {"low": -40, "high": 50}])
def test_gradient_of_addition(mode: str, limits: dict[str, int]) -> None:
    net = Twin(2, mode)
    net.compare(net.add(net.source(1, 5, 6, 3), net.source(1, 5, 6, 3, scale=0.0319347, zero=-9), **limits))


@MODES
def test_gradient_where_an_operand_is_added_to_itself(mode: str) -> None:
    net = Twin(2, mode)
    x = net.source(1, 4, 4, 3)
    net.compare(net.add(x, x))


@MODES
@pytest.mark.parametrize("axis", [(1, 2), (0, 1, 2), (2,)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_gradient_of_mean(mode: str, axis: tuple[int, ...], keepdims: bool) -> None:
    net = Twin(3, mode)
    net.compare(net.mean(net.source(2, 4, 5, 3), axis, keepdims))


@MODES
@pytest.mark.parametrize("window", [{"strides": (2, 2)}, {"strides": (1, 2), "padding": (1, 0, 0, 1)}])
def test_gradient_of_average_pooling(mode: str, window: dict[str, Any]) -> None:
    net = Twin(4, mode)
    net.compare(net.average(net.source(1, 6, 7, 3), (2, 3), **window))


@MODES
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 1, 1)])
def test_gradient_of_max_pooling(mode: str, padding: tuple[int, int, int, int]) -> None:
    """Integers tie often: the first of equals takes the gradient."""
    net = Twin(5, mode)
    x = net.source(1, 8, 7, 3, scale=0.5)
    net.compare(net.maximum(x, (3, 2), (2, 2), padding))


@MODES
def test_gradient_of_concatenation_and_rescaling(mode: str) -> None:
    net = Twin(6, mode)
    a, b = net.source(1, 3, 4, 2), net.source(1, 3, 4, 5, scale=0.07, zero=-20)
    net.compare(net.conv(net.concatenate([net.rescale(a, 0.05, 4), net.rescale(b, 0.05, 4)], 3), 4))


@pytest.mark.parametrize("limits", [{}, {"low": -10, "high": 60}])
def test_gradient_of_quantisation(limits: dict[str, int]) -> None:
    net = Twin(7)
    net.compare(net.source(40, 3, **limits))


@pytest.mark.parametrize("op", ["requantize", "quantize", "add", "round"])
def test_limits_themselves_pass_the_gradient(op: str) -> None:
    """Masks are inclusive: a value that is 127 before the clamp learns, one that is 128 does not."""
    builder = Builder()
    data = np.asarray([-129, -128, -127, 0, 126, 127, 128], np.float32)
    param = Param("x", TensorType((7,)), data)
    if op == "round":
        y = builder.call("qnn.round", param)
    elif op == "quantize":
        y = builder.call("qnn.quantize", param, scale=1.0)
    else:
        half = builder.call("qnn.quantize", param, scale=1.0, zero_point=0, low=-128, high=127)
        # 127 + 1 and -128 - 1 come from one addition, or from a sum that is shifted by the zero point.
        zero = builder.const(np.zeros(7, np.float32))
        nothing = builder.call("qnn.quantize", zero, scale=1.0)
        ones = {"a_scale": 1.0, "a_zero": 0, "b_scale": 1.0, "b_zero": 0, "scale": 1.0}
        if op == "add":
            y = builder.call("qnn.add", half, nothing, **ones, low=-127, high=126)
        else:
            acc = builder.call("qnn.sum", half, axis=())
            y = builder.call(
                "qnn.requantize", acc, builder.const(np.ones(1, np.float32)), scale=1.0, low=-127, high=126
            )
    below = builder.const(np.full(7, -1000.0, np.float32))  # so that the gradient of the distance is one
    loss = builder.call("nn.l1", builder.call("qnn.dequantize", y, scale=1.0), below, reduction="sum")
    graph = Graph("main", (), (param,), tuple(builder.consts.values()), tuple(builder.nodes), (loss,)).renumbered()
    gradient = evaluate(differentiate(keep_saturation_masks(graph)), []).outputs[1]
    expected = [0, 1, 1, 1, 1, 1, 0] if op in ("round", "quantize") else [0, 0, 1, 1, 1, 0, 0]
    assert gradient.tolist() == expected


def residual(net: Twin, part: Any = None) -> Any:
    """A strided stem, an inverted residual block whose input is read twice, pooling, a classifier."""
    x = net.conv(net.source(1, 12, 12, 3), 8, strides=(2, 2), zero=-128, scale=0.03)
    wide = net.conv(x, 16, 1, padding=(0, 0, 0, 0), zero=-128, scale=0.04, part=part)
    deep = net.conv(wide, 16, groups=16, zero=-128, scale=0.03, part=(0, 8) if part else None)
    narrow = net.conv(deep, 8, 1, padding=(0, 0, 0, 0), part=part and (3, 8))
    block = net.add(x, narrow)
    again = net.add(block, net.conv(block, 8, part=part), scale=0.1017)
    pooled = net.mean(net.average(again, (2, 2), strides=(2, 2)), (1, 2))
    return net.dense(pooled, 5, scale=0.02, part=part and (1, 4))


@MODES
@STORAGES
@pytest.mark.parametrize("part", [None, (3, 3)], ids=["all", "part"])
def test_gradients_of_a_network(mode: str, storage: str, part: Any) -> None:
    net = Twin(11, mode, storage)
    net.compare(residual(net, part))


# --- storage ---------------------------------------------------------------------------------------------------------


def sgd(w: np.ndarray, d: np.ndarray, **attrs: Any) -> np.ndarray:
    """qnn.sgd of a step that is d before rounding."""
    one = np.float32(1.0)
    return OPS["qnn.sgd"].ref(w, -d.astype(np.float32), one, one, one, **OPS["qnn.sgd"].complete(attrs))


@pytest.mark.parametrize("size", [0.003, 0.07, 0.5, 3.0])
def test_stochastic_rounding_has_no_bias(size: float) -> None:
    """A million steps: their mean is that of the reals, within three standard errors; so is the spread."""
    d = (np.random.default_rng(1).standard_normal(1_000_000) * size).astype(np.float32)
    moved = sgd(np.zeros(d.shape, np.int32), d).astype(np.float64)
    fraction = d - np.floor(d.astype(np.float64))
    variance = (fraction * (1 - fraction)).sum()
    assert abs((moved - d).sum()) <= 3 * np.sqrt(variance)
    assert abs(((moved - d) ** 2).sum() - variance) <= 0.01 * variance


def test_stochastic_rounding_is_as_likely_as_the_fraction() -> None:
    """Also for steps of nearly one size, which differ in their last bits only."""
    for size in (0.01, 0.25, 0.9):
        d = np.float32(size) + np.arange(100_000) * np.float32(size * 2.0**-20)
        up = (sgd(np.zeros(d.shape, np.int32), d) == 1).mean()
        p = float(d.astype(np.float64).mean())
        assert abs(up - p) <= 3 * np.sqrt(p * (1 - p) / d.size), size


def test_nearest_loses_small_steps_and_fractions_keep_them() -> None:
    d = np.full(10, 0.3, np.float32)
    int8, fraction = np.zeros(10, np.int8), np.full(10, 128, np.int16)
    for _ in range(10):
        int8, fraction = sgd(int8, d, rounding="nearest"), sgd(fraction, d)
    assert (int8 == 0).all() and ((fraction >> 8) == 3).all()


@pytest.mark.parametrize(("step", "stochastic", "fraction"), [(0.3, 0, 3), (-0.3, -10, -3)])
def test_a_step_that_is_repeated_is_rounded_alike(step: float, stochastic: int, fraction: int) -> None:
    """The hash sees nothing else: no storage but int16_ef is right in the mean of these."""
    d = np.full(1, step, np.float32)
    int8, int16 = np.zeros(1, np.int8), np.full(1, 128, np.int16)
    for _ in range(10):
        int8, int16 = sgd(int8, d), sgd(int16, d)
    assert (int8[0], int16[0] >> 8) == (stochastic, fraction)


@pytest.mark.parametrize(("dtype", "low", "high"), [("int8", -128, 127), ("int16", -32768, 32767), ("int32", -9, 9)])
@pytest.mark.parametrize("size", [1e9, 3e38, np.inf])
def test_steps_saturate(dtype: str, low: int, high: int, size: float) -> None:
    with np.errstate(over="ignore"):
        assert sgd(np.zeros(2, dtype), np.asarray([-size, size]), limit=9).tolist() == [low, high]


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mcunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inverted residual blocks, two of them with a skip; the classifier in integers too."""
    return qdq.quantize(qdq.RECIPES["mcunet"], tmp_path_factory.mktemp("mcunet"))


def gradients(graph: Graph, scheme: UpdateScheme, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """In the user's tensors, from the source graph on; the steps of ``compile_graphs``."""
    resolved = resolve(scheme, graph)
    moved, _ = select_channels(graph, resolved)
    forward = lower_qdq(verify(select_updates(moved, resolved)), Settings())
    backward = differentiate(keep_saturation_masks(append_loss(forward, scheme.loss)))
    backward = verify(eliminate_dead_code(backward))
    result: dict[str, np.ndarray] = {}
    for param, g in zip(backward.params, evaluate(backward, arrays).outputs[1:], strict=True):
        assert param.origin is not None
        tensor = result.setdefault(param.origin.name, np.full(param.origin.shape, np.nan))
        tensor.reshape(-1)[param.origin.index] = g
    return result


def random_scheme(graph: Graph, rng: np.random.Generator) -> UpdateScheme:
    """Some layers whole, some in part by norm or by index, some biases."""
    rules: list[dict[str, Any]] = []
    for layer in find_layers(graph):
        kind = rng.choice(["none", "bias", "all", "l2", "listed"], p=[0.45, 0.15, 0.15, 0.15, 0.1])
        channels = layer.channels or 1
        if kind in ("l2", "listed") and channels < 2:
            kind = "all"
        rule: dict[str, Any] = {"layer": layer.name, "bias": bool(rng.random() < 0.5)}
        if kind == "bias":
            rule["bias"] = True
        elif kind == "all":
            rule["weight"] = "all"
        elif kind == "l2":
            rule["weight"] = {"in_channels": int(rng.integers(1, channels)), "select": "l2"}
        elif kind == "listed":
            rule["weight"] = {"select": sorted(rng.choice(channels, rng.integers(1, channels), replace=False).tolist())}
        if kind != "none":
            rules.append(rule)
    rules.append({"layer": find_layers(graph)[-1].name, "weight": "all", "bias": True})
    return UpdateScheme.load({"train": rules})


def test_pruned_graph_is_the_masked_full_graph(mcunet: Path) -> None:
    """Twenty random schemes: what they compute of the gradients is what training everything computes there."""
    graph, rng = lower(mcunet), np.random.default_rng(8)
    arrays = [qdq.inputs(qdq.RECIPES["mcunet"], 1)[0], np.asarray([3], np.int32)]
    full = gradients(graph, UpdateScheme.load("full"), arrays)
    parts = 0
    for number in range(20):
        pruned = gradients(graph, random_scheme(graph, rng), arrays)
        for name, ours in pruned.items():
            learns = ~np.isnan(ours)
            parts += not learns.all()
            assert np.linalg.norm(full[name][learns]) > 0, name
            difference = np.linalg.norm(ours[learns] - full[name][learns])
            assert difference <= 1e-5 * np.linalg.norm(full[name][learns]), (number, name)
    assert parts > 20


@pytest.mark.parametrize("storage", ["int8_sr", "int16_ef"])
def test_permuted_prefix_is_the_mask_by_magnitude(mcunet: Path, storage: str) -> None:
    """Bit for bit over several steps of the generated C: against training the whole weight and putting back what is
    not among the channels of the largest norm. Nothing learns in front of the first layer that is split, so that no
    sum runs in another order."""
    split = "blocks.5.body.2.0"
    rest = [{"layer": n, "weight": "all", "bias": True} for n in ("last.0", "classifier")]
    settings = {"optimizer": {"lr": 0.02}, "quantized": {"weight_storage": storage}}
    rules = {"in part": {"in_channels": 0.5, "select": "l2"}, "whole": "all"}
    made = {
        kind: tte.compile(
            mcunet, update_scheme={"train": [{"layer": split, "weight": w, "bias": True}, *rest], **settings}
        )
        for kind, w in rules.items()
    }
    boards = {kind: artifact.host() for kind, artifact in made.items()}
    params = {kind: {p.name: p for p, _ in a.compiled.train.graph.updates} for kind, a in made.items()}
    weight = next(n for n, p in params["in part"].items() if p.type.shape != params["whole"][n].type.shape)
    part, whole = (params[kind][weight] for kind in ("in part", "whole"))
    assert part.origin and whole.origin
    learns = np.isin(whole.origin.index, part.origin.index)
    norms = (lower_weight(mcunet, weight) ** 2).sum((0, 1, 2))
    assert set(np.flatnonzero(learns[0, 0, 0])) == set(np.argsort(-norms)[: len(norms) // 2].tolist())

    def weights(kind: str) -> dict[str, np.ndarray]:
        return unpack_state(boards[kind].save_state(), boards[kind].build)

    order = np.argsort(whole.origin.index[learns])[np.argsort(np.argsort(part.origin.index.reshape(-1)))]
    for step in range(6):
        x, y = qdq.inputs(qdq.RECIPES["mcunet"], 1, seed=step)[0], np.asarray([step % 10], np.int32)
        losses = {kind: boards[kind].train_step(x, y).loss for kind in boards}
        assert losses["in part"] == losses["whole"]
        ours, theirs = weights("in part"), weights("whole")
        for name in ours:
            expected = theirs[name][learns][order].reshape(part.type.shape) if name == weight else theirs[name]
            assert np.array_equal(ours[name], expected), (step, name)
        restore(boards["whole"], weight, np.where(learns, theirs[weight], whole.data))
    assert (ours[weight] != part.data).any()


def lower_weight(model: Path, name: str) -> np.ndarray:
    return next(c.data for c in lower(model).consts if c.name == name)


def restore(board: Any, name: str, data: np.ndarray) -> None:
    """Another value for one tensor in the board's memory."""
    slot = next(s for s in board.build.state if s.name == name)
    blob = bytearray(board.save_state())
    start = STATE_HEADER + slot.offset
    blob[start : start + data.nbytes] = np.ascontiguousarray(data, slot.dtype).tobytes()
    blob[-4:] = zlib.crc32(bytes(blob[:-4])).to_bytes(4, "little")
    assert board.load_state(bytes(blob)) == 0


SPARSE = [
    {"layer": "blocks.3.*", "bias": True},
    {"layer": "blocks.4.*", "weight": {"in_channels": 0.5, "select": "l2"}, "bias": True},
    {"layer": "blocks.5.*", "weight": "all", "bias": True},
]


@pytest.mark.parametrize(
    ("train", "storage", "requantize"),
    [
        ("full", "int8_sr", "float"),
        ("full", "int8_nearest", "fixed"),
        ("full", "int16_ef", "fixed"),
        ("full", "fp32", "fixed"),
        ("bias-only", "int8_sr", "fixed"),
    ],
)
def test_verify(mcunet: Path, train: str, storage: str, requantize: str) -> None:
    scheme = {
        "train": train,
        "optimizer": {"lr": 0.01},
        "quantized": {"weight_storage": storage, "requantize": requantize},
    }
    assert_verified(tte.compile(mcunet, update_scheme=scheme, target="host"), storage)


def assert_verified(artifact: Artifact, storage: str) -> None:
    """The whole way: gradients, the step before rounding, and where the integers of the generated C ended."""
    proof = artifact.verify(steps=3)
    assert proof["ok"] and proof["loss_error"] < 1e-5
    for row in proof["tensors"]:
        assert max(row["gradient_error"], row["weight_error"]) < 1e-5, row
        assert row["apart"] <= (0.5001 if storage == "int8_nearest" else 1.0001), row


@pytest.mark.parametrize("file", ["int8.onnx", "float.onnx"])
def test_verify_with_a_new_head_and_an_input_format(mcunet: Path, file: str) -> None:
    """The oracle reads the new head behind the passes that know the input's format: it is applied once."""
    given = {"dtype": "uint8", "layout": "nhwc", "mean": [127.5], "std": [60.0]}
    head = {"layer": "classifier", "classes": 5, "init": "zero"}
    scheme = {"train": "last-k:3", "io": {"input": given}, "head": head}
    assert tte.compile(mcunet.with_name(file), update_scheme=scheme).verify(steps=3)["ok"]


def test_verify_without_scaling(mcunet: Path) -> None:
    scheme = {"train": "full", "optimizer": {"lr": 1000.0}, "quantized": {"qas": False}}
    proof = tte.compile(mcunet, update_scheme=scheme).verify(steps=3)
    assert proof["ok"] and any(row["apart"] > 0.1 for row in proof["tensors"])


def test_verify_finds_a_wrong_step(mcunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero point that is left out of one gradient; a step that is a thousandth too long."""
    rule = OPS["qnn.dense"].grad
    forgetful = replace(OPS["qnn.dense"], grad=lambda b, dy, *v, zero_point: rule(b, dy, *v, zero_point=zero_point + 1))
    with monkeypatch.context() as patch:
        patch.setitem(OPS, "qnn.dense", forgetful)
        assert not tte.compile(mcunet, update_scheme="last-layer").verify(steps=1)["ok"]
    with monkeypatch.context() as patch:
        patch.setattr("tte.passes.optimizer._integer_factor", lambda *a: 1.001 * factor(*a))
        assert not tte.compile(mcunet, update_scheme="last-layer").verify(steps=1)["ok"]


@pytest.mark.parametrize(
    ("storage", "requantize"),
    [("int8_sr", "tflite"), ("int8_nearest", "fixed"), ("int16_ef", "float"), ("fp32", "fixed")],
)
def test_every_machine_learns_the_same_and_exports_the_integers_that_layers_read(
    mcunet: Path, storage: str, requantize: str
) -> None:
    settings = {"weight_storage": storage, "requantize": requantize}
    artifact = tte.compile(mcunet, update_scheme={"train": SPARSE, "optimizer": {"lr": 0.01}, "quantized": settings})
    assert_verified(artifact, storage)
    data = {"x": qdq.inputs(qdq.RECIPES["mcunet"], 8)[:, 0], "y": np.arange(8)}
    emulators = ["unicorn", *(["qemu"] if find_qemu() else [])]
    here, *others = (artifact.run(data, runner=runner) for runner in ("host", *emulators))
    for there in others:
        assert here.weights_sha256 == there.weights_sha256
        assert here.loss == there.loss
    trained, user = unpack_state(here.state, artifact.build), read_state(here.state, artifact.build.folder)
    moved = 0
    for param, _ in artifact.compiled.train.graph.updates:
        assert param.origin is not None
        integers = trained[param.name]
        if integers.dtype == np.int16:
            integers = np.floor(integers / 256)
        elif integers.dtype == np.float32:
            integers = np.clip(np.round(integers), -128, 127)
        tensor = user[param.origin.name]
        assert tensor.dtype == (np.int8 if param.type.rank > 1 else np.int32)
        assert np.array_equal(tensor.reshape(-1)[param.origin.index], integers)
        moved += int((tensor != artifact.compiled.originals[param.origin.name]).sum())
    assert moved > 100


def test_biases_leave_room_for_the_sums(mcunet: Path) -> None:
    """They saturate where the largest sum of products still fits into 32 bits beside them."""
    gradients = tte.compile(mcunet, update_scheme="full").compiled.gradients
    layers = {n.inputs[2].name: n.inputs[1].type for n in gradients.nodes if n.op in ("qnn.conv2d", "qnn.dense")}
    graph = attach_sgd(gradients, 0.1)
    producer = graph.producer()
    limits = {p.name: producer[v.name].attrs["limit"] for p, v in graph.updates if p.type.dtype == "int32"}
    assert limits == {n: 2**31 - 1 - 255 * 128 * (w.size // w.shape[0]) for n, w in layers.items()}
    assert len(limits) == 20


def test_dead_channels_stay_and_small_biases_learn() -> None:
    """A weight's scale says whether a channel is dead; a bias has a smaller one, of a channel that lives."""
    builder = Builder()
    x = Const("x", TensorType((1, 2), "int8", Quant((1e-4,), 0)), np.asarray([[90, -70]], np.int8))
    scales = (4e-9, 2e-3)
    w = Param("w", TensorType((2, 2), "int8", Quant(scales, 0, 0)), np.asarray([[100, 7], [-50, 20]], np.int8))
    units = tuple(s * 1e-4 for s in scales)
    b = Param("b", TensorType((2,), "int32", Quant(units, 0, 0)), np.asarray([2**31 - 99999, 5], np.int32))
    acc = builder.call("qnn.dense", x, w, b, layer="d")
    y = builder.call("qnn.requantize", acc, builder.const(np.asarray([1e-9, 0.01], np.float32)), scale=2e-5, layer="d")
    real = builder.call("qnn.dequantize", y, scale=2e-5, layer="d")
    loss = builder.call("nn.mse", real, builder.const(np.ones((1, 2), np.float32)), layer="loss")
    graph = Graph("main", (), (w, b), (x, *builder.consts.values()), tuple(builder.nodes), (loss,)).renumbered()
    backward = differentiate(keep_saturation_masks(graph))
    gradient = dict(zip("wb", evaluate(backward, []).outputs[1:], strict=True))
    assert all(g[0].any() and g[1].any() for g in gradient.values())
    with np.errstate(all="raise"):
        new = evaluate(verify(attach_sgd(backward, 0.1)), []).params
    assert np.array_equal(new["w"][0], w.data[0]) and new["b"][0] == b.data[0]
    assert new["b"][1] - b.data[1] == pytest.approx(-0.1 * gradient["b"][1] / units[1], rel=1e-4)


def test_a_bias_in_other_units_keeps_its_layer_in_float(mcunet: Path, tmp_path: Path) -> None:
    """Such a model is not one that onnxruntime writes; it computes and learns nevertheless."""
    model = onnx.load(mcunet)
    node = next(n for n in model.graph.node if n.op_type == "Conv" and "blocks.5/body/body.2" in n.name)
    bias = next(n for n in model.graph.node if n.output[0] == node.input[2])
    scale = next(i for i in model.graph.initializer if i.name == bias.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 2, scale.name))
    onnx.save(model, tmp_path / "m.onnx")
    artifact = tte.compile(tmp_path / "m.onnx", update_scheme={"train": "last-k:4", "optimizer": {"lr": 0.01}})
    learns = {p.name: p.type.dtype for p, _ in artifact.compiled.train.graph.updates}
    assert sorted(learns.values()) == ["float32"] * 2 + ["int32"] * 3 + ["int8"] * 3
    assert artifact.verify(steps=1)["ok"]


# --- quantization-aware scaling --------------------------------------------------------------------------------------


def test_scaled_steps_are_those_of_the_dequantised_weights(mcunet: Path) -> None:
    """q - lr g / s before rounding is r - lr g of r = s q, for weights and biases, to one part in a million."""
    rate = 0.01
    artifact = tte.compile(mcunet, update_scheme={"train": "full", "optimizer": {"lr": rate}})
    arrays = [qdq.inputs(qdq.RECIPES["mcunet"], 1)[0], np.asarray([3], np.int32)]
    graph = artifact.compiled.gradients
    real = dict(zip((p.name for p in graph.params), evaluate(graph, arrays).outputs[1:], strict=True))
    for name, step in _steps_before_rounding(artifact, arrays).items():
        param = next(p for p in graph.params if p.name == name)
        assert param.type.quant is not None
        scale = np.asarray(param.type.quant.scale).reshape(-1, *[1] * (param.type.rank - 1))
        expected = -rate * real[name]
        assert np.linalg.norm(step * scale - expected) <= 1e-6 * np.linalg.norm(expected) > 0, name


def test_scaled_gradients_have_the_ratio_of_the_float_network(mcunet: Path) -> None:
    """log10 of weights over steps, per tensor: the two curves coincide with scaling, and are far apart without."""
    xs = qdq.inputs(qdq.RECIPES["mcunet"], 24)
    curves = qas.measure(lower(mcunet), [[x, np.asarray([i % 10], np.int32)] for i, x in enumerate(xs)])
    reference = curves.pop("float")
    largest = {k: max(abs(v - reference[n]) for n, v in curve.items()) for k, curve in curves.items()}
    assert len(reference) == 40
    assert largest["int8, scaled gradients"] < 0.1 and largest["int8"] > 5
