"""Functions as tables and softmaxes in integers, on emulated boards: the reference's bits."""

from pathlib import Path

import pytest

from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.build import lower
from tests.targets.kernels import compare, program_of, target_of
from tests.targets.qdq import check_graphs, drawn, inputs_of, merged
from tests.targets.test_bit_equality import EMULATED, emulate, need_board
from tests.targets.test_composite import function_nets
from tests.targets.test_softmax import softmax_cases, softmax_nets


@pytest.mark.parametrize("isa", EMULATED)
def test_boards(isa: str, tmp_path: Path) -> None:
    """Graphs and single kernels in one bundle."""
    need_board(isa)
    models = drawn(function_nets(), 10) + drawn(softmax_nets(), 10)
    inputs = inputs_of(models)
    cases = softmax_cases(load_isa(isa))
    kernels, arguments = program_of(cases)
    graphs = [lower(model, target_of(isa)) for model in models]
    joined = {
        f"g{i}_{n}": a for i, feed in enumerate([*inputs, arguments]) for n, a in feed.items()
    }
    results = emulate(merged([*graphs, kernels]), isa, tmp_path, joined)
    assert check_graphs(models, inputs, results) == len(models)
    compare(cases, {f"k{i}_out": results[f"g{len(models)}_k{i}_out"] for i in range(len(cases))})
