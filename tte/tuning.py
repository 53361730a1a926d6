"""Measures what kernels may become, each alone on an emulated core, and writes down what it costs."""

import importlib.util
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tte.artifact import compile
from tte.codegen.emit import Program, emit_kernels
from tte.codegen.fast import NOTHING, list_forms, quicken
from tte.codegen.fast.form import Choice, Knobs
from tte.codegen.kernel import Kernel
from tte.codegen.measured import Database, Measured, Measurement, identify, name_shape
from tte.codegen.schedule import Call
from tte.errors import TTEError
from tte.ir import Const, Node, Param, Value
from tte.runner.bare import Counts, Job, Trial, run
from tte.runner.cycles import UNIT, Estimator, find_estimator
from tte.runner.farm import Farm
from tte.runner.toolchain import build_counter, find_toolchains, toolchain_version
from tte.target import Target, find_target

Places = tuple[tuple[int, ...], ...]  # of calls of a kernel, the numbers before the pointers: row, column, tile


@dataclass(frozen=True)
class Row:
    """A kernel before and after: the layers that it serves, how often the three programs call it, what all calls cost,
    form and knobs of the best."""

    kernel: str
    layers: tuple[str, ...]
    calls: int
    default: int
    tuned: int
    form: str
    knobs: Knobs


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    metric: "instructions", or "estimated cycles"; compiler: with what they were estimated by
    measured: how many kernels were measured now, known: that were before
    """

    schedules: Path
    metric: str
    compiler: str
    rows: tuple[Row, ...]
    measured: int
    known: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"schedules": str(self.schedules)}


def tune(
    model: Any,
    example_inputs: Sequence[Any] | None = None,
    update_scheme: Any = "full",
    target: str = "cortex-m7",
    *,
    schedules: Path | str = "schedules.json",
    trials: int = 200,
    seed: int = 0,
    metric: str = "instructions",
    jobs: int = 1,
    runner: str = "local",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tuned:
    """Search for the forms and knobs by which the kernels of a model cost least.

    schedules: file for what is measured, written after each measurement; what it holds is not measured again. For
               ``tte.compile``.
    trials:    how many kernels to measure beside the default ones; each has as many as its share of the instructions
    seed:      of the order in which they are tried: the same gives the same file
    metric:    "instructions", or "cycles", which llvm-mca estimates
    jobs:      how many are measured at a time on this computer
    runner:    "local", or "rpc://HOST:PORT/KEY": by all servers with that key (see ``tte.runner.farm.serve``; default:
               the core's name) that the RPC tracker there knows
    progress:  called with (measured, all)
    options:   of ``tte.compile``: memory_plan, input ...
    Raises TTEError.
    """
    board = find_target(target)
    _require(board, trials, seed, metric, jobs)
    toolchain = find_toolchains()[0]
    estimator = find_estimator(board) if metric == "cycles" else None
    with _open_runner(runner, board, jobs) as (run, jobs):
        programs = compile(model, example_inputs, update_scheme, target, **options).compiled.programs
        bench = _Bench(Path(schedules), board, toolchain, run, jobs, estimator, progress)
        subjects = _find_subjects(programs)
        bench.run([(subject, name) for subject in subjects for name in dict.fromkeys(subject.choose())])
        bench.run(_choose(subjects, bench, trials, seed))
    rows = tuple(map(bench.summarize, subjects))
    metric = "estimated cycles" if estimator else metric
    return Tuned(bench.path, metric, bench.measure, rows, bench.measured, bench.known)


def _require(board: Target, trials: int, seed: int, metric: str, jobs: int) -> None:
    no_kernels = (
        "has no kernels to choose from" if not board.dsp else "is not known to unicorn, which counts instructions"
    )
    if not (board.dsp and board.unicorn_cpu):
        fix = "choose a Cortex-M4, M7 or M33, or a board with one"
        raise TTEError("TTE-E058", f"the {board.cpu} {no_kernels}", where="--target", fix=fix)
    if metric not in ("instructions", "cycles"):
        fix = "--metric instructions, or cycles"
        raise TTEError("TTE-E059", f"there is no {metric!r}", where="--metric", fix=fix)
    for option, value, least in (("--trials", trials, 0), ("--seed", seed, 0), ("--jobs", jobs, 1)):
        if value < least:
            raise TTEError("TTE-E059", f"{value} is below {least}", where=option, fix="give a larger number")
    if not find_toolchains() or importlib.util.find_spec("unicorn") is None:
        what = "a compiler for Cortex-M and unicorn are needed to measure"
        raise TTEError("TTE-E051", what, fix="pip install 'tte[emulate]'")


Run = Callable[[Job], Counts]


@contextmanager
def _open_runner(address: str, board: Target, jobs: int) -> Iterator[tuple[Run, int]]:
    """What runs jobs, and how many at a time."""
    if address == "local":
        with tempfile.TemporaryDirectory() as folder:
            yield partial(run, counter=build_counter(Path(folder))), jobs
    else:
        with Farm(address, board.cpu) as farm:
            yield farm.run, farm.servers


@dataclass(frozen=True, eq=False)
class _Subject:
    """A portable kernel that may become others.

    call, places  one of its calls, and the numbers that it passes: of rows or tiles
    layers        that it serves
    forms         what it may become, by what identifies it: the kernel, and by which form and knobs it is made
    uses          where it is called: the kernel, and the scratch there
    """

    shape: str
    call: Call
    places: Places
    layers: dict[str, None] = field(default_factory=dict)
    forms: dict[str, tuple[Kernel, Choice]] = field(default_factory=dict)
    uses: list[tuple[Kernel, int]] = field(default_factory=list)

    def choose(self, measured: Measured = NOTHING) -> list[str]:
        """Which form each use becomes; without measurements the default ones."""
        return [identify(quicken(*use, measured)) for use in self.uses]

    def add(self, kernel: Kernel, room: int) -> None:
        self.uses.append((kernel, room))
        for made, choice in list_forms(kernel, room).items():
            self.forms.setdefault(identify(made), (made, choice))

    def prepare(self, name: str, target: Target, toolchain: str) -> Trial:
        """The trial of a form, with random numbers where the model has none."""
        kernel, _ = self.forms[name]
        assert kernel.portable
        names = {k: f"t_k{i}" for i, k in enumerate([*kernel.family(), kernel.portable])}
        rng = np.random.default_rng(0)
        inputs, outputs = ([_bytes(v, rng) for v in values] for values in (self.call.inputs, self.call.outputs))
        return Trial(
            sources=emit_kernels(names, "t"),
            names=(names[kernel], names[kernel.portable]),
            places=self.places,
            buffers=(*inputs, *outputs),
            outputs=len(outputs),
            scratch=kernel.scratch,
            target=target,
            toolchain=toolchain,
        )


def _bytes(value: Value, rng: np.random.Generator) -> np.ndarray:
    """What a value may hold, as it lies in memory."""
    if value.type.dtype == "bit":
        return np.zeros(value.type.nbytes, np.uint8)
    if isinstance(value, Const | Param):
        return np.ascontiguousarray(value.data)
    if value.type.dtype == "float32":
        return rng.standard_normal(value.type.shape).astype(np.float32)
    ends = np.iinfo(value.type.numpy)
    return rng.integers(max(ends.min, -(1 << 20)), min(ends.max, 1 << 20), value.type.shape).astype(ends.dtype)


def _find_subjects(programs: Sequence[Program]) -> list[_Subject]:
    found: dict[str, _Subject] = {}
    for program in programs:
        for call, places, layers in _walk(program):
            if (kernel := call.kernel.portable) and program.room:
                subject = found.setdefault(name_shape(kernel), _Subject(name_shape(kernel), call, places))
                subject.add(kernel, program.room[call.node])
                subject.layers.update(dict.fromkeys(layers))
    return [subject for _, subject in sorted(found.items()) if len(subject.forms) > 1]


def _walk(program: Program) -> Iterator[tuple[Call, Places, list[str]]]:
    """Calls of kernels that call no others, with the numbers that are passed and the layers that are served."""
    for call in program.calls:
        if call.parts:
            for part, places, member in zip(call.parts, _list_places(call.kernel), call.members, strict=True):
                yield part, places, _list_layers(member)
        else:
            yield call, ((),), _list_layers(program.graph.nodes[call.node])


def _list_layers(node: Node) -> list[str]:
    nodes = node.body.nodes if node.body else (node,)
    return [node.layer for node in nodes if node.layer]


def _list_places(driver: Kernel) -> Iterator[Places]:
    """For each part of a kernel that calls others, the numbers that it passes."""
    context = driver.arguments()
    for step in context["steps"]:
        if driver.template == "tiles":
            numbers = range(0, context["end"], context["width"])
            yield tuple((n,) for n in numbers if step["start"] <= n < step["stop"])
        else:
            columns = [(c,) for c in range(0, step["width"], step["columns"])] if step["columns"] else [()]
            places = tuple((row, *column) for row in range(step["height"]) for column in columns)
            yield from [places] * len(step["calls"])


class _Bench:
    """Measures what is not known yet. measure: what with; measured: how many kernels, known: that were before."""

    def __init__(
        self,
        path: Path,
        target: Target,
        toolchain: str,
        run: Run,
        jobs: int,
        estimator: Estimator | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.path, self.target, self.toolchain, self.estimator = path, target, toolchain, estimator
        self.run_job, self.jobs, self.progress = run, jobs, progress
        self.compiler = toolchain_version(toolchain)
        self.measure = f"{self.compiler}, {estimator.version}" if estimator else self.compiler
        self.database = Database.read(path) if path.exists() else Database()
        self.database.write(path)  # before anything takes long
        self.measured = self.known = 0

    def count(self, subject: _Subject, name: str) -> int | None:
        found = self.database.of(self.target.cpu).get(subject.shape, {}).get(name)
        if found is None:
            return None
        return (found.cycles if self.estimator else found.instructions).get(self.measure)

    def run(self, wanted: Sequence[tuple[_Subject, str]]) -> None:
        """Whatever is measured is on the disk, should the next not come to its end."""
        missing = [(subject, name) for subject, name in wanted if self.count(subject, name) is None]
        self.known += len(wanted) - len(missing)
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self.try_out, *one): one for one in missing}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    subject, name = futures[future]
                    self.database.add(self.target.cpu, subject.shape, name, future.result())
                    self.database.write(self.path)
                    self.measured += 1
                    if self.progress:
                        self.progress(done, len(missing))
            finally:
                pool.shutdown(cancel_futures=True)

    def try_out(self, subject: _Subject, name: str) -> Measurement:
        kernel, (form, knobs) = subject.forms[name]
        job = subject.prepare(name, self.target, self.toolchain).build()
        counts = self.run_job(job)
        cycles = {}
        if self.estimator:
            weights = self.estimator.estimate(job.read(counts.blocks))
            cycles[self.measure] = sum(weights[block] * n for block, n in counts.blocks.items()) // UNIT
        return Measurement(form, knobs, kernel.scratch, {self.compiler: counts.instructions}, cycles)

    def summarize(self, subject: _Subject) -> Row:
        tuned = subject.choose(self.database.of(self.target.cpu))
        default, best = (self.cost(subject, names) for names in (subject.choose(), tuned))
        _, chosen = subject.forms[tuned[0]]
        return Row(subject.shape, tuple(subject.layers), len(subject.uses), default, best, *chosen)

    def cost(self, subject: _Subject, names: Sequence[str]) -> int:
        """Of all calls by these forms."""
        return sum(self.count(subject, name) or 0 for name in names)


def _choose(subjects: Sequence[_Subject], bench: _Bench, trials: int, seed: int) -> list[tuple[_Subject, str]]:
    """Which forms to measure beside the default ones: of each kernel as many as its share of the instructions."""
    left: dict[str, list[str]] = {}
    for subject in subjects:
        left[subject.shape] = sorted(set(subject.forms) - set(subject.choose()))
        random.Random(f"{seed} {subject.shape}").shuffle(left[subject.shape])
    weight = {s.shape: bench.cost(s, s.choose()) for s in subjects}
    taken: Counter[str] = Counter()
    chosen: list[tuple[_Subject, str]] = []
    while len(chosen) < trials and (open_ := [s for s in subjects if left[s.shape]]):
        subject = max(open_, key=lambda s: weight[s.shape] / (taken[s.shape] + 1))  # d'Hondt's rule
        taken[subject.shape] += 1
        chosen.append((subject, left[subject.shape].pop()))
    return chosen
