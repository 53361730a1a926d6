"""Which layer takes how many instructions: a project's inference and training step, counted on the emulated board."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tte.errors import TTEError
from tte.runner.board import require_ok
from tte.runner.build import Build, Call
from tte.runner.counter import Block
from tte.runner.cycles import UNIT, find_estimator
from tte.runner.qemu import open_qemu
from tte.runner.stream import StreamBoard
from tte.runner.toolchain import build_firmware, find_toolchains
from tte.runner.train import draw_samples, find_emulated
from tte.runner.unicorn_board import Frame, add, open_unicorn

METRICS = ("instructions", "cycles")
OPTIMIZATIONS = ("-O0", "-O1", "-O2", "-O3", "-Os")


@dataclass(frozen=True)
class Cost:
    """What a program costs, or a call in it, or a member of a region that runs by rows or by tiles.

    instructions, cycles: with those of the parts; cycles are estimated, if at all
    """

    layer: str
    op: str
    macs: int
    instructions: int
    parts: tuple["Cost", ...] = ()
    cycles: int | None = None

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
        } | ({} if self.cycles is None else {"estimated_cycles": self.cycles})


@dataclass(frozen=True)
class Profile:
    """What an inference and a training step cost ("infer", "train_step"), and what the firmware was built with.

    ram_bytes: .data and .bss, without the stack
    estimator: what cycles are estimated by, if they are
    """

    model: str
    target: str
    toolchain: str
    optimize: str
    flash_bytes: int
    ram_bytes: int
    programs: Mapping[str, Cost]
    estimator: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"programs": {name: cost.to_dict() for name, cost in self.programs.items()}}


def profile(
    folder: Path | str, toolchain: str = "auto", optimize: str | None = None, metric: str = "instructions"
) -> Profile:
    """Count the instructions of the project in ``folder``, on made-up data; of whole programs where unicorn, which
    counts layer by layer, does not know the core.

    toolchain: "zig", "gcc", or "auto"; optimize: one of OPTIMIZATIONS, by default that of the project.
    metric: one of METRICS; with "cycles" they are estimated, too.
    Raises TTEError: E050 no project, E051 nothing to compile, emulate or estimate with, E058 not for a board,
    E059 no such option.
    """
    build = Build.open(folder)
    target = find_emulated(build)
    optimize = optimize or build.flag
    for option, value, choices in (
        ("--toolchain", toolchain, ("auto", *find_toolchains())),
        ("--optimize", optimize, OPTIMIZATIONS),
        ("--metric", metric, METRICS),
    ):
        if value not in choices:
            raise TTEError("TTE-E059", f"there is no {value!r}", where=option, fix=f"one of {', '.join(choices)}")
    by_layers = "unicorn" in target.emulators
    if metric == "cycles" and not by_layers:
        what = f"unicorn, which counts blocks of a program, does not know {target.name}"
        fix = "count instructions, or compile for another core"
        raise TTEError("TTE-E058", what, where=str(build.folder), fix=fix)
    estimator = find_estimator(target) if metric == "cycles" else None
    machine = "board" if by_layers else "qemu"
    firmware = build_firmware(build, target, toolchain, machine=machine, optimize=optimize)
    programs = {}
    for name, role in (("infer", "infer"), ("train_step", "train")):
        if not by_layers:
            with closing(open_qemu(build, firmware)) as whole:
                macs = sum(call.macs for call in build.calls[role])
                programs[name] = Cost(name, "", macs, _run_once(whole, role))
            continue
        weights: Mapping[Block, int] = {}
        if estimator:  # once to see which blocks there are
            with closing(open_unicorn(build, firmware)) as board:
                _run_once(board, role)
                weights = estimator.estimate(board.blocks())
        with closing(open_unicorn(build, firmware)) as board:
            board.weigh(weights)
            counted = _run_once(board, role)
            programs[name] = _attribute(name, build.calls[role], board.profile())
        assert programs[name].instructions == counted
    ram = firmware.data + firmware.bss
    version = estimator.version if estimator else None
    return Profile(build.name, target.name, firmware.toolchain, optimize, firmware.flash_bytes, ram, programs, version)


def _run_once(board: StreamBoard, role: str) -> int:
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
        costs.append(_cost(call, frame.counts, _split_region(call, frame)))
    return _cost(Call(name, "", sum(call.macs for call in calls), ""), root.counts, tuple(costs))


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
    counts = {member: [(0, 0)] for member in members}
    for kernel in dict.fromkeys(part.kernel for part in region.parts):
        users = [m for m, part in zip(members, region.parts, strict=True) if part.kernel == kernel]
        places = [call.counts for call in frame.calls if kernel in call.names]
        if len(set(users)) == 1:
            users, places = users[:1], [add(places)]
        if len(users) == len(places):
            for member, count in zip(users, places, strict=True):
                counts[member].append(count)
    return tuple(_cost(member, add(found)) for member, found in counts.items() if any(map(any, found)))


def _cost(call: Call, counts: tuple[int, int], parts: tuple[Cost, ...] = ()) -> Cost:
    instructions, weight = counts
    return Cost(call.layer, call.op, call.macs, instructions, parts, weight // UNIT if weight else None)
