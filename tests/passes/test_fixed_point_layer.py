from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Array
from edgepress.calibration.fixed_point import Format
from edgepress.passes._fixed_point_layer import ACCUMULATOR, FloatLayer, weight_formats
from edgepress.passes._fixed_point_rules import reach
from edgepress.passes._formats import Observed, narrowed
from tests.graphs import net, random

GEMM = ir.node("Gemm", [], name="gemm")
WHOLE = (-(2**15), 2**15 - 1)


def f32(values: object) -> Array:
    return np.array(values, np.float32)


def layer(
    weight: Array, bias: Array | None = None, *, bits: int = 16, **given: object
) -> FloatLayer:
    options = {"per_channel": True, "rounding": (np.rint, np.rint), **given}
    return FloatLayer(node=GEMM, weight=weight, bias=bias, bits=bits, **options)  # type: ignore[arg-type]


def test_weights_get_the_finest_format_that_fits() -> None:
    rows = np.array([[0.5, -0.1, 0.3], [1.0, 0.5, 0.25], [100.0, 99.0, 98.0]], np.float32)
    assert weight_formats(rows, 8).tolist() == [7, 6, 0]
    assert weight_formats(rows, 16).tolist() == [15, 14, 8]


def test_one_large_weight_saturates_where_the_others_gain_more() -> None:
    many = np.tile(f32([0.303, -0.205, 0.1017]), 100)
    rows = np.stack([np.append(many, np.float32(edge)) for edge in (1.0, 1.5)])
    # 1.0 is 128 steps of 2**-7 and loses one; 1.5 would lose 65
    assert weight_formats(rows, 8).tolist() == [7, 6]
    made = layer(rows.T, bits=8).fixed(Format(8, 4), (-128, 127))
    assert made.saturated == 1
    assert made.weight[-1].tolist() == [127, 96]


def test_a_channel_of_zeros_borrows_the_coarsest_format() -> None:
    rows = np.array([[0.0, 0.0], [0.001, 0.002], [3.0, 1.0]], np.float32)
    assert weight_formats(rows, 8).tolist() == [5, 15, 5]
    assert weight_formats(np.zeros((2, 3), np.float32), 8).tolist() == [7, 7]
    bias = np.array([5.0, 0.0, 0.0], np.float32)
    made = layer(rows.T, bias, bits=8).fixed(Format(8, 10), (-128, 127))
    assert made.bias is not None
    assert made.bias.tolist() == [5 * 2**15, 0, 0]


def test_products_have_at_most_a_hundred_fraction_bits() -> None:
    weight = np.full((2, 1), 1e-9, np.float32)
    made = layer(weight, np.zeros(1, np.float32)).fixed(Format(16, 80), WHOLE)
    assert made.fraction_bits.tolist() == [20]
    assert made.products.tolist() == [2.0**-100]
    assert made.rescaled == 1


def test_products_beyond_float32_are_refused() -> None:
    with pytest.raises(OverflowError, match="beyond float32"):
        layer(np.full((2, 1), 1e30, np.float32)).fixed(Format(16, -60), WHOLE)


def test_a_large_bias_takes_the_bits_of_its_channel_alone() -> None:
    weight = np.tile(f32([[0.5, 0.5]]), (4, 1))
    made = layer(weight, f32([1.0, 1e6]), bits=8).fixed(Format(8, 7), (-128, 127))
    assert made.fraction_bits.tolist() == [7, 4]
    assert made.bias is not None
    assert made.bias.tolist() == [2**14, 1e6 * 2**11]
    assert made.rescaled == 1
    assert made.saturated_biases == 0
    single = layer(weight, f32([1.0, 1e6]), bits=8, per_channel=False)
    made = single.fixed(Format(8, 7), (-128, 127))
    assert made.fraction_bits.shape == ()
    assert made.fraction_bits == 4


@pytest.mark.parametrize("limits", [WHOLE, (0, 2**15 - 1), (-511, 511)])
def test_sums_of_either_sign_stay_in_int32_and_no_bit_is_given_away(
    limits: tuple[int, int],
) -> None:
    weight = np.concatenate([np.abs(random(300, 4)), -np.abs(random(200, 4))])
    bias = f32([0, 1, -1, 0.5])
    made = layer(weight, bias).fixed(Format(16, 15), limits)
    assert made.bias is not None
    worst = []
    for x in limits:
        for positive in (True, False):  # all of one sign at one end, the others at the other
            ends = np.where((weight > 0) == positive, x, sum(limits) - x)
            worst.append((made.weight.astype(np.int64) * ends).sum(axis=0) + made.bias)
    largest = np.abs(np.array(worst)).max(axis=0)
    assert (largest < ACCUMULATOR).all()
    finer = made.fraction_bits < 15  # those that were made coarser could not be one bit finer
    assert (largest[finer] > ACCUMULATOR // 2 - 2**24).all()


def test_the_bias_takes_back_what_rounding_does_to_the_mean() -> None:
    weight, mean = f32([[0.26], [0.77]]), np.array([2.0, 4.0])
    plain = layer(weight, f32([1.0]), bits=8).fixed(Format(8, 5), (-128, 127))
    mended = layer(weight, f32([1.0]), bits=8, mean=mean).fixed(Format(8, 5), (-128, 127))
    stored = plain.weight.astype(float) / 128
    np.testing.assert_array_equal(mended.weight, plain.weight)
    assert plain.bias is not None
    assert mended.bias is not None
    wanted = (weight.astype(float) * mean[:, None]).sum() + 1.0
    got = (stored * mean[:, None]).sum() + mended.bias[0] / 2**12
    assert abs(got - wanted) <= 2**-13 < abs(got - mended.bias[0] / 2**12 + 1.0 - wanted)
    assert layer(weight, bits=8, mean=mean).fixed(Format(8, 5), (-128, 127)).bias is not None


def test_the_noise_of_weights_is_their_error_over_their_power() -> None:
    weight = f32([[0.3, 0.0], [0.9, 0.0]])
    made = layer(weight, bits=8).fixed(Format(8, 5), (-128, 127))
    error = np.square(made.weight[:, 0] / 128 - weight[:, 0].astype(float)).sum()
    assert made.noise == pytest.approx(error / (0.09 + 0.81) / 2, rel=1e-5)


def test_an_activation_gives_up_bits_until_both_errors_balance() -> None:
    values = np.random.default_rng(0).uniform(-0.99, 0.99, (64, 100)).astype(np.float32)
    observed = Observed(Format(16, 15))
    observed.see(values)
    # rounding to steps of 2**-15 costs 1/12 step² of a power of 1/3
    assert observed.noise() == pytest.approx(4.0**-15 / 4, rel=0.05)
    assert observed.noise(2) == pytest.approx(16 * observed.noise())

    def chosen(inputs: int) -> Format:
        wide = layer(random(inputs, 8))
        return narrowed(observed, [GEMM], lambda _, f: wide.fixed(f, f.limits))

    assert chosen(2) == Format(16, 15)
    widths = [chosen(inputs).bits for inputs in (2, 32, 512, 8192)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] <= 14
    assert chosen(512).bits - chosen(512).fraction_bits == 1  # the range stays
    assert narrowed(observed, [], lambda _, f: layer(random(2, 8)).fixed(f, f.limits)).bits == 16


def test_saturated_values_are_counted_and_their_error_stays() -> None:
    observed = Observed(Format(8, 7))
    observed.see(f32([2.0, -3.0, 0.5, 0.25]))
    observed.see(f32([0.5]))
    assert (observed.values, observed.saturated) == (5, 2)
    lost = (2 - 127 / 128) ** 2 + 2.0**2
    assert observed.noise() == pytest.approx(lost / (4 + 9 + 0.25 + 0.0625 + 0.25))
    assert observed.noise(3) == observed.noise()


def test_the_graph_bounds_what_an_activation_holds() -> None:
    model = net(
        "(float[1,2,4,4] x) => (float[1,4,4,4] k)",
        "r = Relu(x) c = Clip(x, low, high) m = MaxPool <kernel_shape=[1,1]> (c) s = Sigmoid(x) "
        "k = Concat <axis=1> (r, m)",
        {"low": np.array(-1, np.float32), "high": np.array(3, np.float32)},
    )
    values = {
        v.name: v for v in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))
    }
    whole, narrow = Format(8, 4), Format(7, 3)
    apart = {v: v for v in values.values()}
    together = apart | dict.fromkeys((values["r"], values["m"]), values["k"])

    def limits(
        name: str, stored: Format = whole, roots: dict[ir.Value, ir.Value] = apart
    ) -> object:
        return reach(values[name], stored, 8, roots)

    assert limits("x") == (-128, 127)
    assert limits("x", narrow) == (-63, 63)
    assert limits("r") == (0, 127)
    assert limits("r", narrow) == (0, 63)
    assert limits("c") == limits("m") == (-16, 48)
    assert limits("s") == (-128, 127)
    assert limits("k") == (-128, 127)
    assert limits("k", roots=together) == (-16, 127)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_counts_on_top_of_the_products(sign: int) -> None:
    made = layer(f32([[-0.9 * sign]] * 2), f32([1.5 * sign])).fixed(Format(16, 15), WHOLE)
    assert made.bias is not None
    assert made.fraction_bits.tolist() == [14]
    assert abs(int(made.bias[0])) + abs(int(made.weight.sum())) * 2**15 < ACCUMULATOR


def test_the_noise_is_the_same_for_every_order_of_the_samples() -> None:
    samples = random(9, 50) * np.float32(10) ** np.arange(-4, 5, dtype=np.float32)[:, None]
    found: set[float] = set()
    for seed in range(20):
        observed = Observed(Format(8, 2))
        for sample in np.random.default_rng(seed).permutation(samples):
            observed.see(sample)
        found.add(observed.noise())
    assert len(found) == 1
