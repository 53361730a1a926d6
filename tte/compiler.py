"""The pipeline: model -> graph -> passes -> schedule -> plan -> C. The only module that knows every room."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tte.codegen.check import check_input, check_plan
from tte.codegen.emit import Interface, Program, StateLayout
from tte.codegen.fast import DSP, MVE
from tte.codegen.measured import Measured
from tte.codegen.plan import find_lower_bound, plan_memory, plan_together
from tte.codegen.schedule import UNLIMITED
from tte.errors import TTEError
from tte.frontends import import_model
from tte.ir import Const, Graph, Origin, Param, verify
from tte.ir.graph import remembered
from tte.ir.tiles import find_tiles
from tte.passes.accumulate import accumulate
from tte.passes.autodiff import differentiate
from tte.passes.batch_norm import fold_batch_norm
from tte.passes.canonicalize import canonicalize
from tte.passes.channels import select_channels
from tte.passes.costs import ANY, Arena
from tte.passes.cover import cover_backward
from tte.passes.fuse import fuse_elementwise, fuse_updates, transpose_first
from tte.passes.head import replace_head
from tte.passes.inplace import work_in_place
from tte.passes.integer_gradients import quantize_gradients, quantize_loss
from tte.passes.io import apply_input_format, own_layout, prepare, require_rows, take_rows
from tte.passes.layout import to_nhwc
from tte.passes.loss import append_loss
from tte.passes.optimizer import attach_sgd
from tte.passes.quantized import Settings, keep_saturation_masks, lower_with_notes
from tte.passes.recompute import recompute_forward
from tte.passes.reorder import reorder
from tte.passes.select_updates import select_updates
from tte.passes.simplify import drop_identity, eliminate_common_subexpressions, eliminate_dead_code, fold_constants
from tte.passes.stream import stream_forward
from tte.passes.tile import tile_backward
from tte.report import count_macs, describe_peak, list_soft
from tte.scheme import Resolved, UpdateScheme, resolve
from tte.target import KB, Target

Pass = Callable[[Graph], Graph]
RESERVED = 4 * KB  # of a budget, for stack and library, before the firmware is linked

# One form per idea: what the frontends bring becomes the graph that layers are selected in.
SIMPLIFY: tuple[Pass, ...] = (
    canonicalize,
    fold_constants,
    to_nhwc,
    fold_constants,
    fold_batch_norm,
    fold_constants,
    eliminate_common_subexpressions,
    eliminate_dead_code,
)
# Make it small. These may be turned off one by one, to see what each buys.
SHRINK: tuple[Pass, ...] = (
    eliminate_common_subexpressions,
    eliminate_dead_code,
    accumulate,
    transpose_first,
    fuse_updates,
    fuse_elementwise,
    cover_backward,
    tile_backward,
    reorder,
    recompute_forward,
    stream_forward,
    work_in_place,
)
SAVING = (cover_backward, tile_backward, recompute_forward, stream_forward)  # these do what they have to
OPTIONAL = {p.__name__: p for p in (eliminate_common_subexpressions, *SHRINK[2:]) if p is not recompute_forward}


@dataclass(frozen=True)
class Pipeline:
    """Runs passes with ``verify`` after each; writes every graph into ``dump`` where one is given."""

    dump: Path | None = None
    disabled: tuple[str, ...] = ()

    def run(self, graph: Graph, passes: Sequence[Pass], stage: str, arena: Arena = ANY) -> Graph:
        for number, apply in enumerate(passes):
            if apply.__name__ in self.disabled:
                continue
            graph = verify(apply(graph, arena) if apply in SAVING else remembered(apply)(graph))
            self.write(graph, f"{stage}.{number:02d}-{apply.__name__}")
        return graph

    def write(self, graph: Graph, name: str) -> None:
        if self.dump is None:
            return
        try:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / f"{name}.ir").write_text(str(graph))
        except OSError as problem:
            what, fix = f"cannot write: {problem.strerror}", "choose another place for --dump-ir"
            raise TTEError("TTE-E045", what, where=str(self.dump), fix=fix) from problem


@dataclass(frozen=True)
class Compiled:
    """All that is known of a model before C is written.

    imported:  the model as the frontend brought it
    source:    the model in the form that schemes are resolved against, all weights constants
    originals: the user's own tensors, by name, in the user's layout; those of a new head as it begins
    replaced:  the names of the new head's tensors
    forward:   the model with what learns as params, as the user's head and input format make it
    gradients: forward, loss and backward; outputs are the loss and one gradient per param
    programs:  infer, evaluate and train, each with its memory plan
    """

    imported: Graph
    source: Graph
    originals: dict[str, np.ndarray]
    replaced: tuple[str, ...]
    forward: Graph
    gradients: Graph
    resolved: Resolved
    target: Target
    interface: Interface
    programs: tuple[Program, ...]
    notes: tuple[str, ...]

    @property
    def arena_bytes(self) -> int:
        """Of the arena that all programs share."""
        return _arena_bytes(self.programs)

    @property
    def train(self) -> Program:
        return next(p for p in self.programs if p.role == "train")

    @property
    def state(self) -> StateLayout:
        return StateLayout.of(self.programs)


def lower(model: Any, example_inputs: Sequence[Any] | None = None, pipeline: Pipeline | None = None) -> Graph:
    """The forward graph of a model in the form that schemes are resolved against."""
    pipeline = pipeline or Pipeline()
    graph = verify(import_model(model, example_inputs))
    pipeline.write(graph, "0-import")
    return _simplify(graph, pipeline)


def _simplify(graph: Graph, pipeline: Pipeline) -> Graph:
    """Raises TTEError (E028) where finite weights give others that are not."""
    with np.errstate(all="ignore"):
        graph = pipeline.run(graph, SIMPLIFY, "1-simplify")
    for const in graph.consts:
        if const.type.dtype == "float32" and not np.isfinite(const.data).all():
            raise TTEError(
                "TTE-E028",
                f"{const.name} is NaN or infinite when constants and batch norms are folded",
                where=const.name,
                fix="look for a batch norm whose variance is not above 0, or for weights that overflow",
            )
    return graph


@dataclass(frozen=True)
class Lowered:
    """What a scheme makes of a model, before memory is thought of; names as in ``Compiled``, programs by their role."""

    imported: Graph
    source: Graph
    replaced: tuple[Const, ...]
    forward: Graph
    with_loss: Graph
    gradients: Graph
    roles: dict[str, Graph]
    resolved: Resolved
    notes: tuple[str, ...]


def lower_programs(
    model: Any,
    example_inputs: Sequence[Any] | None,
    scheme: UpdateScheme,
    pipeline: Pipeline,
    input_place: str = "caller",
) -> Lowered:
    """Model and scheme as three programs: train, infer, evaluate."""
    imported = verify(import_model(model, example_inputs))
    pipeline.write(imported, "0-import")
    if input_place == "rows":
        require_rows(imported.inputs[0].type, scheme.io)
    with _located(scheme):
        prepared = apply_input_format(imported, scheme.io.input)
    forward = _simplify(prepared, pipeline)
    given = {id(c) for c in forward.consts}
    if scheme.head is not None:
        with _located(scheme):
            forward = verify(replace_head(forward, scheme.head.layer, scheme.head.classes, scheme.head.init))
    replaced = [c for c in forward.consts if c.origin and id(c) not in given]
    source = forward
    resolved = resolve(scheme, forward)
    forward, notes = select_channels(forward, resolved)
    forward = verify(fold_constants(verify(select_updates(verify(forward), resolved)), shared=True))
    quantized = Settings(scheme.quantized.requantize, scheme.quantized.weight_storage)
    forward, left = lower_with_notes(forward, quantized)
    forward, notes = verify(drop_identity(verify(forward))), [*notes, *left]
    pipeline.write(forward, "2-forward")
    clipped = scheme.optimizer.clip_loss_grad is not None
    own = partial(prepare, own=imported.inputs[0].type, format=scheme.io.input)
    with _located(scheme):
        with_loss = verify(append_loss(forward, scheme.loss, scheme.io.target == "input", own, clipped))
    differentiated = verify(differentiate(keep_saturation_masks(with_loss), scheme.optimizer.clip_loss_grad))
    gradients = verify(eliminate_dead_code(differentiated))
    pipeline.write(gradients, "3-gradients")
    stepped = verify(quantize_gradients(gradients)) if scheme.quantized.gradients == "int8" else gradients
    train = verify(attach_sgd(stepped, scheme.optimizer.lr, scheme.quantized.qas, scheme.quantized.rounding))
    evaluated = verify(quantize_loss(with_loss)) if scheme.quantized.gradients == "int8" else with_loss
    roles = {"train": train, "infer": forward, "evaluate": evaluated}
    if input_place == "rows":
        roles = {role: verify(take_rows(graph)) for role, graph in roles.items()}
    roles = {role: replace(graph, name=role) for role, graph in roles.items()}
    return Lowered(
        imported=imported,
        source=source,
        replaced=tuple(replaced),
        forward=forward,
        with_loss=with_loss,
        gradients=gradients,
        roles=roles,
        resolved=resolved,
        notes=tuple(notes),
    )


@contextmanager
def _located(scheme: UpdateScheme) -> Iterator[None]:
    """A pass knows the place in the scheme, "head.layer"; whoever wrote the scheme is told file and line."""
    try:
        yield
    except TTEError as problem:
        where = scheme.where(*problem.where.split("."))
        raise TTEError(problem.code, problem.what, where=where, fix=problem.fix) from problem


def compile_graphs(
    lowered: Lowered,
    scheme: UpdateScheme,
    target: Target,
    name: str,
    version: str,
    pipeline: Pipeline,
    arena: str = "static",
    input_place: str = "caller",
    memory_plan: str | int = "auto",
    measured: Measured | None = None,
    optimize: str = "speed",
    reserved: int = RESERVED,
) -> Compiled:
    """Everything from there up to the C: the three programs, planned and checked.

    reserved: bytes of a budget that are neither arena nor trained
    """
    imported, forward, with_loss = lowered.imported, lowered.forward, lowered.with_loss
    train = lowered.roles["train"]
    limit = _find_limit(memory_plan, scheme.budget.sram, train, reserved)
    room = Arena(limit, input_place == "arena")
    programs = _fit_programs(lowered.roles, pipeline, room)
    if target.dsp:
        spare = SPARE if memory_plan == "auto" and limit == 0 else 0.0
        known = measured if measured and optimize == "speed" else {}
        quiet = replace(pipeline, dump=None)
        programs = _quicken(programs, lowered.roles, quiet, room, known, optimize, spare, target)
    check_input([p.graph for p in programs], [p.plan for p in programs])
    needed = _arena_bytes(programs)
    if isinstance(memory_plan, int) and needed > memory_plan:
        what = f"the smallest arena found for this has {needed:,} bytes, {memory_plan:,} are allowed"
        fix = f"--memory-plan {needed}"
        if twice := count_macs(programs[0].graph) - count_macs(lowered.gradients):
            plain = _arena_bytes(_fit_programs(lowered.roles, replace(pipeline, dump=None), replace(room, limit=0)))
            fix += f" computes {twice:,} multiply-accumulates twice for that; with {plain:,} bytes (smallest) none are"
        largest = max(programs, key=lambda program: program.plan.arena_bytes)
        where = f"--memory-plan; at the peak: {describe_peak(largest)}"
        raise TTEError("TTE-E049", what, where=where, fix=f"{fix}; or train fewer layers or channels")
    target_value = next((v for v in with_loss.inputs if v.name == "target"), None)
    given_layout = scheme.io.input.layout
    layout = own_layout(imported.inputs[0].type) if given_layout == "model" else given_layout
    interface = Interface(
        name=name,
        input=forward.inputs[0].type,
        output=forward.outputs[0].type,
        target=target_value.type if target_value else None,
        classes=next((n.inputs[0].type.shape[-1] for n in with_loss.nodes if n.op == "nn.cross_entropy"), None),
        loss=scheme.loss.name,
        target_name=target.name,
        learning_rate=scheme.optimizer.lr,
        input_layout=layout,
        output_layout=own_layout(forward.outputs[0].type),
        model_hash=hash_model(forward, train),
        version=version,
        arena=arena,
        input_place=input_place,
        optimize=optimize,
        notes=lowered.notes,
    )
    notes = (*lowered.notes, *_note_floats(programs, target), *_note_budget(memory_plan, scheme))
    originals = {
        c.origin.name: (c.data if c.origin.quantized is None else c.origin.quantized).reshape(c.origin.shape)
        for c in imported.consts
        if c.origin
    }
    # A new layer begins as it was made.
    originals |= {c.origin.name: _as_user(c, c.origin) for c in lowered.replaced if c.origin}
    return Compiled(
        imported=imported,
        source=lowered.source,
        originals=originals,
        replaced=tuple(c.origin.name for c in lowered.replaced if c.origin),
        forward=forward,
        gradients=lowered.gradients,
        resolved=lowered.resolved,
        target=target,
        interface=interface,
        programs=tuple(programs),
        notes=notes,
    )


def _note_floats(programs: Sequence[Program], target: Target) -> list[str]:
    """What a core without FPU computes in software."""
    soft = {p.role: list_soft(p.graph) for p in programs}
    if target.fpu or not any(soft.values()):
        return []
    infer = ", ".join(soft["infer"]) or "none"
    what = f"of inference these layers: {infer}; of a training step {len(soft['train'])} (soft_float in report.json)"
    return [f"{target.name} has no FPU and computes floats in software, slowly: {what}"]


def _note_budget(memory_plan: str | int, scheme: UpdateScheme) -> list[str]:
    """What one of two wishes comes to."""
    if memory_plan == "auto" or scheme.budget.sram is None:
        return []
    return [f"the arena is made for --memory-plan {memory_plan}; that the budget of SRAM is met is only checked"]


def _find_limit(memory_plan: str | int, budget: int | None, train: Graph, reserved: int) -> int:
    """Bytes that the arena may have; 0 for as few as possible."""
    if isinstance(memory_plan, int):
        return memory_plan
    if memory_plan == "auto" and budget is not None:
        return max(1, budget - reserved - train.trained_bytes)
    return UNLIMITED if memory_plan == "fastest" else 0


def _fit_programs(roles: Mapping[str, Graph], pipeline: Pipeline, arena: Arena) -> list[Program]:
    """The programs, each as cheap as the arena allows; where that is too small, as small as possible.

    Nothing is computed twice unless nothing else helps. What has too many bytes alive is not placed before all else is
    tried.
    """
    large: list[tuple[int, list[Graph]]] = []
    for again in (False, True):
        room = arena.limit
        for left in reversed(range(TRIES)):
            graphs = shrink(roles, pipeline, replace(arena, limit=room, may_recompute=again))
            needed = _find_bound(graphs, arena)
            if needed <= arena.limit or arena.limit == 0:
                programs = place(roles, graphs, arena)
                needed = _arena_bytes(programs)
                if needed <= arena.limit or arena.limit == 0:
                    return programs
            no_less = bool(large) and min(size for size, _ in large) <= needed
            large.append((needed, graphs))
            if room == 0 or (again and no_less):
                break
            # Gaps between the buffers take what is too much.
            room = max(0, room - (needed - arena.limit)) if left > 1 else 0
    return min((place(roles, graphs, arena) for _, graphs in large), key=_arena_bytes)


TRIES = 3


def _find_bound(graphs: Sequence[Graph], arena: Arena) -> int:
    """No arena in which these run is smaller."""
    return max(find_lower_bound(graph, arena.holds_input) for graph in graphs)


def _arena_bytes(programs: Sequence[Program]) -> int:
    return max(program.plan.arena_bytes for program in programs)


def plan_programs(roles: Mapping[str, Graph], pipeline: Pipeline, arena: Arena) -> list[Program]:
    """Each program made small, placed and checked; one need not be smaller than those before it."""
    return place(roles, shrink(roles, pipeline, arena), arena)


def shrink(roles: Mapping[str, Graph], pipeline: Pipeline, arena: Arena) -> list[Graph]:
    """The programs made small; one need not be smaller than those before it."""
    graphs: list[Graph] = []
    room = arena
    for role, graph in roles.items():
        graphs.append(pipeline.run(graph, SHRINK, f"4-{role}", room))
        room = replace(room, limit=max(room.limit, find_lower_bound(graphs[-1], arena.holds_input)))
    return graphs


def place(roles: Iterable[str], graphs: Sequence[Graph], arena: Arena) -> list[Program]:
    """Programs with their plans, checked."""
    programs = [Program(*p) for p in zip(roles, graphs, plan_together(graphs, arena.holds_input), strict=True)]
    for program in programs:
        check_plan(program.graph, program.plan)
    return programs


SHARES = (1.0, 0.75, 0.5, 0.25)  # of what is free: the buffers round about may leave gaps


def make_room(
    programs: Sequence[Program], arena: Arena, measured: Measured, target: Target, optimize: str = "speed"
) -> list[Program]:
    """The programs with scratch for the target's faster kernels, where the arena then is no larger than it may be.

    What was measured decides only where its kernels find as much room as the default ones.
    """
    height = max(arena.limit, _arena_bytes(programs))
    result = []
    for program in programs:
        graph = program.graph
        for share, known in product(SHARES, (measured, {}) if measured else ({},)):
            tried = _take_room(program, height, share, known, target, optimize)
            scratch = {c.node: c.kernel.scratch for c in tried.calls if c.kernel.scratch}
            plan = plan_memory(
                graph, scratch, hold_input=arena.holds_input, input_offset=program.input_offset, most=height
            )
            if plan.arena_bytes <= height:
                check_plan(graph, plan, scratch)
                program = replace(tried, plan=plan)
                break
        result.append(program)
    return result


def _take_room(
    program: Program, height: int, share: float, measured: Measured, target: Target, optimize: str
) -> Program:
    """The program with kernels that find a share of what is free below ``height`` at their node."""
    room = {i: int((height - live) * share) for i, live in enumerate(program.plan.live)}
    return replace(program, room=room, measured=measured, optimize=optimize, forms=MVE if target.mve else DSP)


def _quicken(
    programs: Sequence[Program],
    roles: Mapping[str, Graph],
    pipeline: Pipeline,
    arena: Arena,
    measured: Measured,
    optimize: str,
    spare: float,
    target: Target,
) -> list[Program]:
    """The programs with faster kernels, or others where those cost less: regions may leave kernels too little.

    spare: by how much the arena may be larger than that of ``programs``, of it, where that makes kernels faster
    """
    shares: tuple[float, ...] = (0.875, 0.75, 0)
    if spare:
        height = _arena_bytes(programs)
        hopeful = [_take_room(p, height, 1, measured, target, optimize) for p in programs]  # were there no gaps
        cost, ideal = estimate(hopeful)
        if cost <= (1 + spare) * ideal:
            best = make_room(programs, arena, measured, target, optimize)
            if estimate(best)[0] <= (1 + spare) * ideal:
                return best
        arena = replace(arena, limit=int(height * (1 + spare)))
        shares = (1, 1 - spare / 2)
    best = make_room(programs, arena, measured, target, optimize)
    if not 0 < arena.limit < UNLIMITED:
        return best
    cost, _ = estimate(best)
    tried = [[program.graph for program in programs]]
    for share in shares:
        graphs = shrink(roles, pipeline, replace(arena, limit=int(arena.limit * share)))
        if graphs in tried or _find_bound(graphs, arena) > arena.limit:
            continue
        tried.append(graphs)
        others = place(roles, graphs, arena)
        if _arena_bytes(others) <= arena.limit:
            others = make_room(others, arena, measured, target, optimize)
            if (other := estimate(others)[0]) < cost:
                best, cost = others, other
    return best


SPARE = 1 / 16
PORTABLE = 4  # times the instructions of a faster kernel, about
CRAMPED = 1.4  # times, with less scratch than a kernel would take
NARROW = 3  # times the instructions, divided by the width of tiles, are lost beside


def estimate(programs: Sequence[Program]) -> tuple[float, int]:
    """What the programs cost: multiply-accumulates, more of kernels that are portable, cramped or in narrow tiles; and
    what they would if there were none of these."""
    cost: dict[tuple[str, str], float] = {}  # a member may have several kernels, for parts of its tiles
    ideal: dict[tuple[str, str], int] = {}
    for program in programs:
        for outer, node, kernel, cramped in program.list_kernels():
            tiles = find_tiles(outer)
            key = (program.role, f"{outer.output.name} {node.output.name}")
            times = PORTABLE if not kernel.portable else CRAMPED if cramped else 1
            times += NARROW / tiles.width if tiles else 0
            cost[key] = max(cost.get(key, 0), node.macs * times)
            ideal[key] = node.macs
    return sum(cost.values()), sum(ideal.values())


def _as_user(const: Const, origin: Origin) -> np.ndarray:
    """A constant in the layout of the user's tensor."""
    result = np.zeros(origin.shape, const.data.dtype)
    result.reshape(-1)[origin.index] = const.data if origin.scale is None else const.data / origin.scale
    return result


def hash_model(forward: Graph, train: Graph) -> str:
    """Names what a saved state belongs to: the model, its initial values and what learns, in 16 bytes of SHA-256.

    Target, schedule, plan and version of tte are not in it: an updated firmware keeps what was learned.
    """
    digest = hashlib.sha256(str(forward).encode())
    weights: list[Param | Const] = [*forward.params, *forward.consts]
    for stored in weights:
        digest.update(stored.name.encode() + stored.data.tobytes())
    for param, _ in train.updates:
        digest.update(param.name.encode())
    return digest.hexdigest()[:32]


# <name>.h must not hide a header of the C library, nor <name>.c be a file of every firmware.
TAKEN = frozenset(
    """
    assert complex ctype errno fenv float inttypes iso646 limits locale main math setjmp signal stdalign stdarg
    stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype
    """.split()
)


def c_name(name: str) -> str:
    """A model's name as a C identifier, "m" where nothing is left of it."""
    result = re.sub(r"\W+", "_", name, flags=re.ASCII).lower()[:64].strip("_")
    if not result or result[0].isdigit() or result in TAKEN or result.startswith("emu_"):
        result = f"m_{result}".rstrip("_")
    return result


def find_passes(names: Sequence[str]) -> tuple[str, ...]:
    """The full names of passes to leave out. Raises TTEError for a name that is not among OPTIONAL."""
    for name in names:
        if name not in OPTIONAL:
            raise TTEError(
                "TTE-E044",
                f"no pass {name!r} that can be left out",
                where="--disable-pass",
                fix=f"one of {', '.join(OPTIONAL)}",
            )
    return tuple(names)
