"""A folder of pictures, one subfolder per class -> the .npz files that `tte run` reads.

python examples/mcunet/pictures.py flowers/ -o flowers      # writes flowers-train.npz and flowers-test.npz
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def read_picture(path: Path, size: int) -> np.ndarray:
    """(3, size, size) float32, as the models were trained: the shorter side is scaled, then the middle cut out."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    shorter = math.ceil(size / 0.875)
    factor = shorter / min(image.size)
    width, height = (max(shorter, int(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
    return (np.trunc(pixels - 127.5) / np.float32(127.5)).transpose(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with one subfolder of pictures per class")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of a picture")
    parser.add_argument("--test", type=float, default=0.3, help="part of every class that is kept to test on")
    parser.add_argument("-o", "--output", required=True, help="beginning of the names of the two files")
    given = parser.parse_args()
    classes = sorted(p.name for p in given.folder.iterdir() if p.is_dir())
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        paths = sorted(p for p in (given.folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        kept = round(len(paths) * given.test)
        parts["test"] += [(p, label) for p in paths[:kept]]
        parts["train"] += [(p, label) for p in paths[kept:]]
    for part, found in parts.items():
        x = (
            np.stack([read_picture(p, given.size) for p, _ in found])
            if found
            else np.zeros((0, 3, given.size, given.size))
        )
        np.savez(f"{given.output}-{part}.npz", x=x, y=np.asarray([label for _, label in found], np.int32))
        print(f"{given.output}-{part}.npz: {len(found)} pictures of {len(classes)} classes: {', '.join(classes)}")


if __name__ == "__main__":
    main()
