import numpy as np
import pytest

from edgepress.targets.lowering.tables import FUNCTIONS, table
from tests.graphs import answers, net

ATTRIBUTES = {
    "Elu": "alpha=0.3",
    "HardSigmoid": "alpha=0.3, beta=0.4",
    "LeakyRelu": "alpha=0.2",
    "Selu": "alpha=1.5, gamma=1.1",
}


@pytest.mark.parametrize(
    ("op_type", "with_attributes"),
    [*((name, False) for name in sorted(FUNCTIONS)), *((name, True) for name in ATTRIBUTES)],
)
def test_functions_are_those_of_onnx(op_type: str, with_attributes: bool) -> None:
    attributes = f"<{ATTRIBUTES[op_type]}>" if with_attributes else ""
    model = net("(float[301] x) => (float[301] y)", f"y = {op_type} {attributes} (x)", opset=20)
    x = np.linspace(-90, 60, 301).astype(np.float32)
    with np.errstate(over="ignore"):
        (wanted,) = answers(model, {"x": x})
    real = FUNCTIONS[op_type](x.astype(np.float64), next(iter(model.graph)))
    finite = np.isfinite(wanted)
    np.testing.assert_allclose(real[finite], wanted[finite], rtol=2e-6, atol=1e-6)


def test_gelu_by_tanh() -> None:
    body = 'y = Gelu <approximate="tanh"> (x)'
    model = net("(float[61] x) => (float[61] y)", body, opset=20)
    x = np.linspace(-6, 6, 61).astype(np.float32)
    real = FUNCTIONS["Gelu"](x.astype(np.float64), next(iter(model.graph)))
    np.testing.assert_allclose(real, answers(model, {"x": x})[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op_type", sorted(FUNCTIONS))
def test_functions_stay_finite_where_a_table_needs_them(op_type: str) -> None:
    """Float steps of a hostile scale: what leaves float64 saturates, and nothing warns."""
    node = next(iter(net("(float[1] x) => (float[1] y)", f"y = {op_type}(x)", opset=20).graph))
    x = np.arange(-128, 128) * 1e6
    entries = table(FUNCTIONS[op_type](x, node), 0.1, 10, 0, 255, "uint8")
    assert entries.dtype == np.uint8
    assert len(entries) == 256


def test_entries_round_half_to_even_and_saturate() -> None:
    real = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, np.inf])
    entries = table(real, 1.0, -3, -100, 100, "int8")
    assert entries.tolist() == [-3, -1, -1, -3, -5, 100, -100, 100]
