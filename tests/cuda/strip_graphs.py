"""Graphs of one convolution on an emulated GPU, against the references."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepress.targets.float_format import KEY
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.reference import Reference
from tests.cuda.emulation import emulate
from tests.graphs import answers, feeds


def check_integer_graph(model: ir.Model, kernel: str) -> None:
    """Compare with the integer reference, bit for bit; a kernel of this name must be called."""
    program = lower(model, load_target("cuda-sm90"))
    assert any(kernel in call.kernel for call in program.calls)
    x = feeds(model)
    wanted = Reference(model).run(x)
    for name, answer in emulate(program, x).items():
        np.testing.assert_array_equal(answer, wanted[name])


def check_float_graph(model: ir.Model, form: str, kernel: str, tolerance: float) -> None:
    """Compare `y` with onnxruntime's, within a share of its largest value."""
    wanted = answers(model, feeds(model))[0]
    model.metadata_props[KEY] = form
    program = lower(model, load_target("cuda-sm90"))
    (call,) = (call for call in program.calls if kernel in call.kernel)
    assert program.tensors[call.outputs[0]].dtype == form
    answer = emulate(program, feeds(model))["y"]
    np.testing.assert_allclose(answer, wanted, 0, tolerance * float(np.abs(wanted).max()))
