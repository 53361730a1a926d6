"""Where the generated C runs: cores and boards as plain data."""

import difflib
from dataclasses import dataclass, replace

from tte.errors import TTEError

KB = 1024
MB = 1024 * KB


@dataclass(frozen=True)
class Region:
    """A stretch of memory: ``size`` bytes from address ``origin``; access "rx" (flash) or "rwx" (RAM)."""

    name: str
    origin: int
    size: int
    access: str


@dataclass(frozen=True)
class Target:
    """A core, or a board with its real memory.

    cpu            as gcc calls it
    gcc_flags      choose core and FPU for arm-none-eabi-gcc (and for clang)
    zig_target     triple for ``zig cc -target``
    zig_cpu        for ``zig cc -mcpu=``; names the FPU, because zig leaves it out otherwise
    memory         regions by address; ``flash`` and ``ram`` are those that code and data go to.
                   Of a bare core (``board`` is False) they are what QEMU's machine has, not a limit of any product.
    clock_hz       highest core clock of the board
    qemu_machine   for ``qemu-system-arm -M``; its memory map is qemu_flash, qemu_ram (addresses)
    unicorn_cpu    name of the constant in unicorn.arm_const
    dsp            has the instructions on halfwords of ARMv7E-M
    """

    name: str
    description: str
    cpu: str
    board: bool = False
    gcc_flags: tuple[str, ...] = ()
    zig_target: str = ""
    zig_cpu: str = ""
    memory: tuple[Region, ...] = ()
    clock_hz: int | None = None
    qemu_machine: str = ""
    qemu_flash: int = 0
    qemu_ram: int = 0
    unicorn_cpu: str = ""
    dsp: bool = False

    def region(self, name: str) -> Region:
        return next(r for r in self.memory if r.name == name)

    @property
    def flash(self) -> Region:
        return self.region("flash")

    @property
    def ram(self) -> Region:
        return self.region("ram")


def _arm(cpu: str, fpu: str, zig_fpu: str, machine: str, flash: int, ram: int) -> Target:
    return Target(
        name=cpu,
        description=f"Arm {cpu.title()} with single-precision FPU",
        cpu=cpu,
        gcc_flags=(f"-mcpu={cpu}", "-mthumb", f"-mfpu={fpu}", "-mfloat-abi=hard"),
        zig_target="thumb-freestanding-eabihf",
        zig_cpu=f"{cpu.replace('-', '_')}+{zig_fpu}",
        memory=(Region("flash", flash, 4 * MB, "rx"), Region("ram", ram, 4 * MB, "rwx")),
        qemu_machine=machine,
        qemu_flash=flash,
        qemu_ram=ram,
        unicorn_cpu=f"UC_CPU_ARM_{cpu.upper().replace('-', '_')}",
        dsp=True,
    )


CORTEX_M7 = _arm("cortex-m7", "fpv5-sp-d16", "fp_armv8d16sp", "mps2-an500", 0x00000000, 0x20000000)
CORTEX_M4 = _arm("cortex-m4", "fpv4-sp-d16", "vfp4d16sp", "mps2-an386", 0x00000000, 0x20000000)
CORTEX_M33 = _arm("cortex-m33", "fpv5-sp-d16", "fp_armv8d16sp", "mps2-an505", 0x10000000, 0x38000000)
HOST = Target("host", "this computer: the same C, for tests and simulation", "host")
STM32F746 = replace(
    CORTEX_M7,
    name="stm32f746",
    description="STM32F746: Cortex-M7, 216 MHz, 320 KB SRAM, 1 MB flash",
    board=True,
    # DTCM (64 KB), SRAM1 and SRAM2 lie side by side.
    memory=(Region("flash", 0x08000000, 1 * MB, "rx"), Region("ram", 0x20000000, 320 * KB, "rwx")),
    clock_hz=216_000_000,
)
STM32H743 = replace(
    CORTEX_M7,
    name="stm32h743",
    description="STM32H743: Cortex-M7, 480 MHz, 512 KB AXI SRAM (1 MB in all), 2 MB flash",
    board=True,
    gcc_flags=("-mcpu=cortex-m7", "-mthumb", "-mfpu=fpv5-d16", "-mfloat-abi=hard"),
    zig_cpu="cortex_m7+fp_armv8d16",
    memory=(
        Region("itcm", 0x00000000, 64 * KB, "rwx"),
        Region("flash", 0x08000000, 2 * MB, "rx"),
        Region("dtcm", 0x20000000, 128 * KB, "rwx"),
        Region("ram", 0x24000000, 512 * KB, "rwx"),
        Region("sram1", 0x30000000, 128 * KB, "rwx"),
        Region("sram2", 0x30020000, 128 * KB, "rwx"),
        Region("sram3", 0x30040000, 32 * KB, "rwx"),
        Region("sram4", 0x38000000, 64 * KB, "rwx"),
    ),
    clock_hz=480_000_000,
)
STM32F446 = replace(
    CORTEX_M4,
    name="stm32f446",
    description="STM32F446: Cortex-M4, 180 MHz, 128 KB SRAM, 512 KB flash",
    board=True,
    memory=(Region("flash", 0x08000000, 512 * KB, "rx"), Region("ram", 0x20000000, 128 * KB, "rwx")),
    clock_hz=180_000_000,
)

TARGETS = {t.name: t for t in (CORTEX_M7, CORTEX_M4, CORTEX_M33, STM32F746, STM32H743, STM32F446, HOST)}


def targets() -> list[Target]:
    """All targets: cores, boards, this computer."""
    return list(TARGETS.values())


def find_target(name: str) -> Target:
    """The target of that name, in upper or lower case. Raises TTEError (E048), naming the nearest one."""
    key = str(name).lower()
    if key in TARGETS:
        return TARGETS[key]
    near = difflib.get_close_matches(key, TARGETS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise TTEError("TTE-E048", f"no target {name!r}", where="target", fix=f"{hint}targets: {', '.join(TARGETS)}")
