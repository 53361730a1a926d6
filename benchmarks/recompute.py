"""What a training step saves when forward results are computed twice: bytes at the peak, and multiply-accumulates.

For docs/measurements.md: python benchmarks/recompute.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from data import import_published, require_pack
from models import load_networks
from rich.progress import track

import tte
from tte.errors import TTEError
from tte.ir import OPS, Builder, Graph, TensorType, Value, parse, verify
from tte.ir.op import Op
from tte.passes.recompute import find_schedule

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def find_step(*model: Any) -> Graph:
    """A full update, as ``reorder`` leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        tte.compile(*model, name="net", target="host", dump_ir=folder)
        (path,) = Path(folder).glob("4-train.*-reorder.ir")
        return parse(path.read_text())


def sketch(stem: str) -> Graph:
    """A full update in int8, gradients too: one node per convolution and addition, and one per convolution backward.

    A node behind the loss reads a gradient and what its layer reads and makes. Sizes are multiples of 64 bytes.
    """

    def infer(*xs: TensorType, size: int, macs: int = 0, loss: bool = False) -> tuple[TensorType, ...]:
        made = TensorType((-(-size // 64) * 64,), "int8")
        return (made, TensorType((1,), "float32")) if loss else (made,)

    OPS["sketch"] = Op("sketch", infer, infer, macs=lambda *xs, size, macs=0, loss=False: macs)
    builder = Builder()
    picture = Value("picture", TensorType((1,), "int8"))
    shapes, made = {"input": (3, 128)}, {"input": picture}
    layers: list[tuple[list[str], str, int]] = []  # what it reads, what it makes, multiply-accumulates

    def size(name: str) -> int:
        channels, side = shapes[name]
        return channels * side * side

    def call(*inputs: Value, **attrs: Any) -> tuple[Value, ...]:
        return builder.calls("sketch", *inputs, **attrs)

    for step in json.loads((require_pack() / "models" / f"{stem}.json").read_text())["ops"]:
        sources, out, macs = step.get("inputs") or [step["input"]], step["output"], 0
        shapes[out] = shapes[sources[0]]
        if step["op"] == "conv2d" and step["name"] != "classifier":
            (channels, side), kernel = shapes[out], step["kernel"][0]
            shapes[out] = step["out_channels"], (side + 2 * step["pad"][0] - kernel) // step["stride"] + 1
            macs = channels // step["groups"] * kernel * kernel * size(out)
        elif step["op"] != "add":
            continue
        made[out] = call(*(made[name] for name in sources), size=size(out), macs=macs)[0]
        layers.append((sources, out, macs))
    last = layers[-1][1]
    gradient, loss = call(made[last], size=size(last), loss=True)
    gradients = {last: gradient}
    for sources, out, macs in reversed(layers):
        if len(sources) == 2:
            gradients |= dict.fromkeys(sources, gradients[out])
            continue
        (name,) = sources
        reads = [gradients[out], made[name], made[out], *([gradients[name]] if name in gradients else [])]
        attrs = {"size": 1, "macs": macs} if name == "input" else {"size": size(name), "macs": 2 * macs}
        gradients[name] = call(*reads, **attrs)[0]
    graph = Graph("train", (picture,), nodes=tuple(builder.nodes), outputs=(loss, gradients["input"]))
    return verify(graph.renumbered())


def measure(graph: Graph) -> list[dict[str, Any]]:
    """For each share of the peak what is computed more, in percent, and how long it took to find out."""
    rows: list[dict[str, Any]] = []
    total = sum(node.macs for node in graph.nodes)
    peak = find_schedule(graph, 1 << 62).peak
    for share in SHARES:
        start = time.perf_counter()
        try:
            found = find_schedule(graph, int(peak * share))
            row = {"peak": found.peak, "macs": found.macs, "percent": 100 * found.macs / total, "proved": found.proved}
            row["bound_percent"] = 100 * found.bound / total
        except TTEError as problem:
            row = {"refused": problem.fix}
        rows.append({"share": share, "of": peak, **row, "seconds": time.perf_counter() - start})
    return rows


def render(graphs: dict[str, Graph], rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | nodes | peak, bytes | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"]
    lines.append("|---|---:|---:" + "|---:" * len(SHARES) + "|")
    for name, graph in graphs.items():
        cells = []
        for row in rows[name]:
            if "refused" in row:
                cells.append("-")
            else:
                sign = "" if row["proved"] else f" (at least {row['bound_percent']:.2f} %)"
                cells.append(f"{row['percent']:.2f} %{sign}")
        lines.append(f"| {name} | {len(graph.nodes)} | {rows[name][0]['of']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/recompute.json"))
    given = parser.parse_args()
    float_networks = {n.name: n for n in load_networks()}
    graphs = {"mcunet-5fps, int8 sketch": sketch("mcunet-5fps")}
    graphs |= {stem: find_step(import_published(stem, 10), None, "full") for stem in ("mcunet-5fps", "mbv2-w0.35")}
    for name in ("resnet8", "resnet20", "mobilenet", "dscnn"):
        network = float_networks[name]
        graphs[name] = find_step(network.model, network.example, network.scheme("full"))
    rows = {name: measure(graph) for name, graph in track(graphs.items())}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=2) + "\n")
    print(render(graphs, rows))
    print("longest:", max((row["seconds"], name, row["share"]) for name in rows for row in rows[name]))


if __name__ == "__main__":
    main()
