"""Calls C functions one by one on an emulated core: arguments by the procedure call standard, guards around memory."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tte.codegen.emit import emit_kernels
from tte.codegen.kernel import Kernel
from tte.runner.toolchain import FLAGS
from tte.target import CORTEX_M7, Target

CODE, RAM, SIZE, GUARD = 0x0800_0000, 0x2000_0000, 0x80_0000, 64
SUPPORT = """
#include <stddef.h>
void *memcpy(void *to, const void *from, size_t n) {
    for (size_t i = 0; i < n; i++)
        ((volatile unsigned char *)to)[i] = ((const unsigned char *)from)[i];
    return to;
}
void *memset(void *to, int value, size_t n) {
    for (size_t i = 0; i < n; i++)
        ((volatile unsigned char *)to)[i] = (unsigned char)value;
    return to;
}
"""
COMPILERS = {
    "zig": lambda t: [sys.executable, "-m", "ziglang", "cc", "-target", t.zig_target, f"-mcpu={t.zig_cpu}"],
    "gcc": lambda t: ["arm-none-eabi-gcc", *t.gcc_flags] if shutil.which("arm-none-eabi-gcc") else None,
}


def compile_kernels(
    folder: Path, kernels: Mapping[Kernel, str], compiler: str, optimize: str = "-O2", target: Target = CORTEX_M7
) -> Path | None:
    """The kernels as a program without an entry, or None where the compiler is not installed."""
    command = COMPILERS[compiler](target)
    if command is None:
        return None
    folder.mkdir(exist_ok=True)
    for name, text in emit_kernels(kernels, "t").items():
        (folder / name).write_text(text)
    (folder / "support.c").write_text(SUPPORT)
    (folder / "link.ld").write_text(
        f"SECTIONS {{ .text {CODE:#x} : {{ *(.text* .rodata*) }} /DISCARD/ : {{ *(.ARM*) }} }}"
    )
    elf = folder / f"{compiler}{optimize}.elf"
    flags = [*FLAGS, optimize, "-ffreestanding", "-fno-unwind-tables"]
    objects = []
    for source in ("t_kernels.c", "support.c"):
        objects.append(str(folder / f"{compiler}{optimize}-{source}.o"))
        run([*command, *flags, "-c", "-o", objects[-1], str(folder / source)])
    libraries = ["-nostdlib", *(["-lgcc"] if compiler == "gcc" else [])]
    run([*command, f"-Wl,-T,{folder / 'link.ld'}", "-o", str(elf), *objects, *libraries])
    return elf


def run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]


class Core:
    """A program in the memory of a core, and room for arguments."""

    def __init__(self, elf: Path, cpu: str = CORTEX_M7.unicorn_cpu) -> None:
        import unicorn
        from elftools.elf.elffile import ELFFile
        from unicorn import arm_const

        self.registers = arm_const
        self.engine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        self.engine.ctl_set_cpu_model(getattr(arm_const, cpu))
        self.engine.mem_map(0, SIZE)
        self.engine.mem_map(CODE, SIZE)
        self.engine.mem_map(RAM, SIZE)
        self.engine.reg_write(arm_const.UC_ARM_REG_FPEXC, 1 << 30)
        with elf.open("rb") as file:
            program = ELFFile(file)
            for segment in program.iter_segments("PT_LOAD"):
                self.engine.mem_write(segment["p_vaddr"], segment.data())
            self.symbols = {s.name: s["st_value"] for s in program.get_section_by_name(".symtab").iter_symbols()}

    def call(self, name: str, numbers: Sequence[int], buffers: Sequence[np.ndarray]) -> list[bytes]:
        """What the buffers hold behind the call. Fails on a byte written beside them, or a register not restored."""
        at, pointers, memory = RAM, [], bytearray()
        for buffer in buffers:
            memory += b"\xa5" * GUARD
            pointers.append(at + len(memory))
            memory += buffer.tobytes()
            memory += b"\xa5" * (-len(memory) % 8)
        memory += b"\xa5" * GUARD
        before = bytes(memory)
        write, read, r = self.engine.reg_write, self.engine.reg_read, self.registers
        self.engine.mem_write(at, before)
        stack = RAM + SIZE - 4096
        words = [*numbers, *pointers]
        for i, word in enumerate(words[:4]):
            write(r.UC_ARM_REG_R0 + i, word)
        on_stack = np.asarray(words[4:], np.uint32).tobytes()
        self.engine.mem_write(stack, on_stack)
        saved = {r.UC_ARM_REG_R4 + i: 0x1111 * (i + 1) for i in range(8)}
        saved |= {r.UC_ARM_REG_S0 + i: 0x3F80_0000 + i for i in range(16, 32)}
        for register, value in saved.items():
            write(register, value)
        write(r.UC_ARM_REG_SP, stack)
        write(r.UC_ARM_REG_LR, CODE + SIZE - 15)
        self.engine.emu_start(self.symbols[name] | 1, CODE + SIZE - 16)
        assert read(r.UC_ARM_REG_SP) == stack
        assert {register: read(register) for register in saved} == saved, "registers that a callee restores"
        after = bytes(self.engine.mem_read(at, len(before)))
        result, end = [], 0
        for pointer, buffer in zip(pointers, buffers, strict=True):
            start = pointer - at
            assert after[end:start] == before[end:start], "bytes beside the buffers"
            end = start + buffer.nbytes
            result.append(after[start:end])
        assert after[end:] == before[end:], "bytes beside the buffers"
        return result
