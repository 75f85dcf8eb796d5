"""Which operators have an integer form, and how it is written: one rule per operator."""

from __future__ import annotations

import onnx_ir as ir

from edgepress.targets.lowering.integer_elementwise import ELEMENTWISE
from edgepress.targets.lowering.integer_moves import MOVES
from edgepress.targets.lowering.integer_pools import POOLS
from edgepress.targets.lowering.integer_products import PRODUCTS
from edgepress.targets.lowering.integers import Integers, Rule
from edgepress.targets.lowering.softmax import SOFTMAX

RULES: dict[str, Rule] = {**PRODUCTS, **ELEMENTWISE, **POOLS, **MOVES, **SOFTMAX}


def to_integers(model: ir.Model, storage: str) -> ir.Model:
    """Replace QDQ groups by integer nodes; 8-bit tensors are kept as `storage` (uint8 or int8).

    The model must be canonical: static shapes, constants as initializers. It is not changed.
    """
    return Integers(model, storage, RULES).run()
