"""Measuring on other machines: a tracker, servers and a client on this one."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
from test_tuning import make_trial, model  # noqa: F401  a fixture

import tte
from tte.errors import TTEError
from tte.runner import farm
from tte.runner.bare import run
from tte.runner.toolchain import build_counter, find_toolchains

if not find_toolchains() or not all(map(importlib.util.find_spec, ("unicorn", "tornado", "cloudpickle"))):
    pytest.skip("pip install 'tte[emulate,farm]'", allow_module_level=True)

TRACKER = """
from tvm.rpc.server import PopenRPCServerState
from tvm.rpc.tracker import PopenTrackerServerState
port = PopenTrackerServerState("127.0.0.1", 19190, 19999, silent=True).port
PopenRPCServerState("127.0.0.1", 19190, 19999, tracker_addr=("127.0.0.1", port), key="foreign", silent=True)
print(port, flush=True)
"""
SERVE = "from tte.cli import main; main()"

Start = Callable[..., Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs that print a line when they are ready, and ends them with their children."""
    started: list[Popen[str]] = []

    def begin(text: str, *arguments: str) -> Popen[str]:
        command = [sys.executable, "-c", text, *arguments]
        started.append(Popen(command, stdout=PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        end(process)


def end(process: Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def first_line(process: Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_servers_measure_and_are_lost(
    start: Start,
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(farm, "PATIENCE", 1.0)
    port = first_line(start(TRACKER))
    serve = ("serve", "--tracker", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--key", "m7")
    servers = [start(SERVE, *serve) for _ in range(2)]
    assert all(first_line(server).startswith("m7: 127.0.0.1:") for server in servers)
    address = f"rpc://127.0.0.1:{port}"

    def tune(name: str, **options: Any) -> bytes:
        given = {"update_scheme": "last-layer", "memory_plan": "fastest", "trials": 5} | options
        return tte.tune(model, schedules=tmp_path / name, **given).schedules.read_bytes()

    assert tune("remote.json", runner=f"{address}/m7") == tune("local.json")
    with pytest.raises(TTEError, match="knows no server with the key 'other'"):
        farm.Farm(f"{address}/other", "m7")
    job = make_trial().build()
    with farm.Farm(f"{address}/foreign", "m7") as one, pytest.raises(TTEError, match="not that of this version"):
        one.run(job)
    with farm.Farm(address, "m7") as both, ThreadPoolExecutor(2) as pool:
        assert both.servers == 2
        expected = run(job, build_counter(tmp_path))
        assert list(pool.map(both.run, 6 * [job])) == 6 * [expected]
        with pytest.raises(AssertionError, match="is not"):
            both.run(replace(job, names=("two", "other")))
        with pytest.raises(TTEError, match="a server failed"):
            both.run(replace(job, names=("nothing", "two")))
        end(servers[0])
        assert list(pool.map(both.run, 4 * [job])) == 4 * [expected]
        end(servers[1])
        with pytest.raises(TTEError, match="knows no server"):
            both.run(job)


@pytest.mark.parametrize(
    ("host", "port", "where"),
    [
        ("no..name", 0, "--host"),
        (64 * "x", 0, "--host"),
        ("192.0.2.1", 0, "--host"),
        ("127.0.0.1", 65536, "--port"),
        ("127.0.0.1", None, "--port"),
    ],
)
def test_where_it_cannot_listen_the_option_is_named(host: str, port: int | None, where: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as used,
        pytest.raises(TTEError) as problem,
    ):
        farm._listen(host, used.getsockname()[1] if port is None else port)
    assert (problem.value.code, problem.value.where) == ("TTE-E059", where)
