from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused, pass_class
from edgepress.passes.prune_weights import NO_SPEED, PruneWeights
from edgepress.pipeline.driver import Driver
from edgepress.pipeline.recipe import RecipeError, parse_recipe
from tests.graphs import Array, answers, apply, conv_nets, feeds, net, nodes, random, weight
from tests.passes.int8_nets import quantized

Index = tuple[int, ...]

SIGNATURE = "(float[1,6,4,4] x) => (float[1,5] y)"
BODY = """
a = Conv <pads=[1,1,1,1]> (x, plain, bias)
b = Conv <group=7> (a, depthwise)
c = Conv <group=2> (b, grouped)
d = ConvTranspose <group=2> (c, transposed)
e = ConvTranspose <group=6> (d, transposed_depthwise)
f = Flatten(e)
g = Gemm <transB=1> (f, wide)
h = Gemm(g, tall)
i = Relu(h)
y = MatMul(i, last)
"""
SHAPES: dict[str, Index] = {
    "plain": (14, 6, 3, 3),
    "depthwise": (14, 2, 1, 1),
    "grouped": (10, 7, 1, 1),
    "transposed": (10, 3, 1, 1),
    "transposed_depthwise": (6, 1, 1, 1),
    "wide": (9, 96),
    "tall": (9, 7),
    "last": (7, 5),
}


def made(weights: dict[str, Array]) -> ir.Model:
    model = net(SIGNATURE, BODY, weights | {"bias": random(14)})
    refresh_shapes(model)
    return model


def small_integers(seed: int) -> dict[str, Array]:
    """Weights with many ties and some zeros, whose sums are exact."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-9, 10, shape) * 2.0**k).astype(np.float32)
        for k, (name, shape) in enumerate(SHAPES.items())
    }


def blocks(node: ir.Node, shape: Index, block: int) -> Iterator[list[Index]]:
    """Index by index, the weights that go together."""
    group = node.attributes.get_int("group", 1)

    def runs(first: int, channels: int) -> Iterator[range]:
        for start in range(first, first + channels, block):
            yield range(start, min(start + block, first + channels))

    if node.op_type == "Conv" or "transB" in node.attributes:
        rows = group if shape[1] > 1 else 1
        for row in range(rows):
            for run in runs(row * shape[0] // rows, shape[0] // rows):
                for rest in np.ndindex(shape[1:]):
                    yield [(channel, *rest) for channel in run]
    elif node.op_type == "ConvTranspose" and shape[:2] == (group, 1):
        for run in runs(0, group):
            for tap in np.ndindex(shape[2:]):
                yield [(channel, 0, *tap) for channel in run]
    elif node.op_type == "ConvTranspose":
        for source in range(shape[0]):
            for run in runs(0, shape[1]):
                for tap in np.ndindex(shape[2:]):
                    yield [(source, channel, *tap) for channel in run]
    else:
        for inputs in np.ndindex(shape[:-1]):
            for run in runs(0, shape[-1]):
                yield [(*inputs, channel) for channel in run]


def slow(
    layers: dict[str, ir.Node], arrays: dict[str, Array], amount: float, block: int, ranking: str
) -> dict[str, Array]:
    """The pruned weights, by loops."""
    pools = [[name] for name in layers] if ranking == "local" else [list(layers)]
    pruned = {name: arrays[name].copy() for name in layers}
    for pool in pools:
        scored: list[tuple[float, int, str, list[Index]]] = []
        for name in pool:
            array = arrays[name].astype(np.float64)
            found = list(blocks(layers[name], array.shape, block))
            means = [sum(abs(float(array[i])) for i in block) / len(block) for block in found]
            for score, indices in zip(scores(means, array, ranking), found, strict=True):
                scored.append((score, len(scored), name, indices))
        room = math.floor(Fraction(str(amount)) * sum(arrays[name].size for name in pool))
        for _, _, name, indices in sorted(scored):
            room -= len(indices)
            if room < 0:
                break
            for index in indices:
                pruned[name][index] = 0
    return pruned


def scores(means: list[float], array: Array, ranking: str) -> list[float]:
    """What the blocks of one layer are ranked by."""
    if ranking == "local":
        return means
    if ranking == "global":
        rms = math.sqrt(sum(float(x) ** 2 for x in array.flat) / array.size)
        return [mean / (rms or 1.0) for mean in means]
    # Lee et al., equation 1; of equal blocks, the first is the smaller one
    order = sorted(range(len(means)), key=lambda i: (means[i], i))
    found, above = [0.0] * len(means), 0.0
    for i in reversed(order):
        above += means[i] ** 2
        found[i] = means[i] ** 2 / above if above else 0.0
    return found


def layers_of(model: ir.Model) -> dict[str, ir.Node]:
    """The layers by the name of their weight."""
    found = {node.inputs[1].name: node for node in model.graph if len(node.inputs) > 1}  # type: ignore[union-attr]
    return {name or "": node for name, node in found.items()}


@given(
    seed=st.integers(0, 999),
    amount=st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.83, 0.999]),
    block=st.sampled_from([1, 2, 3, 4, 7, 100]),
    ranking=st.sampled_from(["global", "lamp", "local"]),
)
@settings(deadline=None, max_examples=40)
def test_it_is_the_slow_definition(seed: int, amount: float, block: int, ranking: Any) -> None:
    arrays = small_integers(seed)
    model = made(arrays)
    layers = layers_of(model)
    assert list(layers) == list(SHAPES)
    want = slow(layers, arrays, amount, block, ranking)
    before = nodes(model)
    outcome = PruneWeights(amount=amount, block=block, ranking=ranking).call(model, Context())
    assert nodes(outcome.model) == before
    for name, array in want.items():
        np.testing.assert_array_equal(weight(outcome.model, name), array)
    zeros = sum(int((array == 0).sum()) for array in want.values())
    total = sum(array.size for array in want.values())
    assert outcome.stats == {
        "weights": total,
        "zeros": zeros,
        "sparsity": pytest.approx(zeros / total, abs=1e-4),
    }
    assert outcome.modified == any((want[n] != arrays[n]).any() for n in want)
    assert outcome.skipped == []
    np.testing.assert_array_equal(weight(outcome.model, "bias"), random(14))


GOLDEN = """\
a = Conv(x, w, b)
c = ConvTranspose(a, v)
f = Flatten(c)
y = MatMul(f, m)"""


def small(scale: float = 1.0) -> ir.Model:
    model = net(
        "(float[1,3,4,4] x) => (float[1,5] y)",
        "a = Conv(x, w, b) c = ConvTranspose(a, v) f = Flatten(c) y = MatMul(f, m)",
        {
            "w": random(8, 3, 3, 3) * np.float32(scale),
            "b": random(8),
            "v": random(8, 2, 1, 1),
            "m": random(8, 5),
        },
    )
    refresh_shapes(model)
    return model


def test_the_graph_stays_as_it_is() -> None:
    model = small()
    outcome = apply(PruneWeights(), model)
    assert nodes(outcome.model) == GOLDEN
    assert set(outcome.model.graph.initializers) == {"w", "b", "v", "m"}
    assert outcome.stats == {"weights": 272, "zeros": 136, "sparsity": 0.5}


@pytest.mark.parametrize("ranking", ["global", "lamp", "local"])
def test_the_model_answers_as_if_masked_by_hand(ranking: Any) -> None:
    model = small()
    arrays = {name: weight(model, name) for name in ("w", "v", "m")}
    by_hand = small()
    for name, array in slow(layers_of(model), arrays, 0.6, 1, ranking).items():
        by_hand.graph.initializers[name].const_value = ir.tensor(array, name=name)
    inputs = feeds(model)
    got = answers(apply(PruneWeights(amount=0.6, ranking=ranking), model).model, inputs)
    np.testing.assert_array_equal(got, answers(by_hand, inputs))


@given(
    model=conv_nets(),
    amount=st.sampled_from([0.0, 0.3, 0.7, 0.95]),
    block=st.sampled_from([1, 3]),
    ranking=st.sampled_from(["global", "lamp", "local"]),
)
@settings(deadline=None, max_examples=25)
def test_random_nets(model: ir.Model, amount: float, block: int, ranking: Any) -> None:
    refresh_shapes(model)
    before = model.clone()
    step = PruneWeights(amount=amount, block=block, ranking=ranking)
    outcome = step.call(model, Context()) if block > 1 else apply(step, model)
    used = {
        node.inputs[1].name: weight(before, node.inputs[1].name or "")  # type: ignore[union-attr]
        for node in before.graph
        if node.op_type == "Conv"
    }
    assert outcome.stats["weights"] == sum(array.size for array in used.values())
    zeros, per_layer = 0, 0
    for name, old in used.items():
        new = weight(outcome.model, name or "")
        kept = new != 0
        np.testing.assert_array_equal(new[kept], old[kept])
        zeros += int((~kept).sum())
        per_layer += int(Fraction(str(amount)) * old.size)
        if ranking == "local" and block == 1 and not kept.all():
            assert np.abs(old[~kept]).max() <= np.abs(old[kept]).min(initial=np.inf)
    assert outcome.stats["zeros"] == zeros
    wanted = per_layer if ranking == "local" else int(Fraction(str(amount)) * sum(
        array.size for array in used.values()
    ))  # fmt: skip
    assert zeros == wanted if block == 1 else zeros <= wanted
    others = set(before.graph.initializers) - set(used)
    for name in others:
        np.testing.assert_array_equal(weight(outcome.model, name), weight(before, name))


def test_global_ranking_does_not_depend_on_the_scale_of_a_layer() -> None:
    plain, scaled = (apply(PruneWeights(amount=0.7), small(s)).model for s in (1.0, 1024.0))
    for name in ("w", "v", "m"):
        np.testing.assert_array_equal(weight(plain, name) == 0, weight(scaled, name) == 0)


def test_zeros_that_were_there_count() -> None:
    model = small()
    array = weight(model, "w").copy()
    array[:6] = 0
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    outcome = apply(PruneWeights(amount={"Conv_0": 0.5}), model)
    assert not outcome.modified
    assert outcome.notes == []
    assert outcome.stats == {"weights": 216, "zeros": 162, "sparsity": 0.75}
    outcome = apply(PruneWeights(amount={"Conv_0": 0.875}), model)
    assert outcome.stats == {"weights": 216, "zeros": 189, "sparsity": 0.875}


def test_a_layer_of_zeros_is_left_alone() -> None:
    outcome = apply(PruneWeights(), small(0.0))
    assert outcome.stats == {"weights": 272, "zeros": 216, "sparsity": 0.7941}
    assert not outcome.modified


@pytest.mark.parametrize(("simd_bytes", "block"), [(16, 4), (32, 8), (2, 1)])
def test_a_block_may_be_a_vector_of_the_target(simd_bytes: int, block: int) -> None:
    context = Context(simd_bytes=simd_bytes)
    vectors = PruneWeights(block="simd").call(small(), context).model
    counted = PruneWeights(block=block).call(small(), Context()).model
    for name in ("w", "v", "m"):
        np.testing.assert_array_equal(weight(vectors, name), weight(counted, name))
    runs = (weight(vectors, "w") == 0).reshape(-1, block, 27)
    np.testing.assert_array_equal(runs.all(axis=1), runs.any(axis=1))


def test_a_table_gives_every_layer_its_share() -> None:
    model = small()
    table = {"Conv.*": 0.25, "ConvTranspose_.*": 0.75}
    outcome = apply(PruneWeights(amount=table), model)
    zeros = {name: int((weight(outcome.model, name) == 0).sum()) for name in ("w", "v", "m")}
    # the transposed one matches both: the least share counts; they are ranked together
    assert zeros["w"] + zeros["v"] == (216 + 16) // 4
    assert zeros["m"] == 0
    assert outcome.skipped == [("MatMul_3", "no pattern of `amount` matches it")]
    again = apply(PruneWeights(amount=dict(reversed(table.items()))), small())
    for name in ("w", "v", "m"):
        np.testing.assert_array_equal(weight(again.model, name), weight(outcome.model, name))
    exempt = apply(PruneWeights(amount={"MatMul_3": 0, ".*": 0.5}), small())
    assert np.all(weight(exempt.model, "m"))
    assert exempt.stats["zeros"] == (216 + 16) // 2
    assert exempt.skipped == []


SHARED = "a = Conv(x, w) b = Relu(a) y = Conv(b, w)"


def shared(body: str = SHARED) -> ir.Model:
    model = net("(float[1,4,3,3] x) => (float[1,4,3,3] y)", body, {"w": random(4, 4, 1, 1)})
    refresh_shapes(model)
    return model


def test_shared_weights_are_pruned_once() -> None:
    outcome = apply(PruneWeights(), shared())
    assert nodes(outcome.model) == "a = Conv(x, w)\nb = Relu(a)\ny = Conv(b, w)"
    assert outcome.stats == {"weights": 16, "zeros": 8, "sparsity": 0.5}
    outcome = apply(PruneWeights(amount={"Conv_0": 0.25, "Conv_2": 0.5}), shared())
    assert outcome.stats["zeros"] == 4


def test_shared_weights_stay_where_one_layer_must() -> None:
    outcome = apply(PruneWeights(amount={"Conv_0": 0.5}), shared())
    assert not outcome.modified
    assert outcome.skipped == [
        ("Conv_0", "its weights are shared with a layer that no pattern of `amount` matches"),
        ("Conv_2", "no pattern of `amount` matches it"),
    ]


def test_another_role_of_the_weights_keeps_them() -> None:
    body = "a = Conv(x, w) r = Reshape(w, s) p = ReduceSum(r) b = Add(a, p) y = Conv(b, w)"
    weights: dict[str, Array] = {"w": random(4, 4, 1, 1), "s": np.array([16], np.int64)}
    model = net("(float[1,4,3,3] x) => (float[1,4,3,3] y)", body, weights)
    refresh_shapes(model)
    outcome = apply(PruneWeights(), model)
    assert nodes(outcome.model) == (
        "a = Conv(x, w_pruned)\nr = Reshape(w, s)\np = ReduceSum(r)\nb = Add(a, p)\n"
        "y = Conv(b, w_pruned)"
    )
    np.testing.assert_array_equal(weight(outcome.model, "w"), random(4, 4, 1, 1))
    assert int((weight(outcome.model, "w_pruned") == 0).sum()) == 8


DENSE = "(float[2,3] x) => (float[2,4] y)"


@pytest.mark.parametrize(
    ("signature", "body", "weights", "why"),
    [
        (
            DENSE,
            "w = DequantizeLinear(q, s) y = MatMul(x, w)",
            {"q": np.ones((3, 4), np.int8), "s": np.array(0.5, np.float32)},
            "quantized already; prune before quantize-int8",
        ),
        (DENSE, "w = Exp(v) y = MatMul(x, w)", {"v": random(3, 4)}, "is not constant"),
        (
            DENSE.replace(" x)", " x, float[3,4] w)"),
            "y = MatMul(x, w)",
            {"w": random(3, 4)},
            "its weights are an input of the model",
        ),
        (
            DENSE.replace(" y)", " y, float[3,4] w)"),
            "y = MatMul(x, w)",
            {"w": random(3, 4)},
            "its weights are an output of the model",
        ),
        (
            DENSE.replace("float", "int32"),
            "y = MatMul(x, w)",
            {"w": np.ones((3, 4), np.int32)},
            "its weights are INT32",
        ),
    ],
)
def test_what_cannot_be_pruned_says_why(
    signature: str, body: str, weights: dict[str, Array], why: str
) -> None:
    model = net(signature, body, weights)
    name = next(node.name for node in model.graph if node.op_type == "MatMul")
    before = ir.to_proto(model)
    outcome = PruneWeights().call(model, Context())
    ((where, reason),) = outcome.skipped
    assert where == name
    assert why in reason
    assert not outcome.modified
    assert outcome.stats == {"weights": 0, "zeros": 0, "sparsity": 0.0}
    assert ir.to_proto(outcome.model) == before


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "DOUBLE"])
@pytest.mark.parametrize("block", [1, 2])
def test_every_float_keeps_its_dtype(dtype: str, block: int) -> None:
    kind = ir.DataType[dtype]
    model = net(DENSE.replace("float", dtype.lower()), "y = MatMul(x, w)", {"w": random(3, 4)})
    array = random(3, 4).astype(kind.numpy())
    model.graph.initializers["w"].const_value = ir.tensor(array, dtype=kind, name="w")
    refresh_shapes(model)
    outcome = PruneWeights(block=block).call(model, Context())
    got = weight(outcome.model, "w")
    assert got.dtype == array.dtype
    assert int((got == 0).sum()) == 6
    np.testing.assert_array_equal(got[got != 0], array[got != 0])


@pytest.mark.parametrize(("shape", "columns"), [((3,), 1), ((2, 3, 4), 4)])
def test_matmul_with_more_or_fewer_axes(shape: Index, columns: int) -> None:
    signature = f"(float[2,1,3] x) => (float[2,1,{columns}] y)"
    model = net(signature if columns > 1 else "(float[2,3] x) => (float[2] y)",
                "y = MatMul(x, w)", {"w": random(*shape)})  # fmt: skip
    refresh_shapes(model)
    got = weight(apply(PruneWeights(amount=0.5, block=2), model).model, "w")
    assert int((got == 0).sum()) == math.prod(shape) // 2
    runs = (got == 0).reshape(-1, min(2, columns))
    np.testing.assert_array_equal(runs.all(axis=1), runs.any(axis=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amount": 1.0}, ("amount: it is 1.0", "below 1")),
        ({"amount": -0.1}, ("amount: it is -0.1",)),
        ({"amount": math.nan}, ("amount: it is nan",)),
        ({"amount": {"a": 0.5, "b": 1.5}}, ("amount of 'b': it is 1.5",)),
        ({"amount": {"(": 0.5}}, ("amount of '('", "not a regular expression")),
        ({"amount": {}}, ("the table is empty", "conv.*")),
        ({"block": 0}, ("block: it is 0", "'simd'")),
        ({"block": "smd"}, ("block: it is 'smd'",)),
        ({"ranking": "layer"}, ("ranking: it is 'layer'", "'local'")),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(PassRefused) as caught:
        PruneWeights(**options)
    for word in ("prune-weights: ", *words):
        assert word in str(caught.value)


def test_a_pattern_without_a_layer_is_refused_with_near_names() -> None:
    with pytest.raises(PassRefused, match=r"'conv_0'.*no layer's whole name\. Near it: Conv_0"):
        PruneWeights(amount={"conv_0": 0.5}).requires(small(), Context())
    with pytest.raises(PassRefused, match=r"Flatten.*layers are Conv, "):
        PruneWeights(amount={"Flatten_2": 0.5}).requires(small(), Context())


def test_a_recipe_says_it_in_a_table() -> None:
    text = 'schema = 1\n[[pass]]\nname = "prune-weights"\n'
    (step,) = parse_recipe(text + 'amount = { "conv.*" = 0.5, fc = 0 }\nblock = "simd"\n').passes
    assert step == PruneWeights(amount={"conv.*": 0.5, "fc": 0.0}, block="simd")
    (step,) = parse_recipe(text + 'amount = 0.3\nblock = 4\nranking = "local"\n').passes
    assert step == PruneWeights(amount=0.3, block=4, ranking="local")
    with pytest.raises(RecipeError, match=r"recipe.toml:2: .*amount: it is 2"):
        parse_recipe(text + "amount = 2\n")


def test_the_report_names_the_sparsest_layers() -> None:
    assert pass_class("prune-weights") is PruneWeights
    driver = Driver(small())
    driver.run([PruneWeights(amount={"Conv_0": 0.5, "MatMul_3": 0.75, ".*_1": 0.25})], Context())
    (record,) = driver.records
    assert record.notes == [
        "Sparsest layers: MatMul_3 75.0%, Conv_0 50.0%, ConvTranspose_1 25.0%.",
        NO_SPEED,
    ]
    assert record.equivalence is not None
    assert record.equivalence.metric == "sqnr_db"
    assert record.stats["sparsity"] == round((108 + 30 + 4) / 272, 4)


def test_zeros_survive_quantization() -> None:
    model = apply(PruneWeights(amount=0.8), small()).model
    zeros = {name: weight(model, name) == 0 for name in ("w", "m")}
    integers = quantized(model).model
    for name, mask in zeros.items():
        assert not weight(integers, f"{name}_quantized")[mask].any()
