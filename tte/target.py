"""Where the generated C runs: cores and boards as plain data."""

import difflib
from dataclasses import dataclass, replace

from tte.errors import TTEError

KB = 1024
FLAG = {"speed": "-O2", "size": "-Os"}  # what a project may be made for: the option its C compiler gets
MB = 1024 * KB


@dataclass(frozen=True)
class Region:
    """A stretch of memory: ``size`` bytes from address ``origin``; access "rx" (flash) or "rwx" (RAM)."""

    name: str
    origin: int
    size: int
    access: str


@dataclass(frozen=True)
class Machine:
    """A board of QEMU's, for ``qemu-system-arm -M name``: where code and data go, and what counts there.

    counter   a register that counts up, counter_hz times a second; runtime_c/emu_harness.c knows how it is started
    options   further words of the command line
    """

    name: str
    flash: int
    ram: int
    counter: int
    counter_hz: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A core, or a board with its real memory.

    cpu            as gcc calls it
    gcc_flags      choose core and FPU for arm-none-eabi-gcc (and for clang)
    zig_target     triple for ``zig cc -target``
    zig_cpu        for ``zig cc -mcpu=``; names the FPU, and extensions that zig leaves out otherwise
    memory         regions by address; ``flash`` and ``ram`` are those that code and data go to.
                   Of a bare core (``board`` is False) they are what QEMU's machine has, not a limit of any product.
    vectors        the region that the core starts from
    clock_hz       highest core clock of the board
    machine        what QEMU emulates the core on
    unicorn_cpu    name of the constant in unicorn.arm_const; empty where Unicorn does not know the core
    dsp            has the instructions on halfwords of ARMv7E-M
    mve            and those on vectors of ARMv8.1-M
    unaligned      reads and writes words at any address
    fpu            computes floats itself; a core without one calls the compiler's library, with the same bits
    """

    name: str
    description: str
    cpu: str
    board: bool = False
    gcc_flags: tuple[str, ...] = ()
    zig_target: str = ""
    zig_cpu: str = ""
    memory: tuple[Region, ...] = ()
    vectors: str = "flash"
    clock_hz: int | None = None
    machine: Machine | None = None
    unicorn_cpu: str = ""
    dsp: bool = False
    mve: bool = False
    unaligned: bool = True
    fpu: bool = True

    def region(self, name: str) -> Region:
        return next(r for r in self.memory if r.name == name)

    @property
    def flash(self) -> Region:
        return self.region("flash")

    @property
    def ram(self) -> Region:
        return self.region("ram")

    @property
    def emulators(self) -> tuple[str, ...]:
        """Those that know the core, the default first."""
        return tuple(name for name, core in (("unicorn", self.unicorn_cpu), ("qemu", self.machine)) if core)


def _arm(cpu: str, fpu: str, zig_fpu: str, machine: Machine) -> Target:
    return Target(
        name=cpu,
        description=f"Arm {cpu.title()} with single-precision FPU",
        cpu=cpu,
        gcc_flags=(f"-mcpu={cpu}", "-mthumb", f"-mfpu={fpu}", "-mfloat-abi=hard"),
        zig_target="thumb-freestanding-eabihf",
        zig_cpu=f"{cpu.replace('-', '_')}+{zig_fpu}",
        memory=(Region("flash", machine.flash, 4 * MB, "rx"), Region("ram", machine.ram, 4 * MB, "rwx")),
        machine=machine,
        unicorn_cpu=f"UC_CPU_ARM_{cpu.upper().replace('-', '_')}",
        dsp=True,
    )


MPS2 = Machine("mps2-an500", 0x00000000, 0x20000000, counter=0x40028018, counter_hz=25_000_000)
CORTEX_M7 = _arm("cortex-m7", "fpv5-sp-d16", "fp_armv8d16sp", MPS2)
CORTEX_M4 = _arm("cortex-m4", "fpv4-sp-d16", "vfp4d16sp", replace(MPS2, name="mps2-an386"))
CORTEX_M33 = _arm(
    "cortex-m33",
    "fpv5-sp-d16",
    "fp_armv8d16sp+dsp",
    Machine("mps2-an505", 0x10000000, 0x38000000, counter=0x50302018, counter_hz=20_000_000),
)
# Its vector unit takes integers only: on floats it flushes subnormal numbers to zero, which no other core does.
CORTEX_M55 = Target(
    name="cortex-m55",
    description="Arm Cortex-M55 with vector extension (MVE) and FPU",
    cpu="cortex-m55",
    gcc_flags=("-mcpu=cortex-m55+nomve.fp", "-mthumb", "-mfloat-abi=hard"),
    zig_target="thumb-freestanding-eabihf",
    zig_cpu="cortex_m55+mve+fp_armv8d16",
    memory=(
        Region("itcm", 0x10000000, 512 * KB, "rwx"),
        Region("flash", 0x11000000, 2 * MB, "rx"),
        Region("dtcm", 0x30000000, 512 * KB, "rwx"),
        Region("ram", 0x31000000, 4 * MB, "rwx"),
    ),
    vectors="itcm",
    machine=Machine("mps3-an547", 0x11000000, 0x31000000, counter=0x59302018, counter_hz=20_000_000),
    dsp=True,
    mve=True,
)
# The emulators know the Cortex-M0, which has the same instructions. The machine has as much memory as it is asked for.
CORTEX_M0PLUS = Target(
    name="cortex-m0plus",
    description="Arm Cortex-M0+: no FPU, no DSP instructions",
    cpu="cortex-m0plus",
    gcc_flags=("-mcpu=cortex-m0plus", "-mthumb", "-mfloat-abi=soft"),
    zig_target="thumb-freestanding-eabi",
    zig_cpu="cortex_m0plus",
    memory=(Region("flash", 0x00000000, 4 * MB, "rx"), Region("ram", 0x20000000, 4 * MB, "rwx")),
    machine=Machine(
        "microbit",
        0x00000000,
        0x20000000,
        counter=0x40008540,
        counter_hz=16_000_000,
        options=tuple(f"-global nrf51-soc.{kind}-size={4 * MB}" for kind in ("flash", "sram")),
    ),
    unicorn_cpu="UC_CPU_ARM_CORTEX_M0",
    unaligned=False,
    fpu=False,
)
HOST = Target("host", "this computer: the same C, for tests and simulation", "host")

CORTEX_M7_DOUBLE = replace(
    CORTEX_M7,
    gcc_flags=("-mcpu=cortex-m7", "-mthumb", "-mfpu=fpv5-d16", "-mfloat-abi=hard"),
    zig_cpu="cortex_m7+fp_armv8d16",
)
STM32F746 = replace(
    CORTEX_M7,
    name="stm32f746",
    description="STM32F746: Cortex-M7, 216 MHz, 320 KB SRAM, 1 MB flash",
    board=True,
    # DTCM (64 KB), SRAM1 and SRAM2 lie side by side.
    memory=(Region("flash", 0x08000000, 1 * MB, "rx"), Region("ram", 0x20000000, 320 * KB, "rwx")),
    clock_hz=216_000_000,
)
STM32F767 = replace(
    CORTEX_M7_DOUBLE,
    name="stm32f767",
    description="STM32F767: Cortex-M7, 216 MHz, 512 KB SRAM, 2 MB flash",
    board=True,
    # DTCM (128 KB), SRAM1 (368 KB) and SRAM2 (16 KB) lie side by side.
    memory=(
        Region("itcm", 0x00000000, 16 * KB, "rwx"),
        Region("flash", 0x08000000, 2 * MB, "rx"),
        Region("ram", 0x20000000, 512 * KB, "rwx"),
    ),
    clock_hz=216_000_000,
)
STM32H743 = replace(
    CORTEX_M7_DOUBLE,
    name="stm32h743",
    description="STM32H743: Cortex-M7, 480 MHz, 512 KB AXI SRAM (1 MB in all), 2 MB flash",
    board=True,
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
STM32H7A3 = replace(
    CORTEX_M7_DOUBLE,
    name="stm32h7a3",
    description="STM32H7A3: Cortex-M7, 280 MHz, 1 MB AXI SRAM (1.4 MB in all), 2 MB flash",
    board=True,
    memory=(
        Region("itcm", 0x00000000, 64 * KB, "rwx"),
        Region("flash", 0x08000000, 2 * MB, "rx"),
        Region("dtcm", 0x20000000, 128 * KB, "rwx"),
        Region("ram", 0x24000000, 1 * MB, "rwx"),
        Region("sram1", 0x30000000, 64 * KB, "rwx"),
        Region("sram2", 0x30010000, 64 * KB, "rwx"),
        Region("srd", 0x38000000, 32 * KB, "rwx"),
    ),
    clock_hz=280_000_000,
)
STM32F446 = replace(
    CORTEX_M4,
    name="stm32f446",
    description="STM32F446: Cortex-M4, 180 MHz, 128 KB SRAM, 512 KB flash",
    board=True,
    memory=(Region("flash", 0x08000000, 512 * KB, "rx"), Region("ram", 0x20000000, 128 * KB, "rwx")),
    clock_hz=180_000_000,
)
STM32L4R5 = replace(
    CORTEX_M4,
    name="stm32l4r5",
    description="STM32L4R5: Cortex-M4, 120 MHz, 640 KB SRAM, 2 MB flash",
    board=True,
    # SRAM1 (192 KB), the second address of SRAM2 (64 KB) and SRAM3 (384 KB) lie side by side.
    memory=(Region("flash", 0x08000000, 2 * MB, "rx"), Region("ram", 0x20000000, 640 * KB, "rwx")),
    clock_hz=120_000_000,
)
STM32U575 = replace(
    CORTEX_M33,
    name="stm32u575",
    description="STM32U575: Cortex-M33, 160 MHz, 768 KB SRAM (784 KB in all), 2 MB flash",
    board=True,
    # SRAM1 (192 KB), SRAM2 (64 KB) and SRAM3 (512 KB) lie side by side.
    memory=(
        Region("flash", 0x08000000, 2 * MB, "rx"),
        Region("ram", 0x20000000, 768 * KB, "rwx"),
        Region("sram4", 0x28000000, 16 * KB, "rwx"),
    ),
    clock_hz=160_000_000,
)
NRF5340 = replace(
    CORTEX_M33,
    name="nrf5340",
    description="nRF5340, application core: Cortex-M33, 128 MHz, 512 KB RAM, 1 MB flash",
    board=True,
    memory=(Region("flash", 0x00000000, 1 * MB, "rx"), Region("ram", 0x20000000, 512 * KB, "rwx")),
    clock_hz=128_000_000,
)
RP2040 = replace(
    CORTEX_M0PLUS,
    name="rp2040",
    description="RP2040 as on the Raspberry Pi Pico: Cortex-M0+, 133 MHz, 264 KB SRAM, 2 MB flash beside the chip",
    board=True,
    memory=(Region("flash", 0x10000000, 2 * MB, "rx"), Region("ram", 0x20000000, 264 * KB, "rwx")),
    clock_hz=133_000_000,
)
CORSTONE_300 = replace(
    CORTEX_M55,
    name="corstone-300",
    description="Corstone-300 on the MPS3 board (AN547): Cortex-M55, 32 MHz, 4 MB SRAM, 2 MB of code memory",
    board=True,
    clock_hz=32_000_000,
)

CORES = (CORTEX_M7, CORTEX_M4, CORTEX_M33, CORTEX_M55, CORTEX_M0PLUS)
BOARDS = (STM32F746, STM32F767, STM32H743, STM32H7A3, STM32F446, STM32L4R5, STM32U575, NRF5340, RP2040, CORSTONE_300)
TARGETS = {t.name: t for t in (*CORES, *BOARDS, HOST)}


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
    raise TTEError("TTE-E048", f"no target {name!r}", where="--target", fix=f"{hint}targets: {', '.join(TARGETS)}")
