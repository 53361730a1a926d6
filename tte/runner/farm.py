"""Measures on other machines: jobs go to servers that TVM's RPC tracker knows, counts come back."""

import json
import multiprocessing
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from errno import EACCES, EADDRINUSE
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tte.errors import TTEError
from tte.runner.bare import Counts, Job, run
from tte.runner.toolchain import build_counter

FUNCTION = "tte.run_job.1"  # of a server; the number is that of the protocol
KEY = re.compile(r"[^/:\s]+")
ADDRESS = re.compile(rf"rpc://(?P<host>\[[^]]+\]|[^:/]+):(?P<port>\d+)(?:/(?P<key>{KEY.pattern}))?")
LAST_PORT = 65535
ATTEMPTS = 3  # to run a job, should servers be lost
PATIENCE = 10.0  # seconds without any server


class Farm:
    """The servers with one key. servers: how many there were at the beginning

    Each serves one session at a time; a job whose session is lost goes to another.
    """

    def __init__(self, address: str, key: str) -> None:
        """key: where the address has none. Raises TTEError: E059 no such address, E051 no tracker or server there."""
        found = _parse(address)
        if found is None:
            fix = "local, or rpc://HOST:PORT or rpc://HOST:PORT/KEY of an RPC tracker"
            raise TTEError("TTE-E059", f"{address!r} is no runner", where="--runner", fix=fix)
        self.place, own = found
        self.key = own or key
        self._tracker = _connect(self.place)
        self._lock = threading.Lock()
        self._idle: SimpleQueue[Any] = SimpleQueue()
        self.servers, _ = self._count()
        if not self.servers:
            raise self._nobody()

    def __enter__(self) -> "Farm":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the sessions: servers are free again."""
        self._idle = SimpleQueue()
        self._tracker.close()

    def run(self, job: Job) -> Counts:
        """By the first server that is free; any thread may ask.

        Raises TTEError: E051 no server is left, E056 each that tried was lost.
        Fails where the function that was measured is not right.
        """
        from tvm.error import RPCError

        for _ in range(ATTEMPTS):
            call = self._take()
            try:
                answer = json.loads(str(call(*_pack(job))))
            except RPCError as problem:  # the server raised it
                self._idle.put(call)
                raise TTEError("TTE-E056", f"a server failed: {problem}", where=f"servers {self.key!r}") from None
            except RuntimeError as problem:  # the connection is lost
                last = str(problem)  # and nothing that would keep the session
                continue
            self._idle.put(call)
            assert "wrong" not in answer, answer["wrong"]
            return Counts(answer["instructions"], {(address, size): n for address, size, n in answer["blocks"]})
        what = f"{ATTEMPTS} servers were lost, one after the other, while they measured the same: {last}"
        raise TTEError("TTE-E056", what, where=f"servers {self.key!r}", fix="called again, tuning goes on")

    def _take(self) -> Any:
        """A session that nobody uses: its function that runs jobs."""
        seen = time.monotonic()
        while time.monotonic() - seen < PATIENCE:
            try:
                return self._idle.get(timeout=0.1)
            except Empty:
                pass
            with self._lock:
                servers, free = self._count()
                if servers:
                    seen = time.monotonic()
                if free and (call := self._open()):
                    return call
        raise self._nobody()

    def _count(self) -> tuple[int, int]:
        """How many servers there are, and how many are free."""
        try:
            summary = self._tracker.summary()
        except OSError as problem:
            raise _no_tracker(self.place, problem) from problem
        known = sum(server["key"] == f"server:{self.key}" for server in summary["server_info"])
        return known, summary["queue_info"].get(self.key, {}).get("free", 0)

    def _open(self) -> Any:
        """None for a server that went away meanwhile."""
        try:
            session = self._tracker.request(self.key, max_retry=1)
        except RuntimeError:
            return None
        try:
            return session.get_function(FUNCTION)
        except (AttributeError, RuntimeError) as problem:
            what = f"a server with the key {self.key!r} is not that of this version of tte: it has no {FUNCTION}"
            raise TTEError("TTE-E056", what, where="--runner", fix="start it by `tte serve`") from problem

    def _nobody(self) -> TTEError:
        where = "{}:{}".format(*self.place)
        fix = f"tte serve --tracker {where} --key {self.key}"
        return TTEError("TTE-E051", f"the tracker knows no server with the key {self.key!r}", where=where, fix=fix)


def serve(tracker: str, key: str, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Run jobs for whoever asks the tracker ("HOST:PORT") for ``key``, one session after the other, until interrupted.

    host, port: where to listen, 0 for any port that is free; ready: called with the port.
    TVM's servers do whatever they are asked for: only for networks where everybody may run programs here.
    Raises TTEError: E059 no such address, E051 no tracker there.
    """
    if not KEY.fullmatch(key):
        raise TTEError("TTE-E059", f"{key!r} is no key", where="--key", fix="a word without / and :")
    found = _parse(f"rpc://{tracker}")
    if found is None or found[1]:
        raise TTEError("TTE-E059", f"{tracker!r} is no address", where="--tracker", fix="HOST:PORT of an RPC tracker")
    place, _ = found
    _connect(place).close()
    from tvm.rpc.server import _listen_loop
    from tvm_ffi import register_global_func

    multiprocessing.set_start_method("fork", force=True)  # a session is a process that knows the function
    with tempfile.TemporaryDirectory() as folder, _listen(host, port) as listening:
        counter = build_counter(Path(folder))

        def answer(*message: Any) -> str:
            try:
                counts = run(_unpack(*message), counter)
            except AssertionError as problem:
                return json.dumps({"wrong": str(problem)})
            blocks = [[*block, n] for block, n in counts.blocks.items()]
            return json.dumps({"instructions": counts.instructions, "blocks": blocks})

        register_global_func(FUNCTION, answer, override=True)
        port = listening.getsockname()[1]
        ready(port)
        while True:
            try:
                _listen_loop(listening, port, key, place, "", None)
            except RuntimeError:  # a session crashed, or the tracker is gone
                _connect(place).close()


def _listen(host: str, port: int) -> socket.socket:
    fix = "another one, or 0 for any"
    if not 0 <= port <= LAST_PORT:
        raise TTEError("TTE-E059", f"there is no port {port}", where="--port", fix=fix)
    try:
        return socket.create_server((host, port))
    except (OSError, UnicodeError) as problem:  # UnicodeError: no name of a host
        reason = getattr(problem, "strerror", None) or "no name of a host"
        where = "--port" if getattr(problem, "errno", None) in (EACCES, EADDRINUSE) else "--host"
        fix = fix if where == "--port" else "an address of this computer: 127.0.0.1, or 0.0.0.0 for all that it has"
        raise TTEError("TTE-E059", f"cannot listen at {host}:{port}: {reason}", where=where, fix=fix) from problem


def _pack(job: Job) -> list[str | bytes]:
    """What goes over the network: JSON, the program, the buffers."""
    content = {key: value for key, value in vars(job).items() if key not in ("elf", "buffers")}
    return [json.dumps(content), job.elf, *job.buffers]


def _unpack(content: Any, elf: Any, *buffers: Any) -> Job:
    fields = json.loads(str(content))
    names, places = tuple(fields["names"]), tuple(map(tuple, fields["places"]))
    return Job(**fields | {"names": names, "places": places}, elf=bytes(elf), buffers=tuple(map(bytes, buffers)))


def _parse(address: str) -> tuple[tuple[str, int], str | None] | None:
    """Host and port, and the key if there is one; None if it is no address."""
    found = ADDRESS.fullmatch(address)
    if not found or int(found["port"]) > LAST_PORT:
        return None
    return (found["host"].strip("[]"), int(found["port"])), found["key"]


def _connect(place: tuple[str, int]) -> Any:
    try:
        socket.create_connection(place, timeout=5).close()  # TVM would try for a minute
        from tvm import rpc

        return rpc.connect_tracker(*place)
    except (OSError, RuntimeError, UnicodeError) as problem:  # UnicodeError: no name of a host
        raise _no_tracker(place, problem) from problem


def _no_tracker(place: tuple[str, int], problem: Exception) -> TTEError:
    fix = "pip install 'tte[farm]' and start one: python -m tvm.exec.rpc_tracker --port 9190"
    return TTEError("TTE-E051", f"no RPC tracker: {problem}", where="{}:{}".format(*place), fix=fix)
