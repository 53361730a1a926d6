"""Generated C is free of warnings under every compiler at hand, in a project's flags as well as in ours."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import networks
import pytest

import tte
from tte.target import CORTEX_M0PLUS, CORTEX_M7, CORTEX_M55

STRICT = "-Wall -Wextra -Werror -Wconversion -Wpedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes".split()
COMPILERS = {
    "gcc": ["gcc"],
    "clang": ["clang"],
    "zig": [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else ["zig-is-not-installed"],
    **{
        f"arm-gcc-{core.name}": ["arm-none-eabi-gcc", *core.gcc_flags]
        for core in (CORTEX_M7, CORTEX_M55, CORTEX_M0PLUS)
    },
}
# The second line is what an STM32CubeIDE project compiles with in its Debug configuration.
FLAGS = {
    "ours": ["-std=c99", "-O2", *STRICT],
    "cube": ["-std=gnu11", "-O0", "-g3", "-ffunction-sections", "-fdata-sections", "-Wall", "-Werror"],
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same network, trained whole with labels, and its biases only towards a tensor in an arena of the caller,
    and its head on inputs that come row by row."""
    folder = tmp_path_factory.mktemp("projects")
    graph = networks.residual()
    (folder / "net.ir").write_text(str(graph))
    schemes = {
        "whole": ({"train": "full"}, "static", "caller"),
        "bias": ({"train": "bias-only", "loss": "mse", "io": {"input": {"dtype": "uint8"}}}, "extern", "arena"),
        "rows": ({"train": "last-layer", "io": {"input": {"layout": "nhwc"}}}, "static", "rows"),
    }
    for name, (scheme, arena, place) in schemes.items():
        artifact = tte.compile(folder / "net.ir", None, scheme, "host", name, arena=arena, input=place)
        artifact.export(folder / name)
    return [folder / name for name in schemes]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_warnings(projects: list[Path], compiler: str, flags: str, tmp_path: Path) -> None:
    command = COMPILERS[compiler]
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    for project in projects:
        for source in sorted(project.glob("Core/Src/*.c")):
            include = f"-I{project / 'Core' / 'Inc'}"
            arguments = [*command, *FLAGS[flags], include, "-c", source, "-o", tmp_path / "out.o"]
            result = subprocess.run(arguments, capture_output=True, text=True, check=False)
            assert (result.returncode, result.stderr) == (0, ""), source.name


@pytest.mark.parametrize("compiler", ["g++", "clang++", "zig"])
def test_the_header_is_cpp_too(projects: list[Path], compiler: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ziglang", "c++"] if compiler == "zig" else [compiler]
    if not (find_spec("ziglang") if compiler == "zig" else shutil.which(compiler)):
        pytest.skip(f"{compiler} is not installed")
    for project in projects:
        source = tmp_path / "main.cpp"
        source.write_text(f'#include "{project.name}.h"\nstatic_assert(sizeof({project.name}_result_t) == 12, "");\n')
        flags = ["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{project / 'Core' / 'Inc'}"]
        result = subprocess.run(
            [*command, *flags, "-c", source, "-o", tmp_path / "out.o"], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("flag", ["-ffast-math", "-ffinite-math-only", "-fassociative-math"])
def test_flags_that_change_the_results_are_refused(projects: list[Path], flag: str, tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    flags = [flag, "-fno-signed-zeros", "-fno-trapping-math", f"-I{projects[0] / 'Core' / 'Inc'}"]
    for source in projects[0].glob("Core/Src/*.c"):
        command = ["gcc", *flags, "-c", source, "-o", tmp_path / "out.o"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode and "fast-math and what it consists of" in result.stderr, source.name


MAIN = """
#include "whole.h"
int main(void) { return whole_init() ? 1 : whole_selftest(); }
"""


def test_cmake_builds_the_library(projects: list[Path], tmp_path: Path) -> None:
    if not shutil.which("cmake") or not shutil.which("cc"):
        pytest.skip("cmake or cc is not installed")
    (tmp_path / "main.c").write_text(MAIN)
    lists = ["cmake_minimum_required(VERSION 3.13)", "project(firmware C)", f'add_subdirectory("{projects[0]}" model)']
    lists += ["add_executable(firmware main.c)", "target_link_libraries(firmware PRIVATE whole)"]
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lists))
    for command in (["cmake", "-S", ".", "-B", "out"], ["cmake", "--build", "out"], ["out/firmware"]):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
