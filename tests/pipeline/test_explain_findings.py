"""Sentences about what stands out, and silence about what does not."""

from __future__ import annotations

from typing import Any

import pytest

from edgepress.pipeline._explain_findings import warnings
from edgepress.pipeline._explain_layers import Layer
from edgepress.targets.kernel_code import KernelCode


def layer(**changes: Any) -> Layer:
    plain: dict[str, Any] = {
        "name": "conv", "operator": "Conv", "nodes": ["conv"], "fused": ["Relu"],
        "conversion": False, "precision": "int8", "float_island": False, "why_float": None,
        "kernels": ["k"], "main_kernel": "k", "multiply": "vpdpbusd", "multiply_count": 4,
        "vector": True, "float_instructions": 0, "macs": 100, "bytes_moved": 1,
        "working_set_bytes": 1, "time_ms": 1.0,
        "executed_instructions": None, "cost_share": 0.12, "gops": 1.0, "sqnr_alone_db": None,
        "error_share": None,
    }  # fmt: skip
    return Layer(**(plain | changes))


def said(*layers: Layer, **loop_kinds: int) -> list[str]:
    code = KernelCode(kinds={}, loop_kinds=loop_kinds, multiplies={}, loop_multiplies={})
    return warnings(layers, {"k": code})


def test_nothing_is_said_of_a_good_layer() -> None:
    assert said(layer()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multiply": "imull", "vector": False}, "scalar multiply (imull) in the loops of conv"),
        ({"multiply": None, "vector": False}, "no vector instruction in the loops of conv"),
        ({"float_island": True, "why_float": "Sin is float"}, "Sin is float"),
        ({"error_share": 0.5}, "adds 50% of the error"),
        ({"conversion": True, "operator": "Quantize"}, "12% of the cost are conversions"),
    ],
)
def test_what_stands_out_is_said(changes: dict[str, Any], words: str) -> None:
    (sentence,) = said(layer(**changes))
    assert words in sentence


def test_the_share_and_what_it_is_of_are_said() -> None:
    scalar = {"multiply": "imull", "vector": False}
    assert "12% of the time" in said(layer(**scalar))[0]
    emulated = layer(**scalar, time_ms=None, executed_instructions=5)
    assert "12% of the executed instructions" in said(emulated)[0]
    unmeasured = layer(**scalar, time_ms=None, cost_share=None)
    assert "100% of the multiply-accumulates" in said(unmeasured)[0]


def test_a_cheap_layer_may_be_scalar() -> None:
    assert said(layer(multiply="imull", vector=False, cost_share=0.01)) == []


def test_a_library_call_in_a_loop_is_said() -> None:
    (sentence,) = said(layer(), call=1)
    assert "a library function is called" in sentence
