"""Measures what kernels may become, each alone on an emulated core, and writes down what it costs."""

import importlib.util
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tte.artifact import compile
from tte.codegen.emit import Program, emit_kernels
from tte.codegen.fast import NOTHING, list_forms, quicken
from tte.codegen.fast.form import Knobs
from tte.codegen.kernel import Kernel
from tte.codegen.measured import Database, Measured, Measurement, identify, name_shape
from tte.codegen.schedule import Call
from tte.errors import TTEError
from tte.ir import Const, Param, Value
from tte.runner.bare import Trial, measure
from tte.runner.toolchain import build_counter, find_toolchains, toolchain_version
from tte.target import Target, find_target

Places = tuple[tuple[int, ...], ...]  # of calls of a kernel, the numbers before the pointers: row, column, tile


@dataclass(frozen=True)
class Row:
    """A kernel before and after: how often the three programs call it, instructions of all calls, knobs of the best."""

    kernel: str
    calls: int
    default: int
    tuned: int
    knobs: Knobs


@dataclass(frozen=True)
class Tuned:
    """What a search found. measured: how many kernels were measured now, known: that were before."""

    schedules: Path
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
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tuned:
    """Search for the knobs by which the kernels of a model execute the fewest instructions.

    schedules: file for what is measured, written after each measurement; what it holds is not measured again. For
               ``tte.compile``.
    trials:    how many kernels to measure beside the default ones; each has as many as its share of the instructions
    seed:      of the order in which knobs are tried: the same gives the same file
    metric:    "instructions"
    jobs:      processes
    progress:  called with (measured, all)
    options:   of ``tte.compile``: memory_plan, input ...
    Raises TTEError.
    """
    board = find_target(target)
    _require(board, trials, metric, jobs)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(schedules), board, find_toolchains()[0], build_counter(Path(folder)), jobs, progress)
        programs = compile(model, example_inputs, update_scheme, target, **options).compiled.programs
        subjects = _find_subjects(programs)
        bench.run([(subject, name) for subject in subjects for name in dict.fromkeys(subject.choose())])
        bench.run(_choose(subjects, bench, trials, seed))
    return Tuned(bench.path, bench.compiler, tuple(map(bench.summarize, subjects)), bench.measured, bench.known)


def _require(board: Target, trials: int, metric: str, jobs: int) -> None:
    if not (board.dsp and board.unicorn_cpu):
        what = f"kernels for {board.name} have no knobs, or no emulator here knows the core"
        raise TTEError("TTE-E058", what, where="--target", fix="choose a Cortex-M4, M7 or M33, or a board with one")
    if metric != "instructions":
        what = f"{metric!r} cannot be measured: only executed instructions are counted"
        raise TTEError("TTE-E059", what, where="--metric", fix="--metric instructions")
    for option, value, least in (("--trials", trials, 0), ("--jobs", jobs, 1)):
        if value < least:
            raise TTEError("TTE-E059", f"{value} is below {least}", where=option, fix="give a larger number")
    if not find_toolchains() or importlib.util.find_spec("unicorn") is None:
        what = "a compiler for Cortex-M and unicorn are needed to measure"
        raise TTEError("TTE-E051", what, fix="pip install 'tte[emulate]'")


@dataclass(frozen=True, eq=False)
class _Subject:
    """A portable kernel that may become others.

    call, places  one of its calls, and the numbers that it passes: of rows or tiles
    forms         what it may become, by what identifies it: the kernel, its knobs
    uses          where it is called: the kernel, and the scratch there
    """

    shape: str
    call: Call
    places: Places
    forms: dict[str, tuple[Kernel, Knobs]] = field(default_factory=dict)
    uses: list[tuple[Kernel, int]] = field(default_factory=list)

    def choose(self, measured: Measured = NOTHING) -> list[str]:
        """Which form each use becomes; without measurements the default ones."""
        return [identify(quicken(*use, measured)) for use in self.uses]

    def add(self, kernel: Kernel, room: int) -> None:
        self.uses.append((kernel, room))
        for made, knobs in list_forms(kernel, room).items():
            self.forms.setdefault(identify(made), (made, knobs))

    def prepare(self, name: str, target: Target, toolchain: str, counter: Path) -> Trial:
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
            counter=counter,
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
        for call, places in _walk(program.calls):
            if (kernel := call.kernel.portable) and program.room:
                subject = found.setdefault(name_shape(kernel), _Subject(name_shape(kernel), call, places))
                subject.add(kernel, program.room[call.node])
    return [subject for _, subject in sorted(found.items()) if len(subject.forms) > 1]


def _walk(calls: Sequence[Call]) -> Iterator[tuple[Call, Places]]:
    """Calls of kernels that call no others, with the numbers that are passed."""
    for call in calls:
        if call.parts:
            yield from zip(call.parts, _list_places(call.kernel), strict=True)
        else:
            yield call, ((),)


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
    """Measures what is not known yet. measured: how many kernels, known: that were before."""

    def __init__(
        self,
        path: Path,
        target: Target,
        toolchain: str,
        counter: Path,
        jobs: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.path, self.target, self.toolchain, self.counter = path, target, toolchain, counter
        self.jobs, self.progress = jobs, progress
        self.compiler = toolchain_version(toolchain)
        self.database = Database.read(path) if path.exists() else Database()
        self.database.write(path)  # before anything takes long
        self.measured = self.known = 0

    def count(self, subject: _Subject, name: str) -> int | None:
        found = self.database.of(self.target.cpu).get(subject.shape, {}).get(name)
        return found.instructions.get(self.compiler) if found else None

    def run(self, wanted: Sequence[tuple[_Subject, str]]) -> None:
        """Whatever is measured is on the disk, should the next not come to its end."""
        missing = [(subject, name) for subject, name in wanted if self.count(subject, name) is None]
        self.known += len(wanted) - len(missing)
        trials = [s.prepare(name, self.target, self.toolchain, self.counter) for s, name in missing]
        for done, (i, instructions) in enumerate(_measure(trials, self.jobs), 1):
            subject, name = missing[i]
            kernel, knobs = subject.forms[name]
            found = Measurement(knobs, kernel.scratch, {self.compiler: instructions})
            self.database.add(self.target.cpu, subject.shape, name, found)
            self.database.write(self.path)
            self.measured += 1
            if self.progress:
                self.progress(done, len(missing))

    def summarize(self, subject: _Subject) -> Row:
        tuned = subject.choose(self.database.of(self.target.cpu))
        default, best = (self.cost(subject, names) for names in (subject.choose(), tuned))
        return Row(subject.shape, len(subject.uses), default, best, subject.forms[tuned[0]][1])

    def cost(self, subject: _Subject, names: Sequence[str]) -> int:
        """Instructions of all calls by these forms."""
        return sum(self.count(subject, name) or 0 for name in names)


def _measure(trials: Sequence[Trial], jobs: int) -> Iterator[tuple[int, int]]:
    """(which trial, executed instructions), in the order in which they end."""
    if jobs == 1:
        yield from enumerate(map(measure, trials))
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        numbers = {pool.submit(measure, trial): i for i, trial in enumerate(trials)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


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
