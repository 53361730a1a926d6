"""Losses: a scalar from a prediction and a target, and its gradient with respect to the prediction."""

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
