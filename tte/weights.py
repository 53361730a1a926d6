"""Trained tensors on their way back: from our layouts to the user's names and layouts, to a file, into a module."""

import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tte.arrays import read_npz
from tte.document import suggest
from tte.errors import TTEError
from tte.ir import Origin

COMMENT = "tte, CRC-32 of the tensors before the training"
OTHER_MODEL = (
    "load into the module as it was compiled. Exporters to ONNX fold batch norms into weights and rename tensors: then "
    "compile the module itself or its .pt2, or write the weights into the .onnx file (--model model.onnx)"
)


def export_weights(
    trained: Mapping[str, np.ndarray],
    initial: Mapping[str, np.ndarray],
    origins: Mapping[str, Origin],
    originals: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The user's tensors after training, by their own names: those of which something learned.

    trained, initial: our tensors after and before, by our names; originals: the user's tensors before.
    What was learned is a difference, and it is the difference that is carried over:

        user_new = user_old + (trained - initial) / scale      at origin.index

    so elements that did not learn keep their bits. After batch-norm folding (w' = s * w, b' = beta + (b - mean) * s)
    this gives the user's own w + dw' / s, and the batch norm's own bias takes the change of b'; loaded into the model
    that was compiled, with its batch norm as it is, they compute what the device computes. A weight with s = 0 cannot
    be told from any other and stays as it was. Integers get the integers that the device computes with; of a layer that
    computes in float32 although its weights are given as integers, the nearest.
    """
    result: dict[str, np.ndarray] = {}
    for name, new in trained.items():
        origin, old = origins[name], initial[name]
        original = originals[origin.name]
        assert original.shape == origin.shape, (origin.name, original.shape, origin.shape)
        tensor = result.setdefault(origin.name, original.copy()).reshape(-1)
        index = origin.index.reshape(-1)
        scale = np.ones(new.size) if origin.scale is None else origin.scale.reshape(-1).astype(np.float64)
        integers = np.issubdtype(tensor.dtype, np.integer)
        if integers:
            old, new = _as_read(old, scale), _as_read(new, scale)
        before, after = old.reshape(-1).astype(np.float64), new.reshape(-1).astype(np.float64)
        # 0 / 1 in place of change / 0: those stay.
        change = np.where(scale == 0, 0.0, after - before) / np.where(scale == 0, 1.0, scale)
        moved = tensor[index] + change
        if integers:
            limits = np.iinfo(tensor.dtype)
            moved = np.clip(np.rint(moved), limits.min, limits.max)
        moved = moved.astype(tensor.dtype)
        # Where our element is the user's own, so is the new one, to the bit.
        same = (scale == 1) & (tensor[index] == old.reshape(-1))
        moved = np.where(same, new.reshape(-1), moved)
        tensor[index] = np.where(change == 0, tensor[index], moved)
    return result


def _as_read(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Integers as layers read them: of int16 the upper byte, of floats in units of the user's integers the nearest."""
    if stored.dtype == np.int16:
        return stored >> 8
    if stored.dtype == np.float32 and (scale == 1).all():
        rounded: np.ndarray = np.clip(np.rint(stored), -128, 127)
        return rounded
    return stored


def require_writable(path: Path) -> None:
    """Raises TTEError (E062) where a file could not be written there: before the work, not after it."""
    target = path if path.exists() else path.parent
    if path.is_dir() or not os.access(target, os.W_OK) or (target != path and not target.is_dir()):
        what = "is a folder" if path.is_dir() else "is in no folder that exists and may be written to"
        raise TTEError("TTE-E062", f"cannot write: {path.name} {what}", where=str(path), fix="choose another place")


def checksum(array: np.ndarray) -> int:
    """CRC-32 of a tensor as float32."""
    return zlib.crc32(np.ascontiguousarray(array, np.float32).tobytes())


def save_weights(
    path: Path | str, weights: Mapping[str, np.ndarray], checksums: Mapping[str, int] | None = None
) -> None:
    """Write tensors into an .npz. Raises TTEError (E062) where that is not possible.

    checksums: of the same tensors before the training; they become the comment of the archive, which numpy passes over
    """
    marks = [f"{checksums[name]:08x}" if checksums and name in checksums else "-" for name in weights]
    try:
        with Path(path).open("w+b") as file:
            np.savez(file, **dict(weights))  # type: ignore[arg-type]
            with zipfile.ZipFile(file, "a") as archive:
                archive.comment = f"{COMMENT}: {' '.join(marks)}".encode()
    except OSError as problem:
        raise TTEError(
            "TTE-E062", f"cannot write: {problem.strerror}", where=str(path), fix="choose another place"
        ) from problem


def read_checksums(path: Path | str, names: Iterable[str]) -> dict[str, int]:
    """What ``save_weights`` wrote beside the tensors ``names``; nothing where another program wrote the file."""
    with zipfile.ZipFile(path) as archive:
        title, _, text = archive.comment.decode(errors="replace").partition(": ")
    names, marks = list(names), text.split()
    if title != COMMENT or len(marks) != len(names):
        return {}
    return {name: int(mark, 16) for name, mark in zip(names, marks, strict=True) if re.fullmatch("[0-9a-f]{8}", mark)}


def load_weights(module: Any, path: Path | str, strict: bool = True) -> None:
    """Put trained weights into the torch.nn.Module they came from: all of them, or none when something does not fit.

    module: the model that was compiled, in the same state; its batch norms stay as they are (see ``export_weights``).
    strict: refuse a module whose tensors are neither those that were compiled nor, already, those of the file
    Parameters that are not in the file stay. Raises TTEError: E061 unreadable, E063 unknown name, E064 wrong shape,
    E065 not the module that was compiled.
    """
    import torch

    weights = read_npz(path, "TTE-E061", "give a file written by `tte run --save`")
    for name, array in weights.items():
        if array.dtype.kind in "iu":
            what = f"{name} holds {array.dtype}: these weights are of a quantised model, the module's are floats"
            fix = "write them into the quantised .onnx file that was compiled: --model model.onnx, to new.onnx"
            raise TTEError("TTE-E064", what, where=str(path), fix=fix)
    checksums = read_checksums(path, weights)
    parameters = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    known = {
        name: checksum(parameters[name].detach().float().cpu().numpy()) for name in checksums if name in parameters
    }
    others = [name for name, crc in known.items() if crc not in (checksums[name], checksum(weights[name]))]
    if strict and others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        what = f"the module is not the model that was compiled: {len(others)} of {len(weights)} tensors differ: {shown}"
        raise TTEError("TTE-E065", what, where=str(path), fix=OTHER_MODEL)
    for name, array in weights.items():
        if name not in parameters:
            raise TTEError(
                "TTE-E063",
                f"the module has no parameter {name!r}",
                where=str(path),
                fix=OTHER_MODEL if checksums else suggest(name, parameters, "parameters"),
            )
        shape = tuple(parameters[name].shape)
        if array.shape != shape:
            raise TTEError(
                "TTE-E064",
                f"{name} has shape {array.shape}, the module's {shape}",
                where=str(path),
                fix="after `head` in the scheme: give the module a last layer of the new size first",
            )
        if not np.issubdtype(array.dtype, np.floating):
            raise TTEError("TTE-E064", f"{name} holds {array.dtype}, not floats", where=str(path), fix="check the file")
    with torch.no_grad():
        for name, array in weights.items():
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
