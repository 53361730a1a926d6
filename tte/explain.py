"""What training costs in memory and in speed, and what each way of saving memory buys, before any code is generated."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tte.codegen.emit import Program
from tte.codegen.schedule import UNLIMITED
from tte.compiler import Lowered, Pipeline, estimate, lower_programs, make_room, plan_programs
from tte.ir.rows import in_pieces
from tte.passes.costs import Arena
from tte.report import count_macs, list_cramped
from tte.scheme import UpdateScheme
from tte.target import Target, find_target

# What can be left out -> the pass that does it, and a name for the table.
TECHNIQUES = {
    "stream_forward": "the forward row by row",
    "tile_backward": "the backward in tiles of channels",
    "work_in_place": "results in place of operands",
    "fuse_updates": "updates without gradient buffers",
    "reorder": "the order of execution",
}
STEPS = 4  # plans between the smallest in which nothing is computed twice and the fastest
TWICE = 2  # plans below that, down to half of it
SIZES = 3  # in which each plan is tried: its own, and those of the next ones


@dataclass(frozen=True)
class MemoryRow:
    """A plan of a training step.

    arena_bytes as placed, with scratch; lower_bound_bytes alive at one node; extra_macs: multiply-accumulates beyond
    those of the program before it was made small; regions: how many run by rows or by tiles; cramped: layers whose
    kernels would be faster with more scratch; cost: what the compiler compares plans by, about the multiply-accumulates
    of a fast kernel that take as long, over ``extra_macs`` and the rest
    """

    arena_bytes: int
    lower_bound_bytes: int
    extra_macs: int
    regions: int
    cramped: int
    cost: float


@dataclass(frozen=True)
class MemoryTable:
    """macs: of a training step, nothing computed twice; trained_bytes: parameters that learn; plans: from the smallest
    to the fastest, each of less cost than those before it; left_out: technique -> the smallest plan without it."""

    target: str
    macs: int
    trained_bytes: int
    plans: tuple[MemoryRow, ...]
    left_out: dict[str, MemoryRow]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Planner:
    """Makes plans of a training step for a target."""

    lowered: Lowered
    arena: Arena
    target: Target

    def divide(self, limit: int, *disabled: str, again: bool = False) -> Program:
        """Into regions, for an arena of so many bytes, or more where that cannot be; without scratch."""
        arena = replace(self.arena, limit=limit, may_recompute=again)
        return plan_programs({"train": self.lowered.roles["train"]}, Pipeline(disabled=disabled), arena)[0]

    def fill(self, program: Program, size: int) -> Program:
        """With scratch, in an arena of ``size`` bytes, or as many as the program takes anyway."""
        return make_room([program], replace(self.arena, limit=size), {}, self.target)[0] if self.target.dsp else program

    def describe(self, program: Program) -> MemoryRow:
        return MemoryRow(
            arena_bytes=program.plan.arena_bytes,
            lower_bound_bytes=program.plan.lower_bound,
            extra_macs=count_macs(program.graph) - count_macs(self.lowered.gradients),
            regions=sum(map(in_pieces, program.graph.nodes)),
            cramped=len(list_cramped(program)),
            cost=estimate([program])[0],
        )


def explain_memory(
    model: Any,
    example_inputs: Sequence[Any] | None = None,
    update_scheme: Any = "full",
    target: str = "cortex-m7",
    input: str = "caller",
) -> MemoryTable:
    """Arguments as for ``tte.compile``. Only the training step is planned. Raises TTEError."""
    lowered = lower_programs(model, example_inputs, UpdateScheme.load(update_scheme), Pipeline(), input)
    planner = _Planner(lowered, Arena(0, input == "arena"), find_target(target))
    smallest, fastest = planner.divide(0), planner.divide(UNLIMITED)
    low, high = smallest.plan.arena_bytes, fastest.plan.arena_bytes
    steps = [int(low * (high / max(low, 1)) ** (k / (STEPS + 1))) for k in range(1, STEPS + 1)]
    between = [planner.divide(size) for size in steps if low < high]
    below = [planner.divide(low * k // (2 * TWICE), again=True) for k in range(TWICE, 2 * TWICE)]
    plans = [*below, smallest, *between, fastest]
    sizes = sorted({UNLIMITED, *(program.plan.arena_bytes for program in plans)})
    rooms = [[size for size in sizes if size >= program.plan.arena_bytes][:SIZES] for program in plans]
    filled = [planner.fill(program, size) for program, room in zip(plans, rooms, strict=True) for size in room]
    return MemoryTable(
        target=planner.target.name,
        macs=count_macs(lowered.gradients),
        trained_bytes=lowered.roles["train"].trained_bytes,
        plans=_pareto([planner.describe(program) for program in filled]),
        left_out={name: planner.describe(planner.fill(planner.divide(0, name), 0)) for name in TECHNIQUES},
    )


def _pareto(rows: Sequence[MemoryRow]) -> tuple[MemoryRow, ...]:
    """Without those that another beats or equals in bytes and cost."""
    best: list[MemoryRow] = []
    for row in sorted(rows, key=lambda r: (r.arena_bytes, r.cost)):
        if not best or row.cost < best[-1].cost:
            best.append(row)
    return tuple(best)
