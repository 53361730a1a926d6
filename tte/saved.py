"""From the bytes that a device saved back to the user's own tensors: the file weights.npz of a project."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tte.arrays import read_npz
from tte.ir import Origin, Param
from tte.runner.board import unpack_state
from tte.runner.build import Build
from tte.weights import export_weights

INITIAL, INDEX, SCALE, ORIGINAL = "initial/", "index/", "scale/", "original/"


def pack_weights(params: Sequence[Param], originals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is needed to put trained tensors back: initial values, origins, and the user's tensors they belong to."""
    arrays: dict[str, np.ndarray] = {}
    for param in params:
        origin = param.origin
        if origin is None:
            continue
        arrays[INITIAL + param.name] = param.data
        arrays[f"{INDEX}{param.name}//{origin.name}"] = origin.index
        if origin.scale is not None:
            arrays[SCALE + param.name] = origin.scale
        arrays[ORIGINAL + origin.name] = originals.get(origin.name, np.zeros(origin.shape, param.data.dtype))
    return arrays


def read_state(state: bytes, folder: Path | str) -> dict[str, np.ndarray]:
    """The user's tensors after training, by their own names and in their own layouts.

    state: what <name>_state_save wrote; folder: the project it ran. Raises TTEError (E050, E060, E061).
    """
    trained = unpack_state(state, Build.open(folder))
    arrays = read_npz(Path(folder) / "weights.npz", "TTE-E061", "compile the model again")
    originals = {k.removeprefix(ORIGINAL): v for k, v in arrays.items() if k.startswith(ORIGINAL)}
    origins, initial = {}, {}
    for key, index in arrays.items():
        if key.startswith(INDEX):
            name, _, user = key.removeprefix(INDEX).partition("//")
            origins[name] = Origin(user, originals[user].shape, index, arrays.get(SCALE + name))
            initial[name] = arrays[INITIAL + name]
    known = {name: trained[name] for name in origins}
    return export_weights(known, initial, origins, originals)
