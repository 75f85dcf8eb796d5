"""What onnxruntime runs against a bundle of each kind of arithmetic, and golden samples."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgepress.passes.base import Context
from edgepress.passes.quantize_dynamic import QuantizeDynamic
from edgepress.pipeline import snapshot
from edgepress.pipeline.bundle import Bundle
from edgepress.pipeline.rivals import golden_samples, onnxruntime_rivals
from tests.graphs import random
from tests.pipeline import bundles
from tests.targets.qdq import shaped


def bundle_of(folder: Path, arithmetic: str, graph: ir.Model) -> Bundle:
    bundle = bundles.write(folder / "bundle")
    (bundle.folder / "graph.onnx").write_bytes(snapshot.take(graph).model)
    manifest = dataclasses.replace(bundle.manifest, arithmetic=arithmetic)
    return dataclasses.replace(bundle, manifest=manifest)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ir.save(bundles.graph(), path)
    return path


@pytest.mark.parametrize("given", [True, False])
def test_floats_and_static_integers_race_their_own_graph(
    tmp_path: Path, model: Path, given: bool
) -> None:
    floats = bundle_of(tmp_path, "float", bundles.graph())
    graph = floats.folder / "graph.onnx"
    original = model if given else None
    assert onnxruntime_rivals(floats, original, tmp_path) == {"onnxruntime fp32": original or graph}
    integers = dataclasses.replace(
        floats, manifest=dataclasses.replace(floats.manifest, arithmetic="integer")
    )
    wanted = {"onnxruntime int8": graph} | ({"onnxruntime fp32": model} if given else {})
    assert onnxruntime_rivals(integers, original, tmp_path) == wanted


def test_dynamic_integers_race_what_onnxruntime_quantizes_itself(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = shaped(QuantizeDynamic().call(shaped(bundles.graph()), Context()).model)
    bundle = bundle_of(tmp_path, "integer", graph)
    alone = onnxruntime_rivals(bundle, None, tmp_path)
    assert alone == {"onnxruntime, the same graph": bundle.folder / "graph.onnx"}
    with caplog.at_level(logging.WARNING):
        rivals = onnxruntime_rivals(bundle, model, tmp_path)
    assert caplog.records == []
    assert rivals["onnxruntime fp32"] == model
    made = ir.load(rivals["onnxruntime int8"])
    assert "DynamicQuantizeLinear" in [node.op_type for node in made.graph]
    x = random(1, 4)
    answers = [
        np.asarray(onnxruntime.InferenceSession(path).run(None, {"x": x})[0])
        for path in rivals.values()
    ]
    np.testing.assert_allclose(answers[0], answers[1], atol=0.05)


def test_golden_samples_are_read_back(tmp_path: Path) -> None:
    bundle = bundles.write(tmp_path / "b")
    samples = golden_samples(bundle)
    assert len(samples) == 1
    assert samples.inputs["x"].dtype == np.float32
    (feed,) = samples.feeds({"x": (1, 4)})
    np.testing.assert_array_equal(feed["x"], random(1, 4))
