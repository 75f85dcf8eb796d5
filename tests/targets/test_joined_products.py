"""Query, key and value of one input become one product on GPUs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower, lowered_graph
from tests.cuda.emulation import emulate
from tests.graphs import answers, random
from tests.targets.attention_forms import Form, ints

CUDA = load_target("cuda-sm90")
BATCH, TOKENS, HEADS, WIDTH = 2, 9, 3, 8
ALL = HEADS * WIDTH
SPLIT = ints(BATCH, TOKENS, HEADS, WIDTH)
PROJECT = "q0 = MatMul(x, wq) q = Add(q0, bq) k = MatMul(x, wk) v0 = MatMul({}, wv) v = {}"
ATTEND = """
    q1 = Reshape(q, split) k1 = Reshape(k, split) v1 = Reshape(v, split)
    qh = Transpose <perm=[0,2,1,3]> (q1) vh = Transpose <perm=[0,2,1,3]> (v1)
    kt = Transpose <perm=[0,2,3,1]> (k1)
    s = MatMul(qh, kt) t = Mul(s, scale) p = Softmax <axis=-1> (t) yh = MatMul(p, vh)
    yt = Transpose <perm=[0,2,1,3]> (yh) y = Reshape(yt, joined)
"""
SIGNATURE = f"(float[{BATCH},{TOKENS},{ALL}] x, float[{BATCH},{TOKENS},{ALL}] z) => (float y{{}})"
WEIGHTS = {
    **{name: random(ALL, ALL, seed=i) for i, name in enumerate(("wq", "wk", "wv"))},
    "bq": random(ALL, seed=5),
    "split": SPLIT,
    "joined": ints(0, 0, -1),
    "scale": np.array(WIDTH**-0.5, np.float32),
}


def form(value_of: str = "x", value: str = "Identity(v0)", more: str = "", out: str = "") -> Form:
    body = PROJECT.format(value_of, value) + more + ATTEND
    return Form(SIGNATURE.format(out), body, WEIGHTS)


def products(model: ir.Model, target: str = "cuda-sm90") -> list[list[int]]:
    graph = lowered_graph(model, load_target(target)).graph
    found = (node for node in graph if node.op_type == "Gemm")
    return [[int(dim) for dim in node.outputs[0].shape or ()] for node in found]  # type: ignore[arg-type]


def test_three_become_one() -> None:
    model = form().model()
    assert products(model) == [[BATCH, TOKENS, 3 * ALL]]
    assert products(model, "x86-64-v3") == [[BATCH, TOKENS, ALL]] * 3
    given = {"x": random(BATCH, TOKENS, ALL), "z": random(BATCH, TOKENS, ALL, seed=1)}
    (wanted,) = answers(model, given)
    program = lower(model, CUDA)
    assert [call.kernel.split("_")[0] for call in program.calls] == ["gemm", "attention"]
    np.testing.assert_allclose(emulate(program, given)["y"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        form(value_of="z"),
        form(value="Relu(v0)"),
        form(more=" extra = Neg(k) ", out=", float extra"),
    ],
    ids=["another input", "another last step", "another reader"],
)
def test_what_is_not_alike_stays(other: Form) -> None:
    model = other.model()
    assert len(products(model)) == 3
    given = {"x": random(BATCH, TOKENS, ALL), "z": random(BATCH, TOKENS, ALL, seed=1)}
    wanted = answers(model, given)
    got = emulate(lower(model, CUDA), given)
    np.testing.assert_allclose(got["y"], wanted[0], rtol=1e-4, atol=1e-4)
