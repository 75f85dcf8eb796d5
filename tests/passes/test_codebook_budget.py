from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest

from edgepress.passes._codebook_budget import RUNGS, BudgetTooSmall, Item, fits_within
from edgepress.passes._kmeans import Fit, Line
from tests.graphs import Array, random


def item(values: Array, worth: float = 1.0, **options: float) -> Item:
    line = Line(values)
    return Item(
        points=line,
        fit=lambda clusters: line.lloyd(line.plus_plus(clusters, np.random.default_rng(0))),
        worth=worth,
        raw_bits=32 * len(values),
        **options,  # type: ignore[arg-type]
    )


def silent(_what: str, _done: int, _total: int) -> None:
    pass


def chosen(items: Sequence[Item], **budget: float) -> list[Fit | None]:
    return fits_within(items, progress=silent, **budget)


def totals(items: Sequence[Item], fits: Sequence[Fit | None]) -> tuple[float, float]:
    pairs = list(zip(items, fits, strict=True))
    return sum(i.bits(f) for i, f in pairs), sum(i.error(f) for i, f in pairs)


def three() -> list[Item]:
    """Of which the second matters most, and the last has few numbers."""
    return [
        item(random(3000)),
        item(np.random.default_rng(1).laplace(size=2000) * 0.1, 900.0),
        item(random(40, seed=2), 30.0),
    ]


@pytest.mark.parametrize("bits", [4_000, 9_000, 16_000, 25_000])
def test_a_budget_of_bits_is_kept_and_used_up(bits: int) -> None:
    items = three()
    used, _ = totals(items, chosen(items, bits=bits))
    assert 0.98 * bits <= used <= bits


@pytest.mark.parametrize("error", [300.0, 60.0, 10.0])
def test_a_budget_of_error_is_kept_and_used_up(error: float) -> None:
    items = three()
    _, lost = totals(items, chosen(items, error=error))
    assert 0.95 * error <= lost <= error


def test_no_choice_of_plain_codebooks_is_better() -> None:
    items = three()
    for bits in (6_000, 12_000, 20_000):
        _, lost = totals(items, chosen(items, bits=bits))
        plain = [[*each.ladder(), None] for each in items]
        within = [
            error
            for used, error in (totals(items, fits) for fits in product(*plain))
            if used <= bits
        ]
        assert lost < min(within)


def test_more_bits_mean_less_error() -> None:
    items = three()
    found = [totals(items, chosen(items, bits=bits)) for bits in (5_000, 10_000, 20_000)]
    for (_, more), (_, less) in pairwise(found):
        assert less < more


def test_bits_go_where_they_are_worth_most() -> None:
    values = random(30_000)
    items = [item(values), item(values, 64.0)]
    cheap, dear = chosen(items, bits=200_000)
    assert cheap is not None
    assert dear is not None
    # one price for all: the same slope is the same error, in the units of all
    assert cheap.error == pytest.approx(64 * dear.error, rel=0.2)
    assert dear.index_bits - cheap.index_bits == pytest.approx(30_000 * 3, rel=0.1)


def test_what_a_codebook_makes_no_smaller_stays() -> None:
    items = [item(random(20), 1e6), item(random(3000))]
    few, many = chosen(items, bits=12_000)
    assert few is None
    assert many is not None


def test_a_large_budget_leaves_all_as_it_is() -> None:
    items = three()
    assert chosen(items, bits=32 * 5041) == [None] * 3
    assert chosen(items, error=1e-12) == [None] * 3


def test_a_large_error_leaves_one_cluster() -> None:
    items = three()
    for fit in chosen(items, error=1e9):
        assert fit is not None
        assert len(fit.codebook) == 1


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    items = [item(random(3000)), item(random(1), 1.0, zero_bits=100.0)]
    with pytest.raises(BudgetTooSmall) as caught:
        chosen(items, bits=60)
    assert caught.value.bits == 36 + 32
    assert totals(items, chosen(items, bits=68))[0] == 68


def test_numbers_that_share_values_already_stay_where_that_is_cheap() -> None:
    values = np.random.default_rng(0).choice(random(13), 4000)
    (fit,) = chosen([item(values)], bits=17_000)
    assert fit is not None
    np.testing.assert_array_equal(fit.codebook.astype(np.float32), np.unique(values))
    assert fit.error == pytest.approx(0, abs=1e-9)


def test_zeros_cost_what_they_are_said_to() -> None:
    each = item(random(500), zero_bits=77.0)
    (fit,) = chosen([each], bits=2_000)
    assert fit is not None
    assert each.bits(fit) == fit.bits + 77
    assert each.bits(None) == 16_000


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (5, (1, 2, 3, 4, 5)), (8, RUNGS[:6])])
def test_a_ladder_ends_at_the_most(most: int, sizes: tuple[int, ...]) -> None:
    ladder = item(random(300), most=most).ladder()
    assert tuple(len(fit.codebook) for fit in ladder) == sizes
    assert [len(fit.codebook) for fit in item(random(5)).ladder()] == [1, 2, 3, 4, 5]


def test_progress_is_told() -> None:
    told: list[str] = []
    fits_within(
        [item(random(300))], bits=1000, progress=lambda what, _done, _total: told.append(what)
    )
    assert set(told) == {"cluster weights", "choose clusters"}
