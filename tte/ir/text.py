"""The text form of a graph, in Relay's style: printed for people, parsed back without loss (``parse(str(g)) == g``).

    def @train_step(%x: Tensor[(1, 8, 8, 1), float32]) {
      param @conv1.bias: Tensor[(16,), float32];
      const @conv1.weight: Tensor[(16, 3, 3, 1), float32];
      %0 = nn.conv2d(%x, @conv1.weight, @conv1.bias, padding=(1, 1, 1, 1), layer="conv1") /* ty=Tensor[...] */;
      ...
      @conv1.bias := %31;
      return %7;
    }

Weights are not part of the text: they travel beside it, by name.
"""

import ast
import math
import re
from collections.abc import Mapping

import numpy as np

from tte.errors import TTEError
from tte.ir.graph import Const, Graph, Node, Param, Value
from tte.ir.op import OPS, InvalidType
from tte.ir.types import DTYPES, Quant, TensorType

IDENTIFIER = r"[A-Za-z0-9_.~:/\-]+"


def print_graph(graph: Graph) -> str:
    """The text of a graph; see the module."""
    arguments = ", ".join(f"%{v.name}: {v.type}" for v in graph.inputs)
    return "\n".join([f"def @{graph.name}({arguments}) {{", *_body(graph, "  "), "}"]) + "\n"


def _body(graph: Graph, indent: str) -> list[str]:
    stored = {v.name for v in (*graph.params, *graph.consts)}

    def ref(value: Value) -> str:
        return ("@" if value.name in stored else "%") + value.name

    lines = [f"{indent}param @{p.name}: {p.type};" for p in graph.params]
    lines += [f"{indent}const @{c.name}: {c.type};" for c in graph.consts]
    for node in graph.nodes:
        left = ", ".join(ref(v) for v in node.outputs)
        types = ", ".join(str(v.type) for v in node.outputs)
        attrs = {k: v for k, v in node.attrs.items() if node.op == "region" or OPS[node.op].attributes[k] != v}
        extra = [f"{k}={v!r}" for k, v in attrs.items()]
        if node.inplace:
            extra.append(f"inplace={node.inplace}")
        if node.layer:
            extra.append(f'layer="{node.layer}"')
        if node.body:
            named = [f"{v.name}={ref(a)}" for v, a in zip(node.body.inputs, node.inputs, strict=True)]
            lines.append(f"{indent}{left} = region({', '.join(named + extra)}) {{")
            lines += [*_body(node.body, indent + "  "), f"{indent}}} /* ty={types} */;"]
        else:
            operands = [ref(v) for v in node.inputs]
            lines.append(f"{indent}{left} = {node.op}({', '.join(operands + extra)}) /* ty={types} */;")
    lines += [f"{indent}{ref(p)} := {ref(v)};" for p, v in graph.updates]
    if graph.outputs:
        lines.append(f"{indent}return {', '.join(ref(v) for v in graph.outputs)};")
    return lines


def parse(text: str, data: Mapping[str, np.ndarray] | None = None, file: str = "<text>") -> Graph:
    """The graph of a text; ``data`` gives the contents of params and consts (zeros where it is silent).

    Raises TTEError with file and line.
    """
    return _Parser(text, dict(data or {}), file).graph()


class _Parser:
    def __init__(self, text: str, data: dict[str, np.ndarray], file: str) -> None:
        self.lines = text.splitlines()
        self.at = 0
        self.data, self.file = data, file

    def fail(self, what: str, fix: str = "compare with the text that `tte compile --dump-ir` writes") -> TTEError:
        return TTEError("TTE-E010", what, where=f"{self.file}:{self.at}", fix=fix)

    def line(self) -> str:
        """The next line that is not empty."""
        while self.at < len(self.lines):
            self.at += 1
            if stripped := self.lines[self.at - 1].strip():
                return stripped
        raise self.fail("the text ends before the graph is closed by '}'")

    def graph(self) -> Graph:
        head = re.fullmatch(rf"def @({IDENTIFIER})\((.*)\) \{{", self.line())
        if not head:
            raise self.fail("a graph begins with 'def @name(%input: Tensor[...]) {'")
        inputs = tuple(
            Value(name, self.type(type))
            for name, type in re.findall(rf"%({IDENTIFIER}): (Tensor\[.*?\])(?=, %|$)", head[2])
        )
        return self.body(head[1], inputs, "}")[0]

    def body(self, name: str, inputs: tuple[Value, ...], end: str) -> tuple[Graph, str]:
        """Statements until a line that begins with ``end``; also returns that line."""
        params: list[Param] = []
        consts: list[Const] = []
        nodes: list[Node] = []
        updates: list[tuple[Param, Value]] = []
        outputs: tuple[Value, ...] = ()
        scope = {"%" + v.name: v for v in inputs}

        def value(ref: str) -> Value:
            if ref not in scope:
                raise self.fail(f"{ref} is used before it is defined")
            return scope[ref]

        while not (line := self.line()).startswith(end):
            if stored := re.fullmatch(rf"(param|const) @({IDENTIFIER}): (Tensor\[.*\]);", line):
                kind, key, type = stored[1], stored[2], self.type(stored[3])
                array = self.stored(key, type)
                if kind == "param":
                    params.append(Param(key, type, array))
                    scope["@" + key] = params[-1]
                else:
                    consts.append(Const(key, type, array))
                    scope["@" + key] = consts[-1]
            elif update := re.fullmatch(rf"(@{IDENTIFIER}) := ([@%]{IDENTIFIER});", line):
                target = value(update[1])
                if not isinstance(target, Param):
                    raise self.fail(f"{update[1]} is not a param, so it cannot be updated")
                updates.append((target, value(update[2])))
            elif result := re.fullmatch(r"return (.*);", line):
                outputs = tuple(value(ref.strip()) for ref in result[1].split(","))
            elif region := re.fullmatch(rf"((?:%{IDENTIFIER}(?:, )?)+) = region\((.*)\) \{{", line):
                names: list[str] = []
                operands: list[Value] = []
                attrs = self.arguments(region[2], value, operands, names)
                layer, inplace = str(attrs.pop("layer", "")), attrs.pop("inplace", ())
                arguments = tuple(Value(n, v.type) for n, v in zip(names, operands, strict=True))
                inner, last = self.body("region", arguments, "}")
                outs = self.outputs(region[1], last.removeprefix("} "))
                nodes.append(Node("region", tuple(operands), attrs, outs, layer, inplace, inner))
                scope |= {"%" + v.name: v for v in outs}
            elif call := re.fullmatch(rf"((?:%{IDENTIFIER}(?:, )?)+) = ([a-z0-9_.]+)\((.*)\) (/\* ty=.* \*/;)", line):
                if call[2] not in OPS:
                    raise self.fail(f"no operator named {call[2]}", "`tte ops` lists the operators")
                operands = []
                attrs = self.arguments(call[3], value, operands, None)
                layer, inplace = str(attrs.pop("layer", "")), attrs.pop("inplace", ())
                try:
                    attrs = OPS[call[2]].complete(attrs)
                    OPS[call[2]].check_call(len(operands), attrs)
                except InvalidType as problem:
                    raise self.fail(str(problem)) from problem
                outs = self.outputs(call[1], call[4])
                nodes.append(Node(call[2], tuple(operands), attrs, outs, layer, inplace))
                scope |= {"%" + v.name: v for v in outs}
            else:
                raise self.fail(f"cannot read {line[:60]!r}")
        graph = Graph(name, inputs, tuple(params), tuple(consts), tuple(nodes), outputs, tuple(updates))
        return graph, line

    def stored(self, key: str, type: TensorType) -> np.ndarray:
        if key not in self.data:
            return np.zeros(type.shape, type.numpy)
        array = np.asarray(self.data[key])
        if array.shape != type.shape or array.dtype != type.numpy:
            raise self.fail(f"@{key} is {type}, but its data is {array.shape} {array.dtype}")
        return array

    def outputs(self, left: str, right: str) -> tuple[Value, ...]:
        names = [ref.strip().removeprefix("%") for ref in left.split(",")]
        types = [self.type(t) for t in re.findall(r"Tensor\[.*?\](?=, Tensor| \*/)", right)]
        if len(names) != len(types):
            raise self.fail(f"{len(names)} values, but {len(types)} types in {right!r}")
        return tuple(Value(n, t) for n, t in zip(names, types, strict=True))

    def arguments(self, text, value, operands, names) -> dict:  # type: ignore[no-untyped-def, type-arg]
        """Fill ``operands`` (and, in a region, ``names``); return the keyword arguments."""
        attrs = {}
        for part in _split(text):
            keyword = re.match(rf"({IDENTIFIER})=(.*)", part, re.S)
            if names is not None and keyword and keyword[2][:1] in "@%":
                names.append(keyword[1])
                operands.append(value(keyword[2]))
            elif keyword and part[:1] not in "@%":
                attrs[keyword[1]] = self.literal(keyword[2])
            else:
                operands.append(value(part))
        return attrs

    def literal(self, text: str):  # type: ignore[no-untyped-def]
        try:
            return {"inf": float("inf"), "-inf": float("-inf")}.get(text) or ast.literal_eval(text)
        except (ValueError, SyntaxError) as problem:
            raise self.fail(f"{text!r} is not a number, string, bool or tuple") from problem

    def type(self, text: str) -> TensorType:
        match = re.fullmatch(r"Tensor\[\(([\d, ]*)\), (\w+)(?:, quant\((.*)\))?\]", text)
        if not match or match[2] not in DTYPES:
            raise self.fail(f"{text!r} is not a tensor type", f"element types: {', '.join(DTYPES)}")
        shape = tuple(int(d) for d in match[1].replace(" ", "").split(",") if d)
        if math.prod(shape) >= 2**31:
            raise self.fail(f"{text!r} is larger than any device", "give the tensor a smaller shape")
        quant = Quant(**{k: self.literal(v) for k, v in (p.split("=") for p in _split(match[3]))}) if match[3] else None
        return TensorType(shape, match[2], quant)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    parts, depth, quoted, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quoted:
            quoted = "" if c == quoted else quoted
        elif c in "\"'":
            quoted = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [p for p in [*parts, text[start:].strip()] if p]
