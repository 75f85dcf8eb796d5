"""Which channels of every group to cut, from their scores and the amount that is asked for.

What remains of a layer is a multiple of the target's vector width, since a vector that is not full
costs as much as a full one. A group may hold the channels of several layers side by side: behind a
Concat, a residual connection joins what two layers make with what a third one makes. So channels
are counted by cell, the channels that the same layers make: where every cell is a multiple of the
vector width, every layer is.

Layers differ in the scale of their scores, so scores are divided by their mean in the group. That
does not tell how much the model depends on a group, and ranking all channels together can cut a
group whose scores are spread wide down to almost nothing while others stay whole: layer collapse,
as in Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
flow", 2020, section 3. Therefore a group keeps the square of the share that is kept on average,
49 % where 30 % are cut, until all others are down to that, too; and its cube where cuts are priced
by the work that they save.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgepress.calibration.base import Array
from edgepress.passes._channel_axes import Group, Ids, Member

#: Multiply-accumulates that remain when these channels are cut.
Macs = Callable[[Ids], float]
_BISECTIONS = 24
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """Channels of a group that the same layers make.

    Attributes:
        channels: `[n]` in the order in which they are cut; those that must stay come last.
        scores: `[n]` importance of each, relative to the mean of the group.
        width: elements of the widest layer that belong to one channel.
        sizes: how many may remain once the group is cut at all, in descending order. The first is
            `n` where that fills vectors or where nothing less does.
    """

    channels: Ids
    scores: Array
    width: int
    sizes: tuple[int, ...]

    def cut(self, remaining: int) -> Ids:
        """Return the channels to cut so that this many remain."""
        return self.channels[: len(self.channels) - remaining]


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """A group whose channels are ranked.

    It is whole, or each of its cells has one of its sizes: a cell that does not fill its vectors is
    trimmed with the first cut, as it leaves a rest in every layer that shares it.

    Attributes:
        group: the group.
        cells: its channels.
    """

    group: Group
    cells: tuple[Cell, ...]

    @property
    def trimmed(self) -> Ids:
        """The channels that go with the first cut because they do not fill a vector."""
        return _concatenated([cell.cut(cell.sizes[0]) for cell in self.cells])

    def share(self, amount: float) -> Ids:
        """Return what to cut so that every cell loses this share, to the nearest size."""
        chosen = [_nearest(cell, len(cell.channels) * (1 - amount)) for cell in self.cells]
        if all(size == len(cell.channels) for size, cell in zip(chosen, self.cells, strict=True)):
            return _concatenated([])
        return _concatenated(
            [
                cell.cut(min(size, cell.sizes[0]))
                for size, cell in zip(chosen, self.cells, strict=True)
            ]
        )


#: What a cut costs, from its group, its channels and their scores: the least is made first.
_Price = Callable[[Candidate, Ids, Array], float]


def candidates(
    groups: Sequence[Group],
    scores: Sequence[Array],
    parts: Sequence[Ids],
    align: int,
    min_channels: int,
) -> list[Candidate]:
    """Rank the channels of groups.

    Args:
        groups: the groups.
        scores: `[n]` importance of the channels of each.
        parts: sets of channels; the best one of each is kept, as `cut` needs one.
        align: elements of a vector.
        min_channels: no group keeps fewer.
    """
    relative = [found / (float(found.mean()) or 1.0) for found in scores]
    stay = _best_of_parts(groups, relative, parts)
    ranking = []
    for group, found, best in zip(groups, relative, stay, strict=True):
        last = np.where(group.frozen | best, np.inf, found)
        cells = []
        for block in _blocks(group, align):
            order = block.places[np.argsort(last[block.places], kind="stable")]
            cells.append(
                Cell(
                    channels=group.channels[order],
                    scores=found[order],
                    width=block.width,
                    sizes=_sizes(group, block, np.isinf(last), min_channels),
                )
            )
        ranking.append(Candidate(group=group, cells=tuple(cells)))
    return ranking


def shrinkable(group: Group, align: int, min_channels: int) -> bool:
    """Tell whether a group may lose channels, whatever their scores are."""
    return any(
        _sizes(group, block, group.frozen, min_channels) != (len(block.places),)
        for block in _blocks(group, align)
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Block:
    """Where the channels of a cell are.

    Attributes:
        places: `[n]` in the group, ascending.
        step: the least number of channels that fills vectors in every layer.
        width: elements of the widest layer that belong to one channel.
    """

    places: Ids
    step: int
    width: int


def _blocks(group: Group, align: int) -> list[_Block]:
    """Return the cells of a group, in the group's order.

    Channels that the same layers make are told apart by the layers that read them, too, where that
    leaves whole vectors: so the parts of a Split stay multiples as well.
    """
    made = _elements(group, group.producers)
    read = _elements(group, group.readers)
    # tables that are only looked up in, such as position biases per head, need no full vectors
    weighted = np.array([m.node.op_type in _WEIGHTED for m in group.producers])
    found = []
    for places in _alike(made):
        widths = made[:, places[0]]
        counted = widths[weighted] if widths[weighted].any() else widths
        step = math.lcm(*(align // math.gcd(align, int(width)) for width in counted if width))
        finer = [places[part] for part in _alike(read[:, places])]
        for part in [places] if any(len(part) % step for part in finer) else finer:
            found.append(_Block(places=part, step=step, width=int(widths.max())))
    return sorted(found, key=lambda block: int(block.places[0]))


def _elements(group: Group, members: Sequence[Member]) -> Ids:
    """Return `[members, n]`: how many elements every channel has in every layer."""
    table = np.zeros((len(members), len(group.channels)), np.int64)
    for row, member in zip(table, members, strict=True):
        places = group.places(member.elements)
        np.add.at(row, places[places >= 0], 1)
    return table


def _alike(table: Ids) -> list[Ids]:
    """Return the sets of columns that are equal: `[rows, columns]` -> `[n]` each, ascending."""
    if not len(table):
        return [np.arange(table.shape[1])]
    _, kind = np.unique(table, axis=1, return_inverse=True)
    return [np.flatnonzero(kind.reshape(-1) == number) for number in range(int(kind.max()) + 1)]


def _sizes(
    group: Group, block: _Block, staying: npt.NDArray[np.bool_], min_channels: int
) -> tuple[int, ...]:
    """Return how many channels of a cell may remain."""
    total, step = len(block.places), block.step
    # shared among the cells, so that the group keeps as many
    share = math.ceil(min_channels * total / len(group.channels))
    least = math.ceil(max(int(staying[block.places].sum()), share, 1) / step) * step
    return tuple(range(total // step * step, least - 1, -step)) or (total,)


def _best_of_parts(
    groups: Sequence[Group], scores: Sequence[Array], parts: Sequence[Ids]
) -> list[npt.NDArray[np.bool_]]:
    """Return `[n]` per group: whether a channel is the best of one of these parts."""
    if not groups or not parts:
        return [np.zeros(len(group.channels), bool) for group in groups]
    last = max(int(channels.max()) for channels in (*parts, *(g.channels for g in groups)))
    # channels of no group are never cut, so a part that holds one needs no other
    score = np.full(last + 1, np.inf)
    for group, found in zip(groups, scores, strict=True):
        score[group.channels] = found
    best = np.zeros(last + 1, bool)
    for part in parts:
        best[part[np.argmax(score[part])]] = True
    return [best[group.channels] for group in groups]


def local(ranking: Sequence[Candidate], amounts: Sequence[float]) -> Ids:
    """Cut this share of every group, to the nearest size that the group may have."""
    return _concatenated(
        [candidate.share(amount) for candidate, amount in zip(ranking, amounts, strict=True)]
    )


def local_macs(ranking: Sequence[Candidate], amount: float, macs: Macs) -> Ids:
    """Cut the same share of every group, the least share that saves `amount` of the work.

    Where no share saves as much, all that may go goes.
    """
    limit = macs(_concatenated([])) * (1 - amount)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS if amount > 0 else 0):
        middle = (low + high) / 2
        if macs(local(ranking, [middle] * len(ranking))) <= limit:
            high = middle
        else:
            low = middle
    return local(ranking, [high if amount > 0 else 0.0] * len(ranking))


def ranked(ranking: Sequence[Candidate], amount: float) -> Ids:
    """Cut a share of all channels, the least important of all groups first.

    A channel counts as many times as it has elements, so that heads compare with hidden units.
    """
    cells = [cell for candidate in ranking for cell in candidate.cells]
    left = amount * sum(len(cell.channels) * cell.width for cell in cells)
    chosen = []
    for step, elements in _steps(ranking, (1 - amount) ** 2, _mean_score):
        if elements > 2 * left:  # closer to the amount without it
            break
        chosen.append(step)
        left -= elements
    return _concatenated(chosen)


def ranked_macs(ranking: Sequence[Candidate], amount: float, macs: Macs) -> Ids:
    """Cut channels of all groups until `amount` of the work is saved, the best bargains first.

    The price of a cut is the share of its group's importance that it takes, its yield the work that
    it saves by itself. Where the amount cannot be saved, all that may go goes.
    """
    whole = macs(_concatenated([]))

    def price_per_mac(candidate: Candidate, step: Ids, scores: Array) -> float:
        share = float(scores.sum()) / len(candidate.group.channels)
        return share / max(whole - macs(step), 1.0)

    # work goes with the square of the share of channels that is kept, as layers lose inputs too;
    # its cube lets the cuts gather where they pay
    steps = [step for step, _ in _steps(ranking, (1 - amount) ** 1.5, price_per_mac)]
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if macs(_concatenated(steps[:middle])) <= whole * (1 - amount):
            high = middle
        else:
            low = middle + 1
    return _concatenated(steps[:low])


def _mean_score(_candidate: Candidate, _step: Ids, scores: Array) -> float:
    return float(scores.mean())


def _steps(ranking: Sequence[Candidate], floor: float, price: _Price) -> Iterator[tuple[Ids, int]]:
    """Yield the smallest possible cuts and their elements, the least price first.

    Those that leave less than the share `floor` of a cell, to the nearest size, come after all
    others, except the first of a cell, which may be large where vectors are wide.
    """
    #: whether it is below the floor, price, candidate, cell, index among the cell's sizes
    heap: list[tuple[bool, float, int, int, int]] = []

    def step_of(cell: Cell, size: int) -> slice:
        """Return where in a cell the channels of a step are."""
        whole = len(cell.channels)
        return slice(whole - cell.sizes[size - 1], whole - cell.sizes[size])

    def offer(which: int, place: int, size: int) -> None:
        cell = ranking[which].cells[place]
        if size < len(cell.sizes):
            step = step_of(cell, size)
            nearest = (cell.sizes[size - 1] + cell.sizes[size]) / 2
            low = step.start > 0 and nearest < floor * len(cell.channels)
            cost = price(ranking[which], cell.channels[step], cell.scores[step])
            heapq.heappush(heap, (low, cost, which, place, size))

    def offer_all(which: int) -> None:
        for place in range(len(ranking[which].cells)):
            offer(which, place, 1)

    for which, candidate in enumerate(ranking):
        if len(trimmed := candidate.trimmed):
            scores = [cell.scores[: len(cell.cut(cell.sizes[0]))] for cell in candidate.cells]
            cost = price(candidate, trimmed, np.concatenate(scores))
            heapq.heappush(heap, (False, cost, which, -1, 0))
        else:
            offer_all(which)
    while heap:
        _, _, which, place, size = heapq.heappop(heap)
        candidate = ranking[which]
        if place < 0:
            widths = [len(cell.cut(cell.sizes[0])) * cell.width for cell in candidate.cells]
            yield candidate.trimmed, sum(widths)
            offer_all(which)
            continue
        cell = candidate.cells[place]
        step = cell.channels[step_of(cell, size)]
        yield step, len(step) * cell.width
        offer(which, place, size + 1)


def _nearest(cell: Cell, wanted: float) -> int:
    """Return the size of a cell nearest to the wanted one, the larger of two."""
    allowed = (len(cell.channels), *cell.sizes)
    return min(allowed, key=lambda size: (abs(size - wanted), -size))


def _concatenated(cuts: Sequence[Ids]) -> Ids:
    return np.concatenate([*cuts, np.empty(0, np.int64)]).astype(np.int64)
