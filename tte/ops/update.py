"""Optimizer steps."""

from tte.ir import Op, TensorType, register
from tte.ops.rules import require, require_float


def _sgd(w: TensorType, g: TensorType, rate: TensorType) -> TensorType:
    """w - rate * g, rounded once; rate: a scalar"""
    require_float(w=w, g=g, rate=rate)
    require(w.shape == g.shape and rate.shape == (), f"w {w.shape} and g {g.shape} must agree, rate be a scalar")
    return w


def _sgd_ref(w, g, rate):  # type: ignore[no-untyped-def]
    # The product of two float32 is exact in float64: one rounding to 53 bits, one to 24. C rounds once (fmaf).
    return (w.astype("float64") - rate.astype("float64") * g.astype("float64")).astype(w.dtype)


register(Op("nn.sgd", _sgd, _sgd_ref, kind="elementwise", inplace=(0,)))
