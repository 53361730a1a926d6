"""Holds a compiled quantised model against the oracle: what ``tte verify`` prints of integers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tte.ir import OPS, Node, Param, evaluate
from tte.ops.quantized import DEAD
from tte.oracle import backpropagate, run_integers
from tte.passes.loss import skip_last_rounding
from tte.passes.optimizer import attach_sgd, step_size
from tte.passes.quantized import Settings, lower_qdq
from tte.proof import SMALL_LOSS, _masks
from tte.runner.board import Board, require_ok, unpack_state

if TYPE_CHECKING:
    from tte.artifact import Artifact

LARGE = 60.0  # units: most weights stay inside of int8


def prove_integers(
    artifact: "Artifact",
    pairs: Sequence[tuple[np.ndarray, np.ndarray | None]],
    params: Sequence[Param],
    ends_in_softmax: bool,
    tolerance: float,
) -> dict[str, Any]:
    """``prove`` for a quantised model: step by step, each from the weights that the generated C has then, because what
    is rounded differently once changes all that follows.

    Of integers, gradient_error and weight_error are those of the first step before rounding, as the compiled graph
    computes it. apart: how far an integer of the generated C ended from where the oracle's step, not rounded, ends; the
    largest of all steps, and of one more for each tensor, so large that it shows the gradient. different: how many
    integers, of all steps, the oracle's own gradient would have rounded elsewhere.
    """
    import torch

    compiled, scheme = artifact.compiled, artifact.scheme
    quantized, optimizer = scheme.quantized, scheme.optimizer
    source = lower_qdq(compiled.source, Settings(quantized.requantize))
    if scheme.loss.name == "cross_entropy":
        source = skip_last_rounding(source)
    forward = run_integers(source, compiled.originals, quantized.weight_storage == "int16_ef")
    masks = _masks(params)
    given = [pairs[0][0], *([] if len(compiled.gradients.inputs) == 1 else [np.asarray(pairs[0][1])])]
    inputs = [a.reshape(v.type.shape) for a, v in zip(given, compiled.gradients.inputs, strict=True)]
    gradients = dict(zip(params, evaluate(compiled.gradients, inputs).outputs[1:], strict=True))
    steps = _steps_before_rounding(artifact, inputs)
    board = artifact.host()
    losses: list[float] = []
    states = [unpack_state(board.save_state(), board.build)]
    for i, (x, y) in enumerate(pairs):
        taken = board.train_step(x, y)
        require_ok(taken.status, f"training step {i}")
        losses.append(taken.loss)
        states.append(unpack_state(board.save_state(), board.build))
    readers = {v.name: node for node in compiled.forward.nodes for v in node.inputs}
    rows: dict[str, dict[str, Any]] = {}
    theirs: list[float] = []
    firsts: dict[str, np.ndarray] = {}
    for i, (x, y) in enumerate(pairs):
        numbers = _user_numbers(params, states[i], compiled.originals)
        values = {name: torch.from_numpy(a).requires_grad_(name in masks) for name, a in numbers.items()}
        clip = optimizer.clip_loss_grad
        theirs.append(backpropagate(forward, values, masks, scheme.loss, x, y, clip, ends_in_softmax))
        for param in params:
            origin, before, after = param.origin, states[i][param.name], states[i + 1][param.name]
            assert origin is not None
            gradient = values[origin.name].grad.numpy().reshape(-1)[origin.index] / _nonzero(origin.scale)
            step = -optimizer.lr * _step_factor(param, readers[param.name], quantized.qas) * gradient
            row = rows.setdefault(param.name, {"name": origin.name, "elements": param.type.size})
            if i == 0:
                firsts[param.name] = step
                scale = 1.0 if param.type.quant is None else _rows(param, param.type.quant.scale)
                row["gradient_error"] = _error(gradients[param] * scale, gradient)
                row["weight_error"] = _error(steps[param.name], step)
                row["apart"], row["different"] = 0.0, 0
            if param.type.dtype == "float32":
                row["weight_error"] = max(row["weight_error"], _error(after, before + step))
                continue
            row["apart"] = max(row["apart"], _distance(before, after, step))
            one = np.float32(1.0)
            rounded = OPS["qnn.sgd"].ref(
                before, -step.astype(np.float32), one, one, one, power=0, rounding=quantized.rounding, limit=2**31 - 1
            )
            row["different"] += int((rounded != after).sum())
    for param in params:
        if param.type.dtype != "float32":
            row = rows[param.name]
            row["apart"] = max(row["apart"], _take_large_step(board, param, pairs[0], optimizer.lr, firsts[param.name]))
    for row in rows.values():
        close = row["gradient_error"] <= tolerance and row["weight_error"] <= tolerance
        row["ok"] = close and row["apart"] <= 1 + LARGE * tolerance
    ours, torchs = np.asarray(losses), np.asarray(theirs)
    loss_error = float(np.max(np.abs(ours - torchs) / np.maximum(np.abs(torchs), SMALL_LOSS)))  # a NaN stays one
    return {
        "ok": all(row["ok"] for row in rows.values()) and loss_error <= tolerance,
        "oracle": "torch, straight through the integers of the prepared graph",
        "steps": len(losses),
        "tolerance": tolerance,
        "loss_error": loss_error,
        "losses": {"tte": losses, "torch": theirs},
        "tensors": list(rows.values()),
    }


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|; where theirs is zero, 0 for equal and infinity for different."""
    difference = float(np.linalg.norm(ours.astype(np.float64) - theirs))
    size = float(np.linalg.norm(theirs))
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def _take_large_step(
    board: Board, param: Param, pair: tuple[np.ndarray, np.ndarray | None], lr: float, step: np.ndarray
) -> float:
    """How far the integers end from the oracle's step when the rate makes the largest one LARGE."""
    largest = float(np.abs(step).max())
    if largest == 0:
        return 0.0
    require_ok(board.reset_state(), "reset")
    board.set_learning_rate(lr * LARGE / largest)
    require_ok(board.train_step(*pair).status, "training step")
    after = unpack_state(board.save_state(), board.build)[param.name]
    return _distance(param.data, after, step * (LARGE / largest))


def _distance(before: np.ndarray, after: np.ndarray, step: np.ndarray) -> float:
    """The largest distance of an integer from where its step ends, saturated; int16 counts in 256ths."""
    limits = np.iinfo(before.dtype)
    unit = 256 if before.dtype == np.int16 else 1
    return float(np.abs(after - np.clip(before + step * unit, limits.min, limits.max)).max())


def _steps_before_rounding(artifact: "Artifact", inputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What the compiled program takes from each stored number, in units of that number, before it rounds."""
    compiled, scheme = artifact.compiled, artifact.scheme
    rate = np.float32(scheme.optimizer.lr)
    graph = attach_sgd(compiled.gradients, scheme.optimizer.lr, scheme.quantized.qas, scheme.quantized.rounding)
    producer = graph.producer()
    operands = {p.name: (producer[v.name].inputs[1], producer[v.name]) for p, v in graph.updates}
    results = evaluate(replace(graph, outputs=tuple(g for g, _ in operands.values()), updates=()), inputs).outputs
    steps = {}
    for (name, (_, node)), gradient in zip(operands.items(), results, strict=True):
        steps[name] = -step_size(node, rate) * gradient
    return steps


def _step_factor(param: Param, reader: Node, qas: bool) -> np.ndarray | float:
    """How far a stored number n goes per unit of dL/dn: dn = -rate * factor * dL/dn.

    With n = r / s of the real number r: its own step dr = -rate * dL/dr is dn = -rate * dL/dn / s^2. Without
    quantization-aware scaling n takes the step of a number of its own. Folded weights, see ``attach_sgd``.
    """
    origin, quant = param.origin, param.type.quant
    assert origin is not None
    if quant is None:
        return 1.0 if origin.quantized is not None and qas else _nonzero(origin.scale) ** 2
    weight = reader.inputs[1].type.quant if param in reader.inputs[2:] else quant
    assert weight is not None
    scale, alive = _rows(param, quant.scale), _rows(param, weight.scale) >= DEAD
    return np.where(alive, scale**-2.0 if qas else 1.0, 0.0)


def _rows(param: Param, scale: Sequence[float]) -> np.ndarray:
    """One number per output channel, broadcast to the param."""
    return np.asarray(scale).reshape(-1, *[1] * (param.type.rank - 1))


def _nonzero(scale: np.ndarray | None) -> Any:
    """Weights that are 0 times the user's have no gradient; they need no other number than 1."""
    return 1.0 if scale is None else np.where(scale == 0, 1.0, scale)


def _user_numbers(
    params: Sequence[Param], state: Mapping[str, np.ndarray], originals: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The user's tensors as the stored numbers have them, with the fractions that rounding has not seen yet."""
    numbers = {name: array.astype(np.float64) for name, array in originals.items()}
    for param in params:
        assert param.origin is not None
        change = state[param.name].astype(np.float64) - param.data
        if param.type.dtype == "int16":
            change = change / 256 + 0.5  # they begin in the middle
        numbers[param.origin.name].reshape(-1)[param.origin.index] += change / _nonzero(param.origin.scale)
    return numbers
