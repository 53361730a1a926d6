"""Losses: a scalar from a prediction and a target, and its gradient with respect to the prediction."""

import math

import numpy as np

from tte.ir import Op, TensorType, register
from tte.ops.rules import require, require_float

# --- cross entropy ---------------------------------------------------------------------------------------------------


def _cross_entropy(
    logits: TensorType,
    label: TensorType,
    weights: TensorType | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> TensorType:
    """-sum_c q[c] w[c] log softmax(logits)[c], q = (1 - s) onehot(label) + s / C (torch.nn.functional.cross_entropy).

    logits: (..., C), label: int32 (...), weights: (C,). reduction "mean" divides by the sum of the labels' weights.
    """
    _require_classes(logits, label, weights, label_smoothing, reduction)
    return TensorType(())


def _require_classes(logits, label, weights, label_smoothing, reduction):  # type: ignore[no-untyped-def]
    require_float(logits=logits, weights=weights)
    require(logits.rank >= 1, "logits need a last axis of classes")
    fits = label.dtype == "int32" and label.shape == logits.shape[:-1]
    require(fits, f"labels must be int32 of shape {logits.shape[:-1]}, not {label}")
    require(weights is None or weights.shape == logits.shape[-1:], "needs one weight per class")
    require(0 <= label_smoothing < 1, f"label_smoothing must be in [0, 1), it is {label_smoothing}")
    require(reduction in ("mean", "sum"), f'reduction must be "mean" or "sum", not {reduction!r}')


def _targets(x, label, weights, label_smoothing):  # type: ignore[no-untyped-def]
    """Weighted target distribution (rows, C), and the weight of each label (rows,)."""
    classes = x.shape[-1]
    w = np.ones(classes, x.dtype) if weights is None else weights.astype(x.dtype)
    onehot = np.eye(classes, dtype=x.dtype)[label.reshape(-1)]
    smooth = x.dtype.type(label_smoothing)
    q = onehot * (1 - smooth) + smooth / classes
    return q * w, w[label.reshape(-1)]


def _cross_entropy_ref(x, label, weights=None, *, label_smoothing, reduction):  # type: ignore[no-untyped-def]
    rows = x.reshape(-1, x.shape[-1])
    z = rows - rows.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    q, w = _targets(x, label, weights, label_smoothing)
    loss = -(q * log_p).sum()
    return np.asarray(loss / w.sum() if reduction == "mean" else loss, x.dtype)


def _cross_entropy_rule(backward, dy, x, label, weights=None, **attrs):  # type: ignore[no-untyped-def]
    operands = (x, label) if weights is None else (x, label, weights)
    g = backward.call("nn.cross_entropy_grad", *operands, **attrs) if backward.wants(0) else None
    return (g, None) if weights is None else (g, None, None)


register(Op("nn.cross_entropy", _cross_entropy, _cross_entropy_ref, _cross_entropy_rule))


def _cross_entropy_grad(
    logits: TensorType,
    label: TensorType,
    weights: TensorType | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> TensorType:
    """softmax(logits) * sum_c q[c] w[c] - q w, divided as the loss is"""
    _require_classes(logits, label, weights, label_smoothing, reduction)
    return logits


def _cross_entropy_grad_ref(x, label, weights=None, *, label_smoothing, reduction):  # type: ignore[no-untyped-def]
    rows = x.reshape(-1, x.shape[-1])
    e = np.exp(rows - rows.max(-1, keepdims=True))
    q, w = _targets(x, label, weights, label_smoothing)
    if label_smoothing:
        g = e / e.sum(-1, keepdims=True) * q.sum(-1, keepdims=True) - q
    else:  # softmax - 1 at the label is minus what the others have: nothing cancels
        others = np.where(q > 0, 0, e).sum(-1, keepdims=True)
        g = np.where(q > 0, -others, e) / e.sum(-1, keepdims=True) * w[:, None]
    return (g / w.sum() if reduction == "mean" else g).reshape(x.shape)


register(Op("nn.cross_entropy_grad", _cross_entropy_grad, _cross_entropy_grad_ref))


# --- cross entropy of int8 logits, without floats --------------------------------------------------------------------

FRACTION = 30  # bits of fraction of exponentials, and of gradients
LOG_BITS = 24  # of logarithms, and of losses before they become floats
COARSEST = 1024  # scale of logits
LN2 = round(math.log(2) * 2**FRACTION)


def exponentials(scale: float) -> np.ndarray:
    """exp(-scale * 2^k) for k = 0 .. 7, in 2^-30: of these factors every exp(-scale * z) is made, 0 <= z < 256."""
    factors: np.ndarray = np.rint(np.exp(-scale * 2.0 ** np.arange(8)) * 2.0**FRACTION).astype(np.int32)
    return factors


def _require_logits(q: TensorType, label: TensorType, factors: TensorType) -> None:
    require(q.dtype == "int8" and q.rank >= 1, f"logits must be int8 with a last axis of classes, not {q}")
    fits = label.dtype == "int32" and label.shape == q.shape[:-1]
    require(fits, f"labels must be int32 of shape {q.shape[:-1]}, not {label}")
    require(factors == TensorType((8,), "int32"), f"factors must be int32 (8,), not {factors}")


def _softmax_of_integers(q: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(z, e, sum) of each row: how far below the largest, exp(-scale * z) in 2^-30, and their sum."""
    rows = q.reshape(-1, q.shape[-1]).astype(np.int64)
    z = rows.max(-1, keepdims=True) - rows
    e = np.full(z.shape, 1 << FRACTION, np.int64)
    for k, factor in enumerate(factors.astype(np.int64)):
        e = np.where(z >> k & 1, (e * factor + (1 << FRACTION - 1)) >> FRACTION, e)
    return z, e, e.sum(-1, keepdims=True)


def _integer_cross_entropy(
    q: TensorType, label: TensorType, factors: TensorType, *, scale: float, reduction: str = "mean"
) -> TensorType:
    """nn.cross_entropy of the logits scale * q, within 2e-7 (and what a float32 loses). factors: ``exponentials``

    The logarithm to base 2 is found bit by bit: a number is squared, and is halved where it passes 2.
    """
    _require_logits(q, label, factors)
    require(0 < scale < COARSEST, f"the scale must be positive and below {COARSEST}, not {scale}")
    require(reduction in ("mean", "sum"), f'reduction must be "mean" or "sum", not {reduction!r}')
    return TensorType(())


def _integer_cross_entropy_ref(q, label, factors, *, scale, reduction):  # type: ignore[no-untyped-def]
    z, _, sums = _softmax_of_integers(q, factors)
    total = 0
    for row, at, s in zip(z.tolist(), label.reshape(-1).tolist(), sums.reshape(-1).tolist(), strict=True):
        whole = s.bit_length() - 1 - FRACTION
        x, log = s >> whole, whole
        for _ in range(LOG_BITS):
            x = x * x >> FRACTION
            log = log << 1 | x >> (FRACTION + 1)
            x >>= x >> (FRACTION + 1)
        total += (row[at] * round(scale * 2**36) >> 36 - LOG_BITS) + (log * LN2 >> FRACTION)
    loss = np.ldexp(np.float64(total), -LOG_BITS).astype(np.float32)
    share = np.float32(1 / len(z) if reduction == "mean" else 1)
    return np.asarray(loss.astype(np.float64) * share.astype(np.float64), np.float32)


register(Op("qnn.integer_cross_entropy", _integer_cross_entropy, _integer_cross_entropy_ref))


def _integer_cross_entropy_grad(q: TensorType, label: TensorType, factors: TensorType) -> TensorType:
    """softmax(scale * q) - onehot(label) of each row in 2^-30, each within 2^-27: int32.

    But at the label it is minus the sum of the others, with what they are off by.
    """
    _require_logits(q, label, factors)
    return TensorType(q.shape, "int32")


def _integer_cross_entropy_grad_ref(q, label, factors):  # type: ignore[no-untyped-def]
    _, e, sums = _softmax_of_integers(q, factors)
    shift = np.asarray([[s.bit_length() - 1 - FRACTION] for s in sums.reshape(-1).tolist()])
    p = e * ((1 << 2 * FRACTION + 1) // (sums >> shift)) >> (shift + (FRACTION + 1))
    np.put_along_axis(p, label.reshape(-1, 1).astype(np.int64), 0, -1)
    np.put_along_axis(p, label.reshape(-1, 1).astype(np.int64), -p.sum(-1, keepdims=True), -1)
    return p.astype(np.int32).reshape(q.shape)


register(Op("qnn.integer_cross_entropy_grad", _integer_cross_entropy_grad, _integer_cross_entropy_grad_ref))


# --- losses that sum a function of prediction and target over elements -----------------------------------------------


def _require_match(prediction: TensorType, target: TensorType, reduction: str) -> None:
    require_float(prediction=prediction, target=target)
    require(prediction.shape == target.shape, f"prediction {prediction.shape} and target {target.shape} differ")
    require(reduction in ("mean", "sum"), f'reduction must be "mean" or "sum", not {reduction!r}')


def _pointwise(prediction: TensorType, target: TensorType, *, reduction: str = "mean") -> TensorType:
    """Mean or sum over all elements, as torch.nn.functional.mse_loss, l1_loss, binary_cross_entropy_with_logits"""
    _require_match(prediction, target, reduction)
    return TensorType(())


def _pointwise_grad(prediction: TensorType, target: TensorType, *, reduction: str = "mean") -> TensorType:
    """Gradient of the loss with respect to the prediction."""
    _require_match(prediction, target, reduction)
    return prediction


def _huber(prediction: TensorType, target: TensorType, *, delta: float = 1.0, reduction: str = "mean") -> TensorType:
    """d^2 / 2 where |d| < delta, else delta (|d| - delta / 2) (torch.nn.functional.huber_loss)"""
    require(delta > 0, f"delta must be positive, it is {delta}")
    return _pointwise(prediction, target, reduction=reduction)


def _huber_grad(
    prediction: TensorType, target: TensorType, *, delta: float = 1.0, reduction: str = "mean"
) -> TensorType:
    """Gradient of the loss with respect to the prediction."""
    require(delta > 0, f"delta must be positive, it is {delta}")
    return _pointwise_grad(prediction, target, reduction=reduction)


def _register(name, value, slope, infer=_pointwise, infer_grad=_pointwise_grad):  # type: ignore[no-untyped-def]
    """value(x, t), slope(x, t): the loss of an element and its derivative in x."""

    def ref(x, t, *, reduction, **attrs):  # type: ignore[no-untyped-def]
        total = value(x, t, **attrs)
        return np.asarray(total.mean() if reduction == "mean" else total.sum(), x.dtype)

    def ref_grad(x, t, *, reduction, **attrs):  # type: ignore[no-untyped-def]
        g = slope(x, t, **attrs).astype(x.dtype)
        return g / x.dtype.type(x.size) if reduction == "mean" else g

    def rule(backward, dy, x, t, **attrs):  # type: ignore[no-untyped-def]
        return backward.call(f"{name}_grad", x, t, **attrs) if backward.wants(0) else None, None

    register(Op(name, infer, ref, rule))
    register(Op(f"{name}_grad", infer_grad, ref_grad))


def _huber_value(x, t, delta):  # type: ignore[no-untyped-def]
    d = np.abs(x - t)
    return np.where(d < delta, d * d / 2, delta * (d - delta / 2)).astype(x.dtype)


def _bce_value(x, t):  # type: ignore[no-untyped-def]
    return np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))


_register("nn.mse", lambda x, t: (x - t) ** 2, lambda x, t: 2 * (x - t))
_register("nn.l1", lambda x, t: np.abs(x - t), lambda x, t: np.sign(x - t))
_register("nn.huber", _huber_value, lambda x, t, delta: np.clip(x - t, -delta, delta), _huber, _huber_grad)
_register("nn.bce_with_logits", _bce_value, lambda x, t: 1 / (1 + np.exp(-x)) - t)
