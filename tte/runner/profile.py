"""Which layer takes how many instructions: a project's inference and training step, counted on the emulated board."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tte.errors import TTEError
from tte.runner.board import require_ok
from tte.runner.build import Build, Call
from tte.runner.toolchain import build_firmware, find_toolchains
from tte.runner.train import draw_samples, find_emulated
from tte.runner.unicorn_board import Frame, UnicornBoard, open_unicorn

OPTIMIZATIONS = ("-O0", "-O1", "-O2", "-O3", "-Os")


@dataclass(frozen=True)
class Row:
    """What a call of a program costs. share: of the program's instructions, from 0 to 1; parts: of a region that runs
    by rows or by tiles, its members; the loops round about them are the region's own."""

    layer: str
    op: str
    kernel: str
    macs: int
    instructions: int
    share: float
    parts: tuple["Row", ...] = ()

    @property
    def per_mac(self) -> float | None:
        return self.instructions / self.macs if self.macs else None


@dataclass(frozen=True)
class Program:
    """rest: instructions outside of the calls (checks, the loss, copies, the harness)."""

    instructions: int
    macs: int
    rest: int
    calls: tuple[Row, ...]

    @property
    def per_mac(self) -> float | None:
        return self.instructions / self.macs if self.macs else None


@dataclass(frozen=True)
class Profile:
    """Of one inference and one training step, with the flags of the compiler that was taken."""

    model: str
    target: str
    toolchain: str
    optimize: str
    flash_bytes: int
    infer: Program
    train_step: Program

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile(folder: Path | str, toolchain: str = "auto", optimize: str = "-O2") -> Profile:
    """Profile the project in ``folder`` on made-up data.

    toolchain: "zig", "gcc", or "auto"; optimize: one of OPTIMIZATIONS.
    Raises TTEError: E050 no project, E051 nothing to compile or emulate with, E058 it is not for a board, E059.
    """
    for option, value, choices in (
        ("--toolchain", toolchain, ("auto", *find_toolchains())),
        ("--optimize", optimize, OPTIMIZATIONS),
    ):
        if value not in choices:
            raise TTEError("TTE-E059", f"there is no {value!r} here", where=option, fix=f"one of {', '.join(choices)}")
    build = Build.open(folder)
    firmware = build_firmware(build, find_emulated(build), toolchain, optimize=optimize)
    programs = []
    for role in ("infer", "train"):
        board = open_unicorn(build, firmware)
        try:
            counted = _run_once(board, role)
            programs.append(_attribute(build, role, board.profile()))
        finally:
            board.close()
        assert programs[-1].instructions == counted
    return Profile(
        build.name, firmware.board.name, firmware.toolchain, optimize, firmware.flash_bytes, programs[0], programs[1]
    )


def _run_once(board: UnicornBoard, role: str) -> int:
    """The instructions of one call after start-up."""
    samples = draw_samples(board.build, 1)
    require_ok(board.init(), "init")
    if role == "infer":
        return board.infer_counted(samples.x[0])[1]
    step = board.train_step(samples.x[0], None if samples.y is None else samples.y[0])
    require_ok(step.status, "training step")
    return step.instructions


def _attribute(build: Build, role: str, root: Frame) -> Program:
    """Kernels are called from a program one after the other, and in no other order."""
    calls = build.calls[role]
    kernels = {call.kernel for call in calls}
    frames = list(_find(root, kernels))
    assert [c.kernel in f.names for c, f in zip(calls, frames, strict=True)] == [True] * len(calls), role
    total = root.instructions
    rows = tuple(_row(call, frame, total) for call, frame in zip(calls, frames, strict=True))
    macs = sum(call.macs for call in calls)
    return Program(total, macs, _count_rest(root, kernels), rows)


def _find(frame: Frame, kernels: set[str]) -> Iterator[Frame]:
    """The calls of kernels from below ``frame``, in order."""
    for call in frame.calls:
        if kernels.isdisjoint(call.names):
            yield from _find(call, kernels)
        else:
            yield call
