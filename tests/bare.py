"""Kernels by each compiler that is installed, on emulated cores."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tte.codegen.emit import emit_kernels
from tte.codegen.kernel import Kernel
from tte.runner.bare import Core
from tte.runner.toolchain import build_bare, build_counter, find_toolchains
from tte.target import CORTEX_M7


def open_cores(folder: Path, kernels: Mapping[Kernel, str], builds: Sequence[tuple[str, str]]) -> dict[str, Core]:
    """By compiler and optimisation, the kernels under their names."""
    sources, counter = emit_kernels(kernels, "t"), build_counter(folder)
    installed = [(c, o) for c, o in builds if c in find_toolchains()]
    elves = {f"{c} {o}": build_bare(folder, sources, CORTEX_M7, c, o) for c, o in installed}
    return {name: Core(elf, counter, CORTEX_M7) for name, elf in elves.items()}
