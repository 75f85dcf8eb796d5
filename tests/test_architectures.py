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


# Encoder --------------------------------------------------------------------------------------


def encoder_answers(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    answers: Any = session.run(None, {"x": x})
    return np.asarray(answers[0])


def test_the_encoder_has_the_parameters_that_its_layers_have() -> None:
    width, hidden, layers, answers = 384, 1536, 4, 100
    layer = 4 * (width * width + width) + 2 * width * hidden + hidden + width + 2 * 2 * width
    built = weights(ARCHITECTURES.encoder())
    trained = sum(w.size for w in built.values() if w.ndim and w.dtype == np.float32)
    assert trained == layers * layer + 2 * width + width * answers + answers
    for name, weight in built.items():
        if name.endswith("_weight"):
            inputs = hidden if "down" in name else width
            assert 0.99 / math.sqrt(inputs) < np.abs(weight).max() <= 1 / math.sqrt(inputs), name


def test_the_encoder_is_what_numpy_computes_without_heads() -> None:
    """One token attends to itself alone, so attention hands its value on."""
    model = ARCHITECTURES.encoder()
    w = {name: array.astype(np.float64) for name, array in weights(model).items()}
    token = np.random.default_rng(0).standard_normal(384).astype(np.float32)

    def norm(x: Array) -> Array:
        return np.asarray((x - x.mean()) / np.sqrt(x.var() + 1e-5))

    x = token.astype(np.float64)
    for layer in range(4):
        prefix = f"layer{layer}_attention"
        value = norm(x) @ w[f"{prefix}_value_weight"] + w[f"{prefix}_value_bias"]
        x = x + value @ w[f"{prefix}_output_weight"] + w[f"{prefix}_output_bias"]
        prefix = f"layer{layer}_feed_forward"
        hidden = norm(x) @ w[f"{prefix}_up_weight"] + w[f"{prefix}_up_bias"]
        gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = x + gelu @ w[f"{prefix}_down_weight"] + w[f"{prefix}_down_bias"]
    wanted = w["answer_weight"] @ norm(x) + w["answer_bias"]
    same = np.broadcast_to(token, (1, 128, 384)).astype(np.float32)
    np.testing.assert_allclose(encoder_answers(model, same)[0], wanted, atol=1e-5)


def test_the_encoders_batch_is_dynamic_and_tokens_matter() -> None:
    model = ARCHITECTURES.encoder()
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).standard_normal((2, 128, 384)).astype(np.float32)
    whole = encoder_answers(model, x)
    assert whole.shape == (2, 100)
    np.testing.assert_allclose(encoder_answers(model, x[1:]), whole[1:], atol=1e-5)
    x[0, 5] *= 3
    assert np.abs(encoder_answers(model, x)[0] - whole[0]).max() > 1e-4
    assert ARCHITECTURES.encoder(0) == model != ARCHITECTURES.encoder(1)
