"""The search for forms and knobs: what is measured, what it is good for, and that nothing is lost or slower."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import qdq
import torch
from test_cli import succeed
from torch import Tensor, nn

import tte
from tte import cli, tuning
from tte.codegen import measured
from tte.codegen.fast import list_forms, quicken
from tte.codegen.kernel import Kernel
from tte.codegen.measured import SHIPPED, Database, Measured, Measurement, identify, merge, name_shape
from tte.errors import TTEError
from tte.ir import TensorType, Value
from tte.runner.bare import Counts, Job, Trial, run
from tte.runner.cycles import find_estimator
from tte.runner.toolchain import build_counter, find_toolchains
from tte.target import CORTEX_M4, CORTEX_M7

pytest.importorskip("unicorn", reason="pip install 'tte[emulate]'")
pytestmark = pytest.mark.skipif(not find_toolchains(), reason="no C compiler for Cortex-M")


class Small(nn.Module):
    """Shapes that nothing was made for; where memory is short, the first layers run row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = qdq.conv(3, 9), qdq.conv(9, 21, 1), qdq.conv(21, 7)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.narrow(self.wide(self.stem(x))).mean((2, 3)))
        return y


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qdq.quantize(qdq.Recipe(Small, (1, 3, 13, 13)), tmp_path_factory.mktemp("small"))


@pytest.fixture
def search(model: Path, tmp_path: Path) -> Callable[..., tuning.Tuned]:
    def run(name: str = "s.json", **options: Any) -> tuning.Tuned:
        given = {"update_scheme": "last-layer", "memory_plan": "fastest", "trials": 5} | options
        return tte.tune(model, schedules=tmp_path / name, **given)

    return run


@pytest.mark.parametrize("plan", ["fastest", 6000])
def test_what_was_measured_alone_is_gained_in_the_whole(
    plan: str | int, model: Path, search: Any, tmp_path: Path
) -> None:
    found = search(memory_plan=plan, trials=20)
    assert any("a row" in row.kernel for row in found.rows) == (plan == 6000)
    assert all(row.tuned <= row.default for row in found.rows)
    options = {"update_scheme": "last-layer", "memory_plan": plan}
    plain, tuned = (tte.compile(model, schedules=s, **options) for s in (None, found.schedules))
    note = tuned.compiled.notes[-1]
    assert re.search(r"s\.json: \d+ kernels? of this project chosen by it", note) and plain.compiled.notes == ()
    assert ": 0 kernels" not in note or plan == 6000
    other = tte.compile(model, schedules=found.schedules, target="cortex-m4", **options)
    assert "nothing in it was measured for cortex-m4, but for cortex-m7" in other.compiled.notes[-1]
    marks = [[a.report[call]["instructions"] for call in ("infer", "train_step")] for a in (plain, tuned)]
    gained = sum(row.default - row.tuned for row in found.rows)
    assert gained > 0 or plan == 6000  # where the room leaves no choice
    # evaluate runs the same kernels as a training step's forward; a few instructions lie between the calls.
    assert sum(marks[0]) - sum(marks[1]) == pytest.approx(gained * 2 / 3, rel=0.02)
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, 13, 13)).astype(np.float32), "y": np.array([1, 4])}
    assert plain.run(data).weights_sha256 == tuned.run(data).weights_sha256


def test_kernels_of_floats_are_tuned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(qdq.conv(3, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)).eval()
    model, given = (network, (torch.zeros(1, 3, 13, 13),)), {"memory_plan": "fastest"}
    found = tte.tune(*model, "full", schedules=tmp_path / "s.json", trials=4, **given)
    assert all(row.tuned <= row.default for row in found.rows)
    gained = {row.form for row in found.rows if row.tuned < row.default}
    assert "differentiate_weights" in gained  # of three channels: not by two and two
    plain, tuned = (tte.compile(*model, "full", schedules=s, **given) for s in (None, found.schedules))
    data = {"x": np.random.default_rng(0).standard_normal((2, 3, 13, 13)).astype(np.float32), "y": np.array([1, 4])}
    assert plain.run(data, runner="host").weights_sha256 == tuned.run(data, runner="unicorn").weights_sha256


def test_same_seed_same_file(search: Any, tmp_path: Path) -> None:
    files = [search(f"{i}.json", **more).schedules for i, more in enumerate([{}, {"jobs": 2}, {"seed": 1}])]
    one, other, different = (file.read_bytes() for file in files)
    assert one == other != different
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "2.json"]


def test_an_interrupted_search_goes_on(search: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = search("whole.json")
    count = 0

    def limited(job: Job, counter: Path) -> Counts:
        nonlocal count
        count += 1
        if count > 6:
            raise KeyboardInterrupt
        return run(job, counter)

    monkeypatch.setattr(tuning, "run", limited)
    with pytest.raises(KeyboardInterrupt):
        search("s.json")
    monkeypatch.undo()
    rest = search("s.json")
    assert (rest.measured, rest.known) == (whole.measured - 6, 6)
    assert rest.schedules.read_bytes() == whole.schedules.read_bytes()
    assert search("s.json").measured == 0


def test_heavy_kernels_have_more_trials(search: Any) -> None:
    found = search(trials=1)
    heaviest = max(found.rows, key=lambda row: row.default).kernel
    shapes = Database.read(found.schedules).of("cortex-m7")
    assert {shape: len(known) for shape, known in shapes.items()} == {
        row.kernel: 1 + (row.kernel == heaviest) for row in found.rows
    }


FUNCTIONS = {
    "two": r"strb r0, [r0]\n bx lr",
    "three": r"movs r1, #9\n strb r0, [r0]\n bx lr",
    "other": r"movs r1, #77\n strb r1, [r0]\n bx lr",
}


def make_trial() -> Trial:
    """Of two functions of hand-written instructions."""
    text = "".join(
        f"void {name}(void *y);\n__attribute__((naked)) void {name}(__attribute__((unused)) void *y) {{\n"
        f'    __asm__("{body}");\n}}\n'
        for name, body in FUNCTIONS.items()
    )
    return Trial(
        sources={"t.c": text},
        names=("three", "two"),
        places=((), ()),
        buffers=(np.zeros(1, np.uint8),),
        outputs=1,
        scratch=0,
        target=CORTEX_M4,
        toolchain=find_toolchains()[0],
    )


def test_a_trial_counts_exactly_and_compares_bits(tmp_path: Path) -> None:
    job, counter = make_trial().build(), build_counter(tmp_path)
    counts = run(job, counter)
    assert counts.instructions == 6
    assert [(size, n) for (_, size), n in counts.blocks.items()] == [(6, 2)]  # nothing of what it is compared with
    assert job.read(counts.blocks) == {block: bytes.fromhex("0921 0070 7047") for block in counts.blocks}
    assert run(replace(job, names=("two", "three")), counter).instructions == 4
    with pytest.raises(AssertionError, match="is not"):
        run(replace(job, names=("two", "other")), counter)


# --- what a kernel becomes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel(model: Path) -> Kernel:
    """A portable one that may become several."""
    programs = tte.compile(model, update_scheme="last-layer", memory_plan="fastest").compiled.programs
    portable = (s.uses[0][0] for s in tuning._find_subjects(programs))
    return max(portable, key=lambda k: len({(form, made.scratch) for made, (form, _) in list_forms(k, ROOM).items()}))


ROOM = 1 << 20


def measurements(kernel: Kernel, **counts: dict[str, int]) -> Measured:
    """Of the default form and of those that come next, by compiler."""
    forms = list(list_forms(kernel, ROOM).items())
    known = {
        identify(made): Measurement(*choice, made.scratch, count)
        for (made, choice), count in zip(forms, counts.values(), strict=False)
    }
    return {name_shape(kernel): known}


def test_the_fastest_is_chosen_that_no_compiler_makes_slower(kernel: Kernel) -> None:
    default, one, two = list(list_forms(kernel, ROOM))[:3]

    def choose(room: int = ROOM, **counts: dict[str, int]) -> Kernel:
        return quicken(kernel, room, measurements(kernel, **counts))

    assert choose() == default == quicken(kernel, ROOM)
    assert choose(default={"zig": 9}, one={"zig": 8}, two={"zig": 7}) == two
    assert choose(default={"zig": 9}, one={"zig": 9}, two={"zig": 10}) == default
    assert choose(default={"zig": 9, "gcc": 9}, one={"zig": 8, "gcc": 9}, two={"zig": 1, "gcc": 10}) == one
    assert choose(default={"zig": 9, "gcc": 9}, one={"zig": 8}, two={"gcc": 10}) == default
    assert choose(default={"gcc": 9}, one={"zig": 8}) == default  # nothing says that it is faster


def test_each_form_is_found_again(kernel: Kernel) -> None:
    (default, by), *others = list_forms(kernel, ROOM).items()
    assert {form for _, (form, _) in others} > {"convolve_raw", "convolve_directly"}
    for made, choice in others:
        known = {default: Measurement(*by, 0, {"zig": 9}), made: Measurement(*choice, made.scratch, {"zig": 8})}
        assert quicken(kernel, ROOM, {name_shape(kernel): {identify(k): m for k, m in known.items()}}) == made


def test_what_does_not_fit_or_is_gone_is_not_chosen(kernel: Kernel) -> None:
    default, *others = list_forms(kernel, ROOM)
    wide = next(k for k in others if k.scratch > default.scratch)
    form, knobs = list_forms(kernel, ROOM)[wide]
    base = {identify(default): Measurement("", {}, default.scratch, {"zig": 9})}

    def choose(room: int, **more: Any) -> Kernel:
        found = Measurement(form, knobs, wide.scratch, {"zig": 1})
        return quicken(kernel, room, {name_shape(kernel): base | {identify(wide): replace(found, **more)}})

    assert choose(ROOM) == wide
    assert choose(wide.scratch - 1) == default
    assert choose(ROOM, knobs={"block": 100}) == default  # not a value of today
    assert choose(ROOM, knobs={"nothing": 1}) == default
    assert choose(ROOM, form="nothing") == default
    another, changed = next(c for made, c in list_forms(kernel, ROOM).items() if made not in (default, wide))
    assert choose(ROOM, form=another, knobs=changed) == default  # that is not what was measured


def test_layers_of_the_same_shape_share_measurements(kernel: Kernel) -> None:
    context = re.sub(r'"zero_point": (-?[1-9]\d*)', lambda m: f'"zero_point": {int(m[1]) // 2 or 5}', kernel.context)
    other = replace(kernel, context=context)
    assert other != kernel
    assert name_shape(other) == name_shape(kernel)
    longer = replace(kernel, context=kernel.context.replace('"strides": [1, 1]', '"strides": [2, 2]', 1))
    assert longer != kernel
    assert name_shape(longer) != name_shape(kernel)


# --- files -----------------------------------------------------------------------------------------------------------


def test_merged_files_hold_everything() -> None:
    first, second = Database(), Database()
    first.add("cortex-m7", "a", "x", Measurement("f", {"block": 1}, 4, {"zig": 5, "gcc": 6}))
    first.add("cortex-m4", "a", "x", Measurement("f", {}, 0, {"zig": 1}))
    second.add("cortex-m7", "a", "x", Measurement("f", {"block": 1}, 4, {"gcc": 7}))
    second.add("cortex-m7", "b", "y", Measurement("f", {}, 0, {"gcc": 2}))
    merged = merge([first, second])
    assert merged.of("cortex-m7")["a"]["x"].instructions == {"zig": 5, "gcc": 7}
    assert {core: sorted(shapes) for core, shapes in merged.cores.items()} == {
        "cortex-m7": ["a", "b"],
        "cortex-m4": ["a"],
    }
    assert first.of("cortex-m7")["a"]["x"].instructions == {"zig": 5, "gcc": 6}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    database, path = Database(), tmp_path / "s.json"
    for name in ("y", "x"):
        database.add("cortex-m7", "a", name, Measurement("f", {"unroll": 2, "block": 1}, 4, {"zig": 5}))
    database.write(path)
    assert Database.read(path) == database
    before = path.read_bytes()
    merge([Database.read(path)]).write(path)
    assert path.read_bytes() == before


def test_the_shipped_file_is_sorted_and_whole(tmp_path: Path) -> None:
    Database.read(SHIPPED).write(tmp_path / "s.json")
    assert (tmp_path / "s.json").read_bytes() == SHIPPED.read_bytes()


RECORD = {"form": "f", "knobs": {}, "scratch": 0, "instructions": {"zig": 1}}
WRONG = (("form", 1), ("scratch", -1), ("scratch", "4"), ("instructions", {}), ("knobs", 3), ("knobs", {"b": 1.5}))
DAMAGED = {
    "cut short": '{"schema_version": 1',
    "of another kind": "[]",
    "of another version": '{"schema_version": 2, "cores": {}}',
    "without cores": '{"schema_version": 1}',
    **{
        f"with {key} {value}": json.dumps({"schema_version": 1, "cores": {"m": {"a": {"x": RECORD | {key: value}}}}})
        for key, value in WRONG
    },
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_left_alone(text: str, tmp_path: Path, search: Any, model: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    for use in (lambda: search("s.json"), lambda: tte.compile(model, schedules=path)):
        with pytest.raises(TTEError, match="no database of schedules") as error:
            use()
        assert (error.value.code, error.value.where) == ("TTE-E090", str(path))
        assert "Error" not in error.value.what  # no name of Python's
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("TTE-E048", {"target": "cortex-m99"}),
        ("TTE-E058", {"target": "host"}),
        ("TTE-E059", {"metric": "seconds"}),
        ("TTE-E059", {"runner": "rpc://nowhere"}),
        ("TTE-E051", {"runner": "rpc://127.0.0.1:1"}),
        ("TTE-E051", {"runner": "rpc://no..name:9190/key"}),
        ("TTE-E059", {"trials": -1}),
        ("TTE-E059", {"seed": -1}),
        ("TTE-E059", {"jobs": 0}),
        ("TTE-E045", {"name": "no/such/folder/s.json"}),
    ],
)
def test_wrong_options(code: str, options: dict[str, Any], search: Any) -> None:
    with pytest.raises(TTEError) as error:
        search(**options)
    assert error.value.code == code


def test_another_core_has_its_own_measurements(search: Any) -> None:
    found = search(trials=0)
    assert search(trials=0, target="stm32f746").measured == 0  # the same core
    assert search(trials=0, target=CORTEX_M4.name).measured == found.measured
    assert set(Database.read(found.schedules).cores) == {CORTEX_M4.cpu, CORTEX_M7.cpu}


# --- on the command line ---------------------------------------------------------------------------------------------


def test_a_table_with_layers(model: Path, tmp_path: Path) -> None:
    given = ("-u", "last-layer", "--memory-plan", "fastest", "--trials", 0, "--schedules", tmp_path / "s.json")
    table = succeed("tune", model, *given)
    assert "stem" in table and "instructions, default" in table
    assert json.loads(succeed("tune", model, *given, "--json"))["rows"][0]["layers"]


def test_where_nothing_may_become_another_it_is_said(tmp_path: Path) -> None:
    net, x = networks.Network(), Value("x", TensorType((1, 6)))
    graph = net.graph(x, net.dense("head", x, 5))
    (tmp_path / "net.ir").write_text(str(graph))
    np.savez(tmp_path / "net.npz", **{c.name: c.data for c in graph.consts})
    printed = succeed("tune", tmp_path / "net.ir", "--schedules", tmp_path / "s.json")
    assert printed.startswith("no kernel of this model may become another, as it is compiled for cortex-m7")
    assert f"{tmp_path / 's.json'} holds what it held" in printed
    assert tte.compile(tmp_path / "net.ir", target="host", schedules=tmp_path / "s.json").compiled.programs


# --- cycles ----------------------------------------------------------------------------------------------------------


def test_cycles_are_kept_beside_instructions(search: Any) -> None:
    try:
        estimator = find_estimator(CORTEX_M7)
    except TTEError as problem:
        pytest.skip(str(problem))
    counted, found = search(trials=1), search(trials=2, metric="cycles")
    assert (counted.metric, found.metric) == ("instructions", "estimated cycles")
    assert found.compiler == f"{counted.compiler}, {estimator.version}"
    assert all(row.tuned <= row.default for row in found.rows)
    assert search(trials=2, metric="cycles").measured == 0 == search(trials=1).measured
    kept = [m for shape in Database.read(found.schedules).of("cortex-m7").values() for m in shape.values()]
    assert all(set(m.instructions) == {counted.compiler} and set(m.cycles) <= {found.compiler} for m in kept)
    for measurement in kept:
        for cycles in measurement.cycles.values():
            assert 0.5 < cycles / measurement.instructions[counted.compiler] < 3


def test_what_is_known_in_cycles_is_compared_in_cycles(kernel: Kernel) -> None:
    forms = list(list_forms(kernel, ROOM).items())[:3]

    def choose(*counts: tuple[int, int | None]) -> Kernel:
        known = {
            identify(made): Measurement(*choice, made.scratch, {"zig": n}, {"zig, mca": c} if c else {})
            for (made, choice), (n, c) in zip(forms, counts, strict=True)
        }
        return quicken(kernel, ROOM, {name_shape(kernel): known})

    default, one, two = (made for made, _ in forms)
    assert choose((9, 9), (10, 8), (8, 10)) == one
    assert choose((9, 9), (7, None), (8, 9)) == default
    assert choose((9, None), (8, 10), (7, 20)) == two


def test_a_template_stands_for_those_that_it_is_made_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    texts = {"a": '{% from "b" import m %}', "b": '{% import "c" as c with context %}', "c": "1", "d": "2"}
    for name, text in texts.items():
        (tmp_path / "kernels" / name).write_text(text)
    monkeypatch.setattr(measured, "HERE", tmp_path)
    digest = measured._source.__wrapped__

    def look() -> list[str]:
        measured._source.cache_clear()
        return [digest(name) for name in texts]

    before = look()
    (tmp_path / "kernels" / "c").write_text("3")
    assert [old == new for old, new in zip(before, look(), strict=True)] == [False, False, False, True]
    measured._source.cache_clear()


@pytest.mark.parametrize(
    ("measured", "said"), [(3, "kept.json keeps what was measured"), (0, "stopped: before anything was measured")]
)
def test_an_interruption_says_what_is_kept(
    measured: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, progress: Callable[[int, int], None], input: str, **__: object) -> None:
        assert input == "rows"
        for done in range(measured):
            progress(done + 1, 9)
        raise KeyboardInterrupt

    monkeypatch.setattr(tte, "tune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cli.tune("model.onnx", schedules=Path("kept.json"), input_="rows")
    assert said in capsys.readouterr().err
