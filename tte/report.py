"""What was built, in numbers: the dictionary behind report.json, and a page with a map of the memory."""

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from tte import __version__
from tte.codegen.emit import Program
from tte.codegen.plan import Plan, plan_memory
from tte.ir import OPS, Graph, Node, Param, Value
from tte.ir.rows import STRATEGIES, expand, in_pieces
from tte.ops.rules import computes_floats
from tte.runner.toolchain import Firmware
from tte.target import Target

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """What an emulated board counted in one call of each: bytes of stack, executed instructions."""

    emulator: str | None = None
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
    target: Target,
    scheme: Mapping[str, Any],
    firmware: Firmware | None = None,
    measured: Measured = UNMEASURED,
    clock_hz: int | None = None,
    analytic_extra: int | None = None,
    unfused_macs: int | None = None,
    optimize: str = "speed",
) -> dict[str, Any]:
    """The content of report.json. Keys are stable; ``schema_version`` counts changes of their meaning.

    Sizes are of the linked firmware (``source`` is "linked"); its stack as measured, or else as reserved. Without a
    firmware they are the sum of what was planned ("planned"): a lower estimate that knows neither code nor stack.
    input_bytes: of the caller's input; 0 where it comes by rows and is nowhere as a whole
    analytic_extra: no size of this project, but what a published formula says; see tte.analysis.extra_memory
    unfused_macs:   multiply-accumulates of a training step before it was made small
    optimize:       what code is chosen for
    """
    train = find_program(programs, "train")
    graph = train.graph
    largest = max((program.plan for program in programs), key=lambda plan: (plan.arena_bytes, plan.proved))
    consts = {c.name: c for program in programs for c in program.graph.consts}
    trained = [p for p, _ in graph.updates]
    trained_bytes = graph.trained_bytes
    saved_bytes = count_saved(train)
    lower_bound = max(program.plan.lower_bound for program in programs)
    macs = count_macs(graph)
    by_rows = any(member.op == "source" for node in graph.nodes for member in expand(node))
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
        "target": target.name,
        "scheme": dict(scheme),
        "optimize": optimize,
        "toolchain": firmware.toolchain if firmware else None,
        "emulator": measured.emulator,
        "source": "linked" if firmware else "planned",
        "memory": {
            "arena_bytes": largest.arena_bytes,
            "lower_bound_bytes": lower_bound,
            "gap_bytes": largest.arena_bytes - lower_bound,
            "proved_optimal": largest.proved,
            "proof": largest.proof or None,
            "trained_bytes": trained_bytes,
            "saved_bytes": saved_bytes,
            "floor_bytes": trained_bytes + saved_bytes,
            "extra_macs": None if unfused_macs is None else macs - unfused_macs,
            "input_bytes": 0 if by_rows else graph.inputs[0].type.nbytes,
            "input_in_arena": graph.inputs[0].name in train.plan.offsets,
            "static_ram_bytes": ram,
            "analytic_extra_bytes": analytic_extra,
            "peak_node": train.plan.peak_node,
            "peak_tensors": list_peak(train),
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
        "soft_float": None
        if target.fpu
        else {
            "infer": list_soft(find_program(programs, "infer").graph),
            "train_step": list_soft(graph),
        },
        "cramped": find_cramped(programs),
        "steps": list_steps(train),
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
    return environment.from_string(source).render(report=report, tensors=list_tensors(train), tick=_round_tick)


def _round_tick(span: int) -> int:
    """The least 1, 2 or 5 times a power of ten that divides an axis into no more than ten parts."""
    power: int = 10 ** (len(str(span)) - 1)
    return next(t for t in (power // 10, power // 5, power // 2, power) if 0 < span <= 10 * t)


def find_program(programs: Sequence[Program], role: str) -> Program:
    return next(program for program in programs if program.role == role)


def list_steps(program: Program) -> list[dict[str, Any]]:
    """The nodes in their order, and how many bytes of the arena are alive at each."""
    rows = zip(program.graph.nodes, find_phases(program.graph), program.plan.live, strict=True)
    return [
        {"step": i, "layer": name_layer(node), "op": name_op(node), "phase": phase, "live_bytes": live}
        for i, (node, phase, live) in enumerate(rows)
    ]


def list_soft(graph: Graph) -> list[str]:
    """The layers of the nodes that compute floats: on a core without FPU the compiler's library does that."""
    floats = (node for node in graph.nodes if any(map(computes_floats, expand(node))))
    return list(dict.fromkeys(name_layer(node) or name_op(node) for node in floats))


def find_cramped(programs: Sequence[Program]) -> dict[str, Any] | None:
    """The layers whose kernels would be faster with more scratch, and the arena with which none would; None for none.

    The arena is that of the same nodes with all scratch; a plan for so many bytes may divide the nodes otherwise.
    """
    layers = {program.role: list_cramped(program) for program in programs}
    if not any(layers.values()):
        return None
    needed = (
        plan_memory(
            program.graph,
            {call.node: call.kernel.scratch for call in program.roomy.calls if call.kernel.scratch},
            hold_input=program.input_offset is not None,
            input_offset=program.input_offset,
        ).arena_bytes
        for program in programs
    )
    return {"arena_bytes": max(needed), "infer": layers["infer"], "train_step": layers["train"]}


def list_cramped(program: Program) -> list[str]:
    """The layers with kernels that would be faster with more scratch."""
    cramped = (node for _, node, _, slower in program.list_kernels() if slower)
    return list(dict.fromkeys(name_layer(node) or name_op(node) for node in cramped))


def list_peak(program: Program) -> list[dict[str, Any]]:
    """What is alive at the peak, largest first."""
    return [t for t in list_tensors(program) if t["start"] <= program.plan.peak_node <= t["end"]]


def describe_peak(program: Program) -> str:
    """The largest of them, in one line."""
    tensors = list_peak(program)
    peak = [f"{t['layer'] or t['name']} {t['bytes']:,} B" for t in tensors[:6]]
    return ", ".join(peak) + (" ..." if len(tensors) > 6 else "")


def count_macs(graph: Graph) -> int:
    return sum(node.macs for node in graph.nodes)


def list_tensors(program: Program) -> list[dict[str, Any]]:
    """What lies in the arena, largest first: bytes at offset, taken from node start to node end, both included.

    inplace: later results in the same bytes, each in the place of what it is computed from
    """
    nodes, owners, phases = program.graph.nodes, program.graph.owners(), find_phases(program.graph)
    made: dict[str, tuple[Value | None, str, str]] = {v.name: (v, "", "input") for v in program.graph.inputs}
    inplace: dict[str, list[dict[str, Any]]] = {}
    for step, node in enumerate(nodes):
        for i, value in enumerate(node.outputs):
            maker = find_maker(node, i)
            made[value.name] = (value, maker.layer, main_op(maker))
            if owners[value.name] != value.name and (node.body or node.definition.kind != "view"):
                entry = {"step": step, "name": value.name, "layer": maker.layer, "op": main_op(maker)}
                inplace.setdefault(owners[value.name], []).append(entry)
    tensors = []
    for buffer in sorted(program.plan.buffers, key=lambda b: (-b.size, b.offset, b.birth)):
        node = nodes[buffer.birth]
        scratch = ", ".join([name_layer(node), *([name_op(node)] if in_pieces(node) else [])])
        held, layer, op = made.get(buffer.name, (None, scratch, "scratch"))
        tensors.append(
            {
                "name": buffer.name,
                "layer": layer,
                "op": op,
                "phase": phases[buffer.birth],
                "shape": list(held.type.shape) if held else [buffer.size],
                "dtype": held.type.dtype if held else "uint8",
                "bytes": buffer.size,
                "offset": buffer.offset,
                "start": buffer.birth,
                "end": buffer.death,
                "inplace": inplace.get(buffer.name, []),
            }
        )
    return tensors


def count_saved(program: Program) -> int:
    """Bytes that the forward leaves to the backward: what the arena holds at the loss and is read behind it."""
    owners, phases = program.graph.owners(), find_phases(program.graph)
    loss = len(phases) - 1 - phases[::-1].index("forward")
    made = {v.name for v in program.graph.inputs} | {v.name for n in program.graph.nodes[:loss] for v in n.outputs}
    saved: dict[str, int] = {}
    for value in (v for node in program.graph.nodes[loss + 1 :] for v in node.inputs):
        if value.name in made and value.name in program.plan.offsets:
            saved[owners[value.name]] = max(saved.get(owners[value.name], 0), value.type.nbytes)
    return sum(saved.values())


def find_phases(graph: Graph) -> list[str]:
    """Of each node: "forward" (the loss depends on it), "update" (makes only new parameters) or "backward"."""
    needed = {v.name for v in graph.outputs}
    updates = {v.name for _, v in graph.updates}
    phases = []
    for node in reversed(graph.nodes):
        names = {v.name for v in node.outputs}
        if names & needed:
            needed |= {v.name for v in node.inputs}
            phases.append("forward")
        else:
            phases.append("update" if names <= updates else "backward")
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


def name_layer(node: Node) -> str:
    """The layer of a node; of a region in pieces, the first and the last."""
    if not node.body or not in_pieces(node):
        return node.layer
    ends = dict.fromkeys(node.body.nodes[i].layer or main_op(node.body.nodes[i]) for i in (0, -1))
    return " .. ".join(ends)


def name_op(node: Node) -> str:
    """What a node does; of a region in pieces, how it runs."""
    return STRATEGIES[str(node.attrs["strategy"])] if in_pieces(node) else main_op(node)


def find_maker(node: Node, output: int) -> Node:
    """What makes a result: of a region in pieces, one of its members."""
    if not node.body or not in_pieces(node):
        return node
    return node.body.producer()[node.body.outputs[output].name]


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
