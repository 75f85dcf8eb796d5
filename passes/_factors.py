"""Splits weights into products of smaller ones, losing as little as their ranks allow.

What is lost is counted as a share of what the layer computes. A *metric* `C` [n, n] says how a
patch p of the layer's input varies, so that `E|W p|² = tr(W C Wᵀ)`. Without a metric, all
directions of the input count alike, which is the plain norm of the weight.

All arithmetic is float64. Weights and factors are those of convolutions, [out, in, kh, kw]; a
metric orders the n = in·kh·kw numbers of a patch like them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Protocol

import numpy as np

from edgepress.calibration.base import Array

Ranks = tuple[int, ...]
_LEAST_SHRINKAGE = 1e-6  # lets directions that no sample uses count a little
_ROUNDING = 1e-14  # of the second moments, when a mean is taken out of them
_LEAST_SIZE = 1e-6  # of the largest channel, when scale moves from one factor to the next


class Decomposition(Protocol):
    """One way to split a weight, at any ranks."""

    def lost(self, ranks: Ranks) -> float:
        """Return the share that the factors of these ranks lose."""
        ...

    def lost_at_least(self, ranks: Ranks) -> float:
        """Return a share that they lose for sure, which is sooner computed."""
        ...

    def factors(self, ranks: Ranks) -> list[Array]:
        """Return the weights of the new layers, in order of execution."""
        ...


def decomposition(name: str, weight: Array, metric: Array | None) -> Decomposition:
    """Return the decomposition "channel", "spatial" or "tucker" of a weight."""
    kinds: dict[str, Callable[[Array, Array | None], Decomposition]]
    kinds = {"channel": Channel, "spatial": Spatial, "tucker": Tucker}
    return kinds[name](weight, metric)


def largest_ranks(name: str, shape: tuple[int, ...]) -> Ranks:
    """Return the least ranks at which a decomposition of a weight of this shape loses nothing.

    >>> largest_ranks("channel", (64, 3, 7, 7))
    (64,)
    >>> largest_ranks("spatial", (64, 3, 7, 7))
    (21,)
    >>> largest_ranks("tucker", (64, 3, 7, 7))
    (64, 3)
    """
    outputs, inputs, height, width = shape
    if name == "channel":
        return (min(outputs, inputs * height * width),)
    if name == "spatial":
        return (min(inputs * height, outputs * width),)
    area = height * width
    return min(outputs, inputs * area), min(inputs, outputs * area)


def aligned(rank: int, align: int, largest: int) -> int:
    """Round a rank up to a multiple, but not above the largest.

    >>> aligned(5, 4, 16), aligned(5, 4, 6)
    (8, 6)
    """
    return min(-(-rank // align) * align, largest)


def ladder(name: str, shape: tuple[int, ...], align: int, input_share: float = 1.0) -> list[Ranks]:
    """Return the aligned ranks worth trying, cheapest first; the last ones lose nothing.

    Args:
        name: of the decomposition.
        shape: of the weight.
        align: ranks are multiples of it, or the largest.
        input_share: positions of the input over positions of the output; more than 1 with strides.

    >>> ladder("channel", (10, 3, 3, 3), 4)
    [(4,), (8,), (10,)]
    """
    largest = largest_ranks(name, shape)
    rungs = [sorted({aligned(r, align, most) for r in range(1, most + 1)}) for most in largest]
    if name != "tucker":
        return [(rank,) for rank in rungs[0]]
    outputs, inputs, area = shape[0], shape[1], shape[2] * shape[3]

    def cost(ranks: Ranks) -> float:
        r_out, r_in = ranks
        return inputs * r_in * input_share + r_in * r_out * area + r_out * outputs

    # beyond these, a mode is wider than all that the other one can feed it
    useful = [(r, q) for r, q in product(*rungs) if r <= q * area and q <= r * area]
    return sorted(useful, key=cost)


def cheapest(found: Decomposition, rungs: Sequence[Ranks], limit: float) -> Ranks:
    """Return the first ranks that lose at most this share; the last ones where none do."""
    for ranks in rungs:
        if found.lost_at_least(ranks) <= limit and found.lost(ranks) <= limit:
            return ranks
    return rungs[-1]


def metric_of(second: Array, count: int, *, centred: bool) -> Array | None:
    """Return the metric that samples of a layer's input define.

    The moments of few samples are shrunk towards a multiple of the identity, by the share that
    is best for Gaussian data: Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE
    Covariance Estimation", 2010, equation 23. Without it, directions that few samples happen to
    miss would count as never used.

    Args:
        second: [n+1, n+1], the mean of [p; 1][p; 1]ᵀ over patches p.
        count: how many patches it is the mean of.
        centred: take the covariance, because a bias corrects the mean; else the second moment.

    Returns:
        [n, n], positive definite, or None where the input is always 0.
    """
    moments, mean = second[:-1, :-1].astype(np.float64), second[:-1, -1]
    size, total = len(moments), float(np.trace(moments))
    if not total > 0:
        return None
    if centred:
        moments -= np.outer(mean, mean)
    trace = max(float(np.trace(moments)), 0.0)
    squared = float(np.sum(moments * moments))
    numerator = (1 - 2 / size) * squared + trace**2
    denominator = (count + 1 - 2 / size) * (squared - trace**2 / size)
    share = numerator / denominator if denominator > numerator else 1.0
    share = max(share, _LEAST_SHRINKAGE)
    moments *= 1 - share
    # an input that hardly varies leaves little but rounding; then all directions count alike
    moments[np.diag_indices(size)] += max(share * trace / size, _ROUNDING * total)
    return moments


def multiplied(factors: Sequence[Array]) -> Array:
    """Return the weight that factors multiply to; along each axis one kernel at most is wide."""
    whole = factors[0]
    for factor in factors[1:]:
        joined = np.einsum("riab,orcd->oiacbd", whole, factor, optimize=True)
        outputs, inputs, *kernel = joined.shape
        whole = joined.reshape(outputs, inputs, kernel[0] * kernel[1], kernel[2] * kernel[3])
    return whole


class Channel:
    """[rank, in, kh, kw] and [out, rank, 1, 1]: no pair of layers loses less.

    The best layer of rank r in the metric projects its output on the r directions in which the
    output varies most, eigenvectors of `W C Wᵀ`: Zhang et al., "Accelerating Very Deep
    Convolutional Networks", 2015, section 3.1. This is the truncated SVD of W L for C = L Lᵀ,
    mapped back by L⁻¹, since `U_r Σ_r V_rᵀ L⁻¹ = U_r U_rᵀ W`; so neither L nor its inverse is
    needed. Without a metric it is the SVD of Denton et al., "Exploiting Linear Structure Within
    Convolutional Networks", 2014, section 3.
    """

    def __init__(self, weight: Array, metric: Array | None) -> None:
        self._weight = weight
        matrix = weight.reshape(len(weight), -1)
        basis = None
        if len(matrix) > matrix.shape[1]:
            basis, matrix = np.linalg.qr(matrix)
        energies, self._directions = _eigen(
            matrix @ matrix.T if metric is None else matrix @ metric @ matrix.T
        )
        if basis is not None:
            self._directions = basis @ self._directions
        self._sizes = np.sqrt(energies)
        self._tail = _tail(energies)

    def lost(self, ranks: Ranks) -> float:
        """Return the share that the factors of a rank lose."""
        return float(self._tail[ranks[0]])

    lost_at_least = lost

    def factors(self, ranks: Ranks) -> list[Array]:
        """Return the two factors."""
        kept = self._directions[:, : ranks[0]]
        first = np.tensordot(kept.T, self._weight, 1)
        return _balanced(first, kept[..., None, None], self._sizes[: ranks[0]])


class Spatial:
    """[rank, in, kh, 1] and [out, rank, 1, kw].

    The first factor comes from the SVD of the weight as a matrix [in·kh, out·kw]: Jaderberg et
    al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014, scheme 2,
    solved as Tai et al., "Convolutional Neural Networks with Low-Rank Regularization", 2016,
    theorem 1. The second is the best there is for the first, in the metric.
    """

    def __init__(self, weight: Array, metric: Array | None) -> None:
        self._shape = outputs, inputs, height, width = weight.shape
        self._reduced = _Reduced(weight.reshape(outputs, inputs * height, width), metric)
        energies = np.sum(self._reduced.seen**2, axis=0).reshape(-1, width).sum(axis=1)
        self._tail = _tail(energies)

    def lost(self, ranks: Ranks) -> float:
        """Return the share that the factors of a rank lose."""
        return float(self._tail[ranks[0]])

    lost_at_least = lost

    def factors(self, ranks: Ranks) -> list[Array]:
        """Return the two factors."""
        outputs, inputs, height, width = self._shape
        (rank,) = ranks
        first = self._reduced.projection[:rank].reshape(rank, inputs, height, 1)
        last = self._reduced.fitted(rank).reshape(outputs, rank, 1, width)
        return _balanced(first, last, np.ones(rank))


class Tucker:
    """[r_in, in, 1, 1], [r_out, r_in, kh, kw] and [out, r_out, 1, 1]; ranks are (r_out, r_in).

    Tucker-2: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power
    Mobile Applications", 2016, section 3. The first factor comes from the higher-order SVD of De
    Lathauwer et al., "A Multilinear Singular Value Decomposition", 2000. The other two are the
    best there are for it, in the metric; so they lose less than those of that SVD, without
    iterations.
    """

    def __init__(self, weight: Array, metric: Array | None) -> None:
        self._shape = outputs, inputs, height, width = weight.shape
        self._area = height * width
        self._reduced = _Reduced(weight.reshape(outputs, inputs, self._area), metric)
        energies = np.sum(self._reduced.seen**2, axis=0)
        self._total = float(energies.sum())
        self._input_tail = _tail(energies.reshape(inputs, -1).sum(axis=1))
        self._kept: dict[int, Array] = {}

    def lost(self, ranks: Ranks) -> float:
        """Return the share that the factors of two ranks lose."""
        r_out, r_in = ranks
        if r_in not in self._kept:
            seen = self._reduced.seen[:, : r_in * self._area]
            gram = seen @ seen.T if len(seen) <= seen.shape[1] else seen.T @ seen
            self._kept[r_in] = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0).cumsum()
        kept = self._kept[r_in][min(r_out, len(self._kept[r_in])) - 1]
        return max(1 - float(kept) / self._total, 0.0) if self._total > 0 else 0.0

    def lost_at_least(self, ranks: Ranks) -> float:
        """Return what either rank loses by itself: where the other one is the largest."""
        r_out, r_in = ranks
        return max(self.lost((r_out, self._shape[1])), float(self._input_tail[r_in]))

    def factors(self, ranks: Ranks) -> list[Array]:
        """Return the three factors."""
        outputs, inputs, height, width = self._shape
        r_out, r_in = ranks
        first = self._reduced.projection[:r_in].reshape(r_in, inputs, 1, 1)
        rest = self._reduced.fitted(r_in).reshape(outputs, r_in, height, width)
        middle, last = Channel(rest, self._reduced.metric(r_in)).factors((r_out,))
        return [*_balanced(first, middle, np.ones(r_in)), last]


class _Reduced:
    """A weight that sees a patch through fewer channels, refitted to them, for all numbers of them.

    A patch is [channels, taps]. Its channels are projected on the directions that matter most to
    the weight, in the metric that all taps share on average. Of any rank, a projection takes the
    first channels of this one.

    Attributes:
        projection: [channels, channels], a direction in each row. In the shared metric, projected
            channels are uncorrelated, and the root mean square of each is 1.
        seen: [out, channels·taps], `E|W p|²` split into orthogonal parts: the squares of the
            columns of the first r channels add up to what is kept by r channels.
    """

    def __init__(self, weight: Array, metric: Array | None) -> None:
        outputs, channels, taps = weight.shape
        self._taps = taps
        unfolded = weight.transpose(1, 0, 2).reshape(channels, -1)
        gram = unfolded @ unfolded.T
        if metric is None:
            back = _eigen(gram)[1]
            self.projection = back.T
        else:
            blocks = metric.reshape(channels, taps, channels, taps)
            # channels are made uncorrelated first; then the best directions are those of the SVD
            root = np.linalg.cholesky(np.einsum("itjt->ij", blocks) / taps)
            directions = _eigen(root.T @ gram @ root)[1]
            self.projection = np.linalg.solve(root.T, directions).T
            back = root @ directions
        self._weight = np.tensordot(weight, back, (1, 0)).swapaxes(1, 2).reshape(outputs, -1)
        self._metric, self._root = None, None
        self.seen = self._weight
        if metric is not None:
            half = self._projected(metric)
            self._metric = self._projected(half.T)
            self._root = np.linalg.cholesky(self._metric)
            self.seen = self._weight @ self._root

    def metric(self, rank: int) -> Array | None:
        """Return the metric of the first channels, [rank·taps, rank·taps]."""
        size = rank * self._taps
        return None if self._metric is None else self._metric[:size, :size]

    def fitted(self, rank: int) -> Array:
        """Return the best weight for the first channels, [out, rank·taps]."""
        size = rank * self._taps
        kept, dropped = self._weight[:, :size], self._weight[:, size:]
        if self._root is None or not dropped.size:
            return kept
        # what is dropped, as far as the channels that are kept predict it
        shared = dropped @ self._root[size:, :size]
        return np.asarray(kept + np.linalg.solve(self._root[:size, :size].T, shared.T).T)

    def _projected(self, rows: Array) -> Array:
        """Apply the projection to [channels·taps, …]."""
        flat = rows.reshape(len(self.projection), -1)
        return np.asarray((self.projection @ flat).reshape(rows.shape))


def _eigen(matrix: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of a positive semidefinite matrix, largest first, and its vectors."""
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def _balanced(first: Array, last: Array, sizes: Array) -> list[Array]:
    """Scale the channels between two factors so that either gets half of their magnitude.

    Later quantization has one scale for all channels of a value, and one for all inputs of a
    weight's row; neither then has to span the whole range of magnitudes.

    Args:
        first: [r, …].
        last: [out, r, kh, kw].
        sizes: [r], the root mean square of what `first` computes.
    """
    sizes, norms = (
        np.maximum(magnitudes, _LEAST_SIZE * magnitudes.max()) if magnitudes.any() else np.ones(1)
        for magnitudes in (sizes, np.sqrt(np.sum(last**2, axis=(0, 2, 3))))
    )
    scale = np.broadcast_to(np.sqrt(norms / sizes), len(first))[:, None, None, None]
    return [first * scale, last / scale.swapaxes(0, 1)]


def _tail(energies: Array) -> Array:
    """Return by rank, from 0 on, the share of the energies beyond it."""
    total = float(energies.sum())
    beyond = np.append(energies[::-1].cumsum()[::-1], 0.0)
    return np.asarray(beyond / total) if total > 0 else np.zeros_like(beyond)
