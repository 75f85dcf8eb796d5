"""What stands out among the layers of a bundle, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgepress.pipeline._explain_layers import Layer
from edgepress.targets.kernel_code import KernelCode

HOT = 0.05  # of the cost; of the multiply-accumulates where no cost was measured
MUCH_CONVERSION = 0.1
MUCH_ERROR = 0.25


def warnings(layers: Sequence[Layer], kernels: Mapping[str, KernelCode]) -> list[str]:
    """Return a sentence for everything that costs much and need not."""
    macs = sum(layer.macs for layer in layers)
    found = []
    for layer in layers:
        share = layer.cost_share
        if share is None:
            share, what = layer.macs / macs if macs else 0.0, "multiply-accumulates"
        else:
            what = "time" if layer.time_ms is not None else "executed instructions"
        if share < HOT:
            continue
        where = f"{layer.name} ({layer.title}), which has {share:.0%} of the {what}"
        if layer.multiply is not None and not layer.vector:
            found.append(f"scalar multiply ({layer.multiply}) in the loops of {where}")
        elif layer.multiply is None and not layer.vector:
            found.append(f"no vector instruction in the loops of {where}")
        if kernels[layer.main_kernel].calls_library:
            found.append(f"a library function is called in the loops of {where}")
        if layer.float_island:
            found.append(f"a float island: {where}: {layer.why_float}")
    converted = [layer.cost_share for layer in layers if layer.conversion]
    if sum(share or 0.0 for share in converted) >= MUCH_CONVERSION:
        found.append(
            f"{sum(share or 0.0 for share in converted):.0%} of the cost are conversions between "
            "number formats and layouts"
        )
    found += [
        f"{layer.name} ({layer.title}) adds {layer.error_share:.0%} of the error"
        for layer in layers
        if layer.error_share is not None and layer.error_share >= MUCH_ERROR
    ]
    return found
