"""encode-huffman: let the bundle hold its weights coded, as few bits as their values need.

Huffman, "A Method for the Construction of Minimum-Redundancy Codes", 1952; Han, Mao and Dally,
"Deep Compression", 2016, section 4. Codes are made when the bundle is built, out of the constants
in the layout that the kernels read (docs/format.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import Array
from edgepress.passes._kmeans import code_bits
from edgepress.passes.base import Context, Outcome, Pass

#: Key of the model's `metadata_props`, and its value where the bundle's weights are to be coded.
WEIGHTS, CODED = "edgepress.weights", "coded"

ONLY_FLOATS = (
    "No tensor has few values or many zeros, and floats that differ shrink by about a tenth: put "
    "prune-weights, share-weights or quantize-int8 before the end of the recipe."
)
NO_WEIGHTS = "The model has no weights to encode."


@dataclass(frozen=True, kw_only=True)
class EncodeHuffman(Pass):
    """Store the weights of the bundle as Huffman codes, without loss.

    It marks the model, and may stand anywhere in a recipe: what is encoded are the constants of the
    compiled model. Each of them is stored as is smallest: raw, as codes of its values, as gaps and
    values where most are zero, or as codes of its bytes. Few values or many zeros make it small:
    `quantize-int8`, `share-weights` and `prune-weights` give it those. The board decodes the
    weights when the model is loaded; outputs and latency stay the same.

    Stats, of the graph's constants as they are here: `weights`, their elements; `zeros` among them;
    `bits_per_weight` that their values need by zero-order entropy, lists of the values included.
    What the coded weights really take is in the bundle's size ledger.
    """

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Mark the model and tell what its constants could shrink to."""
        modified = model.metadata_props.get(WEIGHTS) != CODED
        model.metadata_props[WEIGHTS] = CODED
        tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value]
        weights = zeros = 0
        bits = 0.0
        few = False
        for done, tensor in enumerate(tensors):
            context.progress("entropy of the weights", done, len(tensors))
            if tensor.dtype == ir.DataType.STRING:
                continue
            words = _words(tensor.numpy())
            of_values, of_bytes = _entropy_bits(words)
            weights += words.size
            zeros += words.size - int(np.count_nonzero(words))
            bits += min(of_values, of_bytes)
            few |= words.itemsize == 1 or of_values < of_bytes
        notes = [] if few else [ONLY_FLOATS if weights else NO_WEIGHTS]
        per_weight = round(bits / weights, 2) if weights else 0.0
        return Outcome(
            model=model,
            modified=modified,
            stats={"weights": weights, "zeros": zeros, "bits_per_weight": per_weight},
            notes=notes,
        )


def is_coded(model: ir.Model) -> bool:
    """Tell whether the bundle of a model is to hold its weights coded."""
    return model.metadata_props.get(WEIGHTS) == CODED


def _words(array: Array) -> Array:
    """Return the elements of a tensor as unsigned integers of the same size: [elements]."""
    return np.frombuffer(array.tobytes(), f"u{array.dtype.itemsize}")


def _entropy_bits(words: Array) -> tuple[float, float]:
    """Return the bits that words need as values, and as bytes, each place by itself."""
    _, counts = np.unique(words, return_counts=True)
    of_values = _coded_bits(counts, 8 * words.itemsize)
    places = words.view(np.uint8).reshape(words.size, words.itemsize)
    of_bytes = sum(_coded_bits(np.bincount(place, minlength=256), 8) for place in places.T)
    return of_values, of_bytes


def _coded_bits(counts: Array, bits: int) -> float:
    """Return the least of coded and raw bits of symbols that come this often.

    Coded, each needs what Shannon's entropy says, and stands once in a list with its `bits`.
    """
    counts = counts[counts > 0]
    entropy_bits = float(counts @ code_bits(counts))
    return min(entropy_bits + bits * counts.size, float(bits * int(counts.sum())))
