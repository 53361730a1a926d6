"""Estimates of cycles: blocks as llvm-mca is to see them, and what becomes of its answer."""

import itertools

import pytest

from tte.errors import TTEError
from tte.runner.cycles import UNIT, Estimator, find_estimator
from tte.target import CORTEX_M4, CORTEX_M7, find_target

ADD, OTHER = "00 eb 01 00", "01 eb 02 05"  # add.w r0, r0, r1; add.w r5, r1, r2
MULTIPLY = "11 fb 02 11"  # smlabb r1, r1, r2, r1
DIVIDE = "91 fb f2 f1"  # sdiv r1, r1, r2


@pytest.fixture(scope="module")
def m7() -> Estimator:
    try:
        return find_estimator(CORTEX_M7)
    except TTEError as problem:
        pytest.skip(str(problem))


def estimate(estimator: Estimator, *blocks: str) -> list[float]:
    """Cycles of each."""
    places = itertools.count(0x0800_0000, 64)
    code = {(next(places), len(data)): data for data in map(bytes.fromhex, blocks)}
    return [cycles / UNIT for cycles in estimator.estimate(code).values()]


def test_what_waits_for_itself_takes_longer(m7: Estimator) -> None:
    free, chain, long = estimate(m7, ADD + OTHER, ADD + ADD, DIVIDE)
    assert free == pytest.approx(1, rel=0.05)  # two at a time
    assert chain == pytest.approx(2, rel=0.05)
    assert long > 2 * chain
    one, ten = estimate(m7, MULTIPLY, 10 * MULTIPLY)
    assert ten == pytest.approx(10 * one, rel=0.1)


def test_cores_have_models_of_their_own(m7: Estimator) -> None:
    assert estimate(find_estimator(CORTEX_M4), ADD + OTHER)[0] > 1.8 * estimate(m7, ADD + OTHER)[0]
    with pytest.raises(TTEError, match="no model of the cortex-m0plus"):
        estimate(find_estimator(find_target("cortex-m0plus")), ADD)


def test_conditions_calls_and_what_a_model_leaves_out(m7: Estimator) -> None:
    plain = estimate(m7, "08 46 11 46")  # mov r0, r1; mov r1, r2
    assert estimate(m7, "0c bf 08 46 11 46") == plain  # ite eq before
    assert estimate(m7, "0c bf", "08 46 11 46")[1:] == plain  # a block that ends within: the next is another
    call, jump = estimate(m7, "ff f7 fe ff", "ff f7 fe bf")  # bl, b
    assert call == jump < 5
    with_compare, without = estimate(m7, "b5 ee c0 0a" + ADD, ADD)  # vcmp.f32 s0, #0 before
    assert without + 0.4 < with_compare < without + 2.5
    assert estimate(m7, "") == [0]


def test_without_llvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TTEError, match="llvm-mca 13 or later") as error:
        find_estimator(CORTEX_M7)
    assert error.value.code == "TTE-E051"
