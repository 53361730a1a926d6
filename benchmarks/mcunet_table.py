"""What training MIT's published int8 models costs on an emulated STM32F746, beside MIT's own engine.

For docs/quantized.md: python benchmarks/mcunet_table.py; with --gradients, how far gradients are from PyTorch's; with
--forward, how many integers differ from exact rounding.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from data import MCUNET, import_published, load_module, load_pictures, load_scheme, read_published, require_pack
from rich.progress import track

import tte
from tte.compiler import lower
from tte.ir import Graph, evaluate
from tte.passes.quantized import Settings, lower_qdq

CLASSES = 10


@dataclass(frozen=True)
class Engine:
    """TinyEngine 47bb283, -Ofast, arm-none-eabi-gcc 12.2: instructions of a training step, .data + .bss, flash."""

    instructions: int
    ram_bytes: int
    flash_bytes: int


ROWS: dict[str, Engine | None] = {
    "mcunet-5fps-49kb": Engine(106_370_000, 230_592, 665_060),
    "mcunet-5fps-99kb": Engine(115_730_000, 271_800, 688_508),
    "mbv2-w0.35-49kb": None,  # its code generator fails
}


# Model, and what learns: the label of a published scheme, or a short form.
GRADIENTS = [
    *(("mcunet-5fps", train) for train in ("49kb", "99kb", "148kb", "bias-only", "full")),
    *(("mbv2-w0.35", train) for train in ("49kb", "99kb", "full")),
]


def draw_head(model: Any) -> Any:
    """The same model with a classifier that is not zero: only such a one sends gradients back in the first step."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    head = next(t for t in made.graph.initializer if t.name == "classifier.weight")
    drawn = np.random.default_rng(0).standard_normal(tuple(head.dims)).astype(np.float32)
    head.CopyFrom(onnx.numpy_helper.from_array(drawn, head.name))
    return made


def compare_gradients(stem: str, train: str, model: Any) -> dict[str, Any]:
    """``tte verify`` on pictures."""
    scheme = MCUNET / "schemes" / f"{stem}-{train}.yaml"
    artifact = tte.compile(model, update_scheme=scheme if scheme.exists() else train, target="host")
    pictures = pick_pictures(1)
    x = pictures["x"].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5)
    proof = artifact.verify(steps=2, data={"x": x, "y": pictures["y"]})
    worst = {key: max(row[key] for row in proof["tensors"]) for key in ("gradient_error", "weight_error", "apart")}
    return worst | {"tensors": len(proof["tensors"]), "ok": proof["ok"]}


def render_gradients(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | tensors | gradient | step before rounding |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        assert row["ok"], name
        lines.append(f"| {name} | {row['tensors']} | {row['gradient_error']:.1e} | {row['weight_error']:.1e} |")
    return "\n".join(lines)


def pick_crops(count: int = 20) -> np.ndarray:
    """(count, 3, 128, 128) int8: the middle of pictures of flowers, as the models were calibrated for."""
    images, _ = load_pictures("flowers5", 0)
    step = len(images) // count
    crops = images[: count * step : step, 50:178, 50:178].astype(np.float32)
    return np.trunc(crops - 127.5).transpose(0, 3, 1, 2).astype(np.int8)


def exact_step(step: Any, tensors: Any, values: dict[str, np.ndarray]) -> np.ndarray:
    """What an operator's result is before rounding, in float64, from exact sums; without limits and zero point."""
    if step["op"] == "conv2d":
        x = torch.from_numpy(values[step["input"]]) - step["x_zero"]
        w = torch.from_numpy(tensors[f"{step['name']}.weight"].astype(np.float64))
        acc = torch.nn.functional.conv2d(x, w, None, step["stride"], tuple(step["pad"]), 1, step["groups"]).numpy()
        acc = acc + tensors[f"{step['name']}.bias"].astype(np.float64)[:, None, None]
        scale = np.broadcast_to(tensors[f"{step['name']}.w_scales"], len(w)).astype(np.float64)[:, None, None]
        return acc * (step["x_scale"] * scale / step["y_scale"])
    if step["op"] == "add":
        a, b = (values[name] for name in step["inputs"])
        total = (a - step["x1_zero"]) * step["x1_scale"] + (b - step["x2_zero"]) * step["x2_scale"]
        return total / step["y_scale"]
    return values[step["input"]].mean((2, 3), keepdims=True)


def compare_integers(steps: list[Any], tensors: Any, model: Any, pictures: np.ndarray, mode: str) -> dict[str, Any]:
    """Every tensor of the forward pass beside the exact one, each operator from exact operands.

    largest: difference; from_half: how far from a half the exact number is at most, where integers differ; different:
    integers that differ, without those of global averages (true halves)
    """
    reference = load_module(require_pack() / "reference" / "packlib.py")
    graph = lower_qdq(lower(model), Settings(mode))
    values = different = largest = 0
    from_half = 0.0
    for picture in pictures:
        env = {v.name: v.data for v in graph.consts}
        env[graph.inputs[0].name] = picture[None] * np.float32(steps[0]["x_scale"])
        given = reference.forward_q({"ops": steps}, tensors, picture[None])
        exacts = {name: v.astype(np.float64) for name, v in given.items()}
        ends = iter(steps[:-1])
        for node in graph.nodes:
            distinct = {v.name: v for v in node.inputs}
            alone = Graph("main", tuple(distinct.values()), nodes=(node,), outputs=node.outputs)
            result = evaluate(alone, [env[name] for name in distinct]).outputs[0]
            if node.op in ("qnn.requantize", "qnn.add"):
                step = next(ends)
                exact, ours = exacts[step["output"]], result.transpose(0, 3, 1, 2)
                wrong = ours != exact
                real = exact_step(step, tensors, exacts)[wrong]
                largest = max(largest, int(np.abs(ours - exact).max()))
                from_half = max(from_half, np.abs(np.abs(real) % 1 - 0.5).max(initial=0.0))
                values += ours.size
                different += 0 if step["op"] == "global_avgpool" else int(wrong.sum())
                result = exact.transpose(0, 2, 3, 1).astype(np.int8)
            env[node.output.name] = result
        assert next(ends, None) is None
    return {"values": values, "different": different, "largest": largest, "from_half": float(from_half)}


def compile_for_board(scheme: str, model: Any, target: str = "stm32f746") -> tte.Artifact:
    """The project for a camera that gives int8 pixels; they come row by row."""
    return tte.compile(model, update_scheme=load_scheme(scheme), target=target, input="rows")


def pick_pictures(each: int) -> dict[str, np.ndarray]:
    """Of two kinds of flowers ``each`` pictures, in turns."""
    images, labels = load_pictures("flowers5", 0)
    chosen = np.stack([np.flatnonzero(labels == label)[:each] for label in (0, 1)], 1).reshape(-1)
    pixels = images[chosen, 50:178, 50:178].astype(np.float32)
    return {"x": np.trunc(pixels - 127.5).astype(np.int8), "y": labels[chosen]}


def measure(scheme: str, target: str, each: int, epochs: int) -> dict[str, Any]:
    """Sizes and counts; what is learned on the emulated board, and whether this computer learns the same."""
    artifact = compile_for_board(scheme, import_published(scheme.rpartition("-")[0], CLASSES), target)
    pictures = pick_pictures(each)
    there, here = (artifact.run(pictures, evaluation=pictures, runner=r, epochs=epochs) for r in ("unicorn", "host"))
    report = artifact.report
    memory = report["memory"]
    return {
        "target": target,
        "toolchain": report["toolchain"],
        "steps": len(there.loss),
        "arena_bytes": memory["arena_bytes"],
        "trained_bytes": memory["trained_bytes"],
        "analytic_extra_bytes": memory["analytic_extra_bytes"],
        "ram_bytes": memory["static_ram_bytes"],
        "flash_bytes": report["flash_bytes"],
        "infer_instructions": report["infer"]["instructions"],
        "step_instructions": report["train_step"]["instructions"],
        "loss": [there.loss[0], there.loss[-1]],
        "accuracy": [there.metric["before"], there.metric["after"]],
        "same_as_host": there.weights_sha256 == here.weights_sha256,
    }


def render(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | arena | learns | RAM | flash | M instructions per step | of which forward | TinyEngine: RAM, flash, M "
        "instructions per step | accuracy before, after | same as on the host |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for name, row in rows.items():
        engine = ROWS[name]
        other = "its code generator fails"
        if engine:
            other = f"{engine.ram_bytes:,}, {engine.flash_bytes:,}, {engine.instructions / 1e6:.1f}"
        sizes = " | ".join(f"{row[key]:,}" for key in ("arena_bytes", "trained_bytes", "ram_bytes", "flash_bytes"))
        counts = f"{row['step_instructions'] / 1e6:.1f} | {row['infer_instructions'] / 1e6:.1f}"
        learned = f"{row['accuracy'][0]:.2f}, {row['accuracy'][1]:.2f} | {'yes' if row['same_as_host'] else 'NO'}"
        lines.append(f"| {name} | {sizes} | {counts} | {other} | {learned} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/mcunet_table.json"))
    parser.add_argument("--target", default="stm32f746")
    parser.add_argument("--pictures", type=int, default=4, help="of each of two kinds of flowers")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--gradients", action="store_true", help="compare gradients with PyTorch instead")
    parser.add_argument("--forward", action="store_true", help="compare integers with exact rounding instead")
    given = parser.parse_args()
    if given.forward:
        pictures = pick_crops()
        for mode in ("fixed", "float"):
            for stem in dict(GRADIENTS):
                found = compare_integers(*read_published(stem), import_published(stem, CLASSES), pictures, mode)
                print(stem, mode, found, flush=True)
        return
    if given.gradients:
        models = {stem: draw_head(import_published(stem, CLASSES)) for stem, _ in GRADIENTS}
        proofs = {f"{stem} {train}": compare_gradients(stem, train, models[stem]) for stem, train in track(GRADIENTS)}
        return print(render_gradients(proofs))
    rows = {name: measure(name, given.target, given.pictures, given.epochs) for name in track(ROWS)}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=2) + "\n")
    print(render(rows))


if __name__ == "__main__":
    main()
