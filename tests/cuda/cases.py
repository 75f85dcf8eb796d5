"""Kernels of CUDA and what NumPy says they must answer, many of them in one emulated program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.targets.float_format import KEY, FloatFormat
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Program
from edgepress.targets.reference import Reference
from tests.cuda.emulation import emulate
from tests.graphs import answers, feeds
from tests.targets.kernels import Case, compare, program_of

MULTIPROCESSORS = 8
"""So few that kernels of a few thousand elements have several blocks, and threads several turns."""


def check(cases: Sequence[Case]) -> None:
    """Compile, emulate, and compare: bit for bit, floats to the tolerance of `compare`."""
    program, feeds = program_of(cases)
    compare(cases, emulate(program, feeds))


def check_halves(cases: Sequence[Case], tolerance: float = 2.0**-10) -> None:
    """Emulate kernels that store float16, and compare with float32 answers."""
    stored = [dataclasses.replace(case, wanted=case.wanted.astype(np.float16)) for case in cases]
    program, feeds = program_of(stored)
    answers = emulate(program, feeds)
    for case, answer in zip(cases, answers.values(), strict=True):
        given = answer.astype(np.float32)
        np.testing.assert_allclose(given, case.wanted, tolerance, tolerance, err_msg=case.what)


def run_exact(model: ir.Model, target: str = "cuda-sm90") -> Program:
    """Lower and emulate a quantized model, and compare with the reference bit for bit."""
    program, feed, reference = lower(model, load_target(target)), feeds(model), Reference(model)
    assert reference.exact
    results = emulate(program, feed)
    for name, wanted in reference.run(feed).items():
        np.testing.assert_array_equal(results[name], wanted, name)
    return program


def run_floats(
    model: ir.Model, floats: FloatFormat, *, rtol: float, atol: float, target: str = "cuda-sm90"
) -> Program:
    """Lower and emulate a float model, and compare with onnxruntime."""
    model.metadata_props[KEY] = floats
    program, feed = lower(model, load_target(target)), feeds(model)
    results = emulate(program, feed)
    for name, wanted in zip(program.outputs, answers(model, feed), strict=True):
        np.testing.assert_allclose(results[name], wanted, rtol, atol, err_msg=name)
    return program
