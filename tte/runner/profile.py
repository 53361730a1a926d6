"""Which layer takes how many instructions: a project's inference and training step, counted on the emulated board."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
class Cost:
    """What a program costs, or a call in it, or a member of a region that runs by rows or by tiles.

    instructions: with those of the parts
    """

    layer: str
    op: str
    macs: int
    instructions: int
    parts: tuple["Cost", ...] = ()

    @property
    def own(self) -> int:
        """Instructions outside of the parts: of a program checks, copies and the harness, of a region its loops."""
        return self.instructions - sum(part.instructions for part in self.parts)

    @property
    def per_mac(self) -> float | None:
        return self.instructions / self.macs if self.macs else None

    def to_dict(self, total: int | None = None) -> dict[str, Any]:
        """share: of the program's instructions, from 0 to 1."""
        total = total or self.instructions
        return {
            "layer": self.layer,
            "op": self.op,
            "macs": self.macs,
            "instructions": self.instructions,
            "own_instructions": self.own,
            "instructions_per_mac": self.per_mac,
            "share": self.instructions / total,
            "parts": [part.to_dict(total) for part in self.parts],
        }


@dataclass(frozen=True)
class Profile:
    """What an inference and a training step cost ("infer", "train_step"), and what the firmware was built with.

    ram_bytes: .data and .bss, without the stack
    """

    model: str
    target: str
    toolchain: str
    optimize: str
    flash_bytes: int
    ram_bytes: int
    programs: Mapping[str, Cost]

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"programs": {name: cost.to_dict() for name, cost in self.programs.items()}}


def profile(folder: Path | str, toolchain: str = "auto", optimize: str | None = None) -> Profile:
    """Count the instructions of the project in ``folder``, on made-up data.

    toolchain: "zig", "gcc", or "auto"; optimize: one of OPTIMIZATIONS, by default that of the project.
    Raises TTEError: E050 no project, E051 nothing to compile or emulate with, E058 not for a board,
    E059 no such option.
    """
    build = Build.open(folder)
    target = find_emulated(build)
    optimize = optimize or build.flag
    for option, value, choices in (
        ("--toolchain", toolchain, ("auto", *find_toolchains())),
        ("--optimize", optimize, OPTIMIZATIONS),
    ):
        if value not in choices:
            raise TTEError("TTE-E059", f"there is no {value!r}", where=option, fix=f"one of {', '.join(choices)}")
    if "unicorn" not in target.emulators:
        raise TTEError(
            "TTE-E058",
            f"unicorn, which counts layer by layer, does not know {target.name}",
            where=str(build.folder),
            fix=f"`tte run --emulator {target.emulators[0]}` counts whole steps; or compile for another core",
        )
    firmware = build_firmware(build, target, toolchain, optimize=optimize)
    programs = {}
    for name, role in (("infer", "infer"), ("train_step", "train")):
        board = open_unicorn(build, firmware)
        try:
            counted = _run_once(board, role)
            programs[name] = _attribute(name, build.calls[role], board.profile())
        finally:
            board.close()
        assert programs[name].instructions == counted
    ram = firmware.data + firmware.bss
    return Profile(build.name, target.name, firmware.toolchain, optimize, firmware.flash_bytes, ram, programs)


def _run_once(board: UnicornBoard, role: str) -> int:
    """The instructions of one call after start-up."""
    samples = draw_samples(board.build, 1)
    require_ok(board.init(), "init")
    if role == "infer":
        return board.infer_counted(samples.x[0])[1]
    step = board.train_step(samples.x[0], None if samples.y is None else samples.y[0])
    require_ok(step.status, "training step")
    return step.instructions


def _attribute(name: str, calls: tuple[Call, ...], root: Frame) -> Cost:
    """Kernels are called from a program one after the other, in the order of its calls."""
    costs = []
    for call, frame in zip(calls, _find_calls(root, {call.kernel for call in calls}), strict=True):
        assert call.kernel in frame.names, f"{call.kernel} was expected, {frame.names} was called"
        costs.append(_cost(call, frame.instructions, _split_region(call, frame)))
    return Cost(name, "", sum(call.macs for call in calls), root.instructions, tuple(costs))


def _find_calls(frame: Frame, kernels: set[str]) -> list[Frame]:
    """The outermost calls of ``kernels``, in order."""
    found = []
    for call in frame.calls:
        found += _find_calls(call, kernels) if kernels.isdisjoint(call.names) else [call]
    return found


def _split_region(region: Call, frame: Frame) -> tuple[Cost, ...]:
    """The members of a region, as far as they can be told apart.

    Those with equal kernels are called from places of their own, the first one first. Where the compiler copied such a
    place, or put a kernel into the region's own function, the member's instructions stay the region's.
    """
    members = [replace(part, kernel="") for part in region.parts]
    counts = dict.fromkeys(members, 0)
    for kernel in dict.fromkeys(part.kernel for part in region.parts):
        users = [m for m, part in zip(members, region.parts, strict=True) if part.kernel == kernel]
        places = [call.instructions for call in frame.calls if kernel in call.names]
        if len(set(users)) == 1:
            users, places = users[:1], [sum(places)]
        if len(users) == len(places):
            for member, instructions in zip(users, places, strict=True):
                counts[member] += instructions
    return tuple(_cost(member, count) for member, count in counts.items() if count)


def _cost(call: Call, instructions: int, parts: tuple[Cost, ...] = ()) -> Cost:
    return Cost(call.layer, call.op, call.macs, instructions, parts)
