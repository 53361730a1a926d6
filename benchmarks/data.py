"""Finds the data pack: real models and data sets that do not come with the project."""

import importlib.util
import io
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml

VARIABLE = "TTE_DATA"
CAMERA = {"io": {"input": {"dtype": "int8", "layout": "nhwc", "std": [127.5]}}}  # of a scheme: trunc(pixel - 127.5)
MCUNET = Path(__file__).resolve().parents[1] / "examples" / "mcunet"


def find_pack() -> Path | None:
    """The folder named by TTE_DATA, or ../shared/data beside the checkout; None when there is none."""
    folder = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[2] / "shared" / "data")
    return folder if (folder / "MANIFEST.md").exists() else None


def require_pack() -> Path:
    folder = find_pack()
    if folder is None:
        raise SystemExit(f"the data pack is not there: set {VARIABLE} to its folder")
    return folder


@cache
def load_module(path: Path) -> ModuleType:
    """A Python file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_published(stem: str) -> tuple[list[Any], Any]:
    """Steps and tensors of one of MIT's int8 models."""
    steps, tensors = load_module(MCUNET / "import_model.py").read_model(require_pack() / "models" / stem)
    return steps, tensors


def import_published(stem: str, classes: int, int8_head: bool = False) -> Any:
    """The same as ONNX, with a new head."""
    return load_module(MCUNET / "import_model.py").convert(*read_published(stem), classes, int8_head=int8_head)


def load_scheme(name: str) -> dict[str, Any]:
    """One of MIT's update schemes, for a camera that gives int8 pixels."""
    rules: dict[str, Any] = yaml.safe_load((MCUNET / "schemes" / f"{name}.yaml").read_text())
    return rules | CAMERA


@cache
def load_pictures(name: str, split: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, 3) uint8 and labels of a collection of JPEG files in one npz."""
    from PIL import Image

    pack = np.load(require_pack() / "data" / f"{name}.npz")
    blob, offsets = pack["jpeg"].tobytes(), pack["offsets"]
    chosen = np.flatnonzero(pack["split"] == split)
    pictures = [Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]])).convert("RGB") for i in chosen]
    return np.stack([np.asarray(p) for p in pictures]), pack["labels"][chosen].astype(np.int32)


def load_mnist(split: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) uint8 and labels; split 0: training, 1: test."""
    pack = np.load(require_pack() / "data" / "mnist.npz")
    chosen = pack["split"] == split
    return pack["x"][chosen], pack["labels"][chosen].astype(np.int32)
