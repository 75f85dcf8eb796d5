"""Attention: which graphs become one node, and that its kernel answers what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.lib.stride_tricks import as_strided

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.lowering.attention import fuse_attention
from edgepress.targets.lowering.decompose import simplify
from edgepress.targets.lowering.dialect import DOMAIN, array_of, shape_of
from edgepress.targets.lowering.floats import claim
from edgepress.targets.lowering.rewriting import evaluate
from edgepress.targets.program import Array
from edgepress.targets.schedules.attention import AttentionShape, attention
from edgepress.targets.schedules.panel import Place
from tests.graphs import answers, feeds
from tests.targets.attention_forms import FORMS, OTHERS, Form
from tests.targets.interpret import run_program
from tests.targets.kernels import (
    Case,
    compare,
    native_isas,
    program_of,
    target_of,
)
from tests.targets.qdq import merged_graphs
from tests.targets.test_bit_equality import emulate, need_board

ISAS = [isa for isa in native_isas() if isa != "avx512"]  # whose floats are those of avx512_vnni
COPIED = (  # not all is read where it lies
    "causal Attention of opset 23, fewer heads of keys",
    "channels first",
    "results by head, and joined",
)
ERROR = 2e-6  # of the largest result


def fused(model: ir.Model) -> ir.Model:
    """The graph without what nobody reads any more."""
    return claim(fuse_attention(simplify(model)), {})


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def place(node: ir.Node, name: str, value: Array, shape: tuple[int, ...]) -> Array:
    """What a place shows, in float64."""
    start, *strides = node.attributes[name].as_ints()
    flat = value.reshape(-1)[start:]
    return as_strided(flat, shape, [4 * s for s in strides], writeable=False).astype(np.float64)


def attended(node: ir.Node, operands: list[Array]) -> Array:
    """What an `Attention` node says, in NumPy."""
    batch, heads, queries, width, keys, value_width = node.attributes["sizes"].as_ints()
    q, k, v = operands[:3]
    q = place(node, "query", q, (batch, heads, queries, width))
    k = place(node, "key", k, (batch, heads, keys, width))
    v = place(node, "value", v, (batch, heads, keys, value_width))
    scores = q @ k.swapaxes(2, 3) * node.attributes["scale"].as_float()
    if len(operands) > 3:
        scores += place(node, "mask", operands[3], (batch, heads, queries, keys))
    y = np.empty(shape_of(node.outputs[0]), np.float32)
    strides = [4 * stride for stride in (*node.attributes["output"].as_ints(), 1)]
    mixed = shares(scores, bool(node.attributes["zero_rows"].as_int())) @ v
    as_strided(y, mixed.shape, strides)[...] = mixed
    return y


def shares(scores: Array, zero_rows: bool = False) -> Array:
    """Softmax over the last axis."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        shares = powers / powers.sum(-1, keepdims=True)
    if zero_rows:
        shares[(scores == -np.inf).all(-1)] = 0
    return np.asarray(shares)


def computed(model: ir.Model, inputs: dict[str, Array]) -> list[Array]:
    """Run a graph with `Attention` nodes, node by node."""
    known = dict(inputs)
    opset = model.graph.opset_imports[""]
    for value in model.graph.initializers.values():
        array = array_of(value)
        assert array is not None
        known[value.name or ""] = array
    for node in model.graph:
        operands = {v.name or "": known[v.name or ""] for v in node.inputs if v is not None}
        if node.domain == DOMAIN:
            values = [known[v.name or ""] for v in node.inputs if v is not None]
            known[node.outputs[0].name or ""] = attended(node, values)
        else:
            known |= evaluate(ir.to_proto(node), operands, opset)
    return [known[value.name or ""] for value in model.graph.outputs]


def inputs_for(model: ir.Model) -> dict[str, Array]:
    """Random inputs, of which the last row of a mask of bool is all true or all false."""
    given = feeds(model)
    for array in given.values():
        if array.dtype == np.bool_ and array.shape[-2] > 1:
            array[0, :, -1] = False
            array[1:, :, -1] = True
    return given


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_exporters_become_one_node(name: str) -> None:
    model = FORMS[name].model()
    inputs = inputs_for(model)
    found = fused(model)
    assert operators(found).count("Attention") == 1
    copied = {"MatMul", "Softmax"} if name in COPIED else {"MatMul", "Softmax", "Transpose"}
    assert not copied & set(operators(found))
    for want, got in zip(answers(model, inputs), computed(found, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_attention_stays(name: str) -> None:
    model = OTHERS[name].model()
    assert fuse_attention(model) is model
    assert "Attention" not in operators(fused(model))


def test_operands_are_read_where_they_are_computed() -> None:
    (node,) = (n for n in fused(FORMS["BERT"].model()).graph if n.op_type == "Attention")
    assert [value.name for value in node.inputs if value] == ["q", "k", "v", "m"]
    assert node.outputs[0].name == "y"
    model = fused(FORMS["one projection, gathered"].model())
    (node,) = model.graph
    assert {value.name for value in node.inputs if value} == {"x"}
    starts = [node.attributes[name].as_ints()[0] for name in ("query", "key", "value")]
    assert starts == [0, 12, 24]


def test_a_mask_of_all_layers_is_made_once() -> None:
    body = """s = MatMul(q, k) t = Where(c, s, fill) p = Softmax(t) y = MatMul(p, v)
        s2 = MatMul(y, k) t2 = Where(c, s2, fill) p2 = Softmax(t2) z = MatMul(p2, v)"""
    signature = "(float[5,8] q, float[8,7] k, float[7,8] v, bool[5,7] c) => (float z)"
    model = Form(signature, body, {"fill": np.array(-np.inf, np.float32)}).model()
    assert sorted(operators(fused(model))) == ["Attention", "Attention", "Where"]


# Kernels -------------------------------------------------------------------------------------


def attention_case(
    isa: Isa,
    sizes: tuple[int, int, int, int, int, int],
    mask: tuple[int, int, int, int] | None = None,
    *,
    by_head: bool = False,
    scale: float = 0.0,
    zero_rows: bool = False,
    spread: float = 1.0,
) -> Case:
    """Random operands of `(batch, heads, queries, keys, width, value width)`.

    The mask has the given shape, and hides many keys; K and the results lie by head, transposed,
    where asked for.
    """
    batch, heads, queries, keys, width, value_width = sizes
    random = np.random.default_rng([*sizes])
    q, k, v = (
        random.standard_normal(shape).astype(np.float32) * np.float32(spread)
        for shape in (
            (batch, queries, heads, width),
            (batch, keys, heads, width),
            (batch, keys, heads, value_width),
        )
    )
    scale = scale or width**-0.5
    scores = np.einsum("bqhw,bkhw->bhqk", q.astype(np.float64), k.astype(np.float64)) * scale
    arguments = [q, k, v]
    if mask is not None:
        hidden = random.random(mask) < 0.4
        hidden[..., 0] = False
        hidden[..., -1, :] |= zero_rows
        added = np.where(hidden, -np.inf, random.standard_normal(mask)).astype(np.float32)
        scores += added
        arguments.append(added)
    wanted = np.einsum("bhqk,bkhw->bhqw", shares(scores, zero_rows), v.astype(np.float64))
    if by_head:
        arguments[1] = np.ascontiguousarray(k.transpose(0, 2, 3, 1))
    else:
        wanted = wanted.transpose(0, 2, 1, 3)
    wanted = np.ascontiguousarray(wanted.astype(np.float32))
    orders = [(0, 2, 1, 3), (0, 1, 3, 2) if by_head else (0, 2, 1, 3), (0, 2, 1, 3), (0, 1, 2, 3)]
    places = [_place_of(a, order) for a, order in zip(arguments, orders, strict=False)]
    output = _place_of(wanted, (0, 1, 2, 3) if by_head else (0, 2, 1, 3))
    shape = AttentionShape(
        *(batch, heads, queries, keys, width, value_width),
        *(places[0], places[1], places[2], places[3] if mask else None, output),
        scale,
        zero_rows,
    )
    what = f"{isa.name} {sizes} {mask} {by_head} {scale} {zero_rows}"
    return Case(lambda name: attention(name, shape, isa), tuple(arguments), wanted, what)


def _place_of(array: Array, order: tuple[int, ...]) -> Place:
    view = array.transpose(order)
    pairs = zip(view.shape, view.strides, strict=True)
    batch, head, row, column = (0 if size == 1 else stride // 4 for size, stride in pairs)
    return Place(array.size, 0, batch, head, row, column or 1)


def grid(isa: Isa) -> list[Case]:
    return [
        attention_case(isa, (1, 2, 17, 36, 32, 32), (1, 1, 17, 36)),
        attention_case(isa, (2, 3, 5, 7, 3, 5), by_head=True),
        attention_case(isa, (2, 2, 3, 21, 17, 40), (2, 1, 1, 21), zero_rows=True),
        attention_case(isa, (1, 1, 1, 1, 1, 1), (1, 1, 1, 1)),
        attention_case(isa, (1, 1, 7, 20, 6, 4), (1, 1, 7, 20), zero_rows=True, scale=-2.0),
        attention_case(isa, (1, 2, 4, 33, 8, 8), spread=30.0),
    ]


@pytest.mark.parametrize("isa", ISAS)
def test_kernels(isa: str) -> None:
    cases = grid(load_isa(isa))
    cases.append(attention_case(load_isa(isa), (1, 1, 130, 197, 64, 64)))  # in parts, on threads
    program, given = program_of(cases)
    results = run_program(program, target_of(isa), given)
    for index, case in enumerate(cases):
        error = np.abs(results[f"k{index}_out"] - case.wanted).max()
        assert error <= ERROR * np.abs(case.wanted).max(), case.what


def test_not_a_number_stays() -> None:
    isa = load_isa(ISAS[-1])
    case = attention_case(isa, (1, 1, 3, 5, 4, 4), (1, 1, 3, 5))
    q, k, v, mask = (argument.copy() for argument in case.arguments)
    q[0, 1] = np.nan
    mask[0, 0, 2] = -np.inf
    program, given = program_of([Case(case.kernel, (q, k, v, mask), case.wanted, "NaN")])
    (got,) = run_program(program, target_of(ISAS[-1]), given).values()
    np.testing.assert_array_equal(np.isnan(got[0, :, 0, 0]), [False, True, True])
    np.testing.assert_allclose(got[0, 0], case.wanted[0, 0], rtol=1e-5)


def test_compiled_graphs() -> None:
    chosen = ["one projection, split and sliced", "two masks", "channels first"]
    models = [FORMS[name].model() for name in chosen]
    inputs = [inputs_for(model) for model in models]
    program, joined = merged_graphs(models, target_of(ISAS[-1]), inputs)
    results = run_program(program, target_of(ISAS[-1]), joined)
    for index, (model, given) in enumerate(zip(models, inputs, strict=True)):
        (wanted,) = answers(model, given)
        np.testing.assert_allclose(results[f"g{index}_y"], wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("isa", ["neon", "neon_armv7", "scalar"])
def test_other_instruction_sets(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    cases = grid(load_isa(isa))[:3]
    program, given = program_of(cases)
    compare(cases, emulate(program, isa, tmp_path, given))
