"""How far answers may be from the reference, by the arithmetic of a model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.passes.base import Context
from edgepress.passes.quantize_dynamic import QuantizeDynamic
from edgepress.pipeline import golden, snapshot
from edgepress.pipeline.golden import FLOAT_LIMITS, MIXED_LIMIT, SPREADS, Golden, make_golden
from edgepress.pipeline.oracle import relative_error
from edgepress.targets.reference import Reference
from tests.graphs import net, random
from tests.targets.qdq import shaped

SIGNATURE = "(float[3,16] x) => (float[3,8] y)"
FEEDS = [{"x": random(3, 16, seed=i)} for i in range(3)]


def dynamic(body: str) -> ir.Model:
    model = shaped(net(SIGNATURE, body, {"w": random(16, 8)}))
    return shaped(QuantizeDynamic().call(model, Context()).model)


def golden_of(model: ir.Model) -> Golden:
    return make_golden(snapshot.take(model), None, FEEDS)


def ranges(found: Golden) -> float:
    values = np.stack([answer["y"] for answer in found.answers])
    return float(max(values.max(), 0) - min(values.min(), 0))


def test_floats() -> None:
    found = golden_of(shaped(net(SIGNATURE, "y = MatMul(x, w)", {"w": random(16, 8)})))
    assert (found.arithmetic, found.limit) == ("float", FLOAT_LIMITS["float32"])
    assert found.tolerances[0] == pytest.approx(FLOAT_LIMITS["float32"] * ranges(found))


def test_a_dynamic_product_alone_is_exact() -> None:
    found = golden_of(dynamic("y = MatMul(x, w)"))
    assert (found.arithmetic, found.limit, found.tolerances) == ("integer", 0.0, (0.0,))


def test_mixed() -> None:
    found = golden_of(dynamic("s = Sigmoid(x) y = MatMul(s, w)"))
    assert (found.arithmetic, found.limit) == ("mixed", MIXED_LIMIT)
    assert found.tolerances[0] == pytest.approx(MIXED_LIMIT * ranges(found))


def test_what_last_bits_change_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "MIXED_LIMIT", 1e-9)
    model = dynamic("s = Sigmoid(x) y = MatMul(s, w)")
    reference = Reference(model)
    moved = relative_error(
        [reference.run(feed) for feed in FEEDS],
        [reference.run(feed, nudged=True) for feed in FEEDS],
    )
    assert moved > 1e-9
    assert golden_of(model).limit == pytest.approx(SPREADS * moved)


def test_no_answer_may_be_arbitrary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "SPREADS", 1e9)
    assert golden_of(dynamic("s = Sigmoid(x) y = MatMul(s, w)")).limit == golden.LOOSEST_LIMIT
