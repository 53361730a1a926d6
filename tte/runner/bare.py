"""Calls C functions one by one on an emulated core: arguments by the procedure call standard, guards around memory."""

import ctypes
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tte.runner.counter import Block, Counter
from tte.runner.toolchain import BARE_CODE, build_bare
from tte.target import Target, find_target

RAM, SIZE, GUARD = 0x2000_0000, 0x80_0000, 64


class Core:
    """A program of ``build_bare`` in the memory of a core, and room for arguments.

    counter: see ``build_counter``
    instructions: executed by the last call
    """

    def __init__(self, elf: Path, counter: Path, target: Target) -> None:
        import unicorn
        from elftools.elf.elffile import ELFFile
        from unicorn import arm_const

        self.registers = arm_const
        self.engine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        self.engine.ctl_set_cpu_model(getattr(arm_const, target.unicorn_cpu))
        self.code = (ctypes.c_uint8 * SIZE)()
        executable = unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC
        self.engine.mem_map_ptr(BARE_CODE, SIZE, executable, ctypes.addressof(self.code))
        self.engine.mem_map(RAM, SIZE)
        self.engine.reg_write(arm_const.UC_ARM_REG_FPEXC, 1 << 30)
        with elf.open("rb") as file:
            program = ELFFile(file)
            for at, data in _list_segments(program):
                ctypes.memmove(ctypes.addressof(self.code) + at, data, len(data))
            self.symbols = {s.name: s["st_value"] for s in program.get_section_by_name(".symtab").iter_symbols()}
        self.counter = Counter(self.engine, counter, self.code, BARE_CODE)
        self.instructions = 0

    def call(self, name: str, numbers: Sequence[int], buffers: Sequence[np.ndarray]) -> list[bytes]:
        """What the buffers hold behind the call. Fails on a byte written beside them, or a register not restored."""
        before, places = fence(buffers)
        write, read, r = self.engine.reg_write, self.engine.reg_read, self.registers
        self.engine.mem_write(RAM, before)
        stack = RAM + SIZE - 4096
        words = [*numbers, *(RAM + place for place in places)]
        for i, word in enumerate(words[:4]):
            write(r.UC_ARM_REG_R0 + i, word)
        on_stack = np.asarray(words[4:], np.uint32).tobytes()
        self.engine.mem_write(stack, on_stack)
        saved = {r.UC_ARM_REG_R4 + i: 0x1111 * (i + 1) for i in range(8)}
        saved |= {r.UC_ARM_REG_S0 + i: 0x3F80_0000 + i for i in range(16, 32)}
        for register, value in saved.items():
            write(register, value)
        write(r.UC_ARM_REG_SP, stack)
        end = BARE_CODE + SIZE - 16
        write(r.UC_ARM_REG_LR, end | 1)
        counted = self.counter.read()
        self.engine.emu_start(self.symbols[name] | 1, end)
        self.instructions = self.counter.read() - counted
        assert read(r.UC_ARM_REG_SP) == stack
        assert {register: read(register) for register in saved} == saved, "registers that a callee restores"
        return unfence(before, bytes(self.engine.mem_read(RAM, len(before))), places, buffers)


def fence(buffers: Sequence[np.ndarray]) -> tuple[bytes, list[int]]:
    """The buffers with guards between them, and where each begins: a multiple of 8."""
    memory, places = bytearray(), []
    for buffer in buffers:
        memory += b"\xa5" * GUARD
        places.append(len(memory))
        memory += buffer.tobytes()
        memory += b"\xa5" * (-len(memory) % 8)
    return bytes(memory + b"\xa5" * GUARD), places


def unfence(before: bytes, after: bytes, places: Sequence[int], buffers: Sequence[np.ndarray]) -> list[bytes]:
    """What the buffers hold afterwards. Fails where a guard has changed."""
    result: list[bytes] = []
    end = 0
    for start, buffer in zip(places, buffers, strict=True):
        assert after[end:start] == before[end:start], "bytes beside the buffers"
        end = start + buffer.nbytes
        result.append(after[start:end])
    assert after[end:] == before[end:], "bytes beside the buffers"
    return result


def _list_segments(program: Any) -> Iterator[tuple[int, bytes]]:
    """Where in the code each lies, and its bytes."""
    for segment in program.iter_segments("PT_LOAD"):
        if 0 <= (at := segment["p_vaddr"] - BARE_CODE) < SIZE:  # not the headers of the file
            yield at, segment.data()


@dataclass(frozen=True)
class Trial:
    """A function that is to be measured, and another that has to do the same.

    sources    a program that holds them, see ``build_bare``
    names      of the two
    places     the numbers of each call; what is counted is their sum
    buffers    of each call; outputs: how many of them, from the last, are compared
    scratch    bytes that the function has to itself, by a last pointer
    """

    sources: Mapping[str, str]
    names: tuple[str, str]
    places: tuple[tuple[int, ...], ...]
    buffers: tuple[np.ndarray, ...]
    outputs: int
    scratch: int
    target: Target
    toolchain: str

    def build(self) -> "Job":
        """Raises TTEError (E052) where the compiler refuses the code."""
        with tempfile.TemporaryDirectory() as folder:
            elf = build_bare(Path(folder), self.sources, self.target, self.toolchain).read_bytes()
        buffers = tuple(buffer.tobytes() for buffer in self.buffers)
        return Job(elf, self.target.cpu, self.names, self.places, buffers, self.outputs, self.scratch)


@dataclass(frozen=True)
class Job:
    """A trial that is built: all that an emulator has to know. cpu: the name of a core, see ``tte targets``"""

    elf: bytes
    cpu: str
    names: tuple[str, str]
    places: tuple[tuple[int, ...], ...]
    buffers: tuple[bytes, ...]
    outputs: int
    scratch: int

    def read(self, blocks: Iterable[Block]) -> dict[Block, bytes]:
        """The code of each block."""
        from elftools.elf.elffile import ELFFile

        segments = list(_list_segments(ELFFile(io.BytesIO(self.elf))))
        found = {}
        for address, size in blocks:
            start = address - BARE_CODE
            found[address, size] = next(
                data[start - at : start - at + size] for at, data in segments if at <= start < at + len(data)
            )
        return found


@dataclass(frozen=True)
class Counts:
    """What the measured function executed in all places: instructions, and how often each block."""

    instructions: int
    blocks: Mapping[Block, int]


def run(job: Job, counter: Path) -> Counts:
    """On an emulator in this process. Fails where the two functions do not leave the same bits.

    counter: see ``build_counter``
    """
    tested, reference = job.names
    buffers = [np.frombuffer(buffer, np.uint8) for buffer in job.buffers]
    own = [np.full(job.scratch, 0xA5, np.uint8)] if job.scratch else []
    count, first = 0, len(buffers) - job.outputs
    with tempfile.TemporaryDirectory() as folder:
        elf = Path(folder) / "program.elf"
        elf.write_bytes(job.elf)
        core = Core(elf, counter, find_target(job.cpu))
    made = []
    for place in job.places:
        made.append(core.call(tested, place, [*buffers, *own])[first : len(buffers)])
        count += core.instructions
    result = Counts(count, core.counter.blocks())
    for place, outputs in zip(job.places, made, strict=True):
        assert outputs == core.call(reference, place, buffers)[first:], f"{tested}{place} is not {reference}"
    core.counter.close()
    return result
