"""From the bytes that a device saved back to the user's own tensors: the file weights.npz of a project."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from tte.arrays import read_npz
from tte.document import suggest
from tte.errors import TTEError
from tte.ir import Graph, Origin, Param
from tte.runner.board import unpack_state
from tte.runner.build import Build
from tte.weights import checksum, export_weights

INITIAL, INDEX, SCALE, ORIGINAL, HEAD, MODEL = "initial/", "index/", "scale/", "original/", "head/", "model"


def pack_weights(
    params: Sequence[Param], originals: Mapping[str, np.ndarray], replaced: Collection[str], imported: Graph
) -> dict[str, np.ndarray]:
    """What is needed to put trained tensors back: initial values, origins, and the user's tensors they belong to.

    Those of a new head (``replaced``) are kept apart: no model has them. Of all other tensors of the model that was
    ``imported`` a digest is kept.
    """
    arrays: dict[str, np.ndarray] = {MODEL: digest_model(imported)}
    for param in params:
        origin = param.origin
        if origin is None:
            continue
        arrays[INITIAL + param.name] = param.data
        arrays[f"{INDEX}{param.name}//{origin.name}"] = origin.index
        if origin.scale is not None:
            arrays[SCALE + param.name] = origin.scale
        kind = HEAD if origin.name in replaced else ORIGINAL
        arrays[kind + origin.name] = originals.get(origin.name, np.zeros(origin.shape, param.data.dtype))
    return arrays


def read_state(state: bytes, folder: Path | str, source: Path | None = None) -> dict[str, np.ndarray]:
    """The user's tensors after training, by their own names and in their own layouts.

    state: what <name>_state_save wrote; folder: the project it ran; source: the file it was in, for messages.
    Raises TTEError (E050, E060, E061).
    """
    trained = unpack_state(state, Build.open(folder), source)
    arrays = _read(folder)
    if trained and not arrays.keys() & {INITIAL + name for name in trained}:
        what = "this is not the weights.npz of the project"
        raise TTEError("TTE-E061", what, where=str(Path(folder) / "weights.npz"), fix="compile the model again")
    originals = _select(arrays, ORIGINAL) | _select(arrays, HEAD)
    origins, initial = {}, {}
    for key, index in arrays.items():
        if key.startswith(INDEX):
            name, _, user = key.removeprefix(INDEX).partition("//")
            origins[name] = Origin(user, originals[user].shape, index, arrays.get(SCALE + name))
            initial[name] = arrays[INITIAL + name]
    known = {name: trained[name] for name in origins}
    return export_weights(known, initial, origins, originals)


def original_checksums(folder: Path | str) -> dict[str, int]:
    """Of the user's tensors that learn, as they were when the model was compiled. Raises TTEError (E061)."""
    return {name: checksum(array) for name, array in _select(_read(folder), ORIGINAL).items()}


def digest_model(imported: Graph) -> np.ndarray:
    """SHA-256 of the user's tensors, with their names, and of all scales and zero points: 32 bytes."""
    digest = hashlib.sha256()
    for origin, const in sorted(((c.origin, c) for c in imported.consts if c.origin), key=lambda pair: pair[0].name):
        stored = const.data if origin.quantized is None else origin.quantized
        sums = [checksum(array) for array in (stored, *(() if origin.scale is None else (origin.scale,)))]
        digest.update(f"{origin.name} {origin.shape} {sums}\n".encode())
    for node in imported.nodes:
        if "scale" in node.attrs:
            digest.update(f"{node.attrs['scale']} {node.attrs.get('zero_point')}\n".encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _read(folder: Path | str) -> dict[str, np.ndarray]:
    return read_npz(Path(folder) / "weights.npz", "TTE-E061", "compile the model again")


def _select(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(kind): array for key, array in arrays.items() if key.startswith(kind)}


def write_onnx(path: Path, weights: Mapping[str, np.ndarray], model: Path, folder: Path | str | None = None) -> None:
    """Write the ONNX file ``model`` with ``weights`` in the place of its own tensors of these names.

    folder: the project, which knows the model that was compiled: any other is refused
    Raises TTEError: E020 no model, E062 not writable, E063 unknown name, E064 wrong shape, E065 another model.
    """
    import onnx

    from tte.frontends import import_model
    from tte.frontends.onnx_model import read_onnx

    proto = read_onnx(model)
    compiled = {} if folder is None else _read(folder)
    originals = _select(compiled, ORIGINAL)
    instead = "after `head` in the scheme: write an .npz instead"
    other, fix = "this is not the model that was compiled", "give the file that `tte compile` was given"
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, array in weights.items():
        if name not in tensors and HEAD + name in compiled:  # a quantised model has it under another name
            what = f"{name} is of the new head, which the model does not have"
            raise TTEError("TTE-E064", what, where=str(model), fix=instead)
        if name not in tensors:
            what = f"the model has no initializer {name!r}"
            raise TTEError("TTE-E063", what, where=str(model), fix=suggest(name, tensors, "initializers"))
        shape = tuple(tensors[name].dims)
        if array.shape != shape:
            what = f"{name} has shape {array.shape}, the model's {shape}"
            raise TTEError("TTE-E064", what, where=str(model), fix=instead)
        if name in originals and checksum(originals[name]) != checksum(onnx.numpy_helper.to_array(tensors[name])):
            raise TTEError("TTE-E065", f"{other}: {name} differs", where=str(model), fix=fix)
    if compiled and not np.array_equal(digest_model(import_model(model)), compiled.get(MODEL, [])):
        raise TTEError(
            "TTE-E065", f"{other}: a tensor that did not learn, or a scale, differs", where=str(model), fix=fix
        )
    for name, array in weights.items():
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    try:
        path.write_bytes(proto.SerializeToString())
    except OSError as problem:
        what = f"cannot write: {problem.strerror}"
        raise TTEError("TTE-E062", what, where=str(path), fix="choose another place") from problem
