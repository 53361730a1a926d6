"""Generated C against the numpy reference, operator by operator, and bit for bit between compilers."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networks
import numpy as np
import pytest
from samples import SAMPLES

from tte.codegen.emit import emit_kernels
from tte.codegen.kernel import Kernel
from tte.codegen.schedule import Call, schedule
from tte.ir import Builder, Graph, TensorType, Value, evaluate, tensor_type
from tte.passes.autodiff import differentiate
from tte.passes.fuse import fuse_elementwise, fuse_updates
from tte.passes.inplace import work_in_place
from tte.passes.optimizer import attach_sgd
from tte.passes.regions import wrap
from tte.runner.toolchain import FLAGS

COMPILERS = {
    "zig": [sys.executable, "-m", "ziglang", "cc", "-march=native"] if importlib.util.find_spec("ziglang") else None,
    "gcc": ["gcc", "-march=native"] if shutil.which("gcc") else None,
    "gcc-O0": ["gcc", "-march=native", "-O0"] if shutil.which("gcc") else None,
    "sanitized": ["gcc", "-fsanitize=undefined", "-fno-sanitize-recover=all"] if shutil.which("gcc") else None,
}


@dataclass(frozen=True, eq=False)
class Case:
    """A call with its operands and the interpreter's answer."""

    id: str
    call: Call
    inputs: dict[str, np.ndarray]
    expected: np.ndarray
    taken: Value | None = None  # the operand whose buffer the result takes over

    def run(self, library: ctypes.CDLL, name: str) -> np.ndarray:
        memory = {key: to_c(array) for key, array in self.inputs.items()}
        out = self.call.outputs[0]
        result = np.full(out.type.nbytes, 0xA5, np.uint8)
        # It is not among the pointers: it is there already.
        if self.taken is not None:
            result[:] = memory[self.taken.name].view(np.uint8).reshape(-1)
        pointers = [memory[v.name].ctypes.data_as(ctypes.c_void_p) for v in self.call.inputs]
        library[name](*pointers, result.ctypes.data_as(ctypes.c_void_p))
        return from_c(result, out)


def to_c(array: np.ndarray) -> np.ndarray:
    if array.dtype == bool:
        return np.packbits(array.reshape(-1), bitorder="little")
    return np.array(array, order="C")


def from_c(memory: np.ndarray, value: Value) -> np.ndarray:
    if value.type.dtype == "bit":
        return np.unpackbits(memory, bitorder="little")[: value.type.size].astype(bool).reshape(value.type.shape)
    return memory.view(value.type.numpy).reshape(value.type.shape)


def single_operators() -> list[Case]:
    cases = []
    for sample in SAMPLES:
        if sample.op in ("nn.batch_norm", "source"):
            continue  # always lowered before code is generated; tests/test_row_source.py
        arrays = sample.draw(seed=3)
        values = tuple(Value(f"x{i}", tensor_type(a)) for i, a in enumerate(arrays))
        builder = Builder()
        y = builder.call(sample.op, *values, **sample.attrs)
        graph = Graph("main", values, nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
        for call in schedule(graph):
            inputs = {v.name: a for v, a in zip(values, arrays, strict=True)}
            cases.append(Case(sample.id, call, inputs, evaluate(graph, arrays).outputs[0]))
    return cases


def whole_graphs() -> list[Case]:
    """Every node of training graphs with fused regions, split weights and results in place."""
    cases = []
    for kind, forward in (
        ("residual", networks.residual(networks.RESIDUAL_WEIGHTS)),
        ("split", networks.split(("wide.weight", "first.bias"))),
    ):
        graph = attach_sgd(differentiate(networks.with_loss(forward)), 0.1)
        graph = work_in_place(fuse_elementwise(fuse_updates(graph)))
        env = {v.name: v.data for v in (*graph.params, *graph.consts)}
        env |= {v.name: a for v, a in zip(graph.inputs, networks.sample(graph, 4), strict=True)}
        for i, node in enumerate(graph.nodes):
            distinct = {v.name: v for v in node.inputs}
            alone = Graph("main", tuple(distinct.values()), nodes=(node,), outputs=node.outputs)
            arguments = {name: env[name] for name in distinct}
            env[node.output.name] = evaluate(alone, list(arguments.values())).outputs[0]
            for call in schedule(Graph("main", graph.inputs, graph.params, graph.consts, (node,))):
                name, expected = f"{kind} {i} {node.op} {node.layer}", env[node.output.name]
                cases.append(Case(name, call, arguments, expected, node.overwrites.get(node.output.name)))
    return cases


def cut_weights() -> Iterator[Case]:
    """Convolutions whose weights are in two pieces along the channels that they make."""
    for n in (2, 3):
        shapes = (1, 4, 5, 3), (n, 3, 3, 3), (6 - n, 3, 3, 3)
        values = tuple(Value(f"x{i}", TensorType(shape)) for i, shape in enumerate(shapes))
        builder = Builder()
        w = builder.call("concatenate", *values[1:], axis=0)
        y = builder.call("nn.conv2d", values[0], w, padding=(1, 1, 1, 1))
        graph = Graph("main", values, nodes=(wrap(builder.nodes, (y,), {"strategy": "fused"}, ""),), outputs=(y,))
        arrays = [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for shape in shapes]
        (call,) = schedule(graph.renumbered())
        inputs = {v.name: a for v, a in zip(values, arrays, strict=True)}
        yield Case(f"cut at {n}", call, inputs, evaluate(graph, arrays).outputs[0])


CASES = [*single_operators(), *whole_graphs(), *cut_weights()]
NAMES: dict[Kernel, str] = {}
for case in CASES:
    NAMES.setdefault(case.call.kernel, f"t_k{len(NAMES)}")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """All kernels in one library per compiler, all warnings errors."""
    folder = tmp_path_factory.mktemp("kernels")
    for name, text in emit_kernels(NAMES, "t").items():
        (folder / name).write_text(text)
    return {name: build(folder, name, command) for name, command in COMPILERS.items() if command}


def build(folder: Path, name: str, command: list[str]) -> ctypes.CDLL:
    library = folder / f"{name}.so"
    flags = [f for f in FLAGS if not (f.startswith("-O") and any(c.startswith("-O") for c in command))]
    line = [*command, *flags, "-shared", "-fPIC", "-o", str(library), str(folder / "t_kernels.c")]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernel_agrees_with_reference(case: Case, libraries: dict[str, ctypes.CDLL]) -> None:
    if not libraries:
        pytest.skip("no C compiler: pip install 'tte[emulate]'")
    results = {name: case.run(library, NAMES[case.call.kernel]) for name, library in libraries.items()}
    first = next(iter(results.values()))
    if first.dtype == np.float32:
        scale = max(1e-30, float(np.abs(case.expected).max(initial=0)))
        np.testing.assert_allclose(first / scale, case.expected / scale, rtol=0, atol=2e-6)
    else:
        np.testing.assert_array_equal(first, case.expected)
    for name, result in results.items():
        assert result.tobytes() == first.tobytes(), f"{name} gives other bits than {next(iter(results))}"


def test_every_kernel_template_is_exercised() -> None:
    from tte.codegen.emit import HERE

    parts = {"tail", "number", "elementwise", "copy", "reduce", "window", "adaptive", "pointwise_loss", "resize"}
    parts |= {"rows", "stream", "tiles", "source"}  # tests/test_stream.py, test_tiles.py, test_row_source.py
    templates = {path.name.removesuffix(".c.j2") for path in (HERE / "kernels").glob("*.j2")}
    assert templates - parts == {kernel.template for kernel in NAMES}
