"""Holds a compiled model against the oracle, tensor by tensor: what ``tte verify`` prints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tte.errors import TTEError
from tte.ir import Param
from tte.oracle import follow, prepare_input, run_graph, run_module
from tte.passes.loss import last_softmax
from tte.runner.board import require_ok, unpack_state
from tte.runner.build import Build
from tte.runner.train import Data, check_data, load_data
from tte.weights import export_weights

if TYPE_CHECKING:
    from tte.artifact import Artifact

# So huge that w - rate * g holds the digits of g alone: a step shows the gradient that the C computes.
HUGE_RATE = 2.0**40
# Below this a loss is a difference of nearly equal float32 numbers: its error is measured relative to this.
SMALL_LOSS = 1e-2
# Below this part of the largest tensor, by root mean square, a gradient is a sum of float32 numbers that cancel.
SMALL_TENSOR = 0.03


def prove(artifact: "Artifact", steps: int, data: Any, tolerance: float) -> dict[str, Any]:
    """Compare with torch.autograd and torch.optim.SGD on the user's model in double precision.

    Of every tensor that learns: the gradient of the first step (see ``_choose_steps``), and the values after ``steps``
    steps, both of the generated C on this computer. Errors are relative, in the Euclidean norm over the elements that
    learn, see ``_errors``. Losses are compared one by one, relative to at least SMALL_LOSS.
    data: path or mapping with x and y; made up when None. Returns {"ok", "tensors": [...], "losses": {...}, ...}.
    """
    if artifact.scheme.quantized.gradients != "float32":
        raise TTEError(
            "TTE-E035",
            "only float32 gradients are held against PyTorch; those of this scheme are int8",
            where=artifact.scheme.where("quantized", "gradients"),
            fix="verify the model with `gradients: float32`; docs/quantized.md says how far int8 is from that",
        )
    compiled, build = artifact.compiled, artifact.build
    if data is None:
        samples = _make_up(artifact, steps)
    else:
        samples = check_data(data, build, "data") if isinstance(data, dict) else load_data(Path(data), build)
    pairs = [_sample(samples, i % len(samples), build) for i in range(steps)]
    params = [p for p, _ in compiled.train.graph.updates]
    last = last_softmax(compiled.source)
    ends_in_softmax = last is not None and last.op == "nn.softmax"
    if any(node.op.startswith("qnn.") for node in compiled.forward.nodes):
        from tte.proof_int8 import prove_integers

        return prove_integers(artifact, pairs, params, ends_in_softmax, tolerance)
    # A new head is only there after the passes that prepare the model for it, and for the caller's format of the input.
    prepared = artifact.module is None and artifact.scheme.head is not None
    interpreted = compiled.source if prepared else compiled.imported
    forward, tensors = (
        run_module(artifact.module) if artifact.module is not None else run_graph(interpreted, compiled.originals)
    )
    judge = f"torch interpretation of the {'prepared' if prepared else 'imported'} graph"
    _require_judgeable(params)
    tensors |= {name: compiled.originals[name] for name in compiled.replaced if name in tensors}
    masks = _masks(params)
    theirs = follow(
        forward,
        tensors,
        masks,
        artifact.scheme.loss,
        rate=artifact.scheme.optimizer.lr,
        clip=artifact.scheme.optimizer.clip_loss_grad,
        samples=[(x if prepared else prepare_input(x, artifact.scheme.io.input), y) for x, y in pairs],
        ends_in_softmax=ends_in_softmax,
    )
    rate = artifact.scheme.optimizer.lr
    chosen = _choose_steps(theirs.gradients)
    gradients: dict[str, np.ndarray] = {}
    for step in set(chosen.values()):
        _, stepped = _train(artifact, pairs[: step + 1], params, [*[rate] * step, HUGE_RATE])
        for name in (name for name, s in chosen.items() if s == step):
            gradients[name] = (compiled.originals[name].astype(np.float64) - stepped[name]) / HUGE_RATE
    references = {name: theirs.gradients[step][name] for name, step in chosen.items()}
    losses, values = _train(artifact, pairs, params, [rate] * steps)
    gradient_errors = _errors(gradients, references, masks)
    weight_errors = _errors(values, theirs.values, masks, _stored_sizes(params))
    rows = [
        {
            "name": name,
            "elements": int(mask.sum()),
            "gradient_error": gradient_errors[name],
            "weight_error": weight_errors[name],
            "ok": gradient_errors[name] <= tolerance and weight_errors[name] <= tolerance,
        }
        for name, mask in masks.items()
    ]
    ours, torch = np.asarray(losses), np.asarray(theirs.losses)
    loss_error = float(np.max(np.abs(ours - torch) / np.maximum(np.abs(torch), SMALL_LOSS)))  # a NaN stays one
    return {
        "ok": all(row["ok"] for row in rows) and loss_error <= tolerance,
        "oracle": "torch module" if artifact.module is not None else judge,
        "steps": steps,
        "tolerance": tolerance,
        "loss_error": loss_error,
        "losses": {"tte": losses, "torch": theirs.losses},
        "tensors": rows,
    }


def _choose_steps(gradients: Sequence[Mapping[str, np.ndarray]]) -> dict[str, int]:
    """Of each tensor the step whose gradient is looked at: the first, but where that one is zero the one with the
    largest. Behind a head of zeros nothing has a gradient before the head has made a step."""
    chosen = {}
    for name, first in gradients[0].items():
        sizes = [float(np.linalg.norm(gradient[name])) for gradient in gradients]
        chosen[name] = int(np.argmax(sizes)) if not first.any() and np.isfinite(sizes).all() else 0
    return chosen


def _errors(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    least: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Of each tensor: |ours - theirs| / max(|theirs|, floor), over the elements that learn.

    floor: |theirs| if its elements had SMALL_TENSOR times the largest root mean square among all tensors.
    A gradient may be zero (of a bias in front of an instance norm) while the float32 numbers that are summed to it are
    as large as any: what is left is their rounding. With a tolerance of 1e-4 an error of 3e-6 times the largest
    gradient passes, 25 units in the last place; a missing gradient that is larger than that does not.
    least: sizes of tensors whose float32 form is larger than they are.
    """
    sizes = {name: _rms(theirs[name][mask]) for name, mask in masks.items()}
    floor = SMALL_TENSOR * max(sizes.values())
    errors = {}
    for name, mask in masks.items():
        difference = _rms(ours[name][mask].astype(np.float64) - theirs[name][mask])
        size = max(sizes[name], floor, (least or {}).get(name, 0.0))
        errors[name] = difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
    return errors


def _stored_sizes(params: Sequence[Param]) -> dict[str, float]:
    """Root mean square of what is stored, in the units of the user's tensor: a bias into which the mean of a batch norm
    was folded is that much larger than the user's own."""
    squares: dict[str, list[np.ndarray]] = {}
    for param in params:
        assert param.origin is not None
        scale = np.ones(1) if param.origin.scale is None else param.origin.scale
        units = np.where(scale == 0, np.inf, scale)
        squares.setdefault(param.origin.name, []).append((param.data / units).reshape(-1))
    return {name: _rms(np.concatenate(parts)) for name, parts in squares.items()}


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array**2)))


def _require_judgeable(params: Sequence[Param]) -> None:
    for param in params:
        if param.origin is None:
            raise TTEError(
                "TTE-E070",
                f"{param.name} is not a tensor of the model, so PyTorch cannot judge it",
                where=f"parameter {param.name}",
                fix="freeze it, or give the layer an explicit bias",
            )


def _masks(params: Sequence[Param]) -> dict[str, np.ndarray]:
    """User's name -> which elements of that tensor learn."""
    masks: dict[str, np.ndarray] = {}
    for param in params:
        assert param.origin is not None
        mask = masks.setdefault(param.origin.name, np.zeros(param.origin.shape, bool))
        mask.reshape(-1)[param.origin.index] = True
    return masks


def _train(
    artifact: "Artifact",
    pairs: Sequence[tuple[np.ndarray, np.ndarray | None]],
    params: Sequence[Param],
    rates: Sequence[float],
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and trained tensors, the user's names and layouts, of the generated C."""
    board = artifact.host()
    losses = []
    for i, ((x, y), rate) in enumerate(zip(pairs, rates, strict=True)):
        board.set_learning_rate(rate)
        step = board.train_step(x, y)
        require_ok(step.status, f"training step {i}")
        losses.append(step.loss)
    trained = unpack_state(board.save_state(), board.build)
    origins = {p.name: p.origin for p in params if p.origin}
    initial = {p.name: p.data for p in params}
    return losses, export_weights(trained, initial, origins, artifact.compiled.originals)


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
    shape = (count, *build.target.sample)
    if build.classes:
        return Data(x, rng.integers(0, build.classes, shape).astype(np.int32))
    y = rng.standard_normal(shape).astype(np.float32)
    return Data(x, (y > 0).astype(np.float32) if artifact.scheme.loss.name == "bce_with_logits" else y)


def _sample(data: Data, i: int, build: Build) -> tuple[np.ndarray, np.ndarray | None]:
    """One sample in the shapes of the model's own buffers."""
    target = None if data.y is None or build.target is None else data.y[i : i + 1].reshape(build.target.shape)
    return data.x[i : i + 1].reshape(build.input.shape), target
