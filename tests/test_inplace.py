"""Working in place: where the contract allows it, and nowhere else."""

import numpy as np
import pytest
from hypothesis import given, settings
from programs import programs, sample

from tte.ir import Graph, InvalidGraph, evaluate, parse, verify
from tte.passes.inplace import work_in_place


def taken(text: str) -> list[int | None]:
    return [node.inplace[0] if node.inplace else None for node in verify(work_in_place(verify(parse(text)))).nodes]


def program(body: str, params: str = "") -> str:
    return f"def @p(%x: Tensor[(4,), float32]) {{\n{params}{body}}}\n"


V4, V22 = "/* ty=Tensor[(4,), float32] */;\n", "/* ty=Tensor[(2, 2), float32] */;\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # A graph input is not ours to write; what dies is taken; the second operand serves when the first lives on.
        (f"%0 = nn.relu(%x) {V4}%1 = exp(%0) {V4}return %1;\n", [None, 0]),
        (f"%0 = exp(%x) {V4}%1 = nn.relu(%0) {V4}%2 = add(%0, %1) {V4}return %2;\n", [None, None, 0]),
        (f"%0 = exp(%x) {V4}%1 = nn.relu(%0) {V4}%2 = add(%0, %1) {V4}return %0, %2;\n", [None, None, 1]),
        (f"%0 = exp(%x) {V4}%1 = add(%0, %0) {V4}return %1;\n", [None, 0]),
        (f"%0 = exp(%x) {V4}%1 = nn.relu(%0) {V4}return %0, %1;\n", [None, None]),
        # A view keeps the buffer alive, and is a way to it.
        (
            f"%0 = exp(%x) {V4}%1 = reshape(%0, newshape=(2, 2)) {V22}%2 = nn.relu(%0) {V4}%3 = exp(%1) {V22}"
            "return %2, %3;\n",
            [None, None, None, 0],
        ),
        # The contract of softmax does not allow it; a mask has another size.
        (
            f"%0 = exp(%x) {V4}%1 = nn.softmax(%0) {V4}%2 = nn.mask(%1) /* ty=Tensor[(4,), bit] */;\nreturn %2;\n",
            [None, None, None],
        ),
    ],
)
def test_known_cases(body: str, expected: list[int | None]) -> None:
    assert taken(program(body)) == expected


def test_only_the_update_is_written_over_a_param() -> None:
    params = "param @w: Tensor[(4,), float32];\nparam @v: Tensor[(4,), float32];\n"
    update = f"%0 = exp(%x) {V4}%1 = subtract(@w, %0) {V4}%2 = add(%1, @v) {V4}"
    # @w is updated; @v is not.
    assert taken(program(update + "@w := %1;\nreturn %2;\n", params)) == [None, 0, None]
    # Better over the param than over a buffer that dies as well: nothing has to be copied.
    assert taken(program(update + "@v := %2;\nreturn %0;\n", params)) == [None, None, 1]
    # The old value is read later.
    late = f"%0 = subtract(@w, %x) {V4}%1 = add(@w, %x) {V4}@w := %0;\nreturn %1;\n"
    assert taken(program(late, params)) == [None, None]


REGION = """
def @p(%x: Tensor[(1, 4), float32], %x2: Tensor[(4,), float32]) {
  const @w: Tensor[(4, 4), float32];
  %0 = exp(%x) /* ty=Tensor[(1, 4), float32] */;
  %1 = OPERAND /* ty=Tensor[(4,), float32] */;
  %2 = region(a0=%0, a1=%1, a2=@w, strategy='fused') {
    %0 = nn.dense(%a0, %a2) /* ty=Tensor[(1, 4), float32] */;
    %1 = reshape(%0, newshape=(4,)) /* ty=Tensor[(4,), float32] */;
    %2 = add(%1, %a1) /* ty=Tensor[(4,), float32] */;
    return %2;
  } /* ty=Tensor[(4,), float32] */;
  return %2;
}
"""


def test_region_takes_over_what_it_reads_at_the_same_index() -> None:
    assert taken(REGION.replace("OPERAND", "exp(%x2)")) == [None, None, 1]


def test_region_leaves_alone_what_its_anchor_reads_under_another_name() -> None:
    shared = REGION.replace("OPERAND", "reshape(%0, newshape=(4,))")
    assert taken(shared) == [None, None, None]
    with pytest.raises(InvalidGraph, match="at another index"):
        verify(parse(shared.replace("strategy=", "inplace=(1,), strategy=")))


@settings(deadline=None)
@given(programs(12))
def test_meaning_is_kept(graph: Graph) -> None:
    after = verify(work_in_place(graph))
    assert verify(work_in_place(after)) == after
    one, other = evaluate(graph, sample(graph)), evaluate(after, sample(graph))
    for a, b in zip(one.outputs, other.outputs, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in one.params.items():
        np.testing.assert_array_equal(other.params[name], value)
