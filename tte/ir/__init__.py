"""The intermediate representation: typed straight-line programs."""

from tte.ir.evaluate import Result, evaluate
from tte.ir.graph import Builder, Const, Graph, Node, Origin, Param, Value, find_anchor, rewrite
from tte.ir.op import OPS, Attrs, InvalidType, Op, Window, register
from tte.ir.text import parse
from tte.ir.types import Quant, TensorType, tensor_type
from tte.ir.verify import InvalidGraph, inplace_inputs, verify

__all__ = [
    "OPS", "Attrs", "Builder", "Const", "Graph", "InvalidGraph", "InvalidType", "Node", "Op", "Origin", "Param",
    "Quant", "Result", "TensorType", "Value", "Window", "evaluate", "find_anchor", "inplace_inputs", "parse",
    "register", "rewrite", "tensor_type", "verify",
]  # fmt: skip
