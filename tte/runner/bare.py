"""Calls C functions one by one on an emulated core: arguments by the procedure call standard, guards around memory."""

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tte.runner.counter import Counter
from tte.runner.toolchain import BARE_CODE, build_bare
from tte.target import Target

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
            for segment in program.iter_segments("PT_LOAD"):
                at, data = segment["p_vaddr"] - BARE_CODE, segment.data()
                if 0 <= at < SIZE:  # not the headers of the file
                    self.code[at : at + len(data)] = data
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


@dataclass(frozen=True)
class Trial:
    """A function that is to be measured, and another that has to do the same.

    sources    a program that holds them, see ``build_bare``
    names      of the two
    places     the numbers of each call; what is counted is their sum
    buffers    of each call; outputs: how many of them, from the last, are compared
    scratch    bytes that the function has to itself, by a last pointer
    counter    see ``build_counter``
    """

    sources: Mapping[str, str]
    names: tuple[str, str]
    places: tuple[tuple[int, ...], ...]
    buffers: tuple[np.ndarray, ...]
    outputs: int
    scratch: int
    target: Target
    toolchain: str
    counter: Path


def measure(trial: Trial) -> int:
    """Executed instructions. Fails where the two functions do not leave the same bits."""
    tested, reference = trial.names
    own = [np.full(trial.scratch, 0xA5, np.uint8)] if trial.scratch else []
    count, first = 0, len(trial.buffers) - trial.outputs
    with tempfile.TemporaryDirectory() as folder:
        core = Core(build_bare(Path(folder), trial.sources, trial.target, trial.toolchain), trial.counter, trial.target)
        for place in trial.places:
            made = core.call(tested, place, [*trial.buffers, *own])
            count += core.instructions
            expected = core.call(reference, place, trial.buffers)
            assert made[first : len(expected)] == expected[first:], f"{tested}{place} is not {reference}"
    return count
