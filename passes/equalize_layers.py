"""equalize-layers: give the channels between two layers ranges of like size, without any loss.

What a layer writes into a channel may be multiplied by a positive number, if all that reads the
channel is divided by it: rectifiers and pools in between let it through. With the factors of Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1,
each channel fills as much of the range of the layer that writes it as of those that read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._channel_scales import ChannelScales, Layer, analyse
from edgepress.passes._constants import constant, set_input
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

#: No factor is larger, or smaller than its inverse: weights stay far from the ends of float32.
LARGEST_FACTOR = 2.0**10
_MOST_SWEEPS = 100


@dataclass(frozen=True, kw_only=True)
class EqualizeLayers(Pass):
    """Equalize the weights of each channel over the layers on both sides of it.

    Helps where weights share one scale per tensor (`per_channel = false`), and activations whose
    channels differ much in size. Follows residual additions, Concat and depthwise convolutions. A
    bounded Clip, as in ReLU6, keeps the channels before it as they are: their bounds would have to
    differ, and no kernel has a bound per channel.

    Attributes:
        tolerance: a channel stays where its factor is within this share of 1.
    """

    tolerance: float = 0.05

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: ARG002
        """Refuse a tolerance that would never be met."""
        if not self.tolerance > 0:
            raise PassRefused(
                self.name,
                "tolerance",
                f"it is {self.tolerance}; choose a number above 0, such as 0.05.",
            )

    def call(self, model: ir.Model, context: Context) -> Outcome:  # noqa: ARG002
        """Find factors for all channels, then multiply them into weights and biases."""
        scales = analyse(model)
        weights = [np.abs(_by_channel(layer).astype(np.float64)) for layer in scales.layers]
        sides = [(scales.find(layer.read), scales.find(layer.written)) for layer in scales.layers]
        channels = sorted({int(number) for pair in sides for ids in pair for number in ids})
        factors = dict.fromkeys(channels, 1.0)
        for _ in range(_MOST_SWEEPS):
            if not self._sweep(scales, weights, sides, factors):
                break
        chosen = {number for number, factor in factors.items() if factor != 1.0}
        for layer in scales.layers:
            _rescale(layer, _of(factors, scales.find(layer.read)), reads=True)
            _rescale(layer, _of(factors, scales.find(layer.written)), reads=False)
        skipped = dict.fromkeys(
            (layer.node.name or "", why)
            for layer in scales.layers
            for number in scales.find(layer.written)
            if (why := scales.why(int(number))) is not None
        )
        return Outcome(
            model=model,
            modified=bool(chosen),
            stats={"equalized_channels": len(chosen), "layers": len(scales.layers)},
            skipped=[*scales.unfit, *skipped],
        )

    def _sweep(
        self,
        scales: ChannelScales,
        weights: list[Array],
        sides: list[tuple[Array, Array]],
        factors: dict[int, float],
    ) -> bool:
        """Improve the factors of all channels once; return whether one changed.

        Where several layers write or read a channel, the one with the largest weight decides.
        """
        written: dict[int, float] = {}
        read: dict[int, float] = {}
        for weight, (reads, writes) in zip(weights, sides, strict=True):
            groups, outputs, inputs, _ = weight.shape
            now = weight / _of(factors, reads).reshape(groups, 1, inputs, 1)
            now *= _of(factors, writes).reshape(groups, outputs, 1, 1)
            for found, ids, axes in ((read, reads, (1, 3)), (written, writes, (2, 3))):
                for number, size in zip(ids.tolist(), now.max(axis=axes).ravel(), strict=True):
                    found[number] = max(found.get(number, 0.0), float(size))
        changed = False
        for number, old in factors.items():
            sizes = written.get(number, 0.0), read.get(number, 0.0)
            if scales.why(number) is not None or min(sizes) <= 0:
                continue
            step = float(np.sqrt(sizes[1] / sizes[0]))
            # beyond the limits a channel is dead on one side; it has nothing to equalize
            within = 1 / LARGEST_FACTOR <= old * step <= LARGEST_FACTOR
            if within and abs(step - 1) > self.tolerance:
                factors[number] = old * step
                changed = True
        return changed


def _by_channel(layer: Layer) -> Array:
    """Return the weight as `[groups, outputs/groups, inputs/groups, taps]`."""
    weight = constant(layer.node.inputs[1])
    assert weight is not None, "`analyse` looked"
    if layer.node.op_type == "Gemm":
        rows = weight if layer.node.attributes.get_int("transB", 0) else weight.T
        return rows[None, :, :, None]
    groups = layer.node.attributes.get_int("group", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _rescale(layer: Layer, factors: Array, *, reads: bool) -> None:
    """Divide what a layer reads by factors, or multiply what it writes with them."""
    if (factors == 1.0).all():
        return
    node = layer.node
    weight = _by_channel(layer).astype(np.float64)
    groups, outputs, inputs, _ = weight.shape
    if reads:
        weight = weight / factors.reshape(groups, 1, inputs, 1)
    else:
        weight = weight * factors.reshape(groups, outputs, 1, 1)
    old = constant(node.inputs[1])
    assert old is not None, "`analyse` looked"
    if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0):
        weight = weight[0, :, :, 0].T
    set_input(node, 1, weight.reshape(old.shape).astype(np.float32), f"{node.name}_weight")
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None and not reads:
        scaled = bias.astype(np.float64) * factors.reshape(bias.shape)
        set_input(node, 2, scaled.astype(np.float32), f"{node.name}_bias")


def _of(factors: dict[int, float], ids: Array) -> Array:
    return np.array([factors.get(int(number), 1.0) for number in ids])
