from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._channel_axes import Axes, Group, Ids, Member
from edgepress.passes._channel_choice import (
    Candidate,
    candidates,
    local,
    local_macs,
    ranked,
    ranked_macs,
    shrinkable,
)
from edgepress.passes._channels import analyse, cut
from edgepress.passes._macs import macs_after
from tests.graphs import Array
from tests.passes import channel_nets as nets
from tests.passes.channel_nets import BLOCKS, Block, Builder, cnn, transformer

NOTHING = np.empty(0, np.int64)
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def axes_of(write: Callable[[Builder], str]) -> Axes:
    """The channels of a net of this body; a last convolution reads what it returns."""
    b = Builder(0)
    return analyse(b.model((1, 3, 6, 6), write(b)))


def chain(*widths: int) -> Axes:
    """Groups of these sizes, one after the other."""

    def write(b: Builder) -> str:
        x, c = "x", 3
        for width in widths:
            x, c = b.relu(b.conv(x, c, width)), width
        return b.conv(x, c, 2)

    return axes_of(write)


def joined(one: int, two: int) -> Axes:
    """Two layers side by side, and a third that makes all of their channels."""

    def write(b: Builder) -> str:
        x = b.op("Concat", [b.conv("x", 3, one), b.conv("x", 3, two)], axis=1)
        return b.conv(b.op("Add", [x, b.conv("x", 3, one + two)]), one + two, 2)

    return axes_of(write)


def free(axes: Axes) -> list[Group]:
    return [group for group in axes.groups() if len(group.free)]


def rank(
    axes: Axes, scores: list[Array] | None = None, align: int = 1, min_channels: int = 1
) -> list[Candidate]:
    """Rank by these scores; without any, channels go in ascending order."""
    groups = free(axes)
    scores = scores or [1 + np.arange(len(g.channels)) / 1000 for g in groups]
    return candidates(groups, scores, axes.parts, align, min_channels)


def sizes(ranking: list[Candidate]) -> list[list[tuple[int, ...]]]:
    return [[(len(c.channels), *c.sizes) for c in candidate.cells] for candidate in ranking]


def left(axes: Axes, cuts: Ids) -> list[int]:
    return [len(group.channels) - int(np.isin(group.channels, cuts).sum()) for group in free(axes)]


@pytest.mark.parametrize(
    ("width", "align", "min_channels", "allowed"),
    [
        (40, 16, 1, (40, 32, 16)),
        (48, 16, 1, (48, 48, 32, 16)),
        (24, 16, 1, (24, 16)),
        (16, 16, 1, (16, 16)),
        (12, 16, 1, (12, 12)),
        (5, 1, 1, (5, 5, 4, 3, 2, 1)),
        (48, 16, 17, (48, 48, 32)),
        (40, 16, 33, (40, 40)),
        (5, 1, 4, (5, 5, 4)),
    ],
)
def test_what_remains_fills_vectors(
    width: int, align: int, min_channels: int, allowed: tuple[int, ...]
) -> None:
    axes = chain(width)
    assert sizes(rank(axes, align=align, min_channels=min_channels)) == [[allowed]]
    assert shrinkable(free(axes)[0], align, min_channels) == (len(set(allowed)) > 1)


def test_heads_are_counted_in_elements() -> None:
    axes = analyse(transformer("separate", 0))  # heads of 6 elements
    _, heads, _ = free(axes)
    for align, allowed in (
        (2, (4, 4, 3, 2, 1)),
        (4, (4, 4, 2)),
        (6, (4, 4, 3, 2, 1)),
        (16, (4, 4)),
    ):
        assert sizes(rank(axes, align=align))[1] == [allowed]
        assert shrinkable(heads, align, 1) == (len(set(allowed)) > 1)


def test_every_layer_of_a_group_fills_vectors() -> None:
    # 9 channels and 18 behind a depthwise convolution of multiplier 2
    assert sizes(rank(analyse(cnn([nets.depthwise], 0)), align=4))[1] == [(9, 8, 4)]
    # keys and values have 6 elements per pair of heads, queries 12
    assert sizes(rank(analyse(transformer("grouped", 0)), align=4))[1] == [(2, 2)]
    assert sizes(rank(analyse(transformer("grouped", 0)), align=2))[1] == [(2, 2, 1)]


def test_layers_side_by_side_are_counted_one_by_one() -> None:
    assert sizes(rank(joined(32, 48), align=16)) == [[(32, 32, 16), (48, 48, 32, 16)]]
    # 24 + 40 fill vectors together; a cut that left 24 + 32 would not
    axes = joined(24, 40)
    ranking = rank(axes, align=16)
    assert sizes(ranking) == [[(24, 16), (40, 32, 16)]]
    assert len(ranking[0].trimmed) == 16
    group = free(axes)[0]
    assert remaining(group, local(ranking, [0.2])) == [16, 32, 48]
    assert remaining(group, ranked(ranking, 0.2)) == [16, 32, 48]
    assert remaining(group, ranked(ranking, 0.5)) == [16, 16, 32]
    # 24 is nearer to its share than 16 is, but 40 is not
    assert remaining(group, local(ranking, [0.15])) == [16, 32, 48]
    assert remaining(group, local(ranking, [0.05])) == [24, 40, 64]
    # what can fill no vector stays
    assert sizes(rank(joined(6, 40), align=16)) == [[(6, 6), (40, 32, 16)]]


@pytest.mark.parametrize("min_channels", [1, 5, 6, 7])
def test_a_group_of_several_layers_keeps_enough(min_channels: int) -> None:
    axes = joined(3, 4)
    kept = left(axes, local(rank(axes, min_channels=min_channels), [1.0]))
    assert min_channels <= kept[0] <= min_channels + 1
    assert sizes(rank(joined(32, 48), min_channels=40))[0][0][-1] == 16


def remaining(group: Group, cuts: Ids) -> list[int]:
    return [len(m.channels) - int(np.isin(m.channels, cuts).sum()) for m in group.producers]


def test_the_parts_of_a_split_fill_vectors_where_they_did() -> None:
    def write(one: int, two: int) -> Callable[[Builder], str]:
        def net(b: Builder) -> str:
            x = b.conv("x", 3, one + two)
            parts = b.op("Split", [x, b.ints(one, two)], outputs=2, axis=1)
            read = [b.conv(x, n, 2) for x, n in zip(parts, (one, two), strict=True)]
            return str(b.op("Add", read))

        return net

    assert sizes(rank(axes_of(write(16, 24)), align=8)) == [[(16, 16, 8), (24, 24, 16, 8)]]
    assert sizes(rank(axes_of(write(6, 10)), align=8)) == [[(16, 16, 8)]]


def test_frozen_channels_stay() -> None:
    def write(b: Builder) -> str:
        x = b.conv("x", 3, 8)
        given = b.op("Concat", ["x", b.op("Slice", [x, b.ints(0), b.ints(5), b.ints(1)])], axis=1)
        wide = b.op("Add", [given, b.conv(given, 8, 8)])
        return str(b.op("Add", [b.conv(x, 8, 2), b.conv(wide, 8, 2)]))

    axes = axes_of(write)
    (group,) = free(axes)
    assert int(group.frozen.sum()) == 3
    rng = np.random.default_rng(0)
    for align in (1, 2, 4):
        ranking = rank(axes, [rng.random(len(group.channels))], align)
        cuts = local(ranking, [1.0])
        assert not np.isin(cuts, group.channels[group.frozen]).any()
        cut_copy(axes, cuts)


def cut_copy(axes: Axes, cuts: Ids) -> None:
    """What `cut` refuses, without a model."""
    assert not set(cuts.tolist()) & set(axes.frozen)
    assert len(set(cuts.tolist())) == len(cuts)
    for part in axes.parts:
        assert not np.isin(part, cuts).all()


def test_the_best_channel_of_a_part_stays_and_the_width_is_kept() -> None:
    axes = analyse(cnn([nets.split], 0))
    groups = free(axes)
    scores = [np.ones(len(g.channels)) for g in groups]
    scores[1] = np.array([1.0, 2, 3, 6, 5, 4, *range(20, 30)])  # the first part is 6 channels
    cuts = local(rank(axes, scores, align=4), [0, 0.75, 0, 0])
    kept = ~np.isin(groups[1].channels, cuts)
    assert np.flatnonzero(kept).tolist() == [3, 13, 14, 15]
    cut_copy(axes, cuts)


def test_local_takes_the_nearest_size() -> None:
    axes = chain(40, 64, 24)
    ranking = rank(axes, align=16)
    assert left(axes, local(ranking, [0.3] * 3)) == [32, 48, 16]
    assert left(axes, local(ranking, [0.1, 0.5, 0.1])) == [40, 32, 24]
    assert left(axes, local(ranking, [0.99] * 3)) == [16, 16, 16]
    # as near to 36 as to 32: the larger stays
    assert left(axes, local(ranking, [0.1] * 3)) == [40, 64, 24]
    assert local(ranking, [0.0] * 3).tolist() == []


def test_the_least_important_go_first_and_ties_go_in_order() -> None:
    axes = chain(6)
    (group,) = free(axes)
    cuts = local(rank(axes, [np.array([3.0, 1, 1, 0, 1, 2])]), [0.5])
    assert group.places(cuts).tolist() == [3, 1, 2]
    axes = chain(60)
    cuts = local(rank(axes, [np.tile([2.0, 1.0], 30)]), [0.25])
    assert free(axes)[0].places(cuts).tolist() == list(range(1, 30, 2))


def test_ranked_compares_groups_relative_to_their_means() -> None:
    axes = chain(4, 4)
    one, two = free(axes)
    # relative to their means: 0.4 0.8 1.2 1.6 and 0.2 0.6 1.4 1.8
    scores = [np.array([1.0, 2, 3, 4]), np.array([100.0, 300, 700, 900])]
    cuts = ranked(rank(axes, scores), 0.375)
    assert two.places(cuts).tolist() == [0, -1, 1]
    assert one.places(cuts).tolist() == [-1, 0, -1]


def test_every_step_is_ranked_by_its_own_channels() -> None:
    axes = chain(4, 4)
    one, two = free(axes)
    scores = [np.array([0.1, 0.9, 1.0, 2.0]), np.array([0.6, 0.8, 1.2, 1.4])]
    cuts = ranked(rank(axes, scores), 0.375)
    assert one.places(cuts).tolist() == [0, -1, -1]
    assert two.places(cuts).tolist() == [-1, 0, 1]


def test_ranked_cuts_as_near_to_the_amount_as_steps_allow() -> None:
    axes = chain(32, 32)
    ranking = rank(axes, align=16)
    for amount, count in ((0.12, 0), (0.13, 16), (0.37, 16), (0.38, 32), (0.99, 32)):
        assert len(ranked(ranking, amount)) == count


def test_ranked_counts_elements() -> None:
    axes = analyse(transformer("separate", 0))
    width, heads, hidden = free(axes)
    scores = [np.full(len(g.channels), 1.0) for g in (width, heads, hidden)]
    scores[1][0] = 0.5
    # 24 + 4 heads of 6 + 40 elements: one head is 1/15 of them, and the least important
    assert ranked(rank(axes, scores), 0.04).tolist() == [heads.channels[0]]
    assert len(ranked(rank(axes, scores), 0.1)) == 1 + 3
    assert ranked(rank(axes, scores), 0.03).tolist() == []


def test_no_group_collapses_before_all_are_small() -> None:
    axes = chain(100, 100)
    uneven, even = np.full(100, 0.001), np.full(100, 1.0)
    uneven[0] = 100
    for amount, floor in ((0.3, 49), (0.5, 25)):
        kept = left(axes, ranked(rank(axes, [uneven, even]), amount))
        assert kept == [floor, 200 - round(200 * amount) - floor]
    # where more is asked for than floors allow, they give way
    assert sum(left(axes, ranked(rank(axes, [uneven, even], min_channels=20), 0.75))) == 50
    assert left(axes, ranked(rank(axes, [uneven, even], min_channels=20), 0.9)) == [20, 20]


def test_no_group_collapses_before_others_save_work() -> None:
    axes = chain(100, 100)
    uneven, even = np.full(100, 0.001), np.full(100, 1.0)
    uneven[0] = 100
    one, two = free(axes)

    def macs(cuts: Ids) -> float:
        gone = [np.isin(group.channels, cuts).mean() for group in (one, two)]
        return float(1 - gone[0]) + float(1 - gone[1])

    kept = left(axes, ranked_macs(rank(axes, [uneven, even]), 0.2, macs))
    assert kept == [72, 88]


def counted(axes: Axes, model: ir.Model) -> tuple[Callable[[Ids], float], list[int]]:
    calls: list[int] = []
    count = macs_after(model, axes)

    def macs(cuts: Ids) -> float:
        calls.append(len(cuts))
        return count(cuts)

    return macs, calls


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.3, 0.5, 0.8])
def test_ranked_macs_stops_as_soon_as_enough_is_saved(amount: float) -> None:
    model = cnn([nets.residual, nets.squeeze_excite, nets.depthwise, nets.concat], 3)
    axes = analyse(model)
    rng = np.random.default_rng(1)
    ranking = rank(axes, [rng.random(len(g.channels)) for g in free(axes)])
    macs, calls = counted(axes, model)
    cuts = ranked_macs(ranking, amount, macs)
    steps = sum(len(g.channels) for g in free(axes))
    assert len(calls) <= 2 + steps + math.ceil(math.log2(steps))
    limit = macs(NOTHING) * (1 - amount)
    assert macs(cuts) <= limit
    assert amount == 0 or macs(cuts[:-1]) > limit
    assert amount > 0 or not len(cuts)


def test_of_channels_that_matter_alike_those_that_save_most_go() -> None:
    """Two groups with equal scores; cutting a channel of one saves 9 times as much work."""
    b = nets.Builder(0)
    cheap = b.conv(b.relu(b.conv("x", 3, 12)), 12, 5)
    dear = b.conv(b.relu(b.conv("x", 3, 12, 3)), 12, 5, 3)
    axes = analyse(model := b.model((1, 3, 6, 6), b.op("Add", [cheap, dear])))
    macs = macs_after(model, axes)
    groups = [group for group in free(axes) if len(group.channels) == 12]
    ranking = candidates(groups, [np.ones(12)] * 2, axes.parts, 1, 1)
    cuts = ranked_macs(ranking, 0.15, macs)
    assert np.isin(cuts, groups[1].channels).all()
    # even where its channels seem to matter 8 times as much
    scores = [np.array([1.0] * 6 + [0.125] * 6), np.ones(12)]
    ranking = candidates(groups, scores, axes.parts, 1, 1)
    assert np.isin(ranked_macs(ranking, 0.15, macs), groups[1].channels).all()


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.8])
def test_local_macs_cuts_the_least_share_that_saves_enough(amount: float) -> None:
    model = cnn([nets.residual, nets.squeeze_excite, nets.plain], 0)
    axes = analyse(model)
    ranking = rank(axes)
    macs, _ = counted(axes, model)
    cuts = local_macs(ranking, amount, macs)
    limit = macs(NOTHING) * (1 - amount)
    assert macs(cuts) <= limit
    shares = np.linspace(0, 1, 400)
    enough = [s for s in shares if macs(local(ranking, [s] * len(ranking))) <= limit]
    assert len(local(ranking, [enough[0]] * len(ranking))) == len(cuts)


def test_where_macs_cannot_be_saved_all_that_may_go_goes() -> None:
    model = cnn([nets.plain], 0)
    axes = analyse(model)
    macs, _ = counted(axes, model)
    ranking = rank(axes, align=8)
    assert left(axes, ranked_macs(ranking, 0.99, macs)) == [8, 8, 8]
    assert left(axes, local_macs(ranking, 0.99, macs)) == [8, 8, 8]


def test_nothing_to_rank_cuts_nothing() -> None:
    assert ranked([], 0.5).tolist() == []
    assert local([], []).tolist() == []
    assert ranked_macs([], 0.5, lambda _: 10.0).tolist() == []
    assert candidates([], [], [np.array([1])], 4, 1) == []


def kinds(group: Group) -> list[list[int]]:
    """Channels by what makes them: those with equal numbers of elements in every layer."""
    found: dict[tuple[int, ...], list[int]] = {}
    counts = [Counter(member.elements.tolist()) for member in group.producers]
    for channel in group.channels.tolist():
        found.setdefault(tuple(count[channel] for count in counts), []).append(channel)
    return list(found.values())


def width(member: Member, channels: list[int]) -> int:
    return int(np.isin(member.elements, channels).sum())


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    align=st.sampled_from([1, 2, 3, 4, 8]),
    amount=st.sampled_from([0.1, 0.3, 0.6, 0.95]),
    min_channels=st.sampled_from([1, 5]),
    how=st.sampled_from(["local", "ranked", "local_macs", "ranked_macs"]),
)
def test_every_choice_can_be_cut_and_fills_vectors(
    blocks: list[Block], seed: int, align: int, amount: float, min_channels: int, how: str
) -> None:
    model = cnn(blocks, seed)
    axes = analyse(model)
    rng = np.random.default_rng(seed)
    ranking = rank(axes, [rng.random(len(g.channels)) for g in free(axes)], align, min_channels)
    macs = macs_after(model, axes)
    cuts = {
        "local": lambda: local(ranking, [amount] * len(ranking)),
        "ranked": lambda: ranked(ranking, amount),
        "local_macs": lambda: local_macs(ranking, amount, macs),
        "ranked_macs": lambda: ranked_macs(ranking, amount, macs),
    }[how]()
    for group in free(axes):
        gone = np.isin(group.channels, cuts)
        assert not gone.any() or len(gone) - gone.sum() >= min_channels
        for channels in kinds(group):
            kept = [channel for channel in channels if channel not in set(cuts.tolist())]
            whole = len(kept) == len(channels)
            for member in group.producers:
                if member.node.op_type in LAYERS:
                    assert whole or width(member, kept) % align == 0
                    assert whole or kept
    cut(model, axes, cuts.tolist())
