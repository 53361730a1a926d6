"""Writes the C project: programs, their kernels and their memory plan in, file contents out."""

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from tte.codegen.fast import DSP, Forms
from tte.codegen.fast.form import use_stack
from tte.codegen.kernel import CTYPES, Kernel
from tte.codegen.measured import Measured
from tte.codegen.plan import Plan
from tte.codegen.schedule import UNLIMITED, Call, Room, schedule
from tte.codegen.share import share
from tte.ir import Const, Graph, Node, Param, TensorType, Value
from tte.ir.rows import STRATEGIES, expand, in_pieces
from tte.ops.quantized import DEAD, add_terms, fixed_terms, tflite_terms
from tte.target import CORTEX_M7, FLAG, find_target

# What makes integers of floats: a NaN would not reach the loss.
NAN_ENDS = ("qnn_quantize", "qnn_round")

INTEGER_LOSS = "qnn.integer_cross_entropy"  # of logits, labels, factors of exponentials

HERE = Path(__file__).parent
RUNTIME = HERE.parent / "runtime_c"


@dataclass(frozen=True)
class Program:
    """One entry point: ``role`` is "infer", "evaluate" or "train"; the rest: see ``schedule``."""

    role: str
    graph: Graph
    plan: Plan
    room: Room | None = None
    measured: Measured = field(default_factory=dict)
    optimize: str = "speed"
    forms: Forms = field(default_factory=lambda: DSP)

    @functools.cached_property
    def calls(self) -> list[Call]:
        return schedule(self.graph, self.room, self.measured, self.optimize, self.forms)

    @functools.cached_property
    def roomy(self) -> "Program":
        """The same where each kernel has all the scratch that it can use; its plan knows nothing of that."""
        rooms = dict.fromkeys(range(len(self.graph.nodes)), UNLIMITED)
        return self if self.room is None else replace(self, room=rooms)

    def list_kernels(self) -> Iterator[tuple[Node, Node, Kernel, bool]]:
        """Of each kernel: who calls it, the node it makes, itself, and whether more scratch makes it faster."""
        for call, best in zip(self.calls, self.roomy.calls, strict=True):
            outer = self.graph.nodes[call.node]
            kernels, wanted = ((c.kernel.parts if c.members else (c.kernel,)) for c in (call, best))
            for node, kernel, like in zip(call.members or (outer,), kernels, wanted, strict=True):
                yield outer, node, kernel, kernel not in (like, use_stack(like))

    @property
    def input_offset(self) -> int | None:
        """Where the input lies in the arena, if it does."""
        return self.plan.offsets.get(self.graph.inputs[0].name)


@dataclass(frozen=True)
class Interface:
    """What the C API exposes. Types are those of the caller's buffers; ``target`` is None for `target: input`.

    input_place: "caller", "arena" or "rows", see ``tte.compile``
    output_layout: of a rank that has channels, else "model"; selftest: with golden values from a run on this computer
    """

    name: str
    input: TensorType
    output: TensorType
    target: TensorType | None
    classes: int | None
    loss: str
    learning_rate: float
    target_name: str
    input_layout: str
    output_layout: str
    model_hash: str
    version: str
    arena: str = "static"
    input_place: str = "caller"
    optimize: str = "speed"
    selftest: bool = True
    notes: tuple[str, ...] = field(default=())


def emit(programs: Sequence[Program], interface: Interface) -> dict[str, str]:
    """Path in the project -> text. The same input gives the same bytes: no dates, no paths, no hash order."""
    environment = _environment(interface.name)
    layout = StateLayout.of(programs)
    constants = _constants(programs)
    target = find_target(interface.target_name)
    names = _c_names(interface.name, constants)
    kernels: dict[Kernel, str] = {}
    for kernel in (k for program in programs for call in program.calls for k in call.kernel.family()):
        if kernel not in kernels:
            kernels[kernel] = f"{interface.name}_k{len(kernels):02d}_{kernel.template.rpartition('/')[2]}"
    functions = _functions(environment, kernels, interface.optimize == "size")
    called = {f["name"]: f["instead"] or f["name"] for f in reversed(functions["functions"])}
    symbols = {kernel: called[name] for kernel, name in kernels.items()}
    bodies, listed = [], {}
    for program in programs:
        bodies.append(_program(program, program.calls, kernels, layout, names))
        listed[program.role] = [_list_call(program.graph.nodes[c.node], c, symbols) for c in program.calls]
    used = {call for body in bodies for call in body["constants"]}
    slots = []
    for i, (param, offset) in enumerate(layout.slots):
        array = _array(f"{interface.name}_initial_{i}", param)
        slots.append(array | {"offset": offset, "initial": array["name"]})
    context = {
        "api": interface,
        "programs": bodies,
        "forward": _find_forward({body["role"]: body["calls"] for body in bodies}),
        **functions,
        "weights": [
            _array(*pair) for pair in {names[c.name]: c for c in reversed(constants)}.items() if pair[0] in used
        ]
        + slots,
        "state": layout,
        "slots": slots,
        "hash_bytes": [str(b) for b in bytes.fromhex(interface.model_hash)[:16]],
        "integer_logits": any(node.op == INTEGER_LOSS for program in programs for node in program.graph.nodes),
        "macs": {program.role: sum(node.macs for node in program.graph.nodes) for program in programs},
        "arena_bytes": max(1, *(program.plan.arena_bytes for program in programs)),
        "input_offset": programs[0].input_offset,
        "flag": FLAG[interface.optimize],
        "core": target if target.gcc_flags and target.fpu else CORTEX_M7,
        "ctype": CTYPES,
    }
    paths = {template: path.format(m=interface.name) for template, path in FILES.items()}
    selftest = [SELFTEST.format(m=interface.name)] if interface.selftest else []
    context["sources"] = [
        path for path in (*paths.values(), *_runtime(interface.name)) if path.endswith(".c")
    ] + selftest
    files = {path: environment.get_template(template).render(context) for template, path in paths.items()}
    files |= _runtime(interface.name)
    files["build.json"] = json.dumps(_description(interface, layout, programs) | {"calls": listed}, indent=2)
    files |= {f"emulator/{f.name}": f.read_text() for f in sorted(RUNTIME.glob("emu_*")) if f.is_file()}
    header = environment.get_template("file_header.j2").render(context)
    return {
        path: (header + "\n" + text if path.endswith((".c", ".h")) else text).rstrip("\n") + "\n"
        for path, text in files.items()
    }


FILES = {
    "model.h.j2": "Core/Inc/{m}.h",
    "model.c.j2": "Core/Src/{m}.c",
    "build.h.j2": "Core/Src/{m}_build.h",
    "kernels.h.j2": "Core/Src/{m}_kernels.h",
    "kernels.c.j2": "Core/Src/{m}_kernels.c",
    "weights.h.j2": "Core/Src/{m}_weights.h",
    "weights.c.j2": "Core/Src/{m}_weights.c",
    "CMakeLists.txt.j2": "CMakeLists.txt",
    "module.yml.j2": "zephyr/module.yml",
}
SELFTEST = "Core/Src/{m}_selftest.c"


@dataclass(frozen=True)
class StateLayout:
    """Where each trained parameter lives: (param, byte offset), 4-aligned, in the order of the training graph.

    The same bytes are the payload of a saved state. The learning rate is a setting, not something learned: it is not
    part of it.
    """

    slots: tuple[tuple[Param, int], ...]
    nbytes: int

    @staticmethod
    def of(programs: Sequence[Program]) -> "StateLayout":
        params = {p.name: p for program in programs for p, _ in program.graph.updates}
        slots, offset = [], 0
        for param in params.values():
            slots.append((param, offset))
            offset += (param.type.nbytes + 3) // 4 * 4
        return StateLayout(tuple(slots), offset)

    def offset(self, name: str) -> int | None:
        return next((offset for param, offset in self.slots if param.name == name), None)


def _program(
    program: Program,
    calls: list[Call],
    kernels: Mapping[Kernel, str],
    layout: StateLayout,
    names: Mapping[str, str],
) -> dict[str, Any]:
    """The calls of one entry point as the template prints them."""
    graph = program.graph
    storage = _Storage(program, layout, names)
    rows: list[dict[str, Any]] = []
    for call in calls:
        node = graph.nodes[call.node]
        arguments = [storage.pointer(v) for v in call.inputs]
        arguments += [storage.pointer(v) for v in call.outputs]
        if call.kernel.scratch:
            arguments.append(f"ARENA(uint8_t, {program.plan.scratch[call.node]})")
        updated = [p.name for p, v in graph.updates if v in node.outputs]
        rows.append(
            {
                "kernel": kernels[call.kernel],
                "arguments": arguments,
                "comment": _comment(node, updated),
                "takes_rows": any(member.op == "source" for member in expand(node)),
                "is_loss": bool(graph.updates or program.role == "evaluate") and node.output == graph.outputs[0],
                "logits": [storage.pointer(v) for v in (node.inputs if node.op == INTEGER_LOSS else node.inputs[:1])],
                "loss": storage.pointer(node.output),
                "op": node.op,
            }
        )
    copies = []
    for param, value in graph.updates:
        if not storage.is_state(value):
            source = storage.pointer(value)
            copies.append({"to": storage.state(param), "from": source, "size": value.type.nbytes})
    return {
        "role": program.role,
        "calls": rows,
        "copies": copies,
        "result": storage.pointer(graph.outputs[0]),
        "constants": list(storage.used),
        "reads_target": any("target" in row["arguments"] for row in rows),
    }


def _find_forward(calls: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The calls that inference and evaluation begin with."""
    both = zip(calls["infer"], calls["evaluate"], strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both)]


class _Storage:
    """Where a value lives, as a C expression."""

    def __init__(self, program: Program, layout: StateLayout, names: Mapping[str, str]) -> None:
        self.graph, self.plan, self.layout, self.names = program.graph, program.plan, layout, names
        self.owners = program.graph.owners()
        self.values = {v.name: v for v in program.graph.values()}
        self.consts = {c.name for c in program.graph.consts}
        self.params = {p.name for p in program.graph.params}
        self.inputs = {v.name: i for i, v in enumerate(program.graph.inputs)}
        self.used: dict[str, None] = {}

    def root(self, value: Value) -> Value:
        """The value whose buffer this one shares, through views and in-place results."""
        return self.values[self.owners[value.name]]

    def is_state(self, value: Value) -> bool:
        return self.root(value).name in self.params

    def state(self, param: Value) -> str:
        offset = self.layout.offset(param.name)
        return "&learning_rate" if offset is None else f"STATE({CTYPES[param.type.dtype]}, {offset})"

    def pointer(self, value: Value) -> str:
        root = self.root(value)
        if root.name in self.inputs and root.name not in self.plan.offsets:
            return ("x", "target")[self.inputs[root.name]]
        if root.name in self.params:
            return self.state(root)
        if root.name in self.consts:
            self.used[self.names[root.name]] = None
            return self.names[root.name]
        return f"ARENA({CTYPES[value.type.dtype]}, {self.plan.offsets[root.name]})"


def _comment(node: Node, updated: list[str]) -> str:
    layer, what = _describe(node)
    update = f" -> {', '.join(updated)}" if updated and not in_pieces(node) else ""
    return _safe(f"{layer}: {what}{update}")


def _describe(node: Node) -> tuple[str, str]:
    """The layers of a node, and what it does."""
    members = list(expand(node))
    if len(members) > 1:
        ends = dict.fromkeys(member.layer or "-" for member in (members[0], members[-1]))
        return " to ".join(ends), STRATEGIES[str(node.attrs["strategy"])]
    return node.layer or "-", " + ".join(op.removeprefix("nn.") for op in _list_ops(node))


def _list_ops(node: Node) -> list[str]:
    return [op for member in node.body.nodes for op in _list_ops(member)] if node.body else [node.op]


def _list_call(node: Node, call: Call, kernels: Mapping[Kernel, str]) -> dict[str, Any]:
    """A call in build.json; parts: of a region in pieces, the kernels that its own calls."""

    def record(node: Node, kernel: Kernel) -> dict[str, Any]:
        layer, what = _describe(node)
        return {"layer": layer, "op": what, "macs": node.macs, "kernel": kernels[kernel]}

    parts = zip(call.members, call.kernel.parts, strict=False) if len(list(expand(node))) > 1 else ()
    return record(node, call.kernel) | {"parts": [record(*part) for part in parts]}


def _safe(text: str) -> str:
    """Text that cannot end a C comment."""
    return re.sub(r"[^\x20-\x7e]", "?", text).replace("*/", "* /").replace("/*", "/ *")


def _constants(programs: Sequence[Program]) -> list[Const]:
    return list({c.name: c for program in programs for c in program.graph.consts}.values())


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _c_names(prefix: str, constants: Sequence[Const]) -> dict[str, str]:
    """A C identifier for every constant, as near to the user's name as C allows; the same for the same content."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    known: dict[tuple[str, bytes], str] = {}
    for const in constants:
        content = CTYPES[const.type.dtype], const.data.tobytes()
        if content in known:
            names[const.name] = known[content]
            continue
        base = name = f"{prefix}_w_{_identifier(const.name)}"
        number = 2
        while name in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names[const.name] = known[content] = name
    return names


def _array(name: str, stored: Const | Param) -> dict[str, Any]:
    """A constant array as C text; floats with the nine digits that read back to the same bits."""
    flat = stored.data.reshape(-1)
    if stored.type.dtype == "float32":
        assert np.isfinite(flat).all(), f"{stored.name} has values that are not finite"
        items = [_float(v) for v in flat.tolist()]
    else:
        items = _integers(flat, stored.type.dtype, stored.name)
    rows = [", ".join(items[i : i + 8]) for i in range(0, len(items), 8)]
    return {
        "name": name,
        "ctype": CTYPES[stored.type.dtype],
        "size": max(1, len(items)),
        "rows": rows or ["0"],
        "comment": _safe(f"{stored.name} {stored.type.shape}"),
        "nbytes": stored.type.nbytes,
    }


def _float(value: float | str) -> str:
    """A C float literal that reads back to the same single-precision bits."""
    text = f"{float(np.float32(value)):.9g}"
    return text + ("" if "." in text or "e" in text else ".0") + "f"


def _integers(values: np.ndarray, dtype: str, name: str) -> list[str]:
    limits, whole = np.iinfo("uint8" if dtype == "bit" else dtype), values.astype(np.int64)
    for value in (whole.min(initial=0), whole.max(initial=0)):
        assert limits.min <= value <= limits.max, f"{name}: {value} does not fit {CTYPES[dtype]}"
    assert np.array_equal(whole, values), f"{name} has values that are not whole"
    return [str(value) for value in whole.tolist()]


def _index_type(indices: Sequence[int]) -> str:
    """The smallest C type that holds them and that C converts to int."""
    assert min(indices) >= 0
    return next(t for t, end in (("uint8_t", 2**8), ("int16_t", 2**15), ("int32_t", 2**31)) if max(indices) < end)


def _cycles(order: Sequence[int]) -> list[list[int]]:
    """The cycles of a permutation that move anything: each element's place takes what is at the next one's."""
    cycles: list[list[int]] = []
    left = {j for j, k in enumerate(order) if j != k}
    while left:
        cycles.append([min(left)])
        while (after := order[cycles[-1][-1]]) != cycles[-1][0]:
            cycles[-1].append(after)
        left -= set(cycles[-1])
    return cycles


def _literal(value: float, dtype: str) -> str:
    if dtype == "float32":
        return _float(value)
    return _integers(np.asarray([value]), dtype, "a constant in a kernel")[0]


def _description(interface: Interface, layout: StateLayout, programs: Sequence[Program]) -> dict[str, Any]:
    """build.json: what a program that runs the project has to know of it."""

    def tensor(type: TensorType) -> dict[str, Any]:
        return {"shape": type.shape, "dtype": type.dtype}

    return {
        "schema_version": 1,
        "tte_version": interface.version,
        "name": interface.name,
        "target": interface.target_name,
        "model_hash": interface.model_hash,
        "input": tensor(interface.input) | {"layout": interface.input_layout},
        "output": tensor(interface.output),
        "label": tensor(interface.target) if interface.target else None,
        "classes": interface.classes,
        "loss": interface.loss,
        "learning_rate": interface.learning_rate,
        "arena": interface.arena,
        "optimize": interface.optimize,
        "arena_bytes": max(p.plan.arena_bytes for p in programs),
        "state_bytes": layout.nbytes,
        "state": [{"name": p.name, "offset": at} | tensor(p.type) for p, at in layout.slots],
    }


def emit_kernels(kernels: Mapping[Kernel, str], prefix: str) -> dict[str, str]:
    """Only the kernels, under the given names: file name -> text, all for one folder."""
    environment = _environment(prefix)
    context = _functions(environment, kernels) | {"core": CORTEX_M7}
    files = {
        path.format(m=prefix): environment.get_template(template).render(context)
        for template, path in FILES.items()
        if "kernels" in template or "build" in template
    } | _runtime(prefix)
    return {Path(path).name: text for path, text in files.items()}


def _functions(environment: jinja2.Environment, kernels: Mapping[Kernel, str], shared: bool = False) -> dict[str, Any]:
    """What the templates print of each kernel: its name, arguments and body; and whether any looks for NaN."""
    result: list[dict[str, Any]] = []
    for kernel, name in kernels.items():
        function: dict[str, Any] = {
            "name": name,
            "template": kernel.template,
            "assembly": [],
            "portable": "",
            "stack": 0,
            "needs": f"{environment.globals['P']}_{'MVE' if kernel.template.startswith('mve/') else 'DSP'}",
            "numbers": False,
            "given": {},
            "instead": "",
        } | kernel.arguments()
        function["guard"] = function["needs"] if function["assembly"] else ""
        function["parts"] = [kernels[part] for part in kernel.parts]
        function["body"] = _kernel_body(environment, function)
        if kernel.portable:
            portable = function | {"template": kernel.portable.template} | kernel.portable.arguments()
            function["portable"] = _kernel_body(environment, portable)
        result.append(function)
    finds_nan = any(s["op"] in NAN_ENDS for f in result for s in f["tail"])
    result = share(result) if shared else result
    return {"functions": result, "finds_nan": finds_nan, "takes_rows": any(f["template"] == "source" for f in result)}


def _runtime(prefix: str) -> dict[str, str]:
    """Path -> text of what is the same in every project."""
    return {
        f"Core/Src/{prefix}_{name}": _prefixed((RUNTIME / f"tte_{name}").read_text(), prefix)
        for name in ("math.h", "dsp.h", "fma.c")
    }


def emit_selftest(interface: Interface, steps: int, golden: Mapping[str, int]) -> dict[str, str]:
    """The self-test; ``golden``: CRC-32 of the output and of the saved state, from a run of this very code."""
    environment = _environment(interface.name)
    context = {"api": interface, "steps": steps, "golden": golden}
    header = environment.get_template("file_header.j2").render(context)
    text = environment.get_template("selftest.c.j2").render(context)
    return {SELFTEST.format(m=interface.name): header + "\n" + text}


@functools.cache
def _environment(prefix: str) -> jinja2.Environment:
    """Kept, with the templates that it has compiled: reading them takes longer than printing them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE / "kernels", HERE / "templates"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "f32": _float,
        "literal": _literal,
        "round_int": round,
        "add_terms": _of_attributes(add_terms),
        "fixed_terms": _of_attributes(fixed_terms),
        "tflite_terms": _of_attributes(tflite_terms),
        "index_type": _index_type,
        "cycles": _cycles,
        "json": lambda v: json.dumps(v, indent=2),
    }
    environment.globals |= {"p": prefix, "P": prefix.upper(), "ctypes": CTYPES, "nan_ends": NAN_ENDS, "dead": DEAD}
    return environment


def _of_attributes(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
    """A filter that picks the function's arguments out of an operator's attributes."""
    return lambda attrs: function(**{k: attrs[k] for k in inspect.signature(function).parameters})


def _kernel_body(environment: jinja2.Environment, function: Mapping[str, Any]) -> str:
    text = environment.get_template(f"{function['template']}.c.j2").render(function)
    return "\n".join(line for line in text.splitlines() if line.strip())


def _prefixed(text: str, name: str) -> str:
    """The project's own C with the model's prefix, so that several models link into one firmware."""
    return text.replace("tte_", f"{name}_").replace("TTE_", f"{name.upper()}_")
