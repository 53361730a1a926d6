"""Instructions, flash, RAM on an emulated Cortex-M7 or M55, beside published engines and our goals: a table, a picture.

For docs/measurements.md: python benchmarks/kernels.py --picture docs/images/kernels.png; --only for some of the tables.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import layers
import mlperf
from data import import_published, load_scheme
from rich.progress import track

import tte
from tte.runner.profile import Profile, profile
from tte.runner.toolchain import find_toolchains

CLASSES = 10
TOOLCHAINS = [name for name in ("gcc", "zig") if name in find_toolchains()]

# mit-han-lab/tinyengine 47bb283, -Ofast, gcc 12.2: instructions of a forward pass and of a training step, flash, RAM
# (.data + .bss), of firmware for an emulated Cortex-M7. For mbv2 its code generator fails.
TINYENGINE = {
    "mcunet-5fps-49kb": (65_030_000, 106_370_000, 665_060, 230_592),
    "mcunet-5fps-99kb": (65_000_000, 115_730_000, 688_508, 271_800),
}
# ARM-software/CMSIS-NN 99f736a on the same emulated core: instructions per multiply-accumulate of an inference.
CMSIS_NN = {"resnet8": 2.39, "mobilenet": 3.27, "dscnn": 2.90, "autoencoder": 2.19}

# Our goals. Forward pass and training step of the fastest plan; small ones may take a tenth more.
GOALS = {
    "mcunet-5fps-49kb": (24_000_000, 42_000_000),
    "mcunet-5fps-49kb, int8 gradients": (24_000_000, 35_000_000),
    "mcunet-5fps-99kb": (None, 48_000_000),
}
SMALL = 1.10
FLASH = {"mcunet-5fps-49kb": 640 * 1024}
INFERENCE = {"resnet8": 0.5, "mobilenet": 0.5, "dscnn": 0.5, "autoencoder": 0.6}  # of CMSIS-NN
FLOAT_STEP = 2.2
PLANS = {"smallest": None, "auto": None, 40 * 1024: None, 48 * 1024: 1.08, 64 * 1024: None}
LEAST_FLASH = 560 * 1024  # bytes of flash, for size
FLAGS = {"-O0": 1.5, "-Os": 1.1, "-O3": None}  # times the instructions of -O2

NOTE = (
    "The fastest kernels that we know for mcunet-5fps-49kb, each called alone and summed, take 20.27 M instructions "
    "for a forward pass and 34.41 M for a step with float gradients."
)


@dataclass(frozen=True)
class Figure:
    """A number of a network, by toolchain; anchor: the same of another engine; goal: what it may be at the most."""

    network: str
    name: str
    values: dict[str, float]
    anchor: float | None = None
    engine: str = ""
    goal: float | None = None

    @property
    def first(self) -> float:
        """That of gcc where it is installed: the anchors are gcc's."""
        return next(iter(self.values.values()))


@dataclass(frozen=True)
class Measured:
    """An exported project, counted with each toolchain as often as it is asked for."""

    artifact: tte.Artifact
    folder: Path
    known: dict[tuple[str, str | None], Profile] = field(default_factory=dict)

    def profile(self, toolchain: str, optimize: str | None = None) -> Profile:
        key = toolchain, optimize
        if key not in self.known:
            self.known[key] = profile(self.folder, toolchain, optimize)
        return self.known[key]

    def each(self, get: Callable[[Profile], float]) -> dict[str, float]:
        return {toolchain: get(self.profile(toolchain)) for toolchain in TOOLCHAINS}

    def instructions(self, program: str) -> dict[str, float]:
        return self.each(lambda p: p.programs[program].instructions)

    def per_mac(self, program: str) -> dict[str, float]:
        return self.each(lambda p: round(p.programs[program].per_mac or 0, 3))


def _export(artifact: tte.Artifact, folder: Path) -> Measured:
    artifact.export(folder)
    return Measured(artifact, folder)


@cache
def published(scheme: str, plan: str | int, folder: Path, code: str = "speed", target: str = "cortex-m7") -> Measured:
    """One of MIT's int8 models; but for the fastest plan the picture comes row by row."""
    name, _, more = scheme.partition(", ")
    rules = load_scheme(name)
    if more:
        assert more == "int8 gradients"
        rules["quantized"] = rules.get("quantized", {}) | {"gradients": "int8"}
    model = import_published(name.rpartition("-")[0], CLASSES)
    place = "caller" if plan == "fastest" else "rows"
    artifact = tte.compile(model, update_scheme=rules, target=target, memory_plan=plan, input=place, optimize=code)
    return _export(artifact, folder / f"{scheme}-{plan}-{code}-{target}".replace(", ", "-").replace(" ", "-"))


def list_training(folder: Path) -> Iterator[Figure]:
    """Training MIT's models, beside TinyEngine. mbv2 is to take no more per multiply-accumulate than mcunet."""
    mcunet = "mcunet-5fps-49kb"
    for scheme in (*GOALS, "mbv2-w0.35-49kb"):
        for plan, more in (("fastest", 1.0), ("auto", SMALL), ("smallest", SMALL)):
            measured, network = published(scheme, plan, folder), f"{scheme}, {plan} plan"
            anchors, engine = TINYENGINE.get(scheme, (None,) * 4), "TinyEngine" if scheme in TINYENGINE else ""
            programs = zip(("infer", "train_step"), anchors, GOALS.get(scheme, (None, None)), strict=False)
            for program, anchor, goal in programs:
                limit = goal and goal * more
                name = "forward" if program == "infer" else "step"
                yield Figure(network, f"{name}, instructions", measured.instructions(program), anchor, engine, limit)
                peer = None if scheme in GOALS else published(mcunet, plan, folder).per_mac(program)
                limit = next(iter(peer.values())) if peer else None
                yield Figure(network, f"{name}, per MAC", measured.per_mac(program), goal=limit)
            flash = measured.each(lambda p: p.flash_bytes)
            yield Figure(network, "flash, bytes", flash, anchors[2], engine, FLASH.get(scheme))
            ram = measured.each(lambda p: p.ram_bytes)
            yield Figure(network, "RAM, bytes", ram, anchors[3], engine)


def list_inference(folder: Path) -> Iterator[Figure]:
    """The networks of MLPerf Tiny, int8, beside CMSIS-NN."""
    for name, anchor in CMSIS_NN.items():
        measured = _export(mlperf.compile_int8(name, folder), folder / name)
        goal = round(anchor * INFERENCE[name], 3)
        yield Figure(name, "inference, per MAC", measured.per_mac("infer"), anchor, "CMSIS-NN", goal)


def list_full(folder: Path) -> Iterator[Figure]:
    """Training all of a network: of floats, and of int8 with gradients of each kind."""
    measured = _export(mlperf.compile_float("resnet8"), folder / "float")
    yield Figure("resnet8, float32, full update", "step, per MAC", measured.per_mac("train_step"), goal=FLOAT_STEP)
    for gradients in ("float32", "int8"):
        artifact = mlperf.compile_int8("resnet8", folder, scheme="full", gradients=gradients)
        measured, network = (
            _export(artifact, folder / f"full-{gradients}"),
            f"resnet8, {gradients} gradients, full update",
        )
        yield Figure(network, "step, per MAC", measured.per_mac("train_step"))


def list_flags(folder: Path) -> Iterator[Figure]:
    """What the compiler's optimisation does to a forward pass."""
    measured = published("mcunet-5fps-49kb", "fastest", folder)
    for flag, goal in FLAGS.items():
        counts = {
            toolchain: [measured.profile(toolchain, o).programs["infer"].instructions for o in (flag, "-O2")]
            for toolchain in TOOLCHAINS
        }
        ratios = {toolchain: round(other / usual, 3) for toolchain, (other, usual) in counts.items()}
        yield Figure("mcunet-5fps-49kb, fastest plan", f"forward, {flag} / -O2", ratios, goal=goal)


def list_plans(folder: Path) -> Iterator[Figure]:
    """What memory is worth: a step in arenas of some sizes, by one in an arena of any size."""
    fastest = published("mcunet-5fps-49kb", "fastest", folder).instructions("train_step")
    for plan, goal in PLANS.items():
        measured = published("mcunet-5fps-49kb", plan, folder)
        arena = measured.artifact.report["memory"]["arena_bytes"]
        ratios = {name: round(n / fastest[name], 3) for name, n in measured.instructions("train_step").items()}
        yield Figure(f"mcunet-5fps-49kb, arena of {arena:,} bytes", "step / fastest plan", ratios, goal=goal)


def list_vectors(folder: Path) -> Iterator[Figure]:
    """A Cortex-M55: layers beside CMSIS-NN, networks beside what kernels for a Cortex-M33 take on the same core."""
    counted = {toolchain: layers.count_layers(toolchain) for toolchain in TOOLCHAINS}
    for name, (anchor, *_) in layers.CMSIS_NN.items():
        values = {toolchain: round(counted[toolchain][name], 3) for toolchain in TOOLCHAINS}
        yield Figure("Cortex-M55", name, values, anchor, "CMSIS-NN", anchor)

    def compile_network(name: str, target: str) -> tte.Artifact:
        if name in CMSIS_NN:
            return mlperf.compile_int8(name, folder, target)
        return published(name, "fastest", folder, target=target).artifact

    for name in ("mcunet-5fps-49kb", "mcunet-5fps-49kb, int8 gradients", *CMSIS_NN):
        artifact, before = (compile_network(name, target) for target in ("cortex-m55", "cortex-m33"))
        counts = {toolchain: layers.count_network(artifact, toolchain) for toolchain in TOOLCHAINS}
        anchors = layers.count_network(before, TOOLCHAINS[0])
        for i, program in enumerate(("inference", "step")):
            values = {toolchain: counts[toolchain][i] for toolchain in TOOLCHAINS}
            yield Figure(f"Cortex-M55, {name}", f"{program}, instructions", values, anchors[i], "without vectors")


def list_size(folder: Path) -> Iterator[Figure]:
    """What least code takes, and what it costs."""
    scheme = "mcunet-5fps-49kb"
    network = f"{scheme}, fastest plan, --optimize size"
    small, fast = (published(scheme, "fastest", folder, code) for code in ("size", "speed"))
    yield Figure(network, "flash, bytes", small.each(lambda p: p.flash_bytes), goal=LEAST_FLASH)
    for program, name in (("infer", "forward"), ("train_step", "step")):
        counts = zip(small.instructions(program).items(), fast.instructions(program).values(), strict=True)
        ratios = {toolchain: round(small / fast, 3) for (toolchain, small), fast in counts}
        yield Figure(network, f"{name}, instructions / those for speed", ratios)


TABLES = {
    "training": list_training,
    "size": list_size,
    "inference": list_inference,
    "full": list_full,
    "flags": list_flags,
    "plans": list_plans,
    "m55": list_vectors,
}


def render(figures: list[Figure]) -> str:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value > 1000 else f"{value:.2f}"

    lines = [
        f"| | | {' | '.join(TOOLCHAINS)} | other engine | of it | goal | reached |",
        "|---|---" + "|---:" * len(TOOLCHAINS) + "|---:|---:|---:|---|",
    ]
    for f in figures:
        other, of_it = (f"{f.engine} {cell(f.anchor)}", f"{f.first / f.anchor:.2f}") if f.anchor else ("", "")
        reached = "" if f.goal is None else "yes" if f.first <= f.goal else "no"
        values = " | ".join(cell(f.values[toolchain]) for toolchain in TOOLCHAINS)
        lines.append(f"| {f.network} | {f.name} | {values} | {other} | {of_it} | {cell(f.goal)} | {reached} |")
    return "\n".join(lines)


def draw(figures: list[Figure], path: Path) -> None:
    """A bar for every figure that another engine has, too: ours as a share of its."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [f for f in figures if f.anchor]
    shares = [f.first / f.anchor for f in rows if f.anchor]
    plot, axes = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1), layout="constrained")
    bars = axes.barh([f"{f.network}: {f.name}" for f in rows], shares, color="tab:blue")
    axes.bar_label(bars, [f"{share:.2f} of {f.engine}" for share, f in zip(shares, rows, strict=True)], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, max(1.4, 1.4 * max(shares)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"share of what the other engine takes ({next(iter(rows[0].values))}, -O2)")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/kernels.json"))
    parser.add_argument("--picture", type=Path, default=Path("build/kernels.png"))
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for table in track(given.only):
            figures += TABLES[table](Path(folder))
            given.out.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")
    if any(figure.anchor for figure in figures):
        draw(figures, given.picture)
    print(render(figures), NOTE, sep="\n\n")


if __name__ == "__main__":
    main()
