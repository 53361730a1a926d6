import subprocess
import sys
from pathlib import Path

import pytest

from tte.errors import TTEError
from tte.target import KB, MB, TARGETS, find_target, targets

ARM = [t for t in targets() if t.name != "host"]


def test_boards_have_their_real_memory() -> None:
    sizes = {t.name: (t.ram.origin, t.ram.size, t.flash.origin, t.flash.size) for t in ARM if t.board}
    assert sizes == {
        "stm32f746": (0x20000000, 320 * KB, 0x08000000, 1 * MB),
        "stm32f767": (0x20000000, 512 * KB, 0x08000000, 2 * MB),
        "stm32h743": (0x24000000, 512 * KB, 0x08000000, 2 * MB),
        "stm32h7a3": (0x24000000, 1 * MB, 0x08000000, 2 * MB),
        "stm32f446": (0x20000000, 128 * KB, 0x08000000, 512 * KB),
        "stm32l4r5": (0x20000000, 640 * KB, 0x08000000, 2 * MB),
        "stm32u575": (0x20000000, 768 * KB, 0x08000000, 2 * MB),
        "nrf5340": (0x20000000, 512 * KB, 0x00000000, 1 * MB),
        "rp2040": (0x20000000, 264 * KB, 0x10000000, 2 * MB),
        "corstone-300": (0x31000000, 4 * MB, 0x11000000, 2 * MB),
    }


@pytest.mark.parametrize("target", ARM, ids=lambda t: t.name)
def test_regions_do_not_overlap(target) -> None:  # type: ignore[no-untyped-def]
    regions = sorted(target.memory, key=lambda r: r.origin)
    for low, high in zip(regions, regions[1:], strict=False):
        assert low.origin + low.size <= high.origin


def test_nearest_name() -> None:
    assert find_target("STM32F746") is TARGETS["stm32f746"]
    with pytest.raises(TTEError) as caught:
        find_target("cortex-m77")
    assert (caught.value.code, caught.value.where) == ("TTE-E048", "--target")
    assert "did you mean cortex-m7?" in caught.value.fix


def test_what_a_board_shares_with_its_core() -> None:
    for board in (t for t in ARM if t.board):
        core = TARGETS[board.cpu]
        for field in ("dsp", "fpu", "unaligned", "machine", "vectors", "unicorn_cpu", "zig_target"):
            assert getattr(board, field) == getattr(core, field), (board.name, field)
        assert board.clock_hz


SOURCE = "float f(float a, float b) { return __builtin_fmaf(a, b, a); }\n"


@pytest.mark.parametrize("zig_cpu", sorted({t.zig_cpu for t in ARM if t.fpu}))
def test_zig_knows_the_core_and_its_fpu(zig_cpu: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("ziglang")
    (tmp_path / "f.c").write_text(SOURCE)
    target = next(t for t in ARM if t.zig_cpu == zig_cpu)
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target.zig_target, f"-mcpu={zig_cpu}"]
    command += ["-O2", "-fno-math-errno", "-S", "f.c", "-o", "f.s"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    # Without the FPU this is a call of fmaf.
    assert "vfma.f32" in (tmp_path / "f.s").read_text()


def test_unicorn_knows_the_core() -> None:
    constants = pytest.importorskip("unicorn.arm_const")
    known = [target for target in ARM if target.unicorn_cpu]
    assert all(isinstance(getattr(constants, target.unicorn_cpu), int) for target in known)
    assert {target.cpu for target in ARM} - {target.cpu for target in known} == {"cortex-m55"}


def test_the_table_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "targets.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    expected = []
    for t in ARM:
        sizes = [f"{r.size // KB:,} KB at {r.origin:#010x}" if t.board else "" for r in (t.ram, t.flash)]
        core = t.cpu.replace("cortex-m", "M").replace("plus", "+")
        clock = f"{t.clock_hz // 1_000_000} MHz" if t.clock_hz else ""
        expected.append([f"`{t.name}`", core, *sizes, clock, ", ".join(t.emulators)])
    assert rows == expected
