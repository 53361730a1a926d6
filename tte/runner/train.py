"""The training loop: shows the samples of a file to a board, one by one, and keeps the books."""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tte.arrays import read_npz
from tte.document import tally
from tte.errors import TTEError
from tte.runner.board import STATE_HEADER, Board, require_ok
from tte.runner.build import Build
from tte.target import Target, find_target

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Data:
    """Samples in the layout of the model's input, and their labels or targets (None: the input is the target)."""

    x: np.ndarray
    y: np.ndarray | None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class RunResult:
    """What ``tte run`` reports.

    metric: measured on the evaluation data before and after: {"name": "accuracy" or the loss, "before", "after"}
    instructions_per_step: mean over the steps; None where they are not counted, as are the next two
    stack_bytes, arena_bytes: high-water marks of what was executed; an inference alone may need a larger arena
    weights_sha256: of the trained tensors as the board saved them
    """

    steps: int
    loss: list[float]
    metric: dict[str, Any]
    accuracy_before: float | None
    accuracy_after: float | None
    instructions_per_step: int | None
    stack_bytes: int | None
    arena_bytes: int | None
    weights_sha256: str
    runner: str
    state: bytes = field(repr=False, default=b"")
    """The saved state; not part of the JSON."""

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "state"}


def load_data(path: Path | str, build: Build) -> Data:
    """Read an .npz with x and y and hold it against the model. Raises TTEError (E057), saying what does not fit."""
    arrays = read_npz(path, "TTE-E057", "save it with numpy.savez(path, x=..., y=...)")
    return check_data(arrays, build, path)


def check_data(arrays: dict[str, np.ndarray], build: Build, path: Path | str) -> Data:
    """The same for arrays already in memory; ``path`` names them in errors."""
    if "x" not in arrays:
        raise _bad(path, f"has no array x, only {sorted(arrays)}", "save it with numpy.savez(path, x=..., y=...)")
    x = arrays["x"]
    sample = build.input.shape[1:]
    if x.ndim < 1 or x.shape[1:] != sample:
        what = f"x is {x.shape}, the model's input ({build.input_layout}) wants ({_list(('N', *sample))})"
        raise _bad(path, what, refit("x", x.shape, sample))
    if len(x) == 0:
        raise _bad(path, "there are no samples: x has length 0", "give at least one sample")
    x = _numbers(path, "x", x, build.input.dtype)
    if build.target is None:
        return Data(x, None)
    return Data(x, check_targets(arrays, len(x), build.target.sample, build.classes, build.target.dtype, path))


def check_targets(
    arrays: Mapping[str, np.ndarray],
    count: int,
    sample: tuple[int, ...],
    classes: int | None,
    dtype: np.dtype[Any],
    path: Path | str,
) -> np.ndarray:
    """y as (count, *sample): class numbers where there are ``classes``. Raises TTEError (E057)."""
    if "y" not in arrays:
        raise _bad(path, f"has no array y, only {sorted(arrays)}", "add the labels or targets as y")
    y = arrays["y"]
    if y.shape[:1] != (count,):
        raise _bad(path, f"x has {tally(count, 'sample')}, y is {y.shape}", "give one target per sample")
    if y.shape[1:] not in (sample, (1, *sample), (math.prod(sample),)):
        what = f"y is {y.shape}, the model wants ({_list(('N', *sample))})"
        if classes is not None and y.shape[1:] == (*sample, classes):
            raise _bad(path, f"{what}: class numbers, not one-hot rows", "save y.argmax(axis=-1)")
        raise _bad(path, what, refit("y", y.shape, sample))
    y = y.reshape(count, *sample)
    if classes is None:
        return _numbers(path, "y", y, dtype)
    if y.dtype.kind not in "iub":
        raise _bad(path, f"y holds {y.dtype}, not class numbers", "save y as integers")
    if y.min() < 0 or y.max() >= classes:
        raise _bad(
            path,
            f"labels reach from {y.min()} to {y.max()}, the model has {classes} classes",
            f"number the classes 0 to {classes - 1}, or give the model a head with more classes",
        )
    return y.astype(np.int32)


def _numbers(path: Path | str, name: str, array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise _bad(path, f"{name} holds {array.dtype}, not numbers", f"save {name} as {dtype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if array.dtype.kind == "f" or array.min() < limits.min or array.max() > limits.max:
            raise _bad(path, f"{name} does not fit {dtype}", f"save {name} as {dtype}")
    elif not np.isfinite(array).all():
        raise _bad(path, f"{name} has values that are NaN or infinite", "remove those samples")
    return array.astype(dtype, copy=False)


def _bad(path: Path | str, what: str, fix: str) -> TTEError:
    return TTEError("TTE-E057", what, where=str(path), fix=fix)


# How the channels of pictures move to the front, and to the end.
MOVES = {(0, 3, 1, 2): "(N, H, W, C) -> (N, C, H, W)", (0, 2, 3, 1): "(N, C, H, W) -> (N, H, W, C)"}


def refit(name: str, given: Sequence[int], sample: Sequence[int]) -> str:
    """How samples of another shape may become what the model wants."""
    for axes, move in MOVES.items():
        if len(given) == 4 and tuple(given[axis] for axis in axes[1:]) == tuple(sample):
            return f"transpose {name}: {name}.transpose{axes}, which is {move}"
    if sorted(given[1:]) == sorted(sample):
        return f"transpose {name}: its axes are in another order"
    size = math.prod(sample)
    if given[:1] and math.prod(given[1:]) == size:
        return f"reshape {name} to ({_list((-1, *sample))}), if its elements are in that order"
    if tuple(given) == tuple(sample):
        return f"give {name} one more axis in front: {name}[None] is a single sample"
    return f"give samples of {tally(size, 'element')}, not {math.prod(given[1:])}"


def _list(shape: Sequence[object]) -> str:
    return ", ".join(map(str, shape))


def draw_samples(build: Build, count: int) -> Data:
    """The samples of the generated self-test: a linear congruential generator, element by element."""
    seed = 1

    def draw() -> int:
        nonlocal seed
        seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
        return seed >> 24

    xs, ys = [], []
    for _ in range(count):
        x = [draw() for _ in range(build.input.size)]
        real = build.input.dtype == np.float32
        wrapped = np.asarray(x, np.int64).astype(build.input.dtype) if not real else (np.asarray(x) - 128) / 64
        xs.append(np.asarray(wrapped, build.input.dtype).reshape(build.input.shape[1:]))
        if build.target is not None:
            y = [draw() for _ in range(build.target.size)]
            targets = np.asarray(y) % build.classes if build.classes else (np.asarray(y) - 128) / 64
            ys.append(np.asarray(targets, build.target.dtype).reshape(build.target.sample))
    return Data(np.stack(xs), np.stack(ys) if ys else None)


def measure(board: Board, data: Data) -> float:
    """Accuracy where the model has classes, else the mean loss."""
    total = 0.0
    for i in range(len(data)):
        step = board.evaluate(data.x[i], None if data.y is None else data.y[i])
        require_ok(step.status, "evaluation", f"sample {i} of the evaluation data")
        if board.build.classes is None or data.y is None:
            total += step.loss
        else:
            total += float(step.predicted == int(np.ravel(data.y[i])[-1]))
    return total / len(data)


def run_training(
    board: Board,
    data: Data,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    evaluation: Data | None = None,
    rate: float | None = None,
    seed: int = 0,
    runner: str = "",
    progress: Progress | None = None,
) -> RunResult:
    """Train on every sample ``epochs`` times (default 1), or for ``steps`` steps; a new order for every epoch.

    The order of epoch e is numpy's permutation from the seed sequence (seed, e): the same on every machine.
    """
    build = board.build
    require_ok(board.init(), "init")
    if rate is not None:
        board.set_learning_rate(rate)
    total = steps if steps is not None else (epochs or 1) * len(data)
    before = measure(board, evaluation) if evaluation else None
    losses: list[float] = []
    counted = 0
    for i in range(total):
        epoch, position = divmod(i, len(data))
        if position == 0:
            order = np.random.default_rng((seed, epoch)).permutation(len(data))
        sample = order[position]
        step = board.train_step(data.x[sample], None if data.y is None else data.y[sample])
        require_ok(step.status, f"training step {i}", f"sample {sample} of the training data")
        losses.append(step.loss)
        counted += step.instructions
        if progress:
            progress(i + 1, total, step.loss)
    marks = board.high_water()
    after = measure(board, evaluation) if evaluation else None
    state = board.save_state()
    is_accuracy = build.classes is not None
    return RunResult(
        steps=total,
        loss=losses,
        metric={"name": "accuracy" if is_accuracy else build.loss, "before": before, "after": after},
        accuracy_before=before if is_accuracy else None,
        accuracy_after=after if is_accuracy else None,
        instructions_per_step=round(counted / total) if counted else None,
        stack_bytes=marks[0] if marks else None,
        arena_bytes=marks[1] if marks else None,
        weights_sha256=hashlib.sha256(state[STATE_HEADER:-4]).hexdigest(),
        runner=runner,
        state=state,
    )


def find_emulator(target: Target) -> str | None:
    """The first emulator that knows the target's core and is installed."""
    from tte.runner.qemu import find_qemu

    installed = {"unicorn": importlib.util.find_spec("unicorn") is not None, "qemu": find_qemu() is not None}
    return next((name for name in target.emulators if installed[name]), None)


def find_emulated(build: Build) -> Target:
    """What the project was compiled for. Raises TTEError (E058) where that is this computer."""
    target = find_target(build.target_name)
    if target.name == "host":
        raise TTEError(
            "TTE-E058",
            "the project was compiled for this computer",
            where=str(build.folder),
            fix="compile it for a board; on this computer `tte run --host` trains it",
        )
    return target


def find_runner(build: Build, runner: str) -> str:
    """ "host", or the emulator of that name; "auto": the one for the project's target. Raises TTEError (E058)."""
    if runner == "host":
        return runner
    target = find_emulated(build)
    if runner == "auto":
        return find_emulator(target) or target.emulators[0]
    if runner not in target.emulators:
        what, fix = f"no emulator {runner!r} for {target.name}", " or ".join(target.emulators)
        raise TTEError("TTE-E058", what, where="--emulator", fix=fix)
    return runner


def open_board(build: Build, runner: str, toolchain: str = "auto", sanitize: bool = False) -> Board:
    """Start a project on a runner, see ``find_runner``."""
    from tte.runner.host import open_host
    from tte.runner.qemu import open_qemu
    from tte.runner.toolchain import build_firmware
    from tte.runner.unicorn_board import open_unicorn

    runner = find_runner(build, runner)
    if runner == "host":
        return open_host(build, sanitize)
    target = find_target(build.target_name)
    if runner == "unicorn":
        return open_unicorn(build, build_firmware(build, target, toolchain))
    return open_qemu(build, build_firmware(build, target, toolchain, machine="qemu"))


def train(
    folder: Path | str,
    data: Path | str | dict[str, np.ndarray],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    evaluation: Path | str | dict[str, np.ndarray] | None = None,
    runner: str = "auto",
    toolchain: str = "auto",
    rate: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RunResult:
    """Train the project in ``folder``: files or arrays of data in, the books out. See ``run_training``."""
    if epochs is not None and steps is not None:
        raise TTEError("TTE-E059", "epochs and steps exclude each other", where="--epochs", fix="give one of them")
    if rate is not None and not 0 < rate <= 1e6:
        what = f"the learning rate is {rate:g}"
        raise TTEError("TTE-E059", what, where="--lr", fix="a number above 0, and at most 1e6")
    for name, count in (("epochs", epochs), ("steps", steps)):
        if count is not None and count < 1:
            raise TTEError("TTE-E059", f"{name} is {count}", where=f"--{name}", fix="train for at least 1")
    if seed < 0:
        raise TTEError("TTE-E059", f"the seed is {seed}", where="--seed", fix="a whole number from 0")
    build = Build.open(folder)

    def read(source: Path | str | dict[str, np.ndarray]) -> Data:
        return check_data(source, build, "data") if isinstance(source, dict) else load_data(source, build)

    samples, held_back = read(data), None if evaluation is None else read(evaluation)
    runner = find_runner(build, runner)
    board = open_board(build, runner, toolchain)
    try:
        return run_training(
            board,
            samples,
            epochs=epochs,
            steps=steps,
            evaluation=held_back,
            rate=rate,
            seed=seed,
            runner=runner,
            progress=progress,
        )
    finally:
        board.close()
