"""Graphs of one node, and their kernels by each compiler that is installed, on emulated cores."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from tte.codegen.emit import emit_kernels
from tte.codegen.fast import DSP, Forms, list_forms
from tte.codegen.fast.form import Choice
from tte.codegen.kernel import Kernel
from tte.codegen.measured import Measurement, identify, name_shape
from tte.codegen.schedule import Call, schedule
from tte.ir import Graph
from tte.runner.bare import Core
from tte.runner.toolchain import build_bare, build_counter, find_toolchains
from tte.target import CORTEX_M7, Target

EVERYTHING = 1 << 20  # bytes of scratch


@dataclass(frozen=True)
class Case:
    """A graph of one node, and by how much scratch its kernel is limited.

    other: by how many its kernels are away, among the forms that `tte tune` tries, from the default ones
    """

    id: str
    graph: Graph = field(repr=False)
    room: int = EVERYTHING
    fast: bool = True  # there is a faster form
    optimize: str = "speed"
    other: int = 0

    @property
    def call(self) -> Call:
        return self.choose(DSP)

    def choose(self, forms: Forms) -> Call:
        measured = {name_shape(kernel): self._prefer(found) for kernel, found in self.forms if self.other}
        (call,) = schedule(self.graph, {0: self.room}, measured, self.optimize, forms)
        return call

    @property
    def forms(self) -> list[tuple[Kernel, dict[Kernel, Choice]]]:
        """Of each portable kernel what it may become."""
        kernel = self.portable.kernel
        return [(k, list_forms(k, self.room)) for k in kernel.parts or [kernel]]

    def _prefer(self, forms: dict[Kernel, Choice]) -> dict[str, Measurement]:
        """As if ``other`` was measured to be better than the default, where there are others."""
        made = list(forms.items())
        known = [made[0], made[1 + (self.other - 1) % (len(made) - 1)]] if len(made) > 1 else []
        return {identify(k): Measurement(*by, k.scratch, {"": n}) for n, (k, by) in zip((2, 1), known, strict=False)}

    @property
    def portable(self) -> Call:
        (call,) = schedule(self.graph)
        return call


def vary(cases: Sequence[Case], each: int) -> Iterator[Case]:
    """Every so many-th case by another form."""
    for n, case in enumerate(cases[::each], 1):
        if any(len(found) > 1 for _, found in case.forms):
            yield replace(case, id=f"{case.id}, another form", other=n)


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
