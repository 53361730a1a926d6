"""What was built, in numbers: the dictionary behind report.json, and a page with a map of the memory."""

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from tte import __version__
from tte.codegen.emit import Program
from tte.codegen.plan import Plan
from tte.ir import OPS, Graph, Node, Param, Value
from tte.ir.rows import expand
from tte.runner.toolchain import Firmware

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """What an emulated board counted in one call of each: bytes of stack, executed instructions."""

    stack_infer: int | None = None
    stack_train_step: int | None = None
    instructions_infer: int | None = None
    instructions_train_step: int | None = None

    @property
    def stack(self) -> int | None:
        return max((n for n in (self.stack_infer, self.stack_train_step) if n is not None), default=None)


UNMEASURED = Measured()


def make_report(
    programs: Sequence[Program],
    *,
    model: str,
    target: str,
    scheme: Mapping[str, Any],
    firmware: Firmware | None = None,
    measured: Measured = UNMEASURED,
    clock_hz: int | None = None,
    analytic_extra: int | None = None,
) -> dict[str, Any]:
    """The content of report.json. Keys are stable; ``schema_version`` counts changes of their meaning.

    Sizes are of the linked firmware (``source`` is "linked"); its stack as measured, or else as reserved. Without a
    firmware they are the sum of what was planned ("planned"): a lower estimate that knows neither code nor stack.
    analytic_extra: no size of this project, but what a published formula says; see tte.analysis.extra_memory
    """
    train = find_program(programs, "train")
    graph = train.graph
    largest = max(programs, key=lambda program: program.plan.arena_bytes).plan
    consts = {c.name: c for program in programs for c in program.graph.consts}
    trained = [p for p, _ in graph.updates]
    trained_bytes = sum(p.type.nbytes for p in trained)
    if firmware:
        code, flash = firmware.text, firmware.flash_bytes
        stack = firmware.stack_reserved if measured.stack is None else measured.stack
        ram = firmware.data + firmware.bss + stack
    else:
        code, flash = None, trained_bytes + sum(c.type.nbytes for c in consts.values())
        ram = largest.arena_bytes + trained_bytes
    return {
        "schema_version": SCHEMA_VERSION,
        "tte_version": __version__,
        "model": model,
        "target": target,
        "scheme": dict(scheme),
        "toolchain": firmware.toolchain if firmware else None,
        "source": "linked" if firmware else "planned",
        "memory": {
            "arena_bytes": largest.arena_bytes,
            "lower_bound_bytes": max(program.plan.lower_bound for program in programs),
            "proved_optimal": largest.proved,
            "trained_bytes": trained_bytes,
            "input_bytes": graph.inputs[0].type.nbytes,
            "input_in_arena": graph.inputs[0].name in train.plan.offsets,
            "static_ram_bytes": ram,
            "analytic_extra_bytes": analytic_extra,
            "peak_node": train.plan.peak_node,
            "peak_tensors": [t for t in list_tensors(train) if t["start"] <= train.plan.peak_node <= t["end"]],
        },
        "flash_bytes": flash,
        "flash": {
            "code_bytes": code,
            "const_bytes": flash - (code or 0) - trained_bytes,
            "initial_values_bytes": trained_bytes,
        },
        "infer": _cost(
            find_program(programs, "infer").plan, measured.stack_infer, measured.instructions_infer, clock_hz
        ),
        "train_step": _cost(train.plan, measured.stack_train_step, measured.instructions_train_step, clock_hz),
        "layers": list_layers(graph),
        "gradients": list(dict.fromkeys(_user_name(p) for p in trained)),
    }


def render_html(report: Mapping[str, Any], programs: Sequence[Program]) -> str:
    """report.html: one file without outside references; the map shows a training step, node by node, and addresses."""
    train = find_program(programs, "train")
    source = importlib.resources.files("tte.codegen").joinpath("templates/report.html.j2").read_text()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    tensors = sorted(list_tensors(train), key=lambda t: (t["start"], t["offset"]))
    return environment.from_string(source).render(report=report, tensors=tensors, live=train.plan.live)


def find_program(programs: Sequence[Program], role: str) -> Program:
    return next(program for program in programs if program.role == role)


def list_tensors(program: Program) -> list[dict[str, Any]]:
    """What lies in the arena, largest first: bytes at offset, taken from node start to node end, both included."""
    made: dict[str, tuple[Node | None, Value]] = {v.name: (None, v) for v in program.graph.inputs}
    made |= {v.name: (node, v) for node in program.graph.nodes for v in node.outputs}
    phases = find_phases(program.graph)
    tensors = []
    for buffer in sorted(program.plan.buffers, key=lambda b: (-b.size, b.offset, b.birth)):
        node, value = made.get(buffer.name, (None, None))
        tensors.append(
            {
                "name": buffer.name,
                "layer": buffer.layer,
                "op": main_op(node) if node else "input" if value else "scratch",
                "phase": phases[buffer.birth],
                "shape": list(value.type.shape) if value else [buffer.size],
                "dtype": value.type.dtype if value else "uint8",
                "bytes": buffer.size,
                "offset": buffer.offset,
                "start": buffer.birth,
                "end": buffer.death,
            }
        )
    return tensors


def find_phases(graph: Graph) -> list[str]:
    """Of each node: "forward" (the loss depends on it), "update" (makes a new parameter) or "backward" (the rest)."""
    needed = {v.name for v in graph.outputs}
    updates = {v.name for _, v in graph.updates}
    phases = []
    for node in reversed(graph.nodes):
        names = {v.name for v in node.outputs}
        if names & needed:
            needed |= {v.name for v in node.inputs}
            phases.append("forward")
        else:
            phases.append("update" if names & updates else "backward")
    return phases[::-1]


def list_layers(graph: Graph) -> list[dict[str, Any]]:
    """One record per layer of the user's model, in the order of execution; multiply-accumulates by phase."""
    layers: dict[str, dict[str, Any]] = {}
    learns = {p.name: _user_name(p) for p, _ in graph.updates}
    members = [
        (member, phase) for node, phase in zip(graph.nodes, find_phases(graph), strict=True) for member in expand(node)
    ]
    for node, phase in members:
        new = {
            "name": node.layer,
            "op": "",
            "shape": [],
            "macs": 0,
            "backward_macs": 0,
            "const_bytes": 0,
            "trained": [],
        }
        layer = layers.setdefault(node.layer, new)
        macs = node.macs
        if phase == "forward":
            if macs or not layer["op"]:
                layer["op"] = main_op(node)
            layer["shape"] = list(node.output.type.shape)
            layer["macs"] += macs
        else:
            layer["backward_macs"] += macs
        for value in node.inputs:
            if value.name in learns and learns[value.name] not in layer["trained"]:
                layer["trained"].append(learns[value.name])
    owner = {v.name: node.layer for node, _ in reversed(members) for v in node.inputs}
    for const in graph.consts:
        if const.name in owner:
            layers[owner[const.name]]["const_bytes"] += const.type.nbytes
    return list(layers.values())


def main_op(node: Node) -> str:
    """The operator that gives a node its name: of a region, its anchor or else its first member."""
    if not node.body:
        return node.op
    members = [main_op(n) for n in node.body.nodes]
    return next((op for op in members if OPS[op].kind in ("anchor", "opaque")), members[0])


def _user_name(param: Param) -> str:
    return param.origin.name if param.origin else param.name


def _cost(plan: Plan, stack: int | None, instructions: int | None, clock_hz: int | None) -> dict[str, Any]:
    """ms_estimate supposes one instruction per cycle: an estimate, and no more than that."""
    return {
        "arena_bytes": plan.arena_bytes,
        "stack_bytes": stack,
        "instructions": instructions,
        "ms_estimate": round(1000 * instructions / clock_hz, 3) if instructions and clock_hz else None,
    }
