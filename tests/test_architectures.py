"""The untrained networks of the benchmarks are those of the papers, and their activations live."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

Array = npt.NDArray[Any]


def architectures() -> ModuleType:
    """The benchmarks are no package: their files are scripts."""
    path = Path(__file__).parent.parent / "benchmarks/architectures.py"
    spec = importlib.util.spec_from_file_location("architectures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ARCHITECTURES = architectures()
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 224, 224), np.float32)
# as torchvision counts its own, which has the same layers
PARAMETERS = {"resnet18": 11_689_512, "mobilenetv2": 3_504_872}
MACS = {"resnet18": 1_814_073_344, "mobilenetv2": 300_774_272}


@pytest.fixture(scope="module", params=["resnet18", "mobilenetv2"])
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    built: onnx.ModelProto = getattr(ARCHITECTURES, request.param)(IMAGES)
    return built


def run(model: onnx.ModelProto, images: Array, names: list[str]) -> list[Array]:
    """Return any values of a model, inner ones too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    answers: Any = session.run(None, {"input": images})
    return list(answers)


def weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}


def test_it_has_the_papers_parameters(model: onnx.ModelProto) -> None:
    statistics = {
        name
        for node in model.graph.node
        if node.op_type == "BatchNormalization"
        for name in node.input[3:5]
    }
    trained = sum(w.size for name, w in weights(model).items() if w.ndim and name not in statistics)
    assert trained == PARAMETERS[model.graph.name]


def test_it_has_the_papers_multiply_accumulates(model: onnx.ModelProto) -> None:
    arrays = weights(model)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    outputs = run(model, IMAGES[:1], [node.output[0] for node in layers])
    macs = sum(
        output.size * math.prod(arrays[node.input[1]].shape[1:])
        for node, output in zip(layers, outputs, strict=True)
    )
    assert macs == MACS[model.graph.name]


def test_it_is_valid_onnx_with_a_dynamic_batch(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    assert [imported.version for imported in model.opset_import] == [17]
    (whole,) = run(model, IMAGES, ["logits"])
    single = [run(model, image[None], ["logits"])[0] for image in IMAGES]
    assert whole.shape == (3, 1000)
    np.testing.assert_allclose(whole, np.concatenate(single), rtol=0, atol=1e-4)


def test_every_batch_norm_leaves_gamma_and_beta_as_spread_and_mean(model: onnx.ModelProto) -> None:
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    arrays = weights(model)
    for node, output in zip(norms, run(model, IMAGES, [n.output[0] for n in norms]), strict=True):
        gamma, beta = arrays[node.input[1]], arrays[node.input[2]]
        spread, mean = output.std((0, 2, 3)), output.mean((0, 2, 3))
        np.testing.assert_allclose(spread, gamma, rtol=0.01, err_msg=node.name)
        np.testing.assert_allclose(mean, beta, atol=1e-3, err_msg=node.name)


def test_no_class_is_preferred(model: onnx.ModelProto) -> None:
    (logits,) = run(model, IMAGES, ["logits"])
    assert np.abs(logits.mean(0)).max() < 1e-3 * logits.std()


def test_the_seed_alone_sets_the_weights() -> None:
    first, again, other = (ARCHITECTURES.mobilenetv2(IMAGES[:1], seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
