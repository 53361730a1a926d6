"""What training costs in memory, and what each way of saving memory buys, before any code is generated."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tte.codegen.emit import Program
from tte.codegen.schedule import UNLIMITED
from tte.compiler import Pipeline, lower_programs, plan_programs
from tte.ir import Graph
from tte.ir.rows import in_pieces
from tte.passes.costs import Arena
from tte.scheme import UpdateScheme

# What can be left out -> the pass that does it, and a name for the table.
TECHNIQUES = {
    "stream_forward": "the forward row by row",
    "tile_backward": "the backward in tiles of channels",
    "work_in_place": "results in place of operands",
    "fuse_updates": "updates without gradient buffers",
    "reorder": "the order of execution",
}
STEPS = 4  # plans between the smallest in which nothing is computed twice and the fastest
TWICE = 1  # plans below that


@dataclass(frozen=True)
class MemoryRow:
    """A plan of a training step. arena_bytes as placed, lower_bound_bytes alive at one node; macs of the step; regions:
    how many run by rows or by tiles, which takes some instructions more than node by node."""

    arena_bytes: int
    lower_bound_bytes: int
    macs: int
    regions: int

    @staticmethod
    def of(program: Program) -> "MemoryRow":
        nodes = program.graph.nodes
        regions = sum(map(in_pieces, nodes))
        return MemoryRow(program.plan.arena_bytes, program.plan.lower_bound, sum(n.macs for n in nodes), regions)


@dataclass(frozen=True)
class MemoryTable:
    """trained_bytes: parameters that learn; plans: from the smallest to the fastest, none worse than another in both;
    left_out: technique -> the smallest plan without it."""

    trained_bytes: int
    plans: tuple[MemoryRow, ...]
    left_out: dict[str, MemoryRow]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain_memory(
    model: Any, example_inputs: Sequence[Any] | None = None, update_scheme: Any = "full", input: str = "caller"
) -> MemoryTable:
    """Arguments as for ``tte.compile``. Only the training step is planned. Raises TTEError."""
    lowered = lower_programs(model, example_inputs, UpdateScheme.load(update_scheme), Pipeline(), input)
    train, arena = lowered.roles["train"], Arena(0, input == "arena")
    smallest, fastest = _plan(train, arena), _plan(train, replace(arena, limit=UNLIMITED))
    low, high = smallest.arena_bytes, fastest.arena_bytes
    limits = [low + (high - low) * k // (STEPS + 1) for k in range(1, STEPS + 1)]
    between = [_plan(train, replace(arena, limit=limit)) for limit in limits if low < high]
    below = [replace(arena, limit=low * k // (TWICE + 1), may_recompute=True) for k in range(1, TWICE + 1)]
    return MemoryTable(
        trained_bytes=sum(param.type.nbytes for param, _ in train.updates),
        plans=_pareto([*(_plan(train, room) for room in below), smallest, *between, fastest]),
        left_out={name: _plan(train, arena, name) for name in TECHNIQUES},
    )


def _plan(train: Graph, arena: Arena, *disabled: str) -> MemoryRow:
    return MemoryRow.of(plan_programs({"train": train}, Pipeline(disabled=disabled), arena)[0])


def _pareto(rows: Sequence[MemoryRow]) -> tuple[MemoryRow, ...]:
    """Without those that another beats or equals in bytes, multiply-accumulates and regions."""
    best: list[MemoryRow] = []
    for row in sorted(rows, key=lambda r: (r.arena_bytes, r.macs, r.regions)):
        if not any(b.macs <= row.macs and b.regions <= row.regions for b in best):
            best.append(row)
    return tuple(best)
