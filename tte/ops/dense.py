"""Matrix products: the fully connected layer and the general product its gradients need."""

import math

import numpy as np

from tte.ir import Op, TensorType, register
from tte.ops.rules import read_numbers, require, require_float, require_numbers, require_rank


def _dense(x: TensorType, w: TensorType, b: TensorType | None = None) -> TensorType:
    """y[..., o] = b[o] + sum_i x[..., i] * w[o, i];  x: (..., I), w: (O, I), b: (O,). As torch.nn.functional.linear."""
    require_float(x=x, w=w, b=b)
    return dense_type(x, w, b)


def dense_type(x: TensorType, w: TensorType, b: TensorType | None) -> TensorType:
    """The result's type, whatever the elements are."""
    require(x.rank >= 1, "x must have at least one dimension")
    require_rank("w", w, 2)
    require(x.shape[-1] == w.shape[1], f"x has {x.shape[-1]} features, w expects {w.shape[1]}")
    require(b is None or b.shape == (w.shape[0],), f"the bias must have shape ({w.shape[0]},)")
    return x.with_shape((*x.shape[:-1], w.shape[0]))


def dense_ref(x, w, b=None):  # type: ignore[no-untyped-def]
    y = x @ w.T
    return y if b is None else y + b


def _dense_grad(backward, dy, x, w, b=None):  # type: ignore[no-untyped-def]
    dx, dw, db = dense_gradients(backward, dy, x, w, b)
    return (dx, dw) if b is None else (dx, dw, db)


def dense_gradients(backward, dy, x, w, b, zero_point=0):  # type: ignore[no-untyped-def]
    """Of x, w and b, each None unless it is wanted; zero_point: what stands for 0 in an integer x."""
    rows = math.prod(x.type.shape[:-1])
    flat = dy if dy.type.rank == 2 else backward.call("reshape", dy, newshape=(rows, w.type.shape[0]))
    dx = dw = db = None
    if backward.wants(0):
        dx = backward.call("matmul", flat, w)
        if dx.type.shape != x.type.shape:
            dx = backward.call("reshape", dx, newshape=x.type.shape)
    if backward.wants(1):
        x2 = x if x.type.rank == 2 else backward.call("reshape", x, newshape=(rows, w.type.shape[1]))
        part = backward.wanted(1)
        if getattr(part, "axis", None) == 1:
            x2 = backward.call("slice", x2, begin=(0, part.start), end=(rows, part.stop), strides=(1, 1))
        dw = backward.call("matmul", flat, x2, transpose_a=True, zero_point=zero_point)
    if b is not None and backward.wants(2):
        db = backward.call("sum", flat, axis=(0,))
    return dx, dw, db


def dense_macs(x, w, b=None):  # type: ignore[no-untyped-def]
    return x.size * w.shape[0]


register(Op("nn.dense", _dense, dense_ref, _dense_grad, kind="anchor", macs=dense_macs))


def _matmul(
    a: TensorType, b: TensorType, *, transpose_a: bool = False, transpose_b: bool = False, zero_point: int = 0
) -> TensorType:
    """y[..., m, n] = sum_k a[..., m, k] * b[..., k, n]; transpose_a / _b: the operand is stored (K, M) / (N, K).

    a: (..., M, K); b: (..., K, N) with the same leading dimensions, or of rank 2. b may be stored integers (see
    ``read_numbers``), an int8 b counts from zero_point.
    """
    require_float(a=a)
    require_numbers(b=b)
    return matmul_type(a, b, transpose_a=transpose_a, transpose_b=transpose_b, zero_point=zero_point)


def matmul_type(a: TensorType, b: TensorType, *, transpose_a: bool, transpose_b: bool, zero_point: int) -> TensorType:
    """The result's type, whatever the elements are."""
    require(a.rank >= 2 and b.rank >= 2, f"both operands need rank 2 or more, not {a.shape} and {b.shape}")
    require(zero_point == 0 or b.dtype == "int8", "a zero point belongs to integers")
    require(b.rank == 2 or a.shape[:-2] == b.shape[:-2], f"leading dimensions of {a.shape} and {b.shape} differ")
    m, k = a.shape[:-3:-1] if transpose_a else a.shape[-2:]
    kb, n = b.shape[:-3:-1] if transpose_b else b.shape[-2:]
    require(k == kb, f"the products sum over {k} and {kb} elements")
    return a.with_shape((*a.shape[:-2], m, n))


def _swap(x: np.ndarray, transposed: bool) -> np.ndarray:
    return x.swapaxes(-1, -2) if transposed else x


def matmul_ref(a, b, *, transpose_a, transpose_b, zero_point):  # type: ignore[no-untyped-def]
    b = read_numbers(b, a.dtype, zero_point)
    return np.ascontiguousarray(_swap(a, transpose_a) @ _swap(b, transpose_b))


def _matmul_grad(backward, dy, a, b, *, transpose_a, transpose_b, zero_point):  # type: ignore[no-untyped-def]
    da = db = None
    if backward.wants(0):
        if transpose_a:  # a is (K, M): da = B dy^T
            da = _product(backward, b, dy, transpose_b, True)
        else:
            da = _product(backward, dy, b, False, not transpose_b)
    if backward.wants(1):
        if b.type.rank < a.type.rank:  # one b for all rows: fold the leading dimensions into M
            a, dy = _fold(backward, a, transpose_a), _fold(backward, dy, False)
            transpose_a = False
        if transpose_b:  # b is (N, K): db = dy^T A
            db = _product(backward, dy, a, True, transpose_a)
        else:
            db = _product(backward, a, dy, not transpose_a, False)
    return da, db


def _product(backward, a, b, transpose_a, transpose_b):  # type: ignore[no-untyped-def]
    if b.type.rank > 2 and a.type.rank == 2:
        a = backward.call("broadcast_to", a, shape=(*b.type.shape[:-2], *a.type.shape))
    return backward.call("matmul", a, b, transpose_a=transpose_a, transpose_b=transpose_b)


def _fold(backward, x, transposed):  # type: ignore[no-untyped-def]
    if transposed:
        axes = (*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2)
        x = backward.call("transpose", x, axes=axes)
    return backward.call("reshape", x, newshape=(math.prod(x.type.shape[:-1]), x.type.shape[-1]))


def matmul_macs(a, b, *, transpose_b, **attrs):  # type: ignore[no-untyped-def]
    return a.size * (b.shape[-2] if transpose_b else b.shape[-1])


register(Op("matmul", _matmul, matmul_ref, _matmul_grad, kind="anchor", macs=matmul_macs))
