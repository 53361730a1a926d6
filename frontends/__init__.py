"""A model file -> a forward graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tte.ops  # noqa: F401  fills the table of operators
from tte.arrays import read_npz
from tte.errors import TTEError
from tte.frontends.lower import refuse_nonfinite
from tte.ir import Const, Graph, InvalidGraph, Origin, parse, verify

__all__ = ["import_model"]


def import_model(model: Any, example_inputs: Sequence[Any] | None = None, name: str | None = None) -> Graph:
    """The forward graph ``@main`` (or ``@name``) of a model, with its weights as constants.

    model           torch.nn.Module (in eval mode, with example_inputs), torch.export.ExportedProgram, onnx.ModelProto,
                    or the path of a .pt2, .onnx or .ir file (the latter with its data in an .npz of the same name)
    example_inputs  a tuple with one float32 tensor, batch 1

    Constants have the user's parameter names and an Origin, nodes the user's layer names. Raises TTEError (E02x).
    """
    name = name or "main"
    if isinstance(model, str | Path):
        path = Path(model)
        if not path.is_file():
            what = "a folder is not a model" if path.is_dir() else "there is no such file"
            raise TTEError("TTE-E020", what, where=str(path), fix="give the path of a .onnx, .pt2 or .ir file")
        if path.suffix == ".ir":
            return _read_text(path)
        if path.suffix == ".pt2":
            from tte.frontends.pytorch import import_program, read_program

            return import_program(read_program(path), name)
        if path.suffix == ".onnx":
            from tte.frontends.onnx_model import import_onnx_model, read_onnx

            proto = read_onnx(path)
            try:
                return import_onnx_model(proto, name)
            except TTEError as problem:
                if problem.code != "TTE-E020":
                    raise
                where = f"{path}, {problem.where}"
                raise TTEError(problem.code, problem.what, where=where, fix=problem.fix) from problem
        fix = "give a .onnx, .pt2 or .ir file"
        if path.suffix in (".pt", ".pth"):
            fix = (
                "write torch.export.save(torch.export.export(module, (x,)), 'model.pt2'), or use tte.compile in Python"
            )
        raise TTEError("TTE-E020", "the name does not end like that of a model file", where=str(path), fix=fix)
    # The kinds are told apart by name, so that a model of one kind does not import the libraries of the other.
    kinds = {f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(model).__mro__}
    if "torch.Module" in kinds:
        from tte.frontends.pytorch import import_module

        return import_module(model, example_inputs, name)
    if "torch.ExportedProgram" in kinds:
        from tte.frontends.pytorch import import_program

        return import_program(model, name)
    if any(k.endswith(".ModelProto") for k in kinds):
        from tte.frontends.onnx_model import import_onnx_model

        return import_onnx_model(model, name)
    raise TTEError(
        "TTE-E020",
        f"a {type(model).__name__} is not a model",
        fix="give a torch.nn.Module, an ExportedProgram, an onnx.ModelProto or the path of a file",
    )


def _read_text(path: Path) -> Graph:
    """tte's own text; constants with names are the user's tensors as they stand."""
    beside = path.with_suffix(".npz")
    data = read_npz(beside, "TTE-E020", "write it again") if beside.is_file() else {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise TTEError("TTE-E020", f"cannot be read: {problem}", where=str(path), fix="write it again") from problem
    graph = parse(text, data, str(path))
    try:
        graph = verify(graph)
    except InvalidGraph as problem:
        raise TTEError("TTE-E010", str(problem), where=str(path), fix="compare with what --dump-ir writes") from problem
    _require_model(graph, str(path))
    return Graph(
        graph.name, graph.inputs, graph.params, tuple(map(_named, graph.consts)), graph.nodes, graph.outputs,
        graph.updates,
    )  # fmt: skip


def _require_model(graph: Graph, where: str) -> None:
    """A text may hold any program; a model is a forward one."""
    values = [*graph.inputs, *graph.consts, *(v for node in graph.nodes for v in node.outputs)]
    if graph.params or any(node.body for node in graph.nodes):
        fix = "compile the 0-import.ir or 1-simplify text that --dump-ir writes"
        raise TTEError("TTE-E010", "a model has constants, but neither params nor regions", where=where, fix=fix)
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or graph.inputs[0].type.dtype != "float32":
        raise TTEError("TTE-E023", "not one float32 tensor in and one tensor out", where=where, fix="change the text")
    shape = graph.inputs[0].type.shape
    if not shape or shape[0] != 1:
        raise TTEError(
            "TTE-E027", f"the input is {shape}", where=where, fix="the first dimension is the batch: write 1"
        )
    if empty := next((v for v in values if v.type.size == 0), None):
        raise TTEError("TTE-E010", f"{empty.name} has no elements: {empty.type}", where=where, fix="change the shapes")
    for const in graph.consts:
        if const.data.dtype == np.float32:
            refuse_nonfinite(const.data, const.name)


def _named(const: Const) -> Const:
    if const.name.startswith("const.") or const.type.dtype != "float32":
        return const
    index = np.arange(const.type.size, dtype=np.int64).reshape(const.type.shape)
    return Const(const.name, const.type, const.data, Origin(const.name, const.type.shape, index))
