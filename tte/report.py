"""What was built, in numbers: the dictionary behind report.json, and a page with a map of the memory."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jinja2

from tte import __version__
from tte.ir import OPS, Graph, Node, Param

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Block:
    """One tensor in the arena: bytes [offset, offset + size) from node ``start`` to node ``end``, both included.

    phase: "input", "forward", "backward" or "update"; the phase of the node that makes the tensor
    """

    name: str
    layer: str
    op: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class Firmware:
    """Sizes of the linked program, in bytes, and executed instructions; None where nothing was measured."""

    toolchain: str
    code: int
    const: int
    initial_values: int
    zeroed: int
    stack_infer: int | None = None
    stack_train_step: int | None = None
    instructions_infer: int | None = None
    instructions_train_step: int | None = None


def make_report(
    graph: Graph,
    blocks: Sequence[Block],
    *,
    model: str,
    target: str,
    scheme: dict[str, Any],
    arena_bytes: int,
    lower_bound_bytes: int,
    proved_optimal: bool,
    firmware: Firmware | None = None,
    clock_hz: int | None = None,
) -> dict[str, Any]:
    """The content of report.json. Keys are stable; ``schema_version`` counts changes of their meaning.

    Sizes are of the linked firmware (``source`` is "linked"). Without one they are the sum of what was planned
    ("planned"): a lower estimate that knows neither code nor stack.
    """
    trained = [p for p in graph.params if p.name in {target.name for target, _ in graph.updates}]
    trained_bytes = sum(p.type.nbytes for p in trained)
    const_bytes = sum(c.type.nbytes for c in graph.consts)
    code = const = initial = None
    if firmware:
        code, const, initial = firmware.code, firmware.const, firmware.initial_values
        stack = max(firmware.stack_infer or 0, firmware.stack_train_step or 0)
        ram = initial + firmware.zeroed + stack
    else:
        const, initial, ram = const_bytes, sum(p.type.nbytes for p in graph.params), arena_bytes + trained_bytes
    step, peak = find_peak(blocks)
    return {
        "schema_version": SCHEMA_VERSION,
        "tte_version": __version__,
        "model": model,
        "target": target,
        "scheme": scheme,
        "toolchain": firmware.toolchain if firmware else None,
        "source": "linked" if firmware else "planned",
        "memory": {
            "arena_bytes": arena_bytes,
            "lower_bound_bytes": lower_bound_bytes,
            "proved_optimal": proved_optimal,
            "trained_bytes": trained_bytes,
            "static_ram_bytes": ram,
            "peak_node": step,
            "peak_tensors": [_summary(block) for block in peak],
        },
        "flash_bytes": (code or 0) + const + initial,
        "flash": {"code_bytes": code, "const_bytes": const, "initial_values_bytes": initial},
        "infer": _cost(firmware.stack_infer, firmware.instructions_infer, clock_hz) if firmware else _cost(),
        "train_step": _cost(firmware.stack_train_step, firmware.instructions_train_step, clock_hz)
        if firmware
        else _cost(),
        "layers": list_layers(graph),
        "gradients": list(dict.fromkeys(_user_name(p) for p in trained)),
    }


def render_html(report: dict[str, Any], blocks: Sequence[Block], nodes: int) -> str:
    """report.html: one file without outside references; the map shows time (node by node) against address."""
    source = importlib.resources.files("tte.codegen").joinpath("templates/report.html.j2").read_text()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    live = [sum(b.size for b in blocks if b.start <= i <= b.end) for i in range(nodes)]
    return environment.from_string(source).render(
        report=report, blocks=[asdict(b) for b in blocks], nodes=nodes, live=live, height=max([1, *live, _top(blocks)])
    )


def find_peak(blocks: Sequence[Block]) -> tuple[int, list[Block]]:
    """The first node at which most bytes are alive, and the tensors alive there, largest first."""
    if not blocks:
        return 0, []
    steps = sorted({b.start for b in blocks})
    step = max(steps, key=lambda i: (sum(b.size for b in blocks if b.start <= i <= b.end), -i))
    return step, sorted((b for b in blocks if b.start <= step <= b.end), key=lambda b: (-b.size, b.offset))


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
    for node, phase in zip(graph.nodes, find_phases(graph), strict=True):
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
        macs = count_macs(node)
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
    owner = {v.name: node.layer for node in reversed(graph.nodes) for v in node.inputs}
    for const in graph.consts:
        if const.name in owner:
            layers[owner[const.name]]["const_bytes"] += const.type.nbytes
    return list(layers.values())


def count_macs(node: Node) -> int:
    """Multiply-accumulates of a node; of a region, those of all its members."""
    if node.body:
        return sum(map(count_macs, node.body.nodes))
    rule = OPS[node.op].macs
    return rule(*(v.type for v in node.inputs), **node.attrs) if rule else 0


def main_op(node: Node) -> str:
    """The operator that gives a node its name: of a region, its anchor or else its first member."""
    if not node.body:
        return node.op
    members = node.body.nodes
    return next((n.op for n in members if OPS[n.op].kind in ("anchor", "opaque")), members[0].op)


def _user_name(param: Param) -> str:
    return param.origin.name if param.origin else param.name


def _summary(block: Block) -> dict[str, Any]:
    return {
        "name": block.name,
        "layer": block.layer,
        "op": block.op,
        "shape": list(block.shape),
        "dtype": block.dtype,
        "bytes": block.size,
        "offset": block.offset,
    }


def _cost(stack: int | None = None, instructions: int | None = None, clock_hz: int | None = None) -> dict[str, Any]:
    """ms_estimate supposes one instruction per cycle: an estimate, and no more than that."""
    estimate = round(1000 * instructions / clock_hz, 3) if instructions and clock_hz else None
    return {"stack_bytes": stack, "instructions": instructions, "ms_estimate": estimate}


def _top(blocks: Sequence[Block]) -> int:
    return max((b.offset + b.size for b in blocks), default=0)
