"""Finds and drives C compilers: zig (from pip) or arm-none-eabi-gcc for boards, zig or cc for this computer."""

import hashlib
import importlib.resources
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from tte.errors import TTEError
from tte.runner.build import Build
from tte.target import STM32F746, Target

FLAGS = (
    # Loops that are worth it are unrolled by their pragmas. What calls kernels row by row is not: clang takes minutes.
    "-std=c99 -O2 -ffp-contract=off -fno-math-errno -fno-unroll-loops -ffunction-sections -fdata-sections"
    " -Wall -Wextra -Werror -Wconversion"
).split()
BOARD_FLAGS = [*FLAGS, "-fno-unwind-tables"]  # nothing unwinds on a board
STACK_BYTES = 4096


@dataclass(frozen=True)
class Firmware:
    """A linked program for a board; sizes in bytes of .text, .rodata, .data and what starts at zero or undefined.

    board: whose memory map it is linked for
    """

    elf: Path
    toolchain: str
    board: Target
    text: int
    rodata: int
    data: int
    bss: int
    stack_reserved: int

    @property
    def flash_bytes(self) -> int:
        return self.text + self.rodata + self.data


def find_toolchains() -> list[str]:
    """Names of the compilers for boards that are installed, the default first."""
    found = ["zig"] if importlib.util.find_spec("ziglang") else []
    return found + (["gcc"] if shutil.which("arm-none-eabi-gcc") else [])


def build_firmware(
    build: Build,
    target: Target,
    toolchain: str = "auto",
    machine: str = "board",
    optimize: str | None = None,
    selftest: bool = False,
) -> Firmware:
    """Compile and link the project with the emulator's start-up and harness.

    machine: "board": the map of ``target``, where a bare Cortex-M7 means the STM32F746; "qemu": that of QEMU's machine.
    optimize: the compiler's option, by default that of the project
    selftest: with the self-test, which needs memory of its own.
    Raises TTEError: E051 no compiler, E052 the compiler refuses the code, E053 the program does not fit the memory.
    """
    if toolchain == "auto":
        names = find_toolchains()
        if not names:
            raise TTEError(
                "TTE-E051", "no C compiler for Cortex-M", fix="pip install 'tte[emulate]', or install arm-none-eabi-gcc"
            )
        toolchain = names[0]
    boards = [_in_qemu(target)] if machine == "qemu" else _maps(target)
    for board in boards:
        try:
            return _link(build, board, toolchain, optimize or build.flag, selftest)
        except _DoesNotFit as problem:
            last = problem
    raise TTEError(
        "TTE-E053",
        f"the program does not fit: {last}",
        where=f"memory of {boards[-1].name}",
        fix="train fewer layers or channels (`tte analyze`), or choose a target with more memory (`tte targets`)",
    )


def _maps(target: Target) -> list[Target]:
    """A bare core has no memory of its own: a Cortex-M7 is taken for an STM32F746 as long as the program fits."""
    if target.cpu == STM32F746.cpu and not target.board:
        return [STM32F746, target]
    return [target]


def _in_qemu(target: Target) -> Target:
    """The target on QEMU's board: other addresses, and as much memory as the target has."""
    assert target.machine is not None, target
    places = {target.vectors: target.region(target.vectors).origin}
    places |= {"flash": target.machine.flash, "ram": target.machine.ram}
    return replace(target, memory=tuple(replace(target.region(name), origin=at) for name, at in places.items()))


class _DoesNotFit(Exception):
    """The linker's complaint about a full memory."""

    def __init__(self, text: str, board: Target) -> None:
        # lld names every section behind the first that does not fit, with growing numbers; GNU ld gives one number.
        found = re.findall(r"region [`'](\w+)':? overflowed by (\d+)", text)
        more = {region: max(int(n) for r, n in found if r == region) for region, _ in found}
        sizes = {region: board.region(region.lower()).size for region in more}
        full = [f"{region} needs {size + more[region]:,} bytes, has {size:,}" for region, size in sizes.items()]
        super().__init__("; ".join(full) or _first_lines(text))


def _link(build: Build, board: Target, toolchain: str, optimize: str, selftest: bool) -> Firmware:
    emulator = build.folder / "emulator"
    flags = [*BOARD_FLAGS, optimize]
    flags += ["-DEMU_SELFTEST"] if selftest else []
    prefix = f"{build.name}_"  # with "_": -DMODEL=model would go around in circles
    flags += [f"-I{build.include}", f"-I{emulator}", f"-DMODEL_PREFIX={prefix}"]
    flags += [f"-DMODEL_PREFIX_UPPER={prefix.upper()}", f'-DMODEL_HEADER="{build.name}.h"']
    if board.machine:
        flags += [f"-DEMU_COUNTER={board.machine.counter:#x}u"]
    command = board_command(board, toolchain)
    script = _linker_script(emulator, board)
    sources = [*build.list_sources(selftest), *sorted(emulator.glob("emu_*.c"))]
    version = toolchain_version(toolchain)
    words = [version, *(f for f in flags if not f.startswith("-I")), *board.gcc_flags]
    files = [*sources, *_headers(build), *emulator.glob("*.h")]
    elf = _cache(build.folder) / f"{board.name}-{toolchain}-{_digest(files, [script, *words])}.elf"
    if not elf.exists():
        with tempfile.TemporaryDirectory(dir=elf.parent) as scratch:
            ld = Path(scratch) / "link.ld"
            ld.write_text(script)
            made = Path(scratch) / "firmware.elf"
            line = [*command, *flags, "-Wl,--gc-sections", "-T", str(ld), "-o", str(made), *map(str, sources)]
            if toolchain == "gcc":
                line += ["-nostdlib", "-lc", "-lgcc"]
            elif board.fpu:  # else with zig's library for floats, which it makes when it is first asked for
                line += ["-nostdlib"]
            result = _run(line)
            if result.returncode:
                if "overflowed" in result.stderr or "will not fit" in result.stderr or "overlap" in result.stderr:
                    raise _DoesNotFit(result.stderr, board)
                raise _refused(line, result.stderr)
            made.replace(elf)
    return Firmware(elf, version, board, *_sizes(elf))


def host_compiler(sanitize: bool = False) -> list[str] | None:
    """The command of the C compiler for this computer: zig, or (with sanitizers always) the system's."""
    if not sanitize and importlib.util.find_spec("ziglang") is not None:
        return _zig()
    system = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    return [system] if system else None


def build_host(build: Build, sanitize: bool = False, selftest: bool = False) -> Path:
    """The project as a shared library for this computer: the same C, the same bits.

    sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, by the system's compiler
    selftest: with the self-test
    Raises TTEError: E051 no compiler, E052 the compiler refuses the code.
    """
    command = host_compiler(sanitize)
    if command is None:
        raise TTEError("TTE-E051", "no C compiler for this computer", fix="pip install 'tte[emulate]', or install gcc")
    flags = [*FLAGS, "-march=native", "-fPIC", f"-I{build.include}"]
    if sanitize:
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = build.list_sources(selftest)
    words = [*command, *(f for f in flags if not f.startswith("-I")), _this_cpu()]
    library = _cache(build.folder) / f"host-{_digest([*sources, *_headers(build)], words)}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / "host.so"
            line = [*command, *flags, "-shared", "-o", str(made), *map(str, sources)]
            result = _run(line)
            if result.returncode:
                raise _refused(line, result.stderr)
            made.replace(library)
    return library


def build_bare(
    folder: Path, sources: Mapping[str, str], target: Target, toolchain: str = "zig", optimize: str = "-O2"
) -> Path:
    """A program without an entry, for the core of ``target``: file name -> text; what is compiled ends with .c.

    Raises TTEError (E052) where the compiler refuses the code.
    """
    for name, text in sources.items():
        (folder / name).write_text(text)
    script = folder / "link.ld"
    script.write_text(f"SECTIONS {{ .text {BARE_CODE:#x} : {{ *(.text* .rodata*) }} /DISCARD/ : {{ *(.ARM*) }} }}")
    elf = folder / f"{toolchain}{optimize}.elf"
    files = [*(folder / name for name in sources if name.endswith(".c")), Path(__file__).with_name("bare.c")]
    command = board_command(target, toolchain)
    flags = [*BOARD_FLAGS, optimize]  # not for the linker: it would drop what nothing calls
    objects = [str(folder / f"{toolchain}{optimize}-{file.name}.o") for file in files]
    lines = [[*command, *flags, "-c", "-o", made, str(file)] for made, file in zip(objects, files, strict=True)]
    lines.append([*command, "-nostdlib", "-T", str(script), "-o", str(elf), *objects])
    for line in lines:
        result = _run(line if toolchain == "zig" or "-c" in line else [*line, "-lgcc"])
        if result.returncode:
            raise _refused(line, result.stderr)
    return elf


def build_calls(
    folder: Path,
    sources: Mapping[str, str],
    names: Sequence[str],
    target: Target,
    toolchain: str = "zig",
    optimize: str = "-O2",
) -> Path:
    """A program for QEMU's board that calls the functions ``names`` as files say, see calls.c; sources: as above."""
    assert target.machine
    table = (
        f"extern char {', '.join(f'{name}[]' for name in names)};\nvoid *const functions[] = {{{', '.join(names)}}};\n"
    )
    for name, text in ({**sources, "functions.c": table}).items():
        (folder / name).write_text(text)
    script, elf = folder / "link.ld", folder / f"{toolchain}{optimize}.elf"
    script.write_text(_linker_script(RUNTIME, _in_qemu(target)))
    files = [*(folder / name for name in (*sources, "functions.c") if name.endswith(".c")), RUNTIME / "emu_startup.c"]
    flags = [*FLAGS, optimize, "-fno-unwind-tables", f"-I{RUNTIME}", f"-DEMU_COUNTER={target.machine.counter:#x}u"]
    line = [*board_command(target, toolchain), *flags, "-nostdlib", "-Wl,--entry=emu_reset", f"-Wl,-T,{script}", "-o"]
    line += [str(elf), *map(str, files), str(Path(__file__).with_name("calls.c"))]
    result = _run(line if toolchain == "zig" else [*line, "-lc", "-lgcc"])
    if result.returncode:
        raise _refused(line, result.stderr)
    return elf


RUNTIME = Path(str(importlib.resources.files("tte.runtime_c")))
BARE_CODE = 0x0800_0000  # where programs without an entry lie


def board_command(board: Target, toolchain: str) -> list[str]:
    """The compiler for a core, without a library."""
    if toolchain == "zig":
        more = ["-g", "-fno-sanitize=undefined"]  # zig drops the symbols at -Os, and adds checks at -O0
        # Of sums over strides clang makes vector loops without an end, where it may not unroll loops.
        more += ["-fno-vectorize", "-fno-slp-vectorize"] if board.mve else []
        return [*_zig(), "-target", board.zig_target, f"-mcpu={board.zig_cpu}", "-ffreestanding", *more]
    return ["arm-none-eabi-gcc", *board.gcc_flags, "-ffreestanding"]


def build_counter(folder: Path) -> Path:
    """The instruction counter of the Unicorn board, as a shared library for this computer, in the cache of a folder."""
    source = Path(__file__).with_name("count.c")
    library = _cache(folder) / f"count-{_digest([source], [_this_cpu()])}.so"
    if not library.exists():
        system = shutil.which("gcc") or shutil.which("cc")
        command = [system] if system else _zig()
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / "count.so"
            result = _run([*command, "-O2", "-shared", "-fPIC", "-o", str(made), str(source)])
            if result.returncode:
                raise _refused(command, result.stderr)
            made.replace(library)
    return library


def toolchain_version(toolchain: str) -> str:
    """For example "zig 0.16.0" or "arm-none-eabi-gcc 12.2.1"."""
    if toolchain == "zig":
        return f"zig {_run([_zig()[0], 'version']).stdout.strip()}"
    return f"arm-none-eabi-gcc {_run(['arm-none-eabi-gcc', '-dumpfullversion']).stdout.strip()}"


def _zig() -> list[str]:
    """The program itself, which `python -m ziglang` finds too, more slowly."""
    found = importlib.util.find_spec("ziglang")
    assert found and found.submodule_search_locations
    return [str(Path(found.submodule_search_locations[0]) / ("zig.exe" if os.name == "nt" else "zig")), "cc"]


def _headers(build: Build) -> list[Path]:
    return [path for folder in (build.include, build.folder / "Core" / "Src") for path in folder.glob("*.h")]


def _refused(command: Sequence[str], text: str) -> TTEError:
    return TTEError(
        "TTE-E052",
        f"the compiler refuses the code:\n{_first_lines(text)}",
        where=" ".join(command),
        fix="if you did not change the generated files, report this as a bug of tte",
    )


def _first_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[:12])


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if "XDG_CACHE_HOME" not in environment and not os.access(Path.home(), os.W_OK):
        environment["ZIG_GLOBAL_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "tte-zig-cache")
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _cache(project: Path) -> Path:
    folder = project / ".cache"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as problem:
        raise TTEError(
            "TTE-E054", f"cannot write: {problem.strerror}", where=str(folder), fix="make the project folder writable"
        ) from problem
    return folder


def _digest(files: Sequence[Path], words: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _this_cpu() -> str:
    """-march=native makes a library for one kind of processor."""
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + next((line for line in lines if line.startswith("flags")), platform.processor())


def _linker_script(emulator: Path, board: Target) -> str:
    template = jinja2.Template((emulator / "emu_link.ld.j2").read_text(), undefined=jinja2.StrictUndefined)
    regions = {"flash": board.flash, "ram": board.ram, "boot": board.region(board.vectors)}
    return str(template.render(target=board, **regions, stack_bytes=STACK_BYTES))


def _sizes(elf: Path) -> tuple[int, int, int, int, int]:
    """Bytes of .text with vectors and unwind tables, .rodata, .data, zeroed and uninitialised, reserved stack."""
    from elftools.elf.elffile import ELFFile

    with elf.open("rb") as file:
        sizes = {s.name: int(s["sh_size"]) for s in ELFFile(file).iter_sections()}
    get = sizes.get
    return (
        sum(get(name, 0) for name in (".vectors", ".text", ".ARM.extab", ".ARM.exidx")),
        get(".rodata", 0),
        get(".data", 0),
        get(".bss", 0) + get(".arena", 0),
        get(".stack", 0),
    )
