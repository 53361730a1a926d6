"""Runs firmware on Unicorn: exactly the board's memory, everything else faults; exact instruction counts."""

import ctypes
import importlib.util
import signal
import struct
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tte.errors import TTEError
from tte.runner.board import require_open
from tte.runner.build import Build
from tte.runner.counter import Block, Counter
from tte.runner.stream import StreamBoard
from tte.runner.toolchain import Firmware, build_counter
from tte.target import Target

COMMANDS, RESULTS = 1, 2
BREAKPOINT = 7


def open_unicorn(build: Build, firmware: Firmware) -> "UnicornBoard":
    """Start the firmware. Raises TTEError (E051) where unicorn is not installed."""
    if importlib.util.find_spec("unicorn") is None:
        raise TTEError("TTE-E051", "unicorn is not installed", fix="pip install 'tte[emulate]', or use --emulator qemu")
    return UnicornBoard(build, firmware)


@dataclass(frozen=True)
class Frame:
    """A function, called from one place: what it executed itself, and its calls in the order of the first.

    names: of the function; compilers fold those that are equal
    own: instructions, weight: see ``UnicornBoard.weigh``
    """

    names: tuple[str, ...]
    own: tuple[int, int]
    calls: "tuple[Frame, ...]"

    @property
    def counts(self) -> tuple[int, int]:
        """With all calls."""
        return add([self.own, *(call.counts for call in self.calls)])

    @property
    def instructions(self) -> int:
        return self.counts[0]


def add(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Instructions and weights."""
    instructions, weights = zip((0, 0), *counts, strict=True)
    return sum(instructions), sum(weights)


class UnicornBoard(StreamBoard):
    """The emulator in this process. It runs while a command is carried out, and waits in between."""

    def __init__(self, build: Build, firmware: Firmware) -> None:
        import unicorn
        from unicorn import arm_const

        self.build, self.firmware = build, firmware
        self._folder = tempfile.TemporaryDirectory()
        self.state_file = Path(self._folder.name) / "state"
        self._input, self._output = b"", bytearray()
        self._files: dict[int, BinaryIO] = {}
        self._exit: int | None = None
        self._waiting = False
        self._fault = ""
        board: Target = firmware.board
        self._engine = engine = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        engine.ctl_set_cpu_model(getattr(arm_const, board.unicorn_cpu))
        self._registers = arm_const
        self._flash = (ctypes.c_uint8 * board.flash.size)()
        engine.mem_map_ptr(
            board.flash.origin,
            board.flash.size,
            unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC,
            ctypes.addressof(self._flash),
        )
        engine.mem_map(board.ram.origin, board.ram.size, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)
        engine.mem_map(0xE0000000, 0x100000, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE)  # system control
        self._symbols = self._load(board)
        assert board.machine is not None, board
        engine.mmio_map(board.machine.counter & ~0xFFF, 0x1000, self._read_counter, None, lambda *_: None, None)
        engine.hook_add(unicorn.UC_HOOK_INTR, self._on_interrupt)
        invalid = unicorn.UC_HOOK_MEM_INVALID
        engine.hook_add(invalid, self._on_invalid)
        functions = [(start, end) for start, end, _ in self._symbols]
        library = build_counter(self.build.folder)
        self._counter = Counter(engine, library, self._flash, board.flash.origin, functions, board.unaligned)
        stack, reset = struct.unpack("<II", bytes(self._flash[:8]))
        engine.reg_write(arm_const.UC_ARM_REG_SP, stack)
        engine.reg_write(arm_const.UC_ARM_REG_FPEXC, 1 << 30)
        self._pc = reset
        self._run()

    def _load(self, board: Target) -> list[tuple[int, int, tuple[str, ...]]]:
        """Copy the program into the flash; returns its functions in order: (address, end, names)."""
        from elftools.elf.elffile import ELFFile

        with self.firmware.elf.open("rb") as file:
            elf = ELFFile(file)
            for segment in elf.iter_segments("PT_LOAD"):
                data = segment.data()
                at = segment["p_paddr"] - board.flash.origin
                if data:
                    self._flash[at : at + len(data)] = data
            table = elf.get_section_by_name(".symtab")
            functions = [s for s in table.iter_symbols() if s["st_info"]["type"] == "STT_FUNC"]
            names: dict[tuple[int, int], list[str]] = {}
            for s in functions:
                if s["st_size"]:
                    start = s["st_value"] & ~1
                    names.setdefault((start, start + s["st_size"]), []).append(s.name)
            return sorted((*bounds, tuple(sorted(found))) for bounds, found in names.items())

    def profile(self) -> Frame:
        """What was executed between the last two readings of the timer: in the last call whose result has a count."""
        require_open(self.is_open)
        nodes = self._counter.nodes()
        calls: dict[int, list[Frame]] = {i: [] for i in range(-1, len(nodes))}
        for i, node in reversed(list(enumerate(nodes))):
            names = self._symbols[node.function][2] if node.function >= 0 else ()
            frame = Frame(names, tuple(node.read), tuple(reversed(calls[i])))
            if frame.instructions:
                calls[node.parent].append(frame)
        return calls[-1][0]

    def blocks(self) -> dict[Block, bytes]:
        """The code of each block that was executed until now."""
        origin = self.firmware.board.flash.origin
        return {(at, n): bytes(self._flash[at - origin : at - origin + n]) for at, n in self._counter.blocks()}

    def weigh(self, weights: Mapping[Block, int]) -> None:
        """What an execution of a block adds to the weight of its function, from now on."""
        self._counter.weigh(weights)

    def _exchange(self, command: bytes, size: int) -> bytes:
        self._input += command
        self._run()
        result = bytes(self._output[:size])
        assert len(result) == size, f"the harness answered {len(result)} of {size} bytes"
        del self._output[:size]
        return result

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._counter.close()
        self._folder.cleanup()

    def _run(self) -> None:
        """Until the program asks for a command that is not there yet."""
        import unicorn

        self._waiting = False
        try:
            with _interruptible(self._engine):
                self._engine.emu_start(self._pc | 1, 0xFFFFFFFE)
        except unicorn.UcError as problem:
            self._fault = self._fault or f"{problem} at {self._where()}"
        self._pc = self._engine.reg_read(self._registers.UC_ARM_REG_PC)
        if address := self._counter.find_unaligned():
            self._fault = f"access to {address:#010x}, which is not aligned, at {self._where()}"
        if self._fault:
            raise TTEError(
                "TTE-E056",
                f"the firmware faulted: {self._fault}",
                where=str(self.firmware.elf),
                fix="this is a bug of tte; please report it with the model",
            )
        if self._exit is not None and not self._waiting:
            raise TTEError("TTE-E056", f"the firmware ended with {self._exit}", where=str(self.firmware.elf))

    def _where(self) -> str:
        from bisect import bisect_right

        pc = self._engine.reg_read(self._registers.UC_ARM_REG_PC)
        i = bisect_right([s for s, _, _ in self._symbols], pc) - 1
        inside = i >= 0 and pc < self._symbols[i][1]
        return f"{pc:#010x}" + (f" in {self._symbols[i][2][0]}" if inside else "")

    def _on_invalid(self, engine: Any, access: int, address: int, size: int, value: int, user: Any) -> bool:
        self._fault = f"access to {address:#010x}, outside of {self.firmware.board.name}'s memory, at {self._where()}"
        return False

    def _read_counter(self, engine: Any, offset: int, size: int, user: Any) -> int:
        return self._counter.read() & 0xFFFFFFFF

    def _on_interrupt(self, engine: Any, number: int, user: Any) -> None:
        registers = self._registers
        if number != BREAKPOINT:
            self._fault = f"exception {number} at {self._where()}"
            engine.emu_stop()
            return
        operation = engine.reg_read(registers.UC_ARM_REG_R0)
        block = engine.reg_read(registers.UC_ARM_REG_R1)
        result = self._semihost(operation, block)
        if result is None:
            engine.emu_stop()
            return
        engine.reg_write(registers.UC_ARM_REG_R0, result & 0xFFFFFFFF)
        engine.reg_write(registers.UC_ARM_REG_PC, (engine.reg_read(registers.UC_ARM_REG_PC) + 2) | 1)

    def _words(self, block: int, n: int) -> tuple[int, ...]:
        return struct.unpack(f"<{n}I", bytes(self._engine.mem_read(block, 4 * n)))

    def _semihost(self, operation: int, block: int) -> int | None:
        """The result of a semihosting call; None to stop here."""
        if operation == 0x01:  # open
            address, _, length = self._words(block, 3)
            name = bytes(self._engine.mem_read(address, length)).decode()
            if name in ("commands", "results"):
                return COMMANDS if name == "commands" else RESULTS
            handle = max([RESULTS, *self._files]) + 1
            self._files[handle] = self.state_file.open("rb")
            return handle
        if operation == 0x02:  # close
            self._files.pop(self._words(block, 1)[0]).close()
            return 0
        if operation == 0x04:  # print
            text = bytes(self._engine.mem_read(block, 64)).split(b"\0")[0].decode(errors="replace")
            self._fault = self._fault or f"{text.strip()} at {self._where()}"
            return 0
        if operation == 0x05:  # write
            handle, address, length = self._words(block, 3)
            self._output += self._engine.mem_read(address, length)
            return 0
        if operation == 0x06:  # read
            handle, address, length = self._words(block, 3)
            if handle != COMMANDS:
                data = self._files[handle].read(length)
            elif not self._input:
                self._waiting = True
                return None
            else:
                data, self._input = self._input[:length], self._input[length:]
            self._engine.mem_write(address, data)
            return length - len(data)
        if operation == 0x0A:  # seek
            handle, position = self._words(block, 2)
            self._files[handle].seek(position)
            return 0
        assert operation == 0x20, f"semihosting operation {operation:#x}"
        self._exit = self._words(block, 2)[1]
        return None


@contextmanager
def _interruptible(engine: Any) -> Iterator[None]:
    """Ctrl-C stops the engine and is raised behind it: raised inside of a callback, C would swallow it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def stop(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        engine.emu_stop()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupted:
            raise KeyboardInterrupt
