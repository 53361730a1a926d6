"""Graphs of one node, and their kernels by each compiler that is installed, on emulated cores."""

import hashlib
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock

import tte
from tte.codegen.emit import emit_kernels
from tte.codegen.fast import DSP, Forms
from tte.codegen.kernel import Kernel
from tte.codegen.schedule import Call, schedule
from tte.ir import Graph
from tte.runner.bare import Core, fence, unfence
from tte.runner.qemu import find_qemu
from tte.runner.toolchain import FLAGS, _linker_script, board_command, build_bare, build_counter, find_toolchains
from tte.target import CORTEX_M7, CORTEX_M55, Target

EVERYTHING = 1 << 20  # bytes of scratch


@dataclass(frozen=True)
class Case:
    """A graph of one node, and by how much scratch its kernel is limited."""

    id: str
    graph: Graph = field(repr=False)
    room: int = EVERYTHING
    fast: bool = True  # there is a faster form

    @property
    def call(self) -> Call:
        return self.choose(DSP)

    def choose(self, forms: Forms) -> Call:
        (call,) = schedule(self.graph, {0: self.room}, forms=forms)
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


RUNTIME = Path(tte.__file__).parent / "runtime_c"
FROM = 0x8000_0000  # what is a place in the memory of a call, see calls.c
Request = tuple[str, Sequence[int], Sequence[np.ndarray]]  # a function, its numbers, its buffers


def build_calls(folder: Path, kernels: Mapping[Kernel, str], compiler: str, optimize: str) -> Path:
    """A program that calls the kernels as files say, for a Cortex-M55 in QEMU."""
    sources = emit_kernels(kernels, "t")
    table = f"extern char {', '.join(f'{n}[]' for n in kernels.values())};\n"
    table += f"void *const functions[] = {{{', '.join(kernels.values())}}};\n"
    for name, text in (sources | {"table.c": table}).items():
        (folder / name).write_text(text)
    script = folder / f"{compiler}{optimize}.ld"
    script.write_text(_linker_script(RUNTIME, CORTEX_M55))
    elf = folder / f"{compiler}{optimize}.elf"
    files = [*folder.glob("*.c"), Path(__file__).with_name("calls.c"), *RUNTIME.glob("emu_startup.c")]
    machine = CORTEX_M55.machine
    assert machine
    command = [*board_command(CORTEX_M55, compiler), *FLAGS, optimize, "-fno-unwind-tables", f"-I{RUNTIME}"]
    command += [f"-DEMU_COUNTER={machine.counter:#x}u", f"-Wl,-T,{script}", "-o", str(elf), *map(str, files)]
    command += ["-nostdlib", *(["-lc", "-lgcc"] if compiler == "gcc" else [])]
    subprocess.run(command, check=True)
    return elf


def run_calls(elf: Path, kernels: Mapping[Kernel, str], requests: Sequence[Request]) -> list[tuple[list[bytes], int]]:
    """What the buffers of each call hold behind it, and how many instructions it took."""
    machine, order, fenced = CORTEX_M55.machine, list(kernels.values()), []
    assert machine
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "commands").open("wb") as file:
            for name, numbers, buffers in requests:
                before, places = fence(buffers)
                words = [*numbers, *(FROM + place for place in places)]
                file.write(struct.pack("<30I", order.index(name), *words, *[0] * (28 - len(words)), len(before)))
                file.write(before)
                fenced.append((before, places, buffers))
        command = f"{find_qemu()} -M {machine.name} -display none -monitor none -serial none -icount shift=6".split()
        command += ["-semihosting-config", "enable=on,target=native", "-kernel", str(elf)]
        ended = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr + ended.stdout
        data = (Path(folder) / "results").read_bytes()
    result, at = [], 0
    for (name, *_), (before, places, buffers) in zip(requests, fenced, strict=True):
        flags, ticks = struct.unpack_from("<2I", data, at)
        assert not flags, f"{name}: registers that a callee restores"
        at += 8 + len(before)
        made = unfence(before, data[at - len(before) : at], places, buffers)
        result.append((made, round(ticks * 1e9 / (64 * machine.counter_hz))))
    return result
