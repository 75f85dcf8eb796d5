"""The search makes few models and ends at the shortest that holds, whatever predictions say."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.pipeline.precision_search import Figures, PrefixSearch

LIMIT_DB = 30.0


def holds(figures: Figures) -> bool:
    return bool(figures["sqnr_db"] >= LIMIT_DB)


def figures(sqnr_db: float) -> Figures:
    return {"sqnr_db": sqnr_db, "drop": None}


def made(
    count: int, real: Callable[[int], float], said: Callable[[int], float]
) -> tuple[PrefixSearch, list[int]]:
    """Search to the end; return the lengths that were made, in order."""
    search = PrefixSearch(count, figures(real(0)), lambda length: figures(said(length)), holds)
    lengths: list[int] = []
    while (length := search.next()) is not None:
        assert 1 <= length <= count
        assert length not in lengths
        lengths.append(length)
        search.tell(length, figures(real(length)))
    return search, lengths


def line(needed: float, slope: float = 0.1) -> Callable[[int], float]:
    return lambda length: LIMIT_DB + slope * (length - needed)


def test_a_right_prediction_needs_one_model() -> None:
    search, lengths = made(100, line(37), line(37))
    assert lengths == [37]
    assert search.found


def test_a_constant_error_of_the_prediction_is_corrected_before_the_first_model() -> None:
    assert made(100, line(37), lambda length: line(37)(length) + 3)[1] == [37]


def test_one_that_is_too_sure_of_moves_is_corrected_by_a_model() -> None:
    """The prediction thinks more of every move than it is worth."""
    _, lengths = made(100, line(40), lambda length: line(40)(0) + 0.2 * length)
    assert lengths == [20, 30, 35, 43, 40]


def test_one_that_is_too_shy_is_lowered() -> None:
    _, lengths = made(100, line(20), lambda length: line(20)(0) + 0.05 * length)
    assert lengths == [40, 20]


def test_all_is_tried_before_giving_up() -> None:
    search, lengths = made(50, line(90), line(90))
    assert lengths == [50]
    assert not search.found
    assert search.hopeless()


def test_steps_grow_while_nothing_holds() -> None:
    """Every model misses by a hair, so the prediction always asks for one move more."""
    never: list[int] = []
    search = PrefixSearch(100, figures(29.95), lambda length: figures(29.95 + length / 10), holds)
    while (length := search.next()) is not None:
        never.append(length)
        search.tell(length, figures(29.95))
    assert never == [1, 3, 7, 15, 31, 63, 100]
    assert not search.found


def test_lowering_ends_after_three_models() -> None:
    """The first move alone would do, which predictions know nothing of."""
    _, lengths = made(90, lambda length: 40.0 if length else 20.0, lambda _length: 20.0)
    assert lengths == [90, 45, 23, 12]


def test_no_moves_are_no_search() -> None:
    search, lengths = made(0, line(5), line(5))
    assert (search.found, lengths) == (False, [])


def test_a_figure_that_nobody_knows_is_not_corrected() -> None:
    search = PrefixSearch(3, figures(20.0), lambda _length: {"sqnr_db": 35.0, "drop": 1.0}, holds)
    assert search.next() == 3, "15 dB too much was promised"


@settings(deadline=None, max_examples=200)
@given(
    count=st.integers(1, 150),
    needed=st.integers(1, 200),
    gain=st.floats(0.2, 5),
    bend=st.floats(-3, 3),
)
def test_it_ends_and_holds_where_all_moves_do(
    count: int, needed: int, gain: float, bend: float
) -> None:
    real = line(needed)

    def said(length: int) -> float:
        return line(needed, 0.1 * gain)(length) + bend * (length % 7) / 7

    search, lengths = made(count, real, said)
    assert search.found == (count >= needed)
    assert len(lengths) <= 12
    if search.found:
        assert min(length for length in lengths if length >= needed) >= needed
    else:
        assert lengths[-1] == count
