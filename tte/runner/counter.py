"""Counts what an emulated core executes, in C: hooks in Python would take most of the time."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Node(ctypes.Structure):
    """node_t of count.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("parent", "child", "sibling", "function")),
        ("origin", ctypes.c_uint32),
        ("counted", ctypes.c_uint64 * 2),
        ("read", ctypes.c_uint64 * 2),
    ]


class BlockRecord(ctypes.Structure):
    """block_t of count.c."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("address", "bytes", "instructions", "weight")),
        ("function", ctypes.c_int32),
        ("executed", ctypes.c_uint64),
    ]


Block = tuple[int, int]  # instructions that are executed one after the other: address of the first, bytes of all


class Counter:
    """count.c at work on an engine of Unicorn.

    library    see ``build_counter``
    code       the memory that programs run in, an array of ctypes that the engine has at address ``origin``
    functions  (address, end) of each, in order
    unaligned  whether words may be at any address; else the engine stops where one is not aligned
    """

    def __init__(
        self,
        engine: Any,
        library: Path,
        code: Any,
        origin: int,
        functions: Sequence[tuple[int, int]] = (),
        unaligned: bool = True,
    ) -> None:
        import unicorn
        from unicorn.unicorn_py3.unicorn import uclib

        self._library = ctypes.CDLL(str(library))
        self._library.count_open.restype = ctypes.c_void_p
        self._library.count_read.restype = ctypes.c_uint64
        self._library.count_unaligned.restype = ctypes.c_uint32
        self._library.count_nodes.restype = ctypes.POINTER(Node)
        bounds = [address for function in functions for address in function]
        table = (ctypes.c_uint32 * len(bounds))(*bounds)
        place = (ctypes.c_uint32(origin), ctypes.c_uint32(len(code)))
        stop = ctypes.cast(uclib.uc_emu_stop, ctypes.c_void_p)
        self._counter = ctypes.c_void_p(self._library.count_open(code, *place, table, len(functions), stop))
        self._kept = (code, table)  # C knows where they are
        uclib.uc_hook_add.restype = ctypes.c_int
        accesses = unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE
        hooks = [(unicorn.UC_HOOK_BLOCK, self._library.count_block)]
        for kind, hook in hooks if unaligned else [*hooks, (accesses, self._library.check_access)]:
            status = uclib.uc_hook_add(
                engine._uch,
                ctypes.byref(ctypes.c_size_t()),
                ctypes.c_int(kind),
                ctypes.cast(hook, ctypes.c_void_p),
                self._counter,
                ctypes.c_uint64(1),
                ctypes.c_uint64(0),
            )
            assert status == 0, status

    def read(self) -> int:
        """Executed instructions since the beginning; what ``nodes`` give is what came since the last call."""
        return int(self._library.count_read(self._counter))

    def nodes(self) -> list[Node]:
        """Of the calls between the last two readings, callers before what they call."""
        used = ctypes.c_int32()
        nodes = self._library.count_nodes(self._counter, ctypes.byref(used))
        return [nodes[i] for i in range(used.value)]

    def blocks(self) -> dict[Block, int]:
        """How often each block was executed since the last call, in the order of their addresses."""
        room = 1 << 14
        table = (BlockRecord * room)()
        used = int(self._library.count_blocks(self._counter, table, room))
        assert used <= room, f"a program of {used} blocks"
        return {(b.address, b.bytes): b.executed for b in sorted(table[:used], key=lambda b: (b.address, b.bytes))}

    def weigh(self, weights: Mapping[Block, int]) -> None:
        """What an execution of each block adds to the second count of a node, from now on."""
        for (address, size), weight in weights.items():
            self._library.count_weigh(self._counter, *map(ctypes.c_uint32, (address, size, weight)))

    def find_unaligned(self) -> int:
        """The address of an access that is not aligned, or 0."""
        return int(self._library.count_unaligned(self._counter))

    def close(self) -> None:
        self._library.count_close(self._counter)
