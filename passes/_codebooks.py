"""Weights that share one codebook: as points to cluster, and as weights again."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgepress.calibration.base import Array
from edgepress.passes._kmeans import Fit, Line, assigned, code_bits, codebook_bits
from edgepress.passes._word_kmeans import Words


class Block:
    """Rows of a tensor that share one codebook; zeros stay what they are and need none.

    Attributes:
        rows: `[out, rest]`.
        zero_bits: the entropy of where the zeros are.
    """

    def __init__(self, rows: Array, curvature: Array | None, vector: int) -> None:
        """Cut the rows into words.

        Args:
            rows: `[out, rest]`, finite.
            curvature: in their shape and above 0, or None.
            vector: consecutive outputs that share a codeword; out is a multiple of it.
        """
        self.rows, self._vector = rows, vector
        words = _words(rows, vector)
        self._used = words.any(axis=1)
        self._words = words[self._used]
        self._curvature = None if curvature is None else _words(curvature, vector)[self._used]
        self.zero_bits = _where_bits(int(self._used.sum()), len(words))

    @property
    def size(self) -> int:
        """How many words are not zero."""
        return len(self._words)

    @property
    def mixed(self) -> int:
        """How many words are zero in places."""
        return int(np.count_nonzero((self._words == 0).any(axis=1)))

    @property
    def mean_curvature(self) -> float:
        """What a squared difference weighs on average."""
        return 1.0 if self._curvature is None else float(self._curvature.mean())

    def points(self) -> Line | Words:
        """Return what is clustered, of a block that is not all zero."""
        if self._vector > 1:
            return Words(self._words, self._curvature)
        return Line(self._words[:, 0], None if self._curvature is None else self._curvature[:, 0])

    def shared(self, fit: Fit) -> Array:
        """Return the rows with the values of a codebook, in its own dtype."""
        words = _words(self.rows, self._vector).copy()
        codebook, offsets = _rounded(fit, self.rows.dtype)
        if self._vector > 1:
            chosen = Words(self._words, self._curvature).assigned(codebook, offsets)
            words[self._used] = codebook[chosen]
        else:
            words[self._used] = codebook[assigned(self._words, codebook, offsets)]
        return _rows(words, self.rows.shape)


def coded_bits(rows: Array, vector: int) -> tuple[float, int]:
    """Estimate what rows take with a codebook, by zero-order entropy; and count its entries.

    It adds up the codebook, the index of every word that is not zero, and where the others are.
    """
    words = _words(rows, vector)
    used = words[words.any(axis=1)]
    if not len(used):
        return 0.0, 0
    counts = np.unique(_opaque(used), return_counts=True)[1]
    indices = float(counts @ code_bits(counts))
    entries = codebook_bits(used[: len(counts)])
    return indices + entries + _where_bits(len(used), len(words)), len(counts)


def _words(rows: Array, vector: int) -> Array:
    """Return `[n, vector]`: consecutive outputs at the same place, outputs changing slowest."""
    out, rest = rows.shape
    return rows.reshape(out // vector, vector, rest).transpose(0, 2, 1).reshape(-1, vector)


def _rows(words: Array, shape: tuple[int, ...]) -> Array:
    """Undo `_words`."""
    out, rest = shape
    vector = words.shape[1]
    return words.reshape(out // vector, rest, vector).transpose(0, 2, 1).reshape(shape)


def _opaque(words: Array) -> Array:
    """Return each word as one item, which compare by their bytes."""
    words = np.ascontiguousarray(words)
    return words.view(f"V{words.dtype.itemsize * words.shape[1]}")[:, 0]


def _where_bits(ones: int, total: int) -> float:
    """Return the zero-order entropy of `total` bits of which so many are ones."""
    counts = np.array([count for count in (ones, total - ones) if count])
    return float(counts @ code_bits(counts)) if len(counts) else 0.0


def _rounded(fit: Fit, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return a codebook in the dtype of weights, and its offsets; of equal entries the cheapest."""
    codebook = fit.codebook.astype(dtype)
    order = np.argsort(fit.offsets, kind="stable")
    _, first = np.unique(codebook[order], axis=0, return_index=True)
    return codebook[order][first], fit.offsets[order][first]
