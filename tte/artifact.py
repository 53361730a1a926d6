"""What ``tte.compile`` returns: the C project, its report, and the means to run and to prove it."""

import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tte import __version__
from tte.analysis import extra_memory
from tte.codegen.emit import Program, emit, emit_selftest
from tte.codegen.export import write_tree
from tte.codegen.kernel import Kernel
from tte.codegen.measured import Database, merge, read_shipped
from tte.codegen.plan import Plan
from tte.compiler import RESERVED, Compiled, Pipeline, c_name, compile_graphs, find_passes, lower_programs
from tte.document import tally
from tte.errors import TTEError
from tte.ir import Graph
from tte.report import Measured, count_macs, describe_peak, make_report, render_html
from tte.runner.board import Board, require_ok
from tte.runner.build import Build
from tte.runner.host import HostBoard, open_host
from tte.runner.toolchain import Firmware, build_firmware, find_toolchains, host_compiler
from tte.runner.train import Data, RunResult, draw_samples, find_emulator, open_board, train
from tte.saved import pack_weights
from tte.scheme import UpdateScheme
from tte.target import FLAG, Target, find_target

SELFTEST_STEPS = 3


def compile(
    model: Any,
    example_inputs: Sequence[Any] | None = None,
    update_scheme: Any = "full",
    target: str = "cortex-m7",
    name: str | None = None,
    *,
    arena: str = "static",
    input: str = "caller",
    memory_plan: str | int = "auto",
    schedules: Path | str | None = None,
    optimize: str = "speed",
    clock: str | float | None = None,
    disable_passes: Sequence[str] = (),
    dump_ir: Path | str | None = None,
) -> "Artifact":
    """Compile a model into a C project that trains it on a device.

    model:          torch.nn.Module (with example_inputs), torch.export.ExportedProgram, path to .onnx, .pt2 or .ir,
                    onnx.ModelProto. Batch size 1.
    example_inputs: tuple of tensors for a torch.nn.Module
    update_scheme:  path to YAML, "full", "last-layer", "bias-only", "last-k:N", a mapping, or an UpdateScheme
    target:         see ``tte.targets()``
    name:           prefix of every C symbol and file; by default made from the model's file or class
    arena:          "static", or "extern": the caller gives the arena's memory to <name>_init
    input:          "caller": the input stays in the caller's memory, or "arena": the arena has a place for it, which
                    other tensors take over while it is read, or "rows": a function of the caller gives one
                    row of the picture after the other, and nobody needs a place for the whole of it
    memory_plan:    how many bytes the arena may have: "fastest" for any number, "smallest" for as few as possible, or a
                    number, whose cheapest plan is taken; "auto": so that the scheme's budget of SRAM is met; without
                    one smallest, or up to a sixteenth more where that makes kernels faster
    schedules:      file that ``tte.tune`` wrote: which kernels are fastest, beside what comes with tte; not for "size"
    optimize:       "speed", or "size" for least code: kernels that serve many shapes, compiled with -Os
    clock:          core clock for time estimates, "216MHz" or a number in Hz; by default the board's
    disable_passes: passes to leave out, see ``tte.compiler.OPTIONAL``
    dump_ir:        folder for the program after every pass
    Raises TTEError.
    """
    scheme = UpdateScheme.load(update_scheme)
    board = find_target(target)
    if not isinstance(name, str | None) or name == "":
        fix = "a string, such as 'net', or leave it out: then it is made from the model's file or class"
        raise TTEError("TTE-E044", f"{name!r} is not a name", where="--name", fix=fix)
    places = {"arena": (arena, ("static", "extern")), "input": (input, ("caller", "arena", "rows"))}
    for option, (value, choices) in places.items():
        if value not in choices:
            raise TTEError(
                "TTE-E044", f"no {option} placement {value!r}", where=f"--{option}", fix=" or ".join(choices)
            )
    if optimize not in FLAG:
        raise TTEError("TTE-E044", f"nothing optimizes for {optimize!r}", where="--optimize", fix=" or ".join(FLAG))
    if optimize == "size" and schedules is not None:
        fix = "leave out one of the two: schedules say what is fastest"
        raise TTEError("TTE-E059", "code for size is not chosen by schedules", where="--schedules", fix=fix)
    plans = ("auto", "fastest", "smallest")
    if memory_plan not in plans and (type(memory_plan) is not int or memory_plan < 1):
        fix = f"{', '.join(plans)}, or how many bytes the arena may have"
        raise TTEError("TTE-E044", f"no memory plan {memory_plan!r}", where="--memory-plan", fix=fix)
    clock_hz = board.clock_hz if clock is None else parse_clock(clock)
    pipeline = Pipeline(Path(dump_ir) if dump_ir else None, find_passes(disable_passes))
    prefix = c_name(name or default_name(model))
    renamed = (
        [f"files and symbols begin with {prefix}: {name!r} cannot be such a name"] if name not in (None, prefix) else []
    )
    given = Database.read(Path(schedules)) if schedules else Database()
    known = merge([read_shipped(), given]).of(board.cpu)
    lowered = lower_programs(model, example_inputs, scheme, pipeline, input)

    def make(reserved: int) -> Artifact:
        compiled = compile_graphs(
            lowered,
            scheme,
            board,
            prefix,
            __version__,
            pipeline,
            arena,
            input,
            memory_plan,
            known,
            optimize,
            reserved,
        )
        chosen = [f"{schedules}: {_judge_schedules(given, compiled.programs, board.cpu)}"] if schedules else []
        compiled = replace(compiled, notes=(*compiled.notes, *renamed, *chosen))
        return Artifact(compiled, scheme, board, clock_hz, _find_module(model))

    budget = scheme.budget.sram if memory_plan == "auto" else None
    artifact = make(RESERVED) if budget is None else _meet_budget(make, budget)
    artifact.require_budget(memory_plan)
    return artifact


def _meet_budget(make: "Callable[[int], Artifact]", budget: int) -> "Artifact":
    """What ``make`` gives for the bytes of RAM that are neither arena nor trained, with little computed twice.

    They are stack, library and the caller's buffers, and known when it is linked.
    """
    artifact = _settle(make, budget, RESERVED)
    planned, needed = _count_ram(artifact)
    twice = artifact.report["memory"]["extra_macs"]
    if not twice or artifact.report["source"] != "linked" or not needed <= budget or needed - planned >= RESERVED:
        return artifact
    try:
        roomier = _settle(make, budget, needed - planned)
    except TTEError as problem:
        if problem.code == "TTE-E053":  # the budget is larger than the board
            return artifact
        raise
    better = _count_ram(roomier)[1] <= budget and roomier.report["memory"]["extra_macs"] < twice
    return roomier if better else artifact


def _settle(make: "Callable[[int], Artifact]", budget: int, reserved: int) -> "Artifact":
    """Where more is linked than was reserved, a smaller arena may do."""
    while True:
        artifact = make(reserved)
        planned, needed = _count_ram(artifact)
        if not planned + reserved <= budget < needed:
            return artifact
        reserved = needed - planned


def _count_ram(artifact: "Artifact") -> tuple[int, int]:
    """Bytes of arena and of what learns, and of all that is linked."""
    memory = artifact.report["memory"]
    return memory["arena_bytes"] + memory["trained_bytes"], memory["static_ram_bytes"]


def _judge_schedules(given: Database, programs: Sequence[Program], core: str) -> str:
    """What came of the measurements that the user gave."""
    if not given.of(core):
        others = ", ".join(filter(given.of, given.cores)) or "no core"
        return f"nothing in it was measured for {core}, but for {others}"
    without = _list_kernels(replace(program, measured=read_shipped().of(core)) for program in programs)
    return f"{tally(len(_list_kernels(programs) - without), 'kernel')} of this project chosen by it"


def _list_kernels(programs: Iterable[Program]) -> set[Kernel]:
    """Those that call no others."""
    return {k for program in programs for call in program.calls for k in call.kernel.family() if not k.parts}


def _find_module(model: Any) -> Any:
    """The torch.nn.Module behind a model that is, or holds, one; else None."""
    if isinstance(model, str | Path) and Path(model).suffix == ".pt2":
        from tte.frontends.pytorch import read_program

        return read_program(Path(model)).module()
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(model).__mro__}
    if "torch.nn.modules.module.Module" in kinds:
        return model
    return model.module() if "torch.export.exported_program.ExportedProgram" in kinds else None


def default_name(model: Any) -> str:
    """File name without its ending, class name, or "model"."""
    if isinstance(model, str | Path):
        return Path(model).stem
    kind = type(model).__name__
    return "model" if kind in ("ModelProto", "ExportedProgram", "GraphModule") else kind


def parse_clock(clock: str | float) -> int:
    """Hertz from "216MHz", "1.2 GHz", "48000000", 216e6."""
    import re

    # A number is written out: 216e6 becomes "216000000", and NaN no frequency.
    text = f"{clock:.0f}" if isinstance(clock, int | float) else str(clock)
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(k|M|G)?(?:Hz)?", text.strip(), re.IGNORECASE)
    hertz = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[(match[2] or "").lower()] if match else 0
    if hertz < 1:
        raise TTEError("TTE-E044", f"{clock!r} is not a frequency", where="--clock", fix="write 216MHz")
    return round(hertz)


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compiled model. Nothing is written and no compiler is run before it is needed.

    module: the PyTorch module that was compiled, if it was one
    """

    compiled: Compiled
    scheme: UpdateScheme
    target: Target
    clock_hz: int | None
    module: Any = None
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory, repr=False)

    def __repr__(self) -> str:
        """One line: what a notebook shows."""
        names = [learned.layer for learned in self.compiled.resolved.layers]
        learns = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        arena = self.compiled.arena_bytes
        name, target = self.compiled.interface.name, self.target.name
        return f"<tte.Artifact {name} for {target}: arena {arena:,} bytes, learns {learns}>"

    @property
    def graph(self) -> Graph:
        """The program of a training step as it is generated."""
        return self.compiled.train.graph

    @property
    def plan(self) -> Plan:
        """The memory plan of a training step."""
        return self.compiled.train.plan

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json: sizes of the linked firmware where a compiler is installed, else planned ones."""
        firmware, measured = self._measure()
        return make_report(
            self.compiled.programs,
            model=self.compiled.interface.name,
            target=self.target,
            scheme=json.loads(json.dumps(self.compiled.resolved.scheme.model_dump(mode="json", exclude_none=True))),
            firmware=firmware,
            measured=measured,
            clock_hz=self.clock_hz,
            analytic_extra=extra_memory(self.compiled.source, self.compiled.resolved),
            unfused_macs=count_macs(self.compiled.gradients),
            optimize=self.compiled.interface.optimize,
        )

    def export(self, folder: Path | str) -> None:
        """Write the project; see docs/c-api.md for what is in it. Raises TTEError before anything is changed."""
        files = dict(self._files)
        files["report.json"] = (json.dumps(self.report, indent=2) + "\n").encode()
        files["report.html"] = render_html(self.report, self.compiled.programs).encode()
        write_tree(Path(folder), files)

    def host(self, sanitize: bool = False, selftest: bool = False) -> HostBoard:
        """The very same C, compiled for this computer and initialised.

        ``.train_step(x, y)``, ``.evaluate(x, y)``, ``.infer(x)``, ``.save_state()`` ... : see tte.runner.Board.
        selftest: with ``.selftest()``
        """
        board = open_host(self.build, sanitize, selftest)
        require_ok(board.init(), "init")
        return board

    def run(self, data: Any, *, evaluation: Any = None, runner: str = "auto", **options: Any) -> RunResult:
        """Train on an emulated board ("unicorn", "qemu", "auto": the first that knows the core) or on
        this computer ("host").

        data, evaluation: paths to .npz or mappings with x and y
        options: epochs, steps, rate, seed, progress, toolchain
        """
        return train(self.build.folder, data, evaluation=evaluation, runner=runner, **options)

    def verify(self, steps: int = 10, data: Any = None, tolerance: float = 1e-4) -> dict[str, Any]:
        """Compare gradients, losses and trained weights with PyTorch; see tte.proof.prove."""
        from tte.proof import prove

        return prove(self, steps, data, tolerance)

    def require_budget(self, memory_plan: str | int) -> None:
        """Raises TTEError (E049) where the scheme's budget is exceeded, naming the tensors that hold the peak."""
        budget = self.scheme.budget
        if budget.sram is None and budget.flash is None:
            return
        report = self.report
        memory, flash = report["memory"], report["flash_bytes"]
        what = "{:,} bytes of {} are needed ({}), the budget is {:,}"
        if budget.sram is not None and memory["static_ram_bytes"] > budget.sram:
            needed = memory["static_ram_bytes"]
            fix = f"leave out --memory-plan {memory_plan}, so that the budget decides"
            if memory_plan == "auto":
                twice = f", in which {memory['extra_macs']:,} multiply-accumulates are computed twice"
                fix = f"raise the budget to {needed}, or train fewer layers or channels: the smallest arena found has "
                fix += f"{memory['arena_bytes']:,} bytes{twice if memory['extra_macs'] else ''}"
            what = what.format(needed, "sram", report["source"], budget.sram)
            where = self.scheme.where("budget", "sram")
            raise TTEError(
                "TTE-E049", what, where=f"{where}; at the peak: {describe_peak(self.compiled.train)}", fix=fix
            )
        if budget.flash is not None and flash > budget.flash:
            fix = f"{self._less_code()}train fewer layers or channels, or raise the budget"
            what = what.format(flash, "flash", report["source"], budget.flash)
            raise TTEError("TTE-E049", what, where=f"{self.scheme.where('budget', 'flash')}; weights and code", fix=fix)

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """The project without its report. With a compiler for this computer the self-test is part of it."""
        interface = replace(self.compiled.interface, selftest=host_compiler() is not None)
        texts = emit(self.compiled.programs, interface)
        texts["model.ir"] = str(self.compiled.source)
        texts["scheme.resolved.yaml"] = self.compiled.resolved.to_yaml()
        files = {path: text.encode() for path, text in texts.items()}
        files["model.npz"] = _npz({c.name: c.data for c in self.compiled.source.consts})
        params = [p for p, _ in self.compiled.train.graph.updates]
        files["weights.npz"] = _npz(
            pack_weights(params, self.compiled.originals, self.compiled.replaced, self.compiled.imported)
        )
        if not interface.selftest:
            return files
        # Its golden values come from a run without it.
        steps, golden = self._golden(self._write(files))
        selftest = emit_selftest(interface, steps, golden)
        return files | {path: text.encode() for path, text in selftest.items()}

    def _write(self, files: Mapping[str, bytes]) -> Build:
        folder = Path(self._folder.name)
        for path, content in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
        return Build.open(folder)

    @cached_property
    def build(self) -> Build:
        """The project in a temporary folder."""
        return self._write(self._files)

    def _golden(self, build: Build) -> tuple[int, dict[str, int]]:
        """(training steps, CRC-32 of what the self-test computes): the same numbers and calls, on this computer.

        Fewer steps where made-up data drive the model out of the finite: NaNs have other bits on other machines.
        """
        board = open_host(build)
        samples = draw_samples(build, SELFTEST_STEPS + 1)
        for steps in range(SELFTEST_STEPS, -1, -1):
            require_ok(board.init(), "init")
            statuses = [board.train_step(*_sample(samples, i)).status for i in range(steps)]
            output = board.infer(samples.x[steps])
            if not any(statuses) and np.isfinite(output).all():
                break
        # A state ends with the CRC of all before it; the CRC of the whole is the same number for every state.
        state = int.from_bytes(board.save_state()[-4:], "little")
        return steps, {"output": zlib.crc32(output.tobytes()), "state": state}

    def _measure(self) -> tuple[Firmware | None, Measured]:
        """Link the firmware and run one step and one inference of it, as far as the tools are installed."""
        if self.target.name == "host" or not find_toolchains():
            return None, Measured()
        try:
            firmware = build_firmware(self.build, self.target)
        except TTEError as problem:
            if problem.code != "TTE-E053":
                raise
            raise self._explain_full(problem) from problem
        emulator = find_emulator(self.target)
        if emulator is None:
            return firmware, Measured()
        samples = draw_samples(self.build, 1)
        marks = []
        for call in ("infer", "train"):
            board = open_board(self.build, emulator)
            try:
                marks.append(_run_once(board, call, samples))
            finally:
                board.close()
        (stack_infer, infer), (stack_train, step) = marks
        return firmware, Measured(emulator, stack_infer, stack_train, infer, step)

    def _explain_full(self, problem: TTEError) -> TTEError:
        """What fills a memory, and what would make it less: the linker knows neither."""
        where, ways = problem.where, ""
        if "RAM needs" in problem.what:
            arena, trained = self.compiled.arena_bytes, self.compiled.train.graph.trained_bytes
            where = f"arena {arena:,} B, trained parameters {trained:,} B; at the peak: "
            where += describe_peak(self.compiled.train)
            if self.scheme.budget.sram is None and trained < self.target.ram.size:
                ways = f"set `budget: {{sram: {self.target.ram.size}}}` in the scheme: it may compute twice to fit; "
        if "FLASH needs" in problem.what:
            ways += self._less_code()
        return TTEError(problem.code, problem.what, where=where, fix=ways + problem.fix)

    def _less_code(self) -> str:
        return "" if self.compiled.interface.optimize == "size" else "compile with --optimize size; "


def _run_once(board: Board, call: str, samples: Data) -> tuple[int, int]:
    """(bytes of stack, instructions) of one call after start-up."""
    require_ok(board.init(), "init")
    if call == "infer":
        instructions = board.infer_counted(samples.x[0])[1]  # type: ignore[attr-defined]
    else:
        step = board.train_step(*_sample(samples, 0))
        require_ok(step.status, "training step")
        instructions = step.instructions
    marks = board.high_water()
    assert marks is not None
    return marks[0], instructions


def _sample(data: Data, i: int) -> tuple[np.ndarray, np.ndarray | None]:
    return data.x[i], None if data.y is None else data.y[i]


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz file; numpy writes no dates into it."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
