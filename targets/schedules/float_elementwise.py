"""Float element-wise kernels over flat tensors."""

from __future__ import annotations

from typing import Any

from edgepress.targets.isa.base import Isa
from edgepress.targets.schedules.activations import Activation, activated
from edgepress.targets.schedules.elementwise import for_each
from edgepress.targets.schedules.emit import Expr, Kernel, load


def activate(name: str, size: int, isa: Isa, activation: Activation) -> Any:
    """Generate `y = activation(x)`: arguments x and y float32."""
    kernel = Kernel(name)
    x = kernel.argument("x", "float32", size)
    y = kernel.argument("y", "float32", size)

    def body(index: Expr, _within: Expr, lanes: int) -> None:
        value = kernel.let("value", load(x, index, lanes))
        kernel.store(y, index, activated(value, activation, lanes), lanes)

    for_each(kernel, size, size, isa.lanes, body)
    return kernel.finish()
