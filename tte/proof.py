"""Holds a compiled model against the oracle, tensor by tensor: what ``tte verify`` prints."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tte.errors import TTEError
from tte.ir import OPS, Graph, Node, Param, evaluate
from tte.oracle import Forward, backpropagate, follow, prepare_input, run_graph, run_integers, run_module
from tte.passes.optimizer import DEAD, attach_sgd
from tte.passes.quantized import Settings, lower_qdq
from tte.runner.board import require_ok, unpack_state
from tte.runner.train import Data, check_data, load_data
from tte.scheme import InputFormat
from tte.weights import export_weights

if TYPE_CHECKING:
    from tte.artifact import Artifact


def prove(artifact: "Artifact", steps: int, data: Any, tolerance: float) -> dict[str, Any]:
    """Compare with torch.autograd and torch.optim.SGD on the user's model in double precision.

    Of every tensor that learns: the gradient of the first step, computed by the compiled graph, and the values after
    ``steps`` steps of the generated C on this computer. Errors are relative, in the Euclidean norm over the elements
    that learn: |ours - torch| / |torch|. Losses are compared one by one.
    data: path or mapping with x and y; made up when None. Returns {"ok", "tensors": [...], "losses": {...}, ...}.

    A quantised model is compared step by step, each from the weights that the generated C has then: what is rounded
    differently once would change all that follows. The error of integers is that of the first step before rounding;
    and none may ever be further than one from where the oracle's step, not rounded, ends ("apart", the largest such
    distance; "different": how many integers, of all steps, the oracle's own gradient would have rounded elsewhere).
    """
    compiled, build, scheme = artifact.compiled, artifact.build, artifact.scheme
    if data is None:
        samples = _make_up(artifact, steps)
    else:
        samples = check_data(data, build, "data") if isinstance(data, dict) else load_data(Path(data), build)
    pairs = [_sample(samples, i % len(samples)) for i in range(steps)]
    params = [p for p, _ in compiled.train.graph.updates]
    last = compiled.source.producer().get(compiled.source.outputs[0].name)
    ends_in_softmax = last is not None and last.op == "nn.softmax"
    if any(node.op.startswith("qnn.") for node in compiled.forward.nodes):
        return _prove_integers(artifact, pairs, params, ends_in_softmax, tolerance)
    # A new head is only there after the passes that prepare the model for it, and its input; see ``_open``.
    format = InputFormat() if artifact.module is None and scheme.head is not None else scheme.io.input
    forward, tensors = _open(artifact)
    _insert_new_layers(params, tensors, compiled.originals)
    theirs = follow(
        forward,
        tensors,
        _masks(params),
        scheme.loss,
        rate=scheme.optimizer.lr,
        clip=artifact.scheme.optimizer.clip_loss_grad,
        samples=[(prepare_input(x, format), y) for x, y in pairs],
        ends_in_softmax=ends_in_softmax,
    )
    gradients = _user_gradients(compiled.gradients, pairs[0])
    losses, states = _train(artifact, pairs)
    origins = {p.name: p.origin for p in params if p.origin}
    values = export_weights(states[-1], {p.name: p.data for p in params}, origins, compiled.originals)
    rows = []
    for name, mask in _masks(params).items():
        gradient = _error(gradients[name][mask], theirs.gradients[name][mask])
        value = _error(values[name][mask], theirs.values[name][mask])
        rows.append(
            {
                "name": name,
                "elements": int(mask.sum()),
                "gradient_error": gradient,
                "weight_error": value,
                "ok": gradient <= tolerance and value <= tolerance,
            }
        )
    oracle = "torch module" if artifact.module is not None else "torch interpretation of the imported graph"
    return _summarise(oracle, tolerance, losses, theirs.losses, rows)


def _summarise(
    oracle: str, tolerance: float, ours: list[float], theirs: list[float], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    loss_error = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))
    return {
        "ok": all(row["ok"] for row in rows) and loss_error <= tolerance,
        "oracle": oracle,
        "steps": len(ours),
        "tolerance": tolerance,
        "loss_error": loss_error,
        "losses": {"tte": ours, "torch": theirs},
        "tensors": rows,
    }


def _prove_integers(
    artifact: "Artifact",
    pairs: Sequence[tuple[np.ndarray, np.ndarray | None]],
    params: Sequence[Param],
    ends_in_softmax: bool,
    tolerance: float,
) -> dict[str, Any]:
    """``prove`` for a quantised model; the user's numbers are integers where the user's tensor holds integers."""
    import torch

    compiled, scheme = artifact.compiled, artifact.scheme
    quantized, optimizer = scheme.quantized, scheme.optimizer
    source = lower_qdq(compiled.source, Settings(quantized.requantize))
    forward = run_integers(source, compiled.originals, quantized.weight_storage == "int16_ef")
    masks = _masks(params)
    inputs = _inputs(compiled.gradients, pairs[0])
    gradients = dict(zip(params, evaluate(compiled.gradients, inputs).outputs[1:], strict=True))
    steps = _steps_before_rounding(artifact, inputs)
    losses, states = _train(artifact, pairs)
    readers = {v.name: node for node in compiled.forward.nodes for v in node.inputs}
    rows: dict[str, dict[str, Any]] = {}
    theirs = []
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
                scale = 1.0 if param.type.quant is None else _rows(param, param.type.quant.scale)
                row["gradient_error"] = _error(gradients[param] * scale, gradient)
                row["weight_error"] = _error(steps[param.name], step)
                row["apart"], row["different"] = 0.0, 0
            if param.type.dtype == "float32":
                row["weight_error"] = max(row["weight_error"], _error(after, before + step))
                continue
            unit = 256 if param.type.dtype == "int16" else 1
            limits = np.iinfo(before.dtype)
            expected = np.clip(before + step * unit, limits.min, limits.max)
            row["apart"] = max(row["apart"], float(np.abs(after - expected).max()))
            one = np.float32(1.0)
            rounded = OPS["qnn.sgd"].ref(
                before, -step.astype(np.float32), one, one, rounding=quantized.rounding, limit=2**31 - 1
            )
            row["different"] += int((rounded != after).sum())
    for row in rows.values():
        close = row["gradient_error"] <= tolerance and row["weight_error"] <= tolerance
        row["ok"] = close and row["apart"] <= 1 + tolerance
    oracle = "torch, straight through the integers of the imported graph"
    return _summarise(oracle, tolerance, losses, theirs, list(rows.values()))


def _steps_before_rounding(artifact: "Artifact", inputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What the compiled program takes from each stored number, in units of that number, before it rounds."""
    compiled, scheme = artifact.compiled, artifact.scheme
    rate = np.float32(scheme.optimizer.lr)
    graph = attach_sgd(compiled.gradients, scheme.optimizer.lr, scheme.quantized.qas, scheme.quantized.rounding)
    producer = graph.producer()
    operands = {p.name: (producer[v.name].inputs[1], producer[v.name].inputs[3:]) for p, v in graph.updates}
    results = evaluate(replace(graph, outputs=tuple(g for g, _ in operands.values()), updates=()), inputs).outputs
    steps = {}
    for (name, (_, factor)), gradient in zip(operands.items(), results, strict=True):
        steps[name] = -rate * gradient * (factor[0].data if factor else np.float32(1.0))  # type: ignore[attr-defined]
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


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|; where theirs is zero, 0 for equal and infinity for different."""
    difference = float(np.linalg.norm(ours.astype(np.float64) - theirs))
    size = float(np.linalg.norm(theirs))
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))


def _open(artifact: "Artifact") -> tuple[Forward, dict[str, np.ndarray]]:
    compiled = artifact.compiled
    if artifact.module is not None:
        return run_module(artifact.module)
    return run_graph(compiled.imported if artifact.scheme.head is None else compiled.source, compiled.originals)


def _insert_new_layers(
    params: Sequence[Param], tensors: dict[str, np.ndarray], originals: dict[str, np.ndarray]
) -> None:
    """A replaced head has another shape than the user's tensor of that name: it begins as the scheme says."""
    for param in params:
        if param.origin is None:
            raise TTEError(
                "TTE-E070",
                f"{param.name} is not a tensor of the model, so PyTorch cannot judge it",
                where=f"parameter {param.name}",
                fix="freeze it, or give the layer an explicit bias",
            )
        if tensors[param.origin.name].shape != param.origin.shape:
            tensors[param.origin.name] = originals[param.origin.name]


def _masks(params: Sequence[Param]) -> dict[str, np.ndarray]:
    """User's name -> which elements of that tensor learn."""
    masks: dict[str, np.ndarray] = {}
    for param in params:
        assert param.origin is not None
        mask = masks.setdefault(param.origin.name, np.zeros(param.origin.shape, bool))
        mask.reshape(-1)[param.origin.index] = True
    return masks


def _user_gradients(graph: Graph, sample: tuple[np.ndarray, np.ndarray | None]) -> dict[str, np.ndarray]:
    """Gradients of the compiled graph, as gradients of the user's tensors: dL/du = scale * dL/dw."""
    results = evaluate(graph, _inputs(graph, sample)).outputs[1:]
    gradients: dict[str, np.ndarray] = {}
    for param, gradient in zip(graph.params, results, strict=True):
        origin = param.origin
        assert origin is not None
        user = gradients.setdefault(origin.name, np.zeros(origin.shape))
        user.reshape(-1)[origin.index] = gradient if origin.scale is None else gradient * origin.scale
    return gradients


def _inputs(graph: Graph, sample: tuple[np.ndarray, np.ndarray | None]) -> list[np.ndarray]:
    arrays = [sample[0], *([] if len(graph.inputs) == 1 else [np.asarray(sample[1])])]
    return [a.reshape(v.type.shape) for a, v in zip(arrays, graph.inputs, strict=True)]


def _train(
    artifact: "Artifact", pairs: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> tuple[list[float], list[dict[str, np.ndarray]]]:
    """Losses of the generated C, and all that learns: before the first step, and after each."""
    board = artifact.host()
    losses = []
    states = [unpack_state(board.save_state(), board.build)]
    for i, (x, y) in enumerate(pairs):
        step = board.train_step(x, y)
        require_ok(step.status, f"training step {i}")
        losses.append(step.loss)
        states.append(unpack_state(board.save_state(), board.build))
    return losses, states


def _make_up(artifact: "Artifact", count: int) -> Data:
    """Normal inputs (uniform ones for integers), targets drawn evenly; seeded."""
    build = artifact.build
    rng = np.random.default_rng(0)
    shape = (count, *build.input.shape[1:])
    if build.input.dtype == np.float32:
        x = rng.standard_normal(shape).astype(np.float32)
    else:
        limits = np.iinfo(build.input.dtype)
        x = rng.integers(limits.min, limits.max, shape, endpoint=True).astype(build.input.dtype)
    if build.target is None:
        return Data(x, None)
    if build.classes:
        return Data(x, rng.integers(0, build.classes, (count, build.target.size)).astype(np.int32))
    y = rng.standard_normal((count, build.target.size)).astype(np.float32)
    return Data(x, (y > 0).astype(np.float32) if artifact.scheme.loss.name == "bce_with_logits" else y)


def _sample(data: Data, i: int) -> tuple[np.ndarray, np.ndarray | None]:
    """One sample with its batch dimension."""
    return data.x[i : i + 1], None if data.y is None else data.y[i : i + 1]
