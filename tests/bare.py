"""Graphs of one node, and their kernels by each compiler that is installed, on emulated cores."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from tte.codegen.emit import emit_kernels
from tte.codegen.fast import DSP, Forms
from tte.codegen.kernel import Kernel
from tte.codegen.schedule import Call, schedule
from tte.ir import Graph
from tte.runner.bare import Core
from tte.runner.toolchain import build_bare, build_counter, find_toolchains
from tte.target import CORTEX_M7, Target

EVERYTHING = 1 << 20  # bytes of scratch


@dataclass(frozen=True)
class Case:
    """A graph of one node, and by how much scratch its kernel is limited."""

    id: str
    graph: Graph = field(repr=False)
    room: int = EVERYTHING
    fast: bool = True  # there is a faster form
    optimize: str = "speed"

    @property
    def call(self) -> Call:
        return self.choose(DSP)

    def choose(self, forms: Forms) -> Call:
        (call,) = schedule(self.graph, {0: self.room}, optimize=self.optimize, forms=forms)
        return call

    @property
    def portable(self) -> Call:
        (call,) = schedule(self.graph)
        return call


def open_cores(
    shared: Path, kernels: Mapping[Kernel, str], builds: Sequence[tuple[str, str]], target: Target = CORTEX_M7
) -> dict[str, Core]:
    """By compiler and optimisation, the kernels under their names. shared: of all test processes; the first builds."""
    sources, counter = emit_kernels(kernels, "t"), build_counter(shared)
    installed = [(c, o) for c, o in builds if c in find_toolchains()]

    def build(compiler: str, optimize: str) -> Path:
        text = repr((sorted(sources.items()), target.name, compiler, optimize))
        folder = shared / hashlib.sha256(text.encode()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        with FileLock(folder / "lock"):
            elf = folder / f"{compiler}{optimize}.elf"
            return elf if elf.exists() else build_bare(folder, sources, target, compiler, optimize)

    with ThreadPoolExecutor() as pool:
        elves = pool.map(lambda of: build(*of), installed)
    return {f"{c} {o}": Core(elf, counter, target) for (c, o), elf in zip(installed, elves, strict=True)}
