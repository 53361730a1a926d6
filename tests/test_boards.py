"""Every core and every board, with every compiler, on every emulator that knows it: the bits of the host."""

import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from data import load_module
from test_runner import break_step, start, train, write_model

import tte
from tte.artifact import Artifact
from tte.cli import main
from tte.codegen.emit import RUNTIME, emit
from tte.codegen.schedule import schedule
from tte.errors import TTEError
from tte.ir import TensorType, Value
from tte.ir.rows import expand
from tte.ops.rules import computes_floats
from tte.runner import Build, open_host
from tte.runner.toolchain import FLAGS, board_command, build_firmware, find_toolchains, host_compiler
from tte.runner.train import open_board
from tte.target import CORTEX_M0PLUS, TARGETS, Target, find_target

if not find_toolchains() or not importlib.util.find_spec("unicorn"):
    pytest.skip("no compiler or emulator: pip install 'tte[emulate]'", allow_module_level=True)


DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "demo.py"
DEVICES = [t for t in TARGETS.values() if t.machine]
PLACES = [(t.name, f"{emulator}-{tool}") for t in DEVICES for emulator in t.emulators for tool in ("zig", "gcc")]
SCHEME = {
    "train": [
        {"layer": "block.conv2", "weight": {"in_channels": 0.5}, "bias": True},
        {"layer": "fc", "weight": "all", "bias": True},
    ],
}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of the example, not trained, as `tte quantize` makes integers of it; with an int8 head beside it."""
    folder = tmp_path_factory.mktemp("digits")
    demo = load_module(DIGITS)
    torch.manual_seed(0)
    calibration = {"x": demo.load(0)[0]["x"][:32]}
    for name in ("digits", "int8"):
        tte.quantize(demo.Digits(8).eval(), calibration, folder / f"{name}.onnx", int8_head=name == "int8")
    return folder


@pytest.fixture(scope="module")
def compiled(digits: Path) -> Callable[[str], tuple[Artifact, dict[str, object]]]:
    """The project of a core and what it computes on this computer. Its boards differ in memory alone."""

    @cache
    def compile_for(cpu: str) -> tuple[Artifact, dict[str, object]]:
        artifact = tte.compile(digits / "digits.onnx", update_scheme=SCHEME, target=cpu)
        return artifact, train(open_host(artifact.build), steps=2)

    return compile_for


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_the_same_bits_on_every_board(compiled, name: str, place: str) -> None:  # type: ignore[no-untyped-def]
    artifact, expected = compiled(find_target(name).cpu)
    board = start(replace(artifact.build, target_name=name), place)
    try:
        assert train(board, steps=2) == expected
        assert board.selftest() == 0
    finally:
        board.close()
    assert len(set(expected["loss"])) == 2


def test_digits_learn_on_a_core_without_fpu(digits: Path, tmp_path: Path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """From the command line; every digit that was never seen is told from the others."""
    demo = load_module(DIGITS)
    data, held_back = demo.load(5)
    np.savez(tmp_path / "train.npz", x=data["x"][:60], y=data["y"][:60])
    np.savez(tmp_path / "eval.npz", x=held_back["x"][:30], y=held_back["y"][:30])
    (tmp_path / "scheme.yaml").write_text("{train: last-layer, optimizer: {name: sgd, lr: 0.1}}")
    run_command = f"tte run {tmp_path}/out --data {tmp_path}/train.npz --eval {tmp_path}/eval.npz --json"
    commands = [f"tte compile {digits}/digits.onnx -u {tmp_path}/scheme.yaml -t rp2040 -o {tmp_path}/out"]
    texts = []
    for command in [*commands, run_command, f"{run_command} --host"]:
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        texts.append(capsys.readouterr().out)
    assert "note: rp2040 has no FPU and computes floats in software" in texts[0]
    there, here = map(json.loads, texts[1:])
    assert (there["runner"], here["runner"]) == ("unicorn", "host")
    assert there["weights_sha256"] == here["weights_sha256"] and there["loss"] == here["loss"]
    assert there["metric"]["after"] > there["metric"]["before"] + 0.2


INTEGERS = {
    "train": "full",
    "optimizer": {"lr": 0.02},
    "io": {"input": {"dtype": "uint8", "mean": [8.0], "std": [8.0]}},
    "quantized": {"gradients": "int8"},
}


def test_digits_learn_without_floats(tmp_path: Path) -> None:
    """Every layer learns, and nothing in the whole firmware asks a library for floats."""
    demo = load_module(DIGITS)
    tte.quantize(demo.pretrain(epochs=1), {"x": demo.load(0)[0]["x"][:32]}, tmp_path / "int8.onnx", int8_head=True)
    artifact = tte.compile(tmp_path / "int8.onnx", update_scheme=INTEGERS, target="rp2040")
    assert artifact.compiled.notes == ()  # which would name layers that compute floats
    for toolchain in find_toolchains():
        assert not [name for name in list_symbols(artifact, toolchain) if FLOAT.match(name)]
    data, held_back = demo.load(5)
    data, held_back = (
        {"x": np.rint(d["x"][:n] * 8 + 8).astype(np.uint8), "y": d["y"][:n]} for d, n in ((data, 60), (held_back, 30))
    )
    there, here = (artifact.run(data, evaluation=held_back, runner=runner) for runner in ("unicorn", "host"))
    assert (there.weights_sha256, there.loss) == (here.weights_sha256, here.loss)
    assert there.metric["after"] > there.metric["before"] + 0.3


def list_symbols(artifact: Artifact, toolchain: str) -> list[str]:
    from elftools.elf.elffile import ELFFile

    with build_firmware(artifact.build, artifact.target, toolchain).elf.open("rb") as file:
        names = [symbol.name for symbol in ELFFile(file).get_section_by_name(".symtab").iter_symbols()]
    assert "__aeabi_lmul" in names  # this is where such functions are
    return names


def awkward(count: int, seed: int) -> np.ndarray:
    """Floats of every exponent: subnormal numbers, powers of two, bits at random, and no NaN."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, count, np.uint32)
    bits[::4] &= 0x807FFFFF
    bits[1::4] &= 0xFF800000
    bits[3::4] = bits[3::4] & 0x83FFFFFF | 0x3C000000
    x = bits.view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(1.5))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[np.ndarray], list[np.ndarray]]:
    """A network of float operators, inputs for it, and its results on this computer."""
    folder = tmp_path_factory.mktemp("floats")
    net = networks.Network()
    x = Value("x", TensorType((1, 256)))
    a, b = (net.builder.const(awkward(256, seed).reshape(1, 256), name) for seed, name in ((1, "a"), (2, "b")))
    made = [net.call(op, net.call(first, x, a), b) for op in ("add", "subtract") for first in ("multiply", "divide")]
    made += [net.call(op, x) for op in ("sigmoid", "tanh", "nn.gelu", "nn.relu")]
    made += [net.dense("sums", net.call("multiply", x, a), 8)]
    write_model(net.graph(x, net.call("concatenate", *made, axis=1)), folder)
    artifact = tte.compile(folder / "net.ir", update_scheme={"train": "full", "loss": "mse"}, target="cortex-m0plus")
    given = [awkward(256, seed) for seed in range(10, 30)]
    board = artifact.host()
    return artifact, given, [board.infer(x) for x in given]


@pytest.mark.parametrize("toolchain", ["zig", "gcc"])
@pytest.mark.parametrize("cpu", ["cortex-m0plus", "cortex-m55"])
def test_floats_of_every_size(floats, cpu: str, toolchain: str) -> None:  # type: ignore[no-untyped-def]
    """A library rounds as an FPU does; a vector unit that flushes subnormal numbers to zero is not used."""
    artifact, given, expected = floats
    board = start(replace(artifact.build, target_name=cpu), f"qemu-{toolchain}")
    try:
        assert board.init() == 0
        found = [board.infer(x) for x in given]
    finally:
        board.close()
    one, other = np.concatenate(expected, axis=None), np.concatenate(found, axis=None)
    np.testing.assert_array_equal(one, other)  # a NaN may be any
    np.testing.assert_array_equal(*(v[~np.isnan(one)].view(np.uint32) for v in (one, other)))
    assert np.count_nonzero((one != 0) & (np.abs(one) < np.finfo(np.float32).tiny)) > 1000


MULTIPLY_ADD = """
#define TTE_SOFT_FMA 1
#include "tte_fma.c"
void each(const float *a, const float *b, const float *c, float *soft, float *hard, int n) {
    for (int i = 0; i < n; i++) {
        soft[i] = TTE_FMAF(a[i], b[i], c[i]);
        hard[i] = __builtin_fmaf(a[i], b[i], c[i]);
    }
}
"""


def test_multiply_add_in_integers_rounds_once(tmp_path: Path) -> None:
    """Against the computer's own: exponents near and far, products that nearly cancel, subnormal results."""
    (tmp_path / "f.c").write_text(MULTIPLY_ADD)
    (tmp_path / "tte_build.h").write_text("")  # the project's, which looks at flags
    flags = ["-O2", "-march=native", "-shared", "-fPIC", "-I.", f"-I{RUNTIME}", "-Wall", "-Werror", "-Wconversion"]
    command = [*(host_compiler() or []), *flags, "f.c", "-o", "f.so", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    n = 1 << 20
    a, b, c = (awkward(n, seed) for seed in (1, 2, 3))
    with np.errstate(all="ignore"):
        near = -(a * b)
    c[1::8] = np.where(np.isfinite(near), near, 0)[1::8]
    c[2::8] = np.nextafter(c[1::8], np.float32(1))
    a[2::8], b[2::8] = a[1::8], b[1::8]
    a[5], b[6], c[7], c[9] = np.inf, -np.inf, np.inf, np.nan
    made = np.empty((2, n), np.float32)
    pointers = [ctypes.c_void_p(v.ctypes.data) for v in (a, b, c, made[0], made[1])]
    ctypes.CDLL(str(tmp_path / "f.so")).each(*pointers, n)
    number = ~np.isnan(made[1])
    np.testing.assert_array_equal(np.isnan(made[0]), ~number)
    np.testing.assert_array_equal(*made.view(np.uint32)[:, number])


REFUSED = {
    "a core whose FPU is left out": ("-mcpu=cortex-m7", "select the core's FPU"),
    "vectors of floats": ("-mcpu=cortex-m55 -mfloat-abi=hard", "flushes subnormal floats"),
}


@pytest.mark.skipif(not shutil.which("arm-none-eabi-gcc"), reason="arm-none-eabi-gcc is not installed")
@pytest.mark.parametrize("what", REFUSED)
def test_flags_with_other_bits_are_refused(floats, what: str) -> None:  # type: ignore[no-untyped-def]
    flags, message = REFUSED[what]
    source = next(s for s in floats[0].build.list_sources() if s.name.endswith("_kernels.c"))
    command = ["arm-none-eabi-gcc", "-mthumb", *flags.split(), "-fsyntax-only", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode and message in result.stderr


@pytest.mark.parametrize(
    ("target", "cpu"), [("stm32f446", "cortex-m4"), ("cortex-m0plus", "cortex-m7"), ("host", "cortex-m7")]
)
def test_the_flags_of_the_projects_core_are_named(floats, target: str, cpu: str) -> None:  # type: ignore[no-untyped-def]
    compiled = floats[0].compiled
    files = emit(compiled.programs, replace(compiled.interface, target_name=target))
    text = next(text for path, text in files.items() if path.endswith("_build.h"))
    assert re.search(rf"select the core's FPU \(for [\w-]+: -mcpu={cpu} -mthumb -mfpu", text)


@pytest.mark.parametrize("place", ["unicorn-zig", "qemu-zig"])
def test_a_core_that_faults_on_what_is_not_aligned(floats, place: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write = "volatile size_t odd = 1; *(volatile uint32_t *)(void *)(arena + odd) = 1;"
    board = start(break_step(floats[0].build, tmp_path / "broken", write), place)
    try:
        assert board.init() == 0
        with pytest.raises(TTEError, match="not aligned" if place == "unicorn-zig" else "fault"):
            board.train_step(floats[1][0], floats[2][0])
    finally:
        board.close()


def test_an_emulator_that_does_not_know_the_core(floats) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TTEError) as caught:
        open_board(replace(floats[0].build, target_name="corstone-300"), "unicorn")
    assert caught.value.code == "TTE-E058" and caught.value.fix == "qemu"


FLOAT = re.compile("__aeabi_(f|i2f|ui2f|l2f|ul2f|d)|__(add|sub|mul|div|lt|le|gt|ge|eq|ne|unord)sf|__fix|__float|fmaf")


def compile_objects(build: Build, toolchain: str) -> list[Path]:
    """An object of each source, for the core without FPU."""
    objects = []
    for source in build.list_sources(selftest=False):
        objects.append(source.with_suffix(".o"))
        command = [*board_command(CORTEX_M0PLUS, toolchain), *FLAGS, "-fno-unwind-tables"]
        subprocess.run([*command, f"-I{build.include}", "-c", str(source), "-o", str(objects[-1])], check=True)
    return objects


def find_calls(objects: list[Path]) -> dict[str, set[str]]:
    """What each function of the objects refers to, and what that refers to in turn."""
    from elftools.elf.elffile import ELFFile

    found: dict[str, set[str]] = {}
    for path in objects:
        with path.open("rb") as file:
            elf = ELFFile(file)
            symbols = elf.get_section_by_name(".symtab")
            for section in elf.iter_sections("SHT_REL"):
                targets = (symbols.get_symbol(r["r_info_sym"]) for r in section.iter_relocations())
                names = {s.name or elf.get_section(s["st_shndx"]).name for s in targets if s["st_shndx"] != "SHN_ABS"}
                found[section.name.removeprefix(".rel.text.")] = {n.removeprefix(".text.") for n in names}
    while True:
        wider = {f: calls.union(*(found.get(c, set()) for c in calls)) for f, calls in found.items()}
        if wider == found:
            return found
        found = wider


@pytest.mark.parametrize(
    ("requantize", "toolchain"), [("fixed", "zig"), ("fixed", "gcc"), ("tflite", "zig"), ("float", "zig")]
)
def test_an_int8_forward_is_of_integers(digits: Path, requantize: str, toolchain: str) -> None:
    """All but its input, which is float32. What objects ask a library for is what is said to compute floats."""
    if toolchain not in find_toolchains():
        pytest.skip(f"{toolchain} is not installed")
    scheme = {"train": "last-layer", "quantized": {"requantize": requantize}}
    artifact = tte.compile(digits / "int8.onnx", update_scheme=scheme, target="cortex-m0plus", name="net")
    infer = next(p for p in artifact.compiled.programs if p.role == "infer")
    calls = find_calls(compile_objects(artifact.build, toolchain))
    source = (artifact.build.folder / "Core/Src/net.c").read_text()
    text = "".join(source.partition(f"static int run_{f}(")[2].partition("\n}")[0] for f in ("forward", "infer"))
    asked = [{name for name in calls.get(k, ()) if FLOAT.match(name)} for k in re.findall(r"    (net_k\w+)\(", text)]
    nodes = [infer.graph.nodes[call.node] for call in schedule(infer.graph, infer.room)]
    assert [bool(names) for names in asked] == [any(map(computes_floats, expand(node))) for node in nodes]
    if requantize == "float":
        assert all(asked)
    else:
        assert len(asked) >= 4 and not any(asked[1:])  # the scores become float32 by their bits


@pytest.mark.parametrize("toolchain", find_toolchains())
@pytest.mark.parametrize("target", DEVICES, ids=lambda target: target.name)
def test_the_compiler_knows_what_the_core_has(target: Target, toolchain: str) -> None:
    """Faster kernels are chosen by the compiler's own macro."""
    line = [*board_command(target, toolchain), "-dM", "-E", "-x", "c", "/dev/null"]
    macros = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert ("#define __ARM_FEATURE_DSP 1" in macros) == target.dsp
