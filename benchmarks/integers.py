"""The digits of the example on a Cortex-M0+: an int8 network learns as a whole, gradients being int8 or float32."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from data import load_module

import tte

DEMO = Path(__file__).resolve().parents[1] / "examples" / "digits" / "demo.py"
PIXELS = {"dtype": "uint8", "mean": [8.0], "std": [8.0]}
COLUMNS = ("gradients", "input", "layers with floats", "flash", "inference", "step", "before", "after")


def main() -> None:
    demo = load_module(DEMO)
    data = demo.load(5)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "digits.onnx"
        tte.quantize(demo.pretrain(), {"x": demo.load(0)[0]["x"][:64]}, model, int8_head=True)
        print("| " + " | ".join(COLUMNS) + " |\n|---|---|---:|---:|---:|---:|---:|---:|")
        for gradients, dtype in (("int8", "uint8"), ("int8", "float32"), ("float32", "uint8")):
            print_row(model, data, gradients, dtype)


def print_row(model: Path, data: tuple[dict[str, np.ndarray], ...], gradients: str, dtype: str) -> None:
    scheme: dict[str, Any] = {"train": "full", "optimizer": {"lr": 0.02}, "quantized": {"gradients": gradients}}
    if dtype == "uint8":
        scheme["io"] = {"input": PIXELS}
        data = tuple({"x": np.rint(d["x"] * 8 + 8).astype(np.uint8), "y": d["y"]} for d in data)
    artifact = tte.compile(model, update_scheme=scheme, target="rp2040", name="digits")
    report, result = artifact.report, artifact.run(data[0], evaluation=data[1], runner="host")
    counts = [report["flash_bytes"], *(report[role]["instructions"] for role in ("infer", "train_step"))]
    soft, cells = len(report["soft_float"]["train_step"]), [f"{n:,}" for n in counts]
    cells += [f"{result.metric[when]:.1%}" for when in ("before", "after")]
    print(f"| {gradients} | {dtype} | {soft} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
