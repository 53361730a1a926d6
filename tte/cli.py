"""The command line: each command calls one function of tte and prints what it returns, as a table or as JSON."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

import typer

from tte.errors import TTEError

if TYPE_CHECKING:
    from tte.explain import MemoryRow, MemoryTable
    from tte.runner.profile import Cost

# Everything else is imported inside the commands: `tte --help` must not wait for torch.

app = typer.Typer(
    name="tte",
    help="Compile a trained model into a C project that fine-tunes it on a microcontroller.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="an .onnx file, a .pt2 file of torch.export.save, or tte's own text (.ir)")]
Scheme = Annotated[
    str,
    typer.Option(
        "--update-scheme", "-u", help="YAML file, or full, last-layer, bias-only, last-k:N", show_default=True
    ),
]
Metric = Annotated[str, typer.Option(help="what is counted: instructions, or cycles, which llvm-mca estimates")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


# typer does not say where this class lives: in click, or in a copy of its own.
UsageError: Any = typer.BadParameter.__base__


def main() -> NoReturn:
    """Entry point: a TTEError is three lines on stderr and exit status 1; anything else is our bug and a traceback."""
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as problem:
        command = problem.ctx.command_path if problem.ctx else "tte"
        what = " ".join(problem.format_message().split()).rstrip(".")
        print(TTEError("TTE-E059", what, where=command, fix=f"see `{command} --help`"), file=sys.stderr)
    except TTEError as problem:
        print(problem, file=sys.stderr)
    sys.exit(1)


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from tte import __version__

        print(f"tte {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def analyze(
    model: Model,
    write_scheme: Annotated[Path | None, typer.Option(help="write a commented scheme to start from")] = None,
    update_scheme: Annotated[
        str | None, typer.Option("-u", "--update-scheme", help="with a scheme: what its training costs in memory")
    ] = None,
    target: Annotated[
        str | None, typer.Option("-t", "--target", help="with a scheme: whose kernels take scratch (default cortex-m7)")
    ] = None,
    input_: Annotated[str | None, typer.Option("--input", help="with a scheme: as for `tte compile`")] = None,
    json_: Json = False,
) -> None:
    """List the layers of a model: names for a scheme, shapes, parameters, cost, and what can learn.

    With a scheme: plans of its training step from the smallest to the fastest, and what each way of saving memory buys.
    """
    import tte

    if update_scheme is not None:
        if write_scheme:
            raise TTEError(
                "TTE-E059", "one reads a scheme, the other writes one", where="--write-scheme", fix="leave out one"
            )
        given = {"target": target or "cortex-m7", "input": input_ or "caller"}
        return _print_memory(tte.explain_memory(model, update_scheme=update_scheme, **given), json_)
    if target or input_:
        option, fix = "--target" if target else "--input", "give the scheme: --update-scheme"
        raise TTEError("TTE-E059", "without a scheme no plan is made", where=option, fix=fix)
    if write_scheme and write_scheme.exists():
        raise _unwritable(write_scheme, "there is a file already")
    analysis = tte.analyze(model)
    if write_scheme:
        _write(write_scheme, analysis.scheme_yaml())
    if json_:
        return _print_json(analysis.to_dict())
    columns = ["layer", "operator", "output", "parameters", "MACs", "can learn"]
    rows = [
        [row["name"], row["op"], "x".join(map(str, row["shape"])), row["parameters"], row["macs"], row["trainable"]]
        for row in analysis.to_dict()["layers"]
    ]
    if any(row.analytic_extra_bytes is not None for row in analysis.layers):
        columns.append("extra bytes to learn (analytic)")
        rows = [[*row, layer.analytic_extra_bytes] for row, layer in zip(rows, analysis.layers, strict=True)]
    _print_table("layers", columns, rows)


@app.command("compile")
def compile_model(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder of the C project")],
    update_scheme: Scheme = "full",
    target: Annotated[str, typer.Option("-t", "--target", help="see `tte targets`")] = "cortex-m7",
    name: Annotated[str | None, typer.Option(help="prefix of every C symbol and file")] = None,
    arena: Annotated[str, typer.Option(help="static: inside the project; extern: given to <name>_init")] = "static",
    input_: Annotated[
        str, typer.Option("--input", help="caller: stays where it is; arena: has a place there; rows: comes row by row")
    ] = "caller",
    memory_plan: Annotated[
        str, typer.Option(help="fastest, smallest, or how large the arena may be: 96KB; auto: by the scheme's budget")
    ] = "auto",
    schedules: Annotated[Path | None, typer.Option(help="what `tte tune` found: kernels are chosen by it")] = None,
    optimize: Annotated[str, typer.Option(help="speed; size: least code, for some more instructions")] = "speed",
    clock: Annotated[str | None, typer.Option(help="core clock for time estimates, e.g. 216MHz")] = None,
    disable_pass: Annotated[list[str] | None, typer.Option(help="leave out a pass (again for more)")] = None,
    dump_ir: Annotated[Path | None, typer.Option(help="write the program after every pass into this folder")] = None,
    json_: Json = False,
) -> None:
    """Write the C project that trains the model: forward, backward, update, memory plan, report."""
    import tte

    artifact = tte.compile(
        model,
        update_scheme=update_scheme,
        target=target,
        name=name,
        arena=arena,
        input=input_,
        memory_plan=_memory_plan(memory_plan),
        schedules=schedules,
        optimize=optimize,
        clock=clock,
        disable_passes=disable_pass or (),
        dump_ir=dump_ir,
    )
    artifact.export(output)
    if json_:
        return _print_json(artifact.report)
    for note in dict.fromkeys((*artifact.compiled.resolved.notes, *artifact.compiled.notes)):
        print(f"note: {note}")
    learned = [
        (layer.layer, _count(layer.weight, layer.channels), "yes" if layer.bias else "no")
        for layer in artifact.compiled.resolved.layers
    ]
    _print_table("what learns", ("layer", "weight", "bias"), learned)
    _print_report(artifact.report, output)


@app.command()
def tune(
    model: Model,
    update_scheme: Scheme = "full",
    target: Annotated[str, typer.Option("-t", "--target", help="see `tte targets`")] = "cortex-m7",
    schedules: Annotated[
        Path, typer.Option(help="file of measurements, for `tte compile`: what it holds is not measured again")
    ] = Path("schedules.json"),
    trials: Annotated[int, typer.Option(min=0, help="how many kernels to measure beside the default ones")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="of the order in which they are tried")] = 0,
    metric: Metric = "instructions",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="how many at a time here (default: one per processor)")
    ] = None,
    runner: Annotated[
        str, typer.Option(help="where: local, or rpc://HOST:PORT/KEY, by the servers that an RPC tracker knows")
    ] = "local",
    input_: Annotated[str, typer.Option("--input", help="as for `tte compile`: what becomes of the input")] = "caller",
    memory_plan: Annotated[str, typer.Option(help="as for `tte compile`: what room it leaves for kernels")] = "auto",
    json_: Json = False,
) -> None:
    """Measure what the kernels of a model may become, each alone on an emulated core, and keep the fastest.

    May be interrupted at any time: called again, it goes on. Files are merged by `tte merge-schedules`; other machines
    measure by `tte serve`.
    """
    import os

    import tte

    measured = 0
    try:
        with _bar("measuring") as show:

            def move(done: int, count: int) -> None:
                nonlocal measured
                measured = done
                show(done, count, "")

            found = tte.tune(
                model,
                update_scheme=update_scheme,
                target=target,
                schedules=schedules,
                trials=trials,
                seed=seed,
                metric=metric,
                jobs=jobs or os.cpu_count() or 1,
                runner=runner,
                progress=move,
                input=input_,
                memory_plan=_memory_plan(memory_plan),
            )
    except KeyboardInterrupt:
        kept = f"{schedules} keeps what was measured; the same command goes on from there"
        said = kept if measured else "before anything was measured; the same command begins again"
        print(f"stopped: {said}", file=sys.stderr)
        raise
    if json_:
        return _print_json(found.to_dict())
    if not found.rows:
        print(f"no kernel of this model may become another, as it is compiled for {target}: nothing was measured")
        print(f"{schedules} holds what it held; `tte compile` takes it all the same")
        return
    columns = ("kernel", "layers", "calls", f"{found.metric}, default", "tuned", "form")
    rows = [(r.kernel, _shorten(r.layers), r.calls, r.default, r.tuned, _show(r.form, r.knobs)) for r in found.rows]
    total = ("all", "", None, sum(r.default for r in found.rows), sum(r.tuned for r in found.rows), "")
    title = f"{schedules}: {found.measured} measured, {found.known} known, {found.compiler}"
    _print_table(title, columns, [*rows, total])


def _show(form: str, knobs: Mapping[str, int]) -> str:
    return " ".join([form, *(f"{name}={value}" for name, value in knobs.items())])


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


@app.command()
def serve(
    tracker: Annotated[str, typer.Option(help="HOST:PORT of a running `python -m tvm.exec.rpc_tracker`")],
    key: Annotated[str, typer.Option(help="what `tte tune --runner rpc://HOST:PORT/KEY` asks for")],
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0: for other machines, too")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen at; 0: any that is free")] = 0,
) -> None:
    """Measure kernels here, on an emulated core, for whoever tunes elsewhere. Only where the network is trusted.

    Each serves one at a time: start one per processor. Ends by Ctrl-C.
    """
    from tte.runner.farm import serve

    serve(tracker, key, host, port, lambda port: print(f"{key}: {host}:{port}, tracker {tracker}", flush=True))


@app.command("merge-schedules")
def merge_schedules(
    files: Annotated[list[Path], typer.Argument(help="that `tte tune` wrote; where two disagree, the later is right")],
    output: Annotated[Path, typer.Option("-o", "--output", help="file that holds what all of them hold")],
    json_: Json = False,
) -> None:
    """Put what `tte tune` found for several models, targets or compilers into one file."""
    from tte.codegen.measured import Database, merge

    merged = merge(map(Database.read, files))
    merged.write(output)
    columns = ("core", "kernels", "measured")
    rows = [(core, len(shapes), sum(map(len, shapes.values()))) for core, shapes in merged.cores.items()]
    if json_:
        return _print_json({"cores": [dict(zip(columns, row, strict=True)) for row in rows]})
    _print_table(str(output), columns, rows)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="a float .onnx file")],
    calibration: Annotated[Path, typer.Option(help=".npz with x: (N, ...), typical inputs in the model's own layout")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the int8 .onnx file")],
    eval_: Annotated[
        Path | None, typer.Option("--eval", help=".npz with x and y to measure before and after on")
    ] = None,
    int8_head: Annotated[bool, typer.Option("--int8-head", help="quantise the last layer too")] = False,
    json_: Json = False,
) -> None:
    """Quantise a float model to int8, after training, from typical inputs (needs onnxruntime)."""
    import tte
    from tte.document import tally

    made = tte.quantize(model, calibration, output, evaluation=eval_, int8_head=int8_head)
    if json_:
        return _print_json({k: str(v) if isinstance(v, Path) else v for k, v in vars(made).items()})
    for note in made.notes:
        print(f"note: {note}")
    why = "the last layer learns best in float32; --int8-head quantises it, too"
    head = f"{made.head} ({made.operator}): {why}" if made.head else "nothing"
    rows = [("calibrated on", tally(made.samples, "sample")), ("stays float", head)]
    if made.metric:
        rows.append((f"{made.metric}, before and after", f"{made.before:.4f} {made.after:.4f}"))
    _print_table(str(output), ("", ""), rows)


@app.command()
def run(
    build: Annotated[Path, typer.Argument(help="folder written by `tte compile`")],
    data: Annotated[
        Path, typer.Option(help=".npz with x: (N, ...) in the layout of the project's input, y: labels or targets")
    ],
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over the data (default 1)")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps, instead of epochs")] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help=".npz to measure before and after on")] = None,
    emulator: Annotated[
        str | None, typer.Option(help="unicorn or qemu; by default the first that knows the core")
    ] = None,
    host: Annotated[bool, typer.Option("--host", help="run the same C on this computer: fast")] = False,
    lr: Annotated[float | None, typer.Option(help="learning rate, instead of the scheme's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="order of the samples")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="write the trained weights: .npz, the model's own names and layouts, or .onnx")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="for --save new.onnx: the .onnx file that was compiled")] = None,
    json_: Json = False,
) -> None:
    """Build the firmware and train it on an emulated microcontroller, or on this computer."""
    from tte.runner import train
    from tte.weights import require_writable

    if host and emulator:
        raise TTEError("TTE-E059", "--host runs without an emulator", where="--emulator", fix="give one of them")
    _require_pair(save, model, "--save")
    if save:
        require_writable(save)
        _require_foreign(save, build)
    with _progress_bar("training") as show:
        result = train(
            build,
            data,
            epochs=epochs,
            steps=steps,
            evaluation=eval_,
            runner="host" if host else emulator or "auto",
            rate=lr,
            seed=seed,
            progress=show,
        )
    if save:
        _save_weights(save, result.state, build, model)
    if json_:
        return _print_json(result.to_dict())
    _print_run(result.to_dict())


@app.command()
def bench(
    build: Annotated[Path, typer.Argument(help="folder written by `tte compile`")],
    toolchain: Annotated[str, typer.Option(help="zig or gcc; auto: as for `tte run`")] = "auto",
    optimize: Annotated[
        str | None, typer.Option("--optimize", "-O", help="of the C compiler: -O0 to -O3, -Os; else as compiled for")
    ] = None,
    metric: Metric = "instructions",
    json_: Json = False,
) -> None:
    """Count the instructions of an inference and of a training step on an emulated board, layer by layer; of a
    Cortex-M55, which only QEMU knows, in all.

    Cycles are an estimate: of each block of the program as LLVM knows the core, without memories, caches and branches.
    """
    from tte.runner.profile import profile

    profiled = profile(build, toolchain, optimize, metric)
    if json_:
        return _print_json(profiled.to_dict())
    how = f"{profiled.target}, {profiled.toolchain} {profiled.optimize}, flash {profiled.flash_bytes:,} bytes"
    how += f", cycles estimated by {profiled.estimator}" if profiled.estimator else ""
    how += "" if any(program.parts for program in profiled.programs.values()) else ", whole programs, counted by QEMU"
    columns = ("layer", "operator", "MACs", "instructions", "per MAC", "share, %", "cycles, about")
    for name, program in profiled.programs.items():
        rows = _list_costs(program)
        shown = slice(None if profiled.estimator else -1)
        _print_table(
            f"{profiled.model}, {name.replace('_', ' ')}: {how}", columns[shown], [cells[shown] for cells in rows]
        )


def _list_costs(program: "Cost") -> Iterator[tuple[Any, ...]]:
    """The rows of a program, those of a region's members below it."""

    def row(name: str, op: str, macs: int | None, instructions: int, cycles: int | None) -> tuple[Any, ...]:
        per_mac = Decimal(f"{instructions / macs:.2f}") if macs else None
        share = Decimal(f"{100 * instructions / program.instructions:.2f}")
        return name, op, macs, instructions, per_mac, share, cycles

    for call in program.parts:
        yield row(call.layer, call.op, call.macs, call.instructions, call.cycles)
        for part in call.parts:
            yield row(f"  {part.layer}", part.op, part.macs, part.instructions, part.cycles)
    rest = program.cycles and program.cycles - sum(call.cycles or 0 for call in program.parts)
    if program.parts:
        yield row("", "checks, copies, harness", None, program.own, rest)
    yield row("all", "", program.macs, program.instructions, program.cycles)


@app.command()
def verify(
    model: Model,
    update_scheme: Scheme = "full",
    steps: Annotated[int, typer.Option(min=1, help="training steps to follow")] = 10,
    data: Annotated[Path | None, typer.Option(help=".npz with x and y; made up when not given")] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="largest relative error allowed")] = 1e-4,
    json_: Json = False,
) -> None:
    """Compare every gradient and every trained weight with PyTorch; exit status 1 beyond the tolerance."""
    import tte

    proof = tte.compile(model, update_scheme=update_scheme).verify(steps=steps, data=data, tolerance=tolerance)
    if json_:
        _print_json(proof)
    else:
        rows = [(r["name"], r["gradient_error"], r["weight_error"], r["ok"]) for r in proof["tensors"]]
        title = f"relative error (L2 norm) against PyTorch: first gradients that are not 0, weights after step {steps}"
        _print_table(title, ("tensor", "gradient", "weights", f"within {tolerance:g}"), rows)
        print(f"loss of every step: {proof['loss_error']:.2e}; oracle: {proof['oracle']}")
    if not proof["ok"]:
        raise typer.Exit(1)


@app.command()
def state(
    blob: Annotated[Path, typer.Argument(help="bytes that <name>_state_save wrote on the device")],
    build: Annotated[Path, typer.Option("--build", "-b", help="folder the firmware was built from")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help=".npz with the model's own names and layouts, or .onnx")
    ],
    model: Annotated[Path | None, typer.Option(help="for -o new.onnx: the .onnx file that was compiled")] = None,
    json_: Json = False,
) -> None:
    """Turn a saved state of a device into weights with the model's own names and layouts."""
    _require_pair(output, model, "-o")
    _require_foreign(output, build)
    try:
        content = blob.read_bytes()
    except OSError as problem:
        fix = "give the file that the bytes of <name>_state_save were written to"
        raise TTEError("TTE-E060", f"cannot read: {problem.strerror}", where=str(blob), fix=fix) from problem
    shapes = _save_weights(output, content, build, model, blob)
    if json_:
        return _print_json({"output": str(output), "weights": shapes})
    _print_table(str(output), ("tensor", "shape"), [(name, "x".join(map(str, s))) for name, s in shapes.items()])


@app.command()
def ops(json_: Json = False) -> None:
    """List the operators of the language: what a model may be made of, the losses, and what tte itself adds."""
    import tte.ops  # noqa: F401  fills the table
    from tte.ir import OPS, Op
    from tte.scheme import Loss

    losses = {f"nn.{name}" for name in get_args(Loss.model_fields["name"].annotation)}

    def use(op: Op) -> str:
        """A batch norm is imported, too, but folded or taken apart before anything is differentiated; of operators on
        integers models have the conversions, and tte makes the rest."""
        if op.name in losses:
            return "loss"
        if op.name.startswith("qnn."):
            return "model" if op.name in ("qnn.quantize", "qnn.dequantize") else "internal"
        return "model" if op.grad is not None or op.name == "nn.batch_norm" else "internal"

    rows: list[dict[str, Any]] = [
        {
            "name": op.name,
            "use": use(op),
            "kind": op.kind,
            "differentiable": op.grad is not None,
            "attributes": list(op.attributes),
            "doc": op.doc.partition("\n")[0],
        }
        for _, op in sorted(OPS.items())
    ]
    if json_:
        return _print_json({"ops": rows})
    rows.sort(key=lambda r: ("model", "loss", "internal").index(r["use"]))
    table = [(r["name"], r["use"], r["kind"], r["differentiable"], ", ".join(r["attributes"]), r["doc"]) for r in rows]
    title = "operators; use: what models are made of, losses, and what only tte adds (gradients, updates, formats)"
    _print_table(title, ("name", "use", "kind", "gradient", "attributes", ""), table)


@app.command()
def targets(json_: Json = False) -> None:
    """List the cores and boards that tte knows, with their memories."""
    from dataclasses import asdict

    from tte.target import TARGETS

    if json_:
        return _print_json({"targets": [asdict(target) for target in TARGETS.values()]})
    rows = []
    for target in TARGETS.values():
        # A bare core has the memory of the emulated machine, which says nothing about any product.
        sizes = {region.name: region.size for region in target.memory if target.board}
        clock = f"{target.clock_hz // 1_000_000} MHz" if target.clock_hz else ""
        emulators = ", ".join(target.emulators)
        rows.append((target.name, sizes.get("flash"), sizes.get("ram"), clock, emulators, target.description))
    _print_table("targets", ("name", "flash", "RAM", "clock", "emulators", ""), rows)


def _print_memory(table: "MemoryTable", as_json: bool) -> None:
    from tte.explain import TECHNIQUES

    if as_json:
        return _print_json(table.to_dict())

    def cells(row: "MemoryRow") -> list[object]:
        cost = Decimal(f"{row.cost / table.plans[-1].cost:.2f}")
        sizes = [row.arena_bytes, row.arena_bytes + table.trained_bytes]
        return [*sizes, row.extra_macs, row.regions, row.cramped, cost]

    columns = ["", "arena", "with what learns", "extra MACs", "regions in pieces", "layers short of scratch", "cost"]
    title = f"plans of a training step ({table.macs:,} MACs) for {table.target}; cost: estimated, the last one's is 1"
    _print_table(title, columns, [[f"plan {k}", *cells(row)] for k, row in enumerate(table.plans, 1)])
    rows = [[TECHNIQUES[name], *cells(row)] for name, row in table.left_out.items()]
    _print_table("the smallest plan without", columns, rows)


def _memory_plan(text: str) -> str | int:
    """A size as a number; words are for ``tte.compile`` to judge."""
    from tte.scheme import parse_size

    try:
        return parse_size(text)
    except ValueError:
        return text


def _count(weight: str | None, channels: Sequence[int] | None) -> str:
    from tte.document import tally

    if weight is None:
        return "no"
    return "all" if channels is None else tally(len(channels), "input channel")


def _print_report(report: dict[str, Any], output: Path) -> None:
    from tte.document import tally

    memory = report["memory"]
    proof = (
        "proved optimal" + (" by search" if memory["proof"] == "search" else "") if memory["proof"] else "not proved"
    )
    bound = f"lower bound {memory['lower_bound_bytes']:,}, gap {memory['gap_bytes']:,}: {proof}"
    learns = tally(len(report["gradients"]), "tensor")
    floor = f"trained parameters + {memory['saved_bytes']:,} that the forward saves for the backward"
    rows = [
        ("arena, at its peak", memory["arena_bytes"], bound),
        ("trained parameters", memory["trained_bytes"], f"what learns: {learns}"),
        ("floor", memory["floor_bytes"], floor),
        ("RAM, all in all", memory["static_ram_bytes"], f"{report['source']}: .data + .bss + stack"),
        ("flash", report["flash_bytes"], report["source"]),
    ]
    if cramped := report["cramped"]:
        counts = f"{tally(len(cramped['train_step']), 'layer')} of a training step"
        counts += f", {len(cramped['infer'])} of an inference"
        rows.append(("arena with all scratch", cramped["arena_bytes"], f"slower for want of scratch: {counts}"))
    if memory["analytic_extra_bytes"] is not None:
        note = "no size of this project: the formula of arXiv:2206.15472"
        rows.append(("extra memory, analytic", memory["analytic_extra_bytes"], note))
    _print_table(f"{report['model']} for {report['target']}: {output}", ("", "bytes", ""), rows)
    if memory["extra_macs"]:
        print(f"extra MACs of a step: {memory['extra_macs']:,}, computed twice so that less is kept")
    peak = [(t["name"], t["bytes"], t["layer"]) for t in memory["peak_tensors"]]
    title = f"alive at the peak of a training step: {report['train_step']['arena_bytes']:,} bytes"
    _print_table(title, ("tensor", "bytes", "layer"), peak)


def _print_run(result: dict[str, Any]) -> None:
    loss, metric = result["loss"], result["metric"]
    tenth = max(1, len(loss) // 10)  # a single sample's loss says little
    first, last = (sum(part) / tenth for part in (loss[:tenth], loss[-tenth:]))
    rows: list[tuple[Any, ...]] = [("steps", result["steps"])]
    rows.append((f"mean loss, of the first {tenth} and the last {tenth}", f"{first:.4f} {last:.4f}"))
    if metric["before"] is not None:
        rows.append((f"{metric['name']}, before and after", f"{metric['before']:.4f} {metric['after']:.4f}"))
    counts = {"instructions_per_step": "instructions per step"}
    counts |= {f"{what}_bytes": f"bytes of {what} used" for what in ("stack", "arena")}
    rows += [(name, f"{result[key]:,}") for key, name in counts.items() if result[key] is not None]
    _print_table(
        f"trained on {result['runner']}", ("", ""), [*rows, ("sha256 of the weights", result["weights_sha256"])]
    )


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A function (step, all steps, loss) that moves a bar on stderr."""
    mean = 0.0
    with _bar(title) as move:

        def show(step: int, steps: int, loss: float) -> None:
            nonlocal mean
            mean = loss if step == 1 else 0.95 * mean + 0.05 * loss
            move(step, steps, f", loss {mean:.4f}")

        yield show


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function (step, all steps, what to add to the title) that moves a bar on stderr; on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda step, steps, more: bar.update(task, completed=step, total=steps, description=f"{title}{more}")


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers to the right with thousands separators, the rest as it is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = any(type(row[i]) in (int, float, Decimal) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    # A pipe gets every column in full; a terminal gets what fits.
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)
    console.print(Text(title, style="bold"), table, sep="\n")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int | Decimal) else "" if value is None else str(value)


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require_pair(output: Path | None, model: Path | None, option: str) -> None:
    if output is not None and output.suffix not in (".npz", ".onnx"):
        fix = f"{option} {output.name}.npz, or {option} {output.name}.onnx --model model.onnx"
        raise TTEError("TTE-E062", "weights are written as .npz, or into an .onnx file", where=str(output), fix=fix)
    if (output is not None and output.suffix == ".onnx") != (model is not None):
        what = "an .onnx file is a copy of the model with other weights; an .npz holds weights alone"
        fix = f"give --model model.onnx {option} new.onnx, or {option} weights.npz"
        raise TTEError("TTE-E059", what, where="--model", fix=fix)


def _require_foreign(path: Path, build: Path) -> None:
    """Raises TTEError (E062) for a file of the project itself: it would be needed later, as it was."""
    from tte.codegen.export import read_manifest

    if path.resolve() in {(build / name).resolve() for name in read_manifest(build)}:
        raise TTEError("TTE-E062", "this file belongs to the project", where=str(path), fix="choose another place")


def _save_weights(
    path: Path, state: bytes, build: Path, model: Path | None = None, source: Path | None = None
) -> dict[str, list[int]]:
    """Write what a state holds, with the model's own names and layouts, as an .npz or into a copy of ``model`` (ONNX);
    return the shapes. source: the file that the state was in."""
    from tte.saved import original_checksums, read_state, write_onnx
    from tte.weights import save_weights

    weights = read_state(state, build, source)
    if model:
        write_onnx(path, weights, model, build)
    else:
        save_weights(path, weights, original_checksums(build))
    return {name: list(array.shape) for name, array in weights.items()}


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x") as file:
            file.write(text)
    except OSError as problem:
        raise _unwritable(path, str(problem.strerror)) from problem


def _unwritable(path: Path, why: str) -> TTEError:
    return TTEError("TTE-E045", f"cannot write: {why}", where=str(path), fix="choose another place")


if __name__ == "__main__":
    main()
